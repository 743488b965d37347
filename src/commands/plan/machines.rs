//! Machines to compare: the article's of 2023, and a small catalogue.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use serde::Deserialize;

use crate::commands::economy::Economy;
use crate::economics::{Billing, Capacity, NanoUsd, PoolSpec, PriceCard, Slot, Timestamp, TokenPrice, Usage};
use crate::ledger::query;

use super::{Comparison, sample};

/// The catalogue that ships with the program.
const CATALOGUE: &str = include_str!("../../../config/machines.toml");

/// Where the ledger is when neither a flag nor a configuration says so.
const LEDGER: &str = "breakeven.db";

/// Tokens in and out of one request of the article, one way.
const SEED_TOKENS: u64 = 667;

/// gpt-3.5-turbo against an ml.g5.12xlarge, prices of April 2023.
///
/// The article's own table was not at hand: prices and tokens are reconstructed from its conclusions, and what
/// the machine sustains is an assumption.
pub(super) fn seed_2023() -> Comparison {
    let two_dollars = TokenPrice::from_pico_per_token(2_000_000);
    let pool = PoolSpec {
        hourly: NanoUsd::from_nanos(7_090_000_000),
        billing: Billing::WhileRunning,
        request_fee: NanoUsd::ZERO,
        capacity: Capacity {
            input_tokens_per_second: 5_000,
            output_tokens_per_second: 2_500,
            max_in_flight: 32,
        },
        startup: Duration::from_mins(10),
        minimum: Duration::from_mins(1),
        max_replicas: 1000,
    };
    let usage = Usage::new(SEED_TOKENS, SEED_TOKENS);
    Comparison {
        api_name: "gpt-3.5-turbo".into(),
        machine: "ml.g5.12xlarge".into(),
        sample: sample(&PriceCard::flat(two_dollars, two_dollars), &pool, &usage),
        pool,
        note: Some(
            "a reconstruction: prices of April 2023 (gpt-3.5-turbo 2.00 USD a million tokens, ml.g5.12xlarge \
             7.09 USD an hour), 667 tokens in and out a request; 5,000 input and 2,500 output tokens a second \
             for each machine are assumed; API Gateway and Lambda (about 11.6 USD a million requests) left out"
                .into(),
        ),
        measured_per_day: None,
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Catalogue {
    machine: Vec<Machine>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Machine {
    name: String,
    hourly_usd: NanoUsd,
    input_tokens_per_second: u64,
    output_tokens_per_second: u64,
    source: String,
}

/// The owner's own traffic on each machine of the catalogue.
pub(super) fn of_ledger(
    ledger: &Path,
    catalogue: Option<&Path>,
    economy: &Economy,
) -> anyhow::Result<Vec<Comparison>> {
    let path = if ledger.as_os_str().is_empty() {
        economy.ledger.clone().unwrap_or_else(|| PathBuf::from(LEDGER))
    } else {
        ledger.to_owned()
    };
    let traffic = traffic(&path, economy)?;
    let text = match catalogue {
        Some(path) => {
            std::fs::read_to_string(path).with_context(|| format!("cannot read `{}`", path.display()))?
        }
        None => CATALOGUE.to_owned(),
    };
    let catalogue: Catalogue = toml::from_str(&text).context("the catalogue of machines is wrong")?;
    if catalogue.machine.is_empty() {
        bail!("the catalogue has no machine");
    }
    Ok(catalogue.machine.into_iter().map(|machine| traffic.on(machine, economy)).collect())
}

/// What the ledger saw.
#[derive(Debug, Default)]
struct Traffic {
    usage: Usage,
    api_cost: NanoUsd,
    requests: u64,
    first: Option<Timestamp>,
    last: Timestamp,
}

fn traffic(path: &Path, economy: &Economy) -> anyhow::Result<Traffic> {
    let mut traffic = Traffic::default();
    let end_of_time = Timestamp::from_millis(i64::MAX.unsigned_abs());
    query::trace(path, Timestamp::ZERO, end_of_time, |row| {
        let wanted = economy.route.as_ref().is_none_or(|route| row.route == *route);
        if let (true, Some(api_cost)) = (wanted, row.api_cost) {
            traffic.usage += row.usage;
            traffic.api_cost += api_cost;
            traffic.requests += 1;
            traffic.first.get_or_insert(row.opened_at);
            traffic.last = traffic.last.max(row.opened_at);
        }
    })?;
    if traffic.requests == 0 {
        bail!("the ledger `{}` has no priced calls yet", path.display());
    }
    Ok(traffic)
}

/// Less than this of traffic is no day to extrapolate from; it is counted as if it were that long.
const SHORTEST_SPAN: Duration = Duration::from_hours(1);

impl Traffic {
    #[expect(clippy::cast_precision_loss, reason = "a volume, not an amount")]
    fn per_day(&self) -> f64 {
        let span = self.last.since(self.first.unwrap_or(self.last)).max(SHORTEST_SPAN);
        self.requests as f64 / (span.as_secs_f64() / 86_400.0)
    }

    fn on(&self, machine: Machine, economy: &Economy) -> Comparison {
        let capacity = Capacity {
            input_tokens_per_second: machine.input_tokens_per_second.max(1),
            output_tokens_per_second: machine.output_tokens_per_second.max(1),
            max_in_flight: economy.pool.capacity.max_in_flight,
        };
        let max_replicas = match economy.pool.billing {
            Billing::Committed => economy.pool.max_replicas,
            Billing::WhileRunning | Billing::PerUse => 1000,
        };
        let pool = PoolSpec { hourly: machine.hourly_usd, capacity, max_replicas, ..economy.pool.clone() };
        let sample = Slot {
            api_cost: self.api_cost,
            work: capacity.work(&self.usage),
            requests: self.requests,
            tokens: self.usage.total_tokens(),
        };
        Comparison {
            api_name: "your API".into(),
            machine: machine.name,
            pool,
            sample,
            note: Some(format!("{}; the token rates are an estimate for an 8B model", machine.source)),
            measured_per_day: Some(self.per_day()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_catalogue_that_ships_can_be_read() {
        let catalogue: Catalogue = toml::from_str(CATALOGUE).unwrap();
        assert!(catalogue.machine.iter().all(|machine| machine.hourly_usd > NanoUsd::ZERO));
        assert!(catalogue.machine.len() >= 4);
    }
}
