//! Usage of the endpoints that pass unread: Anthropic's, media, batches, realtime.

use breakeven::economics::{NanoUsd, Tier, Usage};
use breakeven::ledger::UsageSource;
use breakeven::prices;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::canned::{Canned, answer};
use super::{API_MODEL, between};
use crate::support::Http;

const ANTHROPIC: &str = r#"
[prices.models."claude-sonnet-4-5"]
input = 3.0
cached_input = 0.3
cache_write = 3.75
output = 15.0
"#;

/// 9 fresh tokens, 18 read from the cache, 3 written to it, and 15 of output.
const CLAUDE_NANOS: i64 = 9 * 3_000 + 18 * 300 + 3 * 3_750 + 15 * 15_000;

fn claude_usage() -> Usage {
    Usage { cache_write_tokens: 3, ..Usage::new(30, 15).with_cached(18) }
}

fn sse(events: &[Value]) -> Vec<u8> {
    let events = events.iter().map(|event| {
        format!("event: {}\ndata: {event}\n\n", event["type"].as_str().expect("an event has a type"))
    });
    answer("content-type: text/event-stream", events.collect::<String>().as_bytes())
}

#[tokio::test]
async fn anthropics_messages_are_metered_in_the_one_normal_form() {
    let body = json!({"type": "message", "id": "msg_1", "model": "claude-sonnet-4-5-20250929",
        "content": [{"type": "text", "text": "x"}], "usage": {"input_tokens": 9, "cache_read_input_tokens": 18,
        "cache_creation_input_tokens": 3, "output_tokens": 15}});
    let start = json!({"type": "message_start", "message": {"id": "msg_1", "model": "claude-sonnet-4-5-20250929",
        "usage": {"input_tokens": 9, "cache_read_input_tokens": 18, "cache_creation_input_tokens": 3,
        "output_tokens": 1}}});
    let delta = json!({"type": "message_delta", "delta": {"stop_reason": "end_turn"},
        "usage": {"output_tokens": 15}});
    let stream = sse(&[start, json!({"type": "ping"}), delta, json!({"type": "message_stop"})]);
    for (answer, streams) in
        [(answer("content-type: application/json", body.to_string().as_bytes()), false), (stream, true)]
    {
        let canned = Canned::with_config(answer.clone(), ANTHROPIC).await;
        let request = json!({"model": "claude-sonnet-4-5", "max_tokens": 99, "stream": streams,
            "messages": [{"role": "user", "content": "x"}]});
        let reply = canned.http.post("/messages", &request).await;
        assert!(answer.ends_with(&reply.body), "it passes as it came");
        let entry = canned.proxy.entries().await.remove(0);
        assert_eq!((&*entry.endpoint, entry.usage), ("messages", claude_usage()));
        assert_eq!((entry.cost, entry.unpriced), (NanoUsd::from_nanos(CLAUDE_NANOS), false));

        let canned = Canned::new(answer).await;
        canned.http.post("/messages", &request).await;
        let entry = canned.proxy.entries().await.remove(0);
        assert_eq!((entry.usage, entry.cost, entry.unpriced), (claude_usage(), NanoUsd::ZERO, true));
        let metrics = Http::new(&canned.proxy.admin_url()).get("/metrics").await;
        let unpriced = "breakeven_unpriced_requests_total{backend=\"api\",model=\"other\"} 1";
        assert!(metrics.text().contains(unpriced), "{}", metrics.text());
    }
}

#[tokio::test]
async fn a_path_that_is_not_read_goes_to_the_api_that_the_client_names() {
    let between = between().await;
    let anthropic = Canned::new(answer("content-type: application/json", b"{}")).await;
    drop(anthropic);
    let request = between
        .http
        .request(http::Method::POST, "/moderations")
        .header("content-type", "application/json")
        .header("x-breakeven-backend", "openai");
    let reply = between.http.send(request, json!({"input": "x"}).to_string().into()).await;
    assert_eq!((reply.status.as_u16(), reply.header("x-breakeven-reason")), (200, "pinned"));
    let request =
        between.http.request(http::Method::POST, "/moderations").header("x-breakeven-backend", "nobody");
    let reply = between.http.send(request, "{}".into()).await;
    assert_eq!((reply.status.as_u16(), between.api.calls().len()), (400, 1));
}

