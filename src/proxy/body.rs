//! Response bodies on their way to the client, watched as they pass.
//!
//! Frames that are ready are joined, so that one write carries them. The call is settled, and its row is in
//! the journal, before the last bytes are handed over; how it ended is told by what the upstream did, or by
//! the drop of the body when the client went away.

use std::future::Future as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Frame, SizeHint};
use tokio::time::Sleep;

use super::exchange::{Exchange, Settling};
use super::reader::Reader;
use crate::clock::Stopwatch;
use crate::config::Timeouts;
use crate::ledger::Outcome;
use crate::openai::Endpoint;
use crate::upstream::client::UpstreamBody;

/// Ready frames are joined up to this size; what is larger passes as it is.
const JOINED_BYTES: usize = 64 * 1024;

pub type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// The body of a response to a client.
#[derive(Debug)]
pub enum Body {
    Full(Option<Bytes>),
    Metered(Box<Metered>),
}

impl Body {
    pub fn full(bytes: impl Into<Bytes>) -> Self {
        Self::Full(Some(bytes.into()))
    }

    pub fn empty() -> Self {
        Self::Full(None)
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            Self::Full(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Metered(metered) => metered.poll_isolated(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Full(bytes) => bytes.is_none(),
            Self::Metered(metered) => matches!(metered.state, State::Ended),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Full(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Self::Metered(metered) => metered.size_hint(),
        }
    }
}

/// An upstream's body that is read as it passes.
pub struct Metered {
    /// None when all of it has been read.
    upstream: Option<UpstreamBody>,
    /// A frame that was awaited before the response's head was sent.
    first: Option<Bytes>,
    reader: Reader,
    /// Taken when the call is settled.
    exchange: Option<Box<Exchange>>,
    timer: Pin<Box<Sleep>>,
    between_bytes: Duration,
    total: Duration,
    silence: Stopwatch,
    state: State,
}

// The rest is an answer's text.
impl std::fmt::Debug for Metered {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Metered").field("exchange", &self.exchange).finish_non_exhaustive()
    }
}

enum State {
    /// Passing frames on.
    Open,
    /// The call is being settled; then these bytes are handed over.
    Settling {
        last: Bytes,
        then: After,
        settling: Settling,
    },
    /// Everything but the end marker was handed over.
    Trailing(Option<HeaderMap>),
    /// The connection to the client is to be broken, so that it sees that something is missing. Before that it is
    /// given the time to send what it was handed over: an error ends it with all that it still holds.
    Breaking {
        why: &'static str,
        is_flushed: bool,
    },
    Ended,
}

/// What follows the bytes that were held back for the settling.
#[derive(Debug)]
enum After {
    /// The stream said that it is done; whatever it still sends passes.
    Open,
    Trailing(Option<HeaderMap>),
    Breaking(&'static str),
}

/// How the upstream's body stands after what was ready has been read.
enum End {
    NotYet,
    Clean,
    Broken,
}

impl Metered {
    pub fn new(
        upstream: Option<UpstreamBody>,
        first: Option<Bytes>,
        reader: Reader,
        exchange: Box<Exchange>,
        timeouts: &Timeouts,
    ) -> Self {
        Self {
            upstream,
            first,
            reader,
            exchange: Some(exchange),
            timer: Box::pin(tokio::time::sleep(timeouts.between_bytes)),
            between_bytes: timeouts.between_bytes,
            total: timeouts.total,
            silence: Stopwatch::start(),
            state: State::Open,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.upstream {
            Some(upstream) if !self.reader.may_change_length() && self.first.is_none() => {
                http_body::Body::size_hint(upstream)
            }
            _ => SizeHint::default(),
        }
    }

    /// Polls so that a bug ends this call alone: its connection breaks, and what is known of it is booked.
    fn poll_isolated(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        catch_unwind(AssertUnwindSafe(|| self.poll(context))).unwrap_or_else(|_| {
            self.state = State::Ended;
            if let Some(exchange) = self.exchange.take() {
                exchange.gateway().metrics.panicked();
            }
            Poll::Ready(Some(Err("a bug in the proxy ended this call".into())))
        })
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        loop {
            match &mut self.state {
                State::Open => match self.poll_open(context) {
                    Poll::Ready(Some(bytes)) => return Poll::Ready(Some(Ok(Frame::data(bytes)))),
                    Poll::Ready(None) => {}
                    Poll::Pending => return Poll::Pending,
                },
                State::Settling { last, then, settling } => {
                    if settling.poll(context).is_pending() {
                        return Poll::Pending;
                    }
                    let last = std::mem::take(last);
                    self.state = match std::mem::replace(then, After::Open) {
                        After::Open => State::Open,
                        After::Trailing(trailers) => State::Trailing(trailers),
                        After::Breaking(why) => State::Breaking { why, is_flushed: false },
                    };
                    if !last.is_empty() {
                        return Poll::Ready(Some(Ok(Frame::data(last))));
                    }
                }
                State::Trailing(trailers) => {
                    let trailers = trailers.take();
                    self.state = State::Ended;
                    return Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))));
                }
                State::Breaking { is_flushed: is_flushed @ false, .. } => {
                    *is_flushed = true;
                    context.waker().wake_by_ref();
                    return Poll::Pending;
                }
                State::Breaking { why, .. } => {
                    let why = *why;
                    self.state = State::Ended;
                    return Poll::Ready(Some(Err(why.into())));
                }
                State::Ended => return Poll::Ready(None),
            }
        }
    }

    /// Reads what is ready and hands it over in one frame. `Ready(None)` means that the state has changed.
    fn poll_open(&mut self, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        if self.exchange.as_ref().is_some_and(|exchange| exchange.gateway().is_cut_off()) {
            self.settle_early(Outcome::Timeout, Joined::default(), "the proxy is shutting down");
            return Poll::Ready(None);
        }
        let mut joined = Joined::default();
        let mut trailers = None;
        if let Some(first) = self.first.take() {
            joined.add(self.reader.push(first));
        }
        let end = loop {
            if joined.len() >= JOINED_BYTES {
                break End::NotYet;
            }
            let Some(upstream) = &mut self.upstream else { break End::Clean };
            if !joined.is_empty() && upstream.is_drained() {
                break End::NotYet;
            }
            match http_body::Body::poll_frame(Pin::new(upstream), context) {
                Poll::Pending => break End::NotYet,
                Poll::Ready(None) => break End::Clean,
                Poll::Ready(Some(Err(_))) => break End::Broken,
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => joined.add(self.reader.push(data)),
                    Err(frame) => trailers = frame.into_trailers().ok(),
                },
            }
        };
        let end = if self.reader.is_broken() { End::Broken } else { end };
        if !joined.is_empty() {
            self.silence = Stopwatch::start();
            if let Some(exchange) = &mut self.exchange {
                exchange.progressed(&self.reader);
            }
        }
        let settled = self.exchange.is_none();
        match end {
            End::NotYet if self.reader.is_finished() && !settled => {
                let outcome = self.reader.outcome();
                self.settle(outcome, joined, After::Open);
                Poll::Ready(None)
            }
            End::NotYet if joined.is_empty() => self.poll_silence(context),
            End::NotYet => Poll::Ready(Some(joined.into_bytes())),
            End::Clean | End::Broken if settled => {
                self.state = State::Trailing(trailers);
                Poll::Ready((!joined.is_empty()).then(|| joined.into_bytes()))
            }
            End::Clean => {
                joined.add(self.reader.finish());
                let outcome = self.reader.outcome();
                if outcome == Outcome::Success || self.reader.saw_error() {
                    self.settle(outcome, joined, After::Trailing(trailers));
                } else {
                    self.settle_early(outcome, joined, "the upstream's stream ended early");
                }
                Poll::Ready(None)
            }
            End::Broken => {
                joined.add(self.reader.finish());
                self.settle_early(Outcome::UpstreamError, joined, "the upstream's connection broke");
                Poll::Ready(None)
            }
        }
    }

    /// Nothing is ready: has the upstream been silent for too long?
    fn poll_silence(&mut self, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        while self.timer.as_mut().poll(context).is_ready() {
            let silent = self.silence.elapsed();
            let age = self.exchange.as_ref().map_or(Duration::ZERO, |exchange| exchange.age());
            if silent >= self.between_bytes || age >= self.total {
                if self.exchange.is_some() {
                    self.settle_early(
                        Outcome::Timeout,
                        Joined::default(),
                        "the upstream was silent for too long",
                    );
                } else {
                    self.state = State::Trailing(None);
                }
                return Poll::Ready(None);
            }
            let left = self.between_bytes.saturating_sub(silent).min(self.total.saturating_sub(age));
            self.timer.as_mut().reset(tokio::time::Instant::now() + left);
        }
        Poll::Pending
    }

    /// Books the call; `last` goes to the client when that is done.
    fn settle(&mut self, outcome: Outcome, last: Joined, then: After) {
        let settling = self
            .exchange
            .take()
            .map_or_else(Settling::done, |exchange| exchange.settle_stream(outcome, &mut self.reader));
        self.state = State::Settling { last: last.into_bytes(), then, settling };
    }

    /// Books a call whose answer is incomplete, and lets the client know: with an error event on an event
    /// stream, with a broken connection elsewhere.
    fn settle_early(&mut self, outcome: Outcome, mut last: Joined, why: &'static str) {
        let endpoint = self.exchange.as_ref().map_or(Endpoint::Other, |exchange| exchange.endpoint());
        let then = match self.reader.error_event(endpoint, why) {
            Some(event) => {
                last.add(event);
                After::Trailing(None)
            }
            None => After::Breaking(why),
        };
        self.settle(outcome, last, then);
    }
}

impl Drop for Metered {
    fn drop(&mut self) {
        if let Some(exchange) = self.exchange.take() {
            exchange.cancel_stream(&mut self.reader);
        }
    }
}

/// Frames that were ready together.
#[derive(Default)]
struct Joined {
    single: Option<Bytes>,
    many: BytesMut,
}

impl Joined {
    fn add(&mut self, bytes: Bytes) {
        if bytes.is_empty() {
            return;
        }
        match (self.single.take(), self.many.is_empty()) {
            (None, true) => self.single = Some(bytes),
            (Some(single), _) => {
                self.many.reserve(single.len() + bytes.len());
                self.many.extend_from_slice(&single);
                self.many.extend_from_slice(&bytes);
            }
            (None, false) => self.many.extend_from_slice(&bytes),
        }
    }

    fn len(&self) -> usize {
        self.single.as_ref().map_or(self.many.len(), Bytes::len)
    }

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn into_bytes(self) -> Bytes {
        self.single.unwrap_or_else(|| self.many.freeze())
    }
}
