//! `breakeven plan`: what to buy at which volume.

mod advice;
mod machines;
mod plot;
mod table;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::economics::break_even::break_even_requests_per_day;
use crate::economics::{Billing, NanoUsd, PoolSpec, PriceCard, Slot, TokenPrice, Usage, Work};
use crate::simulator::priced;

use super::economy::{Economy, EconomyArgs};

/// Cost per day against requests per day for the API, the machine and the mix, and where they break even.
///
/// Volumes are spread evenly over the day; `simulate` replays real ones.
#[derive(Debug, Clone, Default, Args)]
pub struct PlanArgs {
    /// Input tokens of the mean request.
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(..=MOST_TOKENS))]
    pub input_tokens: u64,
    /// Output tokens of the mean request.
    #[arg(long, value_name = "N", default_value_t = 300, value_parser = clap::value_parser!(u64).range(..=MOST_TOKENS))]
    pub output_tokens: u64,
    /// Volumes to show.
    #[arg(long, value_name = "N,..", value_delimiter = ',', value_parser = clap::value_parser!(u64).range(..=MOST_REQUESTS))]
    pub requests_per_day: Vec<u64>,
    /// A comparison that needs no configuration, and takes no other numbers than its own.
    #[arg(long, value_enum, conflicts_with_all = NOT_WITH_A_PRESET)]
    pub preset: Option<Preset>,
    /// Price the calls in the ledger on each machine of the catalogue; without FILE, the configuration's ledger.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "")]
    pub from_ledger: Option<PathBuf>,
    /// Machines to compare with `--from-ledger`, instead of the catalogue that ships with the program.
    #[arg(long, value_name = "FILE.toml", requires = "from_ledger")]
    pub machines: Option<PathBuf>,
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
    /// Draw the cost a day against the requests a day.
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
    #[command(flatten)]
    pub economy: EconomyArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Preset {
    /// The article of April 2023: gpt-3.5-turbo against a g5 instance on AWS. A reconstruction.
    #[value(name = "seed-2023")]
    Seed2023,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Format {
    #[default]
    Table,
    Json,
    Csv,
}

/// The API against one machine, for one mean request.
#[derive(Debug, Clone)]
pub struct Comparison {
    pub api_name: String,
    pub machine: String,
    pub pool: PoolSpec,
    /// Many requests, so that their mean is exact to a fraction of a nano-dollar.
    pub sample: Slot,
    /// What must be known about where the figures come from.
    pub note: Option<String>,
    /// Requests a day in the ledger, when that is where the sample is from.
    pub measured_per_day: Option<f64>,
}

/// Tokens of a request and requests of a day at most: more is a slip of the hand.
const MOST_TOKENS: u64 = 1_000_000_000;
const MOST_REQUESTS: u64 = 1_000_000_000_000;

/// A day's bill, rent and work, in replica-seconds, beyond these are refused: a ninth of what their integers can hold, or
/// less, because a price may have dearer tiers.
const LARGEST_BILL_USD: f64 = 1e9;
const LARGEST_WORK_SECONDS: f64 = 2e12;

/// Requests of a sample: their mean is exact to a fraction of a nano-dollar.
const SAMPLE: u64 = 1_000_000;

/// A preset says all that these would.
const NOT_WITH_A_PRESET: [&str; 16] = [
    "config",
    "route",
    "from_ledger",
    "input_tokens",
    "output_tokens",
    "api_input_usd_per_million",
    "api_cached_input_usd_per_million",
    "api_output_usd_per_million",
    "hourly_usd",
    "billing",
    "request_usd",
    "input_tokens_per_second",
    "output_tokens_per_second",
    "startup",
    "minimum",
    "max_replicas",
];

/// Volumes of the table, unless others are asked for.
const VOLUMES: [u64; 9] = [100, 1_000, 10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000];

/// Compares and writes the result to `out`.
pub fn run(arguments: &PlanArgs, out: &mut impl Write) -> anyhow::Result<ExitCode> {
    let comparisons = comparisons(arguments)?;
    let volumes = volumes(arguments);
    let mut plans: Vec<Plan> = comparisons.iter().map(|comparison| comparison.plan(&volumes)).collect();
    let best = advice::best(&comparisons);
    if let Some(best) = best {
        plans.iter_mut().enumerate().for_each(|(index, plan)| plan.is_best = Some(index == best));
    }
    if let Some(path) = &arguments.plot {
        plot::draw(&comparisons[best.unwrap_or(0)], path)
            .with_context(|| format!("cannot draw `{}`", path.display()))?;
    }
    match arguments.format {
        Format::Table => table::write(&comparisons, &plans, out),
        Format::Json => json(&plans, out),
        Format::Csv => table::csv(&plans, out),
    }
    .context("cannot write the plan")?;
    Ok(ExitCode::SUCCESS)
}

fn comparisons(arguments: &PlanArgs) -> anyhow::Result<Vec<Comparison>> {
    if let Some(Preset::Seed2023) = arguments.preset {
        return Ok(vec![machines::seed_2023()]);
    }
    let economy = arguments.economy.economy()?;
    if economy.pool.max_replicas == 0 {
        bail!("there is nothing to compare without a machine; give `--max-replicas` at least 1");
    }
    if let Some(ledger) = &arguments.from_ledger {
        return machines::of_ledger(ledger, arguments.machines.as_deref(), &economy);
    }
    let usage = Usage::new(arguments.input_tokens, arguments.output_tokens);
    if usage.total_tokens() == 0 {
        bail!("a request without tokens costs nothing; give it some with `--input-tokens`");
    }
    if !can_be_counted(&economy, &usage, volumes(arguments).into_iter().max().unwrap_or(0)) {
        bail!("a day's cost, rent or work is too large to be counted; give smaller numbers");
    }
    Ok(vec![Comparison {
        api_name: economy.api_name,
        machine: economy.pool_name,
        sample: sample(&economy.card, &economy.pool, &usage),
        pool: economy.pool,
        note: None,
        measured_per_day: None,
    }])
}

/// Many equal requests.
fn sample(card: &PriceCard, pool: &PoolSpec, usage: &Usage) -> Slot {
    priced(card, &pool.capacity, usage, 1).scaled(SAMPLE, 1)
}

/// Whether a day of so many requests, and the sample, stay within what amounts of money and work can hold.
#[expect(clippy::cast_precision_loss, reason = "an order of magnitude")]
fn can_be_counted(economy: &Economy, usage: &Usage, requests: u64) -> bool {
    let Economy { card, pool, .. } = economy;
    let requests = requests.max(SAMPLE) as f64;
    let bill =
        |price: TokenPrice, tokens: u64| price.to_usd_per_million_f64() * tokens as f64 / 1e6 * requests;
    let work = |tokens: u64, per_second: u64| tokens as f64 / per_second.max(1) as f64 * requests;
    let rent = pool.hourly.to_usd_f64() * 24.0 * f64::from(pool.max_replicas);
    let fees = pool.request_fee.to_usd_f64().abs() * requests;
    let input = card.standard.input.max(card.standard.cached_input);
    bill(input, usage.input_tokens) + bill(card.standard.output, usage.output_tokens) < LARGEST_BILL_USD
        && rent < LARGEST_BILL_USD
        && fees < LARGEST_BILL_USD
        && work(usage.input_tokens, pool.capacity.input_tokens_per_second)
            + work(usage.output_tokens, pool.capacity.output_tokens_per_second)
            < LARGEST_WORK_SECONDS
}

fn volumes(arguments: &PlanArgs) -> Vec<u64> {
    let mut volumes = if arguments.requests_per_day.is_empty() {
        VOLUMES.to_vec()
    } else {
        arguments.requests_per_day.clone()
    };
    volumes.sort_unstable();
    volumes.dedup();
    volumes
}

/// The stable shape of `--format json`.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// None when the API is free, the work cannot be compared, or the machine is paid by use: then it is `kappa` alone
    /// that decides, at any volume.
    pub break_even_requests_per_day: Option<f64>,
    pub rows: Vec<Row>,
    pub machine: String,
    pub api: String,
    /// API dollars that a full replica replaces per dollar of rent; below 1 the machine never pays.
    pub kappa: Option<f64>,
    /// Requests a day that fill one machine.
    pub one_machine_requests_per_day: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
    /// Of the machines that were compared for measured traffic, whether it is the one to look at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub is_best: Option<bool>,
}

