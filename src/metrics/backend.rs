//! What is counted for one backend.

use std::sync::atomic::{AtomicU8, Ordering};

use super::instruments::{Counter, Gauge, Level, Money, Named};
use super::series::ModelTeams;
use crate::economics::{NanoUsd, Timestamp};

/// How one attempt at a backend ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AttemptResult {
    Ok,
    Http429,
    Http4xx,
    Http5xx,
    Timeout,
    ConnectError,
    /// The answer began and broke off.
    Broken,
    /// The client went away.
    Cancelled,
}

impl AttemptResult {
    pub const ALL: [Self; 8] = [
        Self::Ok,
        Self::Http429,
        Self::Http4xx,
        Self::Http5xx,
        Self::Timeout,
        Self::ConnectError,
        Self::Broken,
        Self::Cancelled,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Http429 => "http_429",
            Self::Http4xx => "http_4xx",
            Self::Http5xx => "http_5xx",
            Self::Timeout => "timeout",
            Self::ConnectError => "connect_error",
            Self::Broken => "broken",
            Self::Cancelled => "cancelled",
        }
    }

    /// The result that an HTTP status stands for.
    pub const fn of_status(status: u16) -> Self {
        match status {
            429 => Self::Http429,
            400..=499 => Self::Http4xx,
            500.. => Self::Http5xx,
            _ => Self::Ok,
        }
    }
}

/// Why a call was tried again, or moved to another backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    Http429,
    /// Another 4xx that says "not here": the model is missing, the context too long.
    Http4xx,
    Http5xx,
    Timeout,
    ConnectError,
    Broken,
    CircuitOpen,
}

impl Fault {
    pub const ALL: [Self; 7] = [
        Self::Http429,
        Self::Http4xx,
        Self::Http5xx,
        Self::Timeout,
        Self::ConnectError,
        Self::Broken,
        Self::CircuitOpen,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Http429 => "http_429",
            Self::Http4xx => "http_4xx",
            Self::Http5xx => "http_5xx",
            Self::Timeout => "timeout",
            Self::ConnectError => "connect_error",
            Self::Broken => "broken",
            Self::CircuitOpen => "circuit_open",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CircuitState {
    Closed,
    HalfOpen,
    Open,
}

impl CircuitState {
    pub const ALL: [Self; 3] = [Self::Closed, Self::HalfOpen, Self::Open];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::HalfOpen => "half_open",
            Self::Open => "open",
        }
    }
}

/// What money is owed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SpendKind {
    /// Token charges of an API.
    Tokens,
    /// Rent of replicas, used or idle.
    Capacity,
    /// Glue paid per request in front of a self-hosted backend.
    Requests,
}

impl SpendKind {
    pub const ALL: [Self; 3] = [Self::Tokens, Self::Capacity, Self::Requests];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tokens => "tokens",
            Self::Capacity => "capacity",
            Self::Requests => "requests",
        }
    }
}

/// One backend.
#[derive(Debug)]
pub struct BackendSeries {
    pub(crate) self_hosted: bool,
    pub(crate) models: Named<ModelTeams>,
    pub(crate) in_flight: Level,
    pub(crate) attempts: [Counter; AttemptResult::ALL.len()],
    pub(crate) retries: [Counter; Fault::ALL.len()],
    pub(crate) up: Level,
    circuit: AtomicU8,
    pub(crate) transitions: [Counter; CircuitState::ALL.len()],
    pub(crate) spend: [Money; SpendKind::ALL.len()],
    pub(crate) prices_confirmed: Gauge,
    pub(crate) reconciliation_drift: Gauge,
}

impl BackendSeries {
    pub(crate) fn new(self_hosted: bool) -> Self {
        let series = Self {
            self_hosted,
            models: Named::default(),
            in_flight: Level::default(),
            attempts: Default::default(),
            retries: Default::default(),
            up: Level::default(),
            circuit: AtomicU8::new(0),
            transitions: Default::default(),
            spend: Default::default(),
            prices_confirmed: Gauge::default(),
            reconciliation_drift: Gauge::default(),
        };
        series.up(true);
        series
    }

    /// An attempt has been sent; [`Self::attempt_ended`] must follow, however it ends.
    pub fn attempt_began(&self) {
        self.in_flight.add(1);
    }

    pub fn attempt_ended(&self, result: AttemptResult) {
        self.in_flight.add(-1);
        self.attempts[result as usize].add(1);
    }

    /// The next attempt goes to the same backend again.
    pub fn retried(&self, fault: Fault) {
        self.retries[fault as usize].add(1);
    }

    /// What the last health probe said; a backend that is not probed is up.
    pub fn up(&self, up: bool) {
        self.up.set(i64::from(up));
    }

    /// The circuit has changed to `state`.
    pub fn circuit(&self, state: CircuitState) {
        let before = self.circuit.swap(state as u8, Ordering::Relaxed);
        if before != state as u8 {
            self.transitions[state as usize].add(1);
        }
    }

    /// Money is owed, whether or not it is some call's share.
    pub fn spend(&self, kind: SpendKind, amount: NanoUsd) {
        self.spend[kind as usize].add(amount);
    }

    /// Attempts that have ended, since the start of the process.
    pub fn attempts_ended(&self) -> u64 {
        self.attempts.iter().map(Counter::get).sum()
    }

    /// When somebody last confirmed this backend's prices.
    pub fn prices_confirmed(&self, at: Timestamp) {
        self.prices_confirmed.set_time(at);
    }

    /// `(own total - invoice) / invoice` of the last closed day; none when that is not known.
    pub fn reconciliation_drift(&self, ratio: Option<f64>) {
        self.reconciliation_drift.set_or_clear(ratio);
    }

    pub(crate) fn is_in(&self, state: CircuitState) -> bool {
        self.circuit.load(Ordering::Relaxed) == state as u8
    }

    /// Kinds of spend that this backend can have; the others are shown once they are not zero.
    pub(crate) fn spends(&self) -> impl Iterator<Item = (SpendKind, NanoUsd)> + '_ {
        SpendKind::ALL.into_iter().map(|kind| (kind, self.spend[kind as usize].get())).filter(
            |(kind, amount)| (*kind != SpendKind::Tokens) == self.self_hosted || *amount != NanoUsd::ZERO,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_circuit_counts_changes_and_not_repetitions() {
        let backend = BackendSeries::new(false);
        backend.circuit(CircuitState::Closed);
        backend.circuit(CircuitState::Open);
        backend.circuit(CircuitState::Open);
        assert!(backend.is_in(CircuitState::Open));
        assert_eq!(backend.transitions[CircuitState::Open as usize].get(), 1);
        assert_eq!(backend.transitions[CircuitState::Closed as usize].get(), 0);
    }

    #[test]
    fn an_api_shows_token_charges_and_a_pool_shows_rent_and_fees_before_there_are_any() {
        let kinds = |self_hosted| {
            BackendSeries::new(self_hosted).spends().map(|(kind, _)| kind.as_str()).collect::<Vec<_>>()
        };
        assert_eq!(kinds(false), ["tokens"]);
        assert_eq!(kinds(true), ["capacity", "requests"]);
    }
}
