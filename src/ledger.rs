//! The ledger: one row a call, with what it cost and what it would have cost elsewhere.
//!
//! **The log is the queue.** A settled call becomes one record that is appended to a journal beside the SQLite
//! file before the last byte of its response leaves, with those that its worker settles in the same turn: a process
//! that is killed loses nothing.
//! A thread imports the journal into the tables in groups, together with its position, so that no row is lost
//! and none is doubled, whenever either side is interrupted. Nothing waits in memory but rows that could not be
//! written at all, and of these a bounded number.

mod database;
pub mod export;
mod group;
mod importer;
mod journal;
pub mod once;
pub mod postgres;
pub mod query;
mod record;
mod rows;
mod spans;
mod spill;
mod writer;

use std::borrow::Cow;
use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::thread::{self, Thread};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::warn;
use uuid::Uuid;

use self::group::{Gathering, Membership};
use self::importer::{Counters, Recovered};
use self::journal::{Batch, Journal};
pub use self::spill::Abandoned;
use self::writer::Shared;
use crate::clock::Clock;
use crate::config::{Fsync, LedgerSettings};
use crate::economics::{NanoUsd, Timestamp, Usage, Work};

/// How long the end of a response waits for its row to be on disk before it leaves all the same.
const DURABLE_WAIT: Duration = Duration::from_secs(5);

/// How long [`Ledger::flush`] and the drop of the last handle wait for the threads.
const CLOSE_WAIT: Duration = Duration::from_secs(10);

/// How long [`Ledger::flush`] lets rows in memory wait for the journal's disk to take them, and how often it looks.
const BACKLOG_WAIT: Duration = Duration::from_secs(3);
const BACKLOG_LOOK: Duration = Duration::from_millis(50);

/// Why a ledger cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    #[error(
        "the ledger `{}` is in use by another breakeven: stop that one, or give this one its own `ledger.path`",
        path.display()
    )]
    InUse { path: PathBuf },
    #[error(
        "the ledger `{}` was written by a newer breakeven (schema {found}, this one knows {}): upgrade, \
         or set `ledger.path` to a new file",
        path.display(), database::SCHEMA_VERSION
    )]
    Newer { path: PathBuf, found: String },
    #[error("`{}` is not a ledger of breakeven: set `ledger.path` to another file", path.display())]
    NotALedger { path: PathBuf },
    #[error("there is no ledger at `{}` yet: `breakeven serve` makes it", path.display())]
    Missing { path: PathBuf },
    #[error(
        "an earlier breakeven has left rows in `{}`, and this one cannot read them: start that one once more and \
         stop it, which moves them to the ledger",
        path.display()
    )]
    EarlierJournal { path: PathBuf },
    #[error("cannot use `{}` for the ledger", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the ledger `{}` failed", path.display())]
    Sqlite {
        path: PathBuf,
        #[source]
        source: rusqlite::Error,
    },
}

/// A place to record calls, cheap to clone. When the last clone is dropped, what was appended is imported and
/// synced, within ten seconds.
#[derive(Debug, Clone)]
pub struct Ledger(Option<Arc<Handle>>);

/// What to wait for until an append survives a killed process, or a power cut. Who does not wait drops it, and the row
/// is written at once. It stays on the thread that appended.
#[derive(Debug)]
#[must_use = "the response ends after `Ticket::poll_written` or, with `fsync = \"always\"`, `Ledger::durable(ticket)`"]
pub struct Ticket(Place);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Nowhere, or in memory as long as the journal cannot be written.
    Nowhere,
    /// In the journal, which has had so many.
    Journal(u64),
    Group(Membership),
}