/// A volume, and what a day of it costs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    pub requests_per_day: u64,
    pub api_usd: f64,
    /// Everything self-hosted, on as many machines as it needs; beyond the largest fleet, with the overflow's
    /// API bill.
    pub self_hosted_usd: f64,
    /// `api` or `self_hosted`: the smaller of the two above.
    pub cheaper: &'static str,
    pub replicas: u32,
    /// API bill of what does not fit, within `self_hosted_usd`.
    pub overflow_api_usd: f64,
    /// Some machines kept full and the rest from the API, at its cheapest.
    pub mix_usd: f64,
    pub mix_replicas: u32,
}

impl Comparison {
    pub fn plan(&self, volumes: &[u64]) -> Plan {
        let kappa = crate::economics::break_even::kappa(&self.pool, &self.sample);
        let break_even = break_even_requests_per_day(&self.pool, &self.sample, 1);
        Plan {
            break_even_requests_per_day: break_even.map(f64::round),
            rows: self.with_measured(volumes).into_iter().map(|volume| self.row(volume)).collect(),
            machine: self.machine.clone(),
            api: self.api_name.clone(),
            kappa: kappa.map(|kappa| (kappa * 1000.0).round() / 1000.0),
            one_machine_requests_per_day: self.one_machine_per_day().map(f64::floor),
            note: self.note.clone(),
            advice: advice::advice(self),
            is_best: None,
        }
    }

