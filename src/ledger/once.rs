//! Rows that may come again and are there once: what is billed when it is read, and can be read again.
//!
//! The id of such a row is made from the name of what was read, so it is the same whoever reads it, and whenever. Only
//! these ids are in the table `once`, and only for them is it looked at: other rows, nearly all, cost nothing more. A
//! row whose id is there is passed over, be it from a process that has forgotten what an earlier one has billed.

use std::path::Path;

use rusqlite::{Connection, params};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::LedgerError;
use super::database::open_to_read;

/// The version of UUIDs that are made from something (RFC 9562, 5.8). Those of calls are made of the time.
const DERIVED: u8 = 8;

pub(super) const CREATE: &str = "CREATE TABLE once (id BLOB PRIMARY KEY) WITHOUT ROWID;";

/// The id of what a backend has under a path.
pub fn derived_id(backend: &str, path: &str) -> Uuid {
    let digest = Sha256::new().chain_update(backend).chain_update([0]).chain_update(path).finalize();
    let (id, _) = digest.split_first_chunk().expect("a digest has 32 bytes");
    uuid::Builder::from_custom_bytes(*id).into_uuid()
}

/// The id of a response, by its name at the backend or a path that ends with it.
pub fn response_id(backend: &str, name: &str) -> Uuid {
    let name = name.rsplit_once('/').map_or(name, |(_, name)| name);
    derived_id(backend, &format!("/v1/responses/{name}"))
}

/// Whether a row with this id may come again.
pub(super) const fn is_derived(id: &[u8; 16]) -> bool {
    id[6] >> 4 == DERIVED
}

/// Whether a row with this id comes for the first time. It does not again.
pub(super) fn is_first(connection: &Connection, id: &[u8; 16]) -> rusqlite::Result<bool> {
    let inserted =
        connection.prepare_cached("INSERT OR IGNORE INTO once (id) VALUES (?1)")?.execute([id.as_slice()])?;
    Ok(inserted > 0)
}

/// Takes in the rows of a file that has none described yet.
pub(super) fn fill(connection: &Connection) -> rusqlite::Result<()> {
    let sql = "INSERT OR IGNORE INTO once SELECT id FROM calls WHERE substr(hex(id), 13, 1) = ?1";
    connection.execute(sql, params![DERIVED.to_string()]).map(drop)
}

/// Whether the tables have a row with a derived id.
pub fn has(ledger: &Path, id: Uuid) -> Result<bool, LedgerError> {
    let connection = open_to_read(ledger)?;
    connection
        .query_row("SELECT EXISTS (SELECT 1 FROM once WHERE id = ?1)", [id.as_bytes().as_slice()], |row| {
            row.get(0)
        })
        .map_err(|source| LedgerError::Sqlite { path: ledger.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_derived_id_is_the_same_every_time_and_tells_what_it_is() {
        let id = derived_id("openai", "/v1/files/file-1/content");
        assert_eq!(id, derived_id("openai", "/v1/files/file-1/content"));
        assert_ne!(id, derived_id("azure", "/v1/files/file-1/content"));
        assert!(is_derived(id.as_bytes()) && id.get_version_num() == usize::from(DERIVED));
        assert!(!is_derived(Uuid::now_v7().as_bytes()));
    }

    #[test]
    fn an_id_is_first_once_and_those_of_older_rows_are_not() {
        let connection = Connection::open_in_memory().unwrap();
        connection.execute_batch(&format!("CREATE TABLE calls (id BLOB NOT NULL);{CREATE}")).unwrap();
        let (old, new) = (derived_id("a", "old"), derived_id("a", "new"));
        for id in [old, old, Uuid::now_v7()] {
            connection.execute("INSERT INTO calls VALUES (?)", [id.as_bytes().as_slice()]).unwrap();
        }
        fill(&connection).unwrap();
        let count = |sql| connection.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap();
        assert_eq!(count("SELECT count(*) FROM once"), 1);
        assert!(!is_first(&connection, old.as_bytes()).unwrap());
        assert!(is_first(&connection, new.as_bytes()).unwrap());
        assert!(!is_first(&connection, new.as_bytes()).unwrap());
    }
}
