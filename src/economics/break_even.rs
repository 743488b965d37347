//! Where the API and a rented replica cost the same.
//!
//! A backend's cost is affine in the volume: the API has no rent, a replica has almost nothing but rent.
//! `kappa` is the API dollars that a fully used replica replaces per dollar of rent. Break-even utilisation
//! is `1 / kappa`; break-even volume is daily rent over the mean API cost of a request. Without traffic there
//! is nothing to compare, and the answer is `None`, never an infinity.

use std::time::Duration;

use super::{Billing, NanoUsd, PoolSpec, Slot};

const HOUR: Duration = Duration::from_hours(1);

/// Rent that the slot's work takes on fully used replicas.
pub fn rent_of_work(pool: &PoolSpec, slot: &Slot) -> NanoUsd {
    pool.hourly.mul_div_floor(slot.work.0, 3_600_000_000)
}

/// API dollars that a fully used replica replaces, per dollar of rent. Below 1 no replica can ever pay.
pub fn kappa(pool: &PoolSpec, seen: &Slot) -> Option<f64> {
    let rent = rent_of_work(pool, seen).as_nanos();
    (rent > 0).then(|| ratio(seen.worth(pool).as_nanos(), rent))
}

/// Share of a replica's time that must be busy before it pays.
pub fn break_even_utilisation(pool: &PoolSpec, seen: &Slot) -> Option<f64> {
    kappa(pool, seen).filter(|kappa| *kappa > 0.0).map(f64::recip)
}

/// Requests a day at which `replicas` cost what the API costs, for requests like those of `seen`.
///
/// The replicas may be too small for that volume; see [`HourlyCosts`]. Paid by use they have no such volume: both sides
/// grow with it, and [`kappa`] says which is cheaper at any.
pub fn break_even_requests_per_day(pool: &PoolSpec, seen: &Slot, replicas: u32) -> Option<f64> {
    if pool.billing == Billing::PerUse {
        return None;
    }
    let worth = seen.worth(pool).as_nanos();
    let daily = pool.hourly.as_nanos().checked_mul(24 * i64::from(replicas))?;
    (seen.requests > 0 && worth > 0).then(|| ratio(daily, worth) * requests(seen.requests))
}

/// What an hour of a volume costs, by way of serving it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HourlyCosts {
    pub api: NanoUsd,
    /// Everything on replicas, as many as the work needs; what exceeds the largest fleet goes to the API.
    pub self_hosted: NanoUsd,
    pub self_hosted_replicas: u32,
    /// The cheapest fleet, with the overflow on the API.
    pub mix: NanoUsd,
    pub mix_replicas: u32,
}

/// Costs of an hour with the traffic `hour`.
pub fn hourly_costs(pool: &PoolSpec, hour: &Slot) -> HourlyCosts {
    let all = hour.replicas_filled(HOUR).clamp(1, pool.max_replicas.max(1));
    let (mix_replicas, mix) = cheapest_fleet(pool, hour);
    HourlyCosts {
        api: hour.api_cost,
        self_hosted: hourly_cost(pool, hour, all),
        self_hosted_replicas: all,
        mix,
        mix_replicas,
    }
}

/// Cost of an hour with the traffic `hour` on a fleet of `replicas`, the overflow on the API.
pub fn hourly_cost(pool: &PoolSpec, hour: &Slot, replicas: u32) -> NanoUsd {
    let on_api = hour.api_cost - hour.saved_by(pool, replicas, HOUR);
    let rent = match pool.billing {
        Billing::WhileRunning => pool.hourly.mul_div_floor(u64::from(replicas), 1),
        Billing::Committed => pool.hourly.mul_div_floor(u64::from(pool.max_replicas), 1),
        Billing::PerUse => {
            let room = super::layers::offered(replicas, HOUR);
            pool.hourly.mul_div_floor(hour.work.0.min(room), 3_600_000_000)
        }
    };
    on_api + rent
}

/// The size of fleet that costs least at a volume, the smaller one of equals, and its cost an hour.
pub fn cheapest_fleet(pool: &PoolSpec, hour: &Slot) -> (u32, NanoUsd) {
    let most = hour.replicas_filled(HOUR).min(pool.max_replicas);
    // The cost is convex in the fleet and changes slope only where the fleet is full, so the best is none,
    // full to the brim, or one less.
    [0, most.saturating_sub(1), most]
        .into_iter()
        .map(|replicas| (replicas, hourly_cost(pool, hour, replicas)))
        .min_by_key(|(replicas, cost)| (*cost, *replicas))
        .expect("three candidates")
}

