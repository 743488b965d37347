//! What the state machine knows of one replica.

use std::sync::Arc;

use super::rent::Rent;
use super::replica::{Replica, ReplicaState};
use crate::economics::Timestamp;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Ours, and not known yet whether it runs already.
    Unknown,
    Stopped,
    Starting {
        ordered_at: Timestamp,
    },
    Ready {
        since: Timestamp,
    },
    /// `is_up`: it was ready when it was let go, not starting.
    Draining {
        since: Timestamp,
        is_up: bool,
    },
    /// `ordered`: the order is out and not answered. `failures`: stops that failed. `clean_up`: after a failed
    /// start.
    Stopping {
        ordered: bool,
        failures: u32,
        retry_at: Timestamp,
        clean_up: bool,
    },
}

#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts about one replica")]
pub(super) struct Slot {
    pub(super) replica: Arc<Replica>,
    pub(super) phase: Phase,
    pub(super) rent: Rent,
    /// When it started or was taken over, also if no rent is counted.
    pub(super) began_at: Timestamp,
    /// Started by this process.
    pub(super) is_ours: bool,
    /// Whether it has been ready in its present life.
    pub(super) was_ready: bool,
    pub(super) order: u64,
    /// Failed starts and losses in a row.
    pub(super) failures: u32,
    pub(super) retry_at: Timestamp,
    pub(super) probe_at: Timestamp,
    /// Until then it is looked at although it is stopped: a start that somebody else ordered may be under way.
    pub(super) watched_until: Timestamp,
    pub(super) is_probing: bool,
    pub(super) bad_probes: u32,
    pub(super) queue_at: Timestamp,
    pub(super) is_reading_queue: bool,
}

impl Slot {
    /// A stopped replica that is to be looked at as soon as possible.
    pub(super) fn new(replica: Arc<Replica>, now: Timestamp) -> Self {
        Self {
            replica,
            phase: Phase::Stopped,
            rent: Rent::default(),
            began_at: now,
            is_ours: false,
            was_ready: false,
            order: 0,
            failures: 0,
            retry_at: Timestamp::ZERO,
            probe_at: now,
            watched_until: Timestamp::ZERO,
            is_probing: false,
            bad_probes: 0,
            queue_at: now,
            is_reading_queue: false,
        }
    }

    pub(super) fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        self.was_ready |= matches!(phase, Phase::Ready { .. });
        self.replica.set_state(match phase {
            Phase::Stopped if self.failures > 0 => ReplicaState::Failed,
            Phase::Unknown | Phase::Stopped => ReplicaState::Stopped,
            Phase::Starting { .. } => ReplicaState::Starting,
            Phase::Ready { .. } => ReplicaState::Ready,
            Phase::Draining { .. } => ReplicaState::Draining,
            Phase::Stopping { .. } => ReplicaState::Stopping,
        });
    }

    /// Goes on with the life that was to end. What was ready until now still is; anything else takes calls when
    /// a probe has seen it answer. A start that was not given up counts from its order.
    pub(super) fn resume(&mut self, now: Timestamp) {
        self.enter(match self.phase {
            Phase::Draining { is_up: true, .. } => Phase::Ready { since: now },
            Phase::Draining { .. } | Phase::Stopping { clean_up: false, .. } if !self.was_ready => {
                Phase::Starting { ordered_at: self.began_at }
            }
            _ => Phase::Starting { ordered_at: now },
        });
    }

    /// Counts towards the target.
    pub(super) fn is_held(&self) -> bool {
        matches!(self.phase, Phase::Starting { .. } | Phase::Ready { .. })
    }
}
