//! Backends that hang, limit and fill up: what one does never holds up calls that another serves.

use std::time::Duration;

use breakeven::clock::Stopwatch;
use breakeven::demo::{FakeBackend, Fault, Personality, Settings};
use breakeven::ledger::Outcome;
use http::StatusCode;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::scale;

use crate::support::proxy::Proxy;
use crate::support::{Events, Http, chat, data, with};

const API_MODEL: &str = "gpt-4o-mini";
const OWN_MODEL: &str = "house-model";

struct Two {
    api: FakeBackend,
    own: FakeBackend,
    proxy: Proxy,
    http: Http,
}

/// An API, a self-hosted backend of four slots, a route for each, and the API as the second of both.
async fn two(api_lines: &str, own_lines: &str) -> Two {
    let api = FakeBackend::start(Personality::OpenAi, Settings::default()).await.unwrap();
    let own =
        FakeBackend::start(Personality::Vllm, Settings { slots: 4, ..Settings::default() }).await.unwrap();
    let config = format!(
        r#"
        [backends.openai]
        kind = "api"
        base_url = "{}"
        {api_lines}
        [backends.gpu]
        kind = "self_hosted"
        base_url = "{}"
        hourly_usd = 2.99
        billing = "committed"
        capacity = {{ input_tokens_per_second = 15000, output_tokens_per_second = 10000, max_in_flight = 4 }}
        {own_lines}
        [routes.api]
        models = ["{API_MODEL}"]
        policy = "api"
        offers = [{{ backend = "openai" }}]
        [routes.own]
        models = ["{OWN_MODEL}"]
        policy = "self_hosted"
        offers = [{{ backend = "gpu", model = "llama" }}, {{ backend = "openai", model = "{API_MODEL}" }}]
        "#,
        api.url(),
        own.url()
    );
    let proxy = Proxy::start(&config).await.ready().await;
    let http = Http::new(&proxy.url());
    Two { api, own, proxy, http }
}

fn streamed(model: &str) -> serde_json::Value {
    with(chat(model), json!({"stream": true}))
}

#[tokio::test]
async fn a_backend_that_hangs_holds_up_no_call_to_another() {
    let two = two("", "").await;
    two.own.set(|settings| settings.faults = vec![Fault::SlowHeaders(Duration::from_mins(5))]);
    let mut hanging = JoinSet::new();
    for _ in 0..4 {
        let http = two.http.clone();
        hanging.spawn(async move { http.post("/chat/completions", &chat(OWN_MODEL)).await });
    }
    assert!(two.own.until(|own| own.calls().len() == 4).await);
    let watch = Stopwatch::start();
    for model in [API_MODEL, OWN_MODEL].repeat(20) {
        let reply = two.http.post("/chat/completions", &chat(model)).await;
        assert_eq!((reply.status, reply.header("x-breakeven-backend")), (StatusCode::OK, "openai"));
    }
    assert!(watch.elapsed() < Duration::from_secs(5), "{:?}", watch.elapsed());
}

#[tokio::test]
async fn the_circuit_of_an_only_backend_opens_too_and_closes_when_it_is_well() {
    let two = two("circuit = { failures = 2, open_for = \"300ms\" }", "").await;
    two.api.set(|settings| settings.faults = vec![Fault::Status(500)]);
    let fails = async {
        while two.http.post("/chat/completions", &chat(API_MODEL)).await.status
            != StatusCode::SERVICE_UNAVAILABLE
        {}
    };
    tokio::time::timeout(Duration::from_secs(10), fails).await.expect("it opens");
    let before = two.api.calls().len();
    let reply = two.http.post("/chat/completions", &chat(API_MODEL)).await;
    assert_eq!((reply.status, reply.header("retry-after")), (StatusCode::SERVICE_UNAVAILABLE, "1"));
    assert_eq!(two.api.calls().len(), before, "it is left alone");
    two.api.set(|settings| settings.faults.clear());
    let heals = async {
        while two.http.post("/chat/completions", &chat(API_MODEL)).await.status != StatusCode::OK {}
    };
    tokio::time::timeout(Duration::from_secs(10), heals).await.expect("it closes");
}

