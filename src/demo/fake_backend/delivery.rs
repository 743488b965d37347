//! How an answer leaves: with the server's latency, through its slots, and with the faults that were ordered.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use http::header::{CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, LOCATION, RETRY_AFTER};
use http::{HeaderName, HeaderValue, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};

use super::answer::{Answer, Event, Payload};
use super::errors::{self, Failure};
use super::log::{State, Tally};
use super::script::{Behaviour, Cut};
use super::slots::Slot;
use super::wire::{Connection, Frames, Written};
use super::{Personality, Server};
use crate::clock::Stopwatch;
use crate::economics::Usage;

pub(super) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// Between the last event and the cut, so that the client gets the event.
const FLUSH_TIME: Duration = Duration::from_millis(1);

/// Tokens of a whole answer that are waited for and counted together.
const COUNTED_TOGETHER: u64 = 16;

/// Everything that one delivery needs.
pub(super) struct Delivery {
    pub(super) server: Arc<Server>,
    pub(super) connection: Arc<Connection>,
    pub(super) behaviour: Behaviour,
    pub(super) tally: Tally,
    pub(super) pace: Pace,
}

/// The time that generation takes, from when it got its slot.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    pub(super) to_first_token: Duration,
    pub(super) per_token: Duration,
}

impl Pace {
    /// Waits until `tokens` tokens can have been produced since `started`. The first comes with the time to
    /// first token.
    async fn reach(&self, started: Stopwatch, tokens: u64) {
        let after_first = u32::try_from(tokens.saturating_sub(1)).unwrap_or(u32::MAX);
        let due = self.to_first_token + self.per_token * after_first;
        let left = due.saturating_sub(started.elapsed());
        if !left.is_zero() {
            tokio::time::sleep(left).await;
        }
    }
}

impl Delivery {
    pub(super) async fn send(mut self, answer: Answer) -> Response<Body> {
        let Answer { content_type, payload, usage, generates } = answer;
        if !generates {
            self.tally.put_out(0, 0);
            self.tally.end(State::Finished);
            return match payload {
                Payload::Whole(body) => whole(content_type, body),
                Payload::Events(_) => unreachable!("streams are generated"),
            };
        }
        match payload {
            Payload::Whole(body) => {
                let (delivery, slot) = self.generate(usage).await;
                delivery.send_whole(content_type, body, slot)
            }
            Payload::Events(events) => self.send_events(content_type, usage, events).await,
        }
    }

    /// Takes a slot and the time for all tokens. llama.cpp does not notice that the client of a call that is no
    /// stream has gone: it generates to the end.
    async fn generate(mut self, usage: Usage) -> (Self, Slot) {
        let server = Arc::clone(&self.server);
        let work = async move {
            let (slot, started) = self.admit().await;
            self.tally.take_in(&usage);
            self.pace.reach(started, 1).await;
            let mut counted = 0;
            while counted < usage.output_tokens {
                let next = (counted + COUNTED_TOGETHER).min(usage.output_tokens);
                self.pace.reach(started, next).await;
                let thought = next.min(usage.reasoning_tokens) - counted.min(usage.reasoning_tokens);
                self.tally.count(next - counted, thought);
                counted = next;
            }
            (self, slot)
        };
        if server.personality == Personality::LlamaCpp {
            server.run_to_the_end(work).await
        } else {
            work.await
        }
    }

    fn send_whole(mut self, content_type: &'static str, body: Bytes, slot: Slot) -> Response<Body> {
        let body = if self.behaviour.gzip { gzipped(&body) } else { body };
        let gzip = self.behaviour.gzip;
        self.tally.put_out(0, 0);
        let mut response = match self.behaviour.cut {
            Some((events, cut)) if events < 2 => self.half(content_type, &body, events, cut),
            _ if self.behaviour.single_bytes => {
                self.tally.end(State::Finished);
                let bytes = Written::new(|frames| async move {
                    drop(send_bytes(&frames, &body, true).await);
                    drop(slot);
                });
                typed(content_type, bytes.boxed_unsync())
            }
            _ => {
                self.tally.end(State::Finished);
                whole(content_type, body)
            }
        };
        if gzip {
            response.headers_mut().insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        }
        response
    }

