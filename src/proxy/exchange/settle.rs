//! The end of a call: what it used is priced, its row written, everything counted. Once.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;

use super::{Exchange, Produced, Settling};
use crate::clock::Stopwatch;
use crate::economics::{NanoUsd, Slot, Tier, Timestamp, Usage};
use crate::gateway::Home;
use crate::ledger::once::response_id;
use crate::ledger::{Entry, Outcome, Ticket, UsageSource};
use crate::metrics::{AttemptResult, SpendKind};
use crate::openai::tokenizer::{Encoding, Vocabulary};
use crate::openai::usage::Reported;
use crate::openai::{Call, Endpoint, text, tokenizer};
use crate::proxy::bill::{self, Bill};
use crate::proxy::reader::Reader;
use crate::proxy::vocabularies::Loaded;

/// One call in so many is counted by our tokenizer as well, to know how far its counts are off.
const COMPARED_ONE_IN: u8 = 128;

impl Exchange {
    /// Books a call whose answer was read as it passed. The answer's end waits for what this returns.
    pub fn settle_stream(mut self: Box<Self>, outcome: Outcome, reader: &mut Reader) -> Settling {
        self.end_attempt(attempt_result(outcome, self.status), None);
        match reader.reported() {
            reported if self.is_later() => self.book_later(outcome, reported.as_ref()),
            _ if self.endpoint == Endpoint::Files && !self.is_first_reading(outcome) => {
                self.book_no_row(outcome)
            }
            Some(reported) => self.book_reported(outcome, &reported),
            None if self.expects_usage(outcome) => self.count_stream(outcome, reader),
            None => self.book_nothing(outcome),
        }
    }

    /// Books a complete answer.
    pub fn settle_unary(
        mut self: Box<Self>,
        outcome: Outcome,
        reported: Option<&Reported>,
        answer: &Bytes,
    ) -> Settling {
        self.end_attempt(attempt_result(outcome, self.status), None);
        match reported {
            reported if self.is_later() => self.book_later(outcome, reported),
            Some(reported) if self.has_usage_per_choice() => self.book_one_choice(outcome, reported),
            Some(reported) => self.book_reported(outcome, reported),
            None if self.expects_usage(outcome) => {
                let (endpoint, answer) = (self.endpoint, answer.clone());
                let bytes = u64::try_from(answer.len()).unwrap_or(u64::MAX);
                let produced = move || {
                    let text = text::produced(endpoint, &answer);
                    Produced { bytes: u64::try_from(text.len()).unwrap_or(u64::MAX), text, kept_share: 1.0 }
                };
                self.count_and_book(outcome, Tier::Standard, bytes, produced)
            }
            None => self.book_nothing(outcome),
        }
    }

    /// Books a call that failed without an answer of its own.
    pub fn settle_failed(mut self: Box<Self>, outcome: Outcome, status: u16) {
        self.status = status;
        let _settling = self.book_nothing(outcome);
    }

    /// The client went away: what was produced until then is booked.
    pub fn cancel_stream(mut self: Box<Self>, reader: &mut Reader) {
        self.end_attempt(AttemptResult::Cancelled, None);
        let _settling = match reader.reported() {
            // Who reads only a part of a file buys nothing: it was made long ago, and will be read again.
            _ if self.endpoint == Endpoint::Files => self.book_no_row(Outcome::Cancelled),
            reported if self.is_later() => self.book_later(Outcome::Cancelled, reported.as_ref()),
            Some(reported) => self.book_reported(Outcome::Cancelled, &reported),
            None => self.count_stream(Outcome::Cancelled, reader),
        };
    }

    /// Whether an answer of this kind reports usage, so that its absence has to be made up for.
    fn expects_usage(&self, outcome: Outcome) -> bool {
        self.call.is_some()
            && self.endpoint.is_routed()
            && (200..300).contains(&self.status)
            && outcome != Outcome::ClientError
    }

    fn book_reported(mut self: Box<Self>, outcome: Outcome, reported: &Reported) -> Settling {
        self.span.answered_by(reported.model.as_deref());
        let bill = self.bill(&reported.usage, reported.tier, reported.model.as_deref());
        self.book(outcome, &reported.usage, UsageSource::UpstreamUsage, reported.tier, bill)
    }

