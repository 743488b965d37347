//! What the tests share: a plain HTTP client and a reader of event streams.

pub(crate) mod cluster;
pub(crate) mod postgres;
pub(crate) mod proxy;
pub(crate) mod redis;
pub(crate) mod stage;

use std::io::Write as _;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use bytes::{Buf, Bytes};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;

/// Ends a test whose servers are not installed, saying which. Where all of them are to be there, as in CI, it
/// fails instead.
macro_rules! needs {
    ($($server:ident),+) => {$(
        if !$server::is_installed() {
            $crate::support::lacks($server::PACKAGE);
            return;
        }
    )+};
}
pub(crate) use needs;

pub(crate) fn lacks(package: &str) {
    assert!(std::env::var_os("CI").is_none(), "install the package `{package}`");
    // The harness shows what is written to the file itself, and hides what is printed.
    let mut shown = std::io::stderr().lock();
    writeln!(shown, "not tested here: install the package `{package}`").unwrap();
}

/// The first of so many neighbouring ports of the loopback that are free, for a process that must be told its own. They
/// are below the range from which the system takes the ports of connections, so that none of those gets in between.
pub(crate) fn free_ports(count: u16) -> u16 {
    const RANGE: std::ops::Range<u16> = 10_000..30_000;
    static TAKEN: AtomicU16 = AtomicU16::new(0);
    // Processes that run at the same time begin far from each other.
    let start = u16::try_from(std::process::id() % 200).unwrap() * 100;
    loop {
        let taken = TAKEN.fetch_add(count, Ordering::Relaxed);
        let first = RANGE.start + start.wrapping_add(taken) % (RANGE.end - RANGE.start);
        if (first..first + count).all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok()) {
            return first;
        }
    }
}

pub(crate) fn free_address() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], free_ports(1)))
}

/// Looks every ten milliseconds until there is something to see; `None` when patience has ended.
pub(crate) async fn soon<T>(patience: Duration, mut look: impl AsyncFnMut() -> Option<T>) -> Option<T> {
    let mut timer = tokio::time::interval(Duration::from_millis(10));
    let found = async {
        loop {
            timer.tick().await;
            if let Some(found) = look().await {
                return found;
            }
        }
    };
    tokio::time::timeout(patience, found).await.ok()
}

/// A client that adds nothing to a request and decodes nothing of an answer.
#[derive(Debug, Clone)]
pub(crate) struct Http {
    client: Client<HttpConnector, Full<Bytes>>,
    base: String,
}

/// An answer, read to its end.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Reply {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&self.body)))
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    /// A header's value, empty when it is absent.
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

impl Http {
    /// Talks HTTP/1.1 to what is below `base`, e.g. `http://127.0.0.1:1/v1`.
    pub(crate) fn new(base: &str) -> Self {
        Self { client: Client::builder(TokioExecutor::new()).build_http(), base: base.to_owned() }
    }

    /// Talks HTTP/2 without TLS.
    pub(crate) fn h2c(base: &str) -> Self {
        let client = Client::builder(TokioExecutor::new()).http2_only(true).build_http();
        Self { client, base: base.to_owned() }
    }

    pub(crate) fn request(&self, method: Method, path: &str) -> http::request::Builder {
        Request::builder().method(method).uri(format!("{}{path}", self.base))
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        self.send(self.request(Method::GET, path), Bytes::new()).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Reply {
        read(self.open(path, body).await).await
    }

    /// Sends a JSON body and returns when response headers are there.
    pub(crate) async fn open(&self, path: &str, body: &Value) -> Response<Incoming> {
        let request = self.request(Method::POST, path).header("content-type", "application/json");
        self.start(request, Bytes::from(body.to_string())).await.unwrap()
    }

    pub(crate) async fn send(&self, request: http::request::Builder, body: Bytes) -> Reply {
        read(self.start(request, body).await.unwrap()).await
    }

    pub(crate) async fn start(
        &self,
        request: http::request::Builder,
        body: Bytes,
    ) -> Result<Response<Incoming>, hyper_util::client::legacy::Error> {
        self.client.request(request.body(Full::new(body)).unwrap()).await
    }
}

pub(crate) async fn read(response: Response<Incoming>) -> Reply {
    let (head, body) = response.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    Reply { status: head.status, headers: head.headers, body }
}

/// An event stream, read event by event.
#[derive(Debug)]
pub(crate) struct Events {
    body: Incoming,
    buffer: Vec<u8>,
}

/// How a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The body was complete.
    Complete,
    /// The connection broke.
    Broken,
}

impl Events {
    pub(crate) fn of(response: Response<Incoming>) -> Self {
        Self { body: response.into_body(), buffer: Vec::new() }
    }

    /// The next event's lines, without the blank line at its end.
    pub(crate) async fn next(&mut self) -> Result<String, End> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|pair| pair == b"\n\n") {
                let event = self.buffer.drain(..end + 2).take(end).collect();
                return Ok(String::from_utf8(event).unwrap());
            }
            match self.body.frame().await {
                None => return Err(End::Complete),
                Some(Err(_)) => return Err(End::Broken),
                Some(Ok(frame)) => {
                    if let Ok(mut data) = frame.into_data() {
                        self.buffer.extend_from_slice(&data.copy_to_bytes(data.remaining()));
                    }
                }
            }
        }
    }

    /// All events that are left, and the end.
    pub(crate) async fn rest(mut self) -> (Vec<String>, End) {
        let mut events = Vec::new();
        loop {
            match self.next().await {
                Ok(event) => events.push(event),
                Err(end) => return (events, end),
            }
        }
    }
}

/// The JSON of every `data:` line that has some.
pub(crate) fn data(events: &[String]) -> Vec<Value> {
    let lines = events.iter().flat_map(|event| event.lines()).filter_map(|line| line.strip_prefix("data: "));
    lines.filter_map(|data| serde_json::from_str(data).ok()).collect()
}

/// The text that a chat stream spoke.
pub(crate) fn spoken(events: &[String]) -> String {
    let pieces = data(events);
    pieces.iter().filter_map(|chunk| chunk.pointer("/choices/0/delta/content")?.as_str()).collect()
}

/// A chat of one message.
pub(crate) fn chat(model: &str) -> Value {
    serde_json::json!({"model": model, "messages": [{"role": "user", "content": "What is the right time?"}]})
}

/// The same, with members added.
pub(crate) fn with(mut body: Value, members: Value) -> Value {
    let Value::Object(members) = members else { panic!("members are an object") };
    body.as_object_mut().unwrap().extend(members);
    body
}
