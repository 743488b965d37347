//! What a server cannot take, or cannot do.

use breakeven::demo::Fault;
use breakeven::ledger::{Outcome, UsageSource};
use http::StatusCode;
use serde_json::{Value, json};

use super::{API_MODEL, Between, OWN_MODEL, between, between_backends, streamed};
use crate::support::{Events, chat, spoken, with};

#[tokio::test]
async fn a_server_that_refuses_stream_options_is_asked_again_without_and_not_asked_for_them_any_more() {
    let between = between().await;
    between.own.set(|settings| settings.faults = vec![Fault::RejectStreamOptions]);
    for calls in [2, 3, 4] {
        let stream = between.http.open("/chat/completions", &streamed(OWN_MODEL)).await;
        assert_eq!(stream.status(), StatusCode::OK);
        assert_eq!(stream.headers()["x-breakeven-backend"], "gpu");
        assert_eq!(stream.headers()["x-breakeven-reason"], "pinned");
        let (events, _) = Events::of(stream).rest().await;
        assert_eq!(spoken(&events).split_whitespace().count(), 12);
        assert_eq!(between.own.calls().len(), calls);
    }
    let asked: Vec<bool> =
        between.own.calls().iter().map(|call| call.json()["stream_options"].is_object()).collect();
    assert_eq!(asked, [true, false, false, false]);
    assert!(between.api.calls().is_empty(), "nothing was bought");

    let entries = between.proxy.entries().await;
    let attempts: Vec<u32> = entries.iter().rev().map(|entry| entry.attempts).collect();
    assert_eq!(attempts, [2, 1, 1]);
    assert!(entries.iter().all(|entry| entry.outcome == Outcome::Success && entry.usage.output_tokens > 0));
    assert!(entries.iter().all(|entry| entry.usage_source == UsageSource::Estimate), "no usage is reported");
}

#[tokio::test]
async fn parameters_are_dropped_and_renamed_as_the_configuration_says() {
    let rules = r#"parameters = { user = "drop", max_completion_tokens = { rename = "max_tokens" } }"#;
    let between = between_backends("", "", rules).await;
    let body = with(chat(OWN_MODEL), json!({"user": "me", "max_completion_tokens": 5, "top_k": 3}));
    assert_eq!(between.http.post("/chat/completions", &body).await.status, StatusCode::OK);
    let sent = between.own.calls()[0].json();
    assert_eq!((&sent["user"], &sent["max_tokens"], &sent["top_k"]), (&Value::Null, &json!(5), &json!(3)));
    assert_eq!(sent.get("max_completion_tokens"), None);
}

/// Who serves a call to the route of both, and why.
async fn served(between: &Between, more: Value) -> (String, String) {
    let reply = between.http.post("/chat/completions", &with(chat(OWN_MODEL), more)).await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
    (reply.header("x-breakeven-backend").to_owned(), reply.header("x-breakeven-reason").to_owned())
}

#[tokio::test]
async fn a_call_goes_where_it_can_be_served() {
    let ollama = "server = \"ollama\"\nhealth = { path = \"/health\" }";
    let between = between_backends("", "", ollama).await;
    let tool = json!({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}});
    let image = json!([{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]);
    let schema = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}});
    assert_eq!(served(&between, json!({})).await.0, "gpu");
    assert_eq!(served(&between, json!({"response_format": schema})).await.0, "gpu");
    for needs in [
        json!({"tools": [tool]}),
        json!({"messages": image}),
        json!({"n": 2}),
        json!({"logprobs": true}),
        json!({"web_search_options": {}}),
    ] {
        let (backend, reason) = served(&between, needs.clone()).await;
        assert_eq!((backend.as_str(), reason.as_str()), ("openai", "not_eligible"), "{needs}");
    }
    // What only the dialect refuses is known when the request is written.
    assert_eq!(served(&between, json!({"logit_bias": {"1": 1}})).await.0, "openai");
}

#[tokio::test]
async fn a_parameter_that_nobody_takes_is_refused_by_name() {
    let between = between_backends("", r#"parameters = { logit_bias = "refuse" }"#, "").await;
    let body = with(chat(API_MODEL), json!({"logit_bias": {"1": 1}}));
    let reply = between.http.post("/chat/completions", &body).await;
    assert_eq!(reply.status, StatusCode::BAD_REQUEST);
    assert_eq!(reply.json()["error"]["param"], "logit_bias");
    assert!(between.api.calls().is_empty());
}
