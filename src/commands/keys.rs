//! `breakeven keys`: virtual keys, made, listed and revoked. Works while a server runs, and without one.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, anyhow, ensure};
use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::report::ledger_path;
use crate::clock::Clock;
use crate::config::{self, BudgetPeriod};
use crate::economics::{NanoUsd, Timestamp};
use crate::keys::secret::{self, Digest};
use crate::keys::store::{Record, Store, path_beside};
use crate::keys::{period, spend_of_period};

/// Longest name of a key or a team.
const MAX_NAME_BYTES: usize = 64;

/// Makes, lists and revokes virtual keys.
///
/// They are asked for when the configuration has `auth.mode = "keys"`, and are kept in `keys.db` beside the
/// ledger. A running server takes up what changes within two seconds.
#[derive(Debug, Clone, Args)]
pub struct KeysArgs {
    #[command(subcommand)]
    command: Command,
    /// Configuration file that names the ledger.
    #[arg(long, global = true, value_name = "FILE", env = config::CONFIG_VARIABLE)]
    config: Option<PathBuf>,
    /// The ledger itself, instead of the one in the configuration.
    #[arg(long, global = true, value_name = "FILE")]
    ledger: Option<PathBuf>,
}

#[derive(Debug, Clone, Subcommand)]
enum Command {
    /// Make a key, and print its secret: this once and never again
    Create(Box<CreateArgs>),
    /// Print all keys with what they have spent
    List {
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// End a key for good
    Revoke {
        /// Its public id, `key_..`
        id: String,
    },
}

#[derive(Debug, Clone, Args)]
struct CreateArgs {
    /// Who or what it is for
    #[arg(long)]
    name: String,
    /// Team that its calls are booked to, whatever their tags say
    #[arg(long)]
    team: Option<String>,
    /// Most that its calls may cost in a period, in USD
    #[arg(long, value_name = "USD")]
    budget_usd: Option<NanoUsd>,
    /// Period of the budget: days and months are those of UTC
    #[arg(long, value_enum, default_value_t, requires = "budget_usd")]
    period: Period,
    /// Requests a minute
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    rpm: Option<u64>,
    /// Input and output tokens a minute
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    tpm: Option<u64>,
    /// Routes that it may use; all if not given
    #[arg(long, value_delimiter = ',')]
    routes: Vec<String>,
    /// Backends that may serve it; all if not given
    #[arg(long, value_delimiter = ',')]
    backends: Vec<String>,
    /// It ends after so long, such as 30d
    #[arg(long, value_name = "DURATION")]
    expires: Option<String>,
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum Format {
    #[default]
    Table,
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum Period {
    Day,
    #[default]
    Month,
    Lifetime,
}

/// Runs the command. Status 1 when there is no such key to revoke.
pub fn run(arguments: &KeysArgs, out: &mut impl Write) -> anyhow::Result<ExitCode> {
    run_at(arguments, Clock::system().now(), out)
}

/// As [`run`], at a given time.
pub fn run_at(arguments: &KeysArgs, now: Timestamp, out: &mut impl Write) -> anyhow::Result<ExitCode> {
    let ledger = ledger_path(arguments.ledger.as_deref(), arguments.config.as_deref())?;
    let path = path_beside(&ledger);
    match &arguments.command {
        Command::Create(create) => {
            let (record, secret) = new_key(create, now)?;
            Store::open(&path)?.insert(&record)?;
            print_new(&record, &secret, create.format, out)?;
        }
        Command::List { format } => {
            let keys = if path.exists() { Store::open(&path)?.all()? } else { Vec::new() };
            list(&keys, &ledger, *format, now, out)?;
        }
        Command::Revoke { id } => {
            if !path.exists() || !Store::open(&path)?.revoke(id, now)? {
                eprintln!("breakeven: no key `{id}` is in force; `breakeven keys list` shows all");
                return Ok(ExitCode::from(1));
            }
            writeln!(out, "{id} is revoked")?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn new_key(arguments: &CreateArgs, now: Timestamp) -> anyhow::Result<(Record, String)> {
    for name in std::iter::once(&arguments.name).chain(&arguments.team) {
        let is_fit = !name.is_empty() && name.len() <= MAX_NAME_BYTES && !name.chars().any(char::is_control);
        ensure!(is_fit, "a name must have 1 to {MAX_NAME_BYTES} bytes and no control characters");
    }
    ensure!(arguments.budget_usd.is_none_or(|usd| usd > NanoUsd::ZERO), "`--budget-usd` must be above zero");
    let expires = arguments.expires.as_deref().map(|text| {
        config::parse_duration(text)
            .ok_or_else(|| anyhow!("`--expires {text}` is not a duration, such as 30d"))
    });
    let secret = secret::generate()?;
    let record = Record {
        id: secret::new_id()?,
        digest: Digest::of(secret.as_bytes()),
        name: arguments.name.clone(),
        team: arguments.team.clone().unwrap_or_default(),
        budget: arguments.budget_usd.map(|usd| (usd, arguments.period.into())),
        requests_per_minute: arguments.rpm,
        tokens_per_minute: arguments.tpm,
        routes: arguments.routes.clone(),
        backends: arguments.backends.clone(),
        created_at: now,
        expires_at: expires.transpose()?.map(|after| now + after),
        revoked_at: None,
    };
    Ok((record, secret))
}

fn print_new(key: &Record, secret: &str, format: Format, out: &mut impl Write) -> anyhow::Result<()> {
    match format {
        Format::Json => writeln!(out, "{}", json!({ "id": key.id, "name": key.name, "secret": secret }))?,
        Format::Table => writeln!(
            out,
            "id      {}\nsecret  {secret}\n\nThe secret is shown this once. Clients send it as their API key.",
            key.id
        )?,
    }
    Ok(())
}

fn list(
    keys: &[Record],
    ledger: &Path,
    format: Format,
    now: Timestamp,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    const PERIODS: [BudgetPeriod; 3] = [BudgetPeriod::Day, BudgetPeriod::Month, BudgetPeriod::Lifetime];
    let mut spent = Vec::new();
    for period in PERIODS {
        let rows = spend_of_period(ledger, period, now).context("cannot read what keys have spent")?;
        spent.push((period, rows));
    }
    let of = |key: &Record, period: BudgetPeriod| {
        let rows = spent.iter().filter(|(other, _)| *other == period).flat_map(|(_, rows)| rows);
        rows.filter(|row| row.key == key.id).fold(NanoUsd::ZERO, |sum, row| sum + row.cost)
    };
    if format == Format::Json {
        let rows: Vec<Value> = keys.iter().map(|key| as_json(key, now, |period| of(key, period))).collect();
        writeln!(out, "{}", serde_json::to_string_pretty(&rows)?)?;
        return Ok(());
    }
    let mut rows = vec![HEAD.map(str::to_owned)];
    rows.extend(keys.iter().map(|key| as_row(key, now, |period| of(key, period))));
    write_table(&rows, out)
}

fn as_json(key: &Record, now: Timestamp, spent: impl Fn(BudgetPeriod) -> NanoUsd) -> Value {
    let usd = |amount: NanoUsd| amount.to_string();
    json!({
        "id": key.id,
        "name": key.name,
        "team": key.team,
        "state": state(key, now),
        "budget_usd": key.budget.map(|(limit, _)| usd(limit)),
        "period": key.budget.map(|(_, period)| period::name(period)),
        "spent_day_usd": usd(spent(BudgetPeriod::Day)),
        "spent_month_usd": usd(spent(BudgetPeriod::Month)),
        "spent_lifetime_usd": usd(spent(BudgetPeriod::Lifetime)),
        "requests_per_minute": key.requests_per_minute,
        "tokens_per_minute": key.tokens_per_minute,
        "routes": key.routes,
        "backends": key.backends,
        "created_at": time(key.created_at),
        "expires_at": key.expires_at.map(time),
        "revoked_at": key.revoked_at.map(time),
    })
}

const HEAD: [&str; 8] = ["id", "name", "team", "state", "budget", "today", "month", "all"];

fn as_row(key: &Record, now: Timestamp, spent: impl Fn(BudgetPeriod) -> NanoUsd) -> [String; 8] {
    let budget = key.budget.map(|(limit, period)| format!("{limit}/{}", period::name(period)));
    let [today, month, all] = [BudgetPeriod::Day, BudgetPeriod::Month, BudgetPeriod::Lifetime]
        .map(|period| spent(period).to_string());
    let state = state(key, now).to_owned();
    [key.id.clone(), key.name.clone(), key.team.clone(), state, budget.unwrap_or_default(), today, month, all]
}

fn write_table(rows: &[[String; 8]], out: &mut impl Write) -> anyhow::Result<()> {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..HEAD.len()).map(width).collect();
    for row in rows {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        writeln!(out, "{}", cells.join("  ").trim_end())?;
    }
    Ok(())
}

fn state(key: &Record, now: Timestamp) -> &'static str {
    match key {
        Record { revoked_at: Some(_), .. } => "revoked",
        Record { expires_at: Some(at), .. } if now >= *at => "expired",
        _ => "active",
    }
}

fn time(at: Timestamp) -> String {
    let millis = i64::try_from(at.as_millis()).unwrap_or(i64::MAX);
    jiff::Timestamp::from_millisecond(millis).unwrap_or_default().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

impl From<Period> for BudgetPeriod {
    fn from(period: Period) -> Self {
        match period {
            Period::Day => Self::Day,
            Period::Month => Self::Month,
            Period::Lifetime => Self::Lifetime,
        }
    }
}
