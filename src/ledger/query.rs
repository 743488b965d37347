//! Reading the ledger back, beside a server that writes it or without one.
//!
//! A call is visible here once its row has been imported: a quarter of a second after its end at most while a
//! server runs, and with the next start or report when one was killed. A time range holds its start and not its
//! end, and a call belongs to the instant at which it closed, because that is when it was charged.

pub(super) mod totals;

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use rusqlite::types::FromSql;
use rusqlite::{Connection, Row as SqlRow, params};

pub use self::totals::{IDLE, Key, ParseKeyError, Row, totals};
use super::database::{open_to_read, signed, unsigned};
use super::record::{CALL_NUMBERS, LABELS};
use super::spans::rows_between;
use super::{Entry, Event, LedgerError, Outcome, RentEntry, UsageSource};
use crate::economics::{NanoUsd, Timestamp, Usage, Work};

/// What one route had served by one backend within one second.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Start of the second in which the calls closed.
    pub at: Timestamp,
    pub route: String,
    pub backend: String,
    /// Calls that took any tokens.
    pub requests: u64,
    pub usage: Usage,
    /// What the calls would have cost on the API; calls without an API offer count nothing.
    pub api_cost: NanoUsd,
    pub work: Work,
}

/// A call as the simulator wants it: when it came and ended, and what it is worth.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceRow {
    pub opened_at: Timestamp,
    /// The planner counts a call in the slot in which it closed, when it is known what it took.
    pub closed_at: Timestamp,
    pub route: String,
    pub usage: Usage,
    pub api_cost: Option<NanoUsd>,
    pub work: Work,
}

const VOLUME: &str =
    "SELECT closed_at / 1000, route, backend, sum(input_tokens + output_tokens > 0), sum(coalesce(api_cost, 0)), sum(work),
    sum(input_tokens), sum(cached_input_tokens), sum(cache_write_tokens), sum(audio_input_tokens),
    sum(image_input_tokens), sum(output_tokens), sum(reasoning_tokens), sum(audio_output_tokens),
    sum(image_output_tokens)
    FROM calls JOIN labels ON labels.id = label
    WHERE n >= ?1 AND n < ?2 AND closed_at >= ?3 AND closed_at < ?4 GROUP BY 1, 2, 3 ORDER BY 1";

/// What was served since `since`, by second: how a restarted server takes up the current volume.
pub fn volume_since(path: &Path, since: Timestamp) -> Result<Vec<Volume>, LedgerError> {
    let read = |row: &SqlRow<'_>| {
        Ok(Volume {
            at: Timestamp::from_secs(count(row, 0)?),
            route: row.get(1)?,
            backend: row.get(2)?,
            requests: count(row, 3)?,
            api_cost: NanoUsd::from_nanos(row.get(4)?),
            work: Work(count(row, 5)?),
            usage: usage(row, 6)?,
        })
    };
    collect_calls(path, VOLUME, signed(since.as_millis()), read)
}

/// Visits the calls that were opened from `since` until before `until`, in that order.
pub fn trace(
    path: &Path,
    since: Timestamp,
    until: Timestamp,
    visit: impl FnMut(TraceRow),
) -> Result<(), LedgerError> {
    let sql =
        "SELECT opened_at, route, api_cost, work, input_tokens, cached_input_tokens, cache_write_tokens,
               audio_input_tokens, image_input_tokens, output_tokens, reasoning_tokens, audio_output_tokens,
               image_output_tokens, closed_at FROM calls JOIN labels ON labels.id = label
               WHERE n >= ?1 AND n < ?2 AND closed_at >= ?3 AND opened_at >= ?3 AND opened_at < ?4
               ORDER BY opened_at";
    let read = |row: &SqlRow<'_>| {
        Ok(TraceRow {
            opened_at: time(row, 0)?,
            closed_at: time(row, 13)?,
            route: row.get(1)?,
            api_cost: row.get::<_, Option<i64>>(2)?.map(NanoUsd::from_nanos),
            work: Work(count(row, 3)?),
            usage: usage(row, 4)?,
        })
    };
    let (since, until) = (signed(since.as_millis()), signed(until.as_millis()));
    let visit_all = |connection: &Connection| {
        // A call that was opened before `until` may have closed at any time since.
        let rows = rows_between(connection, since, i64::MAX)?;
        visit_query(connection, sql, params![rows.start, rows.end, since, until], read, visit)
    };
    Reader::open(path)?.snapshot(visit_all)
}

/// The calls recorded last, newest first.
pub fn recent(path: &Path, limit: usize) -> Result<Vec<Entry<'static>>, LedgerError> {
    let (numbers, labels) = (CALL_NUMBERS.join(", "), LABELS.join(", "));
    let sql = format!(
        "SELECT calls.id, coalesce(tags, ''), {labels}, {numbers} FROM calls JOIN labels ON labels.id = label
         ORDER BY n DESC LIMIT ?1"
    );
    collect(path, &sql, params![signed(limit as u64)], entry)
}