    /// The volumes, and the one that was measured among them.
    fn with_measured(&self, volumes: &[u64]) -> Vec<u64> {
        let mut volumes = volumes.to_vec();
        volumes.extend(self.measured_per_day.map(advice::whole));
        volumes.sort_unstable();
        volumes.dedup();
        volumes
    }

    /// Requests a day that keep one machine busy all the time.
    #[expect(clippy::cast_precision_loss, reason = "a volume, not an amount")]
    pub fn one_machine_per_day(&self) -> Option<f64> {
        let Work(work) = self.sample.work;
        (work > 0).then(|| self.sample.requests as f64 * 86_400e6 / work as f64)
    }

    /// A day at that volume.
    pub fn row(&self, requests_per_day: u64) -> Row {
        let day = Day::new(self, requests_per_day);
        let (mix_replicas, mix) = day.mix();
        let needed = day.needed();
        let own = day.cost(needed);
        let cheaper = if day.api <= own { "api" } else { "self_hosted" };
        Row {
            requests_per_day,
            api_usd: cents(day.api),
            self_hosted_usd: cents(own),
            cheaper,
            replicas: needed,
            overflow_api_usd: cents(day.overflow(needed)),
            mix_usd: cents(mix),
            mix_replicas,
        }
    }
}

const DAY: std::time::Duration = std::time::Duration::from_hours(24);

/// The traffic of a day, evenly spread, against a pool.
struct Day<'a> {
    pool: &'a PoolSpec,
    slot: Slot,
    api: NanoUsd,
}

impl<'a> Day<'a> {
    fn new(comparison: &'a Comparison, requests: u64) -> Self {
        let slot = comparison.sample.scaled(requests, comparison.sample.requests.max(1));
        let slot = Slot { requests, ..slot };
        Self { pool: &comparison.pool, slot, api: slot.api_cost }
    }

    /// Machines for all of it, at least one, at most the largest fleet; all of those that are paid anyway.
    fn needed(&self) -> u32 {
        if self.pool.billing == Billing::Committed {
            return self.pool.max_replicas;
        }
        self.slot.replicas_filled(DAY).clamp(1, self.pool.max_replicas.max(1))
    }

    fn overflow(&self, replicas: u32) -> NanoUsd {
        let worth = self.slot.worth(self.pool);
        worth - self.slot.saved_by(self.pool, replicas, DAY)
    }

    /// Rent, fees, and the API bill of what does not fit.
    fn cost(&self, replicas: u32) -> NanoUsd {
        let room = crate::economics::layers::offered(replicas, DAY);
        let served = self.slot.work.0.min(room);
        let rent = match self.pool.billing {
            Billing::PerUse => self.pool.hourly.mul_div_floor(served, 3_600_000_000),
            Billing::Committed | Billing::WhileRunning => {
                self.pool.hourly.mul_div_floor(24 * u64::from(replicas), 1)
            }
        };
        self.api - self.slot.saved_by(self.pool, replicas, DAY) + rent
    }

    /// Some machines, kept full, and the rest from the API.
    fn mix(&self) -> (u32, NanoUsd) {
        let most = self.needed();
        if self.pool.billing == Billing::Committed {
            return (most, self.cost(most));
        }
        [0, most - 1, most]
            .into_iter()
            .map(|replicas| (replicas, self.cost(replicas)))
            .min_by_key(|(replicas, cost)| (*cost, *replicas))
            .expect("three candidates")
    }
}

fn cents(amount: NanoUsd) -> f64 {
    (amount.to_usd_f64() * 100.0).round() / 100.0
}

/// One object, or an array of several machines'.
fn json(plans: &[Plan], out: &mut impl Write) -> std::io::Result<()> {
    match plans {
        [only] => serde_json::to_writer_pretty(&mut *out, only)?,
        several => serde_json::to_writer_pretty(&mut *out, several)?,
    }
    writeln!(out)
}
