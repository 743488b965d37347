//! What clients may do: versions, limits, headers.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, StatusCode};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::canned::raw;
use super::{API_MODEL, between, between_with, streamed};
use crate::support::{Events, Http, chat, spoken, with};

#[tokio::test]
async fn clients_may_speak_http2_without_tls() {
    let between = between().await;
    let http = Http::h2c(&between.proxy.url());
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let http = http.clone();
        calls.spawn(async move {
            let stream = http.open("/chat/completions", &streamed(API_MODEL)).await;
            assert_eq!(stream.version(), http::Version::HTTP_2);
            spoken(&Events::of(stream).rest().await.0)
        });
    }
    while let Some(text) = calls.join_next().await {
        assert_eq!(text.unwrap().split_whitespace().count(), 12);
    }
}

#[tokio::test]
async fn the_first_event_passes_before_the_second_is_made() {
    let between = between().await;
    between.api.set(|settings| settings.time_per_output_token = Duration::from_mins(1));
    let mut events = Events::of(between.http.open("/chat/completions", &streamed(API_MODEL)).await);
    let opening = events.next().await.unwrap();
    let first = events.next().await.unwrap();
    assert!(opening.contains("\"role\"") && first.contains("\"content\""), "{opening} {first}");
}

#[tokio::test]
async fn bodies_beyond_the_limit_are_refused_with_413_whether_or_not_their_length_is_told() {
    let between = between_with("[limits]\nmax_body_bytes = \"1KiB\"\n").await;
    let large = with(chat(API_MODEL), json!({"user": "x".repeat(2_000)}));
    let reply = between.http.post("/chat/completions", &large).await;
    assert_eq!(reply.status, StatusCode::PAYLOAD_TOO_LARGE);
    assert!(reply.json()["error"]["message"].is_string());

    let body = large.to_string();
    let chunk = format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len());
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
                transfer-encoding: chunked\r\nconnection: close\r\n\r\n";
    let answer = raw(between.proxy.address(), &format!("{head}{chunk}")).await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    assert!(between.api.calls().is_empty());
}

#[tokio::test]
async fn a_body_that_is_no_json_is_answered_in_openais_envelope() {
    let between = between().await;
    let request =
        between.http.request(Method::POST, "/chat/completions").header("content-type", "application/json");
    let reply = between.http.send(request, Bytes::from_static(b"{\"model\":")).await;
    assert_eq!(
        (reply.status.as_u16(), &reply.json()["error"]["type"]),
        (400, &json!("invalid_request_error"))
    );
}

#[tokio::test]
async fn headers_between_two_hops_stay_there_and_the_rest_passes() {
    let between = between().await;
    let body = chat(API_MODEL).to_string();
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: proxy.example\r\ncontent-type: application/json\r\n\
         connection: close, x-between\r\nx-between: hops\r\nkeep-alive: timeout=5\r\nte: trailers\r\n\
         proxy-authorization: Basic eA==\r\nupgrade: h2c\r\nx-app: one\r\nx-app: two\r\n\
         traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    let answer = raw(between.proxy.address(), &request).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let seen = &between.api.calls()[0];
    for name in ["x-between", "keep-alive", "te", "proxy-authorization", "upgrade"] {
        assert_eq!(seen.header(name), "", "{name}");
    }
    assert_eq!(seen.headers.get_all("x-app").iter().count(), 2);
    assert_eq!(seen.header("traceparent"), "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
    assert_ne!(seen.header("host"), "proxy.example");
}

#[tokio::test]
async fn a_client_that_asks_before_it_sends_is_told_to_continue() {
    let between = between().await;
    let body = chat(API_MODEL).to_string();
    let mut stream = TcpStream::connect(between.proxy.address()).await.unwrap();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n\
         expect: 100-continue\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut told = [0; 25];
    stream.read_exact(&mut told).await.unwrap();
    assert_eq!(&told, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(body.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[tokio::test]
async fn connections_to_a_server_that_closes_them_are_renewed() {
    let between = between().await;
    between.api.set(|settings| settings.requests_per_connection = Some(1));
    for _ in 0..5 {
        assert_eq!(between.http.post("/chat/completions", &chat(API_MODEL)).await.status, StatusCode::OK);
    }
    assert_eq!(between.api.calls().len(), 5);
}

#[tokio::test]
async fn the_admin_side_has_its_own_port_and_nothing_of_it_is_on_the_applications() {
    let between = between().await;
    let admin = Http::new(&between.proxy.admin_url());
    assert_eq!(admin.get("/readyz").await.status, StatusCode::OK);
    assert!(admin.get("/metrics").await.text().contains("breakeven_requests_total"));
    let applications = Http::new(&format!("http://{}", between.proxy.address()));
    for path in ["/metrics", "/api/status", "/readyz"] {
        assert_ne!(applications.get(path).await.status, StatusCode::OK, "{path}");
    }
}

#[tokio::test]
async fn a_connection_that_says_nothing_does_not_hold_up_the_drain() {
    let between = between().await;
    let silent = TcpStream::connect(between.proxy.address()).await.unwrap();
    assert_eq!(between.http.post("/chat/completions", &chat(API_MODEL)).await.status, StatusCode::OK);
    let drained = between.proxy.running.shut_down(std::future::pending());
    tokio::time::timeout(Duration::from_secs(10), drained).await.expect("nobody is served any more");
    drop(silent);
}