    /// Books an answer of several choices whose usage is that of one: the others are taken to be as long.
    fn book_one_choice(mut self: Box<Self>, outcome: Outcome, reported: &Reported) -> Settling {
        self.span.answered_by(reported.model.as_deref());
        let choices = self.call.as_ref().map_or(1, |call| u64::from(call.choices));
        let Reported { usage, tier, .. } = reported;
        let usage = Usage {
            output_tokens: usage.output_tokens.saturating_mul(choices),
            reasoning_tokens: usage.reasoning_tokens.saturating_mul(choices),
            ..*usage
        };
        let bill = self.bill(&usage, *tier, reported.model.as_deref());
        self.book(outcome, &usage, UsageSource::Estimate, *tier, bill)
    }

    fn book_nothing(self: Box<Self>, outcome: Outcome) -> Settling {
        let is_answered = outcome == Outcome::Success && (200..300).contains(&self.status);
        let unpriced = is_answered && self.endpoint.costs_without_usage();
        let bill = Bill { unpriced, ..Bill::default() };
        self.book(outcome, &Usage::default(), UsageSource::None, Tier::Standard, bill)
    }

    fn book_no_row(mut self: Box<Self>, outcome: Outcome) -> Settling {
        self.buys = false;
        self.book_nothing(outcome)
    }

    /// Whether its usage, if there is any, is that of a response which is made while nobody waits for it.
    fn is_later(&self) -> bool {
        self.endpoint == Endpoint::Response || self.call.as_ref().is_some_and(|call| call.background)
    }

    /// Books a response that is made in the background, or was, when its usage is seen: once, in a row of its own whose
    /// id is made from the response's. The call that began it has a row without usage, and who reads it has none.
    fn book_later(self: Box<Self>, outcome: Outcome, reported: Option<&Reported>) -> Settling {
        let Some(reported) = reported.filter(|reported| reported.is_background || self.call.is_some()) else {
            return self.book_nothing(outcome);
        };
        if self.endpoint == Endpoint::Response {
            let is_first = self.gateway.billed.is_first(self.id);
            return if is_first { self.book_reported(outcome, reported) } else { self.book_nothing(outcome) };
        }
        let Some(name) = &reported.id else { return self.book_reported(outcome, reported) };
        let id = self.served.as_ref().map(|served| response_id(served.backend.name(), name));
        if let Some(id) = id.filter(|id| self.gateway.billed.is_first(*id))
            && let Some(part) = self.part_once(id)
        {
            drop(part.book_reported(outcome, reported));
        }
        self.book_nothing(outcome)
    }

