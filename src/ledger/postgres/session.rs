//! One connection to Postgres: how it is opened, what it knows, and what one transaction ships.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::time::Duration;

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::tls::TlsStream;
use tokio_postgres::{Client, Connection, NoTls, Socket};
use tokio_postgres_rustls::MakeRustlsConnect;
use uuid::Uuid;

use super::PostgresError;
use super::insert::{insert, number_labels};
use super::schema::{Month, make_partitions, migrate};
use super::source::Batch;
use crate::config::PostgresSettings;
use crate::economics::Timestamp;
use crate::ledger::rows::{Names, Place};
use crate::tls;

/// Numbers of labels kept in memory; a client that invents model names cannot make it grow further.
const CACHED_LABELS: usize = 4_096;

/// How long a silent connection is trusted before it is probed.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// What an answer may take longer than its statement: a transaction has several.
const ANSWER_MARGIN: Duration = Duration::from_secs(10);

/// An open connection; what drives it ends with it.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) client: Client,
    driver: JoinHandle<()>,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// Connects, and bounds the time of every statement.
pub(super) async fn open(settings: &PostgresSettings) -> Result<Open, PostgresError> {
    let server = settings.server.to_string();
    let connecting = async {
        let failed = |source| PostgresError::Connect { server: server.clone(), source };
        let mut config = settings.server.connection.clone();
        if config.get_application_name().is_none() {
            config.application_name("breakeven");
        }
        config.keepalives_idle(KEEPALIVE).tcp_user_timeout(settings.statement_timeout + ANSWER_MARGIN);
        let open = if settings.server.is_encrypted {
            let tls = tls(settings.ca_file.as_deref())?;
            let (client, connection) = config.connect(tls).await.map_err(failed)?;
            Open { client, driver: drive(connection) }
        } else {
            let (client, connection) = config.connect(NoTls).await.map_err(failed)?;
            Open { client, driver: drive(connection) }
        };
        let limits = format!(
            "SET statement_timeout = {0}; SET idle_in_transaction_session_timeout = {0}; SET timezone = 'UTC'",
            settings.statement_timeout.as_millis()
        );
        open.client.batch_execute(&limits).await.map_err(failed)?;
        Ok(open)
    };
    timeout(settings.connect_timeout, connecting).await.unwrap_or_else(|_| {
        Err(PostgresError::NoAnswer { server: server.clone(), after: settings.connect_timeout })
    })
}

/// Whoever uses the client learns what ends the connection.
fn drive<S>(connection: Connection<Socket, S>) -> JoinHandle<()>
where
    S: TlsStream + Unpin + Send + 'static,
{
    tokio::spawn(async move { drop(connection.await) })
}

/// The server's certificate and name are verified, always.
fn tls(ca_file: Option<&Path>) -> Result<MakeRustlsConnect, PostgresError> {
    let authorities = ca_file.map(roots).transpose()?;
    Ok(MakeRustlsConnect::new(tls::client_config(authorities)))
}

fn roots(path: &Path) -> Result<RootCertStore, PostgresError> {
    let unusable = || PostgresError::Certificates { path: path.to_owned() };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(path).map_err(|_| unusable())? {
        roots.add(certificate.map_err(|_| unusable())?).map_err(|_| unusable())?;
    }
    if roots.is_empty() { Err(unusable()) } else { Ok(roots) }
}

/// A connection that ships the rows of one ledger.
#[derive(Debug)]
pub(super) struct Session {
    open: Open,
    server: String,
    /// Longest time for a transaction, should the server fall silent.
    patience: Duration,
    ledger: i32,
    labels: HashMap<i64, i32>,
    months: BTreeSet<Month>,
}

impl Session {
    /// Connects, brings the tables up to date, and makes the ledger known. Returns the session and up to where
    /// Postgres has the ledger's rows.
    pub(super) async fn begin(
        settings: &PostgresSettings,
        ledger_id: Uuid,
        instance: &str,
        now: Timestamp,
    ) -> Result<(Self, Place), PostgresError> {
        let mut session = Self {
            open: open(settings).await?,
            server: settings.server.to_string(),
            patience: settings.statement_timeout + ANSWER_MARGIN,
            ledger: 0,
            labels: HashMap::new(),
            months: BTreeSet::new(),
        };
        let (patience, server) = (session.patience, session.server.clone());
        let shipped = within(patience, &server, session.prepare(ledger_id, instance, now)).await?;
        Ok((session, shipped))
    }

