//! `breakeven serve` as processes that share a Redis.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use breakeven::clock::Clock;
use breakeven::economics::Timestamp;
use serde_json::Value;
use tempfile::TempDir;
use tokio::process::{Child, Command};

use super::until;
use crate::support::Http;

const PATIENCE: Duration = Duration::from_secs(30);

/// One process, with a folder and ports of its own that a restart keeps.
#[derive(Debug)]
pub(super) struct Peer {
    child: Option<Child>,
    folder: TempDir,
    address: SocketAddr,
    admin: SocketAddr,
    pub(super) ends: Vec<Timestamp>,
}

impl Peer {
    /// `text` is the configuration without `[server]` and `[ledger]`.
    pub(super) async fn start(text: &str) -> Self {
        let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (folder, address, admin) = (tempfile::tempdir().unwrap(), free(), free());
        let text = format!(
            "[server]\nlisten = \"{address}\"\nadmin_listen = \"{admin}\"\nworkers = 1\n\
             [ledger]\npath = \"{}\"\n{text}",
            folder.path().join("breakeven.db").display()
        );
        std::fs::write(folder.path().join("breakeven.toml"), text).unwrap();
        let mut peer = Self { child: None, folder, address, admin, ends: Vec::new() };
        peer.up().await;
        peer
    }

    /// Starts it, or starts it again where it was.
    pub(super) async fn up(&mut self) {
        let log = std::fs::OpenOptions::new().append(true).create(true).open(self.path("log")).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_breakeven"))
            .args(["serve", "--config"])
            .arg(self.path("breakeven.toml"))
            .stdout(Stdio::null())
            .stderr(log)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        self.child = Some(child);
        let http = Http::new(&format!("http://{}", self.admin));
        let is_up = async || {
            let request = http.request(http::Method::GET, "/readyz");
            http.start(request, bytes::Bytes::new()).await.ok().filter(|reply| reply.status() == 200)
        };
        until("the proxy is ready", PATIENCE, is_up).await;
    }

    /// SIGKILL.
    pub(super) async fn kill(&mut self) {
        self.child.take().expect("it runs").kill().await.unwrap();
        self.ends.push(now());
    }

    /// SIGTERM, and waits for the end.
    pub(super) async fn end(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        let id = child.id().expect("it runs").to_string();
        assert!(std::process::Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
        let ended = tokio::time::timeout(PATIENCE, child.wait()).await;
        ended.unwrap_or_else(|_| panic!("it does not end: {}", self.log())).unwrap();
        self.ends.push(now());
    }

    /// Of its process.
    pub(super) fn id(&self) -> u32 {
        self.child.as_ref().and_then(Child::id).expect("it runs")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(super) fn ledger(&self) -> PathBuf {
        self.path("breakeven.db")
    }

    pub(super) fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    pub(super) fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap()
    }

    pub(super) async fn status(&self) -> Value {
        Http::new(&format!("http://{}", self.admin)).get("/api/status").await.json()
    }

    pub(super) async fn pin(&self, pool: &str, backend: &str) {
        let http = Http::new(&format!("http://{}", self.admin));
        let reply = http.post("/api/pin", &serde_json::json!({"pool": pool, "backend": backend})).await;
        assert!(reply.status.is_success(), "{}", reply.text());
    }

    /// The value of a metric without labels.
    pub(super) async fn metric(&self, name: &str) -> f64 {
        let reply = Http::new(&format!("http://{}", self.admin)).get("/metrics").await;
        let line = reply.text().lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{name} is not in\n{}", reply.text())).parse().unwrap()
    }

    pub(super) async fn is_stale(&self) -> bool {
        self.metric("breakeven_shared_volume_stale").await > 0.0
    }

    pub(super) async fn holds_lease(&self) -> bool {
        self.status().await["shared"]["lease_token"].is_u64()
    }
}

/// A time that one process held the planner's lease.
#[derive(Debug, Clone, Copy)]
pub(super) struct Held {
    pub(super) token: u64,
    from: Timestamp,
    to: Timestamp,
}

/// Every time that the log tells of; what was not lost by its word ended with the process.
pub(super) fn held(peer: &Peer) -> Vec<Held> {
    let mut held: Vec<Held> = Vec::new();
    for line in peer.log().lines() {
        let Some(at) = line.split_whitespace().next().and_then(|word| word.parse::<jiff::Timestamp>().ok())
        else {
            continue;
        };
        let at = Timestamp::from_millis(u64::try_from(at.as_millisecond()).unwrap());
        let token = |after: &str| {
            let rest = &line[line.find(after)? + after.len()..];
            rest.split(|c: char| !c.is_ascii_digit()).next()?.parse::<u64>().ok()
        };
        if let Some(token) = token("holding the planner's lease ") {
            let to = peer.ends.iter().find(|end| **end >= at).copied().unwrap_or_else(now);
            held.push(Held { token, from: at, to });
        } else if let Some(lost) = line.contains(" is lost").then(|| token("the planner's lease ")).flatten()
        {
            let of = held.iter_mut().find(|held| held.token == lost).expect("what is lost was held");
            of.to = at;
        }
    }
    held
}

/// At no time two holders, and each with a higher token than all before.
pub(super) fn check_one_holder_at_a_time(mut held: Vec<Held>) {
    held.sort_by_key(|held| held.from);
    for pair in held.windows(2) {
        assert!(pair[0].to <= pair[1].from, "two at once: {pair:?}");
        assert!(pair[0].token < pair[1].token, "tokens fall: {pair:?}");
    }
}

pub(super) fn now() -> Timestamp {
    Clock::system().now()
}

/// Ids of all calls in a ledger.
pub(super) fn ids(ledger: &Path) -> Vec<String> {
    let rows = breakeven::ledger::query::recent(ledger, usize::MAX).unwrap();
    rows.iter().map(|row| row.id.hyphenated().to_string()).collect()
}
