//! A circuit breaker: after some failures in a row a backend is left alone for a while, then tried once.
//!
//! Two atomics hold it. `gate` is zero while closed; otherwise it is the instant at which the next call may
//! try, in milliseconds, shifted left by one, and its lowest bit says that a trial is out. A trial that never
//! reports (its client hung up) does not block the next one: the gate opens again after `open_for`.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use crate::config;
use crate::economics::Timestamp;

/// A `Retry-After` beyond this is cut to it, so that one odd answer cannot retire a backend.
pub const MAX_RETRY_AFTER: Duration = Duration::from_mins(10);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CircuitState {
    Closed,
    Open,
    HalfOpen,
}

impl CircuitState {
    pub const ALL: [Self; 3] = [Self::Closed, Self::Open, Self::HalfOpen];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half_open",
        }
    }
}

/// The circuit of one backend or replica.
#[derive(Debug)]
pub struct Circuit {
    failures_to_open: u32,
    open_for: Duration,
    failures: AtomicU32,
    gate: AtomicU64,
}

impl Circuit {
    pub fn new(settings: &config::Circuit) -> Self {
        Self {
            failures_to_open: settings.failures.max(1),
            open_for: settings.open_for,
            failures: AtomicU32::new(0),
            gate: AtomicU64::new(0),
        }
    }

