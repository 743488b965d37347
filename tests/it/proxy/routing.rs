//! Which backend serves, and what it is told.

use breakeven::demo::{FakeBackend, Fault, Personality, Settings};
use breakeven::economics::NanoUsd;
use bytes::Bytes;
use http::{Method, StatusCode};
use serde_json::json;

use super::{API_MODEL, OWN_MODEL, OWN_NAME, between, between_backends, streamed};
use crate::support::proxy::Proxy;
use crate::support::{Events, Http, chat};

#[tokio::test]
async fn the_answer_says_who_served_and_why_and_what_it_cost() {
    let between = between().await;
    let reply = between.http.post("/chat/completions", &chat(OWN_MODEL)).await;
    assert_eq!((reply.header("x-breakeven-backend"), reply.header("x-breakeven-model")), ("gpu", OWN_NAME));
    let entry = between.proxy.entries().await.remove(0);
    assert_eq!(reply.header("x-breakeven-request-id"), entry.id.to_string());
    assert_eq!(reply.header("x-breakeven-reason"), entry.reason);
    let cost: breakeven::economics::NanoUsd = reply.header("x-breakeven-cost-usd").parse().unwrap();
    assert_eq!(cost, entry.cost);
    let stream = between.http.post("/chat/completions", &streamed(API_MODEL)).await;
    assert_eq!((stream.header("x-breakeven-backend"), stream.header("x-breakeven-cost-usd")), ("openai", ""));
}

#[tokio::test]
async fn calls_beyond_the_capacity_overflow_to_the_api() {
    let between = between().await;
    between.own.set(|settings| settings.faults = vec![Fault::StallAfter(1)]);
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut events = Events::of(between.http.open("/chat/completions", &streamed(OWN_MODEL)).await);
        events.next().await.unwrap();
        held.push(events);
    }
    let reply = between.http.post("/chat/completions", &chat(OWN_MODEL)).await;
    assert_eq!(
        (reply.header("x-breakeven-backend"), reply.header("x-breakeven-reason")),
        ("openai", "overflow")
    );
    drop(held);
    assert!(between.own.until(|fake| fake.in_flight() == 0).await);
    between.own.set(|settings| settings.faults.clear());
    // The places are free once the proxy has settled both calls.
    assert_eq!(between.proxy.entries().await.len(), 3);
    let reply = between.http.post("/chat/completions", &chat(OWN_MODEL)).await;
    assert_eq!(reply.header("x-breakeven-backend"), "gpu");
}

#[tokio::test]
async fn the_clients_key_goes_to_the_first_api_and_to_no_other() {
    let settings = Settings { faults: vec![Fault::Status(500)], ..Settings::default() };
    let first = FakeBackend::start(Personality::OpenAi, settings).await.unwrap();
    let second = FakeBackend::start(Personality::OpenAi, Settings::default()).await.unwrap();
    let proxy = Proxy::start(&format!(
        "[backends.first]\nkind = \"api\"\nbase_url = \"{}\"\n[backends.second]\nkind = \"api\"\nbase_url = \"{}\"\n\
         [routes.chat]\nmodels = [\"{API_MODEL}\"]\npolicy = \"api\"\n\
         offers = [{{ backend = \"first\" }}, {{ backend = \"second\" }}]\n",
        first.url(),
        second.url()
    ))
    .await;
    let http = Http::new(&proxy.url());
    let named = [("x-breakeven-backend", "second"), ("x-kept", "1")];
    for extra in [&named[1..], &named] {
        let mut request = http.request(Method::POST, "/chat/completions");
        for (name, value) in
            [("authorization", "Bearer sk-client"), ("openai-organization", "org")].iter().chain(extra)
        {
            request = request.header(*name, *value);
        }
        http.send(request, Bytes::from(chat(API_MODEL).to_string())).await;
    }
    assert_eq!(first.calls()[0].header("authorization"), "Bearer sk-client");
    let others = second.calls();
    assert_eq!(others.len(), 2);
    for call in others {
        assert_eq!((call.header("authorization"), call.header("openai-organization")), ("", ""));
        assert_eq!(call.header("x-kept"), "1");
    }
}

/// Two machines of the same speed, a thousand tokens a second, one of ten times the rent.
#[tokio::test]
async fn a_call_costs_what_the_machine_costs_that_served_it() {
    let own = FakeBackend::start(Personality::Vllm, Settings::default()).await.unwrap();
    let machine = |name: &str, hourly_usd: &str| {
        format!(
            "[backends.{name}]\nkind = \"self_hosted\"\nbase_url = \"{}\"\nhourly_usd = {hourly_usd}\nbilling = \"committed\"\n\
             capacity = {{ input_tokens_per_second = 1000, output_tokens_per_second = 1000, max_in_flight = 2 }}\n",
            own.url()
        )
    };
    let config = format!(
        "{}{}[routes.own]\nmodels = [\"{OWN_MODEL}\"]\npolicy = \"self_hosted\"\n\
         offers = [{{ backend = \"small\" }}, {{ backend = \"large\" }}]\n",
        machine("small", "3.6"),
        machine("large", "36")
    );
    let proxy = Proxy::start(&config).await.ready().await;
    let http = Http::new(&proxy.url());
    for (name, nanos_a_token) in [("small", 1_000), ("large", 10_000)] {
        let request = http
            .request(Method::POST, "/chat/completions")
            .header("content-type", "application/json")
            .header("x-breakeven-backend", name);
        let reply = http.send(request, Bytes::from(chat(OWN_MODEL).to_string())).await;
        assert_eq!(reply.header("x-breakeven-backend"), name);
        let entry = proxy.entries().await.remove(0);
        let tokens = i64::try_from(entry.usage.total_tokens()).unwrap();
        assert_eq!(entry.cost, NanoUsd::from_nanos(tokens * nanos_a_token), "{name}");
        assert_eq!(entry.self_hosted_cost, Some(entry.cost), "{name}");
    }
}

