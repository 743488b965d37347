//! Spans at a collector that speaks OTLP over HTTP: what they say, whose children they are, and what they cost calls.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use breakeven::demo::{FakeBackend, Fault, Personality, Settings};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::net::TcpListener;

use crate::support::proxy::Proxy;
use crate::support::{Http, chat, with};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";

/// One field of a protobuf message.
#[derive(Debug, Clone)]
enum Field {
    Number(u64),
    Fixed(u64),
    Bytes(Bytes),
}

/// The fields of a message, by number, in order. Panics at what is no protobuf.
fn fields(mut message: Bytes) -> Vec<(u64, Field)> {
    let mut fields = Vec::new();
    while !message.is_empty() {
        let key = varint(&mut message);
        let field = match key & 7 {
            0 => Field::Number(varint(&mut message)),
            1 => Field::Fixed(u64::from_le_bytes(message.split_to(8).as_ref().try_into().unwrap())),
            2 => {
                let length = varint(&mut message);
                Field::Bytes(message.split_to(usize::try_from(length).unwrap()))
            }
            5 => {
                let four: [u8; 4] = message.split_to(4).as_ref().try_into().unwrap();
                Field::Fixed(u64::from(u32::from_le_bytes(four)))
            }
            other => panic!("wire type {other} is not in use"),
        };
        fields.push((key >> 3, field));
    }
    fields
}

fn varint(message: &mut Bytes) -> u64 {
    let mut value = 0;
    for shift in (0..).step_by(7) {
        let byte = message.split_to(1)[0];
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            break;
        }
    }
    value
}

fn all(message: &Bytes, number: u64) -> Vec<Bytes> {
    let bytes = |(found, field)| match field {
        Field::Bytes(bytes) if found == number => Some(bytes),
        _ => None,
    };
    fields(message.clone()).into_iter().filter_map(bytes).collect()
}

fn one(message: &Bytes, number: u64) -> Bytes {
    all(message, number).into_iter().next().unwrap_or_default()
}

fn text(message: &Bytes, number: u64) -> String {
    String::from_utf8(one(message, number).to_vec()).unwrap()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"))
}

/// A span as `opentelemetry/proto/trace/v1/trace.proto` lays it out.
#[derive(Debug)]
struct Span {
    trace: String,
    id: String,
    parent: String,
    name: String,
    kind: u64,
    nanos: u64,
    attributes: Vec<(String, String)>,
    /// 2 is an error.
    status: u64,
    service: String,
}

impl Span {
    fn read(message: &Bytes, service: &str) -> Self {
        let number = |wanted: u64| {
            let found = fields(message.clone()).into_iter().find(|(number, _)| *number == wanted);
            match found {
                Some((_, Field::Number(number) | Field::Fixed(number))) => number,
                _ => 0,
            }
        };
        let status = fields(one(message, 15)).into_iter().find_map(|field| match field {
            (3, Field::Number(code)) => Some(code),
            _ => None,
        });
        Self {
            trace: hex(&one(message, 1)),
            id: hex(&one(message, 2)),
            parent: hex(&one(message, 4)),
            name: text(message, 5),
            kind: number(6),
            nanos: number(8) - number(7),
            attributes: all(message, 9).iter().map(attribute).collect(),
            status: status.unwrap_or_default(),
            service: service.to_owned(),
        }
    }

    fn attribute(&self, name: &str) -> &str {
        let found = self.attributes.iter().find(|(key, _)| key == name);
        found.map_or_else(|| panic!("`{name}` is not in {self:#?}"), |(_, value)| value.as_str())
    }
}

/// `KeyValue`: a key, and an `AnyValue` that is text, a whole number or a double.
fn attribute(message: &Bytes) -> (String, String) {
    let value = match fields(one(message, 2)).into_iter().next() {
        Some((1, Field::Bytes(text))) => String::from_utf8(text.to_vec()).unwrap(),
        Some((3, Field::Number(number))) => number.to_string(),
        Some((4, Field::Fixed(bits))) => f64::from_bits(bits).to_string(),
        other => panic!("{other:?} is no value of ours"),
    };
    (text(message, 1), value)
}

/// A collector, and the bodies that it was sent.
struct Collector {
    url: String,
    bodies: Arc<Mutex<Vec<Bytes>>>,
}

