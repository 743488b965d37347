//! The record of one call, from its arrival to its ledger row. It settles exactly once: when its answer is
//! complete, or on drop.

mod settle;
mod settling;
mod span;

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue};
use uuid::Uuid;

pub use settling::{Produced, Settling};

use super::reader::Reader;
use crate::clock::Stopwatch;
use crate::economics::{NanoUsd, Reason, Timestamp};
use crate::gateway::{Gateway, Home, Presence, Route, State};
use crate::keys::Key;
use crate::keys::admission::Admission;
use crate::metrics::{AttemptResult, Fault, Series};
use crate::openai::{Call, Endpoint};
use crate::telemetry::spans::CallSpan;
use crate::upstream::delivery::Delivery;
use crate::upstream::{Backend, Place};

/// Request bodies up to this size are kept until the call is settled, to be counted if no usage is reported.
const MAX_KEPT_BODY_BYTES: usize = 64 * 1024;
/// Who called, as far as the ledger and the metrics say it.
#[derive(Debug, Clone, Default)]
pub struct Caller {
    /// Public id of the virtual key.
    pub key: String,
    pub team: String,
    /// The other tags, as given.
    pub tags: String,
}

/// The live record of a call.
pub struct Exchange {
    pub id: Uuid,
    gateway: Arc<Gateway>,
    state: Arc<State>,
    opened_at: Timestamp,
    watch: Stopwatch,
    endpoint: Endpoint,
    caller: Caller,
    key: Option<Arc<Key>>,
    admission: Admission,
    call: Option<Box<Call>>,
    /// The conversation that it belongs to, if that can be told.
    conversation: Option<u64>,
    /// Where that was served last.
    home: Option<Home>,
    /// The model that a request names which is not read as a call.
    named_model: Arc<OnceLock<String>>,
    body: Option<Bytes>,
    route: Option<Arc<Route>>,
    served: Option<Served>,
    reason: Reason,
    attempts: u32,
    attempts_cost: NanoUsd,
    status: u16,
    first_token: Option<Duration>,
    streamed_tokens: u64,
    is_settled: bool,
    /// Whether it may buy something: a call that reads a list has no row.
    buys: bool,
    span: CallSpan,
    _presence: Presence,
}

// What it keeps of the request is a prompt.
impl fmt::Debug for Exchange {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { id, endpoint, attempts, status, .. } = self;
        let mut out = out.debug_struct("Exchange");
        out.field("id", id).field("endpoint", endpoint).field("attempts", attempts).field("status", status);
        out.finish_non_exhaustive()
    }
}

/// The attempt that is, or was last, under way.
#[derive(Debug)]
struct Served {
    backend: Arc<Backend>,
    /// Position in the route's offers.
    offer: Option<usize>,
    model: String,
    series: Arc<Series>,
    place: Option<Place>,
    delivery: Delivery,
    /// Position of the replica among the backend's.
    replica: usize,
    began: Stopwatch,
    /// Whether the attempt's end was counted.
    is_ended: bool,
}

impl Exchange {
    /// In a box, because it goes from hand to hand: through the call's futures, and into the body of its answer.
    pub fn open(
        gateway: Arc<Gateway>,
        state: Arc<State>,
        endpoint: Endpoint,
        caller: Caller,
        watch: Stopwatch,
        presence: Presence,
    ) -> Box<Self> {
        let opened_at = gateway.clock.at(watch);
        Box::new(Self {
            id: new_id(opened_at),
            opened_at,
            gateway,
            state,
            watch,
            endpoint,
            caller,
            key: None,
            admission: Admission::default(),
            call: None,
            conversation: None,
            home: None,
            named_model: Arc::default(),
            body: None,
            route: None,
            served: None,
            reason: Reason::OnlyOffer,
            attempts: 0,
            attempts_cost: NanoUsd::ZERO,
            status: 0,
            first_token: None,
            streamed_tokens: 0,
            is_settled: false,
            buys: true,
            span: CallSpan::default(),
            _presence: presence,
        })
    }

    pub fn gateway(&self) -> &Arc<Gateway> {
        &self.gateway
    }

    pub fn state(&self) -> &Arc<State> {
        &self.state
    }

    pub fn endpoint(&self) -> Endpoint {
        self.endpoint
    }

    /// Opens its span, as a child of the client's.
    pub fn open_span(&mut self, headers: &HeaderMap) {
        self.span = self.gateway.spans.open(headers, span::operation(self.endpoint));
    }

    /// Whether somebody will read its span.
    pub fn has_span(&self) -> bool {
        self.span.is_recording()
    }

