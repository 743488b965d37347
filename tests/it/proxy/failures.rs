//! What fails, and who is told what.

use std::time::Duration;

use breakeven::demo::{Fault, State};
use breakeven::ledger::{Outcome, UsageSource};
use http::StatusCode;
use serde_json::json;

use super::{API_MODEL, OWN_MODEL, between, between_backends, streamed};
use crate::support::{End, Events, chat, data};

#[tokio::test]
async fn a_failure_before_the_first_byte_moves_the_call_to_the_other_backend() {
    let faults = [
        Fault::Status(500),
        Fault::Status(503),
        Fault::RateLimited { retry_after: Duration::from_secs(30) },
        Fault::ResetBeforeHeaders,
    ];
    for fault in faults {
        for body in [chat(OWN_MODEL), streamed(OWN_MODEL)] {
            let between = between().await;
            between.own.set(|settings| settings.faults = vec![fault.clone()]);
            let reply = between.http.post("/chat/completions", &body).await;
            assert_eq!(reply.status, StatusCode::OK, "{fault:?}");
            assert_eq!(
                (reply.header("x-breakeven-backend"), reply.header("x-breakeven-reason")),
                ("openai", "failover")
            );
            let entry = &between.proxy.entries().await[0];
            assert!(entry.attempts >= 2, "{fault:?}");
            assert_eq!((&*entry.backend, entry.outcome), ("openai", Outcome::Success));
            assert_eq!(entry.usage, between.api.produced()[0].usage, "{fault:?}");
        }
    }
}

#[tokio::test]
async fn a_backend_that_refuses_connections_is_passed_over() {
    let between = between().await;
    between.own.stop().await;
    let reply = between.http.post("/chat/completions", &chat(OWN_MODEL)).await;
    assert_eq!((reply.status, reply.header("x-breakeven-backend")), (StatusCode::OK, "openai"));
}

#[tokio::test]
async fn the_last_error_passes_as_it_is_when_nobody_else_can_serve() {
    let between = between().await;
    between
        .api
        .set(|settings| settings.faults = vec![Fault::RateLimited { retry_after: Duration::from_secs(90) }]);
    let reply = between.http.post("/chat/completions", &chat(API_MODEL)).await;
    assert_eq!((reply.status.as_u16(), reply.header("retry-after")), (429, "90"));
    assert_eq!(reply.json()["error"]["code"], "rate_limit_exceeded");
    assert_eq!(reply.header("x-ratelimit-remaining-requests"), "0");
}

#[tokio::test]
async fn what_is_wrong_with_a_request_is_answered_once_and_not_retried() {
    let between = between().await;
    between.api.set(|settings| settings.context_window = 4);
    let reply = between.http.post("/chat/completions", &chat(API_MODEL)).await;
    assert_eq!(
        (reply.status.as_u16(), &reply.json()["error"]["code"]),
        (400, &json!("context_length_exceeded"))
    );
    assert_eq!(between.api.calls().len(), 1);
    assert_eq!(between.proxy.entries().await[0].outcome, Outcome::ClientError);
}

#[tokio::test]
async fn an_unknown_model_gets_the_apis_own_answer() {
    let between = between().await;
    between.api.set(|settings| settings.models = vec![API_MODEL.into()]);
    let reply = between.http.post("/chat/completions", &chat("no-such-model")).await;
    assert_eq!((reply.status.as_u16(), &reply.json()["error"]["code"]), (404, &json!("model_not_found")));
}

#[tokio::test]
async fn a_stream_that_breaks_ends_with_an_error_event_and_without_done() {
    for fault in [Fault::ResetAfter(4), Fault::CloseAfter(4), Fault::TruncateAfter(4)] {
        let between = between().await;
        between.api.fail_next(1, &fault);
        let (events, _) =
            Events::of(between.http.open("/chat/completions", &streamed(API_MODEL)).await).rest().await;
        assert!(!events.iter().any(|event| event.contains("[DONE]")), "{fault:?}: {events:?}");
        let last = data(&events).pop().unwrap();
        assert!(last["error"]["message"].is_string(), "{fault:?}: {events:?}");
        assert_eq!(events.len(), 5, "{fault:?}: the four events that came, and the error");
        let entry = &between.proxy.entries().await[0];
        assert_eq!(entry.outcome, Outcome::UpstreamError, "{fault:?}");
        assert_ne!(entry.usage_source, UsageSource::UpstreamUsage);
        assert_eq!(entry.usage.output_tokens, between.api.produced()[0].usage.output_tokens, "{fault:?}");
    }
}

