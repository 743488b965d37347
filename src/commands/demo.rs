//! `breakeven demo`: the whole thing on one machine, without a key, a GPU, a configuration or a network.

use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context;
use clap::Args;

use super::serve::Proxy;
use crate::clock::Clock;
use crate::commands::figures::grouped;
use crate::config;
use crate::demo::bill::Bill;
use crate::demo::day::{DAY, Day, SPEED_OF_A_MINUTE};
use crate::demo::load::Load;
use crate::demo::stage::{API, MODEL, Stage};
use crate::demo::{history, picture};
use crate::economics::time::millis;
use crate::economics::{PoolSpec, Preference, Timestamp};
use crate::telemetry;

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

/// Runs the demo. The table goes to `out`, everything else to stderr.
pub fn run(arguments: &DemoArgs, out: &mut impl Write) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(play(arguments, out))?;
    Ok(ExitCode::SUCCESS)
}

async fn play(arguments: &DemoArgs, out: &mut impl Write) -> anyhow::Result<()> {
    let folder = Folder::new()?;
    let ledger = arguments.ledger.clone().unwrap_or_else(|| folder.0.join("demo.db"));
    let (speed, span) = pace(arguments);
    let midnight = last_midnight();
    let clock = Clock::paced(midnight, speed);
    let stage = Stage::open(&clock).await.context("cannot start the fake servers")?;
    let config = configure(&stage, arguments, &ledger)?;
    let pool =
        config.backends.iter().find_map(config::Backend::pool).context("the demo rents a machine")?.clone();
    telemetry::install(&config.log);
    let proxy = Proxy::start(config, clock.clone()).await?;
    let load = Load::new(
        &format!("http://{}/v1", proxy.address),
        MODEL,
        clock.clone(),
        midnight,
        Day::at_speed(speed),
    );
    let scene = Scene { ledger: &ledger, pool: &pool, midnight };
    if !arguments.headless {
        welcome(&proxy, speed, span);
    }
    let progress = scene.report(&proxy, arguments.headless);
    tokio::select! {
        () = load.run(midnight + span) => {}
        _ = tokio::signal::ctrl_c() => {}
        never = progress => match never {},
    }
    let end = clock.now();
    if !arguments.headless && std::io::stderr().is_terminal() {
        eprintln!();
    }
    proxy.shut_down(async { drop(tokio::signal::ctrl_c().await) }).await;
    stage.close().await;
    scene.finish(end, arguments, &load, out)
}

fn configure(stage: &Stage, arguments: &DemoArgs, ledger: &Path) -> anyhow::Result<config::Config> {
    let text = stage.config(arguments.listen, arguments.admin_listen, ledger);
    config::parse(&text, "the demo's configuration", &|_| None)
        .map_err(|problems| anyhow::anyhow!("{problems}"))
}

/// The start of the present day, so that the ledger's days are whole.
fn last_midnight() -> Timestamp {
    let now = Clock::system().now().as_millis();
    Timestamp::from_millis(now - now % millis(DAY))
}

fn welcome(proxy: &Proxy, speed: u32, span: Duration) {
    let (url, admin) = (format!("http://{}/v1", proxy.address), format!("http://{}", proxy.admin_address));
    let seconds = span.as_secs() / u64::from(speed);
    eprintln!(
        "breakeven between a fake OpenAI and a fake GPU server; {} in {seconds} s, Ctrl-C ends it",
        clock(span)
    );
    eprintln!("  applications  {url}");
    eprintln!("  live page     {admin}/   (metrics: {admin}/metrics)");
    eprintln!(
        "  try           curl {url}/chat/completions -H 'content-type: application/json' -d '{{\"model\":\"{MODEL}\",\"max_tokens\":20,\"messages\":[{{\"role\":\"user\",\"content\":\"Hello\"}}]}}'"
    );
    eprintln!();
}

/// What every reading of the ledger needs.
struct Scene<'a> {
    ledger: &'a Path,
    pool: &'a PoolSpec,
    midnight: Timestamp,
}

