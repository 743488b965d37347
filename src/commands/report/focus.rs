//! The report in the columns of FOCUS 1.2, the FinOps Open Cost and Usage Specification, as CSV.
//!
//! One row is what one backend served of one model to one team, key and route on one UTC day; idle rent is a
//! row of its own, so the sum of `BilledCost` is the spend. Columns that begin with `x_` are ours, as the
//! specification allows. See <https://focus.finops.org/focus-specification/v1-2>.

use std::io::{self, Write};

use serde_json::json;

use crate::economics::NanoUsd;
use crate::ledger::query::{IDLE, Key, Row};

pub(super) static KEYS: [Key; 7] =
    [Key::Day, Key::Backend, Key::ServedModel, Key::Model, Key::Team, Key::VirtualKey, Key::Route];

const COLUMNS: [&str; 40] = [
    "BilledCost",
    "BillingAccountId",
    "BillingAccountName",
    "BillingCurrency",
    "BillingPeriodEnd",
    "BillingPeriodStart",
    "ChargeCategory",
    "ChargeClass",
    "ChargeDescription",
    "ChargeFrequency",
    "ChargePeriodEnd",
    "ChargePeriodStart",
    "ConsumedQuantity",
    "ConsumedUnit",
    "ContractedCost",
    "EffectiveCost",
    "InvoiceIssuerName",
    "ListCost",
    "PricingQuantity",
    "PricingUnit",
    "ProviderName",
    "PublisherName",
    "ResourceId",
    "ResourceName",
    "ResourceType",
    "ServiceCategory",
    "ServiceName",
    "ServiceSubcategory",
    "SkuId",
    "SubAccountId",
    "SubAccountName",
    "Tags",
    "x_Requests",
    "x_InputTokens",
    "x_CachedInputTokens",
    "x_OutputTokens",
    "x_EstimatedRequests",
    "x_AllApiCost",
    "x_RentCost",
    "x_IdleCost",
];

pub(super) fn write(rows: &[Row], out: &mut impl Write) -> io::Result<()> {
    let mut csv = csv::Writer::from_writer(out);
    csv.write_record(COLUMNS)?;
    for row in rows {
        csv.write_record(record(row))?;
    }
    csv.flush()
}

fn record(row: &Row) -> [String; COLUMNS.len()] {
    let [day, backend, served_model, model, team, key, route] =
        row.keys.as_slice().first_chunk().expect("rows are grouped by `KEYS`");
    let is_idle = served_model == IDLE;
    let named = |name: &String| if is_idle { String::new() } else { name.clone() };
    let (cost, quantity) = (amount(row.spend()), row.input_tokens + row.output_tokens);
    let (quantity, unit) =
        if is_idle { (String::new(), String::new()) } else { (quantity.to_string(), "Tokens".to_owned()) };
    let description = if is_idle {
        format!("Rent of {backend} that no call used")
    } else {
        format!("{served_model} on {backend}")
    };
    let (period_start, period_end) = month(day);
    [
        cost.clone(),
        "breakeven".into(),
        "breakeven".into(),
        "USD".into(),
        period_end,
        period_start,
        "Usage".into(),
        String::new(),
        description,
        "Usage-Based".into(),
        midnight_after(day),
        format!("{day}T00:00:00Z"),
        quantity.clone(),
        unit.clone(),
        cost.clone(),
        cost.clone(),
        backend.clone(),
        cost,
        quantity,
        unit,
        backend.clone(),
        backend.clone(),
        backend.clone(),
        backend.clone(),
        "LLM backend".into(),
        "AI and Machine Learning".into(),
        "LLM inference".into(),
        "Generative AI".into(),
        named(served_model),
        named(key),
        named(key),
        tags(&[("team", &named(team)), ("route", &named(route)), ("model", &named(model))]),
        row.requests.to_string(),
        row.input_tokens.to_string(),
        row.cached_input_tokens.to_string(),
        row.output_tokens.to_string(),
        row.estimated_requests.to_string(),
        amount(row.all_api),
        amount(row.rent),
        amount(row.idle),
    ]
}

fn amount(amount: NanoUsd) -> String {
    amount.to_string()
}

/// FOCUS wants tags as a JSON object in one column; what has no value is left out.
fn tags(pairs: &[(&str, &String)]) -> String {
    let set = pairs.iter().filter(|(_, value)| !value.is_empty());
    let object: serde_json::Map<_, _> = set.map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
    serde_json::Value::Object(object).to_string()
}

fn midnight_after(day: &str) -> String {
    date(day).and_then(|date| date.tomorrow().ok()).map_or_else(String::new, midnight)
}

/// First day of the day's month, and of the month after.
fn month(day: &str) -> (String, String) {
    let Some(date) = date(day) else { return (String::new(), String::new()) };
    let after = date.last_of_month().tomorrow().map_or_else(|_| String::new(), midnight);
    (midnight(date.first_of_month()), after)
}

fn date(day: &str) -> Option<jiff::civil::Date> {
    day.parse().ok()
}

fn midnight(date: jiff::civil::Date) -> String {
    format!("{date}T00:00:00Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(keys: [&str; 7]) -> Row {
        let keys = keys.map(str::to_owned).to_vec();
        Row { keys, requests: 2, input_tokens: 30, output_tokens: 5, ..Row::default() }
    }

    fn column(row: &Row, name: &str) -> String {
        record(row)[COLUMNS.iter().position(|column| *column == name).unwrap()].clone()
    }

    #[test]
    fn a_charge_names_its_day_month_model_and_tags() {
        let mut row =
            row(["2026-12-31", "openai", "gpt-4o-mini-2024-07-18", "gpt-4o-mini", "search", "", "chat"]);
        row.cost = NanoUsd::from_nanos(1_500_000_001);
        for (name, value) in [
            ("BilledCost", "1.500000001"),
            ("ChargePeriodStart", "2026-12-31T00:00:00Z"),
            ("ChargePeriodEnd", "2027-01-01T00:00:00Z"),
            ("BillingPeriodStart", "2026-12-01T00:00:00Z"),
            ("BillingPeriodEnd", "2027-01-01T00:00:00Z"),
            ("ConsumedQuantity", "35"),
            ("SkuId", "gpt-4o-mini-2024-07-18"),
            ("Tags", r#"{"model":"gpt-4o-mini","route":"chat","team":"search"}"#),
        ] {
            assert_eq!(column(&row, name), value, "{name}");
        }
    }

    #[test]
    fn idle_rent_is_a_charge_without_tokens() {
        let mut row = row(["2026-12-31", "gpu", IDLE, IDLE, IDLE, IDLE, IDLE]);
        (row.rent, row.idle) = (NanoUsd::from_nanos(7), NanoUsd::from_nanos(7));
        assert_eq!(column(&row, "BilledCost"), "0.000000007");
        assert_eq!(column(&row, "ConsumedQuantity"), "");
        assert_eq!(column(&row, "Tags"), "{}");
        assert_eq!(column(&row, "ChargeDescription"), "Rent of gpu that no call used");
    }
}
