//! The replicas of one backend: which of them takes a call, and how they are started, watched, stopped and
//! paid for.
//!
//! The request path reads atomics ([`replica`]). The thinking is a state machine without I/O (`roster`), and
//! [`Fleet::tick`] joins it to the world: it hears what commands, webhooks and probes have shown, takes one
//! step, and sets off what the step asks for as tasks that report back. It never waits, so one slow replica
//! does not delay another, and traffic never waits for a cold start: [`Fleet::acquire`] says at once that
//! there is no room.
//!
//! docs/replicas.md is the owner's view of it.

mod address;
mod command;
pub mod event;
pub mod kubernetes;
mod order;
mod reins;
pub mod rent;
pub mod replica;
mod roster;
pub mod server_metrics;
mod slot;
mod tasks;
pub mod webhook;

use std::fmt;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;
use tracing::{info, warn};

pub use address::Lookup;
pub use event::{FleetEvent, FleetEventKind};
pub use rent::RentDelta;
pub use replica::{Endpoint, Lease, Replica, ReplicaState};
pub use roster::addresses::DNS_INTERVAL;

use crate::clock::Clock;
use crate::config::{Addresses, Backend, BackendKind, Control, pattern};
use crate::economics::{self, Billing, Capacity, NanoUsd, PoolSpec, Timestamp};
use crate::health::{Circuit, CircuitState};
use order::{Action, Report};
use reins::Process;
use roster::{Owner, Roster, Rules};
use tasks::{About, Hands};

/// Real time between two ticks, unless something happens before.
pub const TICK: Duration = Duration::from_millis(250);
/// How often a server's own queue is read.
pub const QUEUE_INTERVAL: Duration = Duration::from_secs(1);
/// At our exit, stops that are on their way are waited for so long.
pub const EXIT_PATIENCE: Duration = Duration::from_secs(30);
/// Target that nobody has set.
const NO_TARGET: u32 = u32::MAX;

/// Where events go besides the log. It is called between steps, and must not block.
pub type EventSink = Box<dyn Fn(FleetEvent) + Send + Sync>;

/// The replicas of one backend. An API is a fleet of one that is always there and costs no rent.
pub struct Fleet {
    name: String,
    replicas: Arc<[Arc<Replica>]>,
    clock: Clock,
    target: AtomicU32,
    /// Until when the target is in force, in milliseconds since the Unix epoch.
    target_until: AtomicU64,
    /// Milliseconds until what we say has reached the other proxies and their answer is here; 0: we are alone.
    company: AtomicU64,
    changed: Arc<Notify>,
    hands: Arc<Hands>,
    desk: Mutex<Desk>,
    events: EventSink,
}

/// What only ticks touch.
struct Desk {
    roster: Roster,
    tasks: JoinSet<()>,
    reports: mpsc::Receiver<Report>,
    sender: mpsc::Sender<Report>,
    /// The last start of each replica, which may still be under way.
    processes: Vec<Option<Arc<Process>>>,
    changed: Arc<Notify>,
}

/// Why [`Fleet::acquire`] gives no lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Availability {
    /// None is ready and well.
    NoReplica,
    /// Every ready one is full.
    Full,
    Room,
}

/// A replica, for the status page.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ReplicaView {
    pub replica: u32,
    pub base_url: String,
    pub state: ReplicaState,
    pub in_flight: u32,
    /// Calls that wait inside the server, if it says.
    pub waiting: Option<u32>,
    /// When it was ordered to start, or found running.
    pub began_at: Option<Timestamp>,
    /// Starts that failed or ended early, in a row.
    pub failures: u32,
    /// `closed`, `open` or `half_open`.
    pub circuit: &'static str,
}

impl Fleet {
    /// A fleet whose events are only logged.
    pub fn new(backend: &Backend, clock: Clock) -> Arc<Self> {
        Self::with_events(backend, clock, Box::new(|_| {}))
    }

    /// A fleet that tells `events` of every change.
    ///
    /// # Panics
    /// When the system's TLS cannot be set up.
    pub fn with_events(backend: &Backend, clock: Clock, events: EventSink) -> Arc<Self> {
        Self::with_lookup(backend, clock, events, address::system())
    }

