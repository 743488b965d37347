//! The file of virtual keys, `keys.db` beside the ledger: small, SQLite, and written by the command while the
//! server reads it. It holds digests and public ids, never a secret.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, Row, params};

use super::period;
use super::secret::Digest;
use crate::config::BudgetPeriod;
use crate::economics::{NanoUsd, Timestamp};

const BUSY_WAIT: Duration = Duration::from_secs(5);

/// Raised when the table changes.
const SCHEMA_VERSION: i64 = 1;

const SCHEMA: &str = "CREATE TABLE IF NOT EXISTS keys (
    id TEXT PRIMARY KEY,
    digest BLOB NOT NULL UNIQUE,
    name TEXT NOT NULL,
    team TEXT NOT NULL,
    budget INTEGER,
    period TEXT,
    requests_per_minute INTEGER,
    tokens_per_minute INTEGER,
    routes TEXT NOT NULL,
    backends TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER,
    revoked_at INTEGER
)";

const COLUMNS: &str = "id, digest, name, team, budget, period, requests_per_minute, tokens_per_minute, routes, \
                       backends, created_at, expires_at, revoked_at";

/// What is known of a virtual key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Public: in the ledger, in lists, in budgets.
    pub id: String,
    pub digest: Digest,
    pub name: String,
    /// Empty: the team that the request's tag names.
    pub team: String,
    pub budget: Option<(NanoUsd, BudgetPeriod)>,
    pub requests_per_minute: Option<u64>,
    pub tokens_per_minute: Option<u64>,
    /// Empty: all.
    pub routes: Vec<String>,
    /// Empty: all.
    pub backends: Vec<String>,
    pub created_at: Timestamp,
    pub expires_at: Option<Timestamp>,
    pub revoked_at: Option<Timestamp>,
}

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("cannot use `{}` for the virtual keys", path.display())]
    Sqlite {
        path: PathBuf,
        #[source]
        source: rusqlite::Error,
    },
    #[error("the keys in `{}` were written by a newer breakeven: upgrade", path.display())]
    Newer { path: PathBuf },
}

/// Where the keys of a ledger are.
pub fn path_beside(ledger: &Path) -> PathBuf {
    ledger.with_file_name("keys.db")
}

#[derive(Debug)]
pub struct Store {
    connection: Connection,
    path: PathBuf,
}

impl Store {
    /// Opens or creates the file.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let prepare = || {
            let connection = Connection::open(path)?;
            connection.busy_timeout(BUSY_WAIT)?;
            connection.pragma_update(None, "journal_mode", "wal")?;
            connection.pragma_update(None, "synchronous", "full")?;
            let version: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
            if version < SCHEMA_VERSION {
                connection.execute_batch(SCHEMA)?;
                connection.pragma_update(None, "user_version", SCHEMA_VERSION)?;
            }
            Ok((connection, version))
        };
        match prepare() {
            Ok((_, version)) if version > SCHEMA_VERSION => Err(StoreError::Newer { path: path.to_owned() }),
            Ok((connection, _)) => Ok(Self { connection, path: path.to_owned() }),
            Err(source) => Err(StoreError::Sqlite { path: path.to_owned(), source }),
        }
    }

    /// Changes whenever somebody else has written the file.
    pub fn version(&self) -> Result<i64, StoreError> {
        self.wrap(self.connection.query_row("PRAGMA data_version", [], |row| row.get(0)))
    }

    /// All keys, oldest first.
    pub fn all(&self) -> Result<Vec<Record>, StoreError> {
        let read = || {
            let mut statement = self
                .connection
                .prepare_cached(&format!("SELECT {COLUMNS} FROM keys ORDER BY created_at, id"))?;
            statement.query_map([], record)?.collect()
        };
        self.wrap(read())
    }

    pub fn insert(&self, key: &Record) -> Result<(), StoreError> {
        let sql = format!(
            "INSERT INTO keys ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)"
        );
        let inserted = self.connection.execute(
            &sql,
            params![
                key.id,
                key.digest.0,
                key.name,
                key.team,
                key.budget.map(|(limit, _)| limit.as_nanos()),
                key.budget.map(|(_, period)| period::name(period)),
                key.requests_per_minute.map(signed),
                key.tokens_per_minute.map(signed),
                key.routes.join(","),
                key.backends.join(","),
                signed(key.created_at.as_millis()),
                key.expires_at.map(|at| signed(at.as_millis())),
                key.revoked_at.map(|at| signed(at.as_millis())),
            ],
        );
        self.wrap(inserted.map(drop))
    }

    /// Ends a key for good. False when there is none with that id that is not revoked already.
    pub fn revoke(&self, id: &str, now: Timestamp) -> Result<bool, StoreError> {
        let sql = "UPDATE keys SET revoked_at = ?2 WHERE id = ?1 AND revoked_at IS NULL";
        self.wrap(
            self.connection.execute(sql, params![id, signed(now.as_millis())]).map(|changed| changed > 0),
        )
    }

    fn wrap<T>(&self, result: rusqlite::Result<T>) -> Result<T, StoreError> {
        result.map_err(|source| StoreError::Sqlite { path: self.path.clone(), source })
    }
}

