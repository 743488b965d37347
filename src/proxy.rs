//! The story of one request: admit, read, route, send, meter.

pub mod admit;
pub mod bill;
pub mod body;
pub mod caller;
pub mod collect;
pub mod count;
pub mod encoded;
pub mod error;
pub mod exchange;
pub mod framing;
pub mod headers;
pub mod models;
pub mod passthrough;
pub mod reader;
pub mod respond;
pub mod unpack;
pub mod upgrade;
pub mod vocabularies;

use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Request, Response, Version, header, request};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;

use crate::clock::Stopwatch;
use crate::config::{UnknownPrice, WhenUnavailable};
use crate::economics::Reason;
use crate::gateway::{Choice, Circumstances, Gateway, Refusal, Route, State, choose};
use crate::ledger::Outcome;
use crate::openai::endpoint::azure_deployment;
use crate::openai::{ApiError, Call, Endpoint};
use crate::upstream::Backend;
use crate::upstream::client::Clients;
use crate::upstream::send::{Outgoing, send};
use admit::{admit_call, admit_unread, authenticate, identity};
use body::Body;
use caller::team_of;
use collect::collect;
use error::ProxyError;
use exchange::Exchange;
use headers::Head;
use respond::respond;

/// Answers a request. The one place where an error of ours becomes HTTP, and is counted.
pub async fn handle(
    gateway: &Arc<Gateway>,
    clients: &Clients,
    request: Request<Incoming>,
    address: IpAddr,
) -> Response<Body> {
    let tags = request.headers().get(headers::TAGS).cloned();
    let closes = request.version() < Version::HTTP_2 && framing::is_chunked(request.headers());
    let answered = match framing::refusal(&request) {
        Some(refusal) => Err(ProxyError::Request(refusal)),
        // Pinned where it is made: the future of a call takes kilobytes, and each move would copy them.
        None => isolated(gateway, pin!(forward(gateway, clients, request, address))).await,
    };
    let mut response = match answered {
        Ok(response) => response,
        Err(error) => {
            if error.is_refusal() {
                gateway.metrics.rejected(&team_of(tags.as_ref()), error.label());
            }
            tracing::info!(status = error.status().as_u16(), kind = error.label(), "{error}");
            error.into_response()
        }
    };
    if closes {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// Runs a call so that a bug in it ends that call alone, with a 500.
async fn isolated(
    gateway: &Gateway,
    mut call: Pin<&mut impl Future<Output = Result<Response<Body>, ProxyError>>>,
) -> Result<Response<Body>, ProxyError> {
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
    mut request: Request<Incoming>,
    address: IpAddr,
) -> Result<Response<Body>, ProxyError> {
    let watch = Stopwatch::start();
    let state = gateway.state();
    let limit = state.config.limits.max_in_flight;
    let mut presence = gateway.enter(limit).ok_or(ProxyError::Overloaded { limit })?;
    may_record(gateway, state.config.ledger.when_unavailable)?;
    gateway.retries.earn();
    let upgrade = upgrade::is_asked(&request).then(|| hyper::upgrade::on(&mut request));
    let (mut parts, incoming) = request.into_parts();
    let endpoint = Endpoint::of(&parts.method, parts.uri.path());
    let (caller, key) = authenticate(gateway, &state, &parts.uri, &mut parts.headers)?;
    if !presence.claim(identity(key.as_deref(), &parts.headers, address), state.config.limits.caller_share) {
        return Err(ProxyError::BeyondShare { limit });
    }
    let mut exchange = Exchange::open(gateway.clone(), state, endpoint, caller, watch, presence);
    exchange.set_key(key);
    if endpoint.is_routed() {
        exchange.open_span(&parts.headers);
        routed(gateway, clients, exchange, parts, incoming).await
    } else if matches!(endpoint, Endpoint::Models | Endpoint::Model) {
        models::answer(clients, exchange, parts, incoming).await
    } else {
        exchange.open_span(&parts.headers);
        unread(gateway, clients, exchange, parts, incoming, upgrade).await
    }
}

/// A path that is not understood.
async fn unread(
    gateway: &Gateway,
    clients: &Clients,
    mut exchange: Box<Exchange>,
    parts: request::Parts,
    incoming: Incoming,
    upgrade: Option<OnUpgrade>,
) -> Result<Response<Body>, ProxyError> {
    let backend = passing_backend(&mut exchange, &parts.headers)?;
    admit_unread(&mut exchange, &backend, &parts.method, upgrade.is_some())?;
    if let Some(upgrade) = upgrade {
        upgrade::tunnel(clients, exchange, &backend, parts, upgrade).await
    } else {
        passthrough::pass(gateway, clients, exchange, &backend, parts, incoming).await
    }
}

/// The API that a path goes to which is not understood: the first, or the one that the client names.
fn passing_backend(exchange: &mut Exchange, headers: &HeaderMap) -> Result<Arc<Backend>, ProxyError> {
    let wanted = headers.get(headers::BACKEND).and_then(|name| name.to_str().ok());
    let Some(wanted) = wanted else {
        return exchange.state().default_backend().cloned().ok_or(ProxyError::NoBackend);
    };
    let backend = exchange.state().backend_named(wanted).filter(|backend| backend.is_api()).cloned();
    exchange.set_reason(Reason::Pinned);
    backend.ok_or_else(|| ProxyError::UnknownBackend { backend: wanted.chars().take(64).collect() })
}

fn may_record(gateway: &Gateway, when_unavailable: WhenUnavailable) -> Result<(), ProxyError> {
    if gateway.ledger.is_available() || when_unavailable == WhenUnavailable::Continue {
        return Ok(());
    }
    // The ledger's own log line says it to the owner, once. Without a reason it can record again since.
    match gateway.ledger.unavailable_reason() {
        Some(why) => Err(ProxyError::LedgerUnavailable { why }),
        None => Ok(()),
    }
}

/// A call to one of the endpoints that are understood.
async fn routed(
    gateway: &Gateway,
    clients: &Clients,
    mut exchange: Box<Exchange>,
    mut parts: request::Parts,
    incoming: Incoming,
) -> Result<Response<Body>, ProxyError> {
    let state = exchange.state().clone();
    let limits = &state.config.limits;
    let mut room = gateway.buffers.room(limits.max_buffered_bytes);
    let mut body = collect(incoming, limits, &mut room).await?;
    if parts.headers.contains_key(header::CONTENT_ENCODING) {
        body = unpack::unpack(&mut parts.headers, body, limits.max_body_bytes).await?;
        room.cover(body.len())?;
    }
    let mut call = Call::read(exchange.endpoint(), &body).map_err(ProxyError::Request)?;
    if call.model.is_empty()
        && let Some(deployment) = azure_deployment(parts.uri.path())
    {
        deployment.clone_into(&mut call.model);
    }
    let route = (!call.model.is_empty()).then(|| state.route_of(&call.model).cloned()).flatten();
    let (route, Choice { mut order, reason }) = match route {
        Some(route) => {
            // Where only one may serve there is nothing to keep together.
            exchange.set_conversation(route.pool.as_ref().and_then(|_| call.conversation(&body)));
            let choice = route_call(&exchange, &route, &call, &parts.headers)?;
            (route, choice)
        }
        None => (route_alone(&state, &call)?, Choice { order: vec![0], reason: Reason::OnlyOffer }),
    };
    admit_call(&mut exchange, &route, &call, &mut order)?;
    count_decision(&route, &order, reason);
    exchange.set_call(call, &body, Some(route), reason);
    let mut request = outgoing(&exchange, parts, body);
    match send(clients, &mut exchange, &mut request, &order).await {
        Ok(answer) => Ok(respond(exchange, answer).await),
        Err(error) => Err(fail(exchange, error)),
    }
}

/// A model on no route goes to the first API as it is.
fn route_alone(state: &State, call: &Call) -> Result<Arc<Route>, ProxyError> {
    let model = || call.model.chars().take(128).collect();
    let backend = state.default_backend();
    if call.model.is_empty() && (call.endpoint != Endpoint::Responses || backend.is_none()) {
        // But for a stored prompt, which has its own model that only the API knows.
        return Err(ProxyError::Request(ApiError::missing_model()));
    }
    let backend = backend.ok_or_else(|| ProxyError::UnknownModel { model: model() })?;
    if state.config.prices.card(&call.model).is_none() && state.config.unknown_price == UnknownPrice::Reject {
        return Err(ProxyError::Unpriced { model: model() });
    }
    Ok(Arc::new(Route::alone(backend.clone(), &call.model)))
}

fn route_call(
    exchange: &Exchange,
    route: &Route,
    call: &Call,
    headers: &HeaderMap,
) -> Result<Choice, ProxyError> {
    let state = exchange.state();
    let wanted = headers.get(headers::BACKEND).and_then(|name| name.to_str().ok());
    let circumstances =
        Circumstances { wanted, home: exchange.home(), dice: fastrand::f64(), now: exchange.gateway().now() };
    let choice = choose(state, route, call, circumstances);
    let mut choice = choice.map_err(|refusal| match refusal {
        Refusal::NotEligible(why) => ProxyError::NotEligible { model: call.model.clone(), why },
        Refusal::UnknownBackend => {
            ProxyError::UnknownBackend { backend: wanted.unwrap_or_default().chars().take(64).collect() }
        }
    })?;
    let api = route.api_offer();
    if api.is_some_and(|api| api.card(&state.config, &call.model).is_none()) {
        match state.config.unknown_price {
            UnknownPrice::Reject => return Err(ProxyError::Unpriced { model: call.model.clone() }),
            UnknownPrice::ApiOnly => {
                choice.order.retain(|index| route.offers[*index].backend.is_api());
                if choice.order.is_empty() {
                    return Err(ProxyError::Unpriced { model: call.model.clone() });
                }
            }
            UnknownPrice::Estimate => {}
        }
    }
    Ok(choice)
}

/// Counts the decision in the pool's metrics.
fn count_decision(route: &Route, order: &[usize], reason: Reason) {
    let (Some(pool), Some(first)) = (&route.pool, order.first()) else { return };
    if !route.offers[*first].backend.is_api() {
        pool.own_series.decision(reason);
    } else if let Some(series) = &pool.api_series {
        series.decision(reason);
    }
}

fn outgoing(exchange: &Exchange, parts: request::Parts, body: Bytes) -> Outgoing {
    let mut head = Head::new(parts.headers);
    head.trace(exchange.traceparent());
    head.ask_unencoded();
    Outgoing { method: parts.method, path_and_query: path_and_query(&parts.uri), head, body }
}

pub(crate) fn path_and_query(uri: &http::Uri) -> String {
    uri.path_and_query().map_or(uri.path(), PathAndQuery::as_str).to_owned()
}

/// Books a call that got no answer, if a backend was tried.
pub(crate) fn fail(exchange: Box<Exchange>, error: ProxyError) -> ProxyError {
    let outcome = match error {
        ProxyError::UpstreamTimeout { .. } => Outcome::Timeout,
        ProxyError::Request(_)
        | ProxyError::UploadTooLarge { .. }
        | ProxyError::BodyTimeout
        | ProxyError::BodyBroken => Outcome::ClientError,
        _ => Outcome::UpstreamError,
    };
    if exchange.attempts() > 0 {
        exchange.settle_failed(outcome, error.status().as_u16());
    }
    error
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;
    use crate::clock::Clock;
    use crate::config;
    use crate::ledger::Ledger;

    const CONFIG: &str = "[backends.openai]\nkind = \"api\"\nbase_url = \"http://127.0.0.1:9/v1\"\n";

    #[tokio::test]
    async fn a_panic_in_one_call_is_a_500_for_it_alone_and_leaves_nothing_counted() {
        let config = config::parse(CONFIG, "test", &|_| None).unwrap();
        let gateway = Gateway::new(Arc::new(config), Clock::system(), Ledger::off()).unwrap();
        let call = async {
            let mut presence = gateway.enter(1).unwrap();
            assert!(presence.claim(crate::gateway::Identity::Key("a"), 0.9));
            tokio::task::yield_now().await;
            panic!("words of a client");
        };
        let Err(error) = isolated(&gateway, pin!(call)).await else { panic!("it has no answer") };
        let response = error.into_response();
        assert_eq!(response.status(), http::StatusCode::INTERNAL_SERVER_ERROR);
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert!(!String::from_utf8_lossy(&body).contains("words of a client"), "{body:?}");
        assert_eq!(gateway.in_flight(), 0);
        let answered = isolated(&gateway, pin!(async { Ok(Response::new(Body::empty())) })).await;
        assert!(answered.is_ok(), "the next call is served");
        assert!(gateway.enter(1).is_some_and(|mut next| next.claim(crate::gateway::Identity::Key("a"), 0.9)));
    }
}
