//! Notices that the configuration has changed, by content.
//!
//! Content and not file events: a `ConfigMap` changes by a symlink two folders up, and editors rename. Every
//! file that the configuration was made from is compared, so a rotated secret, a renewed certificate or a new
//! price list is a change as well.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::load::load_reading;
use super::{Config, Problems};

/// How often to call [`Watcher::poll`]: an owner who has saved the file waits about this long.
pub const POLL_INTERVAL: Duration = Duration::from_secs(2);

/// Hash of a file's content; none while it cannot be read.
type Content = Option<u64>;

/// Compares what is on disk with what was last loaded.
#[derive(Debug)]
pub struct Watcher {
    path: PathBuf,
    seen: BTreeMap<PathBuf, Content>,
    /// Keyed at random, so that nobody can write two files that are taken for one.
    hasher: RandomState,
}

impl Watcher {
    /// Loads the configuration, and remembers what it was made from.
    pub fn start(path: &Path) -> (Self, Result<Config, Problems>) {
        let mut watcher = Self { path: path.to_owned(), seen: BTreeMap::new(), hasher: RandomState::new() };
        let loaded = watcher.reload();
        (watcher, loaded)
    }

    /// The new configuration, or what is wrong with it; none when no file has changed since the last call.
    /// A bad file is reported once.
    pub fn poll(&mut self) -> Option<Result<Config, Problems>> {
        let changed = self.seen.iter().any(|(path, content)| self.content(&read(path)) != *content);
        changed.then(|| self.reload())
    }

    /// Loads whether or not anything has changed: for SIGHUP and `POST /api/reload`.
    pub fn reload(&mut self) -> Result<Config, Problems> {
        let seen = RefCell::new(BTreeMap::new());
        let note = |path: &Path| {
            let text = read(path);
            seen.borrow_mut().insert(path.to_owned(), self.content(&text));
            text
        };
        let loaded = load_reading(&self.path, &note);
        self.seen = seen.into_inner();
        loaded
    }

    fn content(&self, text: &io::Result<String>) -> Content {
        text.as_ref().ok().map(|text| self.hasher.hash_one(text))
    }

    /// The files that are compared.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.seen.keys().map(PathBuf::as_path)
    }
}

/// As the loader reads: a file that is not UTF-8 is one that cannot be read.
fn read(path: &Path) -> io::Result<String> {
    std::fs::read_to_string(path)
}

impl Config {
    /// Keys that differ and are read at the start only: a reload leaves them as they are.
    pub fn restart_needed(&self, new: &Self) -> Vec<&'static str> {
        let tls = |config: &Self| config.server.tls.is_some();
        let admin_tls = |config: &Self| config.server.admin_tls.is_some();
        let differences = [
            ("server.listen", self.server.listen != new.server.listen),
            ("server.admin_listen", self.server.admin_listen != new.server.admin_listen),
            ("server.tls", tls(self) != tls(new)),
            ("server.admin_tls", admin_tls(self) != admin_tls(new)),
            ("server.workers", self.server.workers != new.server.workers),
            ("ledger.path", self.ledger.path != new.ledger.path),
            ("ledger.fsync", self.ledger.fsync != new.ledger.fsync),
            ("ledger.postgres", self.ledger.postgres != new.ledger.postgres),
            ("shared", self.shared != new.shared),
            ("metrics.max_series", self.metrics.max_series != new.metrics.max_series),
            ("log.format", self.log.format != new.log.format),
            ("telemetry.otlp_endpoint", self.telemetry != new.telemetry),
        ];
        differences.into_iter().filter(|(_, differs)| *differs).map(|(key, _)| key).collect()
    }
}
