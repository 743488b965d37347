//! One ledger of many proxies: a copy of every row in Postgres.
//!
//! The SQLite file is each proxy's journal, and stays what budgets, the live page and a restart read. A thread copies
//! its rows to Postgres from a cursor, and no call, no readiness and no memory depend on whether Postgres is there.

mod insert;
mod schema;
mod session;
mod ship;
mod source;
mod totals;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::time::timeout;
use tracing::warn;

pub use self::totals::totals;
use super::LedgerError;
use crate::clock::Clock;
use crate::config::PostgresSettings;
use crate::economics::Timestamp;

/// How long the end of the program waits for the rows that are left.
const FINISH_WAIT: Duration = Duration::from_secs(5);

/// Where Linux says what a machine or container is called.
const HOST_NAME_FILE: &str = "/proc/sys/kernel/hostname";

/// Why Postgres cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PostgresError {
    #[error("`{}` holds no certificates that can be used: write them in PEM", path.display())]
    Certificates { path: PathBuf },
    #[error("cannot connect to Postgres at {server}")]
    Connect {
        server: String,
        #[source]
        source: tokio_postgres::Error,
    },
    #[error("Postgres at {server} has not answered for {after:?}")]
    NoAnswer { server: String, after: Duration },
    #[error("Postgres at {server} failed")]
    Failed {
        server: String,
        #[source]
        source: tokio_postgres::Error,
    },
    #[error(
        "the ledger in {server} was changed by a newer breakeven (schema {found}, this one knows {}): upgrade",
        schema::SCHEMA_VERSION
    )]
    Newer { server: String, found: usize },
    #[error(
        "the database {server} is encoded in {encoding}: make one with `CREATE DATABASE .. ENCODING 'UTF8'`"
    )]
    Encoding { server: String, encoding: String },
    #[error("there is no ledger in {server} yet: `breakeven serve` with `ledger.postgres` makes it")]
    NoLedger { server: String },
    #[error("the thread that ships rows cannot be started")]
    Thread(#[source] std::io::Error),
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

/// What a shipper has done since it was started, for metrics.
#[derive(Debug, Default)]
pub struct Shipping {
    rows: AtomicU64,
    failures: AtomicU64,
    waiting: AtomicU64,
    /// Milliseconds since the epoch; zero before the first time.
    shipped_at: AtomicU64,
}

impl Shipping {
    /// Postgres took what there was at `at`: so many rows, and so many wait yet.
    pub fn note(&self, rows: u64, waiting: u64, at: Timestamp) {
        self.rows.fetch_add(rows, Ordering::Relaxed);
        self.shipped_at.store(at.as_millis(), Ordering::Relaxed);
        self.note_waiting(waiting);
    }

    fn note_waiting(&self, waiting: u64) {
        self.waiting.store(waiting, Ordering::Relaxed);
    }

    fn note_failure(&self) {
        self.failures.fetch_add(1, Ordering::Relaxed);
    }

    /// Rows that were committed in Postgres.
    pub fn rows(&self) -> u64 {
        self.rows.load(Ordering::Relaxed)
    }

    /// Times that Postgres could not be reached or written.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// Rows that are recorded and not in Postgres yet.
    pub fn waiting(&self) -> u64 {
        self.waiting.load(Ordering::Relaxed)
    }

    /// When Postgres last took what there was.
    pub fn shipped_at(&self) -> Option<Timestamp> {
        Some(self.shipped_at.load(Ordering::Relaxed)).filter(|millis| *millis > 0).map(Timestamp::from_millis)
    }
}

/// A thread that ships the rows of a ledger. It ends when this is dropped.
#[derive(Debug)]
pub struct Shipper {
    stop: watch::Sender<bool>,
    done: oneshot::Receiver<()>,
    shipping: Arc<Shipping>,
}

impl Shipper {
    /// Begins to ship the ledger at `path`. Postgres need not be there.
    pub fn start(settings: PostgresSettings, path: &Path, clock: Clock) -> Result<Self, PostgresError> {
        let (stop, stopped) = watch::channel(false);
        let (ended, done) = oneshot::channel();
        let shipping = Arc::new(Shipping::default());
        let shipment = ship::Shipment {
            instance: settings.instance.clone().unwrap_or_else(host_name),
            settings,
            path: path.to_owned(),
            clock,
            shipping: Arc::clone(&shipping),
            stop: stopped,
        };
        // A thread and a runtime of its own: reading the ledger blocks, and no call may wait for that.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(PostgresError::Thread)?;
        let run = move || {
            runtime.block_on(ship::run(shipment));
            drop(ended);
        };
        thread::Builder::new().name("ledger-ship".to_owned()).spawn(run).map_err(PostgresError::Thread)?;
        Ok(Self { stop, done, shipping })
    }

    pub fn shipping(&self) -> Arc<Shipping> {
        Arc::clone(&self.shipping)
    }

    /// Ships what is left, for five seconds at most; the next start ships the rest.
    pub async fn finish(mut self) {
        self.stop.send_replace(true);
        // The thread never sends: it drops its end.
        if timeout(FINISH_WAIT, &mut self.done).await.is_err() || self.shipping.waiting() > 0 {
            warn!(
                "{} rows are not in Postgres yet; they are in the ledger, and the next start ships them",
                self.shipping.waiting()
            );
        }
    }
}

impl Drop for Shipper {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

fn host_name() -> String {
    let name = std::fs::read_to_string(HOST_NAME_FILE).unwrap_or_default();
    if name.trim().is_empty() { "unnamed".to_owned() } else { name.trim().to_owned() }
}