    async fn prepare(
        &mut self,
        ledger_id: Uuid,
        instance: &str,
        now: Timestamp,
    ) -> Result<Place, PostgresError> {
        migrate(&mut self.open.client, &self.server).await?;
        self.make_partitions(Month::ahead(now).collect()).await?;
        let row = self
            .open
            .client
            .query_one(
                "INSERT INTO breakeven.ledgers (id, instance) VALUES ($1, $2)
                 ON CONFLICT (id) DO UPDATE SET instance = excluded.instance
                 RETURNING ledger, calls, rent, events",
                &[&ledger_id, &instance],
            )
            .await
            .map_err(|source| self.failed(source))?;
        self.ledger = row.get(0);
        Ok(Place { calls: row.get(1), rent: row.get(2), events: row.get(3) })
    }

    fn failed(&self, source: tokio_postgres::Error) -> PostgresError {
        PostgresError::Failed { server: self.server.clone(), source }
    }

    /// Makes the partitions of the coming months, once each.
    pub(super) async fn look_ahead(&mut self, now: Timestamp) -> Result<(), PostgresError> {
        let (patience, server) = (self.patience, self.server.clone());
        within(patience, &server, self.make_partitions(Month::ahead(now).collect())).await
    }

    async fn make_partitions(&mut self, months: BTreeSet<Month>) -> Result<(), PostgresError> {
        let new: BTreeSet<Month> = months.difference(&self.months).copied().collect();
        if new.is_empty() {
            return Ok(());
        }
        make_partitions(&mut self.open.client, &new).await.map_err(|source| self.failed(source))?;
        self.months.extend(new);
        Ok(())
    }

    /// Ships a batch in one transaction. When it returns, the rows are committed.
    pub(super) async fn ship(&mut self, batch: &Batch) -> Result<(), PostgresError> {
        let (patience, server) = (self.patience, self.server.clone());
        within(patience, &server, self.ship_batch(batch)).await
    }

    async fn ship_batch(&mut self, batch: &Batch) -> Result<(), PostgresError> {
        self.make_partitions(batch.months()).await?;
        let shipped = async {
            self.learn_labels(batch).await?;
            let transaction = self.open.client.transaction().await?;
            insert(&transaction, self.ledger, &self.labels, batch).await?;
            let Place { calls, rent, events } = batch.end;
            transaction
                .execute(
                    "UPDATE breakeven.ledgers SET calls = $2, rent = $3, events = $4, shipped_at = now()
                     WHERE ledger = $1",
                    &[&self.ledger, &calls, &rent, &events],
                )
                .await?;
            transaction.commit().await
        };
        shipped.await.map_err(|source| PostgresError::Failed { server: self.server.clone(), source })
    }

    async fn learn_labels(&mut self, batch: &Batch) -> Result<(), tokio_postgres::Error> {
        if self.labels.len() + batch.names.len() > CACHED_LABELS {
            self.labels.clear();
        }
        let unknown: BTreeMap<i64, &Names> = batch
            .names
            .iter()
            .filter(|(label, _)| !self.labels.contains_key(label))
            .map(|(label, names)| (*label, names))
            .collect();
        if !unknown.is_empty() {
            self.labels.extend(number_labels(&self.open.client, &unknown).await?);
        }
        Ok(())
    }
}

/// Gives up on a server that does not answer.
pub(super) async fn within<T>(
    patience: Duration,
    server: &str,
    work: impl Future<Output = Result<T, PostgresError>>,
) -> Result<T, PostgresError> {
    timeout(patience, work)
        .await
        .unwrap_or_else(|_| Err(PostgresError::NoAnswer { server: server.to_owned(), after: patience }))
}