    /// Whether this is the first time that a file is read to its end. The output of a batch is billed then, and
    /// not when it is read again.
    fn is_first_reading(&self, outcome: Outcome) -> bool {
        outcome == Outcome::Success && self.gateway.billed.is_first(self.id)
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

    /// Counts what a stream has produced, at the tier that it named or was asked for.
    fn count_stream(self: Box<Self>, outcome: Outcome, reader: &Reader) -> Settling {
        let asked = self.call.as_ref().and_then(|call| call.service_tier);
        let tier = reader.report().and_then(|report| report.tier).or(asked).unwrap_or_default();
        let produced = reader.produced();
        self.count_and_book(outcome, tier, produced.bytes, move || produced)
    }

    /// Counts with the tokenizer elsewhere, then books. What is returned is done when the row is written.
    /// When too many counts wait already, `bytes` of text are estimated instead.
    fn count_and_book(
        self: Box<Self>,
        outcome: Outcome,
        tier: Tier,
        bytes: u64,
        produced: impl FnOnce() -> Produced + Send + 'static,
    ) -> Settling {
        let Some(model) = self.call.as_ref().map(|call| call.model.clone()) else {
            return self.book_nothing(outcome);
        };
        let (done, waiting) = oneshot::channel();
        let gateway = self.gateway.clone();
        let job = move |counts: bool| {
            let fallback = self.estimate(bytes);
            let (usage, source) =
                if counts { self.count(&model, &produced()) } else { (fallback, UsageSource::Estimate) };
            let bill = self.bill(&usage, tier, None);
            // Nobody waits when the client is gone.
            drop(done.send(self.book(outcome, &usage, source, tier, bill)));
        };
        if let Err(job) = gateway.counter.submit(Box::new(job)) {
            job(false);
        }
        Settling::Counting(waiting)
    }

    fn count(&self, model: &str, produced: &Produced) -> (Usage, UsageSource) {
        let fallback = self.estimate(produced.bytes);
        let own = self.own_tokenizer().map(|path| self.gateway.vocabularies.load(path));
        let served = self.served.as_ref().map_or(model, |served| served.model.as_str());
        let vocabulary = match own.as_ref().and_then(Loaded::tokenizer) {
            Some(own) => Vocabulary::File(own),
            None if Encoding::of(served).is_some() => Vocabulary::of(served),
            None if Encoding::of(model).is_some() => Vocabulary::of(model),
            None => return (fallback, UsageSource::Estimate),
        };
        let input = match &self.body {
            Some(body) => tokenizer::count_call_in(vocabulary, self.endpoint, body),
            None => fallback.input_tokens,
        };
        let output = produced.scaled(vocabulary.count(&produced.text));
        (Usage::new(input, output), UsageSource::OwnTokenizer)
    }

    /// The file of the tokenizer of the model that served.
    fn own_tokenizer(&self) -> Option<&Path> {
        let offer = self.served.as_ref()?.offer?;
        self.route.as_ref()?.offers[offer].spec.tokenizer.as_deref()
    }

    /// The input that a backend has read by now which has all of the request, at the tier that was asked for.
    fn estimated_input(&self) -> (Usage, Tier) {
        let tier = self.call.as_ref().and_then(|call| call.service_tier).unwrap_or_default();
        (Usage { output_tokens: 0, ..self.estimate(0) }, tier)
    }

    /// Owes the estimated price of an attempt that brought no answer. It is counted here, where the backend is known
    /// that charges it; the row says it as a part of the call's cost.
    pub(super) fn charge_attempt(&mut self) {
        let (Some(route), Some(served)) = (&self.route, &self.served) else { return };
        let Some(offer) = served.offer.map(|index| &route.offers[index]) else { return };
        let (usage, tier) = self.estimated_input();
        let cost = bill::attempt(&self.state.config, offer, self.requested_model(), &usage, tier);
        let kind = if served.backend.is_api() { SpendKind::Tokens } else { SpendKind::Requests };
        served.series.cost(cost);
        served.backend.series.spend(kind, cost);
        self.attempts_cost += cost;
    }

    fn bill(&self, usage: &Usage, tier: Tier, answered_model: Option<&str>) -> Bill {
        let requested = self.requested_model();
        let model = if requested.is_empty() { answered_model.unwrap_or_default() } else { requested };
        let served = self.served.as_ref();
        if let (Some(route), Some(offer)) = (&self.route, served.and_then(|served| served.offer)) {
            bill::bill(&self.state.config, route, &route.offers[offer], model, usage, tier)
        } else {
            bill::bill_unrouted(&self.state.config, model, usage, tier)
        }
    }

    /// Ends the call. What is returned ends when its row is safe.
    fn book(
        mut self: Box<Self>,
        outcome: Outcome,
        usage: &Usage,
        source: UsageSource,
        tier: Tier,
        bill: Bill,
    ) -> Settling {
        self.is_settled = true;
        let cost = bill.cost + self.attempts_cost;
        let known_cost = (source != UsageSource::None || cost != NanoUsd::ZERO).then_some(cost);
        let Some(ticket) = self.record(outcome, usage, source, tier, &bill) else {
            return Settling::Done(known_cost);
        };
        if self.state.config.ledger.fsync == crate::config::Fsync::Always {
            let ledger = self.gateway.ledger.clone();
            return Settling::Durable(Box::pin(async move { ledger.durable(ticket).await }), known_cost);
        }
        Settling::Written(ticket, known_cost, self)
    }

    /// Writes the row and counts everything that a finished call counts.
    fn record(
        &mut self,
        outcome: Outcome,
        usage: &Usage,
        source: UsageSource,
        tier: Tier,
        bill: &Bill,
    ) -> Option<Ticket> {
        let end = Stopwatch::start();
        let closed_at = self.gateway.clock.at(end);
        self.admission.settle(bill.cost + self.attempts_cost, usage.total_tokens(), closed_at);
        let is_worth_a_row = self.buys || source != UsageSource::None;
        let mut span = std::mem::take(&mut self.span);
        let entry = self.row(closed_at, outcome, usage, source, tier, bill);
        span.close(|| self.finished(&entry));
        let ticket = is_worth_a_row.then(|| self.gateway.ledger.append(&entry));
        self.count_metrics(end.since(self.watch), outcome, usage, source, bill);
        self.feed_pool(closed_at, outcome, usage, source, bill);
        ticket
    }

    fn row(
        &self,
        closed_at: Timestamp,
        outcome: Outcome,
        usage: &Usage,
        source: UsageSource,
        tier: Tier,
        bill: &Bill,
    ) -> Entry<'_> {
        let served = self.served.as_ref();
        let first_token_at = self.first_token.map(|after| self.opened_at + self.gateway.clock.scaled(after));
        Entry {
            id: self.id,
            opened_at: self.opened_at,
            closed_at,
            first_token_at,
            key: self.caller.key.as_str().into(),
            team: self.caller.team.as_str().into(),
            tags: self.caller.tags.as_str().into(),
            endpoint: self.endpoint.as_str().into(),
            route: self.route.as_ref().map_or("", |route| &route.spec.name).into(),
            requested_model: self.requested_model().into(),
            served_model: served.map_or("", |served| &served.model).into(),
            backend: served.map_or("", |served| served.backend.name()).into(),
            reason: self.reason.as_str().into(),
            attempts: self.attempts,
            status: self.status,
            outcome,
            stream: self.call.as_ref().is_some_and(|call| call.stream),
            usage: *usage,
            usage_source: source,
            tier: tier.as_str().into(),
            cost: bill.cost + self.attempts_cost,
            api_cost: bill.api_cost,
            self_hosted_cost: bill.self_hosted_cost,
            work: bill.work,
            attempts_cost: self.attempts_cost,
            unpriced: bill.unpriced,
            config_digest: self.state.config.digest.as_str().into(),
        }
    }

