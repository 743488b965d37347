//! The ledger as files: for each day of UTC that is over, its calls and its rent as gzip'd CSV.
//!
//! A file is written under another name and renamed when it is whole, so what bears a day's name is complete, and an
//! export that was cut short goes on where it stopped. The same rows make the same bytes.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;
use rusqlite::Connection;
use uuid::Uuid;

use super::database::{self, open_to_read, signed, unsigned};
use super::record::{CALL_NUMBERS, LABELS};
use super::rows::{self, CallRow, Names};
use super::{LedgerError, Outcome, RentEntry, UsageSource};
use crate::economics::Timestamp;

const DAY_MILLIS: u64 = 86_400_000;

/// A day is complete so long after its end: rows come into the tables a little later than they happen, and rent is
/// booked once a slot.
const LATE: Duration = Duration::from_mins(2);

/// What an export cannot do.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    #[error("cannot write `{}`", path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

/// A day of UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Day(u64);

impl Day {
    pub const fn of(at: Timestamp) -> Self {
        Self(at.as_millis() / DAY_MILLIS)
    }

    const fn start(self) -> Timestamp {
        Timestamp::from_millis(self.0 * DAY_MILLIS)
    }

    const fn end(self) -> Timestamp {
        Timestamp::from_millis((self.0 + 1) * DAY_MILLIS)
    }

    fn name(self) -> String {
        text_of(self.start(), "%Y-%m-%d")
    }
}

/// One file of a day.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exported {
    pub path: PathBuf,
    /// None where the file was there already.
    pub rows: Option<u64>,
}

/// A ledger that is being exported.
#[derive(Debug)]
pub struct Export {
    connection: Connection,
    path: PathBuf,
    ledger: Uuid,
}

impl Export {
    pub fn open(path: &Path) -> Result<Self, LedgerError> {
        let connection = open_to_read(path)?;
        let ledger = database::ledger_id(&connection, path)?;
        Ok(Self { connection, path: path.to_owned(), ledger })
    }

    fn sqlite(&self, source: rusqlite::Error) -> LedgerError {
        LedgerError::Sqlite { path: self.path.clone(), source }
    }

    /// The days from the first that has anything until the last that is complete; of these, from the day of `since`
    /// on those that begin before `until`.
    pub fn days(
        &self,
        since: Option<Timestamp>,
        until: Option<Timestamp>,
        now: Timestamp,
    ) -> Result<impl Iterator<Item = Day> + use<>, LedgerError> {
        let first = rows::first_time(&self.connection).map_err(|source| self.sqlite(source))?;
        let open = Day::of(now.saturating_sub(LATE));
        let first = first.map_or(open, |first| Day::of(first).max(since.map_or(Day(0), Day::of)));
        let end = until.map_or(open.0, |until| until.as_millis().div_ceil(DAY_MILLIS).min(open.0));
        Ok((first.0..end).map(Day))
    }

    /// Writes the files of a day into `folder`; those that are there stay, unless they are to be written again.
    pub fn write(&self, day: Day, folder: &Path, overwrite: bool) -> Result<[Exported; 2], ExportError> {
        let file = |table: &str| folder.join(format!("{table}-{}.csv.gz", day.name()));
        let (calls, rent) = (file("calls"), file("rent"));
        Ok([
            write_file(calls, overwrite, |csv| self.write_calls(day, csv))?,
            write_file(rent, overwrite, |csv| self.write_rent(day, csv))?,
        ])
    }

    fn write_calls(&self, day: Day, csv: &mut Csv) -> Result<u64, Fault> {
        csv.write_record(["ledger", "id"].into_iter().chain(LABELS).chain(["tags"]).chain(CALL_NUMBERS))?;
        let ledger = self.ledger.to_string();
        let mut names = HashMap::<i64, Names>::new();
        let mut count = 0;
        rows::visit_calls(&self.connection, day.start(), day.end(), |call| {
            let names = match names.entry(call.label) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(new) => {
                    new.insert(rows::names(&self.connection, call.label)?.unwrap_or_default())
                }
            };
            count += 1;
            write_call(csv, &ledger, names, call)
        })?;
        Ok(count)
    }

    fn write_rent(&self, day: Day, csv: &mut Csv) -> Result<u64, Fault> {
        csv.write_record([
            "ledger",
            "backend",
            "from_at",
            "to_at",
            "replica_millis",
            "busy",
            "rent",
            "attributed",
            "idle",
        ])?;
        let ledger = self.ledger.to_string();
        let mut count = 0;
        for entry in rows::rent_between(&self.connection, day.start(), day.end())? {
            write_rent_entry(csv, &ledger, &entry)?;
            count += 1;
        }
        Ok(count)
    }
}

