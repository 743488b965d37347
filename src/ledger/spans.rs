//! Finding calls by time without an index of all of them.
//!
//! Rows are numbered in the order in which calls ended, which is nearly the order of time; a clock that is set back
//! may disturb it by any amount. So for each span of 1,024 numbers the table `spans` holds the earliest and the
//! latest end within it, written once, when the span is full. Spans that cannot hold a time are passed over, and
//! the rows since the last full span are always looked at: what is found is exact, for a thousandth of the price
//! of an index.

use std::ops::Range;

use rusqlite::types::FromSql;
use rusqlite::{Connection, OptionalExtension, Params, params};

/// Numbers of rows that share an entry.
const SPAN: i64 = 1024;

pub(super) const CREATE: &str = "CREATE TABLE spans (
    span INTEGER PRIMARY KEY, closed_from INTEGER NOT NULL, closed_to INTEGER NOT NULL
);";

/// Describes all spans of a table that has none described yet.
pub(super) fn fill(connection: &Connection) -> rusqlite::Result<()> {
    let sql = "INSERT INTO spans SELECT n / ?1, min(closed_at), max(closed_at) FROM calls
               WHERE n < (SELECT (max(n) + 1) / ?1 * ?1 FROM calls) GROUP BY 1";
    connection.execute(sql, [SPAN]).map(drop)
}

/// The number that the next row gets, and the times of the rows since the last full span.
#[derive(Debug, Clone, Copy)]
pub(super) struct Frontier {
    next: i64,
    closed_from: i64,
    closed_to: i64,
}

impl Frontier {
    pub(super) fn load(connection: &Connection) -> rusqlite::Result<Self> {
        // Numbers of full spans are not given again, even when somebody has deleted their rows.
        let next = connection.query_row(
            "SELECT max(coalesce((SELECT max(n) FROM calls), 0) + 1, coalesce((SELECT max(span) FROM spans) + 1, 0) * ?1)",
            [SPAN],
            |row| row.get(0),
        )?;
        let times =
            "SELECT coalesce(min(closed_at), ?2), coalesce(max(closed_at), ?3) FROM calls WHERE n >= ?1";
        connection.query_row(times, params![next / SPAN * SPAN, i64::MAX, i64::MIN], |row| {
            Ok(Self { next, closed_from: row.get(0)?, closed_to: row.get(1)? })
        })
    }

    /// Numbers a row, and describes its span when it is the last one of it.
    pub(super) fn take(&mut self, connection: &Connection, closed_at: i64) -> rusqlite::Result<i64> {
        let number = self.next;
        self.next += 1;
        self.closed_from = self.closed_from.min(closed_at);
        self.closed_to = self.closed_to.max(closed_at);
        if self.next % SPAN == 0 {
            connection
                .prepare_cached("INSERT INTO spans (span, closed_from, closed_to) VALUES (?, ?, ?)")?
                .execute([number / SPAN, self.closed_from, self.closed_to])?;
            (self.closed_from, self.closed_to) = (i64::MAX, i64::MIN);
        }
        Ok(number)
    }
}

/// Numbers among which are all calls that ended from `since` until before `until`.
pub(super) fn rows_between(connection: &Connection, since: i64, until: i64) -> rusqlite::Result<Range<i64>> {
    if !is_there(connection)? {
        return Ok(0..i64::MAX);
    }
    let first_open: i64 = row(connection, "SELECT coalesce(max(span) + 1, 0) FROM spans", [])?;
    let first = "SELECT span FROM spans WHERE closed_to >= ? ORDER BY span LIMIT 1";
    let first: Option<i64> = row(connection, first, [since]).optional()?;
    let start = first.unwrap_or(first_open) * SPAN;
    let is_open = "SELECT EXISTS (SELECT 1 FROM calls WHERE n >= ? AND closed_at < ?)";
    if row(connection, is_open, [first_open * SPAN, until])? {
        return Ok(start..i64::MAX);
    }
    let last = "SELECT span FROM spans WHERE closed_from < ? ORDER BY span DESC LIMIT 1";
    let last: Option<i64> = row(connection, last, [until]).optional()?;
    Ok(start..last.map_or(0, |last| (last + 1) * SPAN))
}

