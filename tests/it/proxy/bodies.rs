//! Bodies pass as they are, and what must change is all that changes.

use breakeven::demo::{Fault, Verbatim};
use bytes::Bytes;
use http::{Method, StatusCode};
use serde_json::{Value, json};

use super::{API_MODEL, Between, OWN_MODEL, OWN_NAME, between, streamed, streamed_with_usage};
use crate::support::{End, Events, chat, data, read};

/// JSON that no serialiser would write like this.
const ODD: &str = "{ \"messages\":[{\"role\":\"user\",\"content\":\"caf\\u00e9 \\/ 1\"}],\r\n\t\"model\" : \"MODEL\" ,\
                   \"temperature\":1.50e0,\"metadata\":{\"b\":1,\"a\":-0.0,\"a\":2},\"new_member\":[ ]}";

async fn send_text(between: &Between, path: &str, body: &str) -> crate::support::Reply {
    let request = between.http.request(Method::POST, path).header("content-type", "application/json");
    between.http.send(request, Bytes::from(body.to_owned())).await
}

#[tokio::test]
async fn a_request_that_needs_no_change_arrives_byte_for_byte() {
    let between = between().await;
    let body = ODD.replace("MODEL", API_MODEL);
    assert_eq!(send_text(&between, "/chat/completions", &body).await.status, StatusCode::OK);
    assert_eq!(between.api.calls()[0].body, body);
}

#[tokio::test]
async fn only_the_models_name_changes_for_a_backend_that_calls_it_otherwise() {
    let between = between().await;
    let body = ODD.replace("MODEL", OWN_MODEL);
    assert_eq!(send_text(&between, "/chat/completions", &body).await.status, StatusCode::OK);
    assert_eq!(between.own.calls()[0].body, ODD.replace("MODEL", OWN_NAME));
}

#[tokio::test]
async fn an_answer_arrives_byte_for_byte_with_its_headers() {
    let between = between().await;
    let odd = Bytes::from_static(
        b"{ \"choices\" : [ ],\n\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":4e0 },\"x\":1.0, \"x\":\"\\u00e9\"}\n",
    );
    between.api.set(|settings| {
        settings.verbatim = Some(Verbatim { content_type: "application/json; odd=yes", body: odd.clone() });
    });
    let reply = between.http.post("/chat/completions", &chat(API_MODEL)).await;
    assert_eq!((reply.body.clone(), reply.header("content-type")), (odd, "application/json; odd=yes"));
    for name in ["x-request-id", "openai-version", "x-ratelimit-limit-requests", "openai-processing-ms"] {
        assert!(!reply.header(name).is_empty(), "{name}");
    }
}

#[tokio::test]
async fn a_stream_that_asked_for_usage_arrives_byte_for_byte() {
    let between = between().await;
    let odd = ": hello\n\nretry: 5\ndata:{\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\"}}]}\n\n\
               event: x\nid: 7\ndata: {\"choices\" : [ ],\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":1}}\n\n\
               data: [DONE]\n\n";
    for faults in [vec![], vec![Fault::SingleBytes]] {
        between.api.set(|settings| {
            let body = Bytes::from_static(odd.as_bytes());
            settings.verbatim = Some(Verbatim { content_type: "text/event-stream", body });
            settings.faults = faults;
        });
        let reply = read(between.http.open("/chat/completions", &streamed_with_usage(API_MODEL)).await).await;
        assert_eq!(reply.text(), odd);
        assert_eq!(reply.header("content-type"), "text/event-stream");
    }
}

#[tokio::test]
async fn a_client_that_did_not_ask_for_usage_never_sees_it_though_it_was_asked_for_upstream() {
    let between = between().await;
    for (model, fake) in [(API_MODEL, &between.api), (OWN_MODEL, &between.own)] {
        let (events, end) =
            Events::of(between.http.open("/chat/completions", &streamed(model)).await).rest().await;
        assert_eq!(fake.calls()[0].json()["stream_options"], json!({"include_usage": true}));
        assert!(
            data(&events).iter().all(|chunk| chunk["usage"].is_null() && chunk["choices"] != json!([])),
            "{events:?}"
        );
        assert_eq!((events.last().unwrap().as_str(), end), ("data: [DONE]", End::Complete));
    }
}

