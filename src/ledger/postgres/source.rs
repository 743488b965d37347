//! The proxy's own ledger as the shipper sees it: what is next, and up to where it has been shipped.
//!
//! The cursor stands in `meta`, so it goes where the file goes: a file that was replaced begins anew, and one that
//! was restored from a backup ships again what came after. Rows that are in Postgres already stay as they are.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use rusqlite::{Connection, OpenFlags, OptionalExtension as _, params};
use uuid::Uuid;

use super::schema::Month;
use crate::ledger::database::{self, BUSY_WAIT};
use crate::ledger::rows::{self, CallRow, Names, Numbered, Place};
use crate::ledger::{Event, LedgerError, RentEntry};

/// Key of `meta`: the last `n` of `calls`, `rent` and `events` that are in Postgres.
const CURSOR: &str = "shipped";

/// The ledger, open for one pass: where it has been replaced, the next pass finds the new one.
#[derive(Debug)]
pub(super) struct Source {
    connection: Connection,
    path: PathBuf,
}

/// Rows that go to Postgres in one transaction, and where they end.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) calls: Vec<CallRow>,
    pub(super) names: BTreeMap<i64, Names>,
    pub(super) rent: Vec<Numbered<RentEntry>>,
    pub(super) events: Vec<Numbered<Event>>,
    pub(super) end: Place,
}

impl Batch {
    pub(super) fn rows(&self) -> usize {
        self.calls.len() + self.rent.len() + self.events.len()
    }

    /// The partitions that its rows go to.
    pub(super) fn months(&self) -> BTreeSet<Month> {
        let calls = self.calls.iter().map(CallRow::closed_at);
        let rent = self.rent.iter().map(|entry| entry.row.from);
        let events = self.events.iter().map(|event| event.row.at);
        calls.chain(rent).chain(events).map(Month::of).collect()
    }
}

impl Source {
    pub(super) fn open(path: &Path) -> Result<Self, LedgerError> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let sqlite = |source| LedgerError::Sqlite { path: path.to_owned(), source };
        let connection = Connection::open_with_flags(path, flags).map_err(sqlite)?;
        connection.busy_timeout(BUSY_WAIT).map_err(sqlite)?;
        connection.pragma_update(None, "synchronous", "normal").map_err(sqlite)?;
        Ok(Self { connection, path: path.to_owned() })
    }

    fn error(&self, source: rusqlite::Error) -> LedgerError {
        LedgerError::Sqlite { path: self.path.clone(), source }
    }

    pub(super) fn ledger_id(&self) -> Result<Uuid, LedgerError> {
        database::ledger_id(&self.connection, &self.path)
    }

    /// Where everything that was recorded ends.
    pub(super) fn end(&self) -> Result<Place, LedgerError> {
        rows::end(&self.connection).map_err(|source| self.error(source))
    }

    /// Up to where rows have been shipped.
    pub(super) fn shipped(&self) -> Result<Place, LedgerError> {
        let text: Option<String> = self
            .connection
            .query_row("SELECT value FROM meta WHERE key = ?1", [CURSOR], |row| row.get(0))
            .optional()
            .map_err(|source| self.error(source))?;
        Ok(text.as_deref().and_then(parse).unwrap_or_default())
    }

    /// To be called when the rows before `place` are safe in Postgres, or to ship those after it again.
    pub(super) fn set_shipped(&self, place: Place) -> Result<(), LedgerError> {
        self.connection
            .execute(
                "INSERT INTO meta (key, value) VALUES (?1, ?2)
                 ON CONFLICT (key) DO UPDATE SET value = excluded.value",
                params![CURSOR, format!("{} {} {}", place.calls, place.rent, place.events)],
            )
            .map(drop)
            .map_err(|source| self.error(source))
    }

    /// What comes after `from`, at most `limit` rows of each table.
    pub(super) fn next(&self, from: Place, limit: usize) -> Result<Batch, LedgerError> {
        self.read(from, limit).map_err(|source| self.error(source))
    }

    fn read(&self, from: Place, limit: usize) -> rusqlite::Result<Batch> {
        let connection = &self.connection;
        let calls = rows::calls_after(connection, from.calls, limit)?;
        let rent = rows::rent_after(connection, from.rent, limit)?;
        let events = rows::events_after(connection, from.events, limit)?;
        let mut names = BTreeMap::new();
        for call in &calls {
            if let Entry::Vacant(new) = names.entry(call.label) {
                new.insert(rows::names(connection, call.label)?.unwrap_or_default());
            }
        }
        let end = Place {
            calls: calls.last().map_or(from.calls, |call| call.n),
            rent: rent.last().map_or(from.rent, |entry| entry.n),
            events: events.last().map_or(from.events, |event| event.n),
        };
        Ok(Batch { calls, names, rent, events, end })
    }
}

fn parse(text: &str) -> Option<Place> {
    let mut numbers = text.split(' ').map(str::parse::<i64>);
    let mut next = || numbers.next()?.ok();
    Some(Place { calls: next()?, rent: next()?, events: next()? })
}

/// Rows that are recorded and not shipped.
pub(super) fn waiting(path: &Path) -> Result<u64, LedgerError> {
    let source = Source::open(path)?;
    Ok(source.shipped()?.rows_before(source.end()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use crate::config::{Fsync, LedgerSettings, WhenUnavailable};
    use crate::economics::Timestamp;
    use crate::ledger::testing::entry;
    use crate::ledger::{Event, Ledger};

    #[tokio::test]
    async fn a_batch_begins_where_the_last_one_ended_and_has_the_names_of_its_calls() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("breakeven.db");
        let settings = LedgerSettings {
            path: path.clone(),
            fsync: Fsync::Batch,
            when_unavailable: WhenUnavailable::Refuse,
            postgres: None,
        };
        let ledger = Ledger::open(&settings, Clock::manual(Timestamp::from_secs(9))).unwrap();
        for n in 1..6 {
            let _batch = ledger.append(&entry(n));
        }
        let (at, kind, subject) = (Timestamp::from_secs(4), "reload".to_owned(), "x".to_owned());
        ledger.append_event(&Event { at, kind, subject, detail: String::new() });
        assert!(ledger.flush().await);
        assert_eq!(waiting(&path).unwrap(), 6);
        let source = Source::open(&path).unwrap();
        let first = source.next(source.shipped().unwrap(), 3).unwrap();
        assert_eq!((first.calls.len(), first.events.len(), first.rows()), (3, 1, 4));
        assert_eq!(first.names[&first.calls[0].label][6], "openai");
        source.set_shipped(first.end).unwrap();
        let second = Source::open(&path).unwrap().next(source.shipped().unwrap(), 3).unwrap();
        assert_eq!(
            second.calls.iter().map(CallRow::closed_at).collect::<Vec<_>>(),
            [4, 5].map(Timestamp::from_secs)
        );
        source.set_shipped(second.end).unwrap();
        assert_eq!(waiting(&path).unwrap(), 0);
    }

    #[test]
    fn a_cursor_that_cannot_be_read_ships_everything_again() {
        assert_eq!(parse("3 4 5"), Some(Place { calls: 3, rent: 4, events: 5 }));
        for text in ["", "3 4", "a b c"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
