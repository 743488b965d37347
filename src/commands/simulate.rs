//! `breakeven simulate`: what each policy would have cost on past traffic.

mod input;
mod output;
mod plot;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};

use crate::economics::lcp::LazyCapacity;
use crate::economics::{PolicyKind, PolicySettings, PoolSpec, Slot, policy_for};
use crate::simulator::engine::{self, Outcome};
use crate::simulator::hindsight::{self, Optimum};
use crate::simulator::{Demand, LARGEST_BILL_USD, LARGEST_WORK_SECONDS, Tally};

use super::economy::{Economy, EconomyArgs, duration, positive_duration};
use input::Source;

/// What is replayed unless other policies are named.
const POLICIES: [PolicyName; 5] =
    [PolicyName::Api, PolicyName::Fixed, PolicyName::Threshold, PolicyName::Cheapest, PolicyName::Adaptive];

/// Replays traces, or the ledger, through the policies that run live: each against the API alone, the best
/// fixed fleet, and the cheapest plan that knew the future.
///
/// A trace is CSV, plain or gzip, with the columns arrival_s, prompt_tokens and completion_tokens, and
/// optionally cached_prompt_tokens and requests. Without the column requests each row is one call, priced as such
/// (a long one by the tier for long contexts) and with one fee per request; see --rows-are-sums.
#[derive(Debug, Clone, Default, Args)]
pub struct SimulateArgs {
    /// Trace files.
    #[arg(value_name = "TRACE", required_unless_present = "ledger")]
    pub traces: Vec<PathBuf>,
    /// Replay the calls in the ledger instead; without FILE, the ledger of the configuration.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "", conflicts_with = "traces")]
    pub ledger: Option<PathBuf>,
    /// Policies to replay; by default api, fixed, threshold, cheapest and adaptive.
    #[arg(long, value_enum, value_name = "P,..", value_delimiter = ',')]
    pub policy: Vec<PolicyName>,
    /// Each row is the sum of several calls, a minute's say: none is a long context, whatever its tokens. How many they
    /// were, for --request-usd, is said by the column requests.
    #[arg(long, conflicts_with = "ledger")]
    pub rows_are_sums: bool,
    /// Scale the traffic so that its mean API bill is X times the rent of one replica.
    #[arg(long, value_name = "X", value_parser = positive_number, conflicts_with = "scale")]
    pub rho: Option<f64>,
    /// Multiply the traffic by X.
    #[arg(long, value_name = "X", value_parser = positive_number)]
    pub scale: Option<f64>,
    /// How often the policies decide; by default the configuration's, or 60s.
    #[arg(long, value_name = "DURATION", value_parser = positive_duration)]
    pub slot: Option<Duration>,
    /// How much of the trace to replay, or how long to go on after its end.
    #[arg(long, value_name = "DURATION", value_parser = positive_duration)]
    pub horizon: Option<Duration>,
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
    /// Draw volume, replicas and cumulative cost; with several traces each gets its name in the file's.
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
    /// Write the target replica count of the first policy, or of adaptive when none is named, one integer a slot.
    #[arg(long, value_name = "FILE.csv")]
    pub schedule: Option<PathBuf>,
    /// What "current volume" means to threshold and cheapest.
    #[arg(long, value_name = "DURATION", value_parser = positive_duration, help_heading = "Policy")]
    pub window: Option<Duration>,
    /// A change must be worth this share.
    #[arg(long, value_name = "SHARE", value_parser = share, help_heading = "Policy")]
    pub margin: Option<f64>,
    /// Shortest time between two changes.
    #[arg(long, value_name = "DURATION", value_parser = duration, help_heading = "Policy")]
    pub min_dwell: Option<Duration>,
    #[command(flatten)]
    pub economy: EconomyArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum PolicyName {
    /// Everything from the API.
    Api,
    /// The best constant fleet, chosen in hindsight.
    Fixed,
    /// Self-hosted above a volume of your own, and back below it.
    Threshold,
    /// The fleet that costs least at the current volume.
    Cheapest,
    /// For each replica the simple rule that has lost least lately.
    Adaptive,
    /// Lazy capacity provisioning, for reference.
    Lcp,
    /// Replicas enough for all the work.
    SelfHosted,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Format {
    #[default]
    Table,
    Json,
    Csv,
}

fn positive_number(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "it is not a number".to_owned())?;
    if number.is_finite() && number > 0.0 { Ok(number) } else { Err("it must be above zero".into()) }
}

fn share(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "it is not a number".to_owned())?;
    if (0.0..=1.0).contains(&number) { Ok(number) } else { Err("it must be between 0 and 1".into()) }
}

/// Everything that one trace gave.
#[derive(Debug, Clone)]
pub struct Simulation {
    pub trace: String,
    pub scale: f64,
    pub pool: PoolSpec,
    pub demand: Demand,
    pub optimum: Optimum,
    pub outcomes: Vec<Outcome>,
}

