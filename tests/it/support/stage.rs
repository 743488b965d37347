//! A fleet under a clock that the test moves.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use breakeven::clock::Clock;
use breakeven::config::Backend;
use breakeven::economics::Timestamp;
use breakeven::fleet::{EventSink, Fleet, FleetEvent, FleetEventKind, Lookup, ReplicaState};

/// No step of these tests takes nearly as long.
pub(crate) const DEADLINE: Duration = Duration::from_mins(1);
pub(crate) const START: Timestamp = Timestamp::from_secs(1_700_000_000);

/// A fleet, its clock and what it told. The clock stands still while requests are under way, and moves a second
/// when nothing is.
pub(crate) struct Stage {
    pub fleet: Arc<Fleet>,
    pub clock: Clock,
    pub events: Arc<Mutex<Vec<FleetEvent>>>,
}

impl Stage {
    pub(crate) fn new(backend: &Backend) -> Self {
        Self::made_by(|clock, events| Fleet::with_events(backend, clock, events))
    }

    pub(crate) fn with_lookup(backend: &Backend, lookup: Lookup) -> Self {
        Self::made_by(|clock, events| Fleet::with_lookup(backend, clock, events, lookup))
    }

    fn made_by(make: impl FnOnce(Clock, EventSink) -> Arc<Fleet>) -> Self {
        let clock = Clock::manual(START);
        let events = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&events);
        let sink = Box::new(move |event| heard.lock().unwrap().push(event));
        Self { fleet: make(clock.clone(), sink), clock, events }
    }

    /// Ticks, a second of the manual clock each, until `is_done`. Between ticks it waits for what the fleet has
    /// set off.
    pub(crate) async fn until(&self, is_done: impl Fn(&Fleet) -> bool) {
        let work = async {
            loop {
                self.fleet.tick(self.clock.now());
                if is_done(&self.fleet) {
                    return;
                }
                tokio::select! {
                    () = self.fleet.changed() => {}
                    // Nothing is under way when the fleet waits for the time alone.
                    () = tokio::time::sleep(Duration::from_millis(20)) => {}
                }
                self.clock.advance(Duration::from_secs(1));
            }
        };
        let outcome = tokio::time::timeout(DEADLINE, work).await;
        assert!(outcome.is_ok(), "not reached: {:?}\n{:#?}", self.fleet.snapshot(), self.sentences());
    }

    pub(crate) async fn until_count(&self, state: ReplicaState, count: u32) {
        self.until(|fleet| fleet.count(state) == count).await;
    }

    /// What the fleet told, as its owner reads it.
    pub(crate) fn sentences(&self) -> Vec<String> {
        self.events.lock().unwrap().iter().map(ToString::to_string).collect()
    }

    pub(crate) fn has_told(&self, what: &str) -> bool {
        self.sentences().iter().any(|sentence| sentence.contains(what))
    }

    /// When the first event of a kind was told.
    pub(crate) fn when(&self, is_it: impl Fn(&FleetEventKind) -> bool) -> Timestamp {
        self.events.lock().unwrap().iter().find(|event| is_it(&event.kind)).expect("it was told").at
    }

    pub(crate) fn since_start(&self) -> Duration {
        self.clock.now().since(START)
    }
}
