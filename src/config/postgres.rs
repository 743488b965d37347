//! Where the one ledger of many proxies is, and how it may be reached.
//!
//! The address is a URL as `psql` takes it. TLS is either on, and then the server's certificate is verified with
//! its name, or it is off: the modes in between, which protect against nobody who can answer in the server's
//! place, are not offered. `verify-ca` and `require` are therefore as strict as `verify-full`.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use tokio_postgres::config::{Host, SslMode};

use super::defaults;

/// The Postgres database that a proxy's rows are copied to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PostgresSettings {
    pub server: PostgresServer,
    /// Certificates that the server's is verified against, in PEM; else those of the public authorities.
    pub ca_file: Option<PathBuf>,
    /// What this proxy is called in the table `ledgers`; else the name of its host.
    pub instance: Option<String>,
    /// Most rows of one transaction, and of memory.
    pub batch_rows: usize,
    /// Longest time to connect.
    pub connect_timeout: Duration,
    /// Longest time of one statement.
    pub statement_timeout: Duration,
}

impl PostgresSettings {
    /// A server with everything else as it is by default.
    pub fn of(server: PostgresServer) -> Self {
        Self {
            ca_file: server.ca_file.clone(),
            server,
            instance: None,
            batch_rows: usize::try_from(defaults::POSTGRES_BATCH_ROWS).unwrap_or(usize::MAX),
            connect_timeout: defaults::POSTGRES_CONNECT_TIMEOUT,
            statement_timeout: defaults::POSTGRES_STATEMENT_TIMEOUT,
        }
    }
}

/// A server, a database and a user. `Debug` and `Display` show no password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PostgresServer {
    pub connection: tokio_postgres::Config,
    pub is_encrypted: bool,
    /// `sslrootcert` of the URL.
    pub ca_file: Option<PathBuf>,
}

/// Why a text is no address of a Postgres server: what is wrong, and what to write. Neither shows the text, because
/// it may hold a password.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {remedy}")]
pub struct ParseServerError {
    pub what: String,
    pub remedy: &'static str,
}

const FORM: &str = "write `postgres://user:password@host:5432/database?sslmode=verify-full`";

/// Whether a text is meant to be a URL of Postgres, and no path of a file.
pub fn is_postgres_url(text: &str) -> bool {
    text.starts_with("postgres://") || text.starts_with("postgresql://")
}

impl FromStr for PostgresServer {
    type Err = ParseServerError;

    fn from_str(url: &str) -> Result<Self, ParseServerError> {
        let error = |what: &str, remedy| ParseServerError { what: what.to_owned(), remedy };
        if !is_postgres_url(url) {
            return Err(error("is not a URL of Postgres", FORM));
        }
        let (base, query) = url.split_once('?').unwrap_or((url, ""));
        let (mut mode, mut ca_file, mut rest) = (None, None, Vec::new());
        for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
            match parameter.split_once('=') {
                Some(("sslmode", value)) => mode = Some(value),
                Some(("sslrootcert", value)) => ca_file = Some(PathBuf::from(value)),
                _ => rest.push(parameter),
            }
        }
        // The library knows three modes of TLS, and no file of certificates.
        let plain = if rest.is_empty() { base.to_owned() } else { format!("{base}?{}", rest.join("&")) };
        let mut connection = tokio_postgres::Config::from_str(&plain)
            .map_err(|_| error("is not a URL that can be understood", FORM))?;
        if connection.get_hosts().is_empty() {
            return Err(error("names no host", FORM));
        }
        let is_encrypted = match mode {
            None => !connection.get_hosts().iter().all(is_this_machine),
            Some("disable") => false,
            Some("require" | "verify-ca" | "verify-full") => true,
            Some("allow" | "prefer") => {
                return Err(error(
                    "leaves it to the server whether rows and password are encrypted",
                    "write `sslmode=verify-full`, or `sslmode=disable` in a network that you trust",
                ));
            }
            Some(_) => {
                return Err(error(
                    "has an `sslmode` that does not exist",
                    "write `sslmode=verify-full`, or `sslmode=disable` in a network that you trust",
                ));
            }
        };
        connection.ssl_mode(if is_encrypted { SslMode::Require } else { SslMode::Disable });
        Ok(Self { connection, is_encrypted, ca_file })
    }
}

/// Hosts and database, for messages.
impl fmt::Display for PostgresServer {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = |host: &Host| match host {
            Host::Tcp(name) => name.clone(),
            Host::Unix(folder) => folder.display().to_string(),
        };
        let hosts: Vec<String> = self.connection.get_hosts().iter().map(host).collect();
        write!(out, "{}", hosts.join(","))?;
        match self.connection.get_dbname() {
            Some(database) => write!(out, "/{database}"),
            None => Ok(()),
        }
    }
}

/// Whether what goes to this host stays on the machine.
fn is_this_machine(host: &Host) -> bool {
    match host {
        Host::Unix(_) => true,
        Host::Tcp(name) => {
            name == "localhost" || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(url: &str) -> PostgresServer {
        url.parse().unwrap_or_else(|error| panic!("{url}: {error}"))
    }

    #[test]
    fn a_server_elsewhere_is_verified_unless_the_url_says_otherwise() {
        for (url, is_encrypted) in [
            ("postgres://u:p@db.example.com/ledger", true),
            ("postgresql://u@10.0.0.7:6432/ledger?sslmode=require", true),
            ("postgres://u@db/ledger?sslmode=verify-full&application_name=x", true),
            ("postgres://u@db/ledger?sslmode=disable", false),
            ("postgres://u@localhost/ledger", false),
            ("postgres://u@127.0.0.1:5433/ledger", false),
            ("postgres://u@%2Fvar%2Frun%2Fpostgresql/ledger", false),
            ("postgres://u@localhost/ledger?sslmode=verify-full", true),
        ] {
            assert_eq!(server(url).is_encrypted, is_encrypted, "{url}");
        }
    }

    #[test]
    fn a_file_of_certificates_is_taken_out_of_the_url() {
        let server = server("postgres://u@db/ledger?sslrootcert=/etc/ca.pem&connect_timeout=3");
        assert_eq!(server.ca_file, Some(PathBuf::from("/etc/ca.pem")));
        assert_eq!(server.connection.get_connect_timeout(), Some(&Duration::from_secs(3)));
    }

    #[test]
    fn what_is_wrong_is_said_without_the_password() {
        for (url, what) in [
            ("host=db password=canary", "not a URL of Postgres"),
            ("postgres://u:canary@db/x?sslmode=prefer", "leaves it to the server"),
            ("postgres://u:canary@db/x?sslmode=yes", "does not exist"),
            ("postgres://u:canary@db:port/x", "can be understood"),
            ("postgres:///x", "no host"),
        ] {
            let error = url.parse::<PostgresServer>().map(|server| server.to_string()).unwrap_err();
            let text = format!("{error} {error:?}");
            assert!(text.contains(what) && !text.contains("canary"), "{url}: {text}");
        }
        let shown = format!("{0} {0:?}", server("postgres://u:canary@db/ledger"));
        assert!(shown.starts_with("db/ledger") && !shown.contains("canary"), "{shown}");
    }
}
