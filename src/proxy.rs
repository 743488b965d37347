//! The story of one request: admit, read, route, send, meter.

pub mod bill;
pub mod body;
pub mod count;
pub mod error;
pub mod exchange;
pub mod headers;
pub mod models;
pub mod reader;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::task::Poll;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, header, request};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;

use crate::clock::Stopwatch;
use crate::config::{UnknownPrice, WhenUnavailable};
use crate::economics::{NanoUsd, Reason};
use crate::gateway::{Choice, Gateway, Refusal, Route, choose};
use crate::ledger::Outcome;
use crate::openai::usage::{self, Reported};
use crate::openai::{ApiError, BodyReader, Call, Endpoint, StreamReader};
use crate::upstream::client::{Clients, RequestBody};
use crate::upstream::send::{Answer, MAX_COLLECTED_BYTES, Outgoing, send};
use body::{Body, Metered};
use error::ProxyError;
use exchange::{Caller, Exchange, Settling};
use headers::Head;
use reader::Reader;

/// Tags are cut to this length in the ledger.
const MAX_TAGS_BYTES: usize = 256;

/// Answers a request. The one place where an error of ours becomes HTTP, and is counted.
pub async fn handle(gateway: &Arc<Gateway>, clients: &Clients, request: Request<Incoming>) -> Response<Body> {
    let team = team_of(request.headers());
    match isolated(gateway, forward(gateway, clients, request)).await {
        Ok(response) => response,
        Err(error) => {
            if error.is_refusal() {
                gateway.metrics.rejected(&team, error.label());
            }
            tracing::info!(status = error.status().as_u16(), kind = error.label(), "{error}");
            error.into_response()
        }
    }
}

/// Runs a call so that a bug in it ends that call alone, with a 500.
async fn isolated(
    gateway: &Gateway,
    call: impl Future<Output = Result<Response<Body>, ProxyError>>,
) -> Result<Response<Body>, ProxyError> {
    let mut call = std::pin::pin!(call);
    std::future::poll_fn(|context| {
        catch_unwind(AssertUnwindSafe(|| call.as_mut().poll(context))).unwrap_or_else(|_| {
            gateway.metrics.panicked();
            Poll::Ready(Err(ProxyError::Internal))
        })
    })
    .await
}

async fn forward(
    gateway: &Arc<Gateway>,
    clients: &Clients,
    request: Request<Incoming>,
) -> Result<Response<Body>, ProxyError> {
    let watch = Stopwatch::start();
    let state = gateway.state();
    let limit = state.config.limits.max_in_flight;
    let presence = gateway.enter(limit).ok_or(ProxyError::Overloaded { limit })?;
    may_record(gateway, state.config.ledger.when_unavailable)?;
    gateway.retries.earn();
    let (parts, incoming) = request.into_parts();
    let endpoint = Endpoint::of(&parts.method, parts.uri.path());
    let caller = caller_of(&parts.headers);
    let exchange = Exchange::open(gateway.clone(), state, endpoint, caller, watch, presence);
    if endpoint.is_routed() {
        routed(clients, exchange, parts, incoming).await
    } else if matches!(endpoint, Endpoint::Models | Endpoint::Model) {
        models(clients, exchange, parts, incoming).await
    } else {
        passed_through(clients, exchange, parts, incoming).await
    }
}

fn may_record(gateway: &Gateway, when_unavailable: WhenUnavailable) -> Result<(), ProxyError> {
    if gateway.ledger.is_available() || when_unavailable == WhenUnavailable::Continue {
        return Ok(());
    }
    let why = gateway.ledger.unavailable_reason().unwrap_or_else(|| "it is closed".to_owned());
    tracing::error!(why, "a call was refused because the ledger cannot record it: {why}");
    Err(ProxyError::LedgerUnavailable)
}

/// A call to one of the endpoints that are understood.
async fn routed(
    clients: &Clients,
    mut exchange: Exchange,
    parts: request::Parts,
    incoming: Incoming,
) -> Result<Response<Body>, ProxyError> {
    let state = exchange.state().clone();
    let body = collect(incoming, &state.config.limits).await?;
    let call = Call::read(exchange.endpoint(), &body).map_err(ProxyError::Request)?;
    if call.model.is_empty() {
        return Err(ProxyError::Request(ApiError::missing_model()));
    }
    let Some(route) = state.route_of(&call.model).cloned() else {
        return unrouted(clients, exchange, parts, call, body).await;
    };
    let choice = route_call(&exchange, &route, &call, &parts.headers)?;
    count_decision(&route, &choice);
    exchange.set_call(call, &body, Some(route), choice.reason);
    let mut request = outgoing(parts, body);
    match send(clients, &mut exchange, &mut request, &choice.order).await {
        Ok(answer) => Ok(respond(exchange, answer).await),
        Err(error) => Err(fail(exchange, error)),
    }
}

