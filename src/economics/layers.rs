//! A fleet as layers: what the n-th replica earns in a slot.
//!
//! `n` ready replicas serve the share `min(1, n·dt / W)` of a slot's work, so the API dollars they save,
//! `S[n] = worth · min(1, n·dt / W)`, are concave in `n`, and the gain of layer `j`,
//! `G[j] = S[j] − S[j−1]`, never grows with `j`. Replicas being alike, a fleet of any size is a set of
//! independent on/off problems, one a layer. All amounts are integers and the gains telescope exactly.

use std::time::Duration;

use super::time::millis;
use super::{NanoUsd, PoolSpec, Slot};

impl Slot {
    /// API dollars that serving the whole slot on replicas would save: the API bill without the glue paid
    /// per request. Never negative: traffic which the glue alone makes dearer stays on the API.
    pub fn worth(&self, pool: &PoolSpec) -> NanoUsd {
        let fees = i128::from(pool.request_fee.as_nanos()) * i128::from(self.requests);
        let worth = i128::from(self.api_cost.as_nanos()) - fees;
        NanoUsd::from_nanos(i64::try_from(worth.max(0)).expect("at most the API bill"))
    }

    /// API dollars saved by `replicas` that are ready for all of a slot of length `slot`.
    pub fn saved_by(&self, pool: &PoolSpec, replicas: u32, slot: Duration) -> NanoUsd {
        share(self.worth(pool), self.work.0, offered(replicas, slot))
    }

    /// API dollars saved in this slot by the replica on layer `layer`, counted from 1.
    pub fn layer_gain(&self, pool: &PoolSpec, layer: u32, slot: Duration) -> NanoUsd {
        self.saved_by(pool, layer, slot) - self.saved_by(pool, layer - 1, slot)
    }

    /// The gain of each layer, from the first, in rents of a slot: a ratio, so 1 is a replica that pays its rent.
    pub fn gains_in_rents(&self, pool: &PoolSpec, slot: Duration) -> impl Iterator<Item = f64> {
        let rent = slot_rent(pool, slot);
        (1..=pool.max_replicas).map(move |layer| self.layer_gain(pool, layer, slot).to_usd_f64() / rent)
    }

    /// Replicas that the slot's work would keep fully busy, rounded up.
    pub fn replicas_filled(&self, slot: Duration) -> u32 {
        u32::try_from(self.work.0.div_ceil(offered(1, slot).max(1))).unwrap_or(u32::MAX)
    }
}

/// Rent of a slot in dollars, to divide by: never zero.
pub(super) fn slot_rent(pool: &PoolSpec, slot: Duration) -> f64 {
    pool.rent_between(0, millis(slot)).to_usd_f64().max(f64::MIN_POSITIVE)
}

/// Work that `replicas` can do in `slot`, in micro-replica-seconds.
pub fn offered(replicas: u32, slot: Duration) -> u64 {
    u64::try_from(slot.as_micros()).unwrap_or(u64::MAX).saturating_mul(u64::from(replicas))
}

fn share(worth: NanoUsd, work: u64, offered: u64) -> NanoUsd {
    if offered >= work {
        if offered == 0 { NanoUsd::ZERO } else { worth }
    } else {
        worth.mul_div_floor(offered, work)
    }
}

/// Whole slots that a duration takes, rounded up.
pub fn slots_in(duration: Duration, slot: Duration) -> u32 {
    u32::try_from(duration.as_millis().div_ceil(slot.as_millis().max(1))).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::catalog::Work;
    use super::*;
    use proptest::prelude::*;

    fn pool(fee: i64) -> PoolSpec {
        PoolSpec { request_fee: NanoUsd::from_nanos(fee), ..PoolSpec::small_model_on_an_h100() }
    }

    proptest! {
        #[test]
        fn gains_telescope_and_never_grow_with_the_layer(
            cost in 0_i64..1_000_000_000_000, work in 0_u64..10_000_000_000, fee in 0_i64..1_000, requests in 0_u64..1_000_000
        ) {
            let slot = Slot { api_cost: NanoUsd::from_nanos(cost), work: Work(work), requests, tokens: 0 };
            let (pool, minute) = (pool(fee), Duration::from_mins(1));
            let gains: Vec<_> = (1..40).map(|layer| slot.layer_gain(&pool, layer, minute)).collect();
            prop_assert_eq!(gains.iter().copied().sum::<NanoUsd>(), slot.saved_by(&pool, 39, minute));
            for pair in gains.windows(2) {
                prop_assert!(pair[1].as_nanos() <= pair[0].as_nanos() + 1, "{:?}", pair);
            }
            prop_assert!(slot.saved_by(&pool, 39, minute) <= slot.worth(&pool));
        }
    }

    #[test]
    fn an_empty_slot_is_worth_nothing() {
        let slot = Slot::default();
        assert_eq!(slot.saved_by(&pool(0), 3, Duration::from_mins(1)), NanoUsd::ZERO);
        assert_eq!(slot.replicas_filled(Duration::from_mins(1)), 0);
    }

    #[test]
    fn a_part_of_a_slot_is_a_whole_slot() {
        assert_eq!(slots_in(Duration::from_secs(61), Duration::from_mins(1)), 2);
        assert_eq!(slots_in(Duration::ZERO, Duration::from_mins(1)), 0);
    }
}
