//! One HTTP/1.1 connection to an upstream, driven by the task of the call that uses it.
//!
//! A general client keeps a task per connection and talks to it over channels, which costs two wake-ups a call
//! and one an event. Here the call itself writes its request and reads its answer: one `send` for head and
//! body, one `recv` for whatever has arrived, and all events that one `recv` brought leave as one frame.
//!
//! Invariant: a connection is reused only if its answer ended where the framing said, the request went out in
//! full, nothing else was received and neither side asked to close. Framing follows RFC 9112, section 6.3.

pub mod decode;

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::pin::{Pin, pin};
use std::sync::LazyLock;
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version, header};
use memchr::memmem::Finder;
use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf};
use tokio::net::TcpStream;

use super::delivery::Delivery;
use super::joined;
use decode::Decoder;

/// Longest head of an answer, and longest trailer section.
pub const MAX_HEAD_BYTES: usize = 64 * 1024;
/// Most header fields of an answer.
pub const MAX_HEADERS: usize = 128;
/// Room for what is added on the way to the client, so that the map need not grow for it.
const ADDED_HEADERS: usize = 6;
/// Informational answers (1xx) accepted before the real one.
const MAX_INFORMATIONAL: usize = 8;
/// Prepared once: to make a searcher takes longer than to search a head.
static END_OF_HEAD: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\r\n\r\n"));
/// What a stream of small events needs; many streams at once pay for it in memory.
const MIN_READ: usize = 4 * 1024;
/// What a large answer grows to, so that it needs fewer system calls.
const MAX_READ: usize = 64 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// Nothing of an answer was received.
    #[error("the upstream closed the connection before it answered")]
    Closed,
    #[error("the upstream closed the connection in the middle of its answer")]
    Truncated,
    #[error("the connection to the upstream broke")]
    Io(#[source] io::Error),
    #[error("the upstream's answer is not HTTP/1.1: {0}")]
    Malformed(&'static str),
}

/// What is asked for, without what the connection itself decides (host, framing, hop-by-hop fields).
#[derive(Debug, Clone, Copy)]
pub struct RequestHead<'a> {
    pub method: &'a Method,
    /// Path and query as they go on the wire.
    pub target: &'a [&'a str],
    pub host: &'a HeaderValue,
    pub headers: &'a HeaderMap,
}

/// Head of an answer, and how its body is framed.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub decoder: Decoder,
    /// Whether the connection may carry another call after this one.
    pub keep_alive: bool,
}

#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    unread: BytesMut,
    read_size: usize,
    /// The last read did not fill its room: the socket had no more.
    is_drained: bool,
    outgoing: Outgoing,
    /// Names of the fields of the last answer: those of the next one are very likely the same.
    names: Vec<HeaderName>,
}

/// What of the request is still to be written.
#[derive(Debug, Default)]
struct Outgoing {
    head: Bytes,
    body: Bytes,
    /// Why writing ended early; the answer may say more, so reading goes on.
    failure: Option<io::Error>,
}

impl Connection {
    pub fn new(stream: TcpStream) -> Self {
        Self {
            stream,
            unread: BytesMut::new(),
            read_size: MIN_READ,
            is_drained: false,
            outgoing: Outgoing::default(),
            names: Vec::new(),
        }
    }

    /// Whether the other side has neither closed nor sent anything unasked. Costs no system call while nothing
    /// has happened on the socket.
    pub fn is_quiet(&mut self) -> bool {
        let mut byte = [0_u8; 1];
        let mut probe = ReadBuf::new(&mut byte);
        let mut context = Context::from_waker(Waker::noop());
        Pin::new(&mut self.stream).poll_read(&mut context, &mut probe).is_pending()
    }

    /// Whether the request went out in full and nothing is left over from the answer.
    pub fn is_reusable(&self) -> bool {
        self.outgoing.is_sent() && self.unread.is_empty()
    }

    /// Whether the socket had no more at the last read, so that one more would very likely have to wait.
    pub fn is_drained(&self) -> bool {
        self.is_drained
    }

