//! `breakeven demo`: the whole thing on one machine, without a key, a GPU, a configuration or a network.

use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Args;

use crate::clock::Clock;
use crate::config;
use crate::demo::bill::{Bill, grouped};
use crate::demo::day::{DAY, Day, SPEED_OF_A_MINUTE};
use crate::demo::load::Load;
use crate::demo::stage::{API, MODEL, SELF_HOSTED, Stage};
use crate::demo::{history, picture};
use crate::economics::time::millis;
use crate::economics::{PoolSpec, Preference, Timestamp};

/// Shows a day in a minute: made-up traffic through the real proxy, between a fake OpenAI and a fake GPU server.
///
/// No key, no GPU, no configuration and no network are needed. The volume of the day crosses break-even in the
/// morning and in the evening, and the proxy moves the traffic to whichever side costs less. At the end, and on
/// Ctrl-C, it prints what the day cost and what each side alone would have cost.
#[derive(Debug, Clone, Args)]
pub struct DemoArgs {
    /// Seconds of the day in one second [default: a whole day in the time it runs].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub speed: Option<u32>,
    /// How long it runs: 60s, 5m [default: a whole day, a minute if no speed is given].
    #[arg(long = "for", value_name = "DURATION", value_parser = duration)]
    pub duration: Option<Duration>,
    /// Prints the table at the end and nothing else.
    #[arg(long)]
    pub headless: bool,
    /// Keeps the ledger, for `breakeven report --ledger FILE`.
    #[arg(long, value_name = "FILE")]
    pub ledger: Option<PathBuf>,
    /// Where the proxy listens for applications.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:4000")]
    pub listen: SocketAddr,
    /// Where /metrics, /api and the live page are.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:4001")]
    pub admin_listen: SocketAddr,
    /// Draws volume, break-even, who served and the cumulative costs as SVG.
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
}

/// Time between two progress lines on a terminal, and elsewhere.
const PROGRESS: Duration = Duration::from_millis(500);
const SLOW_PROGRESS: Duration = Duration::from_secs(5);

fn duration(text: &str) -> Result<Duration, String> {
    config::parse_duration(text)
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| format!("`{text}` is not a duration: write it like 60s or 5m"))
}

/// How fast the day passes, and how much of it.
fn pace(arguments: &DemoArgs) -> (u32, Duration) {
    let speed_for = |real: Duration| {
        let speed = DAY.as_secs_f64() / real.as_secs_f64();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 1 and 86,400")]
        let speed = speed.round().clamp(1.0, 86_400.0) as u32;
        speed
    };
    match (arguments.speed, arguments.duration) {
        (None, None) => (SPEED_OF_A_MINUTE, DAY),
        (Some(speed), None) => (speed, DAY),
        (None, Some(real)) => (speed_for(real), DAY),
        (Some(speed), Some(real)) => (speed, real * speed),
    }
}
