//! HTTP/2, frame by frame: malformed streams, floods of frames, and clients that take nothing.

use std::time::Duration;

use breakeven::demo::{FakeBackend, Personality, Settings, Verbatim};
use breakeven::ledger::Outcome;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{Served, metric, resident};
use crate::support::proxy::Proxy;
use crate::support::{Http, chat};

const MODEL: &str = "gpt-4o-mini";
const HELLO: &str = r#"{"model":"gpt-4o-mini","messages":[{"role":"user","content":"hi"}]}"#;
const STREAMED: &str = r#"{"model":"gpt-4o-mini","stream":true,"messages":[{"role":"user","content":"hi"}]}"#;
/// Longer than all the limits of the proxies under test.
const PATIENCE: Duration = Duration::from_secs(10);

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PUSH_PROMISE: u8 = 5;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
const WITH_PRIORITY: u8 = 0x20;
const INITIAL_WINDOW_SIZE: u16 = 4;

/// A frame as it was received.
#[derive(Debug)]
pub(super) struct Frame {
    kind: u8,
    flags: u8,
    pub(super) stream: u32,
    payload: Vec<u8>,
}

impl Frame {
    /// Whether it is the last one of an answer.
    pub(super) fn ends_stream(&self) -> bool {
        matches!(self.kind, DATA | HEADERS) && self.flags & END_STREAM != 0
    }

    /// The answer's status where HPACK's table has it, else 0.
    fn status(&self) -> u16 {
        match (self.kind, self.payload.first()) {
            (HEADERS, Some(0x88)) => 200,
            (HEADERS, Some(0x8c)) => 400,
            (HEADERS, Some(0x8d)) => 404,
            _ => 0,
        }
    }
}