impl Ticket {
    /// Whether the process may be killed without losing the row: it is in the journal, or waits in memory because that
    /// cannot be written.
    pub fn poll_written(&self, context: &mut Context<'_>) -> Poll<()> {
        match self.0 {
            Place::Group(membership) => membership.poll_written(context),
            Place::Nowhere | Place::Journal(_) => Poll::Ready(()),
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Place::Group(membership) = self.0 {
            membership.write();
        }
    }
}

/// What the ledger has done since it was opened, in rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// In the tables, rows that an earlier process had left in the journal included.
    pub committed: u64,
    /// In the journal or, while it cannot be written, in memory.
    pub pending: u64,
    /// Lost, because the journal could not be written and too many waited in memory already.
    pub unrecorded: u64,
    /// Places where a write was cut by a full disk or a power failure.
    pub torn: u64,
    /// Files of the journal that are not wholly imported.
    pub segments: u64,
    pub last_commit: Option<Timestamp>,
}

#[derive(Debug)]
struct Handle {
    shared: Arc<Shared>,
    fsync: Fsync,
    sync_thread: Thread,
    import_thread: Thread,
    /// Each end is closed by its thread when it is done.
    done: Mutex<[Receiver<()>; 2]>,
}

impl Ledger {
    /// Opens or creates the ledger, takes its lock, and imports what an earlier process left in the journal.
    pub fn open(settings: &LedgerSettings, clock: Clock) -> Result<Self, LedgerError> {
        let counters = Arc::new(Counters::default());
        let Recovered { mut importer, directory, lock, header, next_segment } =
            importer::recover(&settings.path, clock.now(), Arc::clone(&counters))?;
        let journal = Journal::start(directory, lock, header, next_segment)?;
        importer.follow(&journal);
        let shared = Arc::new(Shared {
            journal,
            counters,
            clock,
            stop: AtomicBool::new(false),
            wanted_passes: AtomicU64::new(0),
            passes: watch::Sender::new(0),
            synced: watch::Sender::new(0),
            last_commit: AtomicU64::new(0),
            segments: AtomicU64::new(1),
            is_suspected: AtomicBool::new(false),
        });
        let io = |source| LedgerError::Io { path: settings.path.clone(), source };
        let (sync_thread, sync_done) = spawn("ledger-sync", &shared, writer::run_sync).map_err(io)?;
        let import = move |shared: &Shared| writer::run_import(shared, importer);
        let (import_thread, import_done) = spawn("ledger-import", &shared, import).map_err(io)?;
        let done = Mutex::new([sync_done, import_done]);
        Ok(Self(Some(Arc::new(Handle { shared, fsync: settings.fsync, sync_thread, import_thread, done }))))
    }

    /// A ledger that records nothing, to measure the rest of the program without it.
    pub const fn off() -> Self {
        Self(None)
    }

    /// Gathers the rows of the calls that the polling thread settles, as long as it is polled: a worker's part of the
    /// ledger. With `fsync = "always"` there is nothing to gather, because a call waits for its own row's sync.
    pub async fn gather(&self) {
        match &self.0 {
            Some(handle) if handle.fsync == Fsync::Batch => {
                Gathering(Arc::clone(&handle.shared)).await;
            }
            _ => std::future::pending().await,
        }
    }

    /// Records a call. Never blocks on anything but a `write`, and never fails: a row that cannot be written waits in
    /// memory and makes the ledger unavailable.
    pub fn append(&self, entry: &Entry<'_>) -> Ticket {
        let Some(handle) = &self.0 else { return Ticket(Place::Nowhere) };
        match group::add(&handle.shared, |records| record::write_call(records, entry)) {
            Some(membership) => Ticket(Place::Group(membership)),
            None => self.append_alone(|line| record::write_call(line, entry)),
        }
    }

    /// Records rent, at once; no response waits for it.
    pub fn append_rent(&self, rent: &RentEntry) {
        let _nobody_waits = self.append_alone(|line| record::write_rent(line, rent));
    }

    /// Records a change, at once; no response waits for it.
    pub fn append_event(&self, event: &Event) {
        let _nobody_waits = self.append_alone(|line| record::write_event(line, event));
    }