/// A file of schema 1 has none until a server opens it.
fn is_there(connection: &Connection) -> rusqlite::Result<bool> {
    row(connection, "SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE name = 'spans')", [])
}

/// The only column of the first row. A connection that asks again does not parse again.
fn row<T: FromSql>(connection: &Connection, sql: &str, parameters: impl Params) -> rusqlite::Result<T> {
    connection.prepare_cached(sql)?.query_row(parameters, |row| row.get(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A table of calls that ended at these times, in the order of settling.
    fn table(times: impl IntoIterator<Item = i64>) -> Connection {
        let connection = Connection::open_in_memory().unwrap();
        let calls = "CREATE TABLE calls (n INTEGER PRIMARY KEY, closed_at INTEGER NOT NULL);";
        connection.execute_batch(&format!("{calls}{CREATE}")).unwrap();
        append(&connection, times);
        connection
    }

    fn append(connection: &Connection, times: impl IntoIterator<Item = i64>) {
        let mut frontier = Frontier::load(connection).unwrap();
        for time in times {
            let number = frontier.take(connection, time).unwrap();
            connection.execute("INSERT INTO calls VALUES (?, ?)", [number, time]).unwrap();
        }
    }

    fn count(connection: &Connection, range: &Range<i64>, since: i64, until: i64) -> i64 {
        let sql = "SELECT count(*) FROM calls WHERE n >= ? AND n < ? AND closed_at >= ? AND closed_at < ?";
        connection.query_row(sql, [range.start, range.end, since, until], |row| row.get(0)).unwrap()
    }

    fn check(connection: &Connection, since: i64, until: i64) -> i64 {
        let range = rows_between(connection, since, until).unwrap();
        assert_eq!(
            count(connection, &range, since, until),
            count(connection, &(0..i64::MAX), since, until),
            "{since}..{until} in {range:?}"
        );
        range.end.min(1_000_000) - range.start
    }

    #[test]
    fn every_call_of_a_range_of_times_is_in_the_range_of_numbers() {
        // The clock is set back by 3,000 after 7,000 calls.
        let table = table((0..7000).chain(4000..9000));
        for since in (-500..9500).step_by(613) {
            for until in (since..9600).step_by(709) {
                check(&table, since, until);
            }
            check(&table, since, i64::MAX);
        }
        assert!(check(&table, 2000, 2010) <= 2 * SPAN, "other spans are passed over");
    }

    #[test]
    fn a_table_that_is_opened_again_goes_on_with_the_span_that_is_open() {
        let table = table(0..1500);
        append(&table, 1500..1600);
        append(&table, 1600..5000);
        let spans: Vec<(i64, i64, i64)> = table
            .prepare("SELECT span, closed_from, closed_to FROM spans")
            .unwrap()
            .query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
            .unwrap()
            .collect::<Result<_, _>>()
            .unwrap();
        // Numbers begin with 1.
        assert_eq!(spans[..2], [(0, 0, 1022), (1, 1023, 2046)]);
        assert_eq!(spans.len(), 4);
    }

    #[test]
    fn spans_that_are_described_later_are_those_that_are_described_at_once() {
        let both = table(0..4500);
        let read = |connection: &Connection| -> Vec<(i64, i64)> {
            let mut statement = connection.prepare("SELECT closed_from, closed_to FROM spans").unwrap();
            statement
                .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))
                .unwrap()
                .map(Result::unwrap)
                .collect()
        };
        let at_once = read(&both);
        both.execute("DELETE FROM spans", []).unwrap();
        fill(&both).unwrap();
        assert_eq!(read(&both), at_once);
    }

    #[test]
    fn numbers_of_deleted_rows_are_not_given_again() {
        let table = table(0..3000);
        table.execute("DELETE FROM calls", []).unwrap();
        append(&table, 10..20);
        check(&table, 0, i64::MAX);
        check(&table, 12, 15);
    }

    #[test]
    fn without_spans_all_rows_are_looked_at() {
        let table = table(0..3000);
        table.execute_batch("DROP TABLE spans").unwrap();
        check(&table, 2000, 2010);
    }
}