/// A client that says whatever it is told to.
pub(super) struct Raw<S> {
    stream: S,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Raw<S> {
    /// Opens a connection with settings of the client's.
    pub(super) async fn start(mut stream: S, settings: &[(u16, u32)]) -> Self {
        let mut payload = Vec::new();
        for (name, value) in settings {
            payload.extend_from_slice(&name.to_be_bytes());
            payload.extend_from_slice(&value.to_be_bytes());
        }
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        stream.write_all(&frame(SETTINGS, 0, 0, &payload)).await.unwrap();
        Self { stream }
    }

    /// The server may close in the middle: that is seen when its answer is read.
    pub(super) async fn send(&mut self, bytes: &[u8]) {
        drop(tokio::time::timeout(PATIENCE, self.stream.write_all(bytes)).await);
    }

    /// The next frame; none when the connection is closed.
    async fn next(&mut self) -> Option<Frame> {
        let mut head = [0; 9];
        let read = tokio::time::timeout(PATIENCE, self.stream.read_exact(&mut head)).await;
        read.expect("the server says something or closes").ok()?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let stream = u32::from_be_bytes([head[5] & 0x7f, head[6], head[7], head[8]]);
        let mut payload = vec![0; length];
        self.stream.read_exact(&mut payload).await.ok()?;
        Some(Frame { kind: head[3], flags: head[4], stream, payload })
    }

    /// The first frame for which this is true; none when the connection closes before.
    pub(super) async fn until(&mut self, is_it: impl Fn(&Frame) -> bool) -> Option<Frame> {
        loop {
            let frame = self.next().await?;
            if is_it(&frame) {
                return Some(frame);
            }
        }
    }

    /// What becomes of a stream, or of the connection.
    async fn outcome(&mut self, stream: u32) -> Ending {
        let mut status = 0;
        loop {
            match self.next().await {
                None => return Ending::Closed,
                Some(frame) if frame.kind == GOAWAY => {
                    return Ending::GoAway(u32::from_be_bytes(frame.payload[4..8].try_into().unwrap()));
                }
                Some(frame) if frame.stream == stream && frame.kind == RST_STREAM => return Ending::Reset,
                Some(frame) if frame.stream == stream => {
                    if frame.kind == HEADERS {
                        status = frame.status();
                    }
                    if frame.ends_stream() {
                        return Ending::Answered(status);
                    }
                }
                Some(_) => {}
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    Answered(u16),
    Reset,
    GoAway(u32),
    Closed,
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// An integer of HPACK behind a prefix of so many bits.
fn integer(bits: u8, mut value: usize) -> Vec<u8> {
    let most = (1_usize << bits) - 1;
    if value < most {
        return vec![u8::try_from(value).unwrap()];
    }
    let mut bytes = vec![u8::try_from(most).unwrap()];
    value -= most;
    while value >= 128 {
        bytes.push(u8::try_from(value % 128 + 128).unwrap());
        value /= 128;
    }
    bytes.push(u8::try_from(value).unwrap());
    bytes
}

/// A field that is written out and not remembered.
fn field(name: &str, value: &str) -> Vec<u8> {
    let (name_length, value_length) = (integer(7, name.len()), integer(7, value.len()));
    [&[0][..], &name_length, name.as_bytes(), &value_length, value.as_bytes()].concat()
}

fn fields(fields: &[(&str, &str)]) -> Vec<u8> {
    fields.iter().flat_map(|(name, value)| field(name, value)).collect()
}

const GET: [(&str, &str); 4] =
    [(":method", "GET"), (":scheme", "http"), (":path", "/v1/files"), (":authority", "x")];

fn get_with(more: &[(&str, &str)]) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | END_STREAM, 1, &[fields(&GET), fields(more)].concat())
}

/// `GET` with one of its fields left out or replaced.
fn get_but(name: &str, value: Option<&str>) -> Vec<u8> {
    let kept = GET.into_iter().filter_map(|(field, given)| {
        if field == name { value.map(|value| (field, value)) } else { Some((field, given)) }
    });
    frame(HEADERS, END_HEADERS | END_STREAM, 1, &fields(&kept.collect::<Vec<_>>()))
}

fn post_head(stream: u32, more: &[(&str, &str)]) -> Vec<u8> {
    let head = fields(&[
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/v1/chat/completions"),
        (":authority", "x"),
        ("content-type", "application/json"),
    ]);
    frame(HEADERS, END_HEADERS, stream, &[head, fields(more)].concat())
}

/// A call with its body.
pub(super) fn post(stream: u32, body: &str) -> Vec<u8> {
    [post_head(stream, &[]), frame(DATA, END_STREAM, stream, body.as_bytes())].concat()
}

struct Case {
    name: &'static str,
    bytes: Vec<u8>,
}

fn case(name: &'static str, bytes: impl Into<Vec<u8>>) -> Case {
    Case { name, bytes: bytes.into() }
}

fn bad_heads() -> Vec<Case> {
    vec![
        case("a name in capitals", get_with(&[("X-Large", "1")])),
        case("a Connection header", get_with(&[("connection", "close")])),
        case("a Transfer-Encoding", get_with(&[("transfer-encoding", "chunked")])),
        case("a TE other than trailers", get_with(&[("te", "gzip")])),
        case("an Upgrade", get_with(&[("upgrade", "websocket")])),
        case("a Keep-Alive", get_with(&[("keep-alive", "timeout=5")])),
        case("no path", get_but(":path", None)),
        case("an empty path", get_but(":path", Some(""))),
        case("a path that is none", get_but(":path", Some("files"))),
        case("a request line in the path", get_but(":path", Some("/v1/files HTTP/1.1\r\nhost: y\r\n\r\n"))),
        case("a space in the path", get_but(":path", Some("/v1/files /v1/smuggled"))),
        case("no method", get_but(":method", None)),
        case("a method with a space", get_but(":method", Some("GET /v1/smuggled"))),
        case(
            "CONNECT",
            frame(
                HEADERS,
                END_HEADERS,
                1,
                &fields(&[(":method", "CONNECT"), (":authority", "evil.example:443")]),
            ),
        ),
        case("TRACE", get_but(":method", Some("TRACE"))),
        case("no scheme", get_but(":scheme", None)),
        case("two methods", get_with(&[(":method", "POST")])),
        case("two paths", get_with(&[(":path", "/v1/smuggled")])),
        case("a pseudo-header after a header", get_with(&[("x-a", "b"), (":authority", "y")])),
        case("a pseudo-header that does not exist", get_with(&[(":smuggled", "1")])),
        case("a status in a request", get_with(&[(":status", "200")])),
        case("a line end in a value", get_with(&[("x-a", "b\r\nx-smuggled: 1")])),
        case("a line feed in a value", get_with(&[("x-a", "b\nx-smuggled: 1")])),
        case("a NUL in a value", get_with(&[("x-a", "b\0c")])),
        case("a colon in a name", get_with(&[("x-a: b\r\nx-smuggled", "1")])),
        case("an empty name", get_with(&[("", "1")])),
        case("a user in the authority", get_but(":authority", Some("x@evil.example"))),
        case("a head larger than a frame may be", frame(HEADERS, END_HEADERS | END_STREAM, 1, &[0; 16_385])),
        case(
            "a body longer than its length",
            [post_head(1, &[("content-length", "5")]), frame(DATA, END_STREAM, 1, HELLO.as_bytes())].concat(),
        ),
        case(
            "a body shorter than its length",
            [post_head(1, &[("content-length", "500")]), frame(DATA, END_STREAM, 1, HELLO.as_bytes())]
                .concat(),
        ),
        case(
            "two lengths",
            [
                post_head(1, &[("content-length", "5"), ("content-length", "67")]),
                frame(DATA, END_STREAM, 1, HELLO.as_bytes()),
            ]
            .concat(),
        ),
        case(
            "a length that is no number",
            [post_head(1, &[("content-length", "+67")]), frame(DATA, END_STREAM, 1, HELLO.as_bytes())]
                .concat(),
        ),
    ]
}

fn bad_blocks() -> Vec<Case> {
    let block = |bytes: &[u8]| frame(HEADERS, END_HEADERS | END_STREAM, 1, bytes);
    vec![
        case("index 0", block(&[0x80])),
        case("an index beyond the table", block(&[0xff, 0x7f])),
        case("an index without an end", block(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff])),
        case("a string longer than the block", block(&[0x00, 0x7f, 0xff, 0x01])),
        case("Huffman codes that are none", block(&[0x00, 0x84, 0xff, 0xff, 0xff, 0xff, 0x01, b'a'])),
        case("a table larger than allowed", block(&[0x3f, 0xe1, 0xff, 0x7f])),
        case("a block cut off", block(&fields(&GET)[..20])),
    ]
}

fn bad_frames() -> Vec<Case> {
    let get = get_with(&[]);
    let window = |increment: u32| frame(WINDOW_UPDATE, 0, 0, &increment.to_be_bytes());
    vec![
        case("a head on stream 0", frame(HEADERS, END_HEADERS | END_STREAM, 0, &fields(&GET))),
        case(
            "a head on a stream of the server's",
            frame(HEADERS, END_HEADERS | END_STREAM, 2, &fields(&GET)),
        ),
        case("data on a stream that was never opened", frame(DATA, END_STREAM, 5, b"hello")),
        case("data on stream 0", frame(DATA, END_STREAM, 0, b"hello")),
        case(
            "a stream that depends on itself",
            frame(
                HEADERS,
                END_HEADERS | END_STREAM | WITH_PRIORITY,
                1,
                &[&[0, 0, 0, 1, 16][..], &fields(&GET)].concat(),
            ),
        ),
        case("padding longer than its frame", frame(DATA, END_STREAM | PADDED, 1, &[255, 1])),
        case("a window that grows by nothing", window(0)),
        case("a window beyond 31 bits", [window(0x7fff_ffff), window(0x7fff_ffff)].concat()),
        case("settings of an odd length", frame(SETTINGS, 0, 0, &[0, 1, 0])),
        case("settings on a stream", frame(SETTINGS, 0, 1, &[])),
        case("an acknowledgement with content", frame(SETTINGS, 1, 0, &[0, 4, 0, 0, 0, 0])),
        case("a first window beyond 31 bits", frame(SETTINGS, 0, 0, &[0, 4, 0xff, 0xff, 0xff, 0xff])),
        case("a largest frame of one byte", frame(SETTINGS, 0, 0, &[0, 5, 0, 0, 0, 1])),
        case("a short ping", frame(PING, 0, 0, &[0; 7])),
        case("a ping on a stream", frame(PING, 0, 1, &[0; 8])),
        case("a reset of a stream that was never opened", frame(RST_STREAM, 0, 9, &[0; 4])),
        case("a short reset", [get.clone(), frame(RST_STREAM, 0, 1, &[0; 3])].concat()),
        case(
            "a promise of the client's",
            frame(PUSH_PROMISE, END_HEADERS, 1, &[&[0, 0, 0, 2][..], &fields(&GET)].concat()),
        ),
        case("a continuation of nothing", frame(CONTINUATION, END_HEADERS, 1, &fields(&GET))),
        case(
            "a head interrupted by a ping",
            [frame(HEADERS, END_STREAM, 1, &fields(&GET)), frame(PING, 0, 0, &[0; 8])].concat(),
        ),
        case(
            "a head interrupted by another stream's",
            [frame(HEADERS, END_STREAM, 1, &fields(&GET)), frame(CONTINUATION, END_HEADERS, 3, &[])].concat(),
        ),
        case("a frame larger than agreed", frame(DATA, 0, 1, &[0; 20_000])),
        case("a short priority", frame(PRIORITY, 0, 1, &[0; 4])),
    ]
}

async fn proxy_before(api: &FakeBackend, limits: &str) -> Proxy {
    let config = format!(
        "[limits]\n{limits}\n[backends.openai]\nkind = \"api\"\nbase_url = \"{}\"\n\
         [routes.chat]\nmodels = [\"{MODEL}\"]\npolicy = \"api\"\noffers = [{{ backend = \"openai\" }}]\n",
        api.url()
    );
    Proxy::start(&config).await
}

const IMPATIENT: &str = "header_timeout = \"200ms\"\nbody_timeout = \"200ms\"\nidle_timeout = \"300ms\"";
/// Long enough for a ping on a busy machine.
const ONE_SECOND: &str = "header_timeout = \"1s\"\nidle_timeout = \"1s\"";

#[tokio::test]
async fn malformed_frames_and_heads_are_refused_and_reach_nobody() {
    let api = FakeBackend::start(Personality::OpenAi, Settings::default()).await.unwrap();
    let proxy = proxy_before(&api, IMPATIENT).await;
    let cases: Vec<Case> = [bad_heads(), bad_blocks(), bad_frames()].into_iter().flatten().collect();
    let mut wrong = Vec::new();
    for case in &cases {
        let seen = api.requests().len();
        let mut raw = Raw::start(TcpStream::connect(proxy.address()).await.unwrap(), &[]).await;
        raw.send(&case.bytes).await;
        let ending = raw.outcome(1).await;
        let calls = api.requests().len() - seen;
        if ending == Ending::Answered(200) || calls > 0 {
            wrong.push(format!("{}: {ending:?}, {calls} calls upstream", case.name));
        }
        // On a connection of its own, which cannot be closed for idleness under it.
        let reply = Http::new(&proxy.url()).post("/chat/completions", &chat(MODEL)).await;
        assert_eq!(reply.status, 200, "the next one after {}", case.name);
    }
    eprintln!("{} cases of HTTP/2", cases.len());
    assert!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    assert_eq!(metric(&proxy.admin_url(), "breakeven_panics_total").await, 0);
}

#[tokio::test]
async fn a_request_of_http1_in_a_body_of_http2_stays_a_body() {
    let api = FakeBackend::start(Personality::OpenAi, Settings::default()).await.unwrap();
    let proxy = proxy_before(&api, "").await;
    let mut raw = Raw::start(TcpStream::connect(proxy.address()).await.unwrap(), &[]).await;
    let smuggled = "GET /v1/smuggled HTTP/1.1\r\nhost: x\r\n\r\n";
    let body = format!("{HELLO}\r\n0\r\n\r\n{smuggled}");
    raw.send(&post(1, &body)).await;
    assert_eq!(raw.outcome(1).await, Ending::Answered(400));
    let head = frame(
        HEADERS,
        END_HEADERS,
        3,
        &fields(&[(":method", "POST"), (":scheme", "http"), (":path", "/v1/files"), (":authority", "x")]),
    );
    raw.send(&[head, frame(DATA, END_STREAM, 3, smuggled.as_bytes())].concat()).await;
    raw.outcome(3).await;
    assert!(api.requests().iter().all(|request| !request.uri.path().contains("smuggled")));
    assert!(api.requests().len() <= 1);
}

/// Frames that cost a server more than their client, so many that they must not be answered one by one.
fn floods() -> Vec<(&'static str, Vec<u8>, Vec<u8>)> {
    let open = frame(HEADERS, 0, 1, &fields(&GET));
    let filler = field("x-filler", &"a".repeat(1000));
    let remembered =
        [&[0x40][..], &integer(7, 1), b"x", &integer(7, 4000), "a".repeat(4000).as_bytes()].concat();
    let bomb = [fields(&GET), remembered, vec![0xbe; 12_000]].concat();
    vec![
        ("heads that never end", open, frame(CONTINUATION, 0, 1, &filler).repeat(50_000)),
        ("a head of four thousand fields", Vec::new(), {
            let many: Vec<u8> = (0..4000).flat_map(|number| field(&format!("x-{number}"), "1")).collect();
            let pieces = many.chunks(16_000).map(|piece| frame(CONTINUATION, 0, 1, piece));
            let pieces: Vec<u8> = pieces.collect::<Vec<_>>().concat();
            [frame(HEADERS, END_STREAM, 1, &fields(&GET)), pieces, frame(CONTINUATION, END_HEADERS, 1, &[])]
                .concat()
        }),
        (
            "a field of 4 KB that is named 12,000 times",
            Vec::new(),
            frame(HEADERS, END_HEADERS | END_STREAM, 1, &bomb),
        ),
        ("settings", Vec::new(), frame(SETTINGS, 0, 0, &[0, 4, 0, 1, 0, 0]).repeat(200_000)),
        ("pings", Vec::new(), frame(PING, 0, 0, &[0; 8]).repeat(200_000)),
        ("empty data", post_head(1, &[]), frame(DATA, 0, 1, &[]).repeat(200_000)),
        ("priorities", Vec::new(), frame(PRIORITY, 0, 1, &[0, 0, 0, 3, 16]).repeat(200_000)),
        ("windows of one byte", post_head(1, &[]), frame(WINDOW_UPDATE, 0, 1, &[0, 0, 0, 1]).repeat(200_000)),
        ("streams that are reset at once", Vec::new(), {
            let stream =
                |number: u32| [post(number, STREAMED), frame(RST_STREAM, 0, number, &[0, 0, 0, 8])].concat();
            (0..20_000).flat_map(|number| stream(2 * number + 1)).collect()
        }),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn floods_of_frames_take_neither_memory_nor_the_calls_of_others() {
    let settings = Settings { time_to_first_token: Duration::from_secs(5), ..Settings::default() };
    let api = FakeBackend::start(Personality::OpenAi, settings).await.unwrap();
    let config = format!(
        "[limits]\nheader_timeout = \"1s\"\nidle_timeout = \"1s\"\n[backends.openai]\nkind = \"api\"\nbase_url = \"{}\"\n\
         [routes.chat]\nmodels = [\"{MODEL}\"]\npolicy = \"api\"\noffers = [{{ backend = \"openai\" }}]\n",
        api.url()
    );
    let served = Served::start("", &config, &[]).await;
    // Each on a connection of its own: one that has been idle for a second may be closed under a call.
    let models = async || Http::new(&served.url()).get("/models").await.status;
    assert_eq!(models().await, 200);
    let before = resident(&served);
    for (name, start, flood) in floods() {
        let calls = api.calls().len();
        // Nothing is read until all is sent: answers must not pile up either.
        let mut raw = Raw::start(TcpStream::connect(served.address).await.unwrap(), &[]).await;
        raw.send(&start).await;
        raw.send(&flood).await;
        assert_eq!(models().await, 200, "beside {name}");
        let ending = raw.outcome(1).await;
        let calls = api.calls().len() - calls;
        eprintln!("{name}: {ending:?} after {} KiB, {calls} calls upstream", flood.len() / 1024);
        assert_ne!(ending, Ending::Answered(200), "{name}");
        assert!(calls <= 1100, "{name}: {calls} calls upstream");
    }
    let after = resident(&served);
    eprintln!("{before} KiB before, {after} KiB after");
    assert!(after < before + 48 * 1024, "{before} KiB before, {after} KiB after");
    assert_eq!(metric(&served.admin_url(), "breakeven_panics_total").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_grant_no_room_for_their_answers_are_given_up_and_their_calls_are_booked() {
    let event = b"data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"long\"}}]}\n\n";
    let long = Verbatim { content_type: "text/event-stream", body: event.repeat(2_000).into() };
    let api =
        FakeBackend::start(Personality::OpenAi, Settings { verbatim: Some(long), ..Settings::default() });
    let api = api.await.unwrap();
    let proxy = proxy_before(&api, ONE_SECOND).await;
    let stream = TcpStream::connect(proxy.address()).await.unwrap();
    let mut raw = Raw::start(stream, &[(INITIAL_WINDOW_SIZE, 0)]).await;
    for number in 0..50 {
        raw.send(&post(2 * number + 1, STREAMED)).await;
    }
    let mut resets = 0;
    while let Some(frame) = raw.next().await {
        resets += usize::from(frame.kind == RST_STREAM);
        if frame.kind == PING && frame.flags == 0 {
            raw.send(&self::frame(PING, 1, 0, &frame.payload)).await;
        }
    }
    assert_eq!(resets, 50, "each stream is reset, and then the connection closes");
    let entries = proxy.entries().await;
    assert_eq!(entries.len(), 50);
    assert!(entries.iter().all(|entry| entry.outcome == Outcome::Cancelled));
}

#[tokio::test]
async fn a_client_that_reads_slowly_gets_all_of_its_answer() {
    let event = b"data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"long\"}}]}\n\n";
    let body = [&event.repeat(8_000)[..], b"data: [DONE]\n\n"].concat();
    let long = Verbatim { content_type: "text/event-stream", body: body.clone().into() };
    let api =
        FakeBackend::start(Personality::OpenAi, Settings { verbatim: Some(long), ..Settings::default() });
    let api = api.await.unwrap();
    let proxy = proxy_before(&api, ONE_SECOND).await;
    let stream = TcpStream::connect(proxy.address()).await.unwrap();
    let mut raw = Raw::start(stream, &[(INITIAL_WINDOW_SIZE, 16_000)]).await;
    raw.send(&post(1, STREAMED)).await;
    let (mut taken, mut owed) = (0, 0_u32);
    // Each piece is granted a while after the one before, and all of it takes longer than any limit.
    let mut grant = tokio::time::interval(Duration::from_millis(50));
    loop {
        let Some(frame) = raw.next().await else { panic!("closed after {taken} bytes") };
        match frame.kind {
            DATA => {
                taken += frame.payload.len();
                if frame.ends_stream() {
                    break;
                }
                owed += u32::try_from(frame.payload.len()).unwrap();
                if owed < 8_000 {
                    continue;
                }
                grant.tick().await;
                let room = std::mem::take(&mut owed).to_be_bytes();
                raw.send(
                    &[self::frame(WINDOW_UPDATE, 0, 1, &room), self::frame(WINDOW_UPDATE, 0, 0, &room)]
                        .concat(),
                )
                .await;
            }
            PING if frame.flags == 0 => raw.send(&self::frame(PING, 1, 0, &frame.payload)).await,
            RST_STREAM | GOAWAY => panic!("{frame:?} after {taken} bytes"),
            _ => {}
        }
    }
    assert_eq!(taken, body.len());
    assert_eq!(proxy.entries().await[0].outcome, Outcome::Success);
}