    /// Sends a request and waits for the head of its answer. `delivery` is complete once the socket has all of it.
    pub async fn exchange(
        &mut self,
        request: &RequestHead<'_>,
        body: Bytes,
        delivery: &Delivery,
    ) -> Result<Answer, WireError> {
        self.outgoing = Outgoing { head: write_head(request, body.len()), body, failure: None };
        let mut informational = 0;
        std::future::poll_fn(|context| {
            loop {
                self.poll_send(context);
                if self.outgoing.is_sent() {
                    delivery.complete();
                }
                while let Some(answer) = self.take_head(request.method)? {
                    if !answer.status.is_informational() {
                        return Poll::Ready(Ok(answer));
                    }
                    informational += 1;
                    if informational > MAX_INFORMATIONAL || answer.status == StatusCode::SWITCHING_PROTOCOLS {
                        return Poll::Ready(Err(WireError::Malformed(
                            "an informational answer nobody asked for",
                        )));
                    }
                }
                if ready!(self.poll_fill(context))? == 0 {
                    let nothing = self.unread.is_empty() && informational == 0;
                    return Poll::Ready(Err(if nothing { WireError::Closed } else { WireError::Truncated }));
                }
            }
        })
        .await
    }

    /// Body bytes that are here, or the next ones to arrive; `None` at the end.
    pub fn poll_body(
        &mut self,
        context: &mut Context<'_>,
        decoder: &mut Decoder,
    ) -> Poll<Option<Result<Bytes, WireError>>> {
        loop {
            match decoder.decode(&mut self.unread) {
                Ok(Some(bytes)) => return Poll::Ready(Some(Ok(bytes))),
                Ok(None) if decoder.is_done() => return Poll::Ready(None),
                Ok(None) => {}
                Err(malformed) => return Poll::Ready(Some(Err(WireError::Malformed(malformed.0)))),
            }
            self.poll_send(context);
            let received = match ready!(self.poll_fill(context)) {
                Ok(received) => received,
                Err(error) => return Poll::Ready(Some(Err(error))),
            };
            if received == 0 {
                let complete = decoder.end_of_stream();
                return Poll::Ready((!complete).then_some(Err(WireError::Truncated)));
            }
        }
    }

    /// Gives back the read buffer of a connection that waits for its next call.
    pub fn release_buffer(&mut self) {
        self.unread = BytesMut::new();
        self.read_size = MIN_READ;
    }

    /// Writes what the socket takes. A failure is kept: it shows when no answer comes either.
    fn poll_send(&mut self, context: &mut Context<'_>) {
        while !self.outgoing.is_empty() {
            let slices = [IoSlice::new(&self.outgoing.head), IoSlice::new(&self.outgoing.body)];
            match joined::poll_write(&mut self.stream, context, &slices) {
                Poll::Ready(Ok(written)) if written > 0 => self.outgoing.advance(written),
                Poll::Ready(Ok(_)) => return self.outgoing.fail(io::ErrorKind::WriteZero.into()),
                Poll::Ready(Err(error)) => return self.outgoing.fail(error),
                Poll::Pending => return,
            }
        }
    }

    /// Receives once; 0 at the end of the stream.
    fn poll_fill(&mut self, context: &mut Context<'_>) -> Poll<Result<usize, WireError>> {
        // Reuses the buffer when no frame made of it is alive any more.
        if self.unread.capacity() - self.unread.len() < self.read_size / 4 {
            self.unread.reserve(self.read_size);
        }
        let room = self.unread.capacity() - self.unread.len();
        let received = {
            let read = pin!(self.stream.read_buf(&mut self.unread));
            ready!(read.poll(context))
        };
        match received {
            Ok(received) => {
                self.is_drained = received < room;
                if received == room && room >= self.read_size / 2 {
                    self.read_size = (self.read_size * 2).min(MAX_READ);
                }
                Poll::Ready(Ok(received))
            }
            Err(error) if self.unread.is_empty() && is_hang_up(&error) => Poll::Ready(Ok(0)),
            Err(error) => Poll::Ready(Err(WireError::Io(self.outgoing.failure.take().unwrap_or(error)))),
        }
    }