/// What each virtual key has spent since `since`: how a restarted server takes up its budgets.
pub fn spend_by_key(path: &Path, since: Timestamp) -> Result<Vec<(String, NanoUsd)>, LedgerError> {
    let sql = "SELECT key, sum(cost) FROM calls JOIN labels ON labels.id = label
               WHERE n >= ?1 AND n < ?2 AND closed_at >= ?3 AND closed_at < ?4 GROUP BY key ORDER BY key";
    let read = |row: &SqlRow<'_>| Ok((row.get(0)?, NanoUsd::from_nanos(row.get(1)?)));
    collect_calls(path, sql, signed(since.as_millis()), read)
}

/// What a key, a team and a route have spent together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallerSpend {
    pub key: String,
    pub team: String,
    pub route: String,
    pub cost: NanoUsd,
}

/// What was spent since `since` by key, team and route: how a restarted server takes up every kind of budget.
pub fn spend_by_caller(path: &Path, since: Timestamp) -> Result<Vec<CallerSpend>, LedgerError> {
    let sql = "SELECT key, team, route, sum(cost) FROM calls JOIN labels ON labels.id = label
               WHERE n >= ?1 AND n < ?2 AND closed_at >= ?3 AND closed_at < ?4
               GROUP BY key, team, route ORDER BY key, team, route";
    let read = |row: &SqlRow<'_>| {
        let cost = NanoUsd::from_nanos(row.get(3)?);
        Ok(CallerSpend { key: row.get(0)?, team: row.get(1)?, route: row.get(2)?, cost })
    };
    collect_calls(path, sql, signed(since.as_millis()), read)
}

/// Rent of all backends for intervals that begin at or after `since`, oldest first.
pub fn rent(path: &Path, since: Timestamp) -> Result<Vec<RentEntry>, LedgerError> {
    let sql = "SELECT backend, from_at, to_at, replica_millis, busy, rent, attributed, idle FROM rent
               WHERE from_at >= ?1 ORDER BY from_at, n";
    let read = |row: &SqlRow<'_>| {
        Ok(RentEntry {
            backend: row.get(0)?,
            from: time(row, 1)?,
            to: time(row, 2)?,
            replica_millis: count(row, 3)?,
            busy: Work(count(row, 4)?),
            rent: NanoUsd::from_nanos(row.get(5)?),
            attributed: NanoUsd::from_nanos(row.get(6)?),
            idle: NanoUsd::from_nanos(row.get(7)?),
        })
    };
    collect(path, sql, params![signed(since.as_millis())], read)
}

/// Changes at or after `since`, oldest first.
pub fn events(path: &Path, since: Timestamp) -> Result<Vec<Event>, LedgerError> {
    let sql = "SELECT at, kind, subject, detail FROM events WHERE at >= ?1 ORDER BY at, n";
    let read = |row: &SqlRow<'_>| {
        Ok(Event { at: time(row, 0)?, kind: row.get(1)?, subject: row.get(2)?, detail: row.get(3)? })
    };
    collect(path, sql, params![signed(since.as_millis())], read)
}

