//! Paths that are not understood: they go to the first API as they come, and are metered when their answer
//! says what it used.

use std::sync::{Arc, OnceLock};

use bytes::{Bytes, BytesMut};
use http::{Response, header, request};
use http_body::Body as _;
use hyper::body::Incoming;

use super::body::Body;
use super::collect::collect;
use super::error::ProxyError;
use super::exchange::Exchange;
use super::headers::Head;
use super::respond::stream;
use super::{fail, path_and_query};
use crate::gateway::Gateway;
use crate::gateway::buffers::Room;
use crate::ledger::once::{derived_id, response_id};
use crate::openai::{Endpoint, json};
use crate::upstream::Backend;
use crate::upstream::client::{Clients, RequestBody};
use crate::upstream::send::Answer;
use crate::upstream::upload::{Upload, UploadError, UploadLimits, Watch};

/// JSON bodies up to this size are collected, to see which model they name.
const MAX_READ_BYTES: u64 = 1 << 20;
/// Longest name of a model that a form is believed to have.
const MAX_MODEL_BYTES: usize = 128;
/// Kept of a form between two pieces, so that a field at their border is found.
const FORM_OVERLAP_BYTES: usize = 512;

/// A path that is not understood goes to an API, as it comes, and is metered if its answer says usage.
pub async fn pass(
    gateway: &Gateway,
    clients: &Clients,
    mut exchange: Box<Exchange>,
    backend: &Arc<Backend>,
    parts: request::Parts,
    incoming: Incoming,
) -> Result<Response<Body>, ProxyError> {
    let path = parts.uri.path();
    let mut may_bill = exchange.endpoint().may_bill(&parts.method);
    if exchange.endpoint() == Endpoint::Files {
        may_bill &= path.ends_with("/content");
    }
    match exchange.endpoint() {
        Endpoint::Files => exchange.id = derived_id(backend.name(), path),
        Endpoint::Response => exchange.id = response_id(backend.name(), path),
        _ => {}
    }
    if exchange.endpoint() == Endpoint::Response || (exchange.endpoint() == Endpoint::Files && may_bill) {
        exchange.gateway().recall(exchange.id).await;
    }
    exchange.set_buys(may_bill);
    let mut room = gateway.buffers.room(exchange.state().config.limits.max_buffered_bytes);
    let body = read_body(&exchange, &parts, incoming, &mut room).await?;
    let Some(place) = backend.acquire() else {
        return Err(ProxyError::Unavailable {
            model: parts.uri.path().chars().take(MAX_MODEL_BYTES).collect(),
            retry_after: Some(backend.recovers_in(exchange.gateway().now())),
        });
    };
    exchange.begin_attempt(backend, None, place);
    let mut head = Head::new(parts.headers);
    head.trace(exchange.traceparent());
    if exchange.endpoint() == Endpoint::Models {
        head.ask_unencoded();
    }
    head.dress(backend);
    let timeouts = &backend.spec.timeouts;
    // An upload takes its time before there can be a first byte.
    let (patience, failure) = match &body {
        RequestBody::Upload(upload) => (timeouts.total, Some(upload.failure())),
        _ => (timeouts.first_byte, None),
    };
    let client = clients.of(backend);
    let (place, delivery) = exchange.under_way().expect("the attempt has begun with a place");
    let target = path_and_query(&parts.uri);
    let sent = client.send(place, &parts.method, &target, head.headers(), body, delivery);
    let response = match tokio::time::timeout(patience, sent).await {
        Ok(Ok(response)) => response,
        Ok(Err(error)) => {
            if let Some(failure) = failure.and_then(|failure| failure.get().copied()) {
                let limit = exchange.state().config.limits.max_upload_bytes;
                return Err(fail(exchange, broken_upload(failure, limit)));
            }
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

/// A client's fault, though it was found on the way to the upstream.
fn broken_upload(failure: UploadError, limit: u64) -> ProxyError {
    match failure {
        UploadError::TooLarge => ProxyError::UploadTooLarge { limit },
        UploadError::TooSlow => ProxyError::BodyTimeout,
        UploadError::Broken => ProxyError::BodyBroken,
    }
}

/// Small JSON is collected for the model that it names; a form is watched for it as it passes; the rest
/// passes unseen.
async fn read_body(
    exchange: &Exchange,
    parts: &request::Parts,
    incoming: Incoming,
    room: &mut Room<'_>,
) -> Result<RequestBody, ProxyError> {
    if incoming.is_end_stream() {
        return Ok(RequestBody::Full(None));
    }
    let content_type = parts.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let content_type = content_type.unwrap_or_default();
    if content_type.starts_with("application/json")
        && !parts.headers.contains_key(header::CONTENT_ENCODING)
        && incoming.size_hint().exact().is_some_and(|size| size <= MAX_READ_BYTES)
    {
        let body = collect(incoming, &exchange.state().config.limits, room).await?;
        if let Some(model) = json::member(&body, "model").and_then(json::string) {
            exchange.name_model(&model);
        }
        return Ok(RequestBody::Full(Some(body)));
    }
    let limits = &exchange.state().config.limits;
    let limits = UploadLimits { bytes: limits.max_upload_bytes, pause: limits.body_timeout };
    if incoming.size_hint().lower() > limits.bytes {
        return Err(ProxyError::UploadTooLarge { limit: limits.bytes });
    }
    let watch: Option<Watch> = content_type.starts_with("multipart/form-data").then(|| {
        let mut form = ModelInForm { named: exchange.model_slot(), tail: BytesMut::new() };
        Box::new(move |piece: &[u8]| form.look(piece)) as Watch
    });
    Ok(RequestBody::Upload(Box::new(Upload::new(incoming, limits, watch))))
}

/// Looks for the field `model` of a form, wherever it stands.
struct ModelInForm {
    named: Arc<OnceLock<String>>,
    /// The end of the piece before.
    tail: BytesMut,
}

impl ModelInForm {
    fn look(&mut self, piece: &[u8]) {
        if self.named.get().is_some() {
            return;
        }
        // What spans the border is in the end of the last piece and the beginning of this one.
        self.tail.extend_from_slice(&piece[..piece.len().min(FORM_OVERLAP_BYTES)]);
        if let Some(model) = model_field(&self.tail).or_else(|| model_field(piece)) {
            // Whoever names it first is right; there is one field.
            drop(self.named.set(model.to_owned()));
            return;
        }
        if piece.len() > FORM_OVERLAP_BYTES {
            self.tail.clear();
            self.tail.extend_from_slice(&piece[piece.len() - FORM_OVERLAP_BYTES..]);
        } else {
            let excess = self.tail.len().saturating_sub(FORM_OVERLAP_BYTES);
            drop(self.tail.split_to(excess));
        }
    }
}

/// The value after `name="model"` and the empty line, if all of it is there.
fn model_field(form: &[u8]) -> Option<&str> {
    let at = memchr::memmem::find(form, b"name=\"model\"")?;
    let rest = &form[at..];
    let value = &rest[memchr::memmem::find(rest, b"\r\n\r\n")? + 4..];
    let end = memchr::memmem::find(value, b"\r\n")?;
    let value = std::str::from_utf8(&value[..end]).ok()?;
    (!value.is_empty() && value.len() <= MAX_MODEL_BYTES).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORM: &[u8] = b"--x\r\ncontent-disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\n\r\n\0\x01RIFF\r\n--x\r\n\
        content-disposition: form-data; name=\"model\"\r\n\r\nwhisper-1\r\n--x--\r\n";

    #[test]
    fn the_model_of_a_form_is_found_however_it_is_cut() {
        for first in 0..FORM.len() {
            for step in [1, 7, 64, FORM.len()] {
                let named = Arc::new(OnceLock::new());
                let mut form = ModelInForm { named: named.clone(), tail: BytesMut::new() };
                form.look(&FORM[..first]);
                FORM[first..].chunks(step).for_each(|piece| form.look(piece));
                assert_eq!(named.get().map(String::as_str), Some("whisper-1"), "{first} {step}");
            }
        }
    }

    #[test]
    fn a_large_file_before_the_model_changes_nothing() {
        let mut large = b"--x\r\ncontent-disposition: form-data; name=\"file\"\r\n\r\n".to_vec();
        large.extend(std::iter::repeat_n(b'\n', 300_000));
        large.extend_from_slice(FORM);
        let named = Arc::new(OnceLock::new());
        let mut form = ModelInForm { named: named.clone(), tail: BytesMut::new() };
        large.chunks(8192).for_each(|piece| form.look(piece));
        assert_eq!(named.get().map(String::as_str), Some("whisper-1"));
    }
}