    /// The same, with another way to look names up.
    ///
    /// # Panics
    /// When the system's TLS cannot be set up.
    pub fn with_lookup(backend: &Backend, clock: Clock, events: EventSink, lookup: Lookup) -> Arc<Self> {
        let pool = backend.pool().cloned().unwrap_or_else(nothing_rented);
        let control = control(backend);
        let urls = address::of_replicas(backend, &pool, control);
        let replicas: Arc<[Arc<Replica>]> = (0..)
            .zip(&urls)
            .map(|(index, url)| {
                let circuit = Circuit::new(&backend.circuit);
                let replica = Replica::new(index, url.clone(), pool.capacity.max_in_flight, circuit);
                Arc::new(match backend.addresses {
                    Addresses::Urls => replica,
                    Addresses::Dns => replica.found_by_name(),
                })
            })
            .collect();
        let roster = Roster::new(rules(backend, pool, control, &urls), &replicas, clock.now());
        let changed = Arc::new(Notify::new());
        let (sender, reports) = mpsc::channel(4 * replicas.len().max(1) + 2);
        let hands = Hands::new(backend, control.clone(), Arc::clone(&replicas), clock.clone(), lookup);
        let desk = Desk {
            roster,
            tasks: JoinSet::new(),
            reports,
            sender,
            processes: vec![None; replicas.len()],
            changed: Arc::clone(&changed),
        };
        Arc::new(Self {
            name: backend.name.clone(),
            replicas,
            clock,
            target: AtomicU32::new(NO_TARGET),
            target_until: AtomicU64::new(u64::MAX),
            company: AtomicU64::new(0),
            changed,
            hands: Arc::new(hands),
            desk: Mutex::new(desk),
            events,
        })
    }

    /// Lets orders bear the token of the planner's lease, which is there while it was ever held. Said once.
    pub fn order_under(&self, token: Arc<AtomicU64>) {
        drop(self.hands.token.set(token));
    }

    /// A place for one call on the ready replica with the fewest calls in flight; none when all are full or
    /// none is ready ([`Self::availability`] tells which). Never waits, takes no lock.
    pub fn acquire(&self) -> Option<Lease> {
        self.acquire_near(None)
    }

    /// As [`Self::acquire`], preferring the replica in that position.
    pub fn acquire_near(&self, home: Option<usize>) -> Option<Lease> {
        replica::acquire(&self.replicas, home, self.clock.now())
    }

    pub fn availability(&self) -> Availability {
        self.availability_at(self.clock.now())
    }

    /// As [`Self::availability`], for who has just looked at the clock.
    pub fn availability_at(&self, now: Timestamp) -> Availability {
        let mut availability = Availability::NoReplica;
        for replica in self.replicas.iter().filter(|replica| replica.is_serving(now)) {
            if replica.has_room(now) {
                return Availability::Room;
            }
            availability = Availability::Full;
        }
        availability
    }

    /// Replicas that are held: draining and stopping ones are let go already, though still paid for.
    pub fn counts(&self) -> economics::Fleet {
        economics::Fleet {
            starting: self.count(ReplicaState::Starting),
            ready: self.count(ReplicaState::Ready),
        }
    }

