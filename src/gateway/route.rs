//! Where one call goes: the pool's plan, the call's value, what the offers can serve, and who has room.

use super::{Offer, Pool, Route, State};
use crate::config::{Features, RoutePolicy};
use crate::economics::route::{PoolState, route as decide};
use crate::economics::work::{CallValue, WorkPrice};
use crate::economics::{Billing, Preference, Reason, Tier, Timestamp, Usage};
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

/// Chooses. Reads snapshots and atomics; takes no lock and does not wait.
pub fn choose(
    state: &State,
    route: &Route,
    call: &Call,
    wanted: Option<&str>,
    dice: f64,
    now: Timestamp,
) -> Result<Choice, Refusal> {
    let mut eligible = Vec::with_capacity(route.offers.len());
    let mut lacking = None;
    for (index, offer) in route.offers.iter().enumerate() {
        match lacks(offer, route, call) {
            None => eligible.push(index),
            Some(what) => lacking = Some(what),
        }
    }
    if let Some(wanted) = wanted {
        let pinned = eligible.iter().copied().find(|index| route.offers[*index].backend.name() == wanted);
        return pinned.map_or(Err(Refusal::UnknownBackend), |index| {
            Ok(Choice { order: vec![index], reason: Reason::Pinned })
        });
    }
    let is_own = |index: &usize| !route.offers[*index].backend.is_api();
    let (own, api): (Vec<usize>, Vec<usize>) = eligible.into_iter().partition(is_own);
    match (own.is_empty(), api.is_empty()) {
        (true, true) => Err(Refusal::NotEligible(lacking.unwrap_or("it has no offers"))),
        (own_is_empty, api_is_empty) if own_is_empty || api_is_empty => {
            let order = if own_is_empty { api } else { own };
            let reason = if lacking.is_some() { Reason::NotEligible } else { Reason::OnlyOffer };
            Ok(Choice { order, reason })
        }
        _ => {
            let (preference, reason) = prefer(state, route, call, dice, now, own[0], api[0]);
            let order = match preference {
                Preference::SelfHosted => own.into_iter().chain(api).collect(),
                Preference::Api => api.into_iter().chain(own).collect(),
            };
            Ok(Choice { order, reason })
        }
    }
}

/// Which side, when both can serve.
fn prefer(
    state: &State,
    route: &Route,
    call: &Call,
    dice: f64,
    now: Timestamp,
    own: usize,
    api: usize,
) -> (Preference, Reason) {
    let Some(pool) = &route.pool else { return (Preference::Api, Reason::OnlyOffer) };
    let (mut preference, mut reason) = match &route.spec.policy {
        RoutePolicy::SelfHosted => (Preference::SelfHosted, Reason::Pinned),
        RoutePolicy::Split { self_hosted_share } if dice < *self_hosted_share => {
            (Preference::SelfHosted, Reason::Pinned)
        }
        RoutePolicy::Api | RoutePolicy::Split { .. } => (Preference::Api, Reason::Pinned),
        RoutePolicy::Threshold(_) | RoutePolicy::Cheapest | RoutePolicy::Adaptive => pool.plan(),
    };
    let offer = &route.offers[api];
    let api_troubled = offer.backend.throttle.throttled_until(now).is_some() || !offer.backend.is_serving();
    let availability = route.offers[own].backend.fleet.availability();
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
    let value = if price == WorkPrice::default() {
        CallValue { worth: crate::economics::NanoUsd::ZERO, work: crate::economics::Work::ZERO }
    } else {
        value(state, route, pool, offer, call)
    };
    let live = PoolState {
        preference,
        reason,
        ready_replicas: u32::from(availability != Availability::NoReplica),
        has_room: availability == Availability::Room,
        price,
    };
    (preference, reason) = decide(&live, value, None);
    if preference == Preference::Api && api_troubled && availability == Availability::Room {
        return (Preference::SelfHosted, Reason::Unhealthy);
    }
    (preference, reason)
}

/// What a call is worth and takes, as far as it can be told before it is served.
fn value(state: &State, route: &Route, pool: &Pool, api: &Offer, call: &Call) -> CallValue {
    let usage = Usage::new(
        route.ratio.estimate(call.input_bytes),
        route.expected_output(call.max_output_tokens) * u64::from(call.choices),
    );
    let cost = api.card(&state.config, &call.model).map(|card| card.cost(&usage, Tier::Standard));
    CallValue {
        worth: cost.unwrap_or_default().saturating_sub_at_zero(pool.spec.request_fee),
        work: pool.work_of(&usage),
    }
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
