//! A real proxy in the process, between whatever servers its configuration names.

use std::net::SocketAddr;
use std::path::PathBuf;

use breakeven::clock::Clock;
use breakeven::commands::serve;
use breakeven::config;
use breakeven::economics::NanoUsd;
use breakeven::ledger::{Entry, query};
use tempfile::TempDir;

use super::Http;

/// Entries that [`Proxy::entries`] reads back.
const MOST_ENTRIES: usize = 100_000;

#[derive(Debug)]
pub(crate) struct Proxy {
    pub(crate) running: serve::Proxy,
    folder: TempDir,
    text: String,
}

impl Proxy {
    /// Starts with a configuration without `[server]`, `[ledger]` and `[log]`: free ports, a ledger of its own,
    /// one worker. `%FOLDER%` in it is a folder of its own.
    pub(crate) async fn start(text: &str) -> Self {
        Self::start_at(text, Clock::system()).await
    }

    pub(crate) async fn start_at(text: &str, clock: Clock) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("breakeven.db");
        let text = format!(
            "[server]\nlisten = \"127.0.0.1:0\"\nadmin_listen = \"127.0.0.1:0\"\nworkers = 1\n\
             [ledger]\npath = \"{}\"\n{}",
            path.display(),
            text.replace("%FOLDER%", &folder.path().to_string_lossy())
        );
        Self::begin(folder, text, clock).await
    }

    async fn begin(folder: TempDir, text: String, clock: Clock) -> Self {
        let config = config::parse(&text, "test", &config::variable)
            .unwrap_or_else(|problems| panic!("{problems}\n{text}"));
        Self { running: serve::Proxy::start(config, clock).await.unwrap(), folder, text }
    }

    /// Ends it, and begins another with the same configuration and ledger, at other ports.
    pub(crate) async fn restart(self) -> Self {
        let Self { running, folder, text } = self;
        running.shut_down(std::future::pending()).await;
        Self::begin(folder, text, Clock::system()).await
    }

    /// Waits until every backend serves.
    pub(crate) async fn ready(self) -> Self {
        let serves = async {
            for backend in &self.running.gateway.state().backends {
                while !backend.is_serving() {
                    tokio::task::yield_now().await;
                }
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(20), serves).await.expect("backends come up");
        self
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.running.address
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/v1", self.running.address)
    }

    pub(crate) fn admin_url(&self) -> String {
        format!("http://{}", self.running.admin_address)
    }

    /// A counter of dollars, summed over all series that have a label.
    pub(crate) async fn dollars(&self, name: &str, label: &str) -> NanoUsd {
        let reply = Http::new(&self.admin_url()).get("/metrics").await;
        let start = format!("{name}{{");
        let lines = reply.text().lines().filter(|line| line.starts_with(&start) && line.contains(label));
        lines.map(|line| nano_dollars(line.rsplit_once(' ').unwrap().1)).sum()
    }

    /// Everything in the ledger, newest first, once no call is in flight.
    pub(crate) async fn entries(&self) -> Vec<Entry<'static>> {
        let settled = async {
            while self.running.gateway.in_flight() > 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(20), settled).await.expect("calls end");
        assert!(self.running.gateway.ledger.flush().await);
        query::recent(&self.ledger(), MOST_ENTRIES).unwrap()
    }

    /// The file of its ledger.
    pub(crate) fn ledger(&self) -> PathBuf {
        self.folder.path().join("breakeven.db")
    }
}

/// An amount that was written in dollars.
pub(crate) fn nano_dollars(decimal: &str) -> NanoUsd {
    let (whole, fraction) = decimal.split_once('.').unwrap_or((decimal, ""));
    NanoUsd::from_nanos(format!("{whole}{fraction:0<9}").parse().unwrap())
}