#[tokio::test]
async fn a_call_whose_only_backend_has_opened_its_circuit_is_answered_and_does_not_wait_for_it() {
    let two = two("circuit = { failures = 1, open_for = \"1m\" }", "").await;
    two.api.set(|settings| settings.faults = vec![Fault::Status(500)]);
    let watch = Stopwatch::start();
    let reply = two.http.post("/chat/completions", &chat(API_MODEL)).await;
    assert_eq!((reply.status, two.api.calls().len()), (StatusCode::INTERNAL_SERVER_ERROR, 1));
    let next = two.http.post("/chat/completions", &chat(API_MODEL)).await;
    assert_eq!(next.status, StatusCode::SERVICE_UNAVAILABLE);
    let seconds: u64 = next.header("retry-after").parse().unwrap();
    assert!((50..=60).contains(&seconds), "it says when the circuit lets a call through: {seconds}");
    assert!(watch.elapsed() < Duration::from_secs(5), "{:?}", watch.elapsed());
}

#[tokio::test]
async fn a_retry_beyond_the_time_of_a_call_is_not_waited_for() {
    let two =
        two("timeouts = { first_byte = \"1s\", total = \"1s\" }\ncircuit = { failures = 100 }", "").await;
    let limited = Fault::RateLimited { retry_after: Duration::from_secs(2) };
    two.api.set(|settings| settings.faults = vec![limited]);
    let watch = Stopwatch::start();
    let reply = two.http.post("/chat/completions", &chat(API_MODEL)).await;
    assert_eq!((reply.status, reply.header("retry-after")), (StatusCode::TOO_MANY_REQUESTS, "2"));
    assert!(watch.elapsed() < Duration::from_secs(1), "{:?}", watch.elapsed());
}

#[tokio::test]
async fn a_retry_after_keeps_calls_away_until_then() {
    let two = two("", "").await;
    two.own.fail_next(1, &Fault::RateLimited { retry_after: Duration::from_mins(1) });
    for _ in 0..10 {
        let reply = two.http.post("/chat/completions", &chat(OWN_MODEL)).await;
        assert_eq!((reply.status, reply.header("x-breakeven-backend")), (StatusCode::OK, "openai"));
    }
    assert_eq!(two.own.calls().len(), 1);
}

#[tokio::test]
async fn a_server_that_stops_in_mid_stream_with_its_connection_open_ends_in_an_error_event() {
    let two = two("", "timeouts = { between_bytes = \"200ms\" }").await;
    two.own.fail_next(4, &Fault::StallAfter(5));
    let mut streams = JoinSet::new();
    for _ in 0..4 {
        let http = two.http.clone();
        streams.spawn(async move {
            Events::of(http.open("/chat/completions", &streamed(OWN_MODEL)).await).rest().await
        });
    }
    while let Some(stream) = streams.join_next().await {
        let (events, _) = stream.unwrap();
        assert!(data(&events).last().unwrap()["error"].is_object(), "{events:?}");
        assert!(!events.iter().any(|event| event.contains("[DONE]")), "{events:?}");
    }
    assert!(two.proxy.entries().await.iter().all(|entry| entry.outcome == Outcome::Timeout));
}

/// An API that answers everything, and says each time that its allowance is used up.
async fn exhausted_api() -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let body = json!({
        "id": "a", "object": "chat.completion", "created": 1, "model": API_MODEL,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}
    })
    .to_string();
    let answer = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\
         x-ratelimit-limit-requests: 100\r\nx-ratelimit-remaining-requests: 0\r\n\
         x-ratelimit-reset-requests: 10m0s\r\n\r\n{body}",
        body.len()
    );
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let answer = answer.clone();
            tokio::spawn(async move {
                let mut request = vec![0; 64 << 10];
                let read = stream.read(&mut request).await;
                if read.is_ok_and(|length| length > 0) {
                    drop(stream.write_all(answer.as_bytes()).await);
                }
            });
        }
    });
    address
}

#[tokio::test]
async fn an_api_that_says_its_allowance_is_used_up_is_left_alone_before_it_refuses() {
    let api = exhausted_api().await;
    let own = FakeBackend::start(Personality::Vllm, Settings::default()).await.unwrap();
    let config = format!(
        r#"
        [backends.openai]
        kind = "api"
        base_url = "http://{api}/v1"
        api_key = {{ env = "PATH" }}
        [backends.gpu]
        kind = "self_hosted"
        base_url = "{}"
        hourly_usd = 2.99
        capacity = {{ input_tokens_per_second = 15000, output_tokens_per_second = 10000, max_in_flight = 4 }}
        [routes.chat]
        models = ["{API_MODEL}"]
        policy = "api"
        offers = [{{ backend = "openai" }}, {{ backend = "gpu", model = "llama" }}]
        "#,
        own.url()
    );
    let proxy = Proxy::start(&config).await.ready().await;
    let http = Http::new(&proxy.url());
    let mut served_by = Vec::new();
    for _ in 0..5 {
        let reply = http.post("/chat/completions", &chat(API_MODEL)).await;
        assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
        served_by.push(reply.header("x-breakeven-backend").to_owned());
    }
    assert_eq!(served_by, ["openai", "gpu", "gpu", "gpu", "gpu"]);
}