#[tokio::test]
async fn a_client_may_name_the_backend() {
    let between = between().await;
    let request = between
        .http
        .request(Method::POST, "/chat/completions")
        .header("content-type", "application/json")
        .header("x-breakeven-backend", "openai");
    let reply = between.http.send(request, Bytes::from(chat(OWN_MODEL).to_string())).await;
    assert_eq!(
        (reply.header("x-breakeven-backend"), reply.header("x-breakeven-reason")),
        ("openai", "pinned")
    );
    assert_eq!(between.api.calls()[0].header("x-breakeven-backend"), "", "ours, not the server's");
}

#[tokio::test]
async fn the_clients_key_goes_to_the_api_and_nowhere_else() {
    let between = between().await;
    for model in [API_MODEL, OWN_MODEL] {
        let request = between
            .http
            .request(Method::POST, "/chat/completions")
            .header("content-type", "application/json")
            .header("authorization", "Bearer sk-clients-own")
            .header("openai-organization", "org-clients-own")
            .header("cookie", "session=1");
        between.http.send(request, Bytes::from(chat(model).to_string())).await;
    }
    assert_eq!(between.api.calls()[0].header("authorization"), "Bearer sk-clients-own");
    assert_eq!(between.api.calls()[0].header("openai-organization"), "org-clients-own");
    let own = &between.own.calls()[0];
    assert_eq!((own.header("authorization"), own.header("openai-organization")), ("", ""));
}

#[tokio::test]
async fn a_configured_key_replaces_the_clients() {
    let key = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(key.path(), "sk-configured\n").unwrap();
    let line = format!("api_key = {{ file = {:?} }}", key.path());
    let between = between_backends("", &line, "").await;
    let request = between
        .http
        .request(Method::POST, "/chat/completions")
        .header("content-type", "application/json")
        .header("authorization", "Bearer sk-clients-own");
    between.http.send(request, Bytes::from(chat(API_MODEL).to_string())).await;
    assert_eq!(between.api.calls()[0].header("authorization"), "Bearer sk-configured");
}

#[tokio::test]
async fn a_failover_to_the_self_hosted_backend_takes_no_key_along() {
    let between = between().await;
    between.own.set(|settings| settings.faults = vec![Fault::Status(503)]);
    let request = between
        .http
        .request(Method::POST, "/chat/completions")
        .header("content-type", "application/json")
        .header("authorization", "Bearer sk-clients-own");
    let reply = between.http.send(request, Bytes::from(chat(OWN_MODEL).to_string())).await;
    assert_eq!(reply.header("x-breakeven-backend"), "openai");
    assert!(between.own.calls().iter().all(|seen| seen.header("authorization").is_empty()));
    assert_eq!(between.api.calls()[0].header("authorization"), "Bearer sk-clients-own");
}

#[tokio::test]
async fn models_on_no_route_and_unknown_paths_go_to_the_api() {
    let between = between().await;
    let reply = between.http.post("/chat/completions", &chat("gpt-4.1")).await;
    assert_eq!((reply.status, reply.header("x-breakeven-backend")), (StatusCode::OK, "openai"));
    assert_eq!(between.api.calls()[0].json()["model"], "gpt-4.1");
    let reply = between.http.post("/moderations", &json!({"input": "hello"})).await;
    assert_eq!(reply.json()["results"][0]["flagged"], false);
    let missing = between.http.post("/no/such/path", &json!({})).await;
    assert_eq!(
        (missing.status.as_u16(), &missing.json()["error"]["type"]),
        (404, &json!("invalid_request_error"))
    );
}

#[tokio::test]
async fn the_list_of_models_has_those_of_the_routes() {
    let between = between().await;
    between.api.set(|settings| settings.models = vec![API_MODEL.into(), "gpt-4.1".into()]);
    let list = between.http.get("/models").await.json();
    let names: Vec<&str> =
        list["data"].as_array().unwrap().iter().filter_map(|model| model["id"].as_str()).collect();
    assert!(names.contains(&API_MODEL) && names.contains(&OWN_MODEL), "{names:?}");
}

#[tokio::test]
async fn a_call_that_the_fee_makes_dearer_stays_on_the_api() {
    let route = format!(
        r#"
        [routes.cheap]
        models = ["cheap"]
        policy = "cheapest"
        offers = [{{ backend = "gpu", model = "{OWN_NAME}" }}, {{ backend = "openai", model = "{API_MODEL}" }}]
        "#
    );
    for (fee, served_by) in [("0.0", "gpu"), ("0.01", "openai")] {
        let between = between_backends(&route, "", &format!("request_usd = {fee}")).await;
        let reply = between.http.post("/chat/completions", &chat("cheap")).await;
        assert_eq!(
            (reply.header("x-breakeven-backend"), reply.header("x-breakeven-reason")),
            (served_by, "cheapest"),
            "{fee}"
        );
    }
}
