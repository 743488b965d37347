//! One replica as the request path sees it: a handful of atomics, and leases that give themselves back.
//!
//! Taking a lease raises `in_flight` first and looks at the state again after; draining sets the state first
//! and looks at `in_flight` after. Both in sequentially consistent order, so that a call never lands on a
//! replica whose stop has been ordered.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use http::Uri;
use serde::Serialize;

use super::server_metrics::Queue;
use crate::economics::Timestamp;
use crate::health::Circuit;

/// A replica counts as full when more calls wait in its server's own queue than this share of what it may
/// have in flight (one waiting call is always tolerated: it is there for an instant at each arrival).
pub const QUEUE_SHARE: u32 = 16;

/// A reading of the server's queue is believed for so long.
pub const QUEUE_FRESH: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ReplicaState {
    Stopped,
    Starting,
    Ready,
    /// Takes no new calls; stops when the last one has ended.
    Draining,
    /// The stop is ordered and not yet confirmed; still paid for.
    Stopping,
    /// Its start failed or it was lost; tried again later, or, if others control it, when it answers again.
    Failed,
}

impl ReplicaState {
    pub const ALL: [Self; 6] =
        [Self::Stopped, Self::Starting, Self::Ready, Self::Draining, Self::Stopping, Self::Failed];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stopped => "stopped",
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Stopping => "stopping",
            Self::Failed => "failed",
        }
    }
}

/// Where a replica is now, when its address is found by a name. None: nowhere.
pub type Endpoint = ArcSwapOption<SocketAddr>;

/// One copy of the model server.
#[derive(Debug)]
pub struct Replica {
    /// 0-based.
    pub index: u32,
    /// Without a trailing slash. With an `endpoint` its host is the name that all replicas share.
    pub base_url: String,
    /// The replica's own address, when it is one of those that a name has.
    pub endpoint: Option<Arc<Endpoint>>,
    /// What calls to this replica have shown. A lease's owner reports to it.
    pub circuit: Circuit,
    max_in_flight: u32,
    in_flight: AtomicU32,
    /// Calls of other proxies, as last heard.
    others_in_flight: AtomicU32,
    /// Another proxy, which orders replicas, is about to stop it.
    is_leaving: AtomicBool,
    state: AtomicU8,
    /// Calls waiting in the server (upper half) and the second of the reading (lower half).
    queue: AtomicU64,
}

impl Replica {
    pub(super) fn new(index: u32, base_url: String, max_in_flight: u32, circuit: Circuit) -> Self {
        Self {
            index,
            base_url,
            endpoint: None,
            circuit,
            max_in_flight,
            in_flight: AtomicU32::new(0),
            others_in_flight: AtomicU32::new(0),
            is_leaving: AtomicBool::new(false),
            state: AtomicU8::new(0),
            queue: AtomicU64::new(0),
        }
    }

    /// The same, at an address that is found by the name in its base URL, and that it does not have yet.
    pub(super) fn found_by_name(self) -> Self {
        Self { endpoint: Some(Arc::default()), ..self }
    }

    /// Where it is now, if that is found by a name.
    pub fn address(&self) -> Option<SocketAddr> {
        self.endpoint.as_ref().and_then(|endpoint| endpoint.load().as_deref().copied())
    }

    pub(super) fn set_address(&self, address: Option<SocketAddr>) {
        if let Some(endpoint) = &self.endpoint {
            endpoint.store(address.map(Arc::new));
        }
    }

    /// Whether there is somewhere to send a call to.
    pub(super) fn has_address(&self) -> bool {
        self.endpoint.is_none() || self.address().is_some()
    }

