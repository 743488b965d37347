//! User-space instructions of the proxy per call, counted by valgrind: a figure that no other program disturbs.
//!
//! The proxy runs under callgrind twice, with few calls and with many, one at a time on one connection. The
//! difference of the two counts, divided by the difference in calls, leaves start-up and shut-down out. What
//! remains of noise (ticks of timers, reads that bring more or less) is below two percent; the guard allows ten.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context;

use crate::http::{Event, Reader};
use crate::prose::{ChatBody, write_serial};
use crate::rounds::{Mock, START_TIMEOUT, end, free_address, wait_until};

/// What may be lost without a word.
const SLACK: f64 = 0.10;
/// How many times slower a program may be under valgrind.
const VALGRIND: u32 = 10;
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(clap::Args)]
pub struct Arguments {
    /// The program to measure.
    #[arg(long)]
    breakeven: PathBuf,
    /// Its configuration, with `{listen}`, `{admin}`, `{upstream}` and `{directory}` as places to fill in.
    #[arg(long)]
    config: PathBuf,
    /// Recorded figures, as JSON.
    #[arg(long)]
    recorded: PathBuf,
    /// Write the figures there instead of comparing with them.
    #[arg(long)]
    record: bool,
    /// Keep callgrind's files in this directory, `CASE.out` each, to be read with `callgrind_annotate`.
    #[arg(long)]
    keep: Option<PathBuf>,
}

struct Case {
    name: &'static str,
    body: usize,
    stream: bool,
    calls: u32,
    /// What the counted instructions are divided by: 1, or the events of a stream.
    parts: u32,
}

/// Events are 2 ms apart, so that each one is received and sent by itself.
const BEHAVIOUR: &str = "delay_us=0&events=32&gap_us=2000";

const CASES: [Case; 4] = [
    Case { name: "unary-1k", body: 1024, stream: false, calls: 1000, parts: 1 },
    Case { name: "unary-16k", body: 16 * 1024, stream: false, calls: 500, parts: 1 },
    Case { name: "unary-200k", body: 200 * 1024, stream: false, calls: 100, parts: 1 },
    Case { name: "event", body: 1024, stream: true, calls: 25, parts: 32 },
];

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let mock = Mock::start()?;
    mock.behave(BEHAVIOUR)?;
    let warm_up = CASES.iter().map(|case| case.calls / 10).collect::<Vec<_>>();
    let base = count(arguments, mock.address, "warm-up", &warm_up)?;
    let mut measured = BTreeMap::new();
    for (index, case) in CASES.iter().enumerate() {
        let mut calls = warm_up.clone();
        calls[index] += case.calls;
        let instructions = count(arguments, mock.address, case.name, &calls)?.saturating_sub(base);
        measured.insert(case.name.to_owned(), instructions / u64::from(case.calls * case.parts));
    }
    if arguments.record {
        fs::write(&arguments.recorded, serde_json::to_string_pretty(&measured)? + "\n")?;
    }
    let text = fs::read_to_string(&arguments.recorded)
        .with_context(|| format!("`{}`", arguments.recorded.display()))?;
    compare(&measured, &serde_json::from_str(&text)?)
}

#[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
fn compare(measured: &BTreeMap<String, u64>, recorded: &BTreeMap<String, u64>) -> anyhow::Result<()> {
    let mut worse = Vec::new();
    for (name, now) in measured {
        let before = *recorded.get(name).with_context(|| format!("nothing is recorded for `{name}`"))?;
        let change = *now as f64 / before as f64 - 1.0;
        println!("{name:12} {now:9} instructions, {before:9} recorded, {:+.1}%", change * 100.0);
        if change > SLACK {
            worse.push(name.as_str());
        }
        if change < -SLACK {
            println!("{name:12} is better than what is recorded: record it, so that it stays so");
        }
    }
    let worse = worse.join(", ");
    anyhow::ensure!(
        worse.is_empty(),
        "more than 10% above what is recorded: {worse}; if it must be, use --record"
    );
    Ok(())
}

/// Instructions of a whole run of the proxy with so many calls of each case.
fn count(arguments: &Arguments, upstream: SocketAddr, name: &str, calls: &[u32]) -> anyhow::Result<u64> {
    let template =
        fs::read_to_string(&arguments.config).with_context(|| format!("`{}`", arguments.config.display()))?;
    let directory = tempfile::tempdir()?;
    let kept = arguments.keep.as_deref().unwrap_or(directory.path());
    let counts = std::path::absolute(kept)?.join(format!("{name}.out"));
    let subject = Subject { breakeven: &arguments.breakeven, template: &template, upstream };
    subject.count(directory.path(), &counts, |listen| call(listen, calls))
}

