//! Whether a call costs the same when an installation has grown: instructions per call with few and with many
//! virtual keys, models and workers, counted by valgrind.
//!
//! Of the keys one is used, of the models each in turn, and each worker has a connection. A first round over all
//! of them is left out, so that what is counted is how the proxy runs and not how it gets there. It also leaves the
//! proxy the time to end what it does behind its listener, which would otherwise be counted in the longer run
//! alone.

use std::fmt::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;

use crate::instructions::{Subject, connect, exchange};
use crate::prose::ChatBody;
use crate::rounds::Mock;

/// How much more a call may cost in the largest installation than in the smallest.
const SLACK: f64 = 0.10;
const SIZES_OF_KEYS: [usize; 3] = [1, 100, 10_000];
const SIZES_OF_MODELS: [usize; 3] = [1, 100, 1000];
const SIZES_OF_WORKERS: [usize; 2] = [1, 2];
/// Calls that are counted.
const CALLS: usize = 1000;
/// Calls before them, at least.
const WARM_UP: usize = 500;

/// Adds rows to the file of keys: copies of the one that is there, with ids and digests of their own.
const ADD_KEYS: &str = r#"
import os, sqlite3, sys
database = sqlite3.connect(sys.argv[1])
cursor = database.execute("SELECT * FROM keys")
names = [column[0] for column in cursor.description]
row = dict(zip(names, cursor.fetchone()))
insert = f"INSERT INTO keys ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"
for number in range(int(sys.argv[2])):
    row |= {"id": f"key-{number:012}", "digest": os.urandom(len(row["digest"]))}
    database.execute(insert, list(row.values()))
database.commit()
"#;

#[derive(clap::Args)]
pub struct Arguments {
    /// The program to measure.
    #[arg(long)]
    breakeven: PathBuf,
}

/// How much there is of what grows.
#[derive(Clone, Copy)]
enum Size {
    Keys(usize),
    Models(usize),
    Workers(usize),
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let mock = Mock::start()?;
    let mut too_much = Vec::new();
    let growths = [
        &SIZES_OF_KEYS.map(Size::Keys)[..],
        &SIZES_OF_MODELS.map(Size::Models),
        &SIZES_OF_WORKERS.map(Size::Workers),
    ];
    for sizes in growths {
        let mut smallest = None;
        for &size in sizes {
            let instructions = measure(&arguments.breakeven, mock.address, size)?;
            let growth = grown(*smallest.get_or_insert(instructions), instructions);
            println!("{:14} {instructions:9} instructions, {:+.1}%", name(size), growth * 100.0);
            if growth > SLACK {
                too_much.push(name(size));
            }
        }
    }
    anyhow::ensure!(too_much.is_empty(), "more than 10% above one: {}", too_much.join(", "));
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
fn grown(from: u64, to: u64) -> f64 {
    to as f64 / from as f64 - 1.0
}

fn name(size: Size) -> String {
    match size {
        Size::Keys(count) => format!("{count} keys"),
        Size::Models(count) => format!("{count} models"),
        Size::Workers(count) => format!("{count} workers"),
    }
}

/// Instructions per call.
fn measure(breakeven: &Path, upstream: SocketAddr, size: Size) -> anyhow::Result<u64> {
    let models = if let Size::Models(count) = size { count } else { 1 };
    let connections = if let Size::Workers(count) = size { count } else { 1 };
    let warm_up = WARM_UP.max(models);
    let count = |calls: usize| {
        let directory = tempfile::tempdir()?;
        std::fs::write(directory.path().join("api-key"), "sk-upstream")?;
        let key = match size {
            Size::Keys(count) => make_keys(breakeven, directory.path(), count)?,
            Size::Models(_) | Size::Workers(_) => "sk-bench".to_owned(),
        };
        let template = config(size, models, connections);
        let subject = Subject { breakeven, template: &template, upstream };
        let counts = directory.path().join("callgrind.out");
        subject.count(directory.path(), &counts, |proxy| {
            let mut streams = (0..connections).map(|_| connect(proxy)).collect::<Result<Vec<_>, _>>()?;
            call(&mut streams, &key, models, calls)
        })
    };
    let base = count(warm_up)?;
    Ok(count(warm_up + CALLS)?.saturating_sub(base) / CALLS as u64)
}

fn config(size: Size, models: usize, workers: usize) -> String {
    let mode = if matches!(size, Size::Keys(_)) { "keys" } else { "pass_through" };
    let mut config = format!(
        r#"
[server]
listen = "{{listen}}"
admin_listen = "{{admin}}"
workers = {workers}

[auth]
mode = "{mode}"

[ledger]
path = "{{directory}}/breakeven.db"

[policy]
min_dwell = "24h"

[backends.openai]
kind = "api"
base_url = "http://{{upstream}}/v1"
api_key = {{ file = "{{directory}}/api-key" }}

[backends.gpu]
kind = "self_hosted"
base_url = "http://{{upstream}}/v1"
hourly_usd = 2.99
capacity = {{ input_tokens_per_second = 15000, output_tokens_per_second = 10000, max_in_flight = 8192 }}
"#
    );
    for number in 0..models {
        let route = format!(
            r#"
[routes.route-{number}]
models = ["model-{number}"]
policy = "cheapest"
offers = [
  {{ backend = "openai", model = "gpt-4o-mini" }},
  {{ backend = "gpu", model = "meta-llama/Llama-3.1-8B-Instruct" }},
]
"#
        );
        config.push_str(&route);
    }
    config
}

/// Makes so many keys; the secret of the first.
fn make_keys(breakeven: &Path, directory: &Path, count: usize) -> anyhow::Result<String> {
    let made = Command::new(breakeven.canonicalize()?)
        .args(["keys", "create", "--name", "bench", "--format", "json", "--ledger"])
        .arg(directory.join("breakeven.db"))
        .output()?;
    anyhow::ensure!(made.status.success(), "no key was made: {}", String::from_utf8_lossy(&made.stderr));
    let made: serde_json::Value = serde_json::from_slice(&made.stdout)?;
    let secret = made["secret"].as_str().context("the key that was made has no secret")?.to_owned();
    let added = Command::new("python3")
        .args(["-c", ADD_KEYS])
        .arg(directory.join("keys.db"))
        .arg((count - 1).to_string())
        .output()
        .context("python3 cannot be started; is it installed?")?;
    anyhow::ensure!(added.status.success(), "no keys were added: {}", String::from_utf8_lossy(&added.stderr));
    Ok(secret)
}

/// Calls each model in turn, on each connection in turn.
fn call(streams: &mut [TcpStream], key: &str, models: usize, calls: usize) -> anyhow::Result<()> {
    let connections = streams.len();
    let mut model = String::new();
    for number in 0..calls {
        model.clear();
        write!(model, "model-{}", number % models)?;
        let stream = &mut streams[number % connections];
        let status = exchange(stream, key, &ChatBody::new(&model, 1024, false, 1).bytes)?;
        anyhow::ensure!(status == 200, "`{model}` was answered with {status}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_relative_to_the_smallest() {
        assert!((grown(1000, 1100) - 0.1).abs() < 1e-9);
        assert!(grown(1000, 900) < 0.0);
    }

    #[test]
    fn every_model_has_a_route() {
        assert_eq!(config(Size::Models(3), 3, 1).matches("policy = \"cheapest\"").count(), 3);
        assert!(config(Size::Keys(5), 1, 1).contains("mode = \"keys\""));
        assert!(config(Size::Workers(2), 1, 2).contains("workers = 2"));
    }
}
