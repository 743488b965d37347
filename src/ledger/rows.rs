//! Rows of the tables as they stand there, for those who copy them elsewhere.
//!
//! `n` rises in the order in which rows were written, and one thread writes them, so who has copied up to an `n` has
//! all rows before it.

use rusqlite::{Connection, OptionalExtension as _, Row as SqlRow, params};
use uuid::Uuid;

use super::database::{signed, unsigned};
use super::record::{CALL_NUMBERS, LABELS};
use super::spans::rows_between;
use super::{Event, RentEntry};
use crate::economics::{NanoUsd, Timestamp, Work};

/// The names of a call, in the order of [`LABELS`].
pub(super) type Names = [String; LABELS.len()];

/// A call; its names are behind `label`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct CallRow {
    pub(super) n: i64,
    pub(super) id: Uuid,
    pub(super) label: i64,
    pub(super) tags: Option<String>,
    /// In the order of [`CALL_NUMBERS`].
    pub(super) numbers: [Option<i64>; CALL_NUMBERS.len()],
}

impl CallRow {
    /// The number in a column; none where the row has none.
    pub(super) fn number(&self, column: &str) -> Option<i64> {
        let index = CALL_NUMBERS.iter().position(|name| *name == column);
        self.numbers[index.expect("a column of `calls`")]
    }

    pub(super) fn closed_at(&self) -> Timestamp {
        Timestamp::from_millis(self.number("closed_at").map_or(0, unsigned))
    }
}

/// Up to where rows of each table have been copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Place {
    pub(super) calls: i64,
    pub(super) rent: i64,
    pub(super) events: i64,
}

impl Place {
    /// The earlier of two in each table.
    pub(super) fn min(self, other: Self) -> Self {
        Self {
            calls: self.calls.min(other.calls),
            rent: self.rent.min(other.rent),
            events: self.events.min(other.events),
        }
    }

    /// Rows from here to `end`.
    pub(super) fn rows_before(self, end: Self) -> u64 {
        let rows = |from: i64, to: i64| unsigned(to.saturating_sub(from));
        rows(self.calls, end.calls) + rows(self.rent, end.rent) + rows(self.events, end.events)
    }
}

/// Where the tables end.
pub(super) fn end(connection: &Connection) -> rusqlite::Result<Place> {
    let last = |table| {
        connection.query_row(&format!("SELECT coalesce(max(n), 0) FROM {table}"), [], |row| row.get(0))
    };
    Ok(Place { calls: last("calls")?, rent: last("rent")?, events: last("events")? })
}

fn call_columns() -> String {
    format!("n, id, label, tags, {}", CALL_NUMBERS.join(", "))
}

fn call(row: &SqlRow<'_>) -> rusqlite::Result<CallRow> {
    let mut numbers = [None; CALL_NUMBERS.len()];
    for (index, number) in numbers.iter_mut().enumerate() {
        *number = row.get(index + 4)?;
    }
    Ok(CallRow {
        n: row.get(0)?,
        id: Uuid::from_bytes(row.get(1)?),
        label: row.get(2)?,
        tags: row.get(3)?,
        numbers,
    })
}

/// At most `limit` calls after `n`, in their order.
pub(super) fn calls_after(connection: &Connection, n: i64, limit: usize) -> rusqlite::Result<Vec<CallRow>> {
    let sql = format!("SELECT {} FROM calls WHERE n > ?1 ORDER BY n LIMIT ?2", call_columns());
    connection.prepare_cached(&sql)?.query_map(params![n, signed(limit as u64)], call)?.collect()
}

/// Visits the calls that closed from `from` until before `until`, in the order in which they were settled.
pub(super) fn visit_calls<E: From<rusqlite::Error>>(
    connection: &Connection,
    from: Timestamp,
    until: Timestamp,
    mut visit: impl FnMut(&CallRow) -> Result<(), E>,
) -> Result<(), E> {
    let (from, until) = (signed(from.as_millis()), signed(until.as_millis()));
    let numbers = rows_between(connection, from, until)?;
    let sql = format!(
        "SELECT {} FROM calls WHERE n >= ?1 AND n < ?2 AND closed_at >= ?3 AND closed_at < ?4 ORDER BY n",
        call_columns()
    );
    let mut statement = connection.prepare_cached(&sql)?;
    let mut rows = statement.query(params![numbers.start, numbers.end, from, until])?;
    while let Some(row) = rows.next()? {
        visit(&call(row)?)?;
    }
    Ok(())
}