    /// What tells the backend that our span is the parent of its own.
    pub fn traceparent(&self) -> Option<HeaderValue> {
        self.span.traceparent()
    }

    pub fn set_key(&mut self, key: Option<Arc<Key>>) {
        self.key = key;
    }

    /// The virtual key that it was made with.
    pub fn key(&self) -> Option<&Arc<Key>> {
        self.key.as_ref()
    }

    pub fn team(&self) -> &str {
        &self.caller.team
    }

    /// What it holds of budgets and limits, until it is settled or dropped.
    pub fn set_admission(&mut self, admission: Admission) {
        self.admission = admission;
    }

    /// Time since the request arrived.
    pub fn age(&self) -> Duration {
        self.watch.elapsed()
    }

    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    /// When the last attempt began, and the call's age then; those of the call itself before there is one.
    pub fn attempt_start(&self) -> (Stopwatch, Duration) {
        let began = self.served.as_ref().map_or(self.watch, |served| served.began);
        (began, began.since(self.watch))
    }

    pub fn set_call(&mut self, call: Call, body: &Bytes, route: Option<Arc<Route>>, reason: Reason) {
        // A slice would keep the connection's read buffer for as long as a stream lasts.
        let keep = || if call.stream { Bytes::copy_from_slice(body) } else { body.clone() };
        self.body = (body.len() <= MAX_KEPT_BODY_BYTES).then(keep);
        self.call = Some(Box::new(call));
        self.route = route;
        self.reason = reason;
    }

    /// Says which conversation it belongs to, and looks up where that was served last.
    pub fn set_conversation(&mut self, conversation: Option<u64>) {
        self.conversation = conversation;
        self.home = conversation.and_then(|who| self.gateway.conversations.home(who, self.opened_at));
    }

    /// Where the conversation that it belongs to was served last.
    pub fn home(&self) -> Option<Home> {
        self.home
    }

    pub fn call(&self) -> Option<&Call> {
        self.call.as_deref()
    }

    /// Says which model a request asks for that is not read as a call.
    pub fn name_model(&self, model: &str) {
        // The first name stays.
        drop(self.named_model.set(model.to_owned()));
    }

    /// Where the model's name can be put later, by whoever finds it.
    pub fn model_slot(&self) -> Arc<OnceLock<String>> {
        self.named_model.clone()
    }

    /// The model that the client asks for, empty when it is not known.
    fn requested_model(&self) -> &str {
        match &self.call {
            Some(call) => &call.model,
            None => self.named_model.get().map_or("", String::as_str),
        }
    }

    /// A new record for a part of this call that is billed by itself.
    pub fn part(&self) -> Option<Box<Self>> {
        let served = self.served.as_ref()?;
        let presence = self.gateway.enter(usize::MAX)?;
        let mut part = Self::open(
            self.gateway.clone(),
            self.state.clone(),
            self.endpoint,
            self.caller.clone(),
            Stopwatch::start(),
            presence,
        );
        part.admission = self.admission.part();
        part.named_model = self.named_model.clone();
        part.status = self.status;
        part.reason = self.reason;
        part.attempts = 1;
        part.served = Some(Served {
            backend: served.backend.clone(),
            offer: served.offer,
            model: served.model.clone(),
            series: served.series.clone(),
            place: None,
            delivery: served.delivery.clone(),
            replica: served.replica,
            began: served.began,
            is_ended: true,
        });
        Some(part)
    }

    /// As [`Self::part`], of the same model and route, for what is billed once under this id.
    fn part_once(&self, id: Uuid) -> Option<Box<Self>> {
        let mut part = self.part()?;
        part.id = id;
        part.route.clone_from(&self.route);
        part.name_model(self.requested_model());
        Some(part)
    }

    pub fn route(&self) -> Option<&Arc<Route>> {
        self.route.as_ref()
    }

    pub fn reason(&self) -> Reason {
        self.reason
    }

    pub fn set_reason(&mut self, reason: Reason) {
        self.reason = reason;
    }

    pub fn set_buys(&mut self, buys: bool) {
        self.buys = buys;
    }

    pub fn set_status(&mut self, status: u16) {
        self.status = status;
    }

    /// The backend of the last attempt, and the model's name there.
    pub fn served(&self) -> Option<(&Arc<Backend>, &str)> {
        self.served.as_ref().map(|served| (&served.backend, served.model.as_str()))
    }

    /// Whether it has several choices at a backend that reports the usage of each by itself.
    pub fn has_usage_per_choice(&self) -> bool {
        self.call.as_ref().is_some_and(|call| call.choices > 1)
            && self.served.as_ref().is_some_and(|served| served.backend.spec.dialect.usage_per_choice)
    }