#[tokio::test]
async fn a_stored_prompt_is_priced_by_the_model_that_answers() {
    let body = json!({"id": "resp_1", "object": "response", "model": "gpt-4o-mini-2024-07-18", "output": [],
        "usage": {"input_tokens": 1000, "output_tokens": 500, "total_tokens": 1500}});
    let canned = Canned::new(answer("content-type: application/json", body.to_string().as_bytes())).await;
    let request = json!({"prompt": {"id": "pmpt_1"}});
    assert_eq!(canned.http.post("/responses", &request).await.json(), body);
    assert!(canned.seen()[0].ends_with(&request.to_string()), "nothing is added");
    let entry = canned.proxy.entries().await.remove(0);
    assert_eq!((entry.cost, entry.unpriced), (NanoUsd::from_nanos(1000 * 150 + 500 * 600), false));
    assert_eq!(canned.http.post("/chat/completions", &json!({"messages": []})).await.status.as_u16(), 400);
}

#[tokio::test]
async fn media_streams_are_billed_by_their_last_event() {
    let usage = json!({"total_tokens": 322, "input_tokens": 50, "output_tokens": 272,
        "input_tokens_details": {"text_tokens": 10, "image_tokens": 40}});
    let images = [
        json!({"type": "image_generation.partial_image", "partial_image_index": 0, "b64_json": "AAAA"}),
        json!({"type": "image_generation.completed", "b64_json": "AAAA", "usage": usage}),
    ];
    let edits = [
        json!({"type": "image_edit.partial_image", "b64_json": "AAAA"}),
        json!({"type": "image_edit.completed", "b64_json": "AAAA", "usage": usage}),
    ];
    let speech = [
        json!({"type": "speech.audio.delta", "audio": "AAAA"}),
        json!({"type": "speech.audio.done", "usage": {"input_tokens": 14, "output_tokens": 101, "total_tokens": 115}}),
    ];
    let words = [
        json!({"type": "transcript.text.delta", "delta": "x"}),
        json!({"type": "transcript.text.done", "text": "x", "usage": {"type": "tokens", "input_tokens": 14,
            "input_token_details": {"text_tokens": 0, "audio_tokens": 14}, "output_tokens": 45, "total_tokens": 59}}),
    ];
    let image = Usage { image_input_tokens: 40, image_output_tokens: 272, ..Usage::new(50, 272) };
    let cases: [(&str, &str, &[Value], Usage, i64); 4] = [
        // USD per million: 5 text, 10 image in, 40 image out; 0.60 text, 12 audio; 3 (audio in) and 5 out.
        ("/images/generations", "gpt-image-1", &images, image, 10 * 5_000 + 40 * 10_000 + 272 * 40_000),
        ("/images/edits", "gpt-image-1", &edits, image, 10 * 5_000 + 40 * 10_000 + 272 * 40_000),
        (
            "/audio/speech",
            "gpt-4o-mini-tts",
            &speech,
            Usage { audio_output_tokens: 101, ..Usage::new(14, 101) },
            14 * 600 + 101 * 12_000,
        ),
        (
            "/audio/transcriptions",
            "gpt-4o-mini-transcribe",
            &words,
            Usage { audio_input_tokens: 14, ..Usage::new(14, 45) },
            14 * 3_000 + 45 * 5_000,
        ),
    ];
    let prices = r#"
        [prices.models."gpt-image-1"]
        input = 5.0
        image_input = 10.0
        output = 40.0
        image_output = 40.0
        [prices.models."gpt-4o-mini-tts"]
        input = 0.6
        output = 12.0
        audio_output = 12.0
        [prices.models."gpt-4o-mini-transcribe"]
        input = 1.25
        audio_input = 3.0
        output = 5.0
    "#;
    for (path, model, events, usage, nanos) in cases {
        let canned = Canned::with_config(sse(events), prices).await;
        canned.http.post(path, &json!({"model": model, "stream": true})).await;
        let entry = canned.proxy.entries().await.remove(0);
        assert_eq!((entry.usage, entry.cost), (usage, NanoUsd::from_nanos(nanos)), "{path}");
    }
}

