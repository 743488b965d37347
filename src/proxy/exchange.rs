//! The record of one call, from its arrival to its ledger row. It settles exactly once: when its answer is
//! complete, or on drop.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;
use uuid::Uuid;

use super::bill::{self, Bill};
use super::reader::Reader;
use crate::clock::Stopwatch;
use crate::economics::{NanoUsd, Reason, Slot, Tier, Timestamp, Usage};
use crate::gateway::{Gateway, Presence, Route, State};
use crate::ledger::{Entry, Outcome, Ticket, UsageSource};
use crate::metrics::{AttemptResult, Fault, Series, SpendKind};
use crate::openai::usage::Reported;
use crate::openai::{Call, Endpoint, tokenizer};
use crate::upstream::{Backend, Place};

/// Request bodies up to this size are kept until the call is settled, to be counted if no usage is reported.
const MAX_KEPT_BODY_BYTES: usize = 64 * 1024;
/// One call in so many is counted by our tokenizer as well, to know how far its counts are off.
const COMPARED_ONE_IN: u8 = 128;

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
#[derive(Debug)]
pub struct Exchange {
    pub id: Uuid,
    gateway: Arc<Gateway>,
    state: Arc<State>,
    opened_at: Timestamp,
    watch: Stopwatch,
    endpoint: Endpoint,
    caller: Caller,
    call: Option<Box<Call>>,
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
    sent: Option<Stopwatch>,
    streamed_tokens: u64,
    is_settled: bool,
    /// Whether it may buy something: a call that reads a list has no row.
    buys: bool,
    _presence: Presence,
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
    /// Whether the attempt's end was counted.
    is_ended: bool,
}

impl Exchange {
    pub fn open(
        gateway: Arc<Gateway>,
        state: Arc<State>,
        endpoint: Endpoint,
        caller: Caller,
        watch: Stopwatch,
        presence: Presence,
    ) -> Self {
        Self {
            id: Uuid::now_v7(),
            opened_at: gateway.now(),
            gateway,
            state,
            watch,
            endpoint,
            caller,
            call: None,
            named_model: Arc::default(),
            body: None,
            route: None,
            served: None,
            reason: Reason::OnlyOffer,
            attempts: 0,
            attempts_cost: NanoUsd::ZERO,
            status: 0,
            first_token: None,
            sent: None,
            streamed_tokens: 0,
            is_settled: false,
            buys: true,
            _presence: presence,
        }
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

    /// Time since the request arrived.
    pub fn age(&self) -> Duration {
        self.watch.elapsed()
    }

    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    pub fn set_call(&mut self, call: Call, body: &Bytes, route: Option<Arc<Route>>, reason: Reason) {
        self.body = (body.len() <= MAX_KEPT_BODY_BYTES).then(|| body.clone());
        self.call = Some(Box::new(call));
        self.route = route;
        self.reason = reason;
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
    pub fn part(&self) -> Option<Self> {
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
            is_ended: true,
        });
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
        if self.attempts == 0 {
            self.gateway.metrics.overhead(self.watch.elapsed());
        }
        self.attempts += 1;
        self.sent = Some(Stopwatch::start());
        backend.series.attempt_began();
        self.served = Some(Served {
            backend: backend.clone(),
            offer,
            model,
            series,
            place: Some(place),
            is_ended: false,
        });
    }

    pub fn place(&self) -> Option<&Place> {
        self.served.as_ref().and_then(|served| served.place.as_ref())
    }

