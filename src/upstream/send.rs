//! Attempts at backends, up to the first byte for the client: after that there is no way back.

use std::fmt;
use std::pin::{Pin, pin};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{Method, StatusCode, response};
use http_body::Body as _;
use tracing::{debug, warn};

use super::client::{Clients, NoAnswer, RequestBody, UpstreamBody};
use crate::clock::within;
use crate::config::Timeouts;
use crate::economics::Reason;
use crate::fleet::Availability;
use crate::health::throttle::retry_after;
use crate::metrics::{AttemptResult, Fault};
use crate::openai::endpoint::azure_deployment;
use crate::openai::{Change, Endpoint};
use crate::proxy::error::ProxyError;
use crate::proxy::exchange::Exchange;
use crate::proxy::headers::Head;

/// Answers up to this size are collected before their head goes to the client, so that it can carry the cost.
pub const MAX_COLLECTED_BYTES: usize = 8 << 20;
/// Kept of an error answer that may yet be the one that the client gets.
const MAX_ERROR_BYTES: usize = 1 << 20;

/// A request on its way up, ready to be sent more than once.
pub struct Outgoing {
    pub method: Method,
    pub path_and_query: String,
    pub head: Head,
    pub body: Bytes,
}

// The rest is the client's: credentials and a prompt.
impl fmt::Debug for Outgoing {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Outgoing").field("method", &self.method).finish_non_exhaustive()
    }
}

/// An answer, as far as it has been awaited.
pub struct Answer {
    pub head: response::Parts,
    /// What was read of the body.
    pub read: Bytes,
    /// The rest of it; none when all was read.
    pub rest: Option<UpstreamBody>,
    /// The usage chunk of this stream was asked for by us.
    pub strip_usage: bool,
}

impl fmt::Debug for Answer {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Answer").field("status", &self.head.status).finish_non_exhaustive()
    }
}

/// Why an attempt did not bring the answer.
enum Failure {
    /// An error answer: the client gets it if nothing better comes.
    Answer(Box<Answer>),
    NoAnswer(ProxyError),
}

struct Failed {
    fault: Fault,
    result: AttemptResult,
    retry_after: Option<Duration>,
    failure: Failure,
    /// The same backend may be tried again.
    again: bool,
    /// It will be asked otherwise, and at once.
    asks_otherwise: bool,
}

/// Sends a call to the offers of its route in `order`, each once, and then again as far as the retry budgets
/// of the call and of the process allow.
pub async fn send(
    clients: &Clients,
    exchange: &mut Exchange,
    request: &mut Outgoing,
    order: &[usize],
) -> Result<Answer, ProxyError> {
    let settings = exchange.state().config.retry.clone();
    let mut last: Option<Failed> = None;
    let mut backoff = settings.backoff;
    loop {
        let before = exchange.attempts();
        for &index in order {
            if exchange.attempts() >= settings.max_attempts {
                return conclude(exchange, last, order);
            }
            match try_offer(clients, exchange, request, index, &mut last).await {
                Tried::Answered(answer) => return Ok(*answer),
                Tried::Failed if order.len() == 1 && last.as_ref().is_some_and(|failed| !failed.again) => {
                    return conclude(exchange, last, order);
                }
                Tried::Failed | Tried::NoPlace => {}
            }
        }
        let Some(failed) = &last else { return conclude(exchange, None, order) };
        // A round without a place at any of them will not be followed by a better one soon.
        let was_tried = exchange.attempts() > before;
        let may_retry = was_tried && failed.again && exchange.attempts() < settings.max_attempts;
        let wait = match failed.retry_after {
            Some(asked) if asked <= settings.max_backoff => Some(stretched(asked)),
            Some(_) => None,
            None => Some(jittered(backoff)),
        };
        let Some(wait) = wait.filter(|wait| may_retry && *wait < time_left(exchange)) else {
            return conclude(exchange, last, order);
        };
        if !exchange.gateway().retries.spend() {
            return conclude(exchange, last, order);
        }
        tokio::time::sleep(wait).await;
        backoff = (backoff * 2).min(settings.max_backoff);
    }
}

