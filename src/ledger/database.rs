//! The SQLite file: schema, opening with care, and inserting what the journal holds.
//!
//! Names that many calls share stand once in `labels`, so a row of `calls` is small numbers. The position up to
//! which the journal has been imported is in the same transaction as the rows, which makes the import exactly
//! once without any unique index; the few rows that may be appended twice have one of their own (`once`).

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{
    CachedStatement, Connection, ErrorCode, OpenFlags, OptionalExtension, Statement, TransactionBehavior,
    params,
};
use tracing::{error, info};
use uuid::Uuid;

use super::record::{self, ABSENT, CALL_NUMBERS, CallRecord, LABELS, Numbers, Record, Records};
use super::spans::{self, Frontier};
use super::{Event, LedgerError, Outcome, RentEntry, UsageSource, once, sync_name};
use crate::economics::Timestamp;

/// Raised whenever a table changes. A newer file is refused, an older one is migrated on open.
pub(super) const SCHEMA_VERSION: u32 = 3;

/// Sets of names kept in memory; a client that invents model names can not make it grow further.
const CACHED_LABELS: usize = 4_096;

/// How long a statement waits for another process, such as a `VACUUM` by hand.
pub(super) const BUSY_WAIT: Duration = Duration::from_secs(5);

/// Pages of the write-ahead log that are gathered before they move to the file (16 MiB).
const CHECKPOINT_PAGES: u32 = 4096;

/// Rows that one statement inserts where there are as many: to begin and to end one takes as long as a few columns.
const GROUP: usize = 8;

/// Columns of `calls`: the row's number, its id, label and tags, and the numbers.
const CALL_COLUMNS: usize = 4 + CALL_NUMBERS.len();

/// Everything before this place in the journal is in the tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(super) struct Cursor {
    pub(super) segment: u64,
    pub(super) offset: u64,
}

#[derive(Debug)]
pub(super) struct Database {
    connection: Connection,
    path: PathBuf,
    insert_call: String,
    insert_group: String,
    labels: Labels,
    frontier: Frontier,
    /// Whether the file was made here and has not been made to survive a power cut yet.
    is_new: bool,
}

/// Ids of the sets of names that came last, by the bytes that they have in the journal.
#[derive(Debug, Default)]
struct Labels {
    ids: HashMap<Box<[u8]>, i64>,
    last: Option<(Box<[u8]>, i64)>,
}

impl Database {
    /// Opens or creates the file. A damaged one is set aside under a name that says so, never overwritten.
    /// `ledger_id` is given to a new file.
    pub(super) fn open(path: &Path, now: Timestamp, ledger_id: Uuid) -> Result<Self, LedgerError> {
        match Self::try_open(path, ledger_id) {
            Err(LedgerError::Sqlite { source, .. }) if is_damage(&source) => {
                set_aside(path, now, &source)?;
                Self::try_open(path, ledger_id)
            }
            result => result,
        }
    }

    fn try_open(path: &Path, ledger_id: Uuid) -> Result<Self, LedgerError> {
        let sqlite = |source| LedgerError::Sqlite { path: path.to_owned(), source };
        let mut connection = Connection::open(path).map_err(sqlite)?;
        connection.busy_timeout(BUSY_WAIT).map_err(sqlite)?;
        let is_new = is_empty(&connection).map_err(sqlite)?;
        // A new file need not outlast a power cut before its first rows do: `pass` makes both last, and until
        // then the journal has all of them. Nine syncs less before the first call is answered.
        let level = if is_new { "off" } else { "normal" };
        connection.pragma_update(None, "synchronous", level).map_err(sqlite)?;
        connection.pragma_update(None, "journal_mode", "wal").map_err(sqlite)?;
        connection.pragma_update(None, "wal_autocheckpoint", CHECKPOINT_PAGES).map_err(sqlite)?;
        // A row's label was found or made in the same transaction: to look for it again would cost a tenth of what
        // the row does.
        connection.pragma_update(None, "foreign_keys", "off").map_err(sqlite)?;
        if is_new {
            create(&mut connection, ledger_id).map_err(sqlite)?;
            connection.pragma_update(None, "synchronous", "normal").map_err(sqlite)?;
        }
        let found = check_version(&connection, path)?;
        if found < SCHEMA_VERSION {
            migrate(&mut connection, path, found).map_err(sqlite)?;
        }
        let frontier = Frontier::load(&connection).map_err(sqlite)?;
        let database = Self {
            connection,
            path: path.to_owned(),
            insert_call: insert_calls_sql(1),
            insert_group: insert_calls_sql(GROUP),
            labels: Labels::default(),
            frontier,
            is_new,
        };
        database.cursor()?;
        Ok(database)
    }