fn route_call(
    exchange: &Exchange,
    route: &Route,
    call: &Call,
    headers: &HeaderMap,
) -> Result<Choice, ProxyError> {
    let state = exchange.state();
    let wanted = headers.get(headers::BACKEND).and_then(|name| name.to_str().ok());
    let choice = choose(state, route, call, wanted, fastrand::f64(), exchange.gateway().now());
    let mut choice = choice.map_err(|refusal| match refusal {
        Refusal::NotEligible(why) => ProxyError::NotEligible { model: call.model.clone(), why },
        Refusal::UnknownBackend => {
            ProxyError::UnknownBackend { backend: wanted.unwrap_or_default().chars().take(64).collect() }
        }
    })?;
    let api = route.api_offer();
    if let Some(api) = api.filter(|api| api.card(&state.config, &call.model).is_none()) {
        match state.config.unknown_price {
            UnknownPrice::Reject => return Err(ProxyError::Unpriced { model: call.model.clone() }),
            UnknownPrice::ApiOnly => {
                choice.order.retain(|index| route.offers[*index].backend.is_api());
                if choice.order.is_empty() {
                    return Err(ProxyError::Unpriced { model: call.model.clone() });
                }
                tracing::warn!(
                    model = api.upstream_model(&call.model),
                    "no price is known for a model of this route"
                );
            }
            UnknownPrice::Estimate => {}
        }
    }
    Ok(choice)
}

/// Counts the decision in the pool's metrics.
fn count_decision(route: &Route, choice: &Choice) {
    let (Some(pool), Some(first)) = (&route.pool, choice.order.first()) else { return };
    if !route.offers[*first].backend.is_api() {
        pool.own_series.decision(choice.reason);
    } else if let Some(series) = &pool.api_series {
        series.decision(choice.reason);
    }
}

/// A model on no route goes to the first API as it is.
async fn unrouted(
    clients: &Clients,
    mut exchange: Exchange,
    parts: request::Parts,
    call: Call,
    body: Bytes,
) -> Result<Response<Body>, ProxyError> {
    let state = exchange.state().clone();
    let Some(backend) = state.default_backend() else {
        return Err(ProxyError::UnknownModel { model: call.model.chars().take(128).collect() });
    };
    if state.config.prices.card(&call.model).is_none() && state.config.unknown_price == UnknownPrice::Reject {
        return Err(ProxyError::Unpriced { model: call.model.chars().take(128).collect() });
    }
    let route = Arc::new(Route::alone(backend.clone(), &call.model));
    exchange.set_call(call, &body, Some(route), Reason::OnlyOffer);
    let mut request = outgoing(parts, body);
    match send(clients, &mut exchange, &mut request, &[0]).await {
        Ok(answer) => Ok(respond(exchange, answer).await),
        Err(error) => Err(fail(exchange, error)),
    }
}

fn outgoing(parts: request::Parts, body: Bytes) -> Outgoing {
    let mut head = Head::new(parts.headers);
    head.ask_unencoded();
    Outgoing { method: parts.method, path_and_query: path_and_query(&parts.uri), head, body }
}

fn path_and_query(uri: &http::Uri) -> String {
    uri.path_and_query().map_or_else(|| uri.path().to_owned(), ToString::to_string)
}

