//! Where one call goes: the pool's plan, the call's value, what the offers can serve, and who has room.

use super::{Home, Offer, Pool, Route, State};
use crate::config::{Features, RoutePolicy};
use crate::economics::route::{PoolState, Stickiness, route as decide};
use crate::economics::work::{CallValue, WorkPrice};
use crate::economics::{Billing, NanoUsd, Preference, PriceCard, Reason, Tier, Timestamp, Usage, Work};
use crate::fleet::Availability;
use crate::openai::{Call, Endpoint};

/// The offers in the order in which they are tried; the first is chosen, the rest are for failover.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// Positions in the route's offers.
    pub order: Vec<usize>,
    pub reason: Reason,
}

/// Why no offer may serve a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    NotEligible(&'static str),
    UnknownBackend,
}

/// What a choice goes by besides the call itself.
#[derive(Debug, Clone, Copy)]
pub struct Circumstances<'a> {
    /// The backend that the client names.
    pub wanted: Option<&'a str>,
    /// Where the conversation was served last.
    pub home: Option<Home>,
    /// A number drawn from 0 to 1, for routes that split.
    pub dice: f64,
    pub now: Timestamp,
}

/// Chooses. Reads snapshots and atomics; takes no lock and does not wait.
pub fn choose(
    state: &State,
    route: &Route,
    call: &Call,
    circumstances: Circumstances<'_>,
) -> Result<Choice, Refusal> {
    let mut eligible = Vec::with_capacity(route.offers.len());
    let mut lacking = None;
    for (index, offer) in route.offers.iter().enumerate() {
        match lacks(offer, route, call) {
            None => eligible.push(index),
            Some(what) => lacking = Some(what),
        }
    }
    if let Some(wanted) = circumstances.wanted {
        let pinned = eligible.iter().copied().find(|index| route.offers[*index].backend.name() == wanted);
        return pinned.map_or(Err(Refusal::UnknownBackend), |index| {
            Ok(Choice { order: vec![index], reason: Reason::Pinned })
        });
    }
    let side = |index: &usize| {
        if route.offers[*index].backend.is_api() { Preference::Api } else { Preference::SelfHosted }
    };
    let first_of = |wanted| eligible.iter().copied().find(|index| side(index) == wanted);
    let reason = match (first_of(Preference::SelfHosted), first_of(Preference::Api)) {
        (None, None) => return Err(Refusal::NotEligible(lacking.unwrap_or("it has no offers"))),
        (Some(own), Some(api)) => {
            let (preference, reason) = prefer(state, route, call, circumstances, own, api);
            // The preferred side comes first; on each side the owner's order holds.
            eligible.sort_by_key(|index| side(index) != preference);
            reason
        }
        _ if lacking.is_some() => Reason::NotEligible,
        _ => Reason::OnlyOffer,
    };
    Ok(Choice { order: eligible, reason })
}