    /// Whether a call may go there now. Once an open circuit is due, exactly one caller is told yes: it is the
    /// trial, and should report with [`Self::succeeded`] or [`Self::failed`].
    pub fn admits(&self, now: Timestamp) -> bool {
        let gate = self.gate.load(Ordering::SeqCst);
        if gate == 0 {
            return true;
        }
        if now < until(gate) {
            return false;
        }
        let next = gate_at(now + self.open_for.max(Duration::from_millis(1)), true);
        self.gate.compare_exchange(gate, next, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// Whether [`Self::admits`] would say yes; takes no trial.
    pub fn would_admit(&self, now: Timestamp) -> bool {
        let gate = self.gate.load(Ordering::SeqCst);
        gate == 0 || now >= until(gate)
    }

    /// Whether it is closed; cheaper than asking with a time.
    pub fn is_closed(&self) -> bool {
        self.gate.load(Ordering::Relaxed) == 0
    }

    /// A call went well. It closes a half-open circuit; calls that began before an open circuit opened say
    /// nothing about now, and change nothing. Returns the new state when it changed.
    pub fn succeeded(&self) -> Option<CircuitState> {
        let gate = self.gate.load(Ordering::SeqCst);
        if gate == 0 {
            if self.failures.load(Ordering::Relaxed) != 0 {
                self.failures.store(0, Ordering::SeqCst);
            }
            return None;
        }
        let closes =
            is_trial(gate) && self.gate.compare_exchange(gate, 0, Ordering::SeqCst, Ordering::SeqCst).is_ok();
        if !closes {
            return None;
        }
        self.failures.store(0, Ordering::SeqCst);
        Some(CircuitState::Closed)
    }

    /// A call failed by the backend's fault. `retry_after` is what the backend asked for; the circuit stays
    /// open at least that long (up to [`MAX_RETRY_AFTER`]), whatever the number of failures, and a shorter
    /// wait never replaces a longer one. Returns the new state when it changed.
    pub fn failed(&self, now: Timestamp, retry_after: Option<Duration>) -> Option<CircuitState> {
        let failures = self.failures.fetch_add(1, Ordering::SeqCst).saturating_add(1);
        let asked = retry_after.map(|wait| wait.min(MAX_RETRY_AFTER)).filter(|wait| !wait.is_zero());
        self.open(now, |gate| {
            let broken = is_trial(gate) || failures >= self.failures_to_open;
            if broken { Some(self.open_for.max(asked.unwrap_or_default())) } else { asked }
        })
    }

    /// The backend asks for a pause, as with 429: it has that one, and is otherwise in good health. Returns the new
    /// state when it changed.
    pub fn asked_to_wait(&self, now: Timestamp, wait: Duration) -> Option<CircuitState> {
        self.open(now, |_| Some(wait.min(MAX_RETRY_AFTER)))
    }

    /// Opens it for as long as `wait` says of the gate that is there, at least a millisecond; for none it stays as it is. A
    /// shorter wait never replaces a longer one.
    fn open(&self, now: Timestamp, wait: impl Fn(u64) -> Option<Duration>) -> Option<CircuitState> {
        let mut gate = self.gate.load(Ordering::SeqCst);
        loop {
            let wanted = now + wait(gate)?.max(Duration::from_millis(1));
            // The time of an outstanding trial is not a wait that somebody asked for.
            let held = if gate == 0 || is_trial(gate) { wanted } else { until(gate).max(wanted) };
            match self.gate.compare_exchange(gate, gate_at(held, false), Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => return (gate == 0 || is_trial(gate)).then_some(CircuitState::Open),
                Err(changed) => gate = changed,
            }
        }
    }

    /// A call ended without having shown anything, as its client went away. If it was the trial, the next call is.
    pub fn gave_up(&self, now: Timestamp) {
        let gate = self.gate.load(Ordering::SeqCst);
        if is_trial(gate) {
            // If it has changed meanwhile, somebody knows better.
            let due = gate_at(now, false);
            self.gate.compare_exchange(gate, due, Ordering::SeqCst, Ordering::SeqCst).ok();
        }
    }

    pub fn state(&self, now: Timestamp) -> CircuitState {
        let gate = self.gate.load(Ordering::SeqCst);
        match gate {
            0 => CircuitState::Closed,
            _ if is_trial(gate) || now >= until(gate) => CircuitState::HalfOpen,
            _ => CircuitState::Open,
        }
    }

    /// When an open circuit lets the next call through; none while it is closed.
    pub fn open_until(&self) -> Option<Timestamp> {
        let gate = self.gate.load(Ordering::SeqCst);
        (gate != 0).then(|| until(gate))
    }
}

fn gate_at(at: Timestamp, trial: bool) -> u64 {
    (at.as_millis().min(u64::MAX >> 1) << 1) | u64::from(trial)
}

fn until(gate: u64) -> Timestamp {
    Timestamp::from_millis(gate >> 1)
}

fn is_trial(gate: u64) -> bool {
    gate & 1 == 1
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_secs(1_000_000 + seconds)
    }

    fn circuit() -> Circuit {
        Circuit::new(&config::Circuit { failures: 3, open_for: Duration::from_secs(10) })
    }

    fn opened() -> Circuit {
        let circuit = circuit();
        for _ in 0..3 {
            circuit.failed(at(0), None);
        }
        circuit
    }

    #[test]
    fn it_opens_after_so_many_failures_in_a_row_and_a_success_starts_the_count_anew() {
        let circuit = circuit();
        assert_eq!(circuit.failed(at(0), None), None);
        assert_eq!(circuit.failed(at(0), None), None);
        assert_eq!(circuit.succeeded(), None);
        assert_eq!(circuit.failed(at(1), None), None);
        assert_eq!(circuit.failed(at(1), None), None);
        assert!(circuit.admits(at(1)));
        assert_eq!(circuit.failed(at(1), None), Some(CircuitState::Open));
        assert!(!circuit.admits(at(1)));
        assert_eq!(circuit.open_until(), Some(at(11)));
    }

    #[test]
    fn half_open_lets_one_trial_through_and_its_success_closes() {
        let circuit = opened();
        assert!(!circuit.admits(at(9)));
        assert!(circuit.admits(at(10)));
        assert_eq!(circuit.state(at(10)), CircuitState::HalfOpen);
        assert!(!circuit.admits(at(10)));
        assert_eq!(circuit.succeeded(), Some(CircuitState::Closed));
        assert!(circuit.admits(at(10)) && circuit.admits(at(10)));
    }

    #[test]
    fn a_failed_trial_opens_again_at_once() {
        let circuit = opened();
        assert!(circuit.admits(at(10)));
        assert_eq!(circuit.failed(at(11), None), Some(CircuitState::Open));
        assert!(!circuit.admits(at(20)));
        assert!(circuit.admits(at(21)));
    }

    #[test]
    fn a_trial_that_never_reports_does_not_block_the_next() {
        let circuit = opened();
        assert!(circuit.admits(at(10)));
        assert!(!circuit.admits(at(19)));
        assert!(circuit.admits(at(20)));
    }

    #[test]
    fn retry_after_counts_at_once_and_a_shorter_wait_never_replaces_a_longer() {
        let circuit = circuit();
        assert_eq!(circuit.failed(at(0), Some(Duration::from_mins(1))), Some(CircuitState::Open));
        circuit.failed(at(1), Some(Duration::from_secs(1)));
        circuit.failed(at(1), None);
        assert!(!circuit.admits(at(59)));
        assert!(circuit.admits(at(60)));
    }

    #[test]
    fn an_absurd_retry_after_is_cut_to_the_bound() {
        let circuit = circuit();
        circuit.failed(at(0), Some(Duration::from_secs(1_000_000_000)));
        assert!(circuit.admits(at(MAX_RETRY_AFTER.as_secs())));
    }

    #[test]
    fn the_success_of_a_call_that_began_before_does_not_close_an_open_circuit() {
        let circuit = opened();
        assert_eq!(circuit.succeeded(), None);
        assert!(!circuit.admits(at(5)));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Wait(u64),
        Admit,
        Succeed,
        Fail(Option<u64>),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0_u64..30).prop_map(Step::Wait),
            Just(Step::Admit),
            Just(Step::Succeed),
            prop::option::of(0_u64..90).prop_map(Step::Fail),
        ]
    }

    #[test]
    fn who_asks_for_a_pause_has_that_one_however_often_it_asks() {
        let circuit = circuit();
        for second in 0..10 {
            assert!(circuit.admits(at(2 * second)), "{second}");
            let changed = circuit.asked_to_wait(at(2 * second), Duration::from_secs(2));
            assert_eq!(changed, Some(CircuitState::Open));
            assert_eq!(circuit.open_until(), Some(at(2 * second + 2)));
        }
        let longer = circuit.asked_to_wait(at(19), Duration::from_millis(1));
        assert_eq!(
            (longer, circuit.open_until()),
            (None, Some(at(20))),
            "a shorter wait replaces no longer one"
        );
    }

    #[test]
    fn a_trial_that_is_given_up_makes_way_for_the_next() {
        let circuit = opened();
        assert!(circuit.admits(at(10)));
        assert!(!circuit.admits(at(11)), "one trial at a time");
        circuit.gave_up(at(11));
        assert!(circuit.admits(at(11)));
        assert_eq!(circuit.succeeded(), Some(CircuitState::Closed));
        circuit.gave_up(at(12));
        assert!(circuit.is_closed(), "a closed one stays so");
    }

    proptest! {
        #[test]
        fn no_call_is_admitted_before_the_longest_wait_asked_for(steps in prop::collection::vec(step(), 1..80)) {
            let circuit = circuit();
            let mut now = 0;
            let mut earliest = 0;
            for step in steps {
                match step {
                    Step::Wait(seconds) => now += seconds,
                    Step::Admit => {
                        if circuit.admits(at(now)) {
                            prop_assert!(now >= earliest, "admitted at {now}, not before {earliest}");
                        }
                    }
                    Step::Succeed => {
                        circuit.succeeded();
                    }
                    Step::Fail(wait) => {
                        circuit.failed(at(now), wait.map(Duration::from_secs));
                        earliest = earliest.max(now + wait.unwrap_or(0));
                    }
                }
            }
        }

        #[test]
        fn whatever_happened_a_quiet_circuit_admits_a_call_in_the_end(
            steps in prop::collection::vec(step(), 1..80)
        ) {
            let circuit = circuit();
            let mut now = 0;
            for step in steps {
                match step {
                    Step::Wait(seconds) => now += seconds,
                    Step::Admit => {
                        circuit.admits(at(now));
                    }
                    Step::Succeed => {
                        circuit.succeeded();
                    }
                    Step::Fail(wait) => {
                        circuit.failed(at(now), wait.map(Duration::from_secs));
                    }
                }
            }
            prop_assert!(circuit.admits(at(now + 90)));
        }

        #[test]
        fn of_many_callers_at_once_one_gets_the_trial(callers in 2_usize..8) {
            let circuit = opened();
            let admitted = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..callers).map(|_| scope.spawn(|| circuit.admits(at(10)))).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).filter(|admitted| *admitted).count()
            });
            prop_assert_eq!(admitted, 1);
        }
    }
}
