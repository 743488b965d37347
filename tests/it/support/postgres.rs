//! A real Postgres server of a test's own, from the installed binaries, on a free port and in a temporary folder.

use std::net::SocketAddr;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;
use tokio_postgres::{Client, NoTls, Row};

use super::free_address;

/// A certificate and its key, in PEM.
pub(crate) struct Certificate<'a> {
    pub(crate) chain: &'a str,
    pub(crate) key: &'a str,
}

#[derive(Debug)]
pub(crate) struct Postgres {
    folder: TempDir,
    address: SocketAddr,
    server: Option<Child>,
    options: Vec<String>,
}

/// Where Debian and others put the server, newest first.
fn binaries() -> Option<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten();
    let mut folders: Vec<PathBuf> = versions.map(|entry| entry.unwrap().path().join("bin")).collect();
    folders.sort();
    folders.extend(["/usr/pgsql/bin", "/usr/local/bin", "/usr/bin"].map(PathBuf::from));
    let has_server = |folder: &&PathBuf| folder.join("postgres").exists() && folder.join("initdb").exists();
    folders.iter().rev().find(has_server).cloned()
}

/// Whom the server runs as: it refuses to run as root.
fn owner() -> Option<(u32, u32)> {
    let is_root = std::fs::metadata("/proc/self").is_ok_and(|own| {
        use std::os::unix::fs::MetadataExt as _;
        own.uid() == 0
    });
    let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let ids = |line: &str| {
        let mut fields = line.strip_prefix("postgres:")?.split(':').skip(1);
        Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
    };
    is_root.then(|| users.lines().find_map(ids).expect("the package `postgresql` makes the user `postgres`"))
}

fn command(program: &str, folder: &Path) -> Command {
    let mut command = Command::new(binaries().expect("it is installed").join(program));
    command.current_dir(folder).stdin(Stdio::null());
    if let Some((user, group)) = owner() {
        command.uid(user).gid(group);
    }
    command
}

impl Postgres {
    pub(crate) const PACKAGE: &str = "postgresql";

    pub(crate) fn is_installed() -> bool {
        binaries().is_some()
    }

    pub(crate) async fn start() -> Self {
        Self::start_with(None).await
    }

    /// A server that speaks TLS as well, with this certificate.
    pub(crate) async fn start_with(certificate: Option<Certificate<'_>>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let own = |path: &Path| {
            if let Some((user, group)) = owner() {
                chown(path, Some(user), Some(group)).unwrap();
            }
        };
        own(folder.path());
        let made = command("initdb", folder.path())
            .args(["-D", "data", "-U", "proxy", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"])
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        // What is committed survives a crash of the server without that; only a power cut would lose it.
        let mut options: Vec<String> =
            ["fsync=off", "shared_buffers=16MB", "max_connections=30"].map(Into::into).into();
        if let Some(Certificate { chain, key }) = certificate {
            for (name, text) in [("server.crt", chain), ("server.key", key)] {
                let path = folder.path().join("data").join(name);
                std::fs::write(&path, text).unwrap();
                std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
                own(&path);
            }
            options.push("ssl=on".into());
        }
        let mut postgres = Self { folder, address: free_address(), server: None, options };
        postgres.start_again().await;
        postgres
    }

    /// Starts the server after [`Postgres::crash`], with what it had.
    pub(crate) async fn start_again(&mut self) {
        let log = std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(self.folder.path().join("log"))
            .unwrap();
        let mut server = command("postgres", self.folder.path());
        server.args(["-D", "data", "-h", "127.0.0.1", "-p", &self.address.port().to_string(), "-k", ""]);
        for option in &self.options {
            server.args(["-c", option]);
        }
        self.server = Some(server.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap());
        let up = async {
            let mut look = tokio::time::interval(Duration::from_millis(20));
            while self.connect("postgres").await.is_err() {
                look.tick().await;
            }
        };
        let up = tokio::time::timeout(Duration::from_secs(30), up).await;
        up.unwrap_or_else(|_| {
            panic!("it does not start: {}", std::fs::read_to_string(self.folder.path().join("log")).unwrap())
        });
    }

    /// Ends the server at once, as a crash would: nothing is flushed, and the next start recovers.
    pub(crate) fn crash(&mut self) {
        let Some(mut server) = self.server.take() else { return };
        let told = Command::new("kill").args(["-QUIT", &server.id().to_string()]).status();
        assert!(told.unwrap().success());
        server.wait().unwrap();
    }

    /// The address of a database, as in a configuration.
    pub(crate) fn url(&self, database: &str) -> String {
        format!("postgres://proxy@{}/{database}", self.address)
    }

    pub(crate) const fn port(&self) -> u16 {
        self.address.port()
    }

    async fn connect(&self, database: &str) -> Result<Client, tokio_postgres::Error> {
        let (client, connection) = tokio_postgres::connect(&self.url(database), NoTls).await?;
        tokio::spawn(async move { drop(connection.await) });
        Ok(client)
    }

    /// Runs statements without results.
    pub(crate) async fn run(&self, database: &str, sql: &str) {
        let client = self.connect(database).await.unwrap();
        client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{error:?}: {sql}"));
    }

    pub(crate) async fn rows(&self, database: &str, sql: &str) -> Vec<Row> {
        let client = self.connect(database).await.unwrap();
        client.query(sql, &[]).await.unwrap_or_else(|error| panic!("{error:?}: {sql}"))
    }

    /// The one number that a query gives.
    pub(crate) async fn number(&self, database: &str, sql: &str) -> i64 {
        self.rows(database, sql).await[0].get(0)
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if let Some(server) = &mut self.server {
            // A server that does not end must not fail the test that is over.
            drop(Command::new("kill").args(["-QUIT", &server.id().to_string()]).status());
            drop(server.wait());
        }
    }
}
