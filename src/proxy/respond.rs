//! An upstream's answer on its way to the client: whole, with its cost, or as it comes.

use http::{HeaderMap, HeaderValue, Response, header};

use super::admit::tell_limits;
use super::body::{Body, Metered};
use super::exchange::Exchange;
use super::headers;
use super::reader::Reader;
use crate::ledger::Outcome;
use crate::openai::usage::{self, Reported};
use crate::openai::{BodyReader, StreamReader};
use crate::upstream::send::Answer;

/// Hands an answer to the client: whole, with its cost, or as it comes.
pub async fn respond(exchange: Exchange, answer: Answer) -> Response<Body> {
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
    let settling = exchange.settle_unary(outcome, reported.as_ref(), &read);
    if let Some(cost) = settling.wait().await
        && let Ok(value) = HeaderValue::from_str(&cost.to_string())
    {
        head.headers.insert(headers::COST, value);
    }
    head.headers.remove(header::CONTENT_LENGTH);
    Response::from_parts(head, Body::full(read))
}

/// An answer that is read as it passes.
pub fn stream(mut exchange: Exchange, answer: Answer) -> Response<Body> {
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
