//! What the end of an answer waits for, and what is counted meanwhile.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::sync::oneshot;

use super::Exchange;
use crate::economics::NanoUsd;
use crate::ledger::Ticket;

/// What a stream has produced, as far as it was kept.
#[derive(Debug, Default)]
pub struct Produced {
    pub text: String,
    /// Bytes of all of it.
    pub bytes: u64,
    /// Share of it that is in `text`.
    pub kept_share: f64,
}

impl Produced {
    /// Tokens of all, from those of the text that was kept.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an estimate beyond what was kept"
    )]
    pub(super) fn scaled(&self, tokens: u64) -> u64 {
        if self.kept_share > 0.0 && self.kept_share < 1.0 {
            (tokens as f64 / self.kept_share).round() as u64
        } else {
            tokens
        }
    }
}

/// What the end of an answer waits for. It ends with what the call cost, if that is known.
pub enum Settling {
    Done(Option<NanoUsd>),
    /// The row is on its way to the journal. Until it is there, the call is in flight.
    Written(Ticket, Option<NanoUsd>, Box<Exchange>),
    /// The row is on its way to the disk.
    Durable(Pin<Box<dyn Future<Output = ()> + Send>>, Option<NanoUsd>),
    /// Tokens are being counted, and the row written after that.
    Counting(oneshot::Receiver<Settling>),
}

impl Settling {
    pub const fn done() -> Self {
        Self::Done(None)
    }

    pub fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<NanoUsd>> {
        loop {
            match self {
                Self::Done(cost) => return Poll::Ready(*cost),
                Self::Written(ticket, cost, _) => return ticket.poll_written(context).map(|()| *cost),
                Self::Durable(future, cost) => return future.as_mut().poll(context).map(|()| *cost),
                Self::Counting(waiting) => match Pin::new(waiting).poll(context) {
                    Poll::Ready(counted) => *self = counted.unwrap_or(Self::Done(None)),
                    Poll::Pending => return Poll::Pending,
                },
            }
        }
    }

    pub async fn wait(mut self) -> Option<NanoUsd> {
        std::future::poll_fn(|context| self.poll(context)).await
    }
}

impl std::fmt::Debug for Settling {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(match self {
            Self::Done(_) => "Done",
            Self::Written(..) => "Written",
            Self::Durable(..) => "Durable",
            Self::Counting(_) => "Counting",
        })
    }
}