    fn append_alone(&self, write: impl Fn(&mut Vec<u8>)) -> Ticket {
        thread_local! {
            static BATCH: RefCell<Batch> = const { RefCell::new(Batch::new()) };
        }
        let Some(handle) = &self.0 else { return Ticket(Place::Nowhere) };
        let append = |batch: &mut Batch| {
            batch.clear();
            batch.add(&write);
            Ticket(handle.shared.journal.append(batch).map_or(Place::Nowhere, Place::Journal))
        };
        // A call may be settled while its thread ends and the buffer is gone.
        BATCH.try_with(|batch| append(&mut batch.borrow_mut())).unwrap_or_else(|_| append(&mut Batch::new()))
    }

    /// Waits until the append is on disk, with `fsync = "always"`; returns at once with `"batch"`, for an append
    /// that failed, and in any case after five seconds.
    pub async fn durable(&self, ticket: Ticket) {
        let (Some(handle), Place::Journal(number)) = (&self.0, ticket.0) else { return };
        if handle.fsync == Fsync::Always && !handle.wait_synced(number, DURABLE_WAIT).await {
            warn!("a row is not on disk after {DURABLE_WAIT:?}: its response ends all the same");
        }
    }

    /// Whether the next call can be recorded.
    pub fn is_available(&self) -> bool {
        self.0.as_ref().is_none_or(|handle| handle.shared.journal.is_available())
    }

    /// Why not, as a sentence for an operator.
    pub fn unavailable_reason(&self) -> Option<String> {
        self.0.as_ref()?.shared.journal.unavailable_reason()
    }

    pub fn stats(&self) -> Stats {
        let Some(handle) = &self.0 else { return Stats::default() };
        let Shared { journal, counters, last_commit, segments, .. } = &*handle.shared;
        // Read in this order, or a row in between would make the difference negative.
        let committed = counters.committed.load(Ordering::Acquire);
        let own = committed - counters.recovered.load(Ordering::Relaxed);
        Stats {
            committed,
            pending: journal.appended().saturating_sub(own) + journal.backlog(),
            unrecorded: journal.unrecorded(),
            torn: counters.torn.load(Ordering::Relaxed),
            segments: segments.load(Ordering::Relaxed),
            last_commit: Some(last_commit.load(Ordering::Relaxed))
                .filter(|millis| *millis > 0)
                .map(Timestamp::from_millis),
        }
    }

    /// Waits until everything appended before is in the tables and synced. False when it is not after ten
    /// seconds; it is in the journal then, but for rows that its disk would not take: [`Ledger::abandon`] tells.
    pub async fn flush(&self) -> bool {
        match &self.0 {
            None => true,
            Some(handle) => {
                let is_written = handle.wait_written(BACKLOG_WAIT).await;
                let appended = handle.shared.journal.appended();
                handle.wait_imported(CLOSE_WAIT).await
                    && handle.wait_synced(appended, CLOSE_WAIT).await
                    && is_written
            }
        }
    }

    /// Tells of an error that somebody had who read the tables. True when it is damage: the file is looked through
    /// then and replaced if it is so, which [`Ledger::flush`] waits for.
    pub fn report(&self, error: &LedgerError) -> bool {
        let is_damage = matches!(error, LedgerError::Sqlite { source, .. } if database::is_damage(source));
        if let Some(handle) = self.0.as_ref().filter(|_| is_damage) {
            handle.shared.is_suspected.store(true, Ordering::SeqCst);
            handle.import_thread.unpark();
        }
        is_damage
    }

    /// At the end of the process: puts the rows that are only in memory into a file in `folder`, and counts them as
    /// unrecorded. None when there are none.
    pub fn abandon(&self, folder: &Path) -> Option<Abandoned> {
        let Shared { journal, clock, .. } = &*self.0.as_ref()?.shared;
        spill::spill(journal, folder, clock.now())
    }

    /// Flushes and gives up this handle; the threads end with the last one.
    pub async fn close(self) -> bool {
        self.flush().await
    }
}