fn record(row: &Row<'_>) -> rusqlite::Result<Record> {
    let list = |text: String| text.split(',').filter(|part| !part.is_empty()).map(str::to_owned).collect();
    let number = |index| row.get::<_, Option<i64>>(index).map(|number| number.map(i64::cast_unsigned));
    let limit: Option<i64> = row.get(4)?;
    let period: Option<String> = row.get(5)?;
    let period = period.and_then(|name| period::named(&name)).unwrap_or(BudgetPeriod::Lifetime);
    Ok(Record {
        id: row.get(0)?,
        digest: Digest(row.get(1)?),
        name: row.get(2)?,
        team: row.get(3)?,
        budget: limit.map(|limit| (NanoUsd::from_nanos(limit), period)),
        requests_per_minute: number(6)?,
        tokens_per_minute: number(7)?,
        routes: list(row.get(8)?),
        backends: list(row.get(9)?),
        created_at: Timestamp::from_millis(number(10)?.unwrap_or_default()),
        expires_at: number(11)?.map(Timestamp::from_millis),
        revoked_at: number(12)?.map(Timestamp::from_millis),
    })
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::keys) fn key(id: &str, secret: &str) -> Record {
        Record {
            id: id.to_owned(),
            digest: Digest::of(secret.as_bytes()),
            name: "search".to_owned(),
            team: String::new(),
            budget: None,
            requests_per_minute: None,
            tokens_per_minute: None,
            routes: Vec::new(),
            backends: Vec::new(),
            created_at: Timestamp::from_secs(1),
            expires_at: None,
            revoked_at: None,
        }
    }

    #[test]
    fn what_is_stored_is_read_back_and_another_connection_notices() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys.db");
        let (server, command) = (Store::open(&path).unwrap(), Store::open(&path).unwrap());
        let before = server.version().unwrap();
        let stored = Record {
            budget: Some((NanoUsd::from_nanos(5), BudgetPeriod::Day)),
            tokens_per_minute: Some(7),
            routes: vec!["chat".to_owned(), "own".to_owned()],
            expires_at: Some(Timestamp::from_secs(9)),
            ..key("key_1", "secret")
        };
        command.insert(&stored).unwrap();
        assert_ne!(server.version().unwrap(), before);
        assert_eq!(server.all().unwrap(), [stored]);
        assert!(command.revoke("key_1", Timestamp::from_secs(3)).unwrap());
        assert!(!command.revoke("key_1", Timestamp::from_secs(4)).unwrap());
        assert_eq!(server.all().unwrap()[0].revoked_at, Some(Timestamp::from_secs(3)));
    }
}
