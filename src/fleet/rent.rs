//! What replicas cost, to the nano-dollar.
//!
//! A replica's rent from its start to an instant is the floor of `hourly × time`, and what is charged for an
//! interval is the difference of two such floors: however often rent is accrued, the sum is the same.

use std::time::Duration;

use serde::Serialize;

use crate::economics::time::millis;
use crate::economics::{NanoUsd, PoolSpec, Timestamp};

/// Rent that fell due between two instants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct RentDelta {
    pub from: Timestamp,
    pub to: Timestamp,
    /// Replica-time paid for, in milliseconds.
    pub replica_millis: u64,
    pub rent: NanoUsd,
}

/// One time of a replica from its start to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Life {
    started_at: Timestamp,
    /// Milliseconds of it that are already charged.
    charged: u64,
}

/// The open life of one replica, and what is due from those that have ended.
#[derive(Debug, Default)]
pub(super) struct Rent {
    life: Option<Life>,
    due_millis: u64,
    due: NanoUsd,
}

impl Rent {
    pub(super) fn open(&mut self, now: Timestamp) {
        debug_assert!(self.life.is_none(), "a replica has one life at a time");
        self.life = Some(Life { started_at: now, charged: 0 });
    }

    /// Ends the life. What is missing to the shortest billed time falls due at once, so that no later event
    /// can lose it.
    pub(super) fn close(&mut self, pool: &PoolSpec, now: Timestamp, minimum: Duration) {
        let Some(mut life) = self.life.take() else { return };
        let length = millis(now.since(life.started_at)).max(millis(minimum));
        self.charge(pool, &mut life, length);
    }

    /// Takes what is due up to `now`: replica-milliseconds and rent.
    pub(super) fn accrue(&mut self, pool: &PoolSpec, now: Timestamp) -> (u64, NanoUsd) {
        if let Some(mut life) = self.life {
            let length = millis(now.since(life.started_at));
            self.charge(pool, &mut life, length);
            self.life = Some(life);
        }
        (std::mem::take(&mut self.due_millis), std::mem::take(&mut self.due))
    }

    fn charge(&mut self, pool: &PoolSpec, life: &mut Life, length: u64) {
        let length = length.max(life.charged);
        self.due_millis += length - life.charged;
        self.due += pool.rent_between(life.charged, length);
        life.charged = length;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pool() -> PoolSpec {
        PoolSpec { max_replicas: 4, ..PoolSpec::small_model_on_an_h100() }
    }

    const START: Timestamp = Timestamp::from_secs(1_700_000_000);

    #[test]
    fn an_hour_costs_the_hourly_price() {
        let mut rent = Rent::default();
        rent.open(START);
        rent.close(&pool(), START + Duration::from_hours(1), pool().minimum);
        assert_eq!(rent.accrue(&pool(), START), (3_600_000, pool().hourly));
    }

    #[test]
    fn an_early_end_pays_the_minimum_once() {
        let mut rent = Rent::default();
        rent.open(START);
        let (first, _) = rent.accrue(&pool(), START + Duration::from_secs(20));
        rent.close(&pool(), START + Duration::from_secs(25), pool().minimum);
        let (second, _) = rent.accrue(&pool(), START + Duration::from_secs(30));
        let (third, nothing) = rent.accrue(&pool(), START + Duration::from_secs(90));
        assert_eq!((first, second, third), (20_000, 40_000, 0));
        assert_eq!(nothing, NanoUsd::ZERO);
    }

    proptest! {
        #[test]
        fn however_often_it_is_accrued_the_sum_is_the_rent_of_the_whole(
            waits in prop::collection::vec(0_u64..100_000, 1..50),
            hourly in 0_i64..40_000_000_000,
        ) {
            let pool = PoolSpec { hourly: NanoUsd::from_nanos(hourly), ..pool() };
            let mut rent = Rent::default();
            let mut now = START;
            let mut sum = NanoUsd::ZERO;
            rent.open(now);
            for wait in &waits {
                now = now + Duration::from_millis(*wait);
                sum += rent.accrue(&pool, now).1;
            }
            rent.close(&pool, now, pool.minimum);
            sum += rent.accrue(&pool, now).1;
            let length = waits.iter().sum::<u64>().max(60_000);
            prop_assert_eq!(sum, pool.rent_between(0, length));
        }
    }
}
