//! The tables in Postgres: made and brought up to date by whichever proxy comes first, and a partition a month.
//!
//! Everything that changes the schema holds one advisory lock until its transaction ends, so any number of proxies
//! may start together. A month's table is made on its own and then attached, because that does not stop those who
//! read and write the others, as `CREATE TABLE .. PARTITION OF` would.

use std::collections::BTreeSet;
use std::fmt;

use tokio_postgres::{Client, Transaction};

use super::PostgresError;
use crate::economics::Timestamp;

/// What each version changes, from an empty database on.
const MIGRATIONS: [&str; 3] = [include_str!("1.sql"), include_str!("2.sql"), include_str!("3.sql")];

/// The version that this program makes and knows.
pub(in crate::ledger) const SCHEMA_VERSION: usize = MIGRATIONS.len();

/// Whom a change of the schema waits for; the letters `breakeve`.
const LOCK: &str = "SELECT pg_advisory_xact_lock(7093843832149997157)";

/// The tables with a partition a month.
const PARTITIONED: [&str; 3] = ["calls", "rent", "events"];

/// Months that have their partitions before the first row comes.
const MONTHS_AHEAD: usize = 2;

/// Latest instant that a partition is made for; a clock that is beyond it is broken.
const LATEST_MILLIS: u64 = 253_370_764_800_000 - 1;

/// A month of UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Month {
    year: i16,
    month: i8,
}

impl Month {
    pub(super) fn of(at: Timestamp) -> Self {
        let millis = i64::try_from(latest(at).as_millis()).unwrap_or_default();
        let instant = jiff::Timestamp::from_millisecond(millis).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
        let date = jiff::tz::TimeZone::UTC.to_datetime(instant);
        Self { year: date.year(), month: date.month() }
    }

    const fn next(self) -> Self {
        if self.month == 12 {
            Self { year: self.year + 1, month: 1 }
        } else {
            Self { year: self.year, month: self.month + 1 }
        }
    }

    /// The month of `now` and those whose partitions are made ahead.
    pub(super) fn ahead(now: Timestamp) -> impl Iterator<Item = Self> {
        std::iter::successors(Some(Self::of(now)), |month| Some(month.next())).take(MONTHS_AHEAD + 1)
    }

    fn start(self) -> String {
        format!("{:04}-{:02}-01 00:00:00+00", self.year, self.month)
    }
}

/// As in the names of partitions.
impl fmt::Display for Month {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{:04}_{:02}", self.year, self.month)
    }
}

/// An instant that Postgres and the names of partitions can hold.
pub(super) fn latest(at: Timestamp) -> Timestamp {
    Timestamp::from_millis(at.as_millis().min(LATEST_MILLIS))
}

/// Brings the tables to the version of this program. Does nothing where they are.
pub(super) async fn migrate(client: &mut Client, server: &str) -> Result<(), PostgresError> {
    let failed = |source| PostgresError::Failed { server: server.to_owned(), source };
    let transaction = client.transaction().await.map_err(failed)?;
    transaction.batch_execute(LOCK).await.map_err(failed)?;
    let encoding: String = transaction.query_one("SHOW server_encoding", &[]).await.map_err(failed)?.get(0);
    if encoding != "UTF8" {
        return Err(PostgresError::Encoding { server: server.to_owned(), encoding });
    }
    let found = version(&transaction).await.map_err(failed)?;
    if let Some(Found { version, oldest_writer }) = found
        && version > SCHEMA_VERSION
    {
        // A newer breakeven has been here; what it changed may not matter to rows.
        return if oldest_writer <= SCHEMA_VERSION {
            Ok(())
        } else {
            Err(PostgresError::Newer { server: server.to_owned(), found: version })
        };
    }
    let done = found.map_or(0, |found| found.version);
    if done == 0 {
        // Asked first, because `IF NOT EXISTS` needs the right to make one even where there is one.
        let exists: bool = transaction
            .query_one("SELECT to_regnamespace('breakeven') IS NOT NULL", &[])
            .await
            .map_err(failed)?
            .get(0);
        if !exists {
            transaction.batch_execute("CREATE SCHEMA breakeven").await.map_err(failed)?;
        }
    }
    for (migration, number) in MIGRATIONS.iter().zip(1..).skip(done) {
        transaction.batch_execute(migration).await.map_err(failed)?;
        let version = i32::to_string(&number);
        transaction
            .execute("UPDATE breakeven.meta SET value = $1 WHERE key = 'schema_version'", &[&version])
            .await
            .map_err(failed)?;
    }
    transaction.commit().await.map_err(failed)
}

/// What stands in a database.
#[derive(Debug, Clone, Copy)]
struct Found {
    version: usize,
    oldest_writer: usize,
}

async fn version(transaction: &Transaction<'_>) -> Result<Option<Found>, tokio_postgres::Error> {
    let exists: bool =
        transaction.query_one("SELECT to_regclass('breakeven.meta') IS NOT NULL", &[]).await?.get(0);
    if !exists {
        return Ok(None);
    }
    let number = async |key: &str| -> Result<usize, tokio_postgres::Error> {
        let row = transaction.query_opt("SELECT value FROM breakeven.meta WHERE key = $1", &[&key]).await?;
        // What is no number was not written by any version of this program.
        Ok(row.and_then(|row| row.get::<_, String>(0).parse().ok()).unwrap_or(usize::MAX))
    };
    Ok(Some(Found {
        version: number("schema_version").await?,
        oldest_writer: number("oldest_writer").await?,
    }))
}

/// Makes the partitions of these months that are not there.
pub(super) async fn make_partitions(
    client: &mut Client,
    months: &BTreeSet<Month>,
) -> Result<(), tokio_postgres::Error> {
    let transaction = client.transaction().await?;
    transaction.batch_execute(LOCK).await?;
    for month in months {
        for table in PARTITIONED {
            let name = format!("breakeven.{table}_{month}");
            let exists: bool =
                transaction.query_one("SELECT to_regclass($1) IS NOT NULL", &[&name]).await?.get(0);
            if !exists {
                transaction.batch_execute(&partition(table, &name, *month)).await?;
            }
        }
    }
    transaction.commit().await
}

fn partition(table: &str, name: &str, month: Month) -> String {
    let (from, to) = (month.start(), month.next().start());
    format!(
        "CREATE TABLE {name} (LIKE breakeven.{table} INCLUDING ALL);
         ALTER TABLE breakeven.{table} ATTACH PARTITION {name} FOR VALUES FROM ('{from}') TO ('{to}')"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        let millis = text.parse::<jiff::Timestamp>().unwrap().as_millisecond();
        Timestamp::from_millis(u64::try_from(millis).unwrap())
    }

    #[test]
    fn a_month_is_that_of_utc_and_ends_where_the_next_begins() {
        let december = Month::of(at("2026-12-31T23:59:59.999Z"));
        assert_eq!(december.to_string(), "2026_12");
        assert_eq!(december.next(), Month::of(at("2027-01-01T00:00:00Z")));
        assert_eq!(december.next().start(), "2027-01-01 00:00:00+00");
    }

    #[test]
    fn partitions_are_made_two_months_ahead() {
        let months: Vec<_> =
            Month::ahead(at("2026-11-27T12:00:00Z")).map(|month| month.to_string()).collect();
        assert_eq!(months, ["2026_11", "2026_12", "2027_01"]);
    }

    #[test]
    fn a_broken_clock_still_has_a_month() {
        assert_eq!(Month::of(Timestamp::from_millis(u64::MAX)).to_string(), "9998_12");
    }
}