type Csv = csv::Writer<GzEncoder<BufWriter<File>>>;

/// What may go wrong within a file.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error(transparent)]
    Csv(#[from] csv::Error),
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Sqlite(#[from] rusqlite::Error),
}

fn write_file(
    path: PathBuf,
    overwrite: bool,
    write: impl FnOnce(&mut Csv) -> Result<u64, Fault>,
) -> Result<Exported, ExportError> {
    if path.exists() && !overwrite {
        return Ok(Exported { path, rows: None });
    }
    let part = path.with_extension("gz.part");
    let written = write_part(&part, write).and_then(|rows| {
        fs::rename(&part, &path)?;
        Ok(rows)
    });
    match written {
        Ok(rows) => Ok(Exported { path, rows: Some(rows) }),
        Err(fault) => {
            // What is half written has no use; where it cannot be removed, the next export overwrites it.
            drop(fs::remove_file(&part));
            Err(match fault {
                Fault::Sqlite(source) => LedgerError::Sqlite { path, source }.into(),
                Fault::Io(source) => ExportError::Write { path, source },
                Fault::Csv(source) => ExportError::Write { path, source: source.into() },
            })
        }
    }
}

fn write_part(part: &Path, write: impl FnOnce(&mut Csv) -> Result<u64, Fault>) -> Result<u64, Fault> {
    let gzip = GzEncoder::new(BufWriter::new(File::create(part)?), Compression::default());
    let mut csv = csv::Writer::from_writer(gzip);
    let rows = write(&mut csv)?;
    let gzip = csv.into_inner().map_err(|error| io::Error::other(error.to_string()))?;
    let mut file = gzip.finish()?;
    file.flush()?;
    file.get_ref().sync_all()?;
    Ok(rows)
}

fn write_call(csv: &mut Csv, ledger: &str, names: &Names, call: &CallRow) -> Result<(), Fault> {
    csv.write_field(ledger)?;
    csv.write_field(call.id.to_string())?;
    for name in names {
        csv.write_field(name)?;
    }
    csv.write_field(call.tags.as_deref().unwrap_or_default())?;
    for (column, number) in CALL_NUMBERS.iter().zip(call.numbers) {
        csv.write_field(number.map_or_else(String::new, |number| value(column, number)))?;
    }
    csv.write_record(None::<&[u8]>)?;
    Ok(())
}

/// Codes as words, times as text; all other numbers as they are.
fn value(column: &str, number: i64) -> String {
    let place = usize::try_from(number).unwrap_or(usize::MAX);
    match column {
        "opened_at" | "closed_at" | "first_token_at" => time(Timestamp::from_millis(unsigned(number))),
        "outcome" => Outcome::ALL.get(place).map_or("upstream_error", |outcome| outcome.as_str()).to_owned(),
        "usage_source" => UsageSource::ALL.get(place).map_or("none", |source| source.as_str()).to_owned(),
        _ => number.to_string(),
    }
}

fn write_rent_entry(csv: &mut Csv, ledger: &str, entry: &RentEntry) -> Result<(), csv::Error> {
    csv.write_record([
        ledger,
        &entry.backend,
        &time(entry.from),
        &time(entry.to),
        &entry.replica_millis.to_string(),
        &entry.busy.0.to_string(),
        &entry.rent.as_nanos().to_string(),
        &entry.attributed.as_nanos().to_string(),
        &entry.idle.as_nanos().to_string(),
    ])
}

/// UTC, as ClickHouse, Postgres and DuckDB read it without being told how.
fn time(at: Timestamp) -> String {
    format!("{}.{:03}", text_of(at, "%Y-%m-%d %H:%M:%S"), at.as_millis() % 1000)
}

fn text_of(at: Timestamp, format: &str) -> String {
    jiff::Timestamp::from_millisecond(signed(at.as_millis()))
        .unwrap_or(jiff::Timestamp::MAX)
        .strftime(format)
        .to_string()
}