/// Simulates and writes the result to `out`, pictures and schedules to their files.
pub fn run(arguments: &SimulateArgs, out: &mut impl Write) -> anyhow::Result<ExitCode> {
    let economy = arguments.economy.economy()?;
    let sources = input::sources(arguments, &economy)?;
    if arguments.schedule.is_some() && sources.len() > 1 {
        bail!("`--schedule` is of one trace; simulate them one by one");
    }
    let mut simulations = Vec::with_capacity(sources.len());
    for source in &sources {
        let simulation = simulate(arguments, &economy, source)
            .with_context(|| format!("cannot simulate `{}`", source.name))?;
        write_files(arguments, &simulation, sources.len() > 1)?;
        simulations.push(simulation);
    }
    match arguments.format {
        Format::Table => output::table(&simulations, out),
        Format::Json => output::json(&simulations, out),
        Format::Csv => output::csv(&simulations, out),
    }
    .context("cannot write the result")?;
    Ok(ExitCode::SUCCESS)
}

fn simulate(arguments: &SimulateArgs, economy: &Economy, source: &Source) -> anyhow::Result<Simulation> {
    let settings = settings(arguments, economy);
    let tally = input::read(source, economy, settings.slot)?;
    let (demand, scale) = demand(arguments, economy, &tally)?;
    let pool = source.pool(&economy.pool, &demand);
    // The optimum takes its time as well.
    let policies = if arguments.policy.is_empty() { &POLICIES[..] } else { &arguments.policy };
    let bar = output::progress(policies.len() as u64 + 1, &source.name);
    let outcomes = policies
        .iter()
        .map(|name| {
            let outcome = replay(*name, economy, &settings, &pool, &demand, source);
            bar.inc(1);
            outcome
        })
        .collect();
    let optimum = hindsight::optimum(&pool, &demand);
    bar.finish_and_clear();
    Ok(Simulation { trace: source.name.clone(), scale, pool, demand, optimum, outcomes })
}

fn settings(arguments: &SimulateArgs, economy: &Economy) -> PolicySettings {
    let configured = &economy.settings;
    PolicySettings {
        window: arguments.window.unwrap_or(configured.window),
        margin: arguments.margin.unwrap_or(configured.margin),
        min_dwell: arguments.min_dwell.unwrap_or(configured.min_dwell),
        slot: arguments.slot.unwrap_or(configured.slot),
    }
}

fn demand(arguments: &SimulateArgs, economy: &Economy, tally: &Tally) -> anyhow::Result<(Demand, f64)> {
    let scale = match arguments.rho {
        Some(rho) => tally
            .scale_for(rho, &economy.pool, arguments.horizon)
            .context("no scale gives that `--rho`: the trace costs nothing, or the machine does")?,
        None => arguments.scale.unwrap_or(1.0),
    };
    if !can_be_counted(&tally.demand(1.0, arguments.horizon).total(), scale) {
        bail!("at a scale of {scale} the trace's cost or work is too large to be counted");
    }
    let demand = tally.demand(scale, arguments.horizon);
    if demand.slots.is_empty() {
        bail!("the trace has no rows");
    }
    Ok((demand, scale))
}

/// Whether sums of a trace stay, times `scale`, within what amounts of money and work can hold.
fn can_be_counted(total: &Slot, scale: f64) -> bool {
    total.api_cost.to_usd_f64() * scale < LARGEST_BILL_USD
        && total.work.as_replica_seconds_f64() * scale < LARGEST_WORK_SECONDS
}

fn replay(
    name: PolicyName,
    economy: &Economy,
    settings: &PolicySettings,
    pool: &PoolSpec,
    demand: &Demand,
    source: &Source,
) -> Outcome {
    let kind = match name {
        PolicyName::Fixed => return engine::best_fixed(pool, demand),
        PolicyName::Lcp => {
            return engine::run(&mut LazyCapacity::new(settings.slot), pool, demand, source.start);
        }
        PolicyName::Api => PolicyKind::Api,
        PolicyName::Threshold => economy.threshold_policy(),
        PolicyName::Cheapest => PolicyKind::Cheapest,
        PolicyName::Adaptive => PolicyKind::Adaptive,
        PolicyName::SelfHosted => PolicyKind::SelfHosted,
    };
    engine::run(policy_for(&kind, settings).as_mut(), pool, demand, source.start)
}

fn write_files(arguments: &SimulateArgs, simulation: &Simulation, several: bool) -> anyhow::Result<()> {
    if let Some(path) = &arguments.plot {
        let path = if several { output::path_for(path, &simulation.trace) } else { path.clone() };
        plot::draw(simulation, &path).with_context(|| format!("cannot draw `{}`", path.display()))?;
    }
    let is_default = arguments.policy.is_empty();
    let mut chosen = simulation.outcomes.iter().filter(|outcome| !is_default || outcome.name == "adaptive");
    if let (Some(path), Some(chosen)) = (&arguments.schedule, chosen.next()) {
        output::schedule(chosen, path).with_context(|| format!("cannot write `{}`", path.display()))?;
    }
    Ok(())
}
