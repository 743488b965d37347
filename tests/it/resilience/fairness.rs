//! One caller's flood: the others still get in, and nobody is held to a number of their own.

use std::net::SocketAddr;
use std::time::Duration;

use breakeven::demo::{FakeBackend, Personality, Settings};
use http::{Method, StatusCode};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;

use crate::support::proxy::Proxy;
use crate::support::{Events, Http, Reply, chat, read, with};

const MODEL: &str = "gpt-4o-mini";

async fn proxy_before(api: &FakeBackend, limits: &str) -> Proxy {
    let config = format!(
        "[limits]\n{limits}\n[backends.openai]\nkind = \"api\"\nbase_url = \"{}\"\n\
         [routes.chat]\nmodels = [\"{MODEL}\"]\npolicy = \"api\"\noffers = [{{ backend = \"openai\" }}]\n",
        api.url()
    );
    Proxy::start(&config).await
}

/// Opens a stream with a key. Its first event, or the refusal.
async fn stream(http: &Http, key: &str) -> Result<Events, Reply> {
    let request =
        http.request(Method::POST, "/chat/completions").header("authorization", format!("Bearer {key}"));
    let body = with(chat(MODEL), json!({"stream": true})).to_string();
    let answer = http.start(request, body.into()).await.unwrap();
    if answer.status() == StatusCode::OK {
        let mut events = Events::of(answer);
        events.next().await.unwrap();
        Ok(events)
    } else {
        Err(read(answer).await)
    }
}

#[tokio::test]
async fn a_key_that_holds_its_share_is_told_so_and_another_gets_in() {
    let settings = Settings { time_per_output_token: Duration::from_mins(1), ..Settings::default() };
    let api = FakeBackend::start(Personality::OpenAi, settings).await.unwrap();
    let proxy = proxy_before(&api, "max_in_flight = 20\ncaller_share = 0.8").await;
    let http = Http::new(&proxy.url());
    let mut held = Vec::new();
    let refusal = loop {
        match stream(&http, "sk-flood").await {
            Ok(events) => held.push(events),
            Err(refusal) => break refusal,
        }
    };
    assert_eq!(held.len(), 16, "alone it may hold four fifths");
    assert_eq!(refusal.status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(
        (refusal.header("retry-after"), &refusal.json()["error"]["code"]),
        ("1", &json!("rate_limit_exceeded"))
    );
    for key in ["sk-second", "sk-third"] {
        held.push(stream(&http, key).await.expect("another caller gets in"));
    }
    assert!(stream(&http, "sk-flood").await.is_err());
    let metrics = Http::new(&proxy.admin_url()).get("/metrics").await;
    assert!(
        metrics.text().contains("breakeven_rejected_requests_total{team=\"other\",reason=\"share\"} 2"),
        "{}",
        metrics.text()
    );
    drop(held);
    assert!(api.until(|api| api.totals().aborted == 18).await);
    assert_eq!(proxy.entries().await.len(), 18, "places come back, and refusals have no row");
    assert!(stream(&http, "sk-flood").await.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn beside_a_flood_that_never_stops_another_caller_is_always_served() {
    let settings = Settings { time_per_output_token: Duration::from_millis(2), ..Settings::default() };
    let api = FakeBackend::start(Personality::OpenAi, settings).await.unwrap();
    let proxy = proxy_before(&api, "max_in_flight = 10").await;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let mut flood = JoinSet::new();
    for _ in 0..40 {
        let (http, stopped) = (Http::new(&proxy.url()), stopped.clone());
        flood.spawn(async move {
            let (mut served, mut refused) = (0_u32, 0_u32);
            while !*stopped.borrow() {
                match stream(&http, "sk-flood").await {
                    Ok(events) => {
                        events.rest().await;
                        served += 1;
                    }
                    Err(refusal) => {
                        // 503 while the last place is the other's.
                        let expected = [StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE];
                        assert!(expected.contains(&refusal.status), "{}", refusal.text());
                        refused += 1;
                        tokio::task::yield_now().await;
                    }
                }
            }
            (served, refused)
        });
    }
    let http = Http::new(&proxy.url());
    for call in 0..100 {
        let events = stream(&http, "sk-quiet").await;
        let events = events.unwrap_or_else(|refusal| panic!("call {call}: {}", refusal.text()));
        assert_eq!(events.rest().await.0.last().unwrap(), "data: [DONE]");
    }
    stop.send_replace(true);
    let (mut served, mut refused) = (0, 0);
    while let Some(counts) = flood.join_next().await {
        let counts = counts.unwrap();
        served += counts.0;
        refused += counts.1;
    }
    eprintln!("the quiet caller: 100 of 100 served; the flood: {served} served, {refused} refused");
    assert!(served > 0 && refused > 0, "{served} served, {refused} refused");
}

/// A connection from an address of the loopback that has had an answer; none when it was closed instead.
async fn speak(from: &str, to: SocketAddr) -> Option<TcpStream> {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(format!("{from}:0").parse().unwrap()).unwrap();
    let mut stream = socket.connect(to).await.ok()?;
    stream.write_all(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n").await.ok()?;
    let mut start = [0; 12];
    stream.read_exact(&mut start).await.ok()?;
    Some(stream)
}

#[tokio::test]
async fn an_address_that_opens_connection_after_connection_leaves_room_for_others() {
    let api = FakeBackend::start(Personality::OpenAi, Settings::default()).await.unwrap();
    let proxy = proxy_before(&api, "max_connections = 10\ncaller_share = 0.5").await;
    let mut held = Vec::new();
    while let Some(stream) = speak("127.0.0.1", proxy.address()).await {
        held.push(stream);
    }
    assert_eq!(held.len(), 5);
    assert!(speak("127.0.0.2", proxy.address()).await.is_some());
    drop(held);
    let comes_back = async { while speak("127.0.0.1", proxy.address()).await.is_none() {} };
    tokio::time::timeout(Duration::from_secs(10), comes_back).await.expect("its places come back");
}
