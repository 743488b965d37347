//! Malformed and ambiguous requests over raw sockets: none becomes two, and none harms the next.

use std::net::SocketAddr;
use std::time::Duration;

use breakeven::demo::{FakeBackend, Personality, Settings};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::metric;
use crate::support::proxy::Proxy;
use crate::support::{Http, chat};

/// A request that must never be one.
const SMUGGLED: &str = "GET /v1/smuggled HTTP/1.1\r\nhost: x\r\n\r\n";
const HELLO: &str = r#"{"model":"gpt-4o-mini","messages":[{"role":"user","content":"hi"}]}"#;
/// Longer than all the limits of the proxy under test.
const PATIENCE: Duration = Duration::from_secs(5);

struct Case {
    name: &'static str,
    bytes: Vec<u8>,
    /// Calls that may reach the upstream: none where the request has no meaning, one where it has one. Of two
    /// framings the chunks hold, and the connection closes after the answer.
    calls: usize,
}

fn refused(name: &'static str, bytes: impl Into<Vec<u8>>) -> Case {
    Case { name, bytes: bytes.into(), calls: 0 }
}

fn one(name: &'static str, bytes: impl Into<Vec<u8>>) -> Case {
    Case { name, bytes: bytes.into(), calls: 1 }
}

fn post(headers: &str, body: &str) -> String {
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{headers}\r\n{body}"
    )
}

fn get(headers: &str) -> String {
    format!("GET /v1/files HTTP/1.1\r\nhost: x\r\n{headers}\r\n")
}

/// `HELLO` in one chunk, with `size` in the place of its size line.
fn chunked(size: &str, rest: &str) -> String {
    post("transfer-encoding: chunked\r\n", &format!("{size}\r\n{HELLO}\r\n0\r\n{rest}"))
}

fn hello_with(headers: &str) -> String {
    post(&format!("content-length: {}\r\n{headers}", HELLO.len()), HELLO)
}

fn size() -> String {
    format!("{:x}", HELLO.len())
}

fn two_framings() -> Vec<Case> {
    let length = HELLO.len();
    let chunk = format!("{length:x}\r\n{HELLO}\r\n0\r\n\r\n");
    let both = |headers: &str| post(headers, &format!("{chunk}{SMUGGLED}"));
    vec![
        one("length, then chunked", both("content-length: 5\r\ntransfer-encoding: chunked\r\n")),
        one("chunked, then length", both("transfer-encoding: chunked\r\ncontent-length: 5\r\n")),
        refused(
            "chunked hides a request within the length",
            post("content-length: 48\r\ntransfer-encoding: chunked\r\n", &format!("0\r\n\r\n{SMUGGLED}")),
        ),
        refused("lengths that differ", post("content-length: 5\r\ncontent-length: 60\r\n", SMUGGLED)),
        refused("lengths in a list that differ", post("content-length: 5, 60\r\n", SMUGGLED)),
        refused("a length in a list", post(&format!("content-length: {length}, {length}\r\n"), HELLO)),
        refused("a negative length", post("content-length: -1\r\n", SMUGGLED)),
        refused("a length with a plus", post(&format!("content-length: +{length}\r\n"), HELLO)),
        refused("a length in hexadecimal", post("content-length: 0x43\r\n", HELLO)),
        refused("an empty length", post("content-length:\r\n", SMUGGLED)),
        refused("a length beyond 64 bits", post("content-length: 99999999999999999999999\r\n", HELLO)),
        refused("a length of 18 exabytes", post("content-length: 18446744073709551615\r\n", HELLO)),
        refused("a length with a space in it", post("content-length: 6 7\r\n", HELLO)),
        refused("a length with a letter", post("content-length: 67a\r\n", HELLO)),
        refused("a space before the colon", post("content-length : 0\r\n", SMUGGLED)),
        refused("identity", both("transfer-encoding: identity\r\n")),
        refused(
            "identity, then chunked",
            both("transfer-encoding: identity\r\ntransfer-encoding: chunked\r\n"),
        ),
        refused("chunked twice", both("transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n")),
        refused("chunked, then identity", both("transfer-encoding: chunked, identity\r\n")),
        refused("gzip, then chunked", both("transfer-encoding: gzip, chunked\r\n")),
        refused("chunked with a letter before", both("transfer-encoding: xchunked\r\n")),
        refused("chunked in quotes", both("transfer-encoding: \"chunked\"\r\n")),
        refused("chunked after a vertical tab", both("transfer-encoding: \x0bchunked\r\n")),
        refused("chunked after a line that goes on", both("transfer-encoding:\r\n chunked\r\n")),
        refused(
            "chunked in HTTP/1.0",
            both("transfer-encoding: chunked\r\n").replace("HTTP/1.1", "HTTP/1.0"),
        ),
        refused("a space before chunked's colon", both("transfer-encoding : chunked\r\n")),
        refused("an underscore is no dash", post("transfer_encoding: chunked\r\n", &chunk)),
    ]
}