/// Imports what a killed process left in the journal, so that a report is complete. Does nothing when a
/// server has the ledger open, because that one imports by itself within a quarter of a second.
pub fn catch_up(path: &Path, now: Timestamp) -> Result<(), LedgerError> {
    let has_rows = journal::segments(&importer::directory(path)).is_ok_and(|segments| !segments.is_empty());
    if !has_rows {
        return Ok(());
    }
    match importer::recover(path, now, Arc::default()) {
        Ok(_) | Err(LedgerError::InUse { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Makes a new file's name survive a power cut: it is in the directory, which is synced by itself.
fn sync_name(path: &Path) -> std::io::Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    std::fs::File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
}

type Spawned = (Thread, Receiver<()>);

fn spawn(
    name: &str,
    shared: &Arc<Shared>,
    run: impl FnOnce(&Shared) + Send + 'static,
) -> std::io::Result<Spawned> {
    let (done, is_done) = mpsc::channel();
    let shared = Arc::clone(shared);
    let body = move || {
        run(&shared);
        // First, because the lock goes with it.
        drop(shared);
        drop(done);
    };
    let handle = thread::Builder::new().name(name.to_owned()).spawn(body)?;
    Ok((handle.thread().clone(), is_done))
}

impl Handle {
    /// Waits until no row is only in memory.
    async fn wait_written(&self, wait: Duration) -> bool {
        let written = async {
            while self.shared.journal.backlog() > 0 {
                self.sync_thread.unpark();
                tokio::time::sleep(BACKLOG_LOOK).await;
            }
        };
        timeout(wait, written).await.is_ok()
    }

    async fn wait_synced(&self, number: u64, wait: Duration) -> bool {
        let mut synced = self.shared.synced.subscribe();
        if *synced.borrow() >= number {
            return true;
        }
        self.sync_thread.unpark();
        timeout(wait, synced.wait_for(|synced| *synced >= number)).await.is_ok()
    }

    async fn wait_imported(&self, wait: Duration) -> bool {
        let wanted = self.shared.wanted_passes.fetch_add(1, Ordering::SeqCst) + 1;
        let mut passes = self.shared.passes.subscribe();
        self.import_thread.unpark();
        timeout(wait, passes.wait_for(|passes| *passes >= wanted)).await.is_ok()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.sync_thread.unpark();
        self.import_thread.unpark();
        let done = self.done.get_mut().unwrap_or_else(PoisonError::into_inner);
        for is_done in done {
            if is_done.recv_timeout(CLOSE_WAIT) == Err(mpsc::RecvTimeoutError::Timeout) {
                warn!(
                    "the ledger is busy after {CLOSE_WAIT:?}: what is left in the journal is imported next time"
                );
            }
        }
    }
}

/// One row: a logical call, however many attempts it took. Text fields are configured names or tags, never
/// prompts, keys or error bodies; they are borrowed where a call is settled, and owned where one is read back.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry<'a> {
    pub id: Uuid,
    pub opened_at: Timestamp,
    pub closed_at: Timestamp,
    /// First data event of a stream, or first byte of the body.
    pub first_token_at: Option<Timestamp>,
    /// Public id of the virtual key, empty with pass-through.
    pub key: Cow<'a, str>,
    pub team: Cow<'a, str>,
    /// `feature=rank,..`: the tags of the request as given, without the team, at most 256 bytes.
    pub tags: Cow<'a, str>,
    pub endpoint: Cow<'a, str>,
    /// Name of the route, empty for models on no route.
    pub route: Cow<'a, str>,
    pub requested_model: Cow<'a, str>,
    /// Name at the backend that served it.
    pub served_model: Cow<'a, str>,
    pub backend: Cow<'a, str>,
    pub reason: Cow<'a, str>,
    pub attempts: u32,
    /// HTTP status that the client got.
    pub status: u16,
    pub outcome: Outcome,
    pub stream: bool,
    pub usage: Usage,
    pub usage_source: UsageSource,
    /// `standard`, `batch`, `flex`, `priority`: the tier that was served.
    pub tier: Cow<'a, str>,
    /// What is attributed to this call: token charges on an API, its share of rent on a self-hosted backend.
    pub cost: NanoUsd,
    /// The same usage on the route's API offer, if it has one.
    pub api_cost: Option<NanoUsd>,
    /// The same usage as its work's share of rent on the route's self-hosted offer, if it has one.
    pub self_hosted_cost: Option<NanoUsd>,
    /// Replica-time the call takes on the route's self-hosted offer.
    pub work: Work,
    /// What attempts without an answer are estimated to be charged; part of `cost`.
    pub attempts_cost: NanoUsd,
    /// No price was known: `cost` is zero or an estimate.
    pub unpriced: bool,
    pub config_digest: Cow<'a, str>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Success,
    ClientError,
    UpstreamError,
    Timeout,
    Cancelled,
}

impl Outcome {
    pub const ALL: [Self; 5] =
        [Self::Success, Self::ClientError, Self::UpstreamError, Self::Timeout, Self::Cancelled];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::ClientError => "client_error",
            Self::UpstreamError => "upstream_error",
            Self::Timeout => "timeout",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Where a call's token counts came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UsageSource {
    UpstreamUsage,
    OwnTokenizer,
    Estimate,
    None,
}

impl UsageSource {
    pub const ALL: [Self; 4] = [Self::UpstreamUsage, Self::OwnTokenizer, Self::Estimate, Self::None];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::UpstreamUsage => "upstream_usage",
            Self::OwnTokenizer => "own_tokenizer",
            Self::Estimate => "estimate",
            Self::None => "none",
        }
    }
}