    /// The head of an answer, once it is complete.
    fn take_head(&mut self, method: &Method) -> Result<Option<Answer>, WireError> {
        let Some(end) = END_OF_HEAD.find(&self.unread) else {
            if self.unread.len() > MAX_HEAD_BYTES {
                return Err(WireError::Malformed("the head is longer than 64 KiB"));
            }
            return Ok(None);
        };
        read_head(&self.unread.split_to(end + 4).freeze(), method, &mut self.names).map(Some)
    }
}

impl Outgoing {
    fn is_empty(&self) -> bool {
        self.head.is_empty() && self.body.is_empty()
    }

    fn is_sent(&self) -> bool {
        self.is_empty() && self.failure.is_none()
    }

    fn advance(&mut self, written: usize) {
        let of_head = written.min(self.head.len());
        self.head.advance(of_head);
        self.body.advance(written - of_head);
        if self.is_empty() {
            // An empty `Bytes` would still hold the buffer that the request was received in.
            *self = Self::default();
        }
    }

    fn fail(&mut self, error: io::Error) {
        *self = Self { failure: Some(error), ..Self::default() };
    }
}

fn is_hang_up(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted | io::ErrorKind::BrokenPipe
    )
}

/// Fields that belong to one hop, or that this module writes itself.
pub fn is_own_field(name: &HeaderName) -> bool {
    matches!(
        name.as_str(),
        "host"
            | "content-length"
            | "transfer-encoding"
            | "connection"
            | "keep-alive"
            | "proxy-connection"
            | "proxy-authorization"
            | "te"
            | "trailer"
            | "upgrade"
            | "expect"
    )
}

fn write_head(request: &RequestHead<'_>, body_length: usize) -> Bytes {
    let mut head = Vec::with_capacity(512);
    head.extend_from_slice(request.method.as_str().as_bytes());
    head.push(b' ');
    for part in request.target {
        head.extend_from_slice(part.as_bytes());
    }
    head.extend_from_slice(b" HTTP/1.1\r\n");
    write_field(&mut head, "host", request.host.as_bytes());
    for (name, value) in request.headers {
        if !is_own_field(name) {
            write_field(&mut head, name.as_str(), value.as_bytes());
        }
    }
    let has_body = body_length > 0 || matches!(*request.method, Method::POST | Method::PUT | Method::PATCH);
    if has_body {
        write_field(&mut head, "content-length", HeaderValue::from(body_length).as_bytes());
    }
    head.extend_from_slice(b"\r\n");
    head.into()
}

fn write_field(head: &mut Vec<u8>, name: &str, value: &[u8]) {
    head.extend_from_slice(name.as_bytes());
    head.extend_from_slice(b": ");
    head.extend_from_slice(value);
    head.extend_from_slice(b"\r\n");
}

/// Field values share the memory of the head; nothing is copied but unusual names that are not among `names`, those of
/// the answer before.
fn read_head(head: &Bytes, method: &Method, names: &mut Vec<HeaderName>) -> Result<Answer, WireError> {
    let mut fields = [const { MaybeUninit::uninit() }; MAX_HEADERS];
    let mut parsed = httparse::Response::new(&mut []);
    let parser = httparse::ParserConfig::default();
    match parser.parse_response_with_uninit_headers(&mut parsed, head, &mut fields) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) => return Err(WireError::Malformed("the head ends too early")),
        Err(httparse::Error::TooManyHeaders) => {
            return Err(WireError::Malformed("more than 128 header fields"));
        }
        Err(_) => return Err(WireError::Malformed("the head cannot be parsed")),
    }
    let status = parsed.code.and_then(|code| StatusCode::from_u16(code).ok());
    let status = status.ok_or(WireError::Malformed("the status is not a number from 100 to 999"))?;
    let version = if parsed.version == Some(1) { Version::HTTP_11 } else { Version::HTTP_10 };
    let headers = header_map(head, parsed.headers, names)?;
    let decoder = framing(status, &headers, method)?;
    // A close-delimited body ends the connection; so does a sender that mixes both framings.
    let ambiguous =
        headers.contains_key(header::TRANSFER_ENCODING) && headers.contains_key(header::CONTENT_LENGTH);
    let keep_alive = version == Version::HTTP_11
        && !ambiguous
        && !matches!(decoder, Decoder::UntilClose { .. })
        && !names_token(&headers, &header::CONNECTION, "close");
    Ok(Answer { status, headers, decoder, keep_alive })
}