enum Tried {
    Answered(Box<Answer>),
    /// What went wrong is in `last`.
    Failed,
    NoPlace,
}

/// One attempt at an offer; and another, when its backend has just said how it wants to be asked.
async fn try_offer(
    clients: &Clients,
    exchange: &mut Exchange,
    request: &mut Outgoing,
    index: usize,
    last: &mut Option<Failed>,
) -> Tried {
    loop {
        if !place(exchange, index, last) {
            return Tried::NoPlace;
        }
        let failed = match attempt(clients, exchange, request, index).await {
            Ok(answer) => return Tried::Answered(Box::new(answer)),
            Err(failed) => failed,
        };
        exchange.attempt_failed(failed.result, failed.retry_after);
        let may_ask_again =
            failed.asks_otherwise && exchange.attempts() < exchange.state().config.retry.max_attempts;
        *last = Some(failed);
        if !may_ask_again {
            return Tried::Failed;
        }
    }
}

/// Takes a place at an offer's backend. False when it has none to give; the reason then becomes why.
fn place(exchange: &mut Exchange, index: usize, last: &mut Option<Failed>) -> bool {
    let Some(route) = exchange.route().cloned() else { return false };
    let backend = &route.offers[index].backend;
    let home = exchange.home().filter(|home| home.offer == index).map(|home| home.replica);
    let Some(place) = backend.acquire_near(home) else {
        let full = backend.fleet.availability() == Availability::Full;
        if exchange.attempts() == 0 && exchange.reason() != Reason::Pinned {
            exchange.set_reason(if full { Reason::Overflow } else { Reason::Unhealthy });
        }
        return false;
    };
    if let Some(failed) = last {
        exchange.moved(backend, failed.fault);
        if !failed.asks_otherwise {
            exchange.set_reason(Reason::Failover);
        }
    }
    exchange.begin_attempt(backend, Some(index), place);
    true
}

/// Of the time that the backend which was tried last gives a call.
fn time_left(exchange: &Exchange) -> Duration {
    let total = exchange.served().map_or(Duration::MAX, |(backend, _)| backend.spec.timeouts.total);
    total.saturating_sub(exchange.age())
}

/// No more attempts: the best that there is, for the client.
fn conclude(exchange: &Exchange, last: Option<Failed>, order: &[usize]) -> Result<Answer, ProxyError> {
    match last.map(|failed| failed.failure) {
        Some(Failure::Answer(answer)) => Ok(*answer),
        Some(Failure::NoAnswer(error)) => Err(error),
        None => {
            let offers = exchange.route().map(|route| &route.offers);
            let backends =
                offers.iter().flat_map(|offers| order.iter().map(|&index| &*offers[index].backend));
            Err(ProxyError::Unavailable {
                model: exchange.call().map(|call| call.model.clone()).unwrap_or_default(),
                retry_after: backends.map(|backend| backend.recovers_in(exchange.gateway().now())).min(),
            })
        }
    }
}