#[tokio::test]
async fn other_stream_options_are_kept_when_usage_is_added() {
    let between = between().await;
    let body = format!(
        "{{\"model\":\"{API_MODEL}\",\"stream\":true,\"stream_options\":{{ \"include_obfuscation\" : false }},\
         \"messages\":[{{\"role\":\"user\",\"content\":\"x\"}}]}}"
    );
    send_text(&between, "/chat/completions", &body).await;
    let options = between.api.calls()[0].json()["stream_options"].clone();
    assert_eq!(options, json!({"include_obfuscation": false, "include_usage": true}));
}

#[tokio::test]
async fn streams_in_odd_framing_say_the_same() {
    let between = between().await;
    let plain = between.http.open("/chat/completions", &streamed(API_MODEL)).await;
    let expected = crate::support::spoken(&Events::of(plain).rest().await.0);
    for fault in [Fault::SingleBytes, Fault::Comments, Fault::CarriageReturns] {
        between.api.fail_next(1, &fault);
        let reply = read(between.http.open("/chat/completions", &streamed(API_MODEL)).await).await;
        let text = reply.text().replace("\r\n", "\n");
        let events: Vec<String> = text.split("\n\n").map(str::to_owned).collect();
        assert_eq!(crate::support::spoken(&events), expected, "{fault:?}");
        assert!(data(&events).iter().all(|chunk| chunk["usage"].is_null()), "{fault:?}");
        let entry = &between.proxy.entries().await[0];
        assert_eq!(entry.usage.output_tokens, 12, "{fault:?}");
    }
}

#[tokio::test]
async fn compressed_answers_pass_compressed_and_are_metered() {
    let between = between().await;
    between.api.fail_next(1, &Fault::Gzip);
    let reply = between.http.post("/chat/completions", &chat(API_MODEL)).await;
    assert_eq!(reply.header("content-encoding"), "gzip");
    let mut text = String::new();
    std::io::Read::read_to_string(&mut flate2::read::GzDecoder::new(&reply.body[..]), &mut text).unwrap();
    assert!(text.contains("\"chat.completion"), "{text}");
    assert_eq!(between.proxy.entries().await[0].usage, between.api.produced()[0].usage);
}

#[tokio::test]
async fn a_stream_is_asked_for_as_it_is_whatever_encodings_the_client_takes() {
    let between = between().await;
    let request = between
        .http
        .request(Method::POST, "/chat/completions")
        .header("content-type", "application/json")
        .header("accept-encoding", "gzip, br");
    let reply = between.http.send(request, Bytes::from(streamed(API_MODEL).to_string())).await;
    assert!(reply.text().contains("[DONE]"));
    assert_eq!(between.api.calls()[0].header("accept-encoding"), "");
}

#[tokio::test]
async fn uploads_pass_with_their_own_boundary_and_query_strings_intact() {
    let between = between().await;
    let form = "--odd boundary\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\ngpt-4o-mini-transcribe\r\n\
                --odd boundary\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\n\0\u{1}\r\n\r\n\
                --odd boundary--\r\n";
    let request = between
        .http
        .request(Method::POST, "/audio/transcriptions?x=%20a&x=b+c")
        .header("content-type", "multipart/form-data; boundary=\"odd boundary\"");
    let reply = between.http.send(request, Bytes::from(form)).await;
    assert_eq!(reply.status, StatusCode::OK);
    let seen = &between.api.calls()[0];
    assert_eq!((seen.body.clone(), seen.uri.query()), (Bytes::from(form), Some("x=%20a&x=b+c")));
    assert_eq!(seen.header("content-type"), "multipart/form-data; boundary=\"odd boundary\"");
}

#[tokio::test]
async fn binary_answers_pass_untouched() {
    let between = between().await;
    let body = json!({"model": "gpt-4o-mini-tts", "voice": "alloy", "input": "one two three"});
    let through = between.http.post("/audio/speech", &body).await;
    let direct = crate::support::Http::new(&between.api.url()).post("/audio/speech", &body).await;
    assert_eq!((through.body, through.status), (direct.body, StatusCode::OK));
}

#[tokio::test]
async fn members_that_nobody_knows_pass_both_ways() {
    let between = between().await;
    between.own.set(|settings| settings.reasoning_tokens = 2);
    let (events, _) =
        Events::of(between.http.open("/chat/completions", &streamed(OWN_MODEL)).await).rest().await;
    let thought: Vec<Value> = data(&events)
        .iter()
        .filter_map(|chunk| chunk.pointer("/choices/0/delta/reasoning").cloned())
        .collect();
    assert_eq!(thought.len(), 2, "{events:?}");
}