    /// Sets the file aside and begins a new one in its place.
    pub(super) fn replace(
        &mut self,
        path: &Path,
        now: Timestamp,
        why: &rusqlite::Error,
        ledger_id: Uuid,
    ) -> Result<(), LedgerError> {
        // SQLite must let go of the file before it is renamed.
        self.connection = Connection::open_in_memory().map_err(|source| self.error(source))?;
        if path.exists() {
            set_aside(path, now, why)?;
        }
        *self = Self::open(path, now, ledger_id)?;
        Ok(())
    }

    /// Looks through the whole file for damage, apart from what this connection has in memory.
    pub(super) fn unsoundness(&self) -> Option<LedgerError> {
        let looked = open_to_read(&self.path).and_then(|connection| {
            connection
                .query_row("PRAGMA quick_check(1)", [], |row| row.get::<_, String>(0))
                .map_err(|source| self.error(source))
        });
        match looked {
            Ok(verdict) if verdict == "ok" => None,
            Ok(verdict) => {
                let corrupt = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CORRUPT);
                let verdict = verdict.replace('\n', " ");
                Some(self.error(rusqlite::Error::SqliteFailure(corrupt, Some(verdict))))
            }
            Err(error) => Some(error),
        }
    }

    fn error(&self, source: rusqlite::Error) -> LedgerError {
        LedgerError::Sqlite { path: self.path.clone(), source }
    }

    pub(super) fn cursor(&self) -> Result<Cursor, LedgerError> {
        self.connection
            .query_row("SELECT segment, offset FROM cursor", [], |row| {
                Ok(Cursor { segment: unsigned(row.get(0)?), offset: unsigned(row.get(1)?) })
            })
            .map_err(|source| self.error(source))
    }

    pub(super) fn ledger_id(&self) -> Result<Uuid, LedgerError> {
        ledger_id(&self.connection, &self.path)
    }

    /// Inserts the records of a piece that begins at `from` and moves the cursor to where their last one ends, or
    /// does neither. Returns how many they were, and the cursor.
    pub(super) fn insert(
        &mut self,
        records: &mut Records<'_>,
        from: Cursor,
    ) -> Result<(u64, Cursor), LedgerError> {
        self.try_insert(records, from).map_err(|source| {
            // Ids that were given in the transaction went with it.
            self.labels = Labels::default();
            self.error(source)
        })
    }

    fn try_insert(&mut self, records: &mut Records<'_>, from: Cursor) -> rusqlite::Result<(u64, Cursor)> {
        // At once a writer's: one that begins as a reader's fails when the shipper has moved its cursor meanwhile.
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let mut frontier = self.frontier;
        let mut rows = 0;
        {
            let mut one = Insert::prepare(&transaction, &self.insert_call, 1)?;
            let mut group = Insert::prepare(&transaction, &self.insert_group, GROUP)?;
            let mut waiting = Vec::with_capacity(GROUP);
            for record in &mut *records {
                rows += 1;
                match record {
                    Record::Call(call) => {
                        if once::is_derived(call.id) && !once::is_first(&transaction, call.id)? {
                            continue;
                        }
                        let label = self.labels.id(&transaction, call.labels)?;
                        let number = frontier.take(&transaction, call.closed_at())?;
                        waiting.push(Row { number, label, call });
                        if waiting.len() == GROUP {
                            group.execute(&waiting)?;
                            waiting.clear();
                        }
                    }
                    Record::Rent(rent) => insert_rent(&transaction, &rent)?,
                    Record::Event(event) => insert_event(&transaction, &event)?,
                }
            }
            for row in &waiting {
                one.execute(std::slice::from_ref(row))?;
            }
        }
        let cursor = Cursor { offset: from.offset + records.consumed() as u64, ..from };
        if cursor != from {
            move_cursor(&transaction, cursor)?;
            transaction.commit()?;
            self.frontier = frontier;
        }
        Ok((rows, cursor))
    }

    /// Moves the cursor so that a power cut cannot undo it, nor anything that was committed before: the journal
    /// may then forget what was imported.
    pub(super) fn pass(&mut self, cursor: Cursor) -> Result<(), LedgerError> {
        let set = |level| self.connection.pragma_update(None, "synchronous", level);
        let moved = set("full").and_then(|()| move_cursor(&self.connection, cursor));
        let made = moved.and_then(|()| if self.is_new { checkpoint(&self.connection) } else { Ok(()) });
        let restored = set("normal");
        made.and(restored).map_err(|source| self.error(source))?;
        if self.is_new {
            sync_name(&self.path).map_err(|source| LedgerError::Io { path: self.path.clone(), source })?;
            self.is_new = false;
        }
        Ok(())
    }
}