/// A path that is not understood goes to the first API, as it comes, and is metered if its answer says usage.
async fn passed_through(
    clients: &Clients,
    mut exchange: Exchange,
    parts: request::Parts,
    incoming: Incoming,
) -> Result<Response<Body>, ProxyError> {
    let state = exchange.state().clone();
    let backend = state.default_backend().ok_or(ProxyError::NoBackend)?;
    let Some(place) = backend.acquire() else {
        return Err(ProxyError::Unavailable {
            model: parts.uri.path().chars().take(128).collect(),
            retry_after_seconds: 1,
        });
    };
    exchange.begin_attempt(backend, None, place);
    exchange.set_buys(!matches!(parts.method, Method::GET | Method::HEAD | Method::OPTIONS | Method::DELETE));
    let mut head = Head::new(parts.headers);
    if exchange.endpoint() == Endpoint::Models {
        head.ask_unencoded();
    }
    head.dress(backend);
    let timeouts = &backend.spec.timeouts;
    let client = clients.of(backend);
    let place = exchange.place().expect("the attempt has begun with a place");
    let body = if http_body::Body::is_end_stream(&incoming) {
        RequestBody::Full(None)
    } else {
        RequestBody::Stream(incoming)
    };
    let target = path_and_query(&parts.uri);
    let sent = client.send(place.replica(), place.base(), &parts.method, &target, head.headers(), body);
    let response = match tokio::time::timeout(timeouts.first_byte, sent).await {
        Ok(Ok(response)) => response,
        Ok(Err(error)) => {
            tracing::warn!(backend = backend.name(), %error, "`{}` did not answer", backend.name());
            let why = "its connection broke or could not be made";
            return Err(fail(exchange, ProxyError::Upstream { backend: backend.name().to_owned(), why }));
        }
        Err(_) => {
            return Err(fail(exchange, ProxyError::UpstreamTimeout { backend: backend.name().to_owned() }));
        }
    };
    let (head, body) = response.into_parts();
    Ok(stream(exchange, Answer { head, read: Bytes::new(), rest: Some(body), strip_usage: false }))
}

/// Hands an answer to the client: whole, with its cost, or as it comes.
async fn respond(exchange: Exchange, answer: Answer) -> Response<Body> {
    if answer.rest.is_some()
        || exchange.call().is_some_and(|call| call.stream && answer.head.status.is_success())
    {
        return stream(exchange, answer);
    }
    let Answer { mut head, read, .. } = answer;
    let mut exchange = exchange;
    exchange.set_status(head.status.as_u16());
    let outcome = outcome_of(head.status);
    let reported: Option<Reported> = match outcome {
        Outcome::Success => {
            match head.headers.get(header::CONTENT_ENCODING).and_then(|value| value.to_str().ok()) {
                None => usage::from_body(exchange.endpoint(), &read),
                encoding => {
                    let mut reader = BodyReader::new(exchange.endpoint(), encoding);
                    reader.push(&read);
                    reader.finish()
                }
            }
        }
        _ => None,
    };
    annotate(&mut head.headers, &exchange);
    let (settling, cost): (Settling, Option<NanoUsd>) =
        exchange.settle_unary(outcome, reported.as_ref(), &read);
    if let Some(cost) = cost
        && let Ok(value) = HeaderValue::from_str(&cost.to_string())
    {
        head.headers.insert(headers::COST, value);
    }
    settling.wait().await;
    head.headers.remove(header::CONTENT_LENGTH);
    Response::from_parts(head, Body::full(read))
}

/// An answer that is read as it passes.
fn stream(mut exchange: Exchange, answer: Answer) -> Response<Body> {
    let Answer { mut head, read, rest, strip_usage } = answer;
    exchange.set_status(head.status.as_u16());
    annotate(&mut head.headers, &exchange);
    let text = |name| head.headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    let content_type = text(header::CONTENT_TYPE).unwrap_or_default();
    let reader = if content_type.starts_with("text/event-stream") && text(header::CONTENT_ENCODING).is_none()
    {
        Reader::Events(StreamReader::new(exchange.endpoint(), strip_usage))
    } else if content_type.contains("json") {
        Reader::Document(Some(BodyReader::new(exchange.endpoint(), text(header::CONTENT_ENCODING))))
    } else {
        Reader::Opaque
    };
    if reader.may_change_length() {
        head.headers.remove(header::CONTENT_LENGTH);
    }
    let timeouts = exchange.served().map(|(backend, _)| backend.spec.timeouts.clone());
    let timeouts = timeouts.expect("an answer comes from a backend");
    let first = (!read.is_empty()).then_some(read);
    Response::from_parts(
        head,
        Body::Metered(Box::new(Metered::new(rest, first, reader, exchange, &timeouts))),
    )
}

/// Says who served the call, and why.
fn annotate(headers: &mut HeaderMap, exchange: &Exchange) {
    headers::prepare_response(headers);
    let mut id = [0; uuid::fmt::Hyphenated::LENGTH];
    let id = exchange.id.hyphenated().encode_lower(&mut id);
    if let Ok(id) = HeaderValue::from_str(id) {
        headers.insert(headers::REQUEST_ID, id);
    }
    if let Some((backend, model)) = exchange.served() {
        headers.insert(headers::BACKEND, backend.label().clone());
        if let Ok(model) = HeaderValue::from_str(model)
            && !model.is_empty()
        {
            headers.insert(headers::MODEL, model);
        }
    }
    headers.insert(headers::REASON, HeaderValue::from_static(exchange.reason().as_str()));
}

