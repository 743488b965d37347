//! Letting a call in: its virtual key, what the key may use, rate limits and budgets.

use std::net::IpAddr;
use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, header};

use super::caller::caller_of;
use super::error::ProxyError;
use super::exchange::{Caller, Exchange};
use crate::config::AuthMode;
use crate::economics::{NanoUsd, Usage};
use crate::gateway::{Gateway, Identity, Offer, Route, State};
use crate::keys::Key;
use crate::keys::Unknown;
use crate::keys::admission::{Bounds, Limits, NotAdmitted};
use crate::keys::secret::PREFIX;
use crate::openai::{ApiError, Call, Endpoint};
use crate::upstream::Backend;

/// Output that a call without a limit of its own is held to be able to have.
const UNLIMITED_OUTPUT_TOKENS: u64 = 4096;
/// An image or a clip in the input, as the dearest detail is billed.
const MEDIA_PART_TOKENS: u64 = 1500;
/// What a call is held to cost whose body is not read: an image of high quality.
const UNREAD_CALL: NanoUsd = NanoUsd::from_nanos(200_000_000);

/// Who calls, as far as headers say it. With virtual keys, only who holds one that has not used up its rate;
/// the key itself is taken out of the head wherever it stands, so that it goes no further.
pub fn authenticate(
    gateway: &Gateway,
    state: &State,
    uri: &Uri,
    headers: &mut HeaderMap,
) -> Result<(Caller, Option<Arc<Key>>), ProxyError> {
    let mut caller = caller_of(headers);
    if state.config.auth.mode != AuthMode::Keys {
        return Ok((caller, None));
    }
    if uri.query().is_some_and(|query| query.contains(PREFIX)) {
        let why = "a virtual key must not be in the URL; send it as `Authorization: Bearer`";
        return Err(ProxyError::Request(ApiError::invalid_request(why)));
    }
    let now = gateway.now();
    let key = secret_of(headers).ok_or(Unknown::Missing).and_then(|secret| gateway.keys.find(secret, now));
    let key = key.map_err(ProxyError::InvalidKey)?;
    withhold_secrets(headers);
    if let Some(rate) = &key.requests
        && let Err(wait) = rate.take(1, now)
    {
        return Err(ProxyError::RateLimited { what: "requests", wait, limits: key.limits(now) });
    }
    caller.key.clone_from(&key.record.id);
    if !key.record.team.is_empty() {
        caller.team.clone_from(&key.record.team);
    }
    Ok((caller, Some(key)))
}

/// Who a call is counted as, while places are scarce: its virtual key, or the credential that the API will
/// check, or else its address.
pub fn identity<'a>(key: Option<&'a Key>, headers: &'a HeaderMap, address: IpAddr) -> Identity<'a> {
    match (key, secret_of(headers)) {
        (Some(key), _) => Identity::Key(&key.record.id),
        (None, Some(secret)) => Identity::Credential(secret),
        (None, None) => Identity::address(address),
    }
}

/// The secret where the SDKs of OpenAI, Azure and Anthropic put it.
fn secret_of(headers: &HeaderMap) -> Option<&[u8]> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| {
        let (scheme, secret) = value.as_bytes().split_at_checked("Bearer ".len())?;
        scheme.eq_ignore_ascii_case(b"Bearer ").then_some(secret.trim_ascii())
    });
    let other = |name| headers.get(name).map(HeaderValue::as_bytes);
    bearer.or_else(|| other("api-key")).or_else(|| other("x-api-key"))
}

fn withhold_secrets(headers: &mut HeaderMap) {
    let holds = |value: &HeaderValue| memchr::memmem::find(value.as_bytes(), PREFIX.as_bytes()).is_some();
    let found: Vec<HeaderName> =
        headers.iter().filter(|(_, value)| holds(value)).map(|(name, _)| name.clone()).collect();
    for name in found {
        headers.remove(name);
    }
}

/// Lets in a call that was read, and takes out of `order` the offers that it may not use.
pub fn admit_call(
    exchange: &mut Exchange,
    route: &Route,
    call: &Call,
    order: &mut Vec<usize>,
) -> Result<(), ProxyError> {
    let gateway = exchange.gateway().clone();
    let key = exchange.key().cloned();
    if key.is_none() && !gateway.keys.has_budgets() {
        return Ok(());
    }
    if let Some(key) = &key {
        if !key.may_use_route(&route.spec.name) {
            return Err(ProxyError::ModelNotAllowed { model: call.model.chars().take(128).collect() });
        }
        order.retain(|index| key.may_use_backend(route.offers[*index].backend.name()));
        if order.is_empty() {
            return Err(ProxyError::NotAllowed { what: "any backend that can serve this call" });
        }
    }
    let offers = order.iter().map(|index| &route.offers[*index]);
    let bounds = bounds(exchange.state(), route, call, offers);
    let names = (exchange.team(), route.spec.name.as_str());
    let (admission, spent) = gateway
        .keys
        .admit(key.as_ref(), names, bounds, gateway.now())
        .map_err(|why| refusal(&gateway, why))?;
    if let Some(spent) = spent {
        order.retain(|index| !route.offers[*index].backend.is_api());
        if order.is_empty() {
            return Err(refusal(&gateway, spent));
        }
    }
    exchange.set_admission(admission);
    Ok(())
}