    /// The attempt is over: counts it, tells the replica's circuit, and gives the place back.
    pub fn end_attempt(&mut self, result: AttemptResult, retry_after: Option<Duration>) {
        let now = self.gateway.now();
        let Some(served) = self.served.as_mut().filter(|served| !served.is_ended) else { return };
        served.is_ended = true;
        served.backend.series.attempt_ended(result);
        let Some(place) = served.place.take() else { return };
        // One client's rate limit says nothing about another's.
        let is_clients_own = served.backend.passes_credentials() && served.backend.credential().is_none();
        let change = match result {
            AttemptResult::Ok | AttemptResult::Http4xx => place.circuit().succeeded(),
            AttemptResult::Cancelled => None,
            AttemptResult::Http429 if is_clients_own => None,
            _ => place.circuit().failed(now, retry_after),
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

    /// Books a call whose answer was read as it passed. The answer's end waits for what this returns.
    pub fn settle_stream(mut self, outcome: Outcome, reader: &mut Reader) -> Settling {
        self.end_attempt(attempt_result(outcome, self.status), None);
        match reader.reported() {
            Some(reported) => self.book_reported(outcome, &reported),
            None if self.expects_usage(outcome) => self.count_and_book(outcome, reader),
            None => self.book_nothing(outcome),
        }
    }

    /// Books a complete answer. The cost goes into the response's head.
    pub fn settle_unary(
        mut self,
        outcome: Outcome,
        reported: Option<&Reported>,
        text: &[u8],
    ) -> (Settling, Option<NanoUsd>) {
        self.end_attempt(attempt_result(outcome, self.status), None);
        match reported {
            Some(reported) => {
                let bill = self.bill(&reported.usage, reported.tier, reported.model.as_deref());
                (
                    self.book(outcome, &reported.usage, UsageSource::UpstreamUsage, reported.tier, bill),
                    Some(bill.cost),
                )
            }
            None if self.expects_usage(outcome) => {
                // Nobody has counted it: the answer is at hand, and its text is most of its bytes.
                let bytes = u64::try_from(text.len()).unwrap_or(u64::MAX);
                let usage = self.estimate(bytes);
                let bill = self.bill(&usage, Tier::Standard, None);
                (self.book(outcome, &usage, UsageSource::Estimate, Tier::Standard, bill), Some(bill.cost))
            }
            None => (self.book_nothing(outcome), None),
        }
    }

    /// Books a call that failed without an answer of its own.
    pub fn settle_failed(mut self, outcome: Outcome, status: u16) {
        self.status = status;
        let _settling = self.book_nothing(outcome);
    }

    /// The client went away: what was produced until then is booked.
    pub fn cancel_stream(mut self, reader: &mut Reader) {
        self.end_attempt(AttemptResult::Cancelled, None);
        let _settling = match reader.reported() {
            Some(reported) => self.book_reported(Outcome::Cancelled, &reported),
            None => self.count_and_book(Outcome::Cancelled, reader),
        };
    }

    /// Whether an answer of this kind reports usage, so that its absence has to be made up for.
    fn expects_usage(&self, outcome: Outcome) -> bool {
        self.call.is_some()
            && self.endpoint.is_routed()
            && (200..300).contains(&self.status)
            && outcome != Outcome::ClientError
    }

    fn book_reported(self, outcome: Outcome, reported: &Reported) -> Settling {
        let bill = self.bill(&reported.usage, reported.tier, reported.model.as_deref());
        self.book(outcome, &reported.usage, UsageSource::UpstreamUsage, reported.tier, bill)
    }

    fn book_nothing(self, outcome: Outcome) -> Settling {
        self.book(outcome, &Usage::default(), UsageSource::None, Tier::Standard, Bill::default())
    }

    /// A quick estimate: the route's tokens a byte for the input, and the same for the text produced.
    fn estimate(&self, text_bytes: u64) -> Usage {
        let ratio = |bytes: usize| {
            self.route
                .as_ref()
                .map_or_else(|| tokenizer::Ratio::new().estimate(bytes), |route| route.ratio.estimate(bytes))
        };
        let input_bytes = self.call.as_ref().map_or(0, |call| call.input_bytes);
        Usage::new(ratio(input_bytes), ratio(usize::try_from(text_bytes).unwrap_or(usize::MAX)))
    }

    /// Counts with the tokenizer elsewhere, then books. What is returned is done when the row is written.
    fn count_and_book(self, outcome: Outcome, reader: &mut Reader) -> Settling {
        let Some(model) = self.call.as_ref().map(|call| call.model.clone()) else {
            return self.book_nothing(outcome);
        };
        let produced = reader.produced();
        let fallback = self.estimate(produced.bytes);
        let (done, waiting) = oneshot::channel();
        let gateway = self.gateway.clone();
        let job = move || {
            let (usage, source) = self.count(&model, &produced, fallback);
            let bill = self.bill(&usage, Tier::Standard, None);
            let _settling = self.book(outcome, &usage, source, Tier::Standard, bill);
            // Nobody waits when the client is gone.
            let _is_heard = done.send(());
        };
        match gateway.counter.submit(Box::new(job)) {
            Ok(()) => Settling::Counting(waiting),
            Err(job) => {
                job();
                Settling::Done
            }
        }
    }

    fn count(&self, model: &str, produced: &Produced, fallback: Usage) -> (Usage, UsageSource) {
        let served = self.served.as_ref().map_or(model, |served| served.model.as_str());
        if tokenizer::Encoding::of(served).is_none() && tokenizer::Encoding::of(model).is_none() {
            return (fallback, UsageSource::Estimate);
        }
        let input = match &self.body {
            Some(body) => tokenizer::count_call(model, self.endpoint, body),
            None => fallback.input_tokens,
        };
        let output = produced.scaled(tokenizer::count_text(model, &produced.text));
        (Usage::new(input, output), UsageSource::OwnTokenizer)
    }

    fn bill(&self, usage: &Usage, tier: Tier, answered_model: Option<&str>) -> Bill {
        let requested = self.requested_model();
        let served = self.served.as_ref();
        if let (Some(route), Some(offer)) = (&self.route, served.and_then(|served| served.offer)) {
            bill::bill(&self.state.config, route, &route.offers[offer], requested, usage, tier)
        } else {
            let model = if requested.is_empty() { answered_model.unwrap_or_default() } else { requested };
            bill::bill_unrouted(&self.state.config, model, usage, tier)
        }
    }

    /// Writes the row and counts everything that a finished call counts.
    fn book(
        mut self,
        outcome: Outcome,
        usage: &Usage,
        source: UsageSource,
        tier: Tier,
        bill: Bill,
    ) -> Settling {
        self.is_settled = true;
        let closed_at = self.gateway.now();
        let is_worth_a_row = self.buys || source != UsageSource::None;
        let ticket = is_worth_a_row.then(|| self.write_row(closed_at, outcome, usage, source, tier, &bill));
        self.count_metrics(outcome, usage, source, &bill);
        self.feed_pool(closed_at, outcome, usage, source, &bill);
        if self.state.config.ledger.fsync == crate::config::Fsync::Always
            && let Some(ticket) = ticket
        {
            let ledger = self.gateway.ledger.clone();
            return Settling::Durable(Box::pin(async move { ledger.durable(ticket).await }));
        }
        Settling::Done
    }

    fn write_row(
        &self,
        closed_at: Timestamp,
        outcome: Outcome,
        usage: &Usage,
        source: UsageSource,
        tier: Tier,
        bill: &Bill,
    ) -> Ticket {
        let text = |text: &str| text.to_owned();
        let served = self.served.as_ref();
        let first_token_at = self.first_token.map(|after| self.opened_at + self.gateway.clock.scaled(after));
        self.gateway.ledger.append(&Entry {
            id: self.id,
            opened_at: self.opened_at,
            closed_at,
            first_token_at,
            key: self.caller.key.clone(),
            team: self.caller.team.clone(),
            tags: self.caller.tags.clone(),
            endpoint: text(self.endpoint.as_str()),
            route: self.route.as_ref().map_or_else(String::new, |route| route.spec.name.clone()),
            requested_model: self.requested_model().to_owned(),
            served_model: served.map_or_else(String::new, |served| served.model.clone()),
            backend: served.map_or_else(String::new, |served| served.backend.name().to_owned()),
            reason: text(self.reason.as_str()),
            attempts: self.attempts,
            status: self.status,
            outcome,
            stream: self.call.as_ref().is_some_and(|call| call.stream),
            usage: *usage,
            usage_source: source,
            tier: text(tier.as_str()),
            cost: bill.cost + self.attempts_cost,
            api_cost: bill.api_cost,
            self_hosted_cost: bill.self_hosted_cost,
            work: bill.work,
            attempts_cost: self.attempts_cost,
            unpriced: bill.unpriced,
            config_digest: self.state.config.digest.clone(),
        })
    }

    fn count_metrics(&self, outcome: Outcome, usage: &Usage, source: UsageSource, bill: &Bill) {
        self.gateway.metrics.tokens_counted(source);
        let Some(served) = &self.served else { return };
        let series = &served.series;
        series.finished(outcome);
        series.tokens(usage, self.streamed_tokens);
        series.cost(bill.cost + self.attempts_cost);
        if let Some(cost) = bill.api_cost {
            series.all_api_cost(cost);
        }
        if bill.unpriced {
            series.unpriced();
        }
        let age = self.watch.elapsed();
        series.duration(age);
        if let Some(first) = self.first_token {
            series.first_token(first);
            series.decoding(age.saturating_sub(first), usage.output_tokens);
        }
        if served.backend.is_api() {
            served.backend.series.spend(SpendKind::Tokens, bill.cost + self.attempts_cost);
            return;
        }
        let fee = bill.cost - bill.rent_share;
        served.backend.series.spend(SpendKind::Requests, fee);
        if let Some(pool) = self.route.as_ref().and_then(|route| route.pool.as_ref()) {
            pool.attribute(bill.rent_share, bill.work);
            pool.series.busy(bill.work);
            if let Some(first) = self.first_token {
                pool.first_token(first);
            }
            if bill::is_paid_per_use(pool) {
                served.backend.series.spend(SpendKind::Capacity, bill.rent_share);
            }
        }
    }

    fn feed_pool(
        &self,
        closed_at: Timestamp,
        outcome: Outcome,
        usage: &Usage,
        source: UsageSource,
        bill: &Bill,
    ) {
        let Some(route) = &self.route else { return };
        if source == UsageSource::UpstreamUsage
            && outcome == Outcome::Success
            && let Some(call) = &self.call
        {
            route.learn(call.input_bytes, usage.input_tokens, call.max_output_tokens, usage.output_tokens);
            self.compare_counts(call, usage);
        }
        if let Some(pool) = &route.pool
            && usage.total_tokens() > 0
        {
            pool.record(
                closed_at,
                &Slot {
                    api_cost: bill.api_cost.unwrap_or_default(),
                    work: bill.work,
                    requests: 1,
                    tokens: usage.total_tokens(),
                },
            );
        }
    }

    /// Now and then, counts the input ourselves as well, elsewhere.
    fn compare_counts(&self, call: &Call, usage: &Usage) {
        if !self.id.as_bytes()[15].is_multiple_of(COMPARED_ONE_IN) || usage.cached_input_tokens > 0 {
            return;
        }
        let (Some(body), Some(served)) = (self.body.clone(), &self.served) else { return };
        // A vocabulary is not loaded for a comparison alone.
        let is_loaded = tokenizer::Encoding::of(&call.model).is_some_and(tokenizer::Encoding::is_loaded);
        if !is_loaded || call.media_parts > 0 {
            return;
        }
        let (model, endpoint, series, upstream) =
            (call.model.clone(), self.endpoint, served.series.clone(), usage.input_tokens);
        let job = move || series.counts_compared(tokenizer::count_call(&model, endpoint, &body), upstream);
        // When the threads are busy there is no comparison.
        let _is_taken = self.gateway.counter.submit(Box::new(job));
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if self.is_settled {
            return;
        }
        self.end_attempt(AttemptResult::Cancelled, None);
        // What is left is a call whose client went away before an answer began, or one that was refused.
        // The first may be billed by an API that had begun with it: its input is booked, as an estimate.
        if self.attempts == 0 || !self.buys {
            return;
        }
        self.is_settled = true;
        let usage = Usage { output_tokens: 0, ..self.estimate(0) };
        let bill = self.bill(&usage, Tier::Standard, None);
        let closed_at = self.gateway.now();
        self.status = CLIENT_CLOSED_REQUEST;
        let _ticket = self.write_row(
            closed_at,
            Outcome::Cancelled,
            &usage,
            UsageSource::Estimate,
            Tier::Standard,
            &bill,
        );
        self.count_metrics(Outcome::Cancelled, &usage, UsageSource::Estimate, &bill);
        self.feed_pool(closed_at, Outcome::Cancelled, &usage, UsageSource::Estimate, &bill);
    }
}

/// The status of a row whose client did not wait for one.
const CLIENT_CLOSED_REQUEST: u16 = 499;

fn attempt_result(outcome: Outcome, status: u16) -> AttemptResult {
    match outcome {
        Outcome::Success | Outcome::ClientError => AttemptResult::of_status(status),
        Outcome::UpstreamError if status >= 400 => AttemptResult::of_status(status),
        Outcome::UpstreamError => AttemptResult::Broken,
        Outcome::Timeout => AttemptResult::Timeout,
        Outcome::Cancelled => AttemptResult::Cancelled,
    }
}

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
    fn scaled(&self, tokens: u64) -> u64 {
        if self.kept_share > 0.0 && self.kept_share < 1.0 {
            (tokens as f64 / self.kept_share).round() as u64
        } else {
            tokens
        }
    }
}

/// What the end of an answer waits for.
pub enum Settling {
    Done,
    /// The row is on its way to the disk.
    Durable(Pin<Box<dyn Future<Output = ()> + Send>>),
    /// Tokens are being counted, and the row written after that.
    Counting(oneshot::Receiver<()>),
}

impl Settling {
    pub const fn done() -> Self {
        Self::Done
    }

    pub fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        match self {
            Self::Done => Poll::Ready(()),
            Self::Durable(future) => future.as_mut().poll(context),
            Self::Counting(waiting) => Pin::new(waiting).poll(context).map(|_| ()),
        }
    }

    pub async fn wait(mut self) {
        std::future::poll_fn(|context| self.poll(context)).await;
    }
}

impl std::fmt::Debug for Settling {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(match self {
            Self::Done => "Done",
            Self::Durable(_) => "Durable",
            Self::Counting(_) => "Counting",
        })
    }
}
