//! What the fake saw and what it made: the truth that bills are compared with.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Uri, Version};
use tokio::sync::watch;

use crate::clock::Stopwatch;
use crate::economics::Usage;

/// Requests and answers that are kept; older ones are forgotten (sums are not).
const MAX_KEPT: usize = 20_000;
/// Bodies are kept of the last requests only.
const MAX_KEPT_REQUESTS: usize = 1_000;

/// A request as it arrived.
#[derive(Debug, Clone)]
pub struct SeenRequest {
    pub method: Method,
    pub uri: Uri,
    pub version: Version,
    pub headers: HeaderMap,
    pub body: Bytes,
    /// Since the fake started.
    pub at: Duration,
}

impl SeenRequest {
    /// The body as JSON; null when it is none.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// A header's value as text, empty when it is absent.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }
}

/// What one request made the fake do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Produced {
    pub path: String,
    /// The model's name as asked for.
    pub model: String,
    pub status: u16,
    pub stream: bool,
    /// Tokens taken in and produced so far, whether or not the client got them.
    pub usage: Usage,
    /// Events sent so far, or 1 for an answer that is no stream.
    pub events: usize,
    pub state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Running,
    /// Everything was handed to the connection.
    Finished,
    /// A fault of the script ended it.
    Broken,
    /// The client went away; noticed so long after the fake started.
    Aborted {
        noticed_at: Duration,
    },
}

/// Sums over everything since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    pub requests: u64,
    pub refused: u64,
    pub aborted: u64,
    pub usage: Usage,
}

#[derive(Debug)]
pub(super) struct Log {
    pub(super) started: Stopwatch,
    kept: Mutex<Kept>,
    version: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Kept {
    requests: VecDeque<SeenRequest>,
    produced: VecDeque<Produced>,
    /// Number of the first entry that is still in `produced`.
    first: usize,
    settled: Totals,
}

impl Log {
    pub(super) fn new() -> Self {
        Self { started: Stopwatch::start(), kept: Mutex::default(), version: watch::channel(0).0 }
    }

    pub(super) fn saw(&self, request: SeenRequest) {
        let mut kept = self.kept();
        if kept.requests.len() == MAX_KEPT_REQUESTS {
            kept.requests.pop_front();
        }
        kept.requests.push_back(request);
        drop(kept);
        self.changed();
    }

    pub(super) fn open(self: &Arc<Self>, path: &str, model: &str, stream: bool) -> Tally {
        let mut kept = self.kept();
        if kept.produced.len() == MAX_KEPT {
            kept.produced.pop_front();
            kept.first += 1;
        }
        let number = kept.first + kept.produced.len();
        let produced = Produced {
            path: path.to_owned(),
            model: model.to_owned(),
            status: 200,
            stream,
            usage: Usage::default(),
            events: 0,
            state: State::Running,
        };
        kept.produced.push_back(produced.clone());
        drop(kept);
        Tally { log: Arc::clone(self), number, produced }
    }

    pub(super) fn requests(&self) -> Vec<SeenRequest> {
        self.kept().requests.iter().cloned().collect()
    }

    pub(super) fn produced(&self) -> Vec<Produced> {
        self.kept().produced.iter().cloned().collect()
    }

    /// Sums of what has ended.
    pub(super) fn totals(&self) -> Totals {
        self.kept().settled
    }

    pub(super) fn watch(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    pub(super) fn changed(&self) {
        self.version.send_modify(|version| *version += 1);
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The live record of one answer. Dropped before its end, it says that the client went away.
#[derive(Debug)]
pub(super) struct Tally {
    log: Arc<Log>,
    number: usize,
    produced: Produced,
}

impl Tally {
    pub(super) fn take_in(&mut self, usage: &Usage) {
        self.produced.usage = Usage { output_tokens: 0, reasoning_tokens: 0, ..*usage };
        self.publish();
    }

    pub(super) fn put_out(&mut self, tokens: u64, reasoning_tokens: u64) {
        self.produced.usage.output_tokens += tokens;
        self.produced.usage.reasoning_tokens += reasoning_tokens;
        self.produced.events += 1;
        self.publish();
    }

    /// Tokens that are produced before anything is sent.
    pub(super) fn count(&mut self, tokens: u64, reasoning_tokens: u64) {
        self.produced.usage.output_tokens += tokens;
        self.produced.usage.reasoning_tokens += reasoning_tokens;
    }

    pub(super) fn refuse(mut self, status: u16) {
        self.produced.status = status;
        self.end(State::Finished);
    }

    pub(super) fn end(&mut self, state: State) {
        self.produced.state = state;
    }

    fn publish(&self) {
        let mut kept = self.log.kept();
        let index = self.number.checked_sub(kept.first);
        if let Some(slot) = index.and_then(|index| kept.produced.get_mut(index)) {
            slot.status = self.produced.status;
            slot.usage = self.produced.usage;
            slot.events = self.produced.events;
            slot.state = self.produced.state;
        }
        drop(kept);
        self.log.changed();
    }
}

impl Drop for Tally {
    fn drop(&mut self) {
        if self.produced.state == State::Running {
            self.produced.state = State::Aborted { noticed_at: self.log.started.elapsed() };
        }
        let mut kept = self.log.kept();
        kept.settled.requests += 1;
        kept.settled.refused += u64::from(self.produced.status >= 400);
        kept.settled.aborted += u64::from(matches!(self.produced.state, State::Aborted { .. }));
        kept.settled.usage += self.produced.usage;
        drop(kept);
        self.publish();
    }
}
