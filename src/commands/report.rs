//! `breakeven report`: what the ledger says was spent and saved.

mod focus;
mod table;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, anyhow};
use clap::{Args, ValueEnum};
use serde::ser::{Serialize, SerializeMap, Serializer};

use crate::clock::Clock;
use crate::config::postgres::is_postgres_url;
use crate::config::{self, PostgresServer, PostgresSettings};
use crate::economics::{NanoUsd, Timestamp};
use crate::ledger::query::{self, Key, Row};
use crate::ledger::{self, LedgerError, postgres};

/// Spend, tokens, savings and idle rent from the ledger.
///
/// Spend is token charges and rent. A call on a rented backend costs the rent attributed to it; rent that no
/// call used is idle. Net savings are what the API alone would have cost, less the spend: negative when renting
/// did not pay. "Own at full use" is the rent of the same calls on replicas that are never idle. Grouped by anything but day, hour and backend, idle rent stands in a row `(idle)`.
#[derive(Debug, Clone, Args)]
pub struct ReportArgs {
    /// From this time on: a date (midnight UTC), an RFC 3339 time, or a time back such as 7d.
    #[arg(long, value_name = "TIME")]
    pub since: Option<String>,
    /// Until before this time, written like --since.
    #[arg(long, value_name = "TIME")]
    pub until: Option<String>,
    /// One row per value of: day, hour, backend, model, served_model, route, key, team, tag:NAME, endpoint,
    /// outcome, reason, tier. Several make one row per combination.
    #[arg(long, value_name = "KEYS", value_delimiter = ',', default_value = "backend")]
    pub by: Vec<Key>,
    /// `focus` writes the CSV of the FinOps Open Cost and Usage Specification, by day.
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
    /// Configuration file that names the ledger.
    #[arg(long, value_name = "FILE", env = config::CONFIG_VARIABLE)]
    pub config: Option<PathBuf>,
    /// The ledger itself, instead of the one in the configuration: a file, or postgres://user@host/database.
    #[arg(long, value_name = "FILE", conflicts_with = "config")]
    pub ledger: Option<PathBuf>,
    /// The ledgers of all proxies, from the database that `ledger.postgres` of the configuration names.
    #[arg(long, conflicts_with = "ledger")]
    pub postgres: bool,
}

