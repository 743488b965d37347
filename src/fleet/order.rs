//! What the state machine asks for, and what it hears of it.

use std::net::SocketAddr;

use super::kubernetes::Scale;
use crate::health::Probe;

/// Something to be done at the edge. `order` numbers starts and stops of a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Start {
        replica: u32,
        order: u64,
    },
    /// `was_ready`: it has served, so it is asked politely; otherwise its start is broken off first.
    Stop {
        replica: u32,
        order: u64,
        was_ready: bool,
    },
    Probe {
        replica: u32,
        order: u64,
    },
    ReadQueue {
        replica: u32,
    },
    /// Make the workload's count this; without one, read it.
    Scale {
        count: Option<u32>,
    },
    /// Ask for the addresses of the name.
    Resolve,
}

/// What came of an action.
#[derive(Debug)]
pub(super) enum Report {
    /// The start command has ended, or the webhook was answered.
    Start {
        replica: u32,
        order: u64,
        result: Result<(), String>,
    },
    Stop {
        replica: u32,
        order: u64,
        result: Result<(), String>,
    },
    Probe {
        replica: u32,
        order: u64,
        probe: Probe,
    },
    QueueRead {
        replica: u32,
    },
    Scaled {
        result: Result<Scale, String>,
    },
    /// The addresses of the name, in order; none when it could not be resolved.
    Resolved {
        found: Option<Vec<SocketAddr>>,
    },
}