    /// Half of a body, or none of it, and what the script wants then.
    fn half(self, content_type: &'static str, body: &Bytes, events: usize, cut: Cut) -> Response<Body> {
        let length = body.len();
        let part = body.slice(..if events == 0 { 0 } else { length / 2 });
        let written = Written::new(|frames| async move {
            drop(send_bytes(&frames, &part, false).await);
            self.cut(cut, &frames).await;
        });
        let mut response = typed(content_type, written.boxed_unsync());
        if cut != Cut::Truncate {
            response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
        }
        response
    }

    async fn send_events(
        mut self,
        content_type: &'static str,
        usage: Usage,
        events: Vec<Event>,
    ) -> Response<Body> {
        let gzip = self.behaviour.gzip;
        // vLLM sends its headers at once, the others when there is something to say.
        let admitted = match self.server.personality {
            Personality::Vllm => None,
            Personality::OpenAi | Personality::LlamaCpp => Some(self.admit().await),
        };
        if let (Personality::OpenAi, Some((_, started))) = (self.server.personality, &admitted) {
            self.pace.reach(*started, 1).await;
        }
        let written = Written::new(|frames| async move {
            let (slot, started) = if let Some(admitted) = admitted { admitted } else { self.admit().await };
            self.tally.take_in(&usage);
            self.write_events(events, started, slot, &frames).await;
        });
        let mut response = typed(content_type, written.boxed_unsync());
        if gzip {
            response.headers_mut().insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        }
        response
    }

    async fn admit(&self) -> (Slot, Stopwatch) {
        (self.server.slots.take().await, Stopwatch::start())
    }

    async fn write_events(mut self, events: Vec<Event>, started: Stopwatch, slot: Slot, frames: &Frames) {
        let mut encoder = Encoder::new(&self.behaviour);
        let mut tokens = 0;
        for (position, event) in events.iter().enumerate() {
            if let Some((after, cut)) = self.behaviour.cut
                && after == position
            {
                self.cut(cut, frames).await;
                return;
            }
            tokens += event.output_tokens;
            self.pace.reach(started, tokens).await;
            self.tally.put_out(event.output_tokens, event.reasoning_tokens);
            if !event.text.is_empty() && encoder.send(&event.text, frames).await.is_err() {
                return;
            }
        }
        self.tally.end(State::Finished);
        encoder.finish(frames).await;
        drop(slot);
    }

    async fn cut(mut self, cut: Cut, frames: &Frames) {
        // The connection flushes what it has when the body has nothing more for it; a reset would lose it.
        tokio::time::sleep(FLUSH_TIME).await;
        match cut {
            Cut::Stall => std::future::pending().await,
            Cut::Truncate => {}
            Cut::Reset => {
                self.connection.reset();
                drop(frames.send(Err(io::ErrorKind::ConnectionReset.into())).await);
            }
            Cut::Close => drop(frames.send(Err(io::ErrorKind::ConnectionAborted.into())).await),
            Cut::ErrorEvent => {
                let error = errors::in_stream(self.server.personality);
                let events = format!("data: {error}\n\ndata: [DONE]\n\n");
                drop(send_bytes(frames, &Bytes::from(events), false).await);
            }
        }
        self.tally.end(State::Broken);
    }
}

/// Dresses events in the bytes that the script wants.
struct Encoder {
    single_bytes: bool,
    comments: bool,
    carriage_returns: bool,
    gzip: Option<GzEncoder<Vec<u8>>>,
}

impl Encoder {
    fn new(behaviour: &Behaviour) -> Self {
        Self {
            single_bytes: behaviour.single_bytes,
            comments: behaviour.comments,
            carriage_returns: behaviour.carriage_returns,
            gzip: behaviour.gzip.then(|| GzEncoder::new(Vec::new(), Compression::fast())),
        }
    }

