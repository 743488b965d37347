//! Measures targets in interleaved rounds, because a shared machine drifts: ratios are taken within a round.
//!
//! The proxy under test has one core, everything else the other. Every target is started anew in every round.

mod case;
mod table;
mod target;

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::Context;
use rustix::thread::{CpuSet, sched_setaffinity};
use serde::{Deserialize, Serialize};

use self::case::{CASES, Case};
use self::target::{Running, Target};
pub use self::target::{START_TIMEOUT, end, free_address, wait_until};
use crate::load::Report;
use crate::process;

/// Cores of the mock and the load generator, and of the proxy.
const OUR_CORE: usize = 0;
const PROXY_CORE: usize = 1;
/// How long a target rests before its idle memory is read.
const SETTLE: Duration = Duration::from_millis(800);
/// Ours and the proxy's alike: others on the machine should not be measured.
const PRIORITY: i32 = -20;

#[derive(clap::Args)]
pub struct Arguments {
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Cases, by name; all if none is given.
    #[arg(long, value_delimiter = ',')]
    cases: Vec<String>,
    /// Targets: `direct`, `nginx`, `passthrough`, `breakeven`, and the names of other `--config` files.
    #[arg(long, value_delimiter = ',', default_value = "direct,nginx,passthrough,breakeven")]
    targets: Vec<String>,
    /// The program to measure.
    #[arg(long)]
    breakeven: PathBuf,
    /// Where `NAME.toml` is found for the targets that are breakeven with another configuration.
    #[arg(long)]
    configs: PathBuf,
    /// Results are added to this file, one line each.
    #[arg(long, default_value = "results.jsonl")]
    out: PathBuf,
    /// Factor on the measured times, in percent.
    #[arg(long, default_value_t = 100)]
    scale: u64,
}

#[derive(clap::Args)]
pub struct TableArguments {
    #[arg(default_value = "results.jsonl")]
    results: PathBuf,
}

/// One line of the results.
#[derive(Debug, Serialize, Deserialize)]
struct Measurement {
    round: u32,
    target: String,
    case: String,
    startup_ms: Option<f64>,
    idle_kb: Option<u64>,
    report: Option<Report>,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    pin(OUR_CORE)?;
    if rustix::process::setpriority_process(None, PRIORITY).is_err() {
        eprintln!("bench: without the right to raise its priority, other programs disturb the figures");
    }
    let cases = chosen_cases(&arguments.cases)?;
    let targets = Target::all(arguments)?;
    let mut out = OpenOptions::new().create(true).append(true).open(&arguments.out)?;
    let mock = Mock::start()?;
    for round in 1..=arguments.rounds {
        let mut order: Vec<&Target> = targets.iter().collect();
        if round % 2 == 0 {
            order.reverse();
        }
        for target in order {
            measure(target, &cases, &mock, round, arguments.scale, &mut out)?;
        }
    }
    drop(mock);
    print_table(&TableArguments { results: arguments.out.clone() })
}

pub fn print_table(arguments: &TableArguments) -> anyhow::Result<()> {
    let file =
        File::open(&arguments.results).with_context(|| format!("`{}`", arguments.results.display()))?;
    print!("{}", table::render(&table::read(file)?));
    Ok(())
}

fn chosen_cases(names: &[String]) -> anyhow::Result<Vec<&'static Case>> {
    if names.is_empty() {
        return Ok(CASES.iter().collect());
    }
    let find = |name: &String| {
        let found = CASES.iter().find(|case| case.name == name);
        found.with_context(|| {
            let known: Vec<_> = CASES.iter().map(|case| case.name).collect();
            format!("no case `{name}`; there are {}", known.join(", "))
        })
    };
    names.iter().map(find).collect()
}

fn measure(
    target: &Target,
    cases: &[&Case],
    mock: &Mock,
    round: u32,
    scale: u64,
    out: &mut File,
) -> anyhow::Result<()> {
    mock.behave("delay_us=0&events=256&gap_us=0")?;
    let running = target.start(mock.address).with_context(|| format!("starting `{}`", target.name))?;
    let mut write = |case: &str, idle: Option<(f64, u64)>, report: Option<Report>| {
        let measurement = Measurement {
            round,
            target: target.name.clone(),
            case: case.to_owned(),
            startup_ms: idle.map(|(startup, _)| startup),
            idle_kb: idle.map(|(_, resident)| resident),
            report,
        };
        writeln!(out, "{}", serde_json::to_string(&measurement)?).map_err(anyhow::Error::from)
    };
    if let Some(pid) = running.pid {
        std::thread::sleep(SETTLE);
        write("idle", Some((running.startup_ms, process::resident_kb(&process::tree(pid)))), None)?;
    }
    for case in cases {
        mock.behave(&case.behaviour())?;
        let report = load(case, &running, target, scale)?;
        eprintln!("{}", progress(round, &target.name, case, &report));
        write(case.name, None, Some(report))?;
    }
    Ok(())
}

fn progress(round: u32, target: &str, case: &Case, report: &Report) -> String {
    let per = if case.stream { report.cpu_us_per_event } else { report.cpu_us_per_call };
    let per = per.map_or_else(String::new, |us| format!("{us:8.2} us"));
    let failure = report.first_failure.as_deref().map_or_else(String::new, |why| format!("  FAILED: {why}"));
    format!("round {round}  {target:14} {:13} {per}{failure}", case.name)
}

/// Runs the load generator as a process of its own, so that every case starts with fresh memory.
fn load(case: &Case, running: &Running, target: &Target, scale: u64) -> anyhow::Result<Report> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("load").arg(format!("--target={}", running.address)).args(case.load_arguments(scale));
    if let Some(pid) = running.pid {
        command.arg(format!("--pid={pid}"));
    }
    let output = command.output()?;
    let errors = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "`{}` against `{}`: {errors}", case.name, target.name);
    serde_json::from_slice(&output.stdout).context("what the load generator printed")
}

/// Confines this process, and what it starts from now on, to a core.
fn pin(core: usize) -> anyhow::Result<()> {
    let mut cores = CpuSet::new();
    cores.set(core);
    sched_setaffinity(None, &cores).with_context(|| format!("this machine has no core {core}"))
}

/// The mock upstream as a process of its own; it ends with this value.
pub struct Mock {
    process: Child,
    pub address: SocketAddr,
}

impl Mock {
    pub fn start() -> anyhow::Result<Self> {
        let address = free_address()?;
        let process =
            Command::new(std::env::current_exe()?).arg("mock").arg(format!("--listen={address}")).spawn()?;
        let mock = Self { process, address };
        wait_until(START_TIMEOUT, || mock.behave("delay_us=0").is_ok())
            .context("the mock does not answer")?;
        Ok(mock)
    }

    /// Tells it how to behave from now on.
    pub fn behave(&self, query: &str) -> anyhow::Result<()> {
        let status = target::request(self.address, &format!("/__control?{query}"), "{}")?;
        anyhow::ensure!(status == 200, "the mock answered {status}");
        Ok(())
    }
}

impl Drop for Mock {
    fn drop(&mut self) {
        end(&mut self.process);
    }
}
