//! The load generator: one thread on epoll, closed or open loop, unary calls or streams.
//!
//! In a closed loop each connection sends its next request when the last answer has ended. In an open loop
//! requests are due at a fixed rate whatever the server does, and latency counts from when one was due, so that
//! a stall cannot hide the requests it held up.

mod client;

use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use self::client::{Client, Totals};
use crate::poll;
use crate::process::{self, Core};
use crate::samples::{Percentiles, micros};

/// How long the last answers are waited for.
const PATIENCE_NS: u64 = 30_000_000_000;

/// Connections that an open loop opens at most, unless it is told otherwise.
const MAX_CONNECTIONS: usize = 4000;

#[derive(Debug, Clone, clap::Args)]
pub struct Arguments {
    #[arg(long)]
    pub target: SocketAddr,
    #[arg(long, default_value = "gpt-4o-mini")]
    pub model: String,
    /// `Authorization: Bearer` of the requests.
    #[arg(long, default_value = "sk-bench-0123456789abcdefghijklmnopqrstuvwxyz")]
    pub key: String,
    /// Bytes of a request body.
    #[arg(long, default_value_t = 1024)]
    pub body: usize,
    /// Ask for streams.
    #[arg(long)]
    pub stream: bool,
    /// Content events that a stream must have.
    #[arg(long, default_value_t = 256)]
    pub events: u32,
    /// Connections of the closed loop.
    #[arg(long, default_value_t = 32)]
    pub connections: usize,
    /// Requests a second: an open loop.
    #[arg(long)]
    pub rate: Option<u64>,
    /// Connections of an open loop at most: what is due while all are busy waits, and its time counts.
    #[arg(long, default_value_t = MAX_CONNECTIONS)]
    pub max_connections: usize,
    /// Milliseconds over which a closed loop opens its connections.
    #[arg(long, default_value_t = 0)]
    pub ramp_ms: u64,
    #[arg(long, default_value_t = 500)]
    pub warmup_ms: u64,
    /// Milliseconds that are measured.
    #[arg(long, default_value_t = 2000)]
    pub window_ms: u64,
    /// Process whose CPU time and memory are measured, with its children.
    #[arg(long)]
    pub pid: Option<u32>,
}

/// What happened in the measured window. Times are microseconds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    pub seconds: f64,
    pub calls: u64,
    pub events: u64,
    /// Answers other than 200, streams that were not complete, lost connections.
    pub failures: u64,
    pub first_failure: Option<String>,
    pub calls_per_second: f64,
    pub events_per_second: f64,
    pub cpu_us_per_call: Option<f64>,
    pub cpu_us_per_event: Option<f64>,
    /// Share of a core that the process had.
    pub cpu_share: f64,
    /// Share of core 0 and 1 that the hypervisor gave away.
    pub stolen: [f64; 2],
    pub resident_kb: u64,
    pub latency: Option<Percentiles>,
    pub first_event: Option<Percentiles>,
    /// From the upstream's write to the client's read.
    pub transit: Option<Percentiles>,
    pub gap: Option<Percentiles>,
}

struct Snapshot {
    at_ns: u64,
    cpu_ns: u64,
    cores: [Core; 2],
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let report = measure(arguments)?;
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}

fn measure(arguments: &Arguments) -> anyhow::Result<Report> {
    anyhow::ensure!(arguments.target.ip().is_loopback(), "only loopback targets are loaded");
    let pids = arguments.pid.map(process::tree).unwrap_or_default();
    let mut client = Client::new(arguments)?;
    let start = poll::now_ns();
    let window_start = start + millis(arguments.ramp_ms + arguments.warmup_ms);
    let window_end = window_start + millis(arguments.window_ms);

    client.run_until(start, window_start)?;
    client.totals.clear();
    let before = Snapshot::take(&pids);
    client.run_until(start, window_end)?;
    let after = Snapshot::take(&pids);
    let resident_kb = process::resident_kb(&pids);
    let in_window = (client.totals.complete, client.totals.events);
    client.finish(window_end + PATIENCE_NS)?;
    Ok(report(arguments, &mut client.totals, &before, &after, resident_kb, in_window))
}

fn millis(millis: u64) -> u64 {
    millis * 1_000_000
}

impl Snapshot {
    fn take(pids: &[u32]) -> Self {
        let cores = [process::core(0), process::core(1)];
        Self { at_ns: poll::now_ns(), cpu_ns: process::cpu_ns(pids), cores }
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts of a few seconds")]
fn report(
    arguments: &Arguments,
    totals: &mut Totals,
    before: &Snapshot,
    after: &Snapshot,
    resident_kb: u64,
    (complete, events): (u64, u64),
) -> Report {
    let seconds = Duration::from_nanos(after.at_ns - before.at_ns).as_secs_f64();
    let cpu_us = micros(after.cpu_ns.saturating_sub(before.cpu_ns));
    // In an open loop answers trail the window: count what was due in it.
    let calls = arguments.rate.map_or(complete as f64, |rate| rate as f64 * seconds);
    let per = |count: f64| (arguments.pid.is_some() && count > 0.0).then(|| cpu_us / count);
    let stolen = |core: usize| {
        let ticks = after.cores[core].stolen_ticks - before.cores[core].stolen_ticks;
        ticks as f64 / 100.0 / seconds
    };
    Report {
        seconds,
        calls: complete,
        events,
        failures: totals.failures,
        first_failure: totals.first_failure.take(),
        calls_per_second: complete as f64 / seconds,
        events_per_second: events as f64 / seconds,
        cpu_us_per_call: per(calls),
        cpu_us_per_event: per(events as f64),
        cpu_share: cpu_us / 1e6 / seconds,
        stolen: [stolen(0), stolen(1)],
        resident_kb,
        latency: totals.latency.percentiles(),
        first_event: totals.first_event.percentiles(),
        transit: totals.transit.percentiles(),
        gap: totals.gap.percentiles(),
    }
}
