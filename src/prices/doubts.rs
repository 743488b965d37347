//! Prices that cannot well be meant: units mistaken for one another, discounts that cost more.
//!
//! A price per token where one per million is due is a million times too small; cents for dollars are a
//! hundred times too much. Both have locked people out of their own service.

use super::{Line, ModelPrices, PriceFile, write::decimal};
use crate::config::PriceBook;
use crate::economics::{Tier, TokenPrice};

/// No text model has been cheaper than a tenth of a cent, or dearer than two thousand dollars, a million tokens.
const LEAST: TokenPrice = TokenPrice::from_pico_per_token(1_000);
const MOST: TokenPrice = TokenPrice::from_pico_per_token(2_000_000_000);
/// A known model's price does not change by so much from one list to the next.
const FACTOR: u64 = 20;

/// Every doubt about a file, as sentences; with `known`, also what differs wildly from there.
pub fn of_file(file: &PriceFile, known: Option<&PriceBook>) -> Vec<String> {
    let mut doubts = Vec::new();
    for (name, model) in &file.models {
        let mut doubt = |what: String| doubts.push(format!("`{name}`: {what}"));
        of_model(model, &mut doubt);
        if let Some(card) = known.and_then(|book| book.card(name)) {
            differs("input", model.table.standard.get("input"), card.standard.input, &mut doubt);
            differs("output", model.table.standard.get("output"), card.standard.output, &mut doubt);
        }
    }
    doubts
}

fn of_model(model: &ModelPrices, doubt: &mut impl FnMut(String)) {
    let tables = std::iter::once(("", &model.table))
        .chain(model.long_context.iter().map(|(_, table)| ("long_context.", table)));
    for (prefix, table) in tables {
        for (tier, line) in table.lines() {
            of_line(&format!("{prefix}{}", tier.as_str()), line, doubt);
            if matches!(tier, Tier::Batch | Tier::Flex) && exceeds(line, &table.standard) {
                doubt(format!("{prefix}{} costs more than standard", tier.as_str()));
            }
        }
    }
    if let Some((_, long)) = &model.long_context
        && exceeds(&model.table.standard, &long.standard)
    {
        doubt("a long context costs less than a short one".to_owned());
    }
}

fn of_line(name: &str, line: &Line, doubt: &mut impl FnMut(String)) {
    for (key, price) in line.stated().filter(|(_, price)| *price != TokenPrice::ZERO) {
        if price < LEAST {
            doubt(format!(
                "{name} {key} = {} USD per million tokens is next to nothing; is it per token?",
                decimal(price)
            ));
        }
        if price > MOST {
            doubt(format!(
                "{name} {key} = {} USD per million tokens is beyond any model; is it per token, or in cents?",
                decimal(price)
            ));
        }
    }
    let (Some(input), Some(output)) = (line.get("input"), line.get("output")) else { return };
    if line.get("cached_input").is_some_and(|cached| cached > input) {
        doubt(format!("{name} cached_input costs more than input"));
    }
    if line.get("cache_write").is_some_and(|written| written > times(input, 4)) {
        doubt(format!("{name} cache_write costs more than four times input"));
    }
    if output != TokenPrice::ZERO && output < input {
        doubt(format!("{name} output costs less than input; are they swapped?"));
    }
    if output > times(input, 100) && input != TokenPrice::ZERO {
        doubt(format!("{name} output costs more than a hundred times input; are they in the same unit?"));
    }
}

fn exceeds(line: &Line, other: &Line) -> bool {
    ["input", "output"].iter().any(|key| line.get(key) > other.get(key))
}

fn differs(key: &str, price: Option<TokenPrice>, known: TokenPrice, doubt: &mut impl FnMut(String)) {
    let Some(price) = price.filter(|price| *price != TokenPrice::ZERO && known != TokenPrice::ZERO) else {
        return;
    };
    if price >= times(known, FACTOR) || known >= times(price, FACTOR) {
        doubt(format!(
            "{key} = {} USD per million tokens, where {} is known; is it in cents, or per thousand?",
            decimal(price),
            decimal(known)
        ));
    }
}

fn times(price: TokenPrice, factor: u64) -> TokenPrice {
    TokenPrice::from_pico_per_token(price.as_pico_per_token().saturating_mul(factor))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prices;

    fn doubts(model: &str, lines: &str) -> String {
        let text = format!(
            "unit = \"usd_per_million_tokens\"\nsource = \"t\"\nconfirmed_at = 2026-01-01\neffective_from = 2026-01-01\n[models.{model}]\n{lines}"
        );
        of_file(&prices::read(&text).unwrap(), Some(&prices::built_in())).join("\n")
    }

    #[test]
    fn a_wrong_unit_is_noticed() {
        assert!(doubts("x", "input = 0.000001\noutput = 0.000002").contains("is it per token?"));
        assert!(doubts("x", "input = 150000\noutput = 600000").contains("beyond any model"));
        assert!(doubts("gpt-4o-mini", "input = 15\noutput = 60").contains("in cents"));
        assert!(doubts("gpt-4o-mini", "input = 0.0015\noutput = 0.006").contains("per thousand"));
    }

    #[test]
    fn a_discount_that_costs_more_is_noticed() {
        assert!(doubts("x", "input = 1\noutput = 2\ncached_input = 3").contains("cached_input costs more"));
        assert!(
            doubts("x", "input = 1\noutput = 2\nbatch = { input = 2, output = 2 }")
                .contains("batch costs more")
        );
        assert!(doubts("x", "input = 2\noutput = 1").contains("swapped"));
    }

    #[test]
    fn ordinary_prices_and_free_ones_raise_no_doubt() {
        assert_eq!(doubts("gpt-4o-mini", "input = 0.15\ncached_input = 0.075\noutput = 0.6"), "");
        assert_eq!(doubts("mine", "input = 0\noutput = 0"), "");
    }
}