/// The id that a ledger was born with.
pub(super) fn ledger_id(connection: &Connection, path: &Path) -> Result<Uuid, LedgerError> {
    let text = connection
        .query_row("SELECT value FROM meta WHERE key = 'ledger_id'", [], |row| row.get::<_, String>(0))
        .map_err(|source| LedgerError::Sqlite { path: path.to_owned(), source })?;
    Uuid::parse_str(&text).map_err(|_| LedgerError::NotALedger { path: path.to_owned() })
}

/// Moves what is committed to the file itself, and syncs it: SQLite ignores a log beside a file that is empty.
fn checkpoint(connection: &Connection) -> rusqlite::Result<()> {
    connection.query_row("PRAGMA wal_checkpoint(FULL)", [], |_| Ok(()))
}

fn move_cursor(connection: &Connection, cursor: Cursor) -> rusqlite::Result<()> {
    connection
        .prepare_cached("UPDATE cursor SET segment = ?1, offset = ?2")?
        .execute(params![signed(cursor.segment), signed(cursor.offset)])
        .map(drop)
}

fn insert_calls_sql(rows: usize) -> String {
    let columns = CALL_NUMBERS.join(", ");
    let places = format!("({})", vec!["?"; CALL_COLUMNS].join(", "));
    format!("INSERT INTO calls (n, id, label, tags, {columns}) VALUES {}", vec![places; rows].join(", "))
}

/// A call on its way into the table.
struct Row<'a> {
    number: i64,
    label: i64,
    call: CallRecord<'a>,
}

/// A statement that inserts a certain number of calls.
struct Insert<'c> {
    statement: CachedStatement<'c>,
    bound: Vec<Bound>,
}

impl<'c> Insert<'c> {
    fn prepare(connection: &'c Connection, sql: &str, rows: usize) -> rusqlite::Result<Self> {
        let statement = connection.prepare_cached(sql)?;
        Ok(Self { statement, bound: std::iter::repeat_with(Bound::default).take(rows).collect() })
    }

    fn execute(&mut self, rows: &[Row<'_>]) -> rusqlite::Result<()> {
        debug_assert_eq!(rows.len(), self.bound.len());
        for (index, (bound, row)) in self.bound.iter_mut().zip(rows).enumerate() {
            bound.bind(&mut self.statement, index * CALL_COLUMNS, row)?;
        }
        self.statement.raw_execute().map(drop)
    }
}

/// What the places of a row hold since the statement's last execution. Most columns of a row are what they were in
/// another, and what is bound stays bound.
struct Bound {
    label: i64,
    has_tags: bool,
    numbers: Numbers,
}

impl Default for Bound {
    /// Nothing is bound yet, which SQLite takes for NULL.
    fn default() -> Self {
        Self { label: 0, has_tags: false, numbers: [ABSENT; CALL_NUMBERS.len()] }
    }
}

impl Bound {
    /// Binds a row to the places behind `before`.
    fn bind(&mut self, statement: &mut Statement<'_>, before: usize, row: &Row<'_>) -> rusqlite::Result<()> {
        let Row { number, label, call } = row;
        statement.raw_bind_parameter(before + 1, number)?;
        statement.raw_bind_parameter(before + 2, call.id.as_slice())?;
        if *label != self.label {
            statement.raw_bind_parameter(before + 3, label)?;
            self.label = *label;
        }
        let has_tags = !call.tags.is_empty();
        if has_tags || self.has_tags {
            statement.raw_bind_parameter(before + 4, has_tags.then_some(call.tags))?;
            self.has_tags = has_tags;
        }
        for (index, (&number, bound)) in call.numbers.iter().zip(&mut self.numbers).enumerate() {
            if number != *bound {
                let value = Some(number).filter(|number| *number != ABSENT);
                statement.raw_bind_parameter(before + index + 5, value)?;
                *bound = number;
            }
        }
        Ok(())
    }
}

impl Labels {
    fn id(&mut self, connection: &Connection, raw: &[u8]) -> rusqlite::Result<i64> {
        if let Some((last, id)) = &self.last
            && **last == *raw
        {
            return Ok(*id);
        }
        let id = match self.ids.get(raw) {
            Some(id) => *id,
            None => self.remember(connection, raw)?,
        };
        self.last = Some((raw.into(), id));
        Ok(id)
    }

