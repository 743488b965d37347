//! The two threads behind a ledger: one syncs the journal, one imports it.
//!
//! They are apart because a response may wait for a sync, and must not wait for the tables as well. Both look
//! at counters at intervals; no append ever wakes them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use tokio::sync::watch;
use tracing::{error, info, warn};

use super::importer::{Counters, Importer};
use super::journal::{Journal, MAX_SEGMENTS, SEGMENT_BYTES};
use crate::clock::Clock;

/// How often rows move to the tables. Each group costs a transaction, so fewer and larger ones cost less.
const IMPORT_EVERY: Duration = Duration::from_millis(250);

/// How often the journal is synced, and a failed write tried again: what a power cut can lose with `batch`.
const SYNC_EVERY: Duration = Duration::from_millis(250);

/// Pause after the tables could not be written.
const RETRY_EVERY: Duration = Duration::from_secs(1);

/// What the handle and the threads share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) journal: Journal,
    pub(super) counters: Arc<Counters>,
    pub(super) clock: Clock,
    pub(super) stop: AtomicBool,
    /// Number of passes that were asked for, and of the last that has been made.
    pub(super) wanted_passes: AtomicU64,
    pub(super) passes: watch::Sender<u64>,
    /// Appends that survive a power cut.
    pub(super) synced: watch::Sender<u64>,
    /// Milliseconds since the epoch; zero before the first commit.
    pub(super) last_commit: AtomicU64,
    pub(super) segments: AtomicU64,
    /// Somebody who reads the tables has come upon damage.
    pub(super) is_suspected: AtomicBool,
}

pub(super) fn run_sync(shared: &Shared) {
    loop {
        let stop = shared.stop.load(Ordering::SeqCst);
        shared.journal.retry();
        if let Some(appended) = shared.journal.sync() {
            shared.synced.send_if_modified(|synced| std::mem::replace(synced, appended) != appended);
        }
        if stop {
            return;
        }
        thread::park_timeout(SYNC_EVERY);
    }
}

pub(super) fn run_import(shared: &Shared, mut importer: Importer) {
    let mut is_failing = false;
    loop {
        let stop = shared.stop.load(Ordering::SeqCst);
        let wanted = shared.wanted_passes.load(Ordering::SeqCst);
        if shared.is_suspected.swap(false, Ordering::SeqCst) {
            importer.replace_if_unsound(shared.clock.now());
        }
        rotate(shared, &mut importer);
        let result = if stop { close(shared, &mut importer) } else { importer.pass() };
        note_commit(shared);
        shared.segments.store(importer.segments() as u64, Ordering::Relaxed);
        match result {
            Ok(()) => {
                if std::mem::take(&mut is_failing) {
                    info!("the ledger's tables can be written again");
                }
                shared.passes.send_replace(wanted);
            }
            Err(error) => {
                if !std::mem::replace(&mut is_failing, true) {
                    error!("{error}: {}; rows stay in the journal meanwhile", root_cause(&error));
                }
                importer.replace_if_damaged(&error, shared.clock.now());
            }
        }
        if stop {
            return;
        }
        importer.lay_out_next(&shared.journal);
        pause(shared, wanted, is_failing);
    }
}

fn close(shared: &Shared, importer: &mut Importer) -> Result<(), super::LedgerError> {
    shared.journal.retry();
    importer.close()
}

fn note_commit(shared: &Shared) {
    let committed = shared.counters.committed.load(Ordering::Relaxed);
    if shared.counters.noted.swap(committed, Ordering::Relaxed) != committed {
        shared.last_commit.store(shared.clock.now().as_millis(), Ordering::Relaxed);
    }
}

fn rotate(shared: &Shared, importer: &mut Importer) {
    let is_full = importer.segments() >= MAX_SEGMENTS;
    shared.journal.set_stalled(is_full.then(|| format!("{MAX_SEGMENTS} segments wait for import")));
    if !is_full && let Err(error) = importer.rotate(&shared.journal, SEGMENT_BYTES) {
        warn!(%error, "cannot begin a new journal segment; going on with the present one");
    }
}

fn pause(shared: &Shared, seen: u64, is_failing: bool) {
    if is_failing {
        thread::park_timeout(RETRY_EVERY);
    } else if shared.wanted_passes.load(Ordering::SeqCst) == seen {
        thread::park_timeout(IMPORT_EVERY);
    }
}

/// What is at the bottom of an error; empty when it has no cause.
pub(super) fn root_cause(error: &dyn std::error::Error) -> String {
    std::iter::successors(error.source(), |error| error.source())
        .last()
        .map(ToString::to_string)
        .unwrap_or_default()
}
