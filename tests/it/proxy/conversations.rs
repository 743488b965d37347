//! Calls of one conversation go where its prompt is cached, as long as that is worth it.

use std::time::Duration;

use breakeven::demo::{FakeBackend, Fault, Personality, Settings};
use breakeven::fleet::ReplicaState;
use bytes::Bytes;
use http::Method;
use serde_json::{Value, json};

use crate::support::proxy::Proxy;
use crate::support::{Events, Http, Reply, with};

/// The turns of a conversation that is long enough to be worth a cache.
fn turn(topic: &str, turns: usize) -> Value {
    let mut messages =
        vec![json!({"role": "user", "content": format!("{topic}: {}", "tell me more. ".repeat(600))})];
    for _ in 1..turns {
        messages.push(json!({"role": "assistant", "content": "Well."}));
        messages.push(json!({"role": "user", "content": "Go on."}));
    }
    json!({"model": "chat", "messages": messages})
}

async fn fakes(personality: Personality) -> FakeBackend {
    FakeBackend::start(personality, Settings { output_tokens: 12, ..Settings::default() }).await.unwrap()
}

/// A replica-second that is paid by use costs 0.83 mUSD, so the long prompt is some 0.12 mUSD of work; the API
/// takes more for it, and less once most of it is cached.
async fn proxy(api: &FakeBackend, own: &[FakeBackend], billing: &str) -> (Proxy, Http) {
    let urls: Vec<String> = own.iter().map(FakeBackend::url).collect();
    let config = format!(
        r#"
        [backends.openai]
        kind = "api"
        base_url = "{api}"

        [backends.gpu]
        kind = "self_hosted"
        base_url = {urls:?}
        hourly_usd = 2.99
        billing = "{billing}"
        capacity = {{ input_tokens_per_second = 15000, output_tokens_per_second = 10000, max_in_flight = 8 }}

        [routes.chat]
        models = ["chat"]
        policy = "cheapest"
        offers = [
          {{ backend = "openai", model = "m", price = {{ input = 0.08, cached_input = 0.01, output = 0.08 }} }},
          {{ backend = "gpu", model = "m" }},
        ]
        "#,
        api = api.url(),
    );
    let proxy = Proxy::start(&config).await.ready().await;
    let state = proxy.running.gateway.state();
    let all_serve = async {
        while state.backends[1].fleet.count(ReplicaState::Ready) < u32::try_from(own.len()).unwrap() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), all_serve).await.expect("the replicas come up");
    let http = Http::new(&proxy.url());
    (proxy, http)
}

async fn post(http: &Http, body: &Value, backend: Option<&str>) -> Reply {
    let mut request =
        http.request(Method::POST, "/chat/completions").header("content-type", "application/json");
    if let Some(backend) = backend {
        request = request.header("x-breakeven-backend", backend);
    }
    http.send(request, Bytes::from(body.to_string())).await
}

#[tokio::test]
async fn a_conversation_stays_on_the_replica_that_knows_it() {
    let api = fakes(Personality::OpenAi).await;
    let own = [fakes(Personality::Vllm).await, fakes(Personality::Vllm).await];
    let (proxy, http) = proxy(&api, &own, "committed").await;
    // While the first is being served, the second goes to the replica that is free.
    own[0].set(|settings| settings.faults = vec![Fault::StallAfter(1)]);
    let first = with(turn("sheep", 1), json!({"stream": true}));
    let mut events = Events::of(http.open("/chat/completions", &first).await);
    events.next().await.unwrap();
    post(&http, &turn("goats", 1), None).await;
    drop(events);
    assert!(own[0].until(|fake| fake.in_flight() == 0).await);
    own[0].set(|settings| settings.faults.clear());
    assert_eq!(proxy.entries().await.len(), 2);
    assert_eq!(own.each_ref().map(|fake| fake.calls().len()), [1, 1]);
    for turns in 2..6 {
        let reply = post(&http, &turn("goats", turns), None).await;
        assert_eq!(reply.header("x-breakeven-reason"), "cheapest");
        // What it is remembered by is noted when it is settled.
        proxy.entries().await;
    }
    assert_eq!(own.each_ref().map(|fake| fake.calls().len()), [1, 5]);
    post(&http, &turn("horses", 1), None).await;
    assert_eq!(own[0].calls().len(), 2, "a new one goes to the first of the idle");
}

#[tokio::test]
async fn a_conversation_that_the_api_has_cached_stays_there_while_that_is_cheaper() {
    let api = fakes(Personality::OpenAi).await;
    let own = [fakes(Personality::Vllm).await];
    let (proxy, http) = proxy(&api, &own, "per_use").await;
    let served_by = async |body: &Value, backend: Option<&str>| {
        let reply = post(&http, body, backend).await;
        proxy.entries().await;
        reply.header("x-breakeven-backend").to_owned()
    };
    assert_eq!(served_by(&turn("sheep", 1), None).await, "gpu", "it is cheaper for a new conversation");
    assert_eq!(served_by(&turn("goats", 1), Some("openai")).await, "openai");
    assert_eq!(
        served_by(&turn("goats", 2), None).await,
        "openai",
        "the discount is worth more than the move"
    );
    assert_eq!(served_by(&turn("sheep", 2), None).await, "gpu");
    assert_eq!(served_by(&turn("goats", 1), Some("gpu")).await, "gpu");
    assert_eq!(served_by(&turn("goats", 2), None).await, "gpu", "the cache is where the last call was");
}
