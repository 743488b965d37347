//! What happens to replicas, for the ledger, the metrics and the log.

use std::fmt;
use std::time::Duration;

use crate::economics::Timestamp;

/// One change in the life of a replica. [`fmt::Display`] is a sentence for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FleetEvent {
    pub at: Timestamp,
    /// Name of the backend.
    pub backend: String,
    /// 0-based.
    pub replica: u32,
    pub kind: FleetEventKind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FleetEventKind {
    StartOrdered,
    /// Takes calls; `after` the order.
    Ready {
        after: Duration,
    },
    /// It already ran when we came; rent counts from now.
    Adopted,
    /// A replica that others control answers (again).
    Appeared,
    StartFailed {
        reason: String,
        retry_in: Duration,
    },
    /// Its address is no longer among those of its name: who controls it has moved or stopped it.
    Departed,
    /// The name has more addresses than there may be replicas.
    Crowded {
        addresses: usize,
    },
    /// How many replicas run, by whoever runs them, cannot be asked or said.
    ScaleUnknown {
        reason: String,
        retry_in: Duration,
    },
    /// It was ready and is gone.
    Lost {
        reason: String,
    },
    Draining {
        in_flight: u32,
    },
    /// The decision to stop it was taken back before it stopped.
    Kept,
    StopOrdered,
    Stopped {
        ran_for: Duration,
    },
    /// The rent goes on; the stop is tried again.
    StopFailed {
        reason: String,
        retry_in: Duration,
    },
}

impl FleetEventKind {
    /// A label for metrics and queries.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::StartOrdered => "start_ordered",
            Self::Ready { .. } => "ready",
            Self::Adopted => "adopted",
            Self::Appeared => "appeared",
            Self::StartFailed { .. } => "start_failed",
            Self::Departed => "departed",
            Self::Crowded { .. } => "crowded",
            Self::ScaleUnknown { .. } => "scale_unknown",
            Self::Lost { .. } => "lost",
            Self::Draining { .. } => "draining",
            Self::Kept => "kept",
            Self::StopOrdered => "stop_ordered",
            Self::Stopped { .. } => "stopped",
            Self::StopFailed { .. } => "stop_failed",
        }
    }

    /// Whether somebody should look at it.
    pub const fn is_trouble(&self) -> bool {
        matches!(
            self,
            Self::StartFailed { .. }
                | Self::Lost { .. }
                | Self::StopFailed { .. }
                | Self::ScaleUnknown { .. }
                | Self::Crowded { .. }
        )
    }
}

impl fmt::Display for FleetEvent {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            FleetEventKind::Crowded { addresses } => {
                return write!(
                    out,
                    "the name of `{}` has {addresses} addresses, more than its `max_replicas`; the last ones get no calls",
                    self.backend
                );
            }
            FleetEventKind::ScaleUnknown { reason, retry_in } => {
                return write!(
                    out,
                    "the scale of `{}` is not known: {reason}; next try in {} s",
                    self.backend,
                    retry_in.as_secs()
                );
            }
            _ => write!(out, "replica {} of `{}` ", self.replica, self.backend)?,
        }
        match &self.kind {
            FleetEventKind::StartOrdered => write!(out, "is ordered to start"),
            FleetEventKind::Ready { after } => write!(out, "is ready after {} s", after.as_secs()),
            FleetEventKind::Adopted => {
                write!(out, "was already running and is taken over; its rent counts from now")
            }
            FleetEventKind::Appeared => write!(out, "answers"),
            FleetEventKind::StartFailed { reason, retry_in } => {
                write!(out, "did not start: {reason}; next try in {} s", retry_in.as_secs())
            }
            FleetEventKind::Departed => write!(out, "is no longer where it was"),
            FleetEventKind::Crowded { .. } | FleetEventKind::ScaleUnknown { .. } => Ok(()),
            FleetEventKind::Lost { reason } => write!(out, "is lost: {reason}"),
            FleetEventKind::Draining { in_flight } => {
                write!(out, "is to stop and waits for {in_flight} calls in flight")
            }
            FleetEventKind::Kept => write!(out, "is wanted again and does not stop"),
            FleetEventKind::StopOrdered => write!(out, "is ordered to stop"),
            FleetEventKind::Stopped { ran_for } => {
                write!(out, "has stopped after {} s", ran_for.as_secs())
            }
            FleetEventKind::StopFailed { reason, retry_in } => write!(
                out,
                "did not stop and is still paid for: {reason}; next try in {} s",
                retry_in.as_secs()
            ),
        }
    }
}