impl Collector {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let bodies = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&bodies);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let kept = Arc::clone(&kept);
                let answer = service_fn(move |request: Request<Incoming>| {
                    let kept = Arc::clone(&kept);
                    async move {
                        assert_eq!((request.method(), request.uri().path()), (&Method::POST, "/v1/traces"));
                        assert_eq!(request.headers()["content-type"], "application/x-protobuf");
                        let body = request.into_body().collect().await.unwrap().to_bytes();
                        kept.lock().unwrap().push(body);
                        Ok::<_, Infallible>(Response::new(Full::<Bytes>::default()))
                    }
                });
                tokio::spawn(async move {
                    let connection = hyper::server::conn::http1::Builder::new();
                    drop(connection.serve_connection(TokioIo::new(stream), answer).await);
                });
            }
        });
        Self { url, bodies }
    }

    /// Every span that came: `ExportTraceServiceRequest`, `ResourceSpans`, `ScopeSpans`, `Span`.
    fn spans(&self) -> Vec<Span> {
        let mut spans = Vec::new();
        for body in self.bodies.lock().unwrap().iter() {
            for resource_spans in all(body, 1) {
                let resource: Vec<_> = all(&one(&resource_spans, 1), 1).iter().map(attribute).collect();
                let service = resource.iter().find(|(key, _)| key == "service.name").unwrap().1.clone();
                for scope_spans in all(&resource_spans, 2) {
                    spans.extend(all(&scope_spans, 2).iter().map(|span| Span::read(span, &service)));
                }
            }
        }
        spans
    }
}

async fn proxy(api: &FakeBackend, collector: &str) -> Proxy {
    Proxy::start(&format!(
        "[telemetry]\notlp_endpoint = '{collector}'\n\
         [backends.openai]\nkind = 'api'\nbase_url = '{}'\n\
         [routes.chat]\nmodels = ['gpt-4o-mini']\noffers = [{{ backend = 'openai' }}]\n",
        api.url()
    ))
    .await
}

async fn call(proxy: &Proxy, traceparent: Option<String>, body: &serde_json::Value) -> crate::support::Reply {
    let client = Http::new(&proxy.url());
    let mut request =
        client.request(Method::POST, "/chat/completions").header("content-type", "application/json");
    if let Some(value) = traceparent {
        request = request.header("traceparent", value).header("tracestate", "vendor=1");
    }
    client.send(request, Bytes::from(body.to_string())).await
}

/// Ends the proxy, which sends off what is queued.
async fn end(proxy: Proxy) {
    let ending = proxy.running.shut_down(std::future::ready(()));
    tokio::time::timeout(Duration::from_mins(1), ending).await.expect("it ends within its patience");
}