/// When the first call closed or the first rent began; none in an empty ledger.
pub(super) fn first_time(connection: &Connection) -> rusqlite::Result<Option<Timestamp>> {
    let first = |table, column| {
        let sql = format!("SELECT min({column}) FROM {table}");
        connection.query_row(&sql, [], |row| row.get::<_, Option<i64>>(0))
    };
    let (call, rent) = (first("calls", "closed_at")?, first("rent", "from_at")?);
    Ok(call.into_iter().chain(rent).min().map(|millis| Timestamp::from_millis(unsigned(millis))))
}

/// The names behind a label; none when it is unknown, which it never is in a whole file.
pub(super) fn names(connection: &Connection, label: i64) -> rusqlite::Result<Option<Names>> {
    let sql = format!("SELECT {} FROM labels WHERE id = ?1", LABELS.join(", "));
    let read = |row: &SqlRow<'_>| {
        let mut names = Names::default();
        for (index, name) in names.iter_mut().enumerate() {
            *name = row.get(index)?;
        }
        Ok(names)
    };
    connection.prepare_cached(&sql)?.query_row([label], read).optional()
}

/// A row with its place in the table.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Numbered<T> {
    pub(super) n: i64,
    pub(super) row: T,
}

const RENT: &str =
    "SELECT n, backend, from_at, to_at, replica_millis, busy, rent, attributed, idle FROM rent";

fn rent_entry(row: &SqlRow<'_>) -> rusqlite::Result<Numbered<RentEntry>> {
    let count = |index| row.get(index).map(unsigned);
    let amount = |index| row.get(index).map(NanoUsd::from_nanos);
    let entry = RentEntry {
        backend: row.get(1)?,
        from: Timestamp::from_millis(count(2)?),
        to: Timestamp::from_millis(count(3)?),
        replica_millis: count(4)?,
        busy: Work(count(5)?),
        rent: amount(6)?,
        attributed: amount(7)?,
        idle: amount(8)?,
    };
    Ok(Numbered { n: row.get(0)?, row: entry })
}

/// At most `limit` entries of rent after `n`, in their order.
pub(super) fn rent_after(
    connection: &Connection,
    n: i64,
    limit: usize,
) -> rusqlite::Result<Vec<Numbered<RentEntry>>> {
    let sql = format!("{RENT} WHERE n > ?1 ORDER BY n LIMIT ?2");
    connection.prepare_cached(&sql)?.query_map(params![n, signed(limit as u64)], rent_entry)?.collect()
}

/// The rent of intervals that begin from `from` until before `until`, in their order: some thousands a day.
pub(super) fn rent_between(
    connection: &Connection,
    from: Timestamp,
    until: Timestamp,
) -> rusqlite::Result<Vec<RentEntry>> {
    let sql = format!("{RENT} WHERE from_at >= ?1 AND from_at < ?2 ORDER BY from_at, n");
    let range = params![signed(from.as_millis()), signed(until.as_millis())];
    let read = |row: &SqlRow<'_>| rent_entry(row).map(|entry| entry.row);
    connection.prepare_cached(&sql)?.query_map(range, read)?.collect()
}

/// At most `limit` events after `n`, in their order.
pub(super) fn events_after(
    connection: &Connection,
    n: i64,
    limit: usize,
) -> rusqlite::Result<Vec<Numbered<Event>>> {
    let sql = "SELECT n, at, kind, subject, detail FROM events WHERE n > ?1 ORDER BY n LIMIT ?2";
    let read = |row: &SqlRow<'_>| {
        let at = Timestamp::from_millis(row.get(1).map(unsigned)?);
        let event = Event { at, kind: row.get(2)?, subject: row.get(3)?, detail: row.get(4)? };
        Ok(Numbered { n: row.get(0)?, row: event })
    };
    connection.prepare_cached(sql)?.query_map(params![n, signed(limit as u64)], read)?.collect()
}