/// A program to count, and its configuration with places to fill in.
pub struct Subject<'a> {
    pub breakeven: &'a Path,
    pub template: &'a str,
    pub upstream: SocketAddr,
}

impl Subject<'_> {
    /// Instructions of a whole run in `directory` during which `call` is done. Callgrind's file goes to `counts`.
    pub fn count(
        &self,
        directory: &Path,
        counts: &Path,
        call: impl FnOnce(SocketAddr) -> anyhow::Result<()>,
    ) -> anyhow::Result<u64> {
        let (listen, admin) = (free_address()?, free_address()?);
        let config = directory.join("breakeven.toml");
        let text = self
            .template
            .replace("{listen}", &listen.to_string())
            .replace("{admin}", &admin.to_string())
            .replace("{upstream}", &self.upstream.to_string())
            .replace("{directory}", &directory.display().to_string());
        fs::write(&config, text)?;
        let mut proxy = Command::new("valgrind")
            .args(["--tool=callgrind", "--quiet"])
            .arg(format!("--callgrind-out-file={}", counts.display()))
            .arg(self.breakeven.canonicalize()?)
            .args(["serve", "--config"])
            .arg(config)
            .current_dir(directory)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("valgrind cannot be started; is it installed?")?;
        let called = wait_until(START_TIMEOUT * VALGRIND, || TcpStream::connect(listen).is_ok())
            .and_then(|()| call(listen));
        end(&mut proxy);
        called?;
        total(counts)
    }
}

/// The sum at the end of callgrind's file.
fn total(file: &Path) -> anyhow::Result<u64> {
    let text = fs::read_to_string(file).context("callgrind wrote no counts")?;
    let line = text.lines().find_map(|line| line.strip_prefix("summary: ").or(line.strip_prefix("totals: ")));
    line.and_then(|sum| sum.trim().parse().ok()).context("callgrind's file has no total")
}

fn call(proxy: SocketAddr, calls: &[u32]) -> anyhow::Result<()> {
    let mut stream = connect(proxy)?;
    for (case, calls) in CASES.iter().zip(calls) {
        let mut body = ChatBody::new("gpt-4o-mini", case.body, case.stream, 1);
        for serial in 0..u64::from(*calls) {
            let newest = body.serials.last().copied().unwrap_or_default();
            write_serial(&mut body.bytes[newest..], serial);
            let status = exchange(&mut stream, "sk-bench", &body.bytes)?;
            anyhow::ensure!(status == 200, "`{}` was answered with {status}", case.name);
        }
    }
    Ok(())
}

/// A connection for one call after the other.
pub fn connect(proxy: SocketAddr) -> anyhow::Result<TcpStream> {
    let stream = TcpStream::connect(proxy)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    Ok(stream)
}

/// Sends one request and reads its whole answer; the status.
pub fn exchange(stream: &mut TcpStream, key: &str, body: &[u8]) -> anyhow::Result<u16> {
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: proxy\r\nAccept: application/json\r\n\
         Content-Type: application/json\r\nAuthorization: Bearer {key}\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(&[head.as_bytes(), body].concat())?;
    let (mut reader, mut buffer) = (Reader::default(), vec![0; 64 * 1024]);
    let (mut status, mut is_complete) = (0, false);
    while !is_complete {
        let received = stream.read(&mut buffer)?;
        anyhow::ensure!(received > 0, "the proxy closed the connection in the middle of an answer");
        let fed = reader.feed(&buffer[..received], |event| match event {
            Event::Head(head) => status = head.status,
            Event::Data(_) => {}
            Event::End => is_complete = true,
        });
        fed.map_err(anyhow::Error::msg)?;
    }
    Ok(status)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(unary: u64, event: u64) -> BTreeMap<String, u64> {
        BTreeMap::from([("unary-1k".to_owned(), unary), ("event".to_owned(), event)])
    }

    #[test]
    fn ten_percent_more_is_allowed_and_eleven_is_not() {
        assert!(compare(&counts(1100, 500), &counts(1000, 500)).is_ok());
        let error = compare(&counts(1110, 500), &counts(1000, 500)).unwrap_err().to_string();
        assert!(error.contains("unary-1k") && !error.contains("event"), "{error}");
    }

    #[test]
    fn a_case_that_was_never_recorded_is_an_error() {
        assert!(compare(&counts(1, 1), &BTreeMap::new()).is_err());
    }
}
