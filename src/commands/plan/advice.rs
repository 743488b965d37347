//! What an owner should do, in one sentence.

use super::Comparison;
use crate::commands::figures;
use crate::economics::Billing;
use crate::economics::break_even::{break_even_requests_per_day, kappa};

/// Advice for the volume that was measured; none when none was.
pub(super) fn advice(comparison: &Comparison) -> Option<String> {
    let volume = comparison.measured_per_day?;
    let machine = &comparison.machine;
    let (Some(kappa), Some(break_even)) =
        (kappa(&comparison.pool, &comparison.sample), pays_from(comparison))
    else {
        return Some(format!(
            "at {} requests a day there is nothing for the {machine} to save",
            grouped(volume)
        ));
    };
    let share = volume / break_even * 100.0;
    let at = if comparison.pool.billing == Billing::PerUse {
        format!("at {} requests a day, as at any volume, the {machine} is cheaper", grouped(volume))
    } else {
        format!("at {} requests a day you are at {share:.0}% of the {machine}'s break-even", grouped(volume))
    };
    Some(if kappa < 1.0 {
        format!(
            "at {} requests a day stay with the API: full all day, the {machine} would replace only {:.0}% of its rent",
            grouped(volume),
            kappa * 100.0
        )
    } else if share < 100.0 {
        format!("{at}; it would pay from {}", grouped(break_even))
    } else {
        let row = comparison.row(whole(volume));
        let saved = row.api_usd - row.mix_usd.min(row.self_hosted_usd);
        format!(
            "{at}; {} of them would save ${saved:.2} a day if the traffic were even",
            row.mix_replicas.max(1)
        )
    })
}

/// Requests a day from which the machine can pay; by use, from the first.
fn pays_from(comparison: &Comparison) -> Option<f64> {
    match comparison.pool.billing {
        Billing::PerUse => Some(0.0),
        Billing::Committed | Billing::WhileRunning => {
            break_even_requests_per_day(&comparison.pool, &comparison.sample, 1)
        }
    }
}

/// The machine to look at: the one that saves most at the measured volume, or, if none saves anything, the
/// one that would pay first. None when nothing was measured.
pub(super) fn best(comparisons: &[Comparison]) -> Option<usize> {
    let rank = |comparison: &Comparison| {
        let volume = comparison.measured_per_day?;
        let row = comparison.row(whole(volume));
        let saved = row.api_usd - row.mix_usd.min(row.self_hosted_usd);
        let kappa = kappa(&comparison.pool, &comparison.sample)?;
        let pays_from = if kappa < 1.0 { f64::INFINITY } else { pays_from(comparison)? };
        Some((-saved.max(0.0), pays_from))
    };
    let ranked = comparisons.iter().enumerate().filter_map(|(index, one)| Some((index, rank(one)?)));
    let by_rank = |(_, a): &(usize, (f64, f64)), (_, b): &(usize, (f64, f64))| {
        a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1))
    };
    ranked.min_by(by_rank).map(|(index, _)| index)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a volume is not negative")]
pub(super) fn whole(volume: f64) -> u64 {
    volume.round() as u64
}

/// `41000` → `41,000`.
pub(super) fn grouped(volume: f64) -> String {
    figures::grouped(whole(volume))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::sample;
    use super::*;
    use crate::economics::{Billing, Capacity, NanoUsd, PoolSpec, PriceCard, TokenPrice, Usage};

    /// Requests of 1,000 tokens in and 300 out, at 2 USD a million, on a machine at that rent.
    fn on(machine: &str, hourly: &str, per_day: f64) -> Comparison {
        let price = TokenPrice::from_usd_per_million("2").unwrap();
        let pool = PoolSpec {
            hourly: hourly.parse().unwrap(),
            billing: Billing::WhileRunning,
            request_fee: NanoUsd::ZERO,
            capacity: Capacity {
                input_tokens_per_second: 1_000,
                output_tokens_per_second: 1_000,
                max_in_flight: 8,
            },
            startup: Duration::from_mins(5),
            minimum: Duration::from_mins(1),
            max_replicas: 8,
        };
        Comparison {
            api_name: "an API".into(),
            machine: machine.into(),
            sample: sample(&PriceCard::flat(price, price), &pool, &Usage::new(1_000, 300)),
            pool,
            note: None,
            measured_per_day: Some(per_day),
        }
    }

    #[test]
    fn the_advice_is_one_sentence_with_the_share_of_break_even() {
        let below = advice(&on("L40S", "1.30", 6_000.0)).unwrap();
        assert_eq!(
            below,
            "at 6,000 requests a day you are at 50% of the L40S's break-even; it would pay from 12,000"
        );
        let above = advice(&on("L40S", "1.30", 24_000.0)).unwrap();
        assert!(above.contains("at 200% of") && above.contains("would save $31.20 a day"), "{above}");
        let never = advice(&on("H900", "99", 24_000.0)).unwrap();
        assert!(never.contains("stay with the API"), "{never}");
    }

    #[test]
    fn the_machine_to_look_at_saves_most_or_would_pay_first() {
        let best_at = |per_day| best(&[on("A", "2", per_day), on("B", "1", per_day), on("C", "99", per_day)]);
        assert_eq!((best_at(100.0), best_at(50_000.0)), (Some(1), Some(1)));
        assert_eq!(best(&[Comparison { measured_per_day: None, ..on("A", "2", 1.0) }]), None);
    }

    #[test]
    fn thousands_are_grouped() {
        for (number, text) in [(0.0, "0"), (999.0, "999"), (63_778.4, "63,778"), (1e6, "1,000,000")] {
            assert_eq!(grouped(number), text);
        }
    }
}
