//! `breakeven export`: the ledger as files, a day each.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, anyhow};
use clap::{Args, ValueEnum};

use super::report::{ledger_path, parse_time};
use crate::clock::Clock;
use crate::config;
use crate::config::postgres::is_postgres_url;
use crate::economics::Timestamp;
use crate::ledger;
use crate::ledger::export::{Export, Exported};

/// Writes calls and rent of each day that is over as files, for databases that are larger than this ledger.
///
/// `calls-2026-11-25.csv.gz` and `rent-2026-11-25.csv.gz` hold that day of UTC. A file bears its name only when it is
/// complete; files that are there already are left alone, so that the command can be run daily, or again after it
/// was interrupted. Works while a server writes the ledger.
#[derive(Debug, Clone, Args)]
pub struct ExportArgs {
    /// Folder that the files go to; made if it is not there.
    #[arg(long, value_name = "FOLDER")]
    pub out: PathBuf,
    /// From the day of this time on: a date, an RFC 3339 time, or a time back such as 7d.
    #[arg(long, value_name = "TIME")]
    pub since: Option<String>,
    /// Days that begin before this time, written like --since.
    #[arg(long, value_name = "TIME")]
    pub until: Option<String>,
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
    /// Write files again that are there already.
    #[arg(long)]
    pub overwrite: bool,
    /// Configuration file that names the ledger.
    #[arg(long, value_name = "FILE", env = config::CONFIG_VARIABLE)]
    pub config: Option<PathBuf>,
    /// The ledger itself, instead of the one in the configuration.
    #[arg(long, value_name = "FILE", conflicts_with = "config")]
    pub ledger: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Format {
    /// CSV with a header line, compressed with gzip.
    #[default]
    Csv,
}

/// Writes the files and names them.
pub fn run(arguments: &ExportArgs, out: &mut impl Write) -> anyhow::Result<ExitCode> {
    export(arguments, Clock::system().now(), out)?;
    Ok(ExitCode::SUCCESS)
}

/// As [`run`], at a given time.
pub fn export(arguments: &ExportArgs, now: Timestamp, out: &mut impl Write) -> anyhow::Result<()> {
    let Format::Csv = arguments.format;
    let time = |text: &Option<String>| text.as_deref().map(|text| parse_time(text, now)).transpose();
    let (since, until) = (time(&arguments.since)?, time(&arguments.until)?);
    let path = ledger_path(arguments.ledger.as_deref(), arguments.config.as_deref())?;
    if path.to_str().is_some_and(is_postgres_url) {
        return Err(anyhow!(
            "an export reads a proxy's own ledger: give its file, and use `COPY` for what is in Postgres"
        ));
    }
    ledger::catch_up(&path, now).context("cannot import what is in the journal")?;
    let export = Export::open(&path)?;
    std::fs::create_dir_all(&arguments.out)
        .with_context(|| format!("cannot make the folder `{}`", arguments.out.display()))?;
    let mut is_empty = true;
    for day in export.days(since, until, now)? {
        for Exported { path, rows } in export.write(day, &arguments.out, arguments.overwrite)? {
            let what = rows.map_or("is there already".to_owned(), |rows| format!("{rows} rows"));
            writeln!(out, "{}: {what}", path.display())?;
            is_empty = false;
        }
    }
    if is_empty {
        writeln!(out, "no day in the range is over yet: a day is exported two minutes after midnight UTC")?;
    }
    Ok(())
}
