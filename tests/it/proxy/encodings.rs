//! What is compressed: answers pass as they came and are metered, requests are read.

use std::io::Write;
use std::path::Path;

use breakeven::ledger::{Outcome, UsageSource};
use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use http::{Method, StatusCode};
use serde_json::json;

use super::canned::{Canned, answer};
use super::{API_MODEL, streamed, streamed_with_usage};
use crate::support::{End, Events, Reply, chat, data, read};

const CODINGS: [(&str, &str); 4] = [("gzip", "gz"), ("deflate", "deflate"), ("br", "br"), ("zstd", "zst")];

fn file(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/encodings").join(name)).unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn events(encoding: &str, body: &[u8]) -> Vec<u8> {
    answer(&format!("content-type: text/event-stream\r\ncontent-encoding: {encoding}"), body)
}

fn document(encoding: &str, body: &[u8]) -> Vec<u8> {
    answer(&format!("content-type: application/json\r\ncontent-encoding: {encoding}"), body)
}

#[tokio::test]
async fn a_compressed_answer_passes_as_it_came_and_is_metered() {
    let plain: serde_json::Value = serde_json::from_slice(&file("answer.json")).unwrap();
    for (encoding, suffix) in CODINGS {
        let body = file(&format!("answer.json.{suffix}"));
        let canned = Canned::new(document(encoding, &body)).await;
        let reply = canned.http.post("/chat/completions", &chat(API_MODEL)).await;
        assert_eq!((reply.header("content-encoding"), &reply.body[..]), (encoding, &body[..]));
        let entry = &canned.proxy.entries().await[0];
        assert_eq!(entry.usage_source, UsageSource::UpstreamUsage, "{encoding}");
        assert_eq!(plain["usage"]["prompt_tokens"], entry.usage.input_tokens, "{encoding}");
        assert_eq!(plain["usage"]["completion_tokens"], entry.usage.output_tokens, "{encoding}");
        assert!(!reply.header("x-breakeven-cost-usd").is_empty());
    }
}

#[tokio::test]
async fn a_compressed_stream_passes_as_it_came_and_is_metered() {
    for (encoding, suffix) in CODINGS {
        let body = file(&format!("stream.sse.{suffix}"));
        let canned = Canned::new(events(encoding, &body)).await;
        let reply = canned.http.post("/chat/completions", &streamed_with_usage(API_MODEL)).await;
        assert_eq!((reply.header("content-encoding"), &reply.body[..]), (encoding, &body[..]));
        let entry = &canned.proxy.entries().await[0];
        assert_eq!((entry.usage.input_tokens, entry.usage.output_tokens), (25, 8), "{encoding}");
        assert_eq!((entry.outcome, entry.usage_source), (Outcome::Success, UsageSource::UpstreamUsage));
    }
}

#[tokio::test]
async fn a_usage_chunk_that_only_we_asked_for_is_cut_out_of_a_compressed_stream_too() {
    for (encoding, suffix) in &CODINGS[..3] {
        let canned = Canned::new(events(encoding, &file(&format!("stream.sse.{suffix}")))).await;
        let response = canned.http.open("/chat/completions", &streamed(API_MODEL)).await;
        assert!(response.headers().get("content-encoding").is_none(), "{encoding}");
        let (events, end) = Events::of(response).rest().await;
        assert!(data(&events).iter().all(|chunk| chunk["choices"] != json!([])), "{encoding}: {events:?}");
        assert_eq!((events.last().unwrap().as_str(), end), ("data: [DONE]", End::Complete));
        assert_eq!(canned.proxy.entries().await[0].usage.output_tokens, 8, "{encoding}");
    }
    // Its decoder sees nothing before the end, and a stream must not wait for that.
    let body = file("stream.sse.zst");
    let canned = Canned::new(events("zstd", &body)).await;
    let reply = canned.http.post("/chat/completions", &streamed(API_MODEL)).await;
    assert_eq!((reply.header("content-encoding"), &reply.body[..]), ("zstd", &body[..]));
    assert_eq!(canned.proxy.entries().await[0].usage.output_tokens, 8);
}