/// Rent of a self-hosted backend over an interval. Intervals of a backend are adjacent, never overlap, and
/// `attributed + idle = rent` to the nano-dollar.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RentEntry {
    pub backend: String,
    pub from: Timestamp,
    pub to: Timestamp,
    /// Replica-milliseconds paid for.
    pub replica_millis: u64,
    /// Replica-time that did work.
    pub busy: Work,
    pub rent: NanoUsd,
    /// Sum of the costs of the calls that were settled on this backend in the interval, rent share only.
    pub attributed: NanoUsd,
    /// `rent - attributed`; negative when calls were attributed more than the interval's rent.
    pub idle: NanoUsd,
}

/// A change that an owner may want to see later: preference, replicas, circuit, prices, reload.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    pub at: Timestamp,
    /// `preference`, `replicas`, `circuit`, `prices`, `reload`, `pin`.
    pub kind: String,
    /// Pool or backend it is about.
    pub subject: String,
    /// A sentence.
    pub detail: String,
}

#[cfg(test)]
pub(crate) mod testing {
    use super::{Entry, Outcome, UsageSource};
    use crate::economics::{NanoUsd, Timestamp, Usage, Work};

    /// A call that ended `n` seconds after the epoch, with everything in it that can be.
    pub(crate) fn entry(n: u64) -> Entry<'static> {
        Entry {
            id: uuid::Uuid::from_u64_pair(n, !n),
            opened_at: Timestamp::from_millis(n * 1000 - 700),
            closed_at: Timestamp::from_secs(n),
            first_token_at: Some(Timestamp::from_millis(n * 1000 - 300)),
            key: "key_1".into(),
            team: "search".into(),
            tags: "feature=rank,user=\tx".into(),
            endpoint: "chat_completions".into(),
            route: "chat".into(),
            requested_model: "gpt-4o-mini".into(),
            served_model: "gpt-4o-mini-2024-07-18".into(),
            backend: "openai".into(),
            reason: "cheapest".into(),
            attempts: 2,
            status: 200,
            outcome: Outcome::Success,
            stream: true,
            usage: Usage::new(1000 + n, 20).with_cached(500),
            usage_source: UsageSource::UpstreamUsage,
            tier: "standard".into(),
            cost: NanoUsd::from_nanos(124_500),
            api_cost: Some(NanoUsd::from_nanos(124_500)),
            self_hosted_cost: None,
            work: Work(40_000),
            attempts_cost: NanoUsd::from_nanos(7),
            unpriced: false,
            config_digest: "9f86d081884c7d65".repeat(4).into(),
        }
    }
}
