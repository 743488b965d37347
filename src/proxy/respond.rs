//! An upstream's answer on its way to the client: whole, with its cost, or as it comes.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};

use super::admit::tell_limits;
use super::body::{Body, Metered};
use super::exchange::Exchange;
use super::headers;
use super::reader::Reader;
use crate::ledger::Outcome;
use crate::openai::BodyReader;
use crate::openai::encoding::{self, Encoding};
use crate::openai::usage::{self, Reported};
use crate::upstream::send::{Answer, MAX_COLLECTED_BYTES};

/// Hands an answer to the client: whole, with its cost, or as it comes.
pub async fn respond(exchange: Box<Exchange>, answer: Answer) -> Response<Body> {
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
                // A span names the model that answered.
                None if exchange.has_span() => usage::from_whole(exchange.endpoint(), &read),
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
    let shown = match reported {
        None => decoded(&head.headers, &read),
        Some(_) => read.clone(),
    };
    let settling = exchange.settle_unary(outcome, reported.as_ref(), &shown);
    if let Some(cost) = settling.wait().await
        && let Ok(value) = HeaderValue::from_str(&cost.to_string())
    {
        head.headers.insert(headers::COST, value);
    }
    head.headers.remove(header::CONTENT_LENGTH);
    Response::from_parts(head, Body::full(read))
}

/// An answer as it is without its coding, to be counted; as it came, if it has none or cannot be decoded.
fn decoded(head: &HeaderMap, read: &Bytes) -> Bytes {
    match Encoding::of(head.get(header::CONTENT_ENCODING).and_then(|value| value.to_str().ok())) {
        Encoding::Coded(coding) => {
            encoding::decode(coding, read, MAX_COLLECTED_BYTES).map_or_else(|_| read.clone(), Bytes::from)
        }
        Encoding::Identity | Encoding::Unknown => read.clone(),
    }
}

/// An answer that is read as it passes.
pub fn stream(mut exchange: Box<Exchange>, answer: Answer) -> Response<Body> {
    let Answer { mut head, read, rest, strip_usage } = answer;
    exchange.set_status(head.status.as_u16());
    annotate(&mut head.headers, &exchange);
    let text = |name| head.headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    let content_type = text(header::CONTENT_TYPE).unwrap_or_default();
    let encoding = text(header::CONTENT_ENCODING);
    let reader =
        Reader::of(exchange.endpoint(), content_type, encoding, strip_usage, exchange.has_usage_per_choice());
    if reader.unpacks() {
        head.headers.remove(header::CONTENT_ENCODING);
    }
    // What a 304 says is the length of what it does not send; it is left out, for the server to be of one mind.
    if reader.may_change_length() || head.status == StatusCode::NOT_MODIFIED {
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
pub fn annotate(headers: &mut HeaderMap, exchange: &Exchange) {
    headers::strip_hop_by_hop(headers);
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
    if let Some(key) = exchange.key() {
        tell_limits(headers, &key.limits(exchange.gateway().now()));
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
