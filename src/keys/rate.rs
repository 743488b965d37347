//! A rate limit in one atomic: a bucket that holds a minute's worth and refills steadily.
//!
//! What is kept is the instant at which the bucket will be full again (the generic cell rate algorithm). A take
//! moves it on by the time that refilling takes; there is no window whose edge could let through twice the limit
//! in a moment, and the time to wait is known exactly. Within any minute at most the bucket and one refill pass.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::economics::Timestamp;

const MINUTE_NANOS: u128 = 60_000_000_000;

/// So many units a minute.
#[derive(Debug)]
pub struct Rate {
    per_minute: u64,
    /// Nanoseconds since the Unix epoch: enough until the year 2554.
    full_at: AtomicU64,
}

/// A limit as the `x-ratelimit-*` headers tell it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateView {
    pub limit: u64,
    pub remaining: u64,
    /// Until the bucket is full.
    pub reset: Duration,
}

impl Rate {
    /// A full bucket. A limit of zero lets nothing through.
    pub fn new(per_minute: u64) -> Self {
        Self { per_minute, full_at: AtomicU64::new(0) }
    }

    pub fn per_minute(&self) -> u64 {
        self.per_minute
    }

    /// Takes `units`, or says how long to wait. More than a minute's worth is taken from a full bucket, and
    /// what is missing is waited for by those who come after.
    pub fn take(&self, units: u64, now: Timestamp) -> Result<(), Duration> {
        if self.per_minute == 0 {
            return Err(Duration::from_mins(1));
        }
        let (now, cost) = (nanos(now), self.time_of(units));
        let needed = u128::from(cost).min(MINUTE_NANOS);
        let mut full_at = self.full_at.load(Ordering::Relaxed);
        loop {
            let debt = full_at.saturating_sub(now);
            let after = u128::from(debt) + needed;
            if after > MINUTE_NANOS {
                return Err(Duration::from_nanos(u64::try_from(after - MINUTE_NANOS).unwrap_or(u64::MAX)));
            }
            let next = full_at.max(now).saturating_add(cost);
            match self.full_at.compare_exchange_weak(full_at, next, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Ok(()),
                Err(moved) => full_at = moved,
            }
        }
    }

    /// Corrects an earlier take of `taken` units to the `used` ones.
    pub fn correct(&self, taken: u64, used: u64, now: Timestamp) {
        let move_on = |full_at: u64| {
            Some(if used > taken {
                full_at.max(nanos(now)).saturating_add(self.time_of(used - taken))
            } else {
                full_at.saturating_sub(self.time_of(taken - used))
            })
        };
        let moved = self.full_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, move_on);
        debug_assert!(moved.is_ok(), "there is always a next instant");
    }

    pub fn view(&self, now: Timestamp) -> RateView {
        let debt = self.full_at.load(Ordering::Relaxed).saturating_sub(nanos(now));
        let free = MINUTE_NANOS.saturating_sub(u128::from(debt));
        let remaining = free * u128::from(self.per_minute) / MINUTE_NANOS;
        RateView {
            limit: self.per_minute,
            remaining: u64::try_from(remaining).unwrap_or(u64::MAX),
            reset: Duration::from_nanos(debt),
        }
    }

    /// How long so many units take to come back. Rounded up, so that no limit is exceeded by rounding.
    fn time_of(&self, units: u64) -> u64 {
        let time = (u128::from(units) * MINUTE_NANOS).div_ceil(u128::from(self.per_minute.max(1)));
        // A year is long enough for a limit of one.
        u64::try_from(time).unwrap_or(u64::MAX).min(MOST_DEBT_NANOS)
    }
}

/// Longest time that one take can add: an hour.
const MOST_DEBT_NANOS: u64 = 3_600_000_000_000;

fn nanos(at: Timestamp) -> u64 {
    at.as_millis().saturating_mul(1_000_000)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(millis: u64) -> Timestamp {
        Timestamp::from_millis(1_800_000_000_000 + millis)
    }

    #[test]
    fn a_full_bucket_gives_its_limit_at_once_and_then_one_at_a_time() {
        let rate = Rate::new(60);
        assert_eq!((0..100).filter(|_| rate.take(1, at(0)).is_ok()).count(), 60);
        assert_eq!(rate.take(1, at(0)), Err(Duration::from_secs(1)));
        assert_eq!(rate.take(1, at(1000)), Ok(()));
        assert_eq!(rate.view(at(1000)), RateView { limit: 60, remaining: 0, reset: Duration::from_mins(1) });
    }

    #[test]
    fn what_was_taken_and_not_used_comes_back() {
        let rate = Rate::new(1000);
        rate.take(900, at(0)).unwrap();
        assert!(rate.take(200, at(0)).is_err());
        rate.correct(900, 100, at(0));
        assert_eq!(rate.take(900, at(0)), Ok(()));
    }

    #[test]
    fn a_call_larger_than_the_limit_passes_alone_and_is_waited_for() {
        let rate = Rate::new(100);
        assert_eq!(rate.take(300, at(0)), Ok(()));
        assert_eq!(rate.take(1, at(120_000)), Err(Duration::from_millis(600)));
        assert_eq!(rate.take(1, at(120_600)), Ok(()));
    }

    proptest! {
        #[test]
        fn in_any_stretch_no_more_passes_than_the_bucket_and_its_refill(
            limit in 1_u64..5000,
            steps in proptest::collection::vec((0_u64..5000, 1_u64..200), 1..100),
        ) {
            let rate = Rate::new(limit);
            let (mut now, mut passed) = (0_u64, 0_u64);
            for (step, units) in steps {
                now += step;
                let units = units.min(limit);
                passed += if rate.take(units, at(now)).is_ok() { units } else { 0 };
                prop_assert!(passed <= limit + limit * now / 60_000 + 1);
            }
        }
    }
}