/// One attempt, up to the first byte of a stream or the whole of another answer.
async fn attempt(
    clients: &Clients,
    exchange: &Exchange,
    request: &mut Outgoing,
    index: usize,
) -> Result<Answer, Failed> {
    let Some((backend, model)) = exchange.served() else { unreachable!("an attempt has begun") };
    debug_assert!(exchange.route().is_some_and(|route| route.offers[index].backend.id == backend.id));
    let refuses = backend.refuses_stream_options.load(std::sync::atomic::Ordering::Relaxed);
    let (body, injects) = match exchange.call() {
        Some(call) => {
            let has_usage_chunk = matches!(call.endpoint, Endpoint::ChatCompletions | Endpoint::Completions);
            let injects = call.stream && has_usage_chunk && !call.wants_usage && !refuses;
            // Where an Azure path names the model, its body does not.
            let is_in_path = backend.is_api()
                && call.model == model
                && azure_deployment(&request.path_and_query).is_some();
            let change = Change {
                model: (!is_in_path && !model.is_empty()).then_some(model),
                include_usage: injects,
                remove_stream_options: refuses,
                rules: &backend.rules,
            };
            (
                call.rewrite(&request.body, &change)
                    .map_err(|error| Failed::refused(ProxyError::Request(error)))?,
                injects,
            )
        }
        None => (request.body.clone(), false),
    };
    request.head.dress(backend);
    let timeouts = &backend.spec.timeouts;
    let is_stream = exchange.call().is_some_and(|call| call.stream);
    let (start, age) = exchange.attempt_start();
    let patience = timeouts.first_byte.min(timeouts.total.saturating_sub(age));
    // Pinned where it is made, so that the timeout holds no copy of it.
    let waiting = pin!(first_byte(clients, exchange, request, body, timeouts, is_stream));
    let mut answer = match clients.alarms.until(start.deadline(patience), waiting).await {
        Ok(answered) => answered?,
        Err(_) => return Err(Failed::timed_out(backend.name())),
    };
    answer.strip_usage = injects;
    if !backend.passes_credentials() || backend.credential().is_some() {
        backend.throttle.observe(|| exchange.gateway().now(), &answer.head.headers);
    }
    judge(answer, backend, injects, exchange)
}

async fn first_byte(
    clients: &Clients,
    exchange: &Exchange,
    request: &Outgoing,
    body: Bytes,
    timeouts: &Timeouts,
    is_stream: bool,
) -> Result<Answer, Failed> {
    let (Some((place, delivery)), Some((backend, _))) = (exchange.under_way(), exchange.served()) else {
        unreachable!("an attempt has begun")
    };
    let client = clients.of(backend);
    let sent = client.send(
        place,
        &request.method,
        // Paths of Azure's own are for the API; a self-hosted server has OpenAI's.
        match exchange.endpoint().path() {
            Some(path) if !backend.is_api() => path,
            _ => &request.path_and_query,
        },
        request.head.headers(),
        RequestBody::Full(Some(body)),
        delivery,
    );
    let response = sent.await.map_err(|error| Failed::unanswered(backend.name(), &error))?;
    let (head, mut body) = response.into_parts();
    if !head.status.is_success() {
        // Who refuses a request bills nothing for it, whatever becomes of the words of the refusal.
        delivery.undo();
    }
    let streams = is_stream && head.status.is_success();
    let limit = if streams {
        1
    } else if head.status.is_success() {
        MAX_COLLECTED_BYTES
    } else {
        MAX_ERROR_BYTES
    };
    let (read, is_complete) = read(&mut body, limit, streams, timeouts.between_bytes)
        .await
        .map_err(|why| Failed::broken(backend.name(), why))?;
    Ok(Answer { head, read, rest: (!is_complete).then_some(body), strip_usage: false })
}

/// Reads a body until it ends or `limit` bytes are there.
async fn read(
    body: &mut UpstreamBody,
    limit: usize,
    streams: bool,
    between_bytes: Duration,
) -> Result<(Bytes, bool), &'static str> {
    let mut first = Bytes::new();
    let mut more = BytesMut::new();
    loop {
        let frame = std::future::poll_fn(|context| Pin::new(&mut *body).poll_frame(context));
        // The wait for a stream's first byte is bounded by the caller.
        let frame = if streams {
            frame.await
        } else {
            within(between_bytes, frame).await.map_err(|_| "it was silent for too long")?
        };
        match frame {
            None if streams && first.is_empty() => return Err("its stream ended before it began"),
            None => break,
            Some(Err(error)) => {
                debug!(%error, "an upstream's answer broke off");
                return Err("its answer broke off");
            }
            Some(Ok(frame)) => {
                let Ok(data) = frame.into_data() else { continue };
                if first.is_empty() {
                    first = data;
                } else {
                    if more.is_empty() {
                        more.extend_from_slice(&first);
                    }
                    more.extend_from_slice(&data);
                }
            }
        }
        let is_complete = body.is_end_stream();
        if is_complete || first.len().max(more.len()) >= limit {
            return Ok((if more.is_empty() { first } else { more.freeze() }, is_complete));
        }
    }
    Ok((if more.is_empty() { first } else { more.freeze() }, true))
}