/// Where a ledger is read.
#[derive(Debug)]
pub enum Source {
    File(PathBuf),
    Postgres(Box<PostgresSettings>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Format {
    #[default]
    Table,
    Json,
    Csv,
    Focus,
}

/// Prints the report. Works while a server writes the ledger.
pub fn run(arguments: &ReportArgs, out: &mut impl Write) -> anyhow::Result<ExitCode> {
    report(arguments, Clock::system().now(), out)?;
    Ok(ExitCode::SUCCESS)
}

/// As [`run`], at a given time.
pub fn report(arguments: &ReportArgs, now: Timestamp, out: &mut impl Write) -> anyhow::Result<()> {
    let since = arguments.since.as_deref().map(|text| parse_time(text, now)).transpose()?;
    let until = arguments.until.as_deref().map(|text| parse_time(text, now)).transpose()?;
    if let (Some(since), Some(until)) = (since, until)
        && since >= until
    {
        return Err(anyhow!("`--since` is not before `--until`: the range is empty"));
    }
    let source = source(arguments.ledger.as_deref(), arguments.config.as_deref(), arguments.postgres)?;
    let by = if arguments.format == Format::Focus { focus::KEYS.as_slice() } else { &arguments.by };
    let rows = match source {
        Source::File(path) => {
            catch_up(&path, now);
            query::totals(&path, since, until, by)?
        }
        Source::Postgres(settings) => runtime()?.block_on(postgres::totals(&settings, since, until, by))?,
    };
    match arguments.format {
        Format::Table => table::write(&rows, by, out),
        Format::Json => write_json(&rows, by, out),
        Format::Csv => write_csv(&rows, by, out),
        Format::Focus => focus::write(&rows, out),
    }
    .context("cannot write the report")
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start to connect")
}

/// The ledger that the command line means.
pub fn source(ledger: Option<&Path>, config: Option<&Path>, from_postgres: bool) -> anyhow::Result<Source> {
    if let Some(url) = ledger.and_then(Path::to_str).filter(|text| is_postgres_url(text)) {
        let server: PostgresServer = url.parse().map_err(|error| anyhow!("`--ledger` {error}"))?;
        return Ok(Source::Postgres(Box::new(PostgresSettings::of(server))));
    }
    if !from_postgres {
        return ledger_path(ledger, config).map(Source::File);
    }
    let file = config::find(config).ok_or_else(|| {
        anyhow!("`--postgres` needs a configuration with `ledger.postgres`: name it with `--config`")
    })?;
    let settings = config::ledger_settings(&file)?.postgres.ok_or_else(|| {
        anyhow!(
            "`{}` has no `ledger.postgres`: write `postgres = {{ url = {{ env = \"DATABASE_URL\" }} }}` in \
             `[ledger]`",
            file.display()
        )
    })?;
    Ok(Source::Postgres(Box::new(settings)))
}

/// Rows that a killed server left in the journal belong in the report. Where they cannot be imported, say on
/// a copy that may not be written, the report shows what is in the tables.
fn catch_up(path: &Path, now: Timestamp) {
    if let Err(error @ (LedgerError::Io { .. } | LedgerError::Sqlite { .. })) = ledger::catch_up(path, now) {
        tracing::warn!(%error, "the journal cannot be imported: its last rows are missing here");
    }
}

/// Reads nothing but `ledger.path` of a configuration, so that a report needs none of its secrets.
pub fn ledger_path(ledger: Option<&Path>, config: Option<&Path>) -> anyhow::Result<PathBuf> {
    if let Some(path) = ledger {
        return Ok(path.to_owned());
    }
    let Some(file) = config::find(config) else {
        return Ok(config::defaults::LEDGER_PATH.into());
    };
    let text = std::fs::read_to_string(&file)
        .with_context(|| format!("cannot read `{}`: name another file with `--config`", file.display()))?;
    let table: toml::Table = toml::from_str(&text)
        .with_context(|| format!("`{}` is not TOML: `breakeven check` says more", file.display()))?;
    let path = table.get("ledger").and_then(|ledger| ledger.get("path")).and_then(toml::Value::as_str);
    Ok(path.unwrap_or(config::defaults::LEDGER_PATH).into())
}

/// A date, an RFC 3339 time, or a duration before `now`.
pub fn parse_time(text: &str, now: Timestamp) -> anyhow::Result<Timestamp> {
    if let Some(back) = config::parse_duration(text) {
        return Ok(now.saturating_sub(back));
    }
    let midnight = |date: jiff::civil::Date| jiff::tz::TimeZone::UTC.to_timestamp(date.at(0, 0, 0, 0));
    let is_date = text.len() == "2026-11-25".len();
    let time = if is_date { text.parse().and_then(midnight) } else { text.parse::<jiff::Timestamp>() };
    time.ok()
        .and_then(|time| u64::try_from(time.as_millisecond()).ok())
        .map(Timestamp::from_millis)
        .ok_or_else(|| {
            anyhow!(
                "`{text}` is not a time: write 2026-11-25, 2026-11-25T14:00:00Z, or 7d for seven days back"
            )
        })
}

/// A value of a row.
#[derive(Debug, Clone, Copy)]
enum Cell {
    Count(u64),
    Amount(NanoUsd),
}

/// Everything of a row but its keys, under the names that are promised.
fn cells(row: &Row) -> [(&'static str, Cell); 11] {
    [
        ("requests", Cell::Count(row.requests)),
        ("input_tokens", Cell::Count(row.input_tokens)),
        ("cached_input_tokens", Cell::Count(row.cached_input_tokens)),
        ("output_tokens", Cell::Count(row.output_tokens)),
        ("estimated_requests", Cell::Count(row.estimated_requests)),
        ("cost_usd", Cell::Amount(row.cost)),
        ("all_api_usd", Cell::Amount(row.all_api)),
        ("all_self_hosted_usd", Cell::Amount(row.all_self_hosted)),
        ("rent_usd", Cell::Amount(row.rent)),
        ("idle_usd", Cell::Amount(row.idle)),
        ("net_savings_usd", Cell::Amount(row.net_savings())),
    ]
}

struct JsonRow<'a> {
    row: &'a Row,
    by: &'a [Key],
}

impl Serialize for JsonRow<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (key, value) in self.by.iter().zip(&self.row.keys) {
            map.serialize_entry(&key.to_string(), value)?;
        }
        for (name, cell) in cells(self.row) {
            match cell {
                Cell::Count(count) => map.serialize_entry(name, &count)?,
                Cell::Amount(amount) => map.serialize_entry(name, &amount)?,
            }
        }
        map.end()
    }
}

/// The rows as `--format json` prints them.
pub fn rows_as_json(by: &[Key], rows: &[Row]) -> serde_json::Value {
    let rows: Vec<_> = rows.iter().map(|row| JsonRow { row, by }).collect();
    serde_json::to_value(rows).expect("a row has text keys and plain values")
}

fn write_json(rows: &[Row], by: &[Key], out: &mut impl Write) -> io::Result<()> {
    let rows: Vec<_> = rows.iter().map(|row| JsonRow { row, by }).collect();
    serde_json::to_writer_pretty(&mut *out, &rows)?;
    writeln!(out)
}

fn write_csv(rows: &[Row], by: &[Key], out: &mut impl Write) -> io::Result<()> {
    let mut csv = csv::Writer::from_writer(out);
    let names = cells(&Row::default()).map(|(name, _)| name.to_owned());
    csv.write_record(by.iter().map(Key::to_string).chain(names))?;
    for row in rows {
        let values = cells(row).map(|(_, cell)| match cell {
            Cell::Count(count) => count.to_string(),
            Cell::Amount(amount) => amount.to_string(),
        });
        csv.write_record(row.keys.iter().cloned().chain(values))?;
    }
    csv.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_a_date_an_instant_or_a_duration_back() {
        let now = Timestamp::from_secs(1_800_000_000);
        for (text, seconds) in [
            ("7d", 1_800_000_000 - 7 * 86_400),
            ("2027-01-15", 1_799_971_200),
            ("2027-01-15T08:00:00Z", 1_800_000_000),
            ("2027-01-15T09:00:00+01:00", 1_800_000_000),
        ] {
            assert_eq!(parse_time(text, now).unwrap(), Timestamp::from_secs(seconds), "{text}");
        }
        for text in ["", "yesterday", "2027-13-01", "2027-01-15T08:00:00", "1969-01-01"] {
            assert!(parse_time(text, now).unwrap_err().to_string().contains("7d"), "{text}");
        }
    }
}
