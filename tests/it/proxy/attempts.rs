//! What attempts cost that brought no answer: estimates, owed once, and counted apart from the call itself.

use std::time::Duration;

use breakeven::demo::{FakeBackend, Fault, Personality, Settings};
use breakeven::economics::{NanoUsd, Tier, Usage};
use breakeven::ledger::{Entry, Outcome, UsageSource, query};
use breakeven::openai::tokenizer::Ratio;
use breakeven::openai::{Call, Endpoint};
use breakeven::prices;
use bytes::Bytes;
use http::StatusCode;
use serde_json::{Value, json};

use crate::support::proxy::{Proxy, nano_dollars};
use crate::support::{Http, chat, with};

const MODEL: &str = "assistant";
/// A server that keeps its answer for longer than any test lasts.
const SILENT: Fault = Fault::SlowHeaders(Duration::from_hours(1));

/// A proxy before two servers with prices of their own; the first is tried first.
struct Two {
    first: FakeBackend,
    second: FakeBackend,
    proxy: Proxy,
    http: Http,
}

async fn two_apis() -> Two {
    two(Personality::OpenAi, "kind = \"api\"", "api").await
}

/// The first one has these lines in its section.
async fn two(first: Personality, first_lines: &str, policy: &str) -> Two {
    let first = FakeBackend::start(first, Settings::default()).await.unwrap();
    let second = FakeBackend::start(Personality::OpenAi, Settings::default()).await.unwrap();
    let proxy = proxy_before([&first.url(), &second.url()], first_lines, policy).await.ready().await;
    let http = Http::new(&proxy.url());
    Two { first, second, proxy, http }
}

async fn proxy_before([first, second]: [&str; 2], first_lines: &str, policy: &str) -> Proxy {
    let config = format!(
        r#"[retry]
        budget_ratio = 1
        max_backoff = "10m"
        [backends.first]
        base_url = "{first}"
        timeouts = {{ first_byte = "500ms" }}
        {first_lines}
        [backends.second]
        kind = "api"
        base_url = "{second}"
        [routes.chat]
        models = ["{MODEL}"]
        policy = "{policy}"
        offers = [{{ backend = "first", model = "gpt-4o" }}, {{ backend = "second", model = "gpt-4o-mini" }}]
        "#,
    );
    Proxy::start(&config).await
}

fn own_lines(billing: &str) -> String {
    format!(
        "kind = \"self_hosted\"\nhourly_usd = 3.6\nbilling = \"{billing}\"\nrequest_usd = 0.001\n\
         capacity = {{ input_tokens_per_second = 1000, output_tokens_per_second = 1000, max_in_flight = 8 }}"
    )
}

fn asked(model: &str) -> Value {
    with(chat(model), json!({"max_tokens": 5}))
}

/// The input of a call, as it is estimated before anything was learnt.
fn estimated_input(body: &Value) -> Usage {
    let call = Call::read(Endpoint::ChatCompletions, &Bytes::from(body.to_string())).unwrap();
    Usage::new(Ratio::new().estimate(call.input_bytes), 0)
}

fn price_at(model: &str, usage: &Usage) -> NanoUsd {
    prices::built_in().card(model).unwrap().cost(usage, Tier::Standard)
}

/// A counter of dollars at one backend.
async fn counted(proxy: &Proxy, name: &str, backend: &str) -> NanoUsd {
    proxy.dollars(name, &format!("backend=\"{backend}\"")).await
}

async fn only_entry(proxy: &Proxy) -> Entry<'static> {
    let mut entries = proxy.entries().await;
    assert_eq!(entries.len(), 1, "a call is counted once: {entries:?}");
    entries.remove(0)
}

#[tokio::test]
async fn an_attempt_that_was_sent_and_given_up_is_owed_for_its_input_at_its_own_offers_price() {
    for fault in [SILENT, Fault::ResetBeforeHeaders] {
        let two = two_apis().await;
        two.first.set(|settings| settings.faults = vec![fault.clone()]);
        let body = asked(MODEL);
        let reply = two.http.post("/chat/completions", &body).await;
        assert_eq!((reply.status, reply.header("x-breakeven-backend")), (StatusCode::OK, "second"));
        let entry = only_entry(&two.proxy).await;
        let owed = price_at("gpt-4o", &estimated_input(&body));
        assert_eq!((entry.attempts, entry.attempts_cost), (2, owed), "{fault:?}");
        let usage = two.second.produced()[0].usage;
        assert_eq!((entry.usage, entry.usage_source), (usage, UsageSource::UpstreamUsage));
        let answered = price_at("gpt-4o-mini", &usage);
        assert_eq!((entry.cost, entry.api_cost.is_some()), (owed + answered, true), "{fault:?}");
        assert_eq!(nano_dollars(reply.header("x-breakeven-cost-usd")), entry.cost);
        for name in ["breakeven_request_cost_usd_total", "breakeven_spend_usd_total"] {
            assert_eq!(counted(&two.proxy, name, "first").await, owed, "{name}");
            assert_eq!(counted(&two.proxy, name, "second").await, answered, "{name}");
        }
    }
}