    fn count_metrics(
        &self,
        age: Duration,
        outcome: Outcome,
        usage: &Usage,
        source: UsageSource,
        bill: &Bill,
    ) {
        self.gateway.metrics.tokens_counted(source);
        let Some(served) = &self.served else { return };
        let series = &served.series;
        series.finished(outcome);
        series.tokens(usage, self.streamed_tokens);
        series.cost(bill.cost);
        if let Some(cost) = bill.api_cost {
            series.all_api_cost(cost);
        }
        if bill.unpriced && series.unpriced() {
            let (backend, model) = (served.backend.name(), served.model.as_str());
            tracing::warn!(
                backend,
                model,
                "what a call of `{model}` at `{backend}` costs is not known: it has no price, or reports no tokens; such \
                 calls are counted as unpriced and booked without a cost (prices go under `[prices.models]`)"
            );
        }
        series.duration(age);
        if let Some(first) = self.first_token {
            series.first_token(first);
            series.decoding(age.saturating_sub(first), usage.output_tokens);
        }
        if served.backend.is_api() {
            served.backend.series.spend(SpendKind::Tokens, bill.cost);
            return;
        }
        let fee = bill.cost - bill.rent_share;
        served.backend.series.spend(SpendKind::Requests, fee);
        let offer = self.route.as_ref().zip(served.offer).map(|(route, offer)| &route.offers[offer]);
        if let Some(pool) = offer.and_then(|offer| offer.pool.as_ref()) {
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
        if outcome == Outcome::Success {
            self.remember_conversation(closed_at, usage);
        }
        if let Some(pool) = &route.pool
            && usage.total_tokens() > 0
        {
            pool.record(
                closed_at,
                &Slot {
                    api_cost: bill.api_cost.unwrap_or_default(),
                    work: pool.work_of(usage),
                    requests: 1,
                    tokens: usage.total_tokens(),
                },
            );
        }
    }

    /// Notes where the prompt and the answer are cached from now on.
    fn remember_conversation(&self, closed_at: Timestamp, usage: &Usage) {
        let Some(conversation) = self.conversation else { return };
        let Some(served) = &self.served else { return };
        let Some(offer) = served.offer else { return };
        let home = Home { offer, replica: served.replica, cached_tokens: usage.total_tokens() };
        self.gateway.conversations.remember(conversation, home, closed_at);
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
        let job = move |counts: bool| {
            if counts {
                series.counts_compared(tokenizer::count_call(&model, endpoint, &body), upstream);
            }
        };
        // When the threads are busy there is no comparison.
        let _is_taken = self.gateway.counter.submit(Box::new(job));
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if self.is_settled {
            return;
        }
        let may_be_billed =
            self.is_delivered() && self.served.as_ref().is_some_and(|served| !served.is_ended);
        self.end_attempt(AttemptResult::Cancelled, None);
        // What is left is a call whose client went away before an answer began, or one that was refused.
        if self.attempts == 0 || !self.buys {
            return;
        }
        self.is_settled = true;
        self.status = CLIENT_CLOSED_REQUEST;
        // A backend that had begun with it may bill what it has read: that is booked, as an estimate.
        let (usage, tier) = if may_be_billed { self.estimated_input() } else { Default::default() };
        let source = if may_be_billed { UsageSource::Estimate } else { UsageSource::None };
        let bill = if may_be_billed { self.bill(&usage, tier, None) } else { Bill::default() };
        let _nobody_waits = self.record(Outcome::Cancelled, &usage, source, tier, &bill);
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