    /// An attempt begins.
    pub fn begin_attempt(&mut self, backend: &Arc<Backend>, offer: Option<usize>, place: Place) {
        let requested = self.requested_model();
        let offered = offer.and_then(|index| self.route.as_ref().map(|route| &route.offers[index]));
        let (model, series) = match offered {
            Some(offer) => (
                offer.upstream_model(requested).to_owned(),
                offer.series(&self.gateway.metrics, requested, &self.caller.team),
            ),
            None => (
                requested.to_owned(),
                self.gateway.metrics.series(backend.name(), requested, &self.caller.team),
            ),
        };
        let began = Stopwatch::start();
        if self.attempts == 0 {
            self.gateway.metrics.overhead(began.since(self.watch));
        }
        self.attempts += 1;
        backend.series.attempt_began();
        self.served = Some(Served {
            backend: backend.clone(),
            offer,
            model,
            series,
            replica: place.replica(),
            place: Some(place),
            delivery: Delivery::default(),
            began,
            is_ended: false,
        });
    }

    /// The place of the attempt that is under way, and how far it has come.
    pub fn under_way(&self) -> Option<(&Place, &Delivery)> {
        let served = self.served.as_ref()?;
        Some((served.place.as_ref()?, &served.delivery))
    }

    /// Whether what the last attempt asked for may be billed, though no answer says so.
    fn is_delivered(&self) -> bool {
        self.served.as_ref().is_some_and(|served| served.delivery.is_complete())
    }

    /// The attempt is over without an answer for the client. If the backend may have begun with it, what that
    /// costs is estimated and owed.
    pub fn attempt_failed(&mut self, result: AttemptResult, retry_after: Option<Duration>) {
        self.end_attempt(result, retry_after);
        if self.is_delivered() {
            self.charge_attempt();
        }
    }

    /// The attempt is over: counts it, tells the replica's circuit, and gives the place back.
    pub fn end_attempt(&mut self, result: AttemptResult, retry_after: Option<Duration>) {
        let Some(served) = self.served.as_mut().filter(|served| !served.is_ended) else { return };
        served.is_ended = true;
        served.backend.series.attempt_ended(result);
        let Some(place) = served.place.take() else { return };
        // One client's rate limit says nothing about another's.
        let is_clients_own = served.backend.passes_credentials() && served.backend.credential().is_none();
        let change = match result {
            AttemptResult::Ok | AttemptResult::Http4xx => place.circuit().succeeded(),
            AttemptResult::Http429 if is_clients_own => place.circuit().succeeded(),
            AttemptResult::Cancelled => {
                if !place.circuit().is_closed() {
                    place.circuit().gave_up(self.gateway.now());
                }
                None
            }
            result => {
                let (circuit, now) = (place.circuit(), self.gateway.now());
                match retry_after.filter(|_| result == AttemptResult::Http429) {
                    Some(wait) => circuit.asked_to_wait(now, wait),
                    None => circuit.failed(now, retry_after),
                }
            }
        };
        if let Some(state) = change {
            let state = match state {
                crate::health::CircuitState::Closed => crate::metrics::CircuitState::Closed,
                crate::health::CircuitState::HalfOpen => crate::metrics::CircuitState::HalfOpen,
                crate::health::CircuitState::Open => crate::metrics::CircuitState::Open,
            };
            served.backend.series.circuit(state);
            self.gateway.note("circuit", served.backend.name(), format!("the circuit is {}", state.as_str()));
        }
    }

    /// The call moves to another backend, or to the same one again.
    pub fn moved(&self, to: &Backend, fault: Fault) {
        let Some(served) = &self.served else { return };
        if served.backend.id == to.id {
            served.backend.series.retried(fault);
        } else {
            self.gateway.metrics.fell_back(served.backend.name(), to.name(), fault);
        }
    }

    /// Notes what a running stream has shown.
    pub fn progressed(&mut self, reader: &Reader) {
        let Some(report) = reader.report() else { return };
        if self.first_token.is_none() && report.first_data_event {
            self.first_token = Some(self.watch.elapsed());
        }
        let fresh = report.output_events.saturating_sub(self.streamed_tokens);
        if fresh > 0
            && let Some(served) = &self.served
        {
            served.series.tokens_streamed(fresh);
            self.streamed_tokens = report.output_events;
        }
    }
}

/// An id that sorts by the time at which its call was opened. Made by the thread alone: the generator of the
/// library would count on behind a lock that all threads share.
fn new_id(opened_at: Timestamp) -> Uuid {
    let mut random = [0; 10];
    fastrand::fill(&mut random);
    uuid::Builder::from_unix_timestamp_millis(opened_at.as_millis(), &random).into_uuid()
}