#[tokio::test]
async fn what_passes_unread_is_metered_when_it_is_compressed() {
    let stream = "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"model\":\"claude\",\
                  \"usage\":{\"input_tokens\":9,\"output_tokens\":1}}}\n\nevent: message_delta\n\
                  data: {\"type\":\"message_delta\",\"usage\":{\"output_tokens\":15}}\n\n\
                  event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n";
    let body = gzip(stream.as_bytes());
    let canned = Canned::new(events("gzip", &body)).await;
    let reply = canned.http.post("/messages", &json!({"model": "claude", "stream": true})).await;
    assert_eq!(reply.body, body);
    let usage = canned.proxy.entries().await[0].usage;
    assert_eq!((usage.input_tokens, usage.output_tokens), (9, 15));
}

#[tokio::test]
async fn a_compressed_stream_that_is_cut_breaks_and_counts_as_failed() {
    let body = file("stream.sse.gz");
    let half = &body[..body.len() / 2];
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-encoding: gzip\r\n\
                transfer-encoding: chunked\r\n\r\n";
    let size = format!("{:x}\r\n", half.len());
    let canned = Canned::new([head.as_bytes(), size.as_bytes(), half, b"\r\n0\r\n\r\n"].concat()).await;
    let response = canned.http.open("/chat/completions", &streamed_with_usage(API_MODEL)).await;
    assert_eq!(Events::of(response).rest().await.1, End::Broken);
    let entry = &canned.proxy.entries().await[0];
    assert_eq!(entry.outcome, Outcome::UpstreamError);
    assert!(entry.usage.output_tokens > 0);

    let canned = Canned::new(events("gzip", half)).await;
    let response = canned.http.open("/chat/completions", &streamed(API_MODEL)).await;
    let (events, _) = Events::of(response).rest().await;
    assert!(data(&events).last().unwrap()["error"]["message"].is_string(), "{events:?}");
}

#[tokio::test]
async fn a_body_that_expands_without_end_passes_and_is_not_read() {
    for (encoding, name) in [("br", "bomb.br"), ("zstd", "bomb.zst")] {
        for answer in [document(encoding, &file(name)), events(encoding, &file(name))] {
            let canned = Canned::new(answer).await;
            let reply = canned.http.post("/chat/completions", &streamed_with_usage(API_MODEL)).await;
            assert_eq!(reply.body, file(name));
            assert_ne!(canned.proxy.entries().await[0].usage_source, UsageSource::UpstreamUsage);
        }
    }
}

async fn send(canned: &Canned, encoding: &str, body: Vec<u8>) -> Reply {
    let request = canned
        .http
        .request(Method::POST, "/chat/completions")
        .header("content-type", "application/json")
        .header("content-encoding", encoding);
    read(canned.http.start(request, Bytes::from(body)).await.unwrap()).await
}

#[tokio::test]
async fn a_compressed_request_is_read_and_sent_on_without_its_encoding() {
    let body = chat(API_MODEL).to_string();
    let plain = file("answer.json");
    let canned = Canned::new(answer("content-type: application/json", &plain)).await;
    for encoding in ["gzip", "x-gzip", "GZIP"] {
        assert_eq!(send(&canned, encoding, gzip(body.as_bytes())).await.status, StatusCode::OK, "{encoding}");
    }
    for request in canned.seen() {
        assert!(request.ends_with(&body) && !request.contains("content-encoding"), "{request}");
    }
    assert_eq!(canned.seen().len(), 3);
}

#[tokio::test]
async fn a_request_that_cannot_be_decoded_is_refused_with_the_reason() {
    let canned = Canned::with_config(answer("", b""), "[limits]\nmax_body_bytes = \"1MiB\"\n").await;
    let whole = gzip(chat(API_MODEL).to_string().as_bytes());
    for (encoding, body, status) in [
        ("compress", whole.clone(), 415),
        ("gzip, br", whole.clone(), 415),
        ("gzip", whole[..whole.len() - 1].to_vec(), 400),
        ("br", b"{\"not\": \"br\"}".to_vec(), 400),
        ("gzip", gzip(&vec![b' '; 2 << 20]), 413),
    ] {
        let reply = send(&canned, encoding, body).await;
        assert_eq!(reply.status.as_u16(), status, "{encoding}");
        assert!(reply.json()["error"]["message"].is_string(), "{encoding}");
    }
    assert!(canned.seen().is_empty());
}