impl Scene<'_> {
    fn bill(&self, end: Timestamp) -> anyhow::Result<Bill> {
        Ok(Bill::read(self.ledger, self.pool, API, self.midnight, end)?)
    }

    /// Shows how the day goes, in one line that changes on a terminal and in a line now and then elsewhere.
    async fn report(&self, proxy: &Proxy, headless: bool) -> std::convert::Infallible {
        if headless {
            std::future::pending::<()>().await;
        }
        let is_terminal = std::io::stderr().is_terminal();
        let mut ticks = tokio::time::interval(if is_terminal { PROGRESS } else { SLOW_PROGRESS });
        loop {
            ticks.tick().await;
            let line = self.progress(proxy);
            if is_terminal {
                eprint!("\r\x1b[K{line}");
            } else {
                eprintln!("{line}");
            }
        }
    }

    fn progress(&self, proxy: &Proxy) -> String {
        let now = proxy.gateway.now();
        let state = proxy.gateway.state();
        let Some(pool) = state.pools.first() else { return String::new() };
        let view = pool.view.load();
        let break_even =
            view.break_even_requests_per_hour.map_or_else(|| "?".to_owned(), |volume| format!("{volume:.0}"));
        let serves = match (pool.plan().0, pool.backend.fleet.counts().ready) {
            (Preference::Api, _) => "the API serves",
            (Preference::SelfHosted, 0) => "the API serves, the GPU starts",
            (Preference::SelfHosted, _) => "the GPU serves",
        };
        // Read while it is written; a reading that fails is one line without an amount.
        let spent = self.bill(now).map_or_else(
            |_| String::new(),
            |bill| format!("${:.2} so far for {} calls", bill.total(), grouped(bill.calls)),
        );
        format!(
            "{}  {:>4.0} calls/h, break-even {break_even}: {serves}  {spent}",
            clock(now.since(self.midnight)),
            view.volume_requests_per_hour
        )
    }

    fn finish(
        &self,
        end: Timestamp,
        arguments: &DemoArgs,
        load: &Load,
        out: &mut impl Write,
    ) -> anyhow::Result<()> {
        let bill = self.bill(end)?;
        bill.write(out).context("cannot print the table")?;
        let (failed, skipped) =
            (load.sent.failed.load(Ordering::Relaxed), load.sent.skipped.load(Ordering::Relaxed));
        if failed + skipped > 0 {
            writeln!(
                out,
                "\n  {} calls failed, {} were not sent: this machine was too slow",
                grouped(failed),
                grouped(skipped)
            )?;
        }
        if let Some(path) = &arguments.plot {
            let samples =
                history::samples(self.ledger, self.pool, API, bill.replicas_alone, self.midnight, end)?;
            let svg = picture::svg(&samples)
                .map_err(|error| anyhow::anyhow!("cannot draw the picture: {error}"))?;
            std::fs::write(path, svg).with_context(|| format!("cannot write `{}`", path.display()))?;
        }
        Ok(())
    }
}

/// `14:05`.
fn clock(duration: Duration) -> String {
    let minutes = duration.as_secs() / 60;
    format!("{:02}:{:02}", minutes / 60, minutes % 60)
}

/// A temporary folder for the ledger, removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new() -> anyhow::Result<Self> {
        let path = std::env::temp_dir().join(format!("breakeven-demo-{}", std::process::id()));
        std::fs::create_dir_all(&path).with_context(|| format!("cannot create `{}`", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What is left is in the system's folder for temporary files.
        drop(std::fs::remove_dir_all(&self.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        demo: DemoArgs,
    }

    fn paced(arguments: &[&str]) -> (u32, Duration) {
        pace(&Program::parse_from(std::iter::once(&"demo").chain(arguments)).demo)
    }

    #[test]
    fn a_day_passes_in_the_time_that_is_given_or_at_the_speed_that_is_given() {
        assert_eq!(paced(&[]), (1_440, DAY));
        assert_eq!(paced(&["--for", "20s"]), (4_320, DAY));
        assert_eq!(paced(&["--speed", "600"]), (600, DAY));
        assert_eq!(paced(&["--speed", "3600", "--for", "10s"]), (3_600, Duration::from_hours(10)));
        assert_eq!(paced(&["--for", "14d"]), (1, DAY));
    }
}