    /// Its base URL, with its own address in the place of a name that it shares.
    pub fn url(&self) -> Cow<'_, str> {
        let own = self.address().and_then(|address| {
            let uri: Uri = self.base_url.parse().ok()?;
            Some(format!("{}://{address}{}", uri.scheme_str()?, uri.path().trim_end_matches('/')))
        });
        own.map_or(Cow::Borrowed(self.base_url.as_str()), Cow::Owned)
    }

    pub fn state(&self) -> ReplicaState {
        ReplicaState::ALL[usize::from(self.state.load(Ordering::SeqCst))]
    }

    pub(super) fn set_state(&self, state: ReplicaState) {
        self.state.store(state as u8, Ordering::SeqCst);
    }

    /// Leases that are out.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::SeqCst)
    }

    /// Calls in flight there from other proxies, as last heard.
    pub fn others_in_flight(&self) -> u32 {
        self.others_in_flight.load(Ordering::Relaxed)
    }

    pub(super) fn hear_others(&self, in_flight: u32, is_leaving: bool) {
        self.others_in_flight.store(in_flight, Ordering::Relaxed);
        self.is_leaving.store(is_leaving, Ordering::SeqCst);
    }

    /// Whether it takes calls, and nobody is about to stop it.
    fn is_open(&self) -> bool {
        self.state() == ReplicaState::Ready && !self.is_leaving.load(Ordering::SeqCst)
    }

    /// Calls that wait inside the server, if it was asked lately.
    pub fn waiting(&self, now: Timestamp) -> Option<u32> {
        let queue = self.queue.load(Ordering::Relaxed);
        let read_at = queue & u64::from(u32::MAX);
        let fresh = queue != 0 && (now.as_millis() / 1000).saturating_sub(read_at) <= QUEUE_FRESH.as_secs();
        fresh.then(|| u32::try_from(queue >> 32).unwrap_or(u32::MAX))
    }

    pub(super) fn note_queue(&self, now: Timestamp, queue: &Queue) {
        let second = (now.as_millis() / 1000).min(u64::from(u32::MAX));
        self.queue.store((u64::from(queue.waiting) << 32) | second, Ordering::Relaxed);
    }

    /// Whether a call may be sent there at all.
    pub(super) fn is_serving(&self, now: Timestamp) -> bool {
        self.is_open() && (self.circuit.is_closed() || self.circuit.would_admit(now))
    }

    pub(super) fn has_room(&self, now: Timestamp) -> bool {
        let queued =
            self.waiting(now).is_some_and(|waiting| waiting > (self.max_in_flight / QUEUE_SHARE).max(1));
        self.in_flight().saturating_add(self.others_in_flight()) < self.max_in_flight && !queued
    }

    /// Takes a lease, unless it became full, unready or refused the trial since it was chosen.
    pub(super) fn lease(self: &Arc<Self>, now: Timestamp) -> Option<Lease> {
        self.in_flight
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |in_flight| {
                (in_flight < self.max_in_flight).then(|| in_flight + 1)
            })
            .ok()?;
        let lease = Lease { replica: Arc::clone(self) };
        let usable = self.is_open() && self.circuit.admits(now);
        usable.then_some(lease)
    }
}

/// The right to have one call in flight on a replica. Dropping it gives it back; until then a draining
/// replica is kept.
#[derive(Debug)]
#[must_use = "dropping a lease gives it back"]
pub struct Lease {
    replica: Arc<Replica>,
}

impl Deref for Lease {
    type Target = Replica;

    fn deref(&self) -> &Replica {
        &self.replica
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let before = self.replica.in_flight.fetch_sub(1, Ordering::SeqCst);
        debug_assert!(before > 0, "a lease is given back once");
    }
}

/// The serving replica with the fewest calls in flight, among those with room. Ties go to the lowest index,
/// so that the replicas started last, which stop first, are the first to be idle.
///
/// `home` is preferred, where the call's prompt is cached, unless it is busier than most: consistent hashing
/// with bounded loads (Mirrokni, Thorup and Zadimoghaddam 2018), without the hashing.
pub(super) fn acquire(replicas: &[Arc<Replica>], home: Option<usize>, now: Timestamp) -> Option<Lease> {
    if let Some(home) = home.and_then(|index| replicas.get(index))
        && home.is_serving(now)
        && home.has_room(now)
        && bears_one_more(replicas, home, now)
        && let Some(lease) = home.lease(now)
    {
        return Some(lease);
    }
    // Each round can only fail because another caller was faster; the bound is for the pathological case.
    for _ in 0..=2 * replicas.len() {
        let best = replicas
            .iter()
            .filter(|replica| replica.is_serving(now) && replica.has_room(now))
            .min_by_key(|replica| replica.in_flight().saturating_add(replica.others_in_flight()))?;
        if let Some(lease) = best.lease(now) {
            return Some(lease);
        }
    }
    None
}

/// Whether a replica with one more call has at most [`MOST_LOAD`] times the mean of those that serve.
fn bears_one_more(replicas: &[Arc<Replica>], replica: &Replica, now: Timestamp) -> bool {
    let serving = replicas.iter().filter(|other| other.is_serving(now));
    let (calls, count) = serving.fold((1, 0), |(calls, count), other| (calls + other.in_flight(), count + 1));
    let (more, than) = MOST_LOAD;
    // Rounded up: a replica may always have one call.
    replica.in_flight() < (calls * more).div_ceil(count.max(1) * than)
}

