//! A simulation's figures as table, JSON and CSV, and its schedule.

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::commands::figures::plural;
use crate::economics::NanoUsd;
use crate::simulator::engine::Outcome;

use super::Simulation;

/// A progress bar on a terminal, and nothing elsewhere.
pub(super) fn progress(length: u64, name: &str) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg} [{bar:30}] {percent}% {eta}").expect("a valid template");
    let bar = ProgressBar::new(length).with_style(style.progress_chars("=> ")).with_message(name.to_owned());
    bar.tick();
    bar
}

/// The stable shape of `--format json`.
#[derive(Debug, Serialize)]
struct SimulationRow<'a> {
    trace: &'a str,
    #[serde(serialize_with = "whole_if_it_is")]
    slot_seconds: f64,
    scale: f64,
    rho: Option<f64>,
    kappa: Option<f64>,
    max_replicas: u32,
    optimum_usd: f64,
    /// True when the optimum is only a lower bound.
    optimum_is_lower_bound: bool,
    policies: Vec<PolicyRow<'a>>,
}

#[derive(Debug, Serialize)]
struct PolicyRow<'a> {
    name: &'a str,
    total_usd: f64,
    api_usd: f64,
    rent_usd: f64,
    ratio_to_optimum: Option<f64>,
    replica_hours: f64,
    starts: u64,
    api_requests: u64,
    self_hosted_requests: u64,
}

/// Writes `60` and not `60.0`: slots are whole seconds but for those who want them shorter.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "what serde calls")]
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "whole, and seconds of a slot")]
fn whole_if_it_is<S: serde::Serializer>(seconds: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    if seconds.fract() == 0.0 {
        serializer.serialize_u64(*seconds as u64)
    } else {
        serializer.serialize_f64(*seconds)
    }
}

fn row(simulation: &Simulation) -> SimulationRow<'_> {
    SimulationRow {
        trace: &simulation.trace,
        slot_seconds: simulation.demand.slot.as_secs_f64(),
        scale: simulation.scale,
        rho: simulation.demand.rho(&simulation.pool).map(rounded),
        kappa: simulation.demand.kappa(&simulation.pool).map(rounded),
        max_replicas: simulation.pool.max_replicas,
        optimum_usd: usd(simulation.optimum.total),
        optimum_is_lower_bound: !simulation.optimum.exact,
        policies: simulation.outcomes.iter().map(|outcome| policy_row(simulation, outcome)).collect(),
    }
}

fn policy_row<'a>(simulation: &Simulation, outcome: &'a Outcome) -> PolicyRow<'a> {
    PolicyRow {
        name: &outcome.name,
        total_usd: usd(outcome.total()),
        api_usd: usd(outcome.api),
        rent_usd: usd(outcome.rent),
        ratio_to_optimum: ratio(simulation, outcome).map(rounded),
        replica_hours: rounded(outcome.replica_hours),
        starts: outcome.starts,
        api_requests: outcome.api_requests,
        self_hosted_requests: outcome.self_hosted_requests,
    }
}

fn ratio(simulation: &Simulation, outcome: &Outcome) -> Option<f64> {
    let optimum = simulation.optimum.total.to_usd_f64();
    (optimum > 0.0).then(|| outcome.total().to_usd_f64() / optimum)
}

fn usd(amount: NanoUsd) -> f64 {
    rounded(amount.to_usd_f64())
}

fn rounded(value: f64) -> f64 {
    (value * 1e6).round() / 1e6
}

/// One object, or an array of several.
pub(super) fn json(simulations: &[Simulation], out: &mut impl Write) -> io::Result<()> {
    let rows: Vec<_> = simulations.iter().map(row).collect();
    match rows.as_slice() {
        [only] => serde_json::to_writer_pretty(&mut *out, only)?,
        several => serde_json::to_writer_pretty(&mut *out, several)?,
    }
    writeln!(out)
}

