//! `/v1/realtime` over a WebSocket: a tunnel to the first API, metered by the `response.done` events in it.
//!
//! Bytes pass as they come. Frames from the server are not masked, so their headers are followed and the
//! text of small messages is read; compression is not offered upstream, because it would hide them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderValue, Request, Response, StatusCode, header, request};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tracing::debug;

use super::body::Body;
use super::error::ProxyError;
use super::exchange::Exchange;
use super::headers::Head;
use super::respond::{annotate, stream};
use super::{fail, path_and_query};
use crate::clock::stands_still;
use crate::config::Timeouts;
use crate::ledger::Outcome;
use crate::openai::query::query_value;
use crate::openai::{Endpoint, usage};
use crate::upstream::Backend;
use crate::upstream::client::{Clients, RequestBody};
use crate::upstream::send::Answer;

/// Messages up to this size are read for their usage; a `response.done` is some kilobytes.
const MAX_READ_MESSAGE_BYTES: usize = 1 << 20;
const BUFFER_BYTES: usize = 16 * 1024;

/// Whether a request asks for a WebSocket on a path that has one.
pub fn is_asked<B>(request: &Request<B>) -> bool {
    let asks = |value: &HeaderValue| value.as_bytes().eq_ignore_ascii_case(b"websocket");
    request.headers().get(header::UPGRADE).is_some_and(asks)
        && Endpoint::of(request.method(), request.uri().path()) == Endpoint::Realtime
}

/// Opens the tunnel, or hands over the API's refusal.
pub async fn tunnel(
    clients: &Clients,
    mut exchange: Box<Exchange>,
    backend: &Arc<Backend>,
    parts: request::Parts,
    client_side: OnUpgrade,
) -> Result<Response<Body>, ProxyError> {
    exchange.set_buys(false);
    if let Some(model) = parts.uri.query().and_then(|query| query_value(query, "model")) {
        exchange.name_model(&model);
    }
    let Some(place) = backend.acquire() else {
        let retry_after = Some(backend.recovers_in(exchange.gateway().now()));
        return Err(ProxyError::Unavailable { model: "realtime".to_owned(), retry_after });
    };
    exchange.begin_attempt(backend, None, place);
    let mut head = Head::new(parts.headers);
    head.trace(exchange.traceparent());
    head.ask_upgrade();
    head.dress(backend);
    let client = clients.of(backend);
    let (place, delivery) = exchange.under_way().expect("the attempt has begun with a place");
    let target = path_and_query(&parts.uri);
    let body = RequestBody::Full(None);
    let sent = client.send(place, &parts.method, &target, head.headers(), body, delivery);
    let response = match tokio::time::timeout(backend.spec.timeouts.first_byte, sent).await {
        Ok(Ok(response)) => response,
        Ok(Err(error)) => {
            debug!(backend = backend.name(), %error, "a tunnel could not be opened");
            let why = "its connection broke or could not be made";
            return Err(fail(exchange, ProxyError::Upstream { backend: backend.name().to_owned(), why }));
        }
        Err(_) => {
            return Err(fail(exchange, ProxyError::UpstreamTimeout { backend: backend.name().to_owned() }));
        }
    };
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        let (head, body) = response.into_parts();
        return Ok(stream(
            exchange,
            Answer { head, read: Bytes::new(), rest: Some(body), strip_usage: false },
        ));
    }
    exchange.set_status(StatusCode::SWITCHING_PROTOCOLS.as_u16());
    let mut answer = Response::new(Body::empty());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let head = answer.headers_mut();
    head.clone_from(response.headers());
    annotate(head, &exchange);
    head.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    head.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    let upstream_side = hyper::upgrade::on(response);
    let timeouts = backend.spec.timeouts.clone();
    // It leaves its connection, but stays in flight: a drain waits for it.
    tokio::spawn(async move {
        match tokio::try_join!(client_side, upstream_side) {
            Ok((client, upstream)) => carry(exchange, client, upstream, &timeouts).await,
            Err(error) => debug!(%error, "a tunnel was not opened: {error}"),
        }
    });
    Ok(answer)
}

/// Carries bytes both ways until one side ends, both are silent for `between_bytes`, or `total` has passed.
async fn carry(exchange: Box<Exchange>, client: Upgraded, upstream: Upgraded, timeouts: &Timeouts) {
    let (from_client, to_client) = tokio::io::split(TokioIo::new(client));
    let (from_upstream, to_upstream) = tokio::io::split(TokioIo::new(upstream));
    let (moves, mut frames) = (Moves::default(), Frames::default());
    tokio::select! {
        () = moves.carry(from_client, to_upstream, |_| {}) => {}
        // What a message used is booked before the client sees its end.
        () = moves.carry(from_upstream, to_client, |bytes| frames.push(bytes, |message| book(&exchange, message))) => {}
        () = moves.cease(timeouts.between_bytes) => debug!("a tunnel was closed: nothing passed for too long"),
        () = tokio::time::sleep(timeouts.total.saturating_sub(exchange.age())) => {
            debug!("a tunnel was closed: it took too long");
        }
    }
    exchange.settle_failed(Outcome::Success, StatusCode::SWITCHING_PROTOCOLS.as_u16());
}

type Side = TokioIo<Upgraded>;

/// Counts what passes, in either direction.
#[derive(Debug, Default)]
struct Moves(AtomicU64);

impl Moves {
    /// Ends when nothing has passed for so long; twice as late at most.
    async fn cease(&self, patience: Duration) {
        stands_still(patience, || self.0.load(Ordering::Relaxed), |_| true).await;
    }