/// A replica is preferred up to this multiple of the mean load: five quarters.
const MOST_LOAD: (u32, u32) = (5, 4);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_secs(1_000_000 + seconds)
    }

    fn replicas(count: u32, max_in_flight: u32) -> Vec<Arc<Replica>> {
        let settings = config::Circuit { failures: 1, open_for: Duration::from_secs(10) };
        let replica = |index| {
            let replica =
                Replica::new(index, format!("http://r{index}"), max_in_flight, Circuit::new(&settings));
            replica.set_state(ReplicaState::Ready);
            Arc::new(replica)
        };
        (0..count).map(replica).collect()
    }

    #[test]
    fn every_state_is_stored_and_read_back() {
        let replica = &replicas(1, 1)[0];
        for state in ReplicaState::ALL {
            replica.set_state(state);
            assert_eq!(replica.state(), state);
        }
    }

    #[test]
    fn a_replica_found_by_a_name_has_the_url_of_its_own_address() {
        let circuit = || Circuit::new(&config::Circuit { failures: 1, open_for: Duration::from_secs(10) });
        let url = "http://vllm.models.svc:8000/v1";
        let replica = Replica::new(0, url.to_owned(), 1, circuit()).found_by_name();
        assert!(!replica.has_address());
        assert_eq!(replica.url(), url);
        replica.set_address(Some("10.0.0.7:8000".parse().unwrap()));
        assert_eq!(replica.url(), "http://10.0.0.7:8000/v1");
        replica.set_address(Some("[fd00::7]:8000".parse().unwrap()));
        assert_eq!(replica.url(), "http://[fd00::7]:8000/v1");
        assert!(Replica::new(0, url.to_owned(), 1, circuit()).has_address());
    }

    #[test]
    fn leases_go_where_the_fewest_are_and_come_back_when_dropped() {
        let replicas = replicas(2, 2);
        let leases: Vec<_> = (0..4).map(|_| acquire(&replicas, None, at(0)).unwrap()).collect();
        assert_eq!(leases.iter().map(|lease| lease.index).collect::<Vec<_>>(), [0, 1, 0, 1]);
        assert!(acquire(&replicas, None, at(0)).is_none());
        drop(leases);
        assert!(replicas.iter().all(|replica| replica.in_flight() == 0));
    }

    #[test]
    fn a_call_goes_where_its_prompt_is_cached_unless_that_is_the_busiest() {
        let replicas = replicas(3, 8);
        let lease = |home| acquire(&replicas, home, at(0)).unwrap();
        let mut leases = vec![lease(Some(2)), lease(Some(2))];
        assert_eq!(leases.iter().map(|lease| lease.index).collect::<Vec<_>>(), [2, 0], "one in flight there");
        leases.extend([lease(None), lease(Some(1))]);
        assert_eq!(leases[2..].iter().map(|lease| lease.index).collect::<Vec<_>>(), [1, 1]);
        assert_eq!(lease(Some(7)).index, 0, "there is no such replica any more");
        replicas[2].set_state(ReplicaState::Draining);
        assert_eq!(lease(Some(2)).index, 0);
    }

    #[test]
    fn only_ready_replicas_are_leased() {
        let replicas = replicas(1, 1);
        for state in ReplicaState::ALL {
            replicas[0].set_state(state);
            assert_eq!(acquire(&replicas, None, at(0)).is_some(), state == ReplicaState::Ready, "{state:?}");
        }
        assert_eq!(replicas[0].in_flight(), 0);
    }

    #[test]
    fn an_open_circuit_hides_a_replica_and_one_trial_brings_it_back() {
        let replicas = replicas(1, 4);
        replicas[0].circuit.failed(at(0), None);
        assert!(acquire(&replicas, None, at(9)).is_none());
        let trial = acquire(&replicas, None, at(10)).unwrap();
        assert!(acquire(&replicas, None, at(10)).is_none());
        trial.circuit.succeeded();
        assert!(acquire(&replicas, None, at(10)).is_some());
    }

    #[test]
    fn a_queue_in_the_server_counts_as_full_until_the_reading_is_old() {
        let replicas = replicas(1, 32);
        let queue = |waiting| Queue { running: 4, waiting, cache_usage: None };
        replicas[0].note_queue(at(0), &queue(2));
        assert!(acquire(&replicas, None, at(0)).is_some());
        replicas[0].note_queue(at(0), &queue(3));
        assert!(acquire(&replicas, None, at(10)).is_none());
        assert!(acquire(&replicas, None, at(11)).is_some());
    }

    #[test]
    fn however_many_threads_lease_the_bound_holds_and_nothing_leaks() {
        let replicas = replicas(2, 3);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..2_000 {
                        let lease = acquire(&replicas, None, at(0));
                        assert!(replicas.iter().all(|replica| replica.in_flight() <= 3));
                        drop(lease);
                    }
                });
            }
            scope.spawn(|| {
                for round in 0..500 {
                    let state = if round % 2 == 0 { ReplicaState::Draining } else { ReplicaState::Ready };
                    replicas[1].set_state(state);
                }
            });
        });
        assert!(replicas.iter().all(|replica| replica.in_flight() == 0));
    }
}
