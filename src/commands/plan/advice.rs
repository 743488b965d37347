//! What an owner should do, in one sentence.

use super::Comparison;

/// Advice for the volume that was measured; none when none was.
pub(super) fn advice(comparison: &Comparison) -> Option<String> {
    let volume = comparison.measured_per_day?;
    let machine = &comparison.machine;
    let plan = crate::economics::break_even::kappa(&comparison.pool, &comparison.sample);
    let break_even =
        crate::economics::break_even::break_even_requests_per_day(&comparison.pool, &comparison.sample, 1);
    let (Some(kappa), Some(break_even)) = (plan, break_even) else {
        return Some(format!(
            "at {} requests a day there is nothing for the {machine} to save",
            grouped(volume)
        ));
    };
    let share = volume / break_even * 100.0;
    let at =
        format!("at {} requests a day you are at {share:.0}% of the {machine}'s break-even", grouped(volume));
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

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a volume is not negative")]
pub(super) fn whole(volume: f64) -> u64 {
    volume.round() as u64
}

/// `41000` → `41,000`.
pub(super) fn grouped(volume: f64) -> String {
    let digits = whole(volume).to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_grouped() {
        for (number, text) in [(0.0, "0"), (999.0, "999"), (63_778.4, "63,778"), (1e6, "1,000,000")] {
            assert_eq!(grouped(number), text);
        }
    }
}