#[tokio::test]
async fn an_error_event_of_the_server_passes_and_counts_as_its_failure() {
    let between = between().await;
    between.own.fail_next(1, &Fault::ErrorEventAfter(3));
    let (events, end) =
        Events::of(between.http.open("/chat/completions", &streamed(OWN_MODEL)).await).rest().await;
    assert_eq!(end, End::Complete);
    assert!(data(&events).last().unwrap()["error"]["message"].as_str().unwrap().contains("EngineCore"));
    assert_eq!(between.proxy.entries().await[0].outcome, Outcome::UpstreamError);
}

#[tokio::test]
async fn a_stream_that_falls_silent_is_given_up_after_the_time_between_bytes() {
    let between = between_backends("", "timeouts = { between_bytes = \"200ms\" }", "").await;
    between.api.fail_next(1, &Fault::StallAfter(3));
    let (events, _) =
        Events::of(between.http.open("/chat/completions", &streamed(API_MODEL)).await).rest().await;
    assert!(data(&events).last().unwrap()["error"].is_object(), "{events:?}");
    assert!(between.api.until(|fake| fake.totals().aborted == 1).await);
    assert_eq!(between.proxy.entries().await[0].outcome, Outcome::Timeout);
}

#[tokio::test]
async fn a_server_that_sends_no_headers_is_given_up_and_the_other_one_serves() {
    let between = between_backends("", "", "timeouts = { first_byte = \"200ms\" }").await;
    between.own.set(|settings| settings.faults = vec![Fault::SlowHeaders(Duration::from_mins(1))]);
    let reply = between.http.post("/chat/completions", &chat(OWN_MODEL)).await;
    assert_eq!((reply.status, reply.header("x-breakeven-reason")), (StatusCode::OK, "failover"));
}

#[tokio::test]
async fn a_client_that_hangs_up_ends_the_stream_upstream_and_pays_for_what_was_produced() {
    const PER_TOKEN: Duration = Duration::from_millis(10);
    for model in [API_MODEL, OWN_MODEL] {
        let between = between().await;
        let fake = if model == API_MODEL { &between.api } else { &between.own };
        fake.set(|settings| {
            settings.output_tokens = 10_000;
            settings.time_per_output_token = PER_TOKEN;
        });
        let mut events = Events::of(between.http.open("/chat/completions", &streamed(model)).await);
        for _ in 0..6 {
            events.next().await.unwrap();
        }
        let hung_up = fake.elapsed();
        drop(events);
        assert!(fake.until(|fake| fake.totals().aborted == 1).await);
        let produced = fake.produced().remove(0);
        let State::Aborted { noticed_at } = produced.state else { panic!("{produced:?}") };
        let late = noticed_at.saturating_sub(hung_up);
        assert!(late < Duration::from_secs(1), "{late:?}");
        // What was made after the client had gone is not seen by anybody.
        let unseen = u64::try_from(late.as_millis() / PER_TOKEN.as_millis()).unwrap();

        let entry = &between.proxy.entries().await[0];
        assert_eq!(entry.outcome, Outcome::Cancelled);
        let missed = produced.usage.output_tokens.abs_diff(entry.usage.output_tokens);
        if model == API_MODEL {
            assert_eq!(entry.usage_source, UsageSource::OwnTokenizer);
            assert_eq!(entry.usage.input_tokens, produced.usage.input_tokens);
            assert!(missed <= 3 + unseen, "{:?} produced, {:?} booked", produced.usage, entry.usage);
        } else {
            assert_eq!(entry.usage_source, UsageSource::Estimate, "its vocabulary is not known");
            assert!(missed <= 6 + unseen, "{:?} produced, {:?} booked", produced.usage, entry.usage);
        }
        assert!(entry.cost.as_nanos() > 0);
    }
}

#[tokio::test]
async fn a_client_that_hangs_up_before_the_answer_ends_the_call_upstream() {
    let between = between().await;
    between.api.set(|settings| settings.time_to_first_token = Duration::from_mins(1));
    let body = chat(API_MODEL);
    let call = between.http.open("/chat/completions", &body);
    tokio::select! {
        _ = call => panic!("the answer takes a minute"),
        began = between.api.until(|fake| fake.in_flight() == 1) => assert!(began),
    }
    assert!(between.api.until(|fake| fake.totals().aborted == 1).await);
    assert_eq!(between.proxy.entries().await[0].outcome, Outcome::Cancelled);
}