/// Which side, when both can serve.
fn prefer(
    state: &State,
    route: &Route,
    call: &Call,
    circumstances: Circumstances<'_>,
    own: usize,
    api: usize,
) -> (Preference, Reason) {
    let Some(pool) = &route.pool else { return (Preference::Api, Reason::OnlyOffer) };
    let (mut preference, mut reason) = match &route.spec.policy {
        RoutePolicy::SelfHosted => (Preference::SelfHosted, Reason::Pinned),
        RoutePolicy::Split { self_hosted_share } if circumstances.dice < *self_hosted_share => {
            (Preference::SelfHosted, Reason::Pinned)
        }
        RoutePolicy::Api | RoutePolicy::Split { .. } => (Preference::Api, Reason::Pinned),
        RoutePolicy::Threshold(_) | RoutePolicy::Cheapest | RoutePolicy::Adaptive => pool.plan(),
    };
    let now = circumstances.now;
    let availability_of = |offer: usize| route.offers[offer].backend.fleet.availability_at(now);
    let offer = &route.offers[api];
    let api_troubled = offer.backend.throttle.throttled_until(now).is_some()
        || availability_of(api) == Availability::NoReplica;
    let availability = availability_of(own);
    if preference == Preference::Api {
        let is_paid = match pool.spec.billing {
            Billing::WhileRunning => pool.is_controlled,
            Billing::Committed | Billing::PerUse => true,
        };
        let may_take_paid = is_paid && reason != Reason::Pinned;
        if availability == Availability::Room && api_troubled {
            return (Preference::SelfHosted, Reason::Unhealthy);
        }
        if !may_take_paid || availability != Availability::Room {
            return (preference, reason);
        }
    }
    if reason == Reason::Pinned {
        // The owner's word goes before the price; only who cannot serve at all is passed over.
        return match availability {
            Availability::Room => (preference, reason),
            Availability::Full => (Preference::Api, Reason::Overflow),
            Availability::NoReplica => (Preference::Api, Reason::Unhealthy),
        };
    }
    let price = pool.work_price();
    // While work and calls cost nothing, a replica that is paid is the cheapest place, whatever is cached elsewhere.
    let costs_nothing = price == WorkPrice::default() && pool.spec.request_fee == NanoUsd::ZERO;
    let (value, conversation) = if costs_nothing {
        (CallValue { worth: NanoUsd::ZERO, work: Work::ZERO }, None)
    } else {
        let usage = expected_usage(route, call);
        let card = offer.card(&state.config, &call.model);
        let conversation = circumstances.home.and_then(|home| match home.offer {
            at if at == own => {
                Some(Stickiness::on_replica(price, &pool.spec.capacity, &usage, home.cached_tokens))
            }
            at if at == api => card.map(|card| Stickiness::on_api(card, &usage, home.cached_tokens)),
            _ => None,
        });
        (value(card, pool, &usage), conversation)
    };
    let live = PoolState {
        preference,
        reason,
        ready_replicas: u32::from(availability != Availability::NoReplica),
        has_room: availability == Availability::Room,
        price,
    };
    (preference, reason) = decide(&live, value, conversation);
    if preference == Preference::Api && api_troubled && availability == Availability::Room {
        return (Preference::SelfHosted, Reason::Unhealthy);
    }
    (preference, reason)
}

/// What a call will use, as far as it can be told before it is served.
fn expected_usage(route: &Route, call: &Call) -> Usage {
    Usage::new(
        route.ratio.estimate(call.input_bytes),
        route.expected_output(call.max_output_tokens) * u64::from(call.choices),
    )
}

/// What a call is worth and takes. Without an API price it is worth nothing, and owes nothing.
fn value(card: Option<&PriceCard>, pool: &Pool, usage: &Usage) -> CallValue {
    let worth = card.map(|card| card.cost(usage, Tier::Standard) - pool.spec.request_fee);
    CallValue { worth: worth.unwrap_or_default(), work: pool.work_of(usage) }
}

/// What an offer lacks for a call; none when it can serve it.
fn lacks(offer: &Offer, route: &Route, call: &Call) -> Option<&'static str> {
    let Features {
        tools, json_schema, vision, audio, logprobs, multiple_choices, embeddings, responses, ..
    } = offer.spec.features;
    let needs = &call.needs;
    let wants = [
        (needs.tools && !tools, "it needs tools"),
        (needs.json_schema && !json_schema, "it needs a JSON schema"),
        (needs.vision && !vision, "it needs vision"),
        (needs.audio && !audio, "it needs audio"),
        (needs.logprobs && !logprobs, "it needs logprobs"),
        (needs.hosted && !offer.backend.is_api(), "it refers to what only the API keeps"),
        (call.choices > 1 && !multiple_choices, "it needs more than one choice"),
        (call.endpoint == Endpoint::Embeddings && !embeddings, "it needs embeddings"),
        (call.endpoint == Endpoint::Responses && !responses, "it needs the Responses API"),
    ];
    if let Some((_, what)) = wants.into_iter().find(|(is_lacking, _)| *is_lacking) {
        return Some(what);
    }
    let window = offer.spec.context_window?;
    let input = route.ratio.estimate(call.input_bytes);
    (input + call.max_output_tokens.unwrap_or(0) > window).then_some("it is longer than the context window")
}