fn collect<T>(
    path: &Path,
    sql: &str,
    parameters: impl rusqlite::Params,
    read: impl FnMut(&SqlRow<'_>) -> rusqlite::Result<T>,
) -> Result<Vec<T>, LedgerError> {
    let mut rows = Vec::new();
    Reader::open(path)?
        .snapshot(|connection| visit_query(connection, sql, parameters, read, |row| rows.push(row)))?;
    Ok(rows)
}

/// As [`collect`], for a statement about the calls that ended at or after `since`; its parameters are the range
/// of their numbers and that of their times.
fn collect_calls<T>(
    path: &Path,
    sql: &str,
    since: i64,
    read: impl FnMut(&SqlRow<'_>) -> rusqlite::Result<T>,
) -> Result<Vec<T>, LedgerError> {
    let mut found = Vec::new();
    Reader::open(path)?.snapshot(|connection| {
        let rows = rows_between(connection, since, i64::MAX)?;
        let parameters = params![rows.start, rows.end, since, i64::MAX];
        visit_query(connection, sql, parameters, read, |row| found.push(row))
    })?;
    Ok(found)
}

/// A ledger that is opened once to be read several times.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    connection: Connection,
}

impl Reader {
    pub fn open(path: &Path) -> Result<Self, LedgerError> {
        Ok(Self { path: path.to_owned(), connection: open_to_read(path)? })
    }

    /// All that is read within is of one moment, whatever is written meanwhile.
    fn snapshot<T>(&self, read: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T, LedgerError> {
        let sqlite = |source| LedgerError::Sqlite { path: self.path.clone(), source };
        let _snapshot = self.connection.unchecked_transaction().map_err(sqlite)?;
        read(&self.connection).map_err(sqlite)
    }
}

fn visit_query<T>(
    connection: &Connection,
    sql: &str,
    parameters: impl rusqlite::Params,
    mut read: impl FnMut(&SqlRow<'_>) -> rusqlite::Result<T>,
    mut visit: impl FnMut(T),
) -> rusqlite::Result<()> {
    let mut statement = connection.prepare_cached(sql)?;
    let mut rows = statement.query(parameters)?;
    while let Some(row) = rows.next()? {
        visit(read(row)?);
    }
    Ok(())
}

fn count(row: &SqlRow<'_>, index: usize) -> rusqlite::Result<u64> {
    row.get(index).map(unsigned)
}

fn time(row: &SqlRow<'_>, index: usize) -> rusqlite::Result<Timestamp> {
    count(row, index).map(Timestamp::from_millis)
}

/// Nine counts from `first` on, in the order of the table.
fn usage(row: &SqlRow<'_>, first: usize) -> rusqlite::Result<Usage> {
    let tokens = |index| count(row, first + index);
    Ok(Usage {
        input_tokens: tokens(0)?,
        cached_input_tokens: tokens(1)?,
        cache_write_tokens: tokens(2)?,
        audio_input_tokens: tokens(3)?,
        image_input_tokens: tokens(4)?,
        output_tokens: tokens(5)?,
        reasoning_tokens: tokens(6)?,
        audio_output_tokens: tokens(7)?,
        image_output_tokens: tokens(8)?,
    })
}

fn outcome(code: i64) -> Outcome {
    usize::try_from(code)
        .ok()
        .and_then(|code| Outcome::ALL.get(code))
        .copied()
        .unwrap_or(Outcome::UpstreamError)
}

fn usage_source(code: i64) -> UsageSource {
    usize::try_from(code)
        .ok()
        .and_then(|code| UsageSource::ALL.get(code))
        .copied()
        .unwrap_or(UsageSource::None)
}

fn entry(row: &SqlRow<'_>) -> rusqlite::Result<Entry<'static>> {
    fn text(row: &SqlRow<'_>, name: &str) -> rusqlite::Result<Cow<'static, str>> {
        row.get(name).map(Cow::Owned)
    }
    fn named<T: FromSql>(row: &SqlRow<'_>, name: &str) -> rusqlite::Result<T> {
        row.get(name)
    }
    let count = |name| named::<i64>(row, name).map(unsigned);
    let time = |name| count(name).map(Timestamp::from_millis);
    let amount = |name| named::<i64>(row, name).map(NanoUsd::from_nanos);
    let optional = |name| named::<Option<i64>>(row, name);
    Ok(Entry {
        id: uuid::Uuid::from_bytes(row.get(0)?),
        tags: Cow::Owned(row.get(1)?),
        opened_at: time("opened_at")?,
        closed_at: time("closed_at")?,
        first_token_at: optional("first_token_at")?.map(unsigned).map(Timestamp::from_millis),
        key: text(row, "key")?,
        team: text(row, "team")?,
        endpoint: text(row, "endpoint")?,
        route: text(row, "route")?,
        requested_model: text(row, "requested_model")?,
        served_model: text(row, "served_model")?,
        backend: text(row, "backend")?,
        reason: text(row, "reason")?,
        attempts: named(row, "attempts")?,
        status: named(row, "status")?,
        outcome: outcome(named(row, "outcome")?),
        stream: named(row, "stream")?,
        usage: usage(row, 2 + LABELS.len() + 8)?,
        usage_source: usage_source(named(row, "usage_source")?),
        tier: text(row, "tier")?,
        cost: amount("cost")?,
        api_cost: optional("api_cost")?.map(NanoUsd::from_nanos),
        self_hosted_cost: optional("self_hosted_cost")?.map(NanoUsd::from_nanos),
        work: Work(count("work")?),
        attempts_cost: amount("attempts_cost")?,
        unpriced: named(row, "unpriced")?,
        config_digest: text(row, "config_digest")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_in_the_tables_is_the_place_in_the_list_of_names() {
        for (code, value) in (0..).zip(Outcome::ALL) {
            assert_eq!((outcome(code), value as i64), (value, code));
        }
        for (code, value) in (0..).zip(UsageSource::ALL) {
            assert_eq!((usage_source(code), value as i64), (value, code));
        }
    }

    #[test]
    fn the_current_volume_is_found_without_reading_the_whole_ledger() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("breakeven.db");
        let settings = crate::config::LedgerSettings {
            path: path.clone(),
            fsync: crate::config::Fsync::Batch,
            when_unavailable: crate::config::WhenUnavailable::Refuse,
            postgres: None,
        };
        drop(super::super::Ledger::open(&settings, crate::clock::Clock::manual(Timestamp::ZERO)).unwrap());
        let explain = format!("EXPLAIN QUERY PLAN {VOLUME}");
        let plan: Vec<String> = collect(&path, &explain, [0; 4], |row| row.get(3)).unwrap();
        let search = "SEARCH calls USING INTEGER PRIMARY KEY (rowid>? AND rowid<?)";
        assert!(plan.iter().any(|step| step.contains(search)), "{plan:?}");
    }

    #[test]
    fn the_token_columns_begin_where_an_entry_reads_them() {
        assert_eq!(CALL_NUMBERS[8], "input_tokens");
        assert_eq!(CALL_NUMBERS[16], "image_output_tokens");
    }
}