#[expect(clippy::cast_precision_loss, reason = "a ratio, not an amount")]
fn ratio(numerator: i64, denominator: i64) -> f64 {
    numerator as f64 / denominator as f64
}

#[expect(clippy::cast_precision_loss, reason = "a volume, not an amount")]
fn requests(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::super::catalog::Work;
    use super::*;
    use proptest::prelude::*;

    fn pool(hourly: &str) -> PoolSpec {
        PoolSpec { hourly: hourly.parse().unwrap(), max_replicas: 8, ..PoolSpec::small_model_on_an_h100() }
    }

    fn hour(requests: u64, each: &str, work_each: u64) -> Slot {
        let each: NanoUsd = each.parse().unwrap();
        Slot {
            api_cost: each.mul_div_floor(requests, 1),
            work: Work(work_each * requests),
            requests,
            tokens: 0,
        }
    }

    #[test]
    fn break_even_of_the_seed_is_63_778_requests_a_day() {
        let per_day = break_even_requests_per_day(&pool("7.09"), &hour(1, "0.002668", 1), 1).unwrap();
        assert!((per_day - 63_778.0).abs() < 0.5, "{per_day}");
    }

    #[test]
    fn two_and_a_half_dollars_an_hour_against_four_tenths_of_a_cent_is_625_requests_an_hour() {
        let per_day = break_even_requests_per_day(&pool("2.50"), &hour(1000, "0.004", 1), 1).unwrap();
        assert!((per_day / 24.0 - 625.0).abs() < 1e-9);
        let pool = pool("2.50");
        assert_eq!(cheapest_fleet(&pool, &hour(625, "0.004", 1)).0, 0);
        assert_eq!(cheapest_fleet(&pool, &hour(626, "0.004", 1)).0, 1);
    }

    #[test]
    fn no_volume_has_no_break_even_and_costs_nothing_on_the_api() {
        let (pool, nothing) = (pool("2.99"), Slot::default());
        assert_eq!(kappa(&pool, &nothing), None);
        assert_eq!(break_even_utilisation(&pool, &nothing), None);
        assert_eq!(break_even_requests_per_day(&pool, &nothing, 1), None);
        let costs = hourly_costs(&pool, &nothing);
        assert_eq!((costs.api, costs.mix, costs.mix_replicas), (NanoUsd::ZERO, NanoUsd::ZERO, 0));
        assert_eq!(costs.self_hosted, pool.hourly);
    }

    #[test]
    fn what_is_paid_by_use_has_no_volume_at_which_it_breaks_even() {
        let pool = PoolSpec { billing: Billing::PerUse, ..pool("2.50") };
        assert_eq!(break_even_requests_per_day(&pool, &hour(1000, "0.004", 1), 1), None);
        assert!(kappa(&pool, &hour(1000, "0.004", 1)).is_some());
    }

    proptest! {
        #[test]
        fn the_cheapest_fleet_is_the_cheapest_of_all(requests in 0_u64..3_000_000, each in 1_i64..5_000_000, work in 1_u64..100_000) {
            let pool = pool("2.99");
            let slot = Slot {
                api_cost: NanoUsd::from_nanos(each * i64::try_from(requests).unwrap()),
                work: Work(work * requests),
                requests,
                tokens: 0,
            };
            let best = (0..=pool.max_replicas).map(|replicas| hourly_cost(&pool, &slot, replicas)).min().unwrap();
            // Floors of adjacent fleets may bend the line by a nano-dollar.
            prop_assert!((cheapest_fleet(&pool, &slot).1 - best).as_nanos() <= 8);
        }

        #[test]
        fn at_break_even_both_cost_the_same(each in 1_000_i64..5_000_000) {
            let pool = pool("2.99");
            let one = Slot { api_cost: NanoUsd::from_nanos(each), work: Work(1), requests: 1, tokens: 0 };
            let per_day = break_even_requests_per_day(&pool, &one, 1).unwrap();
            let api = per_day * NanoUsd::from_nanos(each).to_usd_f64();
            prop_assert!((api - 24.0 * 2.99).abs() < 1e-6);
        }
    }
}