#[tokio::test]
async fn a_call_is_a_span_below_the_clients_and_above_the_backends() {
    let (api, collector) = (
        FakeBackend::start(Personality::OpenAi, Settings::default()).await.unwrap(),
        Collector::start().await,
    );
    let proxy = proxy(&api, &collector.url).await;
    let reply = call(&proxy, Some(format!("00-{TRACE}-{PARENT}-01")), &chat("gpt-4o-mini")).await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
    let streamed = with(chat("gpt-4o-mini"), json!({ "stream": true }));
    assert_eq!(call(&proxy, None, &streamed).await.status, StatusCode::OK);
    let entries = proxy.entries().await;
    end(proxy).await;

    let spans = collector.spans();
    assert_eq!(spans.len(), 2, "{spans:#?}");
    let entry = entries.iter().find(|entry| !entry.stream).unwrap();
    let span = spans.iter().find(|span| span.trace == TRACE).unwrap();
    // The request id ties the span to the header, the ledger and the log.
    assert_eq!(span.attribute("breakeven.request_id"), reply.header("x-breakeven-request-id"));
    assert_eq!(span.attribute("breakeven.request_id"), entry.id.to_string());
    assert_eq!((span.parent.as_str(), span.kind, span.status), (PARENT, 3, 0));
    assert_eq!((span.name.as_str(), span.service.as_str()), ("chat gpt-4o-mini", "breakeven"));
    assert!(span.nanos > 0);
    assert_eq!(span.attribute("gen_ai.operation.name"), "chat");
    assert_eq!(span.attribute("gen_ai.provider.name"), "openai");
    assert_eq!(span.attribute("gen_ai.request.model"), "gpt-4o-mini");
    assert_eq!(span.attribute("gen_ai.response.model"), reply.json()["model"].as_str().unwrap());
    let usage = &reply.json()["usage"];
    assert_eq!(span.attribute("gen_ai.usage.input_tokens"), usage["prompt_tokens"].to_string());
    assert_eq!(span.attribute("gen_ai.usage.output_tokens"), usage["completion_tokens"].to_string());
    assert_eq!(span.attribute("breakeven.backend"), "openai");
    assert_eq!(span.attribute("breakeven.reason"), reply.header("x-breakeven-reason"));
    let cost: f64 = span.attribute("breakeven.cost_usd").parse().unwrap();
    assert!(cost > 0.0 && (cost - entry.cost.to_usd_f64()).abs() < 1e-12, "{cost}");

    let seen: Vec<_> = api.calls().iter().map(|call| call.header("traceparent").to_owned()).collect();
    assert_eq!(seen[0], format!("00-{TRACE}-{}-01", span.id));
    assert_eq!(api.calls()[0].header("tracestate"), "vendor=1");
    let other = spans.iter().find(|span| span.trace != TRACE).unwrap();
    assert_eq!(seen[1], format!("00-{}-{}-01", other.trace, other.id));
    assert_eq!(other.parent, "", "without a parent it begins a trace");
    assert!(other.attribute("gen_ai.response.time_to_first_chunk").parse::<f64>().unwrap() > 0.0);
}

#[tokio::test]
async fn a_trace_that_is_not_sampled_has_no_span_and_goes_on_unsampled() {
    let (api, collector) = (
        FakeBackend::start(Personality::OpenAi, Settings::default()).await.unwrap(),
        Collector::start().await,
    );
    let proxy = proxy(&api, &collector.url).await;
    let reply = call(&proxy, Some(format!("00-{TRACE}-{PARENT}-00")), &chat("gpt-4o-mini")).await;
    assert_eq!(reply.status, StatusCode::OK);
    end(proxy).await;
    assert!(collector.spans().is_empty(), "{:#?}", collector.spans());
    let calls = api.calls();
    let seen = calls[0].header("traceparent");
    assert!(seen.starts_with(&format!("00-{TRACE}-")) && seen.ends_with("-00"), "{seen}");
}

#[tokio::test]
async fn a_failed_call_and_a_refused_one_are_errors() {
    let (api, collector) = (
        FakeBackend::start(Personality::OpenAi, Settings::default()).await.unwrap(),
        Collector::start().await,
    );
    let proxy = proxy(&api, &collector.url).await;
    api.fail_next(10, &Fault::Status(500));
    let reply = call(&proxy, Some(format!("00-{TRACE}-{PARENT}-01")), &chat("gpt-4o-mini")).await;
    assert_eq!(reply.status, StatusCode::INTERNAL_SERVER_ERROR);
    let refused = call(&proxy, None, &json!({ "messages": [] })).await;
    assert_eq!(refused.status, StatusCode::BAD_REQUEST);
    end(proxy).await;
    let spans = collector.spans();
    let failed = spans.iter().find(|span| span.trace == TRACE).unwrap();
    assert_eq!((failed.status, failed.attribute("error.type")), (2, "upstream_error"));
    assert_eq!(failed.attribute("http.response.status_code"), "500");
    let refused = spans.iter().find(|span| span.trace != TRACE).unwrap();
    assert_eq!((refused.status, refused.attribute("error.type")), (2, "not_forwarded"));
}

#[tokio::test]
async fn a_collector_that_is_away_costs_calls_nothing() {
    let api = FakeBackend::start(Personality::OpenAi, Settings::default()).await.unwrap();
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let proxy = proxy(&api, &format!("http://{closed}")).await;
    for _ in 0..20 {
        assert_eq!(call(&proxy, None, &chat("gpt-4o-mini")).await.status, StatusCode::OK);
    }
    assert_eq!(proxy.entries().await.len(), 20);
    end(proxy).await;
}