    fn remember(&mut self, connection: &Connection, raw: &[u8]) -> rusqlite::Result<i64> {
        let id = label_id(connection, &record::parse_labels(raw).unwrap_or_default())?;
        if self.ids.len() >= CACHED_LABELS {
            self.ids.clear();
        }
        self.ids.insert(raw.into(), id);
        Ok(id)
    }
}

/// The id of a set of names, which is given here when it is new.
fn label_id(connection: &Connection, names: &[&str; LABELS.len()]) -> rusqlite::Result<i64> {
    let columns = LABELS.join(", ");
    let equal = LABELS.map(|label| format!("{label} = ?")).join(" AND ");
    let found = connection
        .prepare_cached(&format!("SELECT id FROM labels WHERE {equal}"))?
        .query_row(rusqlite::params_from_iter(names), |row| row.get(0))
        .optional()?;
    if let Some(id) = found {
        return Ok(id);
    }
    let places = vec!["?"; LABELS.len()].join(", ");
    connection
        .prepare_cached(&format!("INSERT INTO labels ({columns}) VALUES ({places})"))?
        .insert(rusqlite::params_from_iter(names))
}

fn insert_rent(connection: &Connection, rent: &RentEntry) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "INSERT INTO rent (backend, from_at, to_at, replica_millis, busy, rent, attributed, idle)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        )?
        .execute(params![
            rent.backend,
            signed(rent.from.as_millis()),
            signed(rent.to.as_millis()),
            signed(rent.replica_millis),
            signed(rent.busy.0),
            rent.rent.as_nanos(),
            rent.attributed.as_nanos(),
            rent.idle.as_nanos(),
        ])
        .map(drop)
}

fn insert_event(connection: &Connection, event: &Event) -> rusqlite::Result<()> {
    connection
        .prepare_cached("INSERT INTO events (at, kind, subject, detail) VALUES (?, ?, ?, ?)")?
        .execute(params![signed(event.at.as_millis()), event.kind, event.subject, event.detail])
        .map(drop)
}

/// SQLite has no unsigned integers; what the journal writes is below 2^63.
pub(super) fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

pub(super) fn unsigned(value: i64) -> u64 {
    value.max(0).unsigned_abs()
}

/// Opens the file to read while others may write.
pub(super) fn open_to_read(path: &Path) -> Result<Connection, LedgerError> {
    if !path.exists() {
        return Err(LedgerError::Missing { path: path.to_owned() });
    }
    let sqlite = |source| LedgerError::Sqlite { path: path.to_owned(), source };
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags).map_err(sqlite)?;
    connection.busy_timeout(BUSY_WAIT).map_err(sqlite)?;
    check_version(&connection, path)?;
    Ok(connection)
}

fn is_empty(connection: &Connection) -> rusqlite::Result<bool> {
    connection.query_row("SELECT count(*) = 0 FROM sqlite_schema", [], |row| row.get(0))
}

fn check_version(connection: &Connection, path: &Path) -> Result<u32, LedgerError> {
    let version = connection
        .query_row("SELECT value FROM meta WHERE key = 'schema_version'", [], |row| row.get::<_, String>(0));
    let version = match version {
        Ok(version) => version,
        Err(source) if is_damage(&source) => {
            return Err(LedgerError::Sqlite { path: path.to_owned(), source });
        }
        Err(_) => return Err(LedgerError::NotALedger { path: path.to_owned() }),
    };
    match version.parse::<u32>() {
        Ok(found) if found <= SCHEMA_VERSION => Ok(found),
        _ => Err(LedgerError::Newer { path: path.to_owned(), found: version }),
    }
}