    /// Replicas in a state.
    pub fn count(&self, state: ReplicaState) -> u32 {
        let count = self.replicas.iter().filter(|replica| replica.state() == state).count();
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    /// Calls in flight over all replicas.
    pub fn in_flight(&self) -> u32 {
        self.replicas.iter().map(|replica| replica.in_flight()).sum()
    }

    /// How many replicas there can be.
    pub fn size(&self) -> u32 {
        u32::try_from(self.replicas.len()).unwrap_or(u32::MAX)
    }

    pub fn replicas(&self) -> &[Arc<Replica>] {
        &self.replicas
    }

    /// What the other proxies should know: calls in flight on each replica, and whether it is about to stop.
    pub fn news(&self) -> Vec<(u32, bool)> {
        let is_leaving = |state| matches!(state, ReplicaState::Draining | ReplicaState::Stopping);
        self.replicas.iter().map(|replica| (replica.in_flight(), is_leaving(replica.state()))).collect()
    }

    /// Hears the same of the other proxies; what they do not mention they do not use. A replica is stopped when
    /// their calls have ended too, and not before they can have heard of it, which takes `round_trip`.
    pub fn hear_others(&self, news: &[(u32, bool)], round_trip: Duration) {
        for (index, replica) in self.replicas.iter().enumerate() {
            let (in_flight, is_leaving) = news.get(index).copied().unwrap_or_default();
            replica.hear_others(in_flight, is_leaving);
        }
        self.company.store(economics::time::millis(round_trip), Ordering::Relaxed);
    }

    /// Says how many replicas to hold. Until somebody does, nothing is started or stopped.
    pub fn set_target(&self, replicas: u32) {
        self.set_target_until(replicas, Timestamp::from_millis(u64::MAX));
    }

    /// Says how many replicas to hold until `end`; then it is as if the target was taken back. A lease that ends
    /// binds us even if we were stopped meanwhile and nobody could say so.
    pub fn set_target_until(&self, replicas: u32, end: Timestamp) {
        self.target_until.store(end.as_millis(), Ordering::SeqCst);
        let target = replicas.min(NO_TARGET - 1);
        if self.target.swap(target, Ordering::SeqCst) != target {
            self.changed.notify_one();
        }
    }

    /// Takes the target back, because another process decides from now on: nothing is started or stopped any
    /// more, and replicas are found by their address.
    pub fn clear_target(&self) {
        self.target.store(NO_TARGET, Ordering::SeqCst);
    }

    /// What [`Self::set_target`] said last, while it is in force.
    pub fn target(&self) -> Option<u32> {
        let target = self.target.load(Ordering::SeqCst);
        let is_over = self.clock.now().as_millis() >= self.target_until.load(Ordering::SeqCst);
        (target != NO_TARGET && !is_over).then_some(target)
    }

    /// Start-up time as measured; the configured one until a start has been seen.
    pub fn learned_startup(&self) -> Duration {
        self.desk().roster.learned_startup()
    }

    /// Start-up time as measured; none until a start has been seen.
    pub fn measured_startup(&self) -> Option<Duration> {
        self.desk().roster.measured_startup()
    }

    /// Rent that fell due since the last call. Intervals are adjacent, and their sum is exact.
    pub fn accrue(&self, now: Timestamp) -> RentDelta {
        self.desk().roster.accrue(now)
    }

    pub fn snapshot(&self) -> Vec<ReplicaView> {
        let now = self.clock.now();
        let desk = self.desk();
        let view = |(index, replica): (usize, &Arc<Replica>)| {
            let (began_at, failures) = desk.roster.history(index);
            ReplicaView {
                replica: replica.index,
                base_url: replica.url().into_owned(),
                state: replica.state(),
                in_flight: replica.in_flight(),
                waiting: replica.waiting(now),
                began_at,
                failures,
                circuit: CircuitState::as_str(replica.circuit.state(now)),
            }
        };
        self.replicas.iter().enumerate().map(view).collect()
    }

    /// One step: hears what has happened, moves towards the target, sets off what is due. Must be called
    /// inside a tokio runtime; does not wait.
    pub fn tick(&self, now: Timestamp) {
        let events = {
            let mut guard = self.desk();
            let desk = &mut *guard;
            while desk.tasks.try_join_next().is_some() {}
            while let Ok(report) = desk.reports.try_recv() {
                desk.roster.hear(report, now);
            }
            desk.roster.keep_company(Duration::from_millis(self.company.load(Ordering::Relaxed)));
            for action in desk.roster.step(self.target(), now) {
                desk.set_off(action, &self.hands, self.target().unwrap_or(0));
            }
            desk.roster.take_events()
        };
        for (replica, kind) in events {
            self.tell(FleetEvent { at: now, backend: self.name.clone(), replica, kind });
        }
    }

    /// Returns when a command, a webhook or a probe has something for the next [`Self::tick`], or the target
    /// has changed.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Ticks until `shutdown` says so. Then servers that only we can stop (start commands that stay in the
    /// foreground, without a stop command) are stopped; others go on, and the next process finds them by
    /// their address. Call it after traffic has drained; accrue once more when it has returned.
    pub async fn run(self: Arc<Self>, mut shutdown: watch::Receiver<bool>) {
        loop {
            self.tick(self.clock.now());
            tokio::select! {
                () = self.changed() => {}
                () = tokio::time::sleep(TICK) => {}
                // An error says that whoever could shut us down is gone.
                _ = shutdown.wait_for(|asked| *asked) => break,
            }
        }
        if tokio::time::timeout(EXIT_PATIENCE, self.release()).await.is_err() {
            warn!(backend = %self.name, "replicas of `{}` have not confirmed their stop; look after them", self.name);
        }
    }

    /// Stops what has no owner without us, and waits for stops that are on their way.
    pub async fn release(&self) {
        self.clear_target();
        {
            let mut desk = self.desk();
            let Desk { roster, processes, .. } = &mut *desk;
            roster.release();
            let runs = |replica: u32| {
                processes[replica as usize].as_ref().is_some_and(|process| process.is_running())
            };
            if self.hands.stops_by_signal() {
                roster.abandon(self.clock.now(), runs);
            }
        }
        loop {
            self.tick(self.clock.now());
            if !self.desk().roster.is_stopping() {
                return;
            }
            tokio::select! {
                () = self.changed() => {}
                () = tokio::time::sleep(TICK) => {}
            }
        }
    }

    fn tell(&self, event: FleetEvent) {
        if event.kind.is_trouble() {
            warn!(backend = %self.name, replica = event.replica, kind = event.kind.as_str(), "{event}");
        } else {
            info!(backend = %self.name, replica = event.replica, kind = event.kind.as_str(), "{event}");
        }
        (self.events)(event);
    }

    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Desk {
    fn set_off(&mut self, action: Action, hands: &Arc<Hands>, target: u32) {
        let hands = Arc::clone(hands);
        match action {
            Action::Start { replica, order } => {
                let (process, reins) = Process::new();
                self.processes[replica as usize] = Some(Arc::new(process));
                self.spawn(tasks::start(hands, About { replica, order, target }, reins));
            }
            Action::Stop { replica, order, was_ready } => {
                let process = self.processes[replica as usize].clone();
                self.spawn(tasks::stop(hands, About { replica, order, target }, process, was_ready));
            }
            Action::Probe { replica, order } => self.spawn(tasks::look(hands, replica, order)),
            Action::ReadQueue { replica } => self.spawn(tasks::read_queue(hands, replica)),
            Action::Scale { count } => self.spawn(tasks::scale(hands, count)),
            Action::Resolve => self.spawn(tasks::resolve(hands)),
        }
    }

    fn spawn(&mut self, task: impl Future<Output = Option<Report>> + Send + 'static) {
        let sender = self.sender.clone();
        let changed = Arc::clone(&self.changed);
        self.tasks.spawn(async move {
            if let Some(report) = task.await
                && sender.send(report).await.is_ok()
            {
                changed.notify_one();
            }
        });
    }
}

impl fmt::Debug for Fleet {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Fleet")
            .field("backend", &self.name)
            .field("replicas", &self.replicas)
            .finish_non_exhaustive()
    }
}

fn control(backend: &Backend) -> &Control {
    match &backend.kind {
        BackendKind::Api => &Control::None,
        BackendKind::SelfHosted(own) => &own.control,
    }
}

/// An API, seen as a pool: no rent, and no limit of ours on its calls.
fn nothing_rented() -> PoolSpec {
    let capacity =
        Capacity { input_tokens_per_second: 1, output_tokens_per_second: 1, max_in_flight: u32::MAX };
    PoolSpec {
        hourly: NanoUsd::ZERO,
        billing: Billing::PerUse,
        request_fee: NanoUsd::ZERO,
        capacity,
        startup: Duration::ZERO,
        minimum: Duration::ZERO,
        max_replicas: 1,
    }
}

fn rules(backend: &Backend, pool: PoolSpec, control: &Control, urls: &[String]) -> Rules {
    let owner = match control {
        Control::None => Owner::Others,
        Control::Command { stop, .. } => Owner::Us { can_stop_strangers: !stop.is_empty() },
        Control::Webhook { .. } => Owner::Us { can_stop_strangers: true },
        // Numbered addresses are those of numbered pods, of which the highest goes first.
        Control::Kubernetes(_) => Owner::Scale {
            stops_highest: backend.base_urls.len() > 1
                || backend.base_urls.iter().any(|url| pattern::is_pattern(url)),
        },
    };
    let is_resolved = backend.addresses == Addresses::Dns;
    // A replica that we start has to be seen before it takes calls, with or without a health path.
    let is_probed = backend.health.path.is_some() || owner != Owner::Others || is_resolved;
    let has_queue = matches!(&backend.kind, BackendKind::SelfHosted(own) if own.metrics_url.is_some());
    Rules {
        pool,
        owner,
        probe_every: is_probed.then_some(backend.health.interval),
        probe_failures: backend.circuit.failures,
        longest_call: backend.timeouts.total,
        one_address: !is_resolved && urls.len() > 1 && urls.iter().all(|url| *url == urls[0]),
        is_resolved,
        queue_every: has_queue.then_some(QUEUE_INTERVAL),
    }
}