#[tokio::test]
async fn what_is_sold_by_the_minute_or_the_piece_is_counted_as_unpriced_and_not_as_free() {
    for (path, head, body) in [
        (
            "/audio/transcriptions",
            "application/json",
            r#"{"text":"x","usage":{"type":"duration","seconds":3}}"#,
        ),
        ("/audio/speech", "audio/mpeg", "ID3"),
        ("/images/generations", "application/json", r#"{"created":1,"data":[{"url":"https://x"}]}"#),
    ] {
        let canned = Canned::new(answer(&format!("content-type: {head}"), body.as_bytes())).await;
        canned.http.post(path, &json!({"model": "whisper-1"})).await;
        let entry = canned.proxy.entries().await.remove(0);
        assert_eq!((entry.unpriced, entry.usage_source), (true, UsageSource::None), "{path}");
    }
    let canned = Canned::new(answer("content-type: application/json", br#"{"id":"m","results":[]}"#)).await;
    canned.http.post("/moderations", &json!({"input": "x"})).await;
    let entry = canned.proxy.entries().await.remove(0);
    assert_eq!((entry.unpriced, entry.cost), (false, NanoUsd::ZERO), "moderations are free");
}

#[tokio::test]
async fn the_output_of_a_batch_is_billed_once_however_often_it_is_read() {
    let line = |id: u32, input: u64| {
        json!({"id": format!("batch_req_{id}"), "response": {"status_code": 200, "body": {"id": format!("c{id}"),
            "model": "gpt-4o-mini", "usage": {"prompt_tokens": input, "completion_tokens": 100}}}})
    };
    let file = format!("{}\n{}\n", line(1, 1000), line(2, 2000));
    let canned = Canned::new(answer("content-type: application/octet-stream", file.as_bytes())).await;
    for _ in 0..3 {
        assert_eq!(canned.http.get("/files/file-1/content").await.text(), file);
    }
    let entries = canned.proxy.entries().await;
    assert_eq!(entries.len(), 1);
    assert_eq!((entries[0].usage, &*entries[0].tier), (Usage::new(3000, 200), Tier::Batch.as_str()));
    // Half of 0.15 and 0.60 USD per million.
    assert_eq!(entries[0].cost, NanoUsd::from_nanos(3000 * 75 + 200 * 300));
    canned.http.get("/files/file-2/content").await;
    assert_eq!(canned.proxy.entries().await.len(), 2, "another file is another batch");

    let canned = canned.restart().await;
    assert_eq!(canned.http.get("/files/file-1/content").await.text(), file);
    assert_eq!(canned.proxy.entries().await.len(), 2, "an earlier process has billed it");
    let counted = canned.proxy.dollars("breakeven_request_cost_usd_total", "").await;
    assert_eq!(counted, NanoUsd::ZERO, "nor is it counted");
    canned.http.get("/files/file-3/content").await;
    assert_eq!(canned.proxy.entries().await.len(), 3);
}

#[tokio::test]
async fn a_response_in_the_background_is_billed_once_when_its_usage_is_first_seen() {
    let between = between().await;
    let body = json!({"model": API_MODEL, "input": "Hello there", "background": true});
    let begun = between.http.post("/responses", &body).await;
    assert_eq!((&begun.json()["status"], begun.header("x-breakeven-cost-usd")), (&json!("queued"), ""));
    let path = format!("/responses/{}", begun.json()["id"].as_str().unwrap());
    let statuses: Vec<Value> = [
        between.http.get(&path).await.json()["status"].clone(),
        between.http.get(&path).await.json()["status"].clone(),
        between.http.get(&path).await.json()["status"].clone(),
    ]
    .into();
    assert_eq!(statuses, ["in_progress", "completed", "completed"]);

    let entries = between.proxy.entries().await;
    let truth = between.api.produced()[0].usage;
    let endpoints: Vec<&str> = entries.iter().map(|entry| &*entry.endpoint).collect();
    assert_eq!(endpoints, ["response", "responses"], "the reading, and the call that began it");
    assert_eq!((entries[1].usage, entries[1].usage_source), (Usage::default(), UsageSource::None));
    assert_eq!((entries[1].cost, entries[1].unpriced), (NanoUsd::ZERO, false));
    assert_eq!((entries[0].usage, entries[0].usage_source), (truth, UsageSource::UpstreamUsage));
    let cost = prices::built_in().card(API_MODEL).unwrap().cost(&truth, Tier::Standard);
    assert_eq!(entries[0].cost, cost);
    assert_eq!(between.proxy.dollars("breakeven_request_cost_usd_total", "").await, cost);
}

#[tokio::test]
async fn a_stream_of_a_response_in_the_background_is_billed_with_it_and_not_when_it_is_read_again() {
    let between = between().await;
    let body = json!({"model": API_MODEL, "input": "Hello there", "background": true, "stream": true});
    let begun = between.http.post("/responses", &body).await;
    let (_, rest) = begun.text().split_once("\"id\":\"resp_").unwrap();
    let path = format!("/responses/resp_{}", rest.split_once('"').unwrap().0);
    for _ in 0..3 {
        assert_eq!(between.http.get(&path).await.status, 200);
    }
    let entries = between.proxy.entries().await;
    let truth = between.api.produced()[0].usage;
    assert_eq!(entries.len(), 2, "{entries:?}");
    let used: Vec<Usage> =
        entries.iter().map(|entry| entry.usage).filter(|usage| usage.total_tokens() > 0).collect();
    assert_eq!(used, [truth]);
    assert!(entries.iter().all(|entry| (&*entry.route, &*entry.requested_model) == ("api", API_MODEL)));
}

#[tokio::test]
async fn a_stored_response_that_nobody_waited_for_in_vain_is_not_billed_again() {
    let body = json!({"id": "resp_1", "object": "response", "status": "completed", "background": false,
        "model": "gpt-4o-mini-2024-07-18", "usage": {"input_tokens": 9, "output_tokens": 4}});
    let canned = Canned::new(answer("content-type: application/json", body.to_string().as_bytes())).await;
    assert_eq!(canned.http.get("/responses/resp_1").await.json(), body);
    assert!(canned.proxy.entries().await.is_empty());
}

/// A text frame of a server.
fn frame(message: &Value) -> Vec<u8> {
    let text = message.to_string();
    let mut frame = vec![0x81, 126];
    frame.extend(u16::try_from(text.len()).unwrap().to_be_bytes());
    frame.extend(text.as_bytes());
    frame
}

#[tokio::test]
async fn a_realtime_session_is_billed_answer_by_answer() {
    let done = |id: &str, output: u64| {
        json!({"type": "response.done", "response": {"id": id, "usage": {"total_tokens": 132 + output,
            "input_tokens": 132, "output_tokens": output,
            "input_token_details": {"text_tokens": 32, "audio_tokens": 100, "cached_tokens": 64,
                "cached_tokens_details": {"text_tokens": 0, "audio_tokens": 64}},
            "output_token_details": {"text_tokens": output - 91, "audio_tokens": 91}}}})
    };
    let mut upstream = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\
        sec-websocket-accept: x\r\n\r\n"
        .to_vec();
    let padding = "x".repeat(200);
    for message in
        [json!({"type": "session.created", "padding": padding}), done("resp_1", 121), done("resp_2", 191)]
    {
        upstream.extend(frame(&message));
    }
    let canned = Canned::new(upstream.clone()).await;
    let mut client = TcpStream::connect(canned.address()).await.unwrap();
    let hello = "GET /v1/realtime?model=gpt-realtime HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\n\
                 connection: upgrade\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZQ==\r\n\
                 sec-websocket-extensions: permessage-deflate\r\n\r\n";
    client.write_all(hello.as_bytes()).await.unwrap();
    let mut received = Vec::new();
    client.read_to_end(&mut received).await.unwrap();
    let frames = &upstream[memchr::memmem::find(&upstream, b"\r\n\r\n").unwrap() + 4..];
    assert!(received.starts_with(b"HTTP/1.1 101 ") && received.ends_with(frames));
    assert!(!canned.seen()[0].contains("permessage-deflate"), "what is compressed cannot be metered");

    let mut entries = canned.proxy.entries().await;
    entries.sort_by_key(|entry| entry.usage.output_tokens);
    assert_eq!(entries.len(), 2);
    for (entry, output) in entries.iter().zip([121, 191]) {
        let usage = Usage {
            audio_input_tokens: 36,
            audio_output_tokens: 91,
            ..Usage::new(132, output).with_cached(64)
        };
        assert_eq!((entry.usage, &*entry.requested_model), (usage, "gpt-realtime"));
        assert!(entry.cost > NanoUsd::ZERO || entry.unpriced);
    }
}