/// Lets in a call to a path that is not read. It goes to the API, so a budget that leaves only the cheaper
/// backend refuses it, and a key for certain routes does not cover it.
pub fn admit_unread(
    exchange: &mut Exchange,
    backend: &Backend,
    method: &Method,
    is_session: bool,
) -> Result<(), ProxyError> {
    let gateway = exchange.gateway().clone();
    let key = exchange.key().cloned();
    if let Some(key) = &key {
        if !key.record.routes.is_empty() {
            return Err(ProxyError::NotAllowed { what: "paths that belong to no route" });
        }
        if !key.may_use_backend(backend.name()) {
            return Err(ProxyError::NotAllowed { what: "the backend that serves this path" });
        }
    }
    if exchange.endpoint() == Endpoint::Response {
        let bought = gateway.keys.admit_bought(key.as_deref(), exchange.team());
        exchange.set_admission(bought);
        return Ok(());
    }
    let buys = is_session || exchange.endpoint().may_bill(method);
    if !buys || (key.is_none() && !gateway.keys.has_budgets()) {
        return Ok(());
    }
    let bounds = Bounds { cost: UNREAD_CALL, tokens: 0 };
    let admitted = gateway.keys.admit(key.as_ref(), (exchange.team(), ""), bounds, gateway.now());
    match admitted {
        Ok((admission, None)) => exchange.set_admission(admission),
        Ok((_, Some(why))) | Err(why) => return Err(refusal(&gateway, why)),
    }
    Ok(())
}

fn refusal(gateway: &Gateway, why: NotAdmitted) -> ProxyError {
    match why {
        NotAdmitted::Budget { name, spent } if spent.is_held_elsewhere => {
            ProxyError::BudgetElsewhere { budget: name }
        }
        NotAdmitted::Budget { name, spent } => ProxyError::BudgetSpent {
            budget: name,
            retry_after_seconds: spent.until.map(|until| until.since(gateway.now()).as_secs() + 1),
        },
        NotAdmitted::Tokens { wait, limits } => ProxyError::RateLimited { what: "tokens", wait, limits },
    }
}

/// The most that a call can cost and use, before anything of it is known but its request.
fn bounds<'a>(state: &State, route: &Route, call: &Call, offers: impl Iterator<Item = &'a Offer>) -> Bounds {
    let estimate = route.ratio.estimate(call.input_bytes);
    // A quarter more, because a text can have more tokens a byte than those before it.
    let input = estimate + estimate / 4 + u64::from(call.media_parts) * MEDIA_PART_TOKENS;
    let has_output = call.endpoint != Endpoint::Embeddings;
    let choices = u64::from(call.choices) * u64::from(has_output);
    let most =
        Usage::new(input, call.max_output_tokens.unwrap_or(UNLIMITED_OUTPUT_TOKENS).saturating_mul(choices));
    let expected = route.expected_output(call.max_output_tokens).saturating_mul(choices);
    let tier = call.service_tier.unwrap_or_default();
    let cost = offers.map(|offer| match (offer.backend.is_api(), &offer.pool) {
        (false, Some(pool)) => pool.rent_of(pool.work_of(&most)) + pool.spec.request_fee,
        (false, None) => NanoUsd::ZERO,
        (true, _) => {
            offer.card(&state.config, &call.model).map(|card| card.cost(&most, tier)).unwrap_or_default()
        }
    });
    Bounds { cost: cost.max().unwrap_or_default(), tokens: input.saturating_add(expected) }
}

/// Tells a client what is left of its key's limits, as OpenAI does.
pub fn tell_limits(headers: &mut HeaderMap, limits: &Limits) {
    const NAMES: [[&str; 3]; 2] = [
        ["x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"],
        ["x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"],
    ];
    for ([limit, remaining, reset], view) in NAMES.into_iter().zip([limits.requests, limits.tokens]) {
        let Some(view) = view else { continue };
        headers.insert(limit, HeaderValue::from(view.limit));
        headers.insert(remaining, HeaderValue::from(view.remaining));
        let text = format!("{}ms", view.reset.as_millis());
        headers.insert(reset, HeaderValue::try_from(text).expect("digits are a header's value"));
    }
}