fn header_map(
    whole: &Bytes,
    fields: &[httparse::Header<'_>],
    names: &mut Vec<HeaderName>,
) -> Result<HeaderMap, WireError> {
    let mut headers = HeaderMap::with_capacity(fields.len() + ADDED_HEADERS);
    for (index, field) in fields.iter().enumerate() {
        let name = field_name(field.name, index, names)?;
        let value = HeaderValue::from_maybe_shared(whole.slice_ref(field.value))
            .map_err(|_| WireError::Malformed("a header value is not valid"))?;
        headers.append(name, value);
    }
    Ok(headers)
}

/// The name of a field, taken from where it stood in the answer before if it is the same.
fn field_name(name: &str, index: usize, before: &mut Vec<HeaderName>) -> Result<HeaderName, WireError> {
    if let Some(before) = before.get(index)
        && (before.as_str() == name || before.as_str().eq_ignore_ascii_case(name))
    {
        return Ok(before.clone());
    }
    let name = HeaderName::from_bytes(name.as_bytes())
        .map_err(|_| WireError::Malformed("a header name is not valid"))?;
    before.truncate(index);
    before.push(name.clone());
    Ok(name)
}

/// RFC 9112, section 6.3.
fn framing(status: StatusCode, headers: &HeaderMap, method: &Method) -> Result<Decoder, WireError> {
    let never =
        status.is_informational() || status == StatusCode::NO_CONTENT || status == StatusCode::NOT_MODIFIED;
    if *method == Method::HEAD || never {
        return Ok(Decoder::empty());
    }
    if headers.contains_key(header::TRANSFER_ENCODING) {
        let chunked_last = headers
            .get_all(header::TRANSFER_ENCODING)
            .iter()
            .next_back()
            .and_then(|value| value.to_str().ok()?.rsplit(',').next())
            .is_some_and(|coding| coding.trim().eq_ignore_ascii_case("chunked"));
        return Ok(if chunked_last { Decoder::chunked() } else { Decoder::until_close() });
    }
    let mut length = None;
    for value in headers.get_all(header::CONTENT_LENGTH) {
        let parsed = value.to_str().ok().and_then(parse_length);
        let parsed = parsed.ok_or(WireError::Malformed("`content-length` is not a number"))?;
        if length.is_some_and(|known| known != parsed) {
            return Err(WireError::Malformed("two different `content-length` fields"));
        }
        length = Some(parsed);
    }
    Ok(length.map_or_else(Decoder::until_close, Decoder::length))
}

/// Digits only: `parse` alone would take a plus sign.
fn parse_length(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

/// Whether a comma-separated field holds the token.
fn names_token(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|part| part.trim().eq_ignore_ascii_case(token))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(text: &str) -> Result<Answer, WireError> {
        read_head(&Bytes::copy_from_slice(text.as_bytes()), &Method::POST, &mut Vec::new())
    }

    #[test]
    fn the_request_head_has_own_framing_and_none_of_the_clients_hop() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("host", "proxy.internal"),
            ("connection", "keep-alive, x-hop"),
            ("keep-alive", "timeout=5"),
            ("transfer-encoding", "chunked"),
            ("expect", "100-continue"),
            ("content-length", "9"),
            ("x-custom", "stays"),
        ] {
            headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        let host = HeaderValue::from_static("gpu:8000");
        let target = ["/v1", "/chat/completions", "?a=b"];
        let request = RequestHead { method: &Method::POST, target: &target, host: &host, headers: &headers };
        let text = String::from_utf8(write_head(&request, 3).to_vec()).unwrap();
        assert_eq!(
            text,
            "POST /v1/chat/completions?a=b HTTP/1.1\r\nhost: gpu:8000\r\nx-custom: stays\r\ncontent-length: 3\r\n\r\n"
        );
    }

    #[test]
    fn a_get_without_body_has_no_length() {
        let (host, headers) = (HeaderValue::from_static("h"), HeaderMap::new());
        let request =
            RequestHead { method: &Method::GET, target: &["/v1/models"], host: &host, headers: &headers };
        assert_eq!(write_head(&request, 0), "GET /v1/models HTTP/1.1\r\nhost: h\r\n\r\n");
    }

    #[test]
    fn framing_is_taken_from_the_head() {
        let length = head("HTTP/1.1 200 OK\r\ncontent-length: 12\r\n\r\n").unwrap();
        assert!(length.keep_alive && length.decoder.exact_length() == Some(12));
        let chunked = head("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, Chunked\r\n\r\n").unwrap();
        assert!(chunked.keep_alive && matches!(chunked.decoder, Decoder::Chunked { .. }));
        let until_close = head("HTTP/1.1 200 OK\r\n\r\n").unwrap();
        assert!(!until_close.keep_alive && matches!(until_close.decoder, Decoder::UntilClose { .. }));
        let empty = head("HTTP/1.1 204 No Content\r\n\r\n").unwrap();
        assert!(empty.keep_alive && empty.decoder.is_done());
    }

    #[test]
    fn a_connection_that_is_told_to_close_is_not_reused() {
        assert!(
            !head("HTTP/1.1 200 OK\r\nconnection: x, Close\r\ncontent-length: 0\r\n\r\n").unwrap().keep_alive
        );
        assert!(!head("HTTP/1.0 200 OK\r\ncontent-length: 0\r\n\r\n").unwrap().keep_alive);
        let both = "HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n";
        assert!(!head(both).unwrap().keep_alive);
    }

    #[test]
    fn heads_that_two_readers_could_understand_differently_are_refused() {
        for text in [
            "HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: +5\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999\r\n\r\n",
            "HTTP/1.1 200 OK\r\nx: a\r\n folded\r\n\r\n",
            "SPDY/9 200 OK\r\n\r\n",
        ] {
            assert!(matches!(head(text), Err(WireError::Malformed(_))), "{text}");
        }
    }

    #[test]
    fn a_head_is_read_the_same_whatever_the_head_before_was() {
        let heads = [
            "HTTP/1.1 200 OK\r\nx-request-id: 1\r\ncontent-length: 0\r\nX-Last: a\r\n\r\n",
            "HTTP/1.1 200 OK\r\nX-Request-Id: 2\r\nContent-Length: 0\r\n\r\n",
            "HTTP/1.1 200 OK\r\nx-requester-id: 3\r\ncontent-length: 0\r\nx-last: a\r\nx-last: b\r\n\r\n",
            "HTTP/1.1 200 OK\r\n\r\n",
        ];
        let mut names = Vec::new();
        for text in heads.iter().chain(heads.iter().rev()) {
            let bytes = Bytes::copy_from_slice(text.as_bytes());
            let answer = read_head(&bytes, &Method::POST, &mut names).unwrap();
            assert_eq!(answer.headers, head(text).unwrap().headers, "{text}");
        }
    }

    #[test]
    fn an_answer_to_head_has_no_body_whatever_it_announces() {
        let bytes = Bytes::from_static(b"HTTP/1.1 200 OK\r\ncontent-length: 5000\r\n\r\n");
        let answer = read_head(&bytes, &Method::HEAD, &mut Vec::new()).unwrap();
        assert!(answer.decoder.is_done() && answer.keep_alive);
        assert_eq!(answer.headers["content-length"], "5000");
    }
}