fn outcome_of(status: http::StatusCode) -> Outcome {
    match status {
        _ if status.is_server_error() || status == http::StatusCode::TOO_MANY_REQUESTS => {
            Outcome::UpstreamError
        }
        _ if status.is_client_error() => Outcome::ClientError,
        _ => Outcome::Success,
    }
}

/// Books a call that got no answer, if a backend was tried.
fn fail(exchange: Exchange, error: ProxyError) -> ProxyError {
    let outcome = match error {
        ProxyError::UpstreamTimeout { .. } => Outcome::Timeout,
        ProxyError::Request(_) => Outcome::ClientError,
        _ => Outcome::UpstreamError,
    };
    if exchange.attempts() > 0 {
        exchange.settle_failed(outcome, error.status().as_u16());
    }
    error
}

/// Collects a request body within the limits.
async fn collect(incoming: Incoming, limits: &crate::config::Limits) -> Result<Bytes, ProxyError> {
    let limit = limits.max_body_bytes;
    if http_body::Body::size_hint(&incoming).lower() > limit as u64 {
        return Err(ProxyError::BodyTooLarge { limit });
    }
    let collected = tokio::time::timeout(limits.body_timeout, Limited::new(incoming, limit).collect()).await;
    match collected {
        Err(_) => Err(ProxyError::BodyTimeout),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(ProxyError::BodyTooLarge { limit }),
        Ok(Err(_)) => Err(ProxyError::BodyBroken),
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
    }
}

/// The list of models, or one of them: the API's answer, completed with what only our routes have.
async fn models(
    clients: &Clients,
    exchange: Exchange,
    parts: request::Parts,
    incoming: Incoming,
) -> Result<Response<Body>, ProxyError> {
    let config = exchange.state().config.clone();
    let endpoint = exchange.endpoint();
    let name = parts.uri.path().strip_prefix("/v1/models/").unwrap_or_default().to_owned();
    let is_ours = endpoint == Endpoint::Model && config.models.contains_key(&name);
    if exchange.state().default_backend().is_none() {
        return match endpoint {
            Endpoint::Models => Ok(json_response(&models::own(&config))),
            _ if is_ours => Ok(json_response(&models::model(&name))),
            _ => Err(ProxyError::UnknownModel { model: name.chars().take(128).collect() }),
        };
    }
    let response = passed_through(clients, exchange, parts, incoming).await?;
    if is_ours && response.status() == http::StatusCode::NOT_FOUND {
        return Ok(json_response(&models::model(&name)));
    }
    if endpoint != Endpoint::Models || response.status() != http::StatusCode::OK {
        return Ok(response);
    }
    let (mut head, body) = response.into_parts();
    let list = Limited::new(body, MAX_COLLECTED_BYTES).collect().await.map_err(|_| ProxyError::BodyBroken)?;
    head.headers.remove(header::CONTENT_LENGTH);
    Ok(Response::from_parts(head, Body::full(models::completed(list.to_bytes(), &config))))
}

fn json_response(body: &serde_json::Value) -> Response<Body> {
    let mut response = Response::new(Body::full(body.to_string()));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn tags(headers: &HeaderMap) -> impl Iterator<Item = (&str, &str)> {
    let tags = headers.get(headers::TAGS).and_then(|tags| tags.to_str().ok()).unwrap_or_default();
    tags.split(',').filter_map(|tag| tag.split_once('=')).map(|(name, value)| (name.trim(), value.trim()))
}

fn team_of(headers: &HeaderMap) -> String {
    tags(headers).find(|(name, _)| *name == "team").map_or_else(String::new, |(_, team)| team.to_owned())
}

fn caller_of(headers: &HeaderMap) -> Caller {
    if !headers.contains_key(headers::TAGS) {
        return Caller::default();
    }
    let mut others = String::new();
    for (name, value) in tags(headers).filter(|(name, _)| *name != "team") {
        let separator = if others.is_empty() { "" } else { "," };
        if others.len() + separator.len() + name.len() + 1 + value.len() > MAX_TAGS_BYTES {
            break;
        }
        others.extend([separator, name, "=", value]);
    }
    Caller { key: String::new(), team: team_of(headers), tags: others }
}