pub(super) fn is_damage(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase))
}

/// Renames the file, and the two that SQLite keeps beside it, so that it can be looked into later.
pub(super) fn set_aside(path: &Path, now: Timestamp, why: &rusqlite::Error) -> Result<(), LedgerError> {
    let aside = with_suffix(path, &format!(".damaged-{}", now.as_millis()));
    for suffix in ["", "-wal", "-shm"] {
        let from = with_suffix(path, suffix);
        if from.exists() {
            fs::rename(&from, with_suffix(&aside, suffix))
                .map_err(|source| LedgerError::Io { path: from, source })?;
        }
    }
    error!(
        "the ledger `{}` is damaged ({why}): kept as `{}`, and a new one begins. \
         `sqlite3 {} .recover` may read what is left",
        path.display(),
        aside.display(),
        aside.display(),
    );
    Ok(())
}

pub(super) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

fn create(connection: &mut Connection, ledger_id: Uuid) -> rusqlite::Result<()> {
    let transaction = connection.transaction()?;
    transaction.execute_batch(include_str!("schema.sql"))?;
    transaction.execute_batch(spans::CREATE)?;
    transaction.execute_batch(once::CREATE)?;
    transaction.execute_batch(&readable_view())?;
    let mut meta = transaction.prepare("INSERT INTO meta (key, value) VALUES (?, ?)")?;
    meta.execute(["schema_version", &SCHEMA_VERSION.to_string()])?;
    meta.execute(["ledger_id", &ledger_id.to_string()])?;
    drop(meta);
    transaction.commit()
}

/// From schema 1, which found a time by an index of all calls, and from schema 2, which did not know that a row may
/// come again. What reads may meet any.
fn migrate(connection: &mut Connection, path: &Path, found: u32) -> rusqlite::Result<()> {
    info!("bringing the ledger `{}` to schema {SCHEMA_VERSION}", path.display());
    let transaction = connection.transaction()?;
    if found < 2 {
        transaction.execute_batch("DROP INDEX calls_closed_at")?;
        transaction.execute_batch(spans::CREATE)?;
        spans::fill(&transaction)?;
    }
    transaction.execute_batch(once::CREATE)?;
    once::fill(&transaction)?;
    transaction
        .execute("UPDATE meta SET value = ?1 WHERE key = 'schema_version'", [SCHEMA_VERSION.to_string()])?;
    transaction.commit()
}

/// `calls_readable`: names in place, times in ISO 8601, amounts as decimals of dollars.
fn readable_view() -> String {
    let labels = LABELS.map(|label| format!("labels.\"{label}\"")).join(", ");
    let numbers = CALL_NUMBERS.map(readable_column).join(", ");
    format!(
        "CREATE VIEW calls_readable AS SELECT lower(hex(calls.id)) AS id, {labels},
         coalesce(tags, '') AS tags, {numbers} FROM calls JOIN labels ON labels.id = calls.label;"
    )
}

fn readable_column(column: &str) -> String {
    match column {
        "opened_at" | "closed_at" | "first_token_at" => format!(
            "strftime('%Y-%m-%dT%H:%M:%S', {column} / 1000, 'unixepoch') || printf('.%03dZ', {column} % 1000)
             AS {column}"
        ),
        // Integer arithmetic and text, because a REAL would not be exact.
        "cost" | "api_cost" | "self_hosted_cost" | "attempts_cost" => format!(
            "CASE WHEN {column} IS NOT NULL THEN printf('%s%d.%09d', iif({column} < 0, '-', ''),
             abs({column} / 1000000000), abs({column} % 1000000000)) END AS {column}_usd"
        ),
        "work" => "work / 1000000.0 AS work_replica_seconds".to_owned(),
        "outcome" => named("outcome", &Outcome::ALL.map(Outcome::as_str)),
        "usage_source" => named("usage_source", &UsageSource::ALL.map(UsageSource::as_str)),
        other => other.to_owned(),
    }
}

fn named(column: &str, names: &[&str]) -> String {
    let case = |(index, name): (usize, &&str)| format!("WHEN {index} THEN '{name}'");
    let cases: Vec<_> = names.iter().enumerate().map(case).collect();
    format!("CASE {column} {} END AS {column}", cases.join(" "))
}