/// A line per trace and policy, the trace's figures repeated.
pub(super) fn csv(simulations: &[Simulation], out: &mut impl Write) -> io::Result<()> {
    let mut writer = csv::Writer::from_writer(out);
    writer.write_record([
        "trace",
        "slot_seconds",
        "scale",
        "rho",
        "kappa",
        "max_replicas",
        "optimum_usd",
        "policy",
        "total_usd",
        "api_usd",
        "rent_usd",
        "ratio_to_optimum",
        "replica_hours",
        "starts",
        "api_requests",
        "self_hosted_requests",
        "optimum_is_lower_bound",
    ])?;
    for simulation in simulations {
        let row = row(simulation);
        for policy in &row.policies {
            let optional = |value: Option<f64>| value.map_or_else(String::new, |value| value.to_string());
            writer.write_record([
                row.trace.to_owned(),
                row.slot_seconds.to_string(),
                row.scale.to_string(),
                optional(row.rho),
                optional(row.kappa),
                row.max_replicas.to_string(),
                row.optimum_usd.to_string(),
                policy.name.to_owned(),
                policy.total_usd.to_string(),
                policy.api_usd.to_string(),
                policy.rent_usd.to_string(),
                optional(policy.ratio_to_optimum),
                policy.replica_hours.to_string(),
                policy.starts.to_string(),
                policy.api_requests.to_string(),
                policy.self_hosted_requests.to_string(),
                row.optimum_is_lower_bound.to_string(),
            ])?;
        }
    }
    writer.flush()
}

pub(super) fn table(simulations: &[Simulation], out: &mut impl Write) -> io::Result<()> {
    for (index, simulation) in simulations.iter().enumerate() {
        if index > 0 {
            writeln!(out)?;
        }
        one_table(simulation, out)?;
    }
    Ok(())
}

fn one_table(simulation: &Simulation, out: &mut impl Write) -> io::Result<()> {
    let row = row(simulation);
    let optional = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"));
    let seconds =
        row.slot_seconds * f64::from(u32::try_from(simulation.demand.slots.len()).unwrap_or(u32::MAX));
    writeln!(
        out,
        "{}: {} in slots of {} s, scale {:.4}, at most {}",
        row.trace,
        length(seconds),
        row.slot_seconds,
        row.scale,
        plural(row.max_replicas.into(), "replica")
    )?;
    writeln!(
        out,
        "the mean API bill is {} rents of a replica (rho), and a full replica is worth {} rents on the API (kappa)",
        optional(row.rho),
        optional(row.kappa)
    )?;
    writeln!(
        out,
        "{:<12}{:>13}{:>9}{:>13}{:>13}{:>15}{:>8}{:>14}{:>13}",
        "policy",
        "total USD",
        "ratio",
        "API USD",
        "rent USD",
        "replica-hours",
        "starts",
        "API requests",
        "self-hosted"
    )?;
    for (outcome, policy) in simulation.outcomes.iter().zip(&row.policies) {
        let ratio = policy.ratio_to_optimum.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.3}"));
        writeln!(
            out,
            "{:<12}{:>13.2}{ratio:>9}{:>13.2}{:>13.2}{:>15.1}{:>8}{:>14}{:>13}",
            policy.name,
            outcome.total(),
            outcome.api,
            outcome.rent,
            policy.replica_hours,
            policy.starts,
            policy.api_requests,
            policy.self_hosted_requests
        )?;
    }
    let name = if simulation.optimum.exact { "optimum" } else { "lower bound" };
    writeln!(out, "{name:<12}{:>13.2}{:>9}", simulation.optimum.total, "1.000")
}

/// Days, or hours of a short trace.
fn length(seconds: f64) -> String {
    let hours = seconds / 3600.0;
    if hours < 48.0 { format!("{hours:.1} hours") } else { format!("{:.1} days", hours / 24.0) }
}

/// `plot.svg` and `azure` → `plot-azure.svg`.
pub(super) fn path_for(path: &Path, trace: &str) -> PathBuf {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let extension =
        path.extension().map_or_else(String::new, |extension| format!(".{}", extension.to_string_lossy()));
    path.with_file_name(format!("{stem}-{trace}{extension}"))
}

/// One target a line.
pub(super) fn schedule(outcome: &Outcome, path: &Path) -> io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    for slot in &outcome.slots {
        writeln!(file, "{}", slot.target)?;
    }
    file.flush()
}