fn chunks() -> Vec<Case> {
    let size = size();
    vec![
        one("a chunk extension", chunked(&format!("{size};a=b"), "\r\n")),
        refused("an endless chunk extension", chunked(&format!("{size};{}", "a".repeat(64 << 10)), "\r\n")),
        refused("a chunk size of letters", chunked("xyz", "\r\n")),
        refused("a negative chunk size", chunked("-1", "\r\n")),
        refused("a chunk size with 0x", chunked(&format!("0x{size}"), "\r\n")),
        refused("an empty chunk size", chunked("", "\r\n")),
        refused("a chunk size beyond 64 bits", chunked("fffffffffffffffff", "\r\n")),
        refused("a chunk size of all bits", chunked("ffffffffffffffff", "\r\n")),
        refused("a chunk longer than its size", chunked("3", "\r\n")),
        refused("a chunk shorter than its size", chunked("ffff", "\r\n")),
        refused(
            "a chunk size that ends with a bare LF",
            post("transfer-encoding: chunked\r\n", &format!("{size}\n{HELLO}\r\n0\r\n\r\n")),
        ),
        refused(
            "a chunk extension that ends with a bare LF",
            post("transfer-encoding: chunked\r\n", &format!("{size};a\n{HELLO}\r\n0\r\n\r\n")),
        ),
        refused(
            "a chunk that ends with bare LF",
            post("transfer-encoding: chunked\r\n", &format!("{size}\r\n{HELLO}\n0\n\n")),
        ),
        refused(
            "chunks without an end",
            post("transfer-encoding: chunked\r\n", &format!("{size}\r\n{HELLO}\r\n")),
        ),
        one("a trailer that names a length", chunked(&size, &format!("content-length: 5\r\n\r\n{SMUGGLED}"))),
        refused("endless trailers", chunked(&size, &format!("a: {}\r\n\r\n", "b".repeat(256 << 10)))),
    ]
}