    /// Carries bytes one way, shown to `see` before they leave. How it ended makes no difference: either side may
    /// leave at any time.
    async fn carry(&self, mut from: ReadHalf<Side>, mut to: WriteHalf<Side>, mut see: impl FnMut(&[u8])) {
        let mut buffer = BytesMut::with_capacity(BUFFER_BYTES);
        loop {
            buffer.clear();
            match from.read_buf(&mut buffer).await {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
            see(&buffer);
            self.0.fetch_add(1, Ordering::Relaxed);
            if to.write_all(&buffer).await.is_err() {
                return;
            }
        }
    }
}

fn book(exchange: &Exchange, message: &[u8]) {
    if memchr::memmem::find(message, b"response.done").is_none() {
        return;
    }
    let Some(reported) = usage::from_body(Endpoint::Realtime, message) else { return };
    if let Some(part) = exchange.part() {
        let _settling = part.settle_unary(Outcome::Success, Some(&reported), &Bytes::new());
    }
}

/// Follows the frames of a WebSocket (RFC 6455, 5.2) and hands out whole text messages of bounded size.
#[derive(Debug, Default)]
struct Frames {
    /// Bytes of a frame's header, or of a payload that is kept.
    pending: BytesMut,
    /// Payload bytes that still pass unread.
    skip: u64,
    message: BytesMut,
    is_text: bool,
    is_too_long: bool,
}

struct Header {
    is_final: bool,
    opcode: u8,
    length: u64,
    size: usize,
}

impl Frames {
    fn push(&mut self, mut bytes: &[u8], mut whole: impl FnMut(&[u8])) {
        while !bytes.is_empty() || !self.pending.is_empty() {
            if self.skip > 0 {
                let skipped = usize::try_from(self.skip).unwrap_or(usize::MAX).min(bytes.len());
                bytes = &bytes[skipped..];
                self.skip -= skipped as u64;
                if self.skip > 0 || bytes.is_empty() {
                    return;
                }
            }
            self.pending.extend_from_slice(bytes);
            bytes = &[];
            let Some(header) = header(&self.pending) else { return };
            let is_message = header.opcode <= 2;
            if header.opcode == 1 || header.opcode == 2 {
                self.message.clear();
                self.is_text = header.opcode == 1;
                self.is_too_long = false;
            }
            let fits = self.message.len() as u64 + header.length <= MAX_READ_MESSAGE_BYTES as u64;
            if is_message && !fits {
                self.is_too_long = true;
            }
            if !is_message || !self.is_text || self.is_too_long {
                // Not to be read: its payload passes, what is here of it at once.
                self.pending.advance(header.size);
                let here = (self.pending.len() as u64).min(header.length);
                self.pending.advance(usize::try_from(here).unwrap_or(usize::MAX));
                self.skip = header.length - here;
            } else {
                let length = usize::try_from(header.length).unwrap_or(usize::MAX);
                if self.pending.len() - header.size < length {
                    return;
                }
                self.pending.advance(header.size);
                self.message.extend_from_slice(&self.pending[..length]);
                self.pending.advance(length);
                if header.is_final {
                    whole(&self.message);
                    self.message.clear();
                }
            }
        }
    }
}

/// The header at the beginning of `bytes`; none while it is incomplete.
fn header(bytes: &[u8]) -> Option<Header> {
    let (first, second) = (*bytes.first()?, *bytes.get(1)?);
    let (length, size) = match second & 0x7f {
        126 => (u64::from(u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?)), 4),
        127 => (u64::from_be_bytes(bytes.get(2..10)?.try_into().ok()?), 10),
        short => (u64::from(short), 2),
    };
    // A server must not mask; if one does, its payload is skipped with the four bytes of the mask.
    let (opcode, length) = if second & 0x80 == 0 { (first & 0x0f, length) } else { (0x0f, length + 4) };
    Some(Header { is_final: first & 0x80 != 0, opcode, length, size })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![first];
        match payload.len() {
            length @ 0..126 => frame.push(u8::try_from(length).unwrap()),
            length @ 126..65536 => {
                frame.push(126);
                frame.extend(u16::try_from(length).unwrap().to_be_bytes());
            }
            length => {
                frame.push(127);
                frame.extend((length as u64).to_be_bytes());
            }
        }
        frame.extend(payload);
        frame
    }

    fn messages(stream: &[u8], step: usize) -> Vec<Vec<u8>> {
        let mut frames = Frames::default();
        let mut seen = Vec::new();
        stream.chunks(step).for_each(|piece| frames.push(piece, |message| seen.push(message.to_vec())));
        seen
    }

    #[test]
    fn text_messages_come_out_whole_however_they_are_cut() {
        let long = vec![b'x'; 70_000];
        let huge = vec![b'y'; MAX_READ_MESSAGE_BYTES + 1];
        let stream = [
            frame(0x81, b"one"),
            frame(0x01, b"tw"),
            frame(0x89, b"ping"),
            frame(0x80, b"o"),
            frame(0x82, b"binary"),
            frame(0x81, &huge),
            frame(0x81, &long),
            frame(0x81, b""),
        ]
        .concat();
        for step in [1, 2, 3, 7, 4096, stream.len()] {
            assert_eq!(
                messages(&stream, step),
                [b"one".to_vec(), b"two".to_vec(), long.clone(), Vec::new()],
                "{step}"
            );
        }
    }
}