#[tokio::test]
async fn an_attempt_that_was_refused_or_never_arrived_costs_nothing() {
    let refusals =
        [Fault::Status(500), Fault::Status(429), Fault::RateLimited { retry_after: Duration::from_secs(9) }];
    for fault in refusals {
        let two = two_apis().await;
        two.first.set(|settings| settings.faults = vec![fault.clone()]);
        assert_eq!(two.http.post("/chat/completions", &asked(MODEL)).await.status, StatusCode::OK);
        owes_nothing_to_the_first(&two.proxy).await;
    }
    let second = FakeBackend::start(Personality::OpenAi, Settings::default()).await.unwrap();
    // Bound and not listened at: whoever connects is refused, and nobody else gets the port.
    let silent = tokio::net::TcpSocket::new_v4().unwrap();
    silent.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let first = format!("http://{}/v1", silent.local_addr().unwrap());
    let proxy = proxy_before([&first, &second.url()], "kind = \"api\"", "api").await;
    let reply = Http::new(&proxy.url()).post("/chat/completions", &asked(MODEL)).await;
    assert_eq!(reply.status, StatusCode::OK);
    owes_nothing_to_the_first(&proxy).await;
}

async fn owes_nothing_to_the_first(proxy: &Proxy) {
    let entry = only_entry(proxy).await;
    assert_eq!((&*entry.backend, entry.attempts), ("second", 2));
    assert_eq!(entry.attempts_cost, NanoUsd::ZERO);
    assert_eq!(counted(proxy, "breakeven_spend_usd_total", "first").await, NanoUsd::ZERO);
}

#[tokio::test]
async fn a_call_that_nobody_answers_costs_what_its_attempts_do_and_is_an_estimate() {
    let two = two_apis().await;
    two.first.set(|settings| settings.faults = vec![SILENT]);
    two.second.set(|settings| settings.faults = vec![Fault::Status(500)]);
    let body = asked(MODEL);
    let reply = two.http.post("/chat/completions", &body).await;
    assert!(reply.status.is_server_error(), "{}", reply.status);
    let entry = only_entry(&two.proxy).await;
    let sent = two.first.calls().len();
    let owed = (0..sent).map(|_| price_at("gpt-4o", &estimated_input(&body))).sum::<NanoUsd>();
    assert!(owed > NanoUsd::ZERO);
    assert_eq!((entry.cost, entry.attempts_cost), (owed, owed));
    assert_eq!((entry.usage, entry.usage_source), (Usage::default(), UsageSource::None));
    let totals = query::totals(&two.proxy.ledger(), None, None, &[]).unwrap();
    assert_eq!((totals[0].cost, totals[0].estimated_requests), (owed, 1));
}

#[tokio::test]
async fn an_attempt_on_own_hardware_owes_its_fee_and_the_work_that_is_paid_by_the_second() {
    for (billing, pays_for_work) in [("committed", false), ("per_use", true)] {
        let two = two(Personality::Vllm, &own_lines(billing), "self_hosted").await;
        two.first.set(|settings| settings.faults = vec![SILENT]);
        let body = asked(MODEL);
        assert_eq!(two.http.post("/chat/completions", &body).await.status, StatusCode::OK);
        let fee = NanoUsd::from_nanos(1_000_000);
        // A thousandth of a second a token, at a thousandth of a dollar a second.
        let work = i64::try_from(estimated_input(&body).input_tokens).unwrap() * 1_000;
        let owed = fee + NanoUsd::from_nanos(if pays_for_work { work } else { 0 });
        let entry = only_entry(&two.proxy).await;
        assert_eq!((&*entry.backend, entry.attempts_cost), ("second", owed), "{billing}");
        assert_eq!(counted(&two.proxy, "breakeven_request_cost_usd_total", "first").await, owed, "{billing}");
    }
}

#[tokio::test]
async fn who_leaves_while_no_attempt_is_under_way_owes_nothing_more() {
    let two = two_apis().await;
    two.first.set(|settings| settings.faults = vec![SILENT]);
    two.second
        .set(|settings| settings.faults = vec![Fault::RateLimited { retry_after: Duration::from_mins(5) }]);
    let body = asked(MODEL);
    let backends = two.proxy.running.gateway.state().backends.clone();
    let both_failed = async {
        while backends.iter().any(|backend| backend.series.attempts_ended() == 0) {
            tokio::task::yield_now().await;
        }
    };
    // What follows is the pause that the second one asked for.
    tokio::select! {
        _ = two.http.open("/chat/completions", &body) => panic!("it waits for its next attempt"),
        () = both_failed => {}
    }
    let entry = only_entry(&two.proxy).await;
    let owed = price_at("gpt-4o", &estimated_input(&body));
    assert_eq!((entry.outcome, entry.cost, entry.attempts_cost), (Outcome::Cancelled, owed, owed));
    assert_eq!((entry.usage, entry.usage_source), (Usage::default(), UsageSource::None));
}