/// Offers a server twice what it can take, though its owner allows it far more at once: only its own queue shows
/// that it is full.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_twice_the_offered_load_the_queue_of_the_server_makes_overflow_within_the_objective() {
    let seconds = u32::try_from(scale("BREAKEVEN_OVERLOAD_SECONDS", 4)).unwrap();
    let two = two("", "metrics = \"/metrics\"").await;
    two.own.set(|settings| {
        settings.time_to_first_token = Duration::from_millis(50);
        settings.time_per_output_token = Duration::from_millis(10);
        settings.output_tokens = 16;
    });
    // Four slots of 210 ms each make 19 calls a second.
    let (rate, objective) = (38, breakeven::gateway::FIRST_TOKEN_OBJECTIVE);
    let mut due = tokio::time::interval(Duration::from_secs(1) / rate);
    due.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Burst);
    let mut calls = JoinSet::new();
    for _ in 0..rate * seconds {
        due.tick().await;
        let http = two.http.clone();
        calls.spawn(async move {
            let watch = Stopwatch::start();
            let answer = http.open("/chat/completions", &streamed(OWN_MODEL)).await;
            assert_eq!(answer.status(), StatusCode::OK);
            let is_own = answer.headers()["x-breakeven-backend"] == "gpu";
            let mut events = Events::of(answer);
            events.next().await.unwrap();
            let first = watch.elapsed();
            assert_eq!(events.rest().await.0.last().unwrap(), "data: [DONE]");
            is_own.then_some(first)
        });
    }
    let mut first_tokens = Vec::new();
    while let Some(call) = calls.join_next().await {
        first_tokens.extend(call.unwrap());
    }
    first_tokens.sort_unstable();
    let p99 = first_tokens[first_tokens.len() * 99 / 100];
    eprintln!("{} of {} calls self-hosted, first token p99 {p99:?}", first_tokens.len(), rate * seconds);
    assert!(first_tokens.len() >= (rate * seconds / 5) as usize, "{} were served there", first_tokens.len());
    assert!(p99 < objective, "{p99:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_twice_the_load_that_it_can_take_the_self_hosted_side_stays_as_fast_as_alone() {
    let two = two("", "").await;
    // Both take as long for a call, so that each serves half of them, however slow the machine is.
    for fake in [&two.own, &two.api] {
        fake.set(|settings| {
            settings.time_to_first_token = Duration::from_millis(20);
            settings.time_per_output_token = Duration::from_millis(5);
        });
    }
    // Eight clients keep twice four slots busy.
    let mut clients = JoinSet::new();
    for _ in 0..8 {
        let http = two.http.clone();
        clients.spawn(async move {
            let mut own = Vec::new();
            for _ in 0..25 {
                let watch = Stopwatch::start();
                let answer = http.open("/chat/completions", &streamed(OWN_MODEL)).await;
                assert_eq!(answer.status(), StatusCode::OK);
                let at_own = answer.headers()["x-breakeven-backend"] == "gpu";
                let mut events = Events::of(answer);
                events.next().await.unwrap();
                if at_own {
                    own.push(watch.elapsed());
                }
                assert_eq!(events.rest().await.0.last().unwrap(), "data: [DONE]");
            }
            own
        });
    }
    let mut first_tokens = Vec::new();
    while let Some(client) = clients.join_next().await {
        first_tokens.extend(client.unwrap());
    }
    first_tokens.sort_unstable();
    let p99 = first_tokens[first_tokens.len() * 99 / 100];
    eprintln!("{} of 200 calls self-hosted, first token p99 {p99:?}", first_tokens.len());
    assert!(first_tokens.len() >= 50, "{} were served there", first_tokens.len());
    assert_eq!(two.own.most_in_flight(), 4, "all its places are used, and nobody waits in line");
    // The objective of a conversation; most of it is room for a busy machine.
    assert!(p99 < Duration::from_secs(1), "{p99:?}");
}