    async fn send(&mut self, event: &Bytes, frames: &Frames) -> Result<(), Gone> {
        let mut bytes = event.clone();
        if self.comments {
            bytes = [&b":\n\n: keep-alive\n\n"[..], &bytes].concat().into();
        }
        if self.carriage_returns {
            bytes = String::from_utf8_lossy(&bytes).replace('\n', "\r\n").into();
        }
        if let Some(encoder) = &mut self.gzip {
            encoder.write_all(&bytes).and_then(|()| encoder.flush()).map_err(|_| Gone)?;
            bytes = std::mem::take(encoder.get_mut()).into();
        }
        send_bytes(frames, &bytes, self.single_bytes).await
    }

    async fn finish(self, frames: &Frames) {
        if let Some(rest) = self.gzip.and_then(|encoder| encoder.finish().ok()) {
            drop(send_bytes(frames, &Bytes::from(rest), self.single_bytes).await);
        }
    }
}

/// The client went away.
#[derive(Debug)]
struct Gone;

async fn send_bytes(frames: &Frames, bytes: &Bytes, one_by_one: bool) -> Result<(), Gone> {
    let step = if one_by_one { 1 } else { bytes.len().max(1) };
    for start in (0..bytes.len()).step_by(step) {
        let piece = bytes.slice(start..(start + step).min(bytes.len()));
        frames.send(Ok(piece)).await.map_err(|_| Gone)?;
    }
    Ok(())
}

fn gzipped(body: &Bytes) -> Bytes {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(body).expect("a vector takes every byte");
    Bytes::from(encoder.finish().expect("a vector takes every byte"))
}

fn typed(content_type: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

pub(super) fn whole(content_type: &'static str, body: Bytes) -> Response<Body> {
    typed(content_type, Full::new(body).map_err(|never| match never {}).boxed_unsync())
}

/// An error, whole.
pub(super) fn failure(failure: &Failure) -> Response<Body> {
    let body = if failure.body.is_null() { String::new() } else { failure.body.to_string() };
    let mut response = whole("application/json", Bytes::from(body));
    *response.status_mut() = failure.status;
    if let Some(wait) = failure.retry_after {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(wait.as_secs()));
        let millis = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        response.headers_mut().insert("retry-after-ms", HeaderValue::from(millis));
    }
    if let Some(location) = failure.location.as_deref().and_then(|location| location.parse().ok()) {
        response.headers_mut().insert(LOCATION, location);
    }
    response
}

/// Headers that each server puts on everything.
pub(super) fn sign(
    response: &mut Response<Body>,
    personality: Personality,
    number: u64,
    model: &str,
    last: bool,
) {
    let exhausted = response.status() == http::StatusCode::TOO_MANY_REQUESTS;
    let headers = response.headers_mut();
    let mut put = |name: &'static str, value: &str| {
        if let Ok(value) = HeaderValue::from_str(value) {
            headers.insert(HeaderName::from_static(name), value);
        }
    };
    match personality {
        Personality::OpenAi => {
            put("x-request-id", &format!("req_{number:032x}"));
            put("openai-version", "2020-10-01");
            put("openai-organization", "org-fake");
            put("openai-processing-ms", "12");
            put("openai-model", model);
            put("x-ratelimit-limit-requests", "10000");
            put("x-ratelimit-limit-tokens", "2000000");
            put("x-ratelimit-remaining-requests", if exhausted { "0" } else { "9999" });
            put("x-ratelimit-remaining-tokens", if exhausted { "0" } else { "1999900" });
            put("x-ratelimit-reset-requests", "6ms");
            put("x-ratelimit-reset-tokens", "3ms");
        }
        Personality::Vllm => put("server", "uvicorn"),
        Personality::LlamaCpp => {
            put("server", "llama.cpp");
            put("keep-alive", "timeout=5, max=100");
        }
    }
    if last {
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
}
