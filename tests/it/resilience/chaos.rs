//! An API that fails in every way, and a healthy backend beside it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use breakeven::demo::{Chaos, FakeBackend, Fault, Personality, Settings};
use breakeven::economics::NanoUsd;
use breakeven::ledger::Outcome;
use serde_json::json;
use tokio::task::JoinSet;

use super::{metric, scale};
use crate::support::proxy::Proxy;
use crate::support::{Events, Http, chat, data, read, with};

pub(super) const MODEL: &str = "gpt-4o-mini";
const CLIENTS: usize = 32;
/// Shares of a hundred requests: 5 errors, 5 refusals, 2 resets before and 2 within the answer, 1 stall.
pub(super) const SHARE: f64 = 0.15;

pub(super) fn faults() -> Vec<Fault> {
    let (before, within) = (Fault::ResetBeforeHeaders, Fault::ResetAfter(3));
    let limited = Fault::RateLimited { retry_after: Duration::ZERO };
    let mut faults = vec![Fault::Status(500); 5];
    faults.extend(vec![limited; 5]);
    faults.extend([before.clone(), before, within.clone(), within, Fault::StallAfter(2)]);
    faults
}

/// How the calls ended, as their clients saw it.
#[derive(Debug, Default)]
struct Seen {
    complete: AtomicUsize,
    broken: AtomicUsize,
}

async fn call(http: &Http, number: usize, seen: &Seen) {
    if number.is_multiple_of(2) {
        let reply = http.post("/chat/completions", &chat(MODEL)).await;
        assert_eq!(reply.status, 200, "call {number}: {}", reply.text());
        assert!(reply.json()["usage"].is_object(), "call {number}");
        seen.complete.fetch_add(1, Ordering::Relaxed);
        return;
    }
    let answer = http.open("/chat/completions", &with(chat(MODEL), json!({"stream": true}))).await;
    assert!(answer.status() == 200, "stream {number}: {}", read(answer).await.text());
    let (events, _) = Events::of(answer).rest().await;
    let is_done = events.last().is_some_and(|event| event == "data: [DONE]");
    let errors = data(&events).iter().filter(|event| event["error"].is_object()).count();
    let last = data(&events).pop().unwrap_or_default();
    if is_done {
        assert_eq!(errors, 0, "stream {number}: {events:?}");
        seen.complete.fetch_add(1, Ordering::Relaxed);
    } else {
        assert!(errors == 1 && last["error"].is_object(), "stream {number} ends in silence: {events:?}");
        assert!(!events.iter().any(|event| event.contains("[DONE]")), "stream {number}: {events:?}");
        seen.broken.fetch_add(1, Ordering::Relaxed);
    }
}

/// The configuration of an API that fails and a self-hosted backend that does not; the API is preferred.
pub(super) fn unreliable(api: &FakeBackend, own: &FakeBackend) -> String {
    format!(
        r#"
        [backends.openai]
        kind = "api"
        base_url = "{}"
        timeouts = {{ first_byte = "500ms", between_bytes = "500ms" }}
        circuit = {{ failures = 5, open_for = "50ms" }}
        [backends.gpu]
        kind = "self_hosted"
        base_url = "{}"
        hourly_usd = 2.99
        billing = "committed"
        capacity = {{ input_tokens_per_second = 150000, output_tokens_per_second = 100000, max_in_flight = 64 }}
        [routes.chat]
        models = ["{MODEL}"]
        policy = "api"
        offers = [{{ backend = "openai" }}, {{ backend = "gpu", model = "llama" }}]
        "#,
        api.url(),
        own.url()
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_failure_of_the_api_that_a_failover_avoids_is_seen_and_every_call_has_one_row() {
    let calls = scale("BREAKEVEN_CHAOS_CALLS", 1_000);
    let api = FakeBackend::start(Personality::OpenAi, Settings::default()).await.unwrap();
    let own = FakeBackend::start(Personality::Vllm, Settings::default()).await.unwrap();
    let config = unreliable(&api, &own);
    let proxy = Proxy::start(&config).await.ready().await;
    let seed = fastrand::u64(..);
    api.set(|settings| settings.chaos = Some(Chaos { seed, probability: SHARE, faults: faults() }));

    let (next, seen) = (Arc::new(AtomicUsize::new(0)), Arc::new(Seen::default()));
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        let (next, seen, http) = (next.clone(), seen.clone(), Http::new(&proxy.url()));
        clients.spawn(async move {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= calls {
                    return;
                }
                call(&http, number, &seen).await;
            }
        });
    }
    while let Some(ended) = clients.join_next().await {
        ended.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    }

    let entries = proxy.entries().await;
    let (complete, broken) = (seen.complete.load(Ordering::Relaxed), seen.broken.load(Ordering::Relaxed));
    let mut ids: Vec<_> = entries.iter().map(|entry| entry.id).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!((entries.len(), ids.len()), (calls, calls), "one row a call (seed {seed})");
    let successes = entries.iter().filter(|entry| entry.outcome == Outcome::Success).count();
    assert_eq!(
        (successes, calls - successes),
        (complete, broken),
        "the rows tell what was seen (seed {seed})"
    );
    let booked: NanoUsd = entries.iter().map(|entry| entry.cost).sum();
    let counted = proxy.dollars("breakeven_request_cost_usd_total", "").await;
    assert_eq!(counted, booked, "the counters are the sum of the rows (seed {seed})");
    let at_api = entries.iter().filter(|entry| entry.backend == "openai").count();
    assert!(at_api > calls / 2, "the API still served: {at_api}");
    assert!(
        broken > 0 && broken < calls / 20,
        "{broken} of {calls} broke after their first byte (seed {seed})"
    );
    assert_eq!(metric(&proxy.admin_url(), "breakeven_panics_total").await, 0);
    eprintln!(
        "{calls} calls: {complete} complete, {broken} ended with an error event, {at_api} served by the API"
    );
}