fn heads() -> Vec<Case> {
    let length = HELLO.len();
    let many = "x-a: y\r\n".repeat(500);
    vec![
        refused("a header line that goes on", get("x-a: b\r\n c: d\r\n")),
        refused("a first header that goes on", "GET /v1/files HTTP/1.1\r\n host: x\r\n\r\n"),
        refused("a bare CR in a header", get("x-a: b\rcontent-length: 5\r\n")),
        refused("a bare CR as a line end", "GET /v1/files HTTP/1.1\rhost: x\r\r"),
        one("lines that end with a bare LF", hello_with("connection: close\r\n").replace("\r\n", "\n")),
        one(
            "a bare LF before a length ends a line, and the length counts",
            post("", "").replace(
                "\r\n\r\n",
                &format!(
                    "\r\nx-a: b\ncontent-length: {length}\r\nconnection: close\r\n\r\n{HELLO}{SMUGGLED}"
                ),
            ),
        ),
        refused("a request behind a bare LF in a header", get(&format!("x-a: b\n{SMUGGLED}"))),
        refused("a NUL in a header's value", get("x-a: b\0c\r\n")),
        refused("a NUL in a header's name", get("x\0a: b\r\n")),
        refused("a NUL in the target", "GET /v1/fi\0les HTTP/1.1\r\nhost: x\r\n\r\n"),
        refused("a space in a header's name", get("x a: b\r\n")),
        refused("a header without a colon", get("content-length\r\n")),
        refused("a header without a name", get(": b\r\n")),
        refused("bytes beyond ASCII in a name", get("x-é: b\r\n")),
        refused("no host", "GET /v1/files HTTP/1.1\r\n\r\n"),
        refused("two hosts", get("host: evil.example\r\n")),
        refused("a head of 1 MiB", get(&format!("x-a: {}\r\n", "b".repeat(1 << 20)))),
        refused(
            "a target of 128 KiB",
            format!("GET /v1/{} HTTP/1.1\r\nhost: x\r\n\r\n", "a".repeat(128 << 10)),
        ),
        refused("five hundred headers", get(&many)),
        refused("a version that does not exist", "GET /v1/files HTTP/3.7\r\nhost: x\r\n\r\n"),
        refused("HTTP/0.9", "GET /v1/files\r\n\r\n"),
        refused("a version in small letters", "GET /v1/files http/1.1\r\nhost: x\r\n\r\n"),
        refused("two spaces in the first line", "GET  /v1/files HTTP/1.1\r\nhost: x\r\n\r\n"),
        refused("a tab in the first line", "GET\t/v1/files\tHTTP/1.1\r\nhost: x\r\n\r\n"),
        refused("words after the version", "GET /v1/files HTTP/1.1 more\r\nhost: x\r\n\r\n"),
        refused("CONNECT", "CONNECT evil.example:443 HTTP/1.1\r\nhost: evil.example:443\r\n\r\n"),
        refused("TRACE", "TRACE /v1/files HTTP/1.1\r\nhost: x\r\n\r\n"),
        refused("a method with a control character", "G\x01T /v1/files HTTP/1.1\r\nhost: x\r\n\r\n"),
        refused("OPTIONS of the server", "OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n"),
        one(
            "a target with another host stays here",
            format!(
                "POST http://evil.example/v1/chat/completions HTTP/1.1\r\nhost: evil.example\r\n\
                 content-length: {length}\r\n\r\n{HELLO}"
            ),
        ),
        refused("a target that is only a host", "GET evil.example HTTP/1.1\r\nhost: evil.example\r\n\r\n"),
        refused("a line feed in the target", "GET /v1/\nx HTTP/1.1\r\nhost: x\r\n\r\n"),
        refused("TLS on a plain port", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec()),
        refused("half of a head", "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncont"),
        refused("one letter", "P"),
        refused("nothing but line ends", "\r\n\r\n\r\n\r\n"),
        refused(
            "bytes at random",
            (0..4096_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect::<Vec<_>>(),
        ),
    ]
}

fn more_than_a_request() -> Vec<Case> {
    let h2 = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    vec![
        one(
            "an upgrade to h2c with a body",
            hello_with(
                "connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n",
            ),
        ),
        one(
            "an upgrade to a websocket on a call",
            hello_with("connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"),
        ),
        one(
            "a Connection that names the framing",
            hello_with("connection: content-length, host, content-type, close\r\n"),
        ),
        one("an Expect of something else", hello_with("expect: a-miracle\r\nconnection: close\r\n")),
        refused("half of an HTTP/2 preface", "PRI * HTTP/2.0\r\n\r\nS"),
        refused("an HTTP/2 preface and silence", h2),
        refused("an HTTP/2 preface and HTTP/1", format!("{h2}{SMUGGLED}")),
        refused(
            "an HTTP/2 frame of 16 MiB",
            [h2.as_bytes(), b"\xff\xff\xff\x00\x00\x00\x00\x00\x01"].concat(),
        ),
        refused(
            "HTTP/2 data before headers",
            [h2.as_bytes(), b"\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00\x05\x00\x01\x00\x00\x00\x01hello"]
                .concat(),
        ),
        one("an HTTP/2 preface after a request", format!("{}{h2}", get(""))),
        refused("a body on no method", "\r\n\r\nhello"),
        refused("a body cut off", post("content-length: 5000\r\n", HELLO)),
    ]
}

fn cases() -> Vec<Case> {
    [two_framings(), chunks(), heads(), more_than_a_request()].into_iter().flatten().collect()
}

/// Sends a case and reads until the connection closes. The status of each answer.
async fn statuses(address: SocketAddr, case: &Case) -> Vec<u16> {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let mut answer = Vec::new();
    // The server may refuse, and close, in the middle.
    drop(stream.write_all(&case.bytes).await);
    let closed = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await;
    assert!(
        closed.is_ok(),
        "{}: the connection stays open after {}",
        case.name,
        String::from_utf8_lossy(&answer)
    );
    let answer = String::from_utf8_lossy(&answer);
    let heads = answer.match_indices("HTTP/1.");
    heads.filter_map(|(at, _)| answer.get(at + 9..at + 12)?.parse().ok()).collect()
}

async fn proxy_before(api: &FakeBackend) -> Proxy {
    let config = format!(
        "[limits]\nheader_timeout = \"200ms\"\nbody_timeout = \"200ms\"\nidle_timeout = \"300ms\"\n\
         [backends.openai]\nkind = \"api\"\nbase_url = \"{}\"\n\
         [routes.chat]\nmodels = [\"gpt-4o-mini\"]\npolicy = \"api\"\noffers = [{{ backend = \"openai\" }}]\n",
        api.url()
    );
    Proxy::start(&config).await
}

#[tokio::test]
async fn a_malformed_request_is_refused_or_closed_and_never_becomes_two() {
    let api = FakeBackend::start(Personality::OpenAi, Settings::default()).await.unwrap();
    let proxy = proxy_before(&api).await;
    let cases = cases();
    assert!(cases.len() >= 60, "{}", cases.len());
    let mut wrong = Vec::new();
    let mut seen = 0;
    for case in &cases {
        let statuses = statuses(proxy.address(), case).await;
        let calls = api.requests().len() - seen;
        let answers_fit = match case.calls {
            0 => statuses.iter().all(|status| (400..500).contains(status)),
            _ => statuses.len() <= 1,
        };
        if calls > case.calls || !answers_fit {
            wrong.push(format!("{}: answered {statuses:?}, {calls} calls upstream", case.name));
        }
        // On a connection of its own, which cannot be closed for idleness under it.
        let reply = Http::new(&proxy.url()).post("/chat/completions", &chat("gpt-4o-mini")).await;
        assert_eq!(reply.status, 200, "the next one after {}", case.name);
        seen = api.requests().len();
    }
    assert!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    let smuggled = api.requests().iter().filter(|request| request.uri.path().contains("smuggled")).count();
    assert_eq!(smuggled, 0);
    assert_eq!(metric(&proxy.admin_url(), "breakeven_panics_total").await, 0);
}

#[tokio::test]
async fn requests_in_a_pipeline_are_answered_in_order_and_keep_their_own_headers() {
    let api = FakeBackend::start(Personality::OpenAi, Settings::default()).await.unwrap();
    let proxy = proxy_before(&api).await;
    let first = hello_with("authorization: Bearer sk-first\r\nx-app: first\r\n");
    let second = hello_with("x-breakeven-tags: team=b\r\nconnection: close\r\n");
    let case = Case { name: "a pipeline", bytes: format!("{first}{second}").into_bytes(), calls: 2 };
    assert_eq!(statuses(proxy.address(), &case).await, [200, 200]);
    let calls = api.calls();
    assert_eq!(calls.len(), 2);
    assert_eq!((calls[0].header("x-app"), calls[0].header("authorization")), ("first", "Bearer sk-first"));
    assert_eq!((calls[1].header("x-app"), calls[1].header("authorization")), ("", ""));
}