/// Is this the answer, or may another backend do better?
fn judge(
    answer: Answer,
    backend: &super::Backend,
    injects: bool,
    exchange: &Exchange,
) -> Result<Answer, Failed> {
    let status = answer.head.status;
    if status.is_success() {
        return Ok(answer);
    }
    let result = AttemptResult::of_status(status.as_u16());
    let failed = |fault, again, answer: Answer| Failed {
        fault,
        result,
        retry_after: retry_after(exchange.gateway().now(), &answer.head.headers),
        failure: Failure::Answer(Box::new(answer)),
        again,
        asks_otherwise: false,
    };
    match status {
        StatusCode::TOO_MANY_REQUESTS => Err(failed(Fault::Http429, true, answer)),
        StatusCode::REQUEST_TIMEOUT => Err(failed(Fault::Timeout, true, answer)),
        _ if status.is_server_error() => Err(failed(Fault::Http5xx, true, answer)),
        StatusCode::BAD_REQUEST
            if injects && memchr::memmem::find(&answer.read, b"stream_options").is_some() =>
        {
            warn!(
                backend = backend.name(),
                "`{}` refuses `stream_options`; it is not sent there again",
                backend.name()
            );
            backend.refuses_stream_options.store(true, std::sync::atomic::Ordering::Relaxed);
            Err(Failed { asks_otherwise: true, ..failed(Fault::Http4xx, true, answer) })
        }
        StatusCode::NOT_FOUND if !backend.is_api() => Err(failed(Fault::Http4xx, false, answer)),
        StatusCode::BAD_REQUEST if !backend.is_api() && is_too_long(&answer.read) => {
            Err(failed(Fault::Http4xx, false, answer))
        }
        _ => Ok(answer),
    }
}

/// Whether an error says that the prompt does not fit, in the words of vLLM, llama.cpp, SGLang or TGI.
fn is_too_long(body: &[u8]) -> bool {
    [&b"exceed_context_size_error"[..], b"maximum context length", b"context length", b"input_tokens"]
        .iter()
        .any(|words| memchr::memmem::find(body, words).is_some())
}

/// A pause that was asked for, or up to a quarter more, so that retries of many calls do not meet.
fn stretched(pause: Duration) -> Duration {
    pause.mul_f64(1.0 + fastrand::f64() / 4.0)
}

/// Between half of a pause and one and a half, so that retries of many calls do not meet.
fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(0.5 + fastrand::f64())
}

impl Failed {
    fn new(fault: Fault, result: AttemptResult, error: ProxyError, again: bool) -> Self {
        Self {
            fault,
            result,
            retry_after: None,
            failure: Failure::NoAnswer(error),
            again,
            asks_otherwise: false,
        }
    }

    /// The backend's dialect has no place for what the call asks for.
    fn refused(error: ProxyError) -> Self {
        Self::new(Fault::Http4xx, AttemptResult::Http4xx, error, false)
    }

    fn timed_out(backend: &str) -> Self {
        let error = ProxyError::UpstreamTimeout { backend: backend.to_owned() };
        Self::new(Fault::Timeout, AttemptResult::Timeout, error, true)
    }

    fn unanswered(backend: &str, error: &NoAnswer) -> Self {
        let (fault, result) = match error {
            NoAnswer::Connect(_) => (Fault::ConnectError, AttemptResult::ConnectError),
            NoAnswer::Broken(_) => (Fault::Broken, AttemptResult::Broken),
        };
        warn!(backend, %error, "`{backend}` did not answer: {error}");
        let why = match error {
            NoAnswer::Connect(_) => "it cannot be reached",
            NoAnswer::Broken(_) => "its connection broke",
        };
        Self::new(fault, result, ProxyError::Upstream { backend: backend.to_owned(), why }, true)
    }

    fn broken(backend: &str, why: &'static str) -> Self {
        let error = ProxyError::Upstream { backend: backend.to_owned(), why };
        Self::new(Fault::Broken, AttemptResult::Broken, error, true)
    }
}
