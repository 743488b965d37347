//! Bills are compared with what was really produced.

use breakeven::demo::{FakeBackend, Fault, Personality, Settings, Verbatim};
use breakeven::economics::{NanoUsd, Usage};
use breakeven::ledger::UsageSource;
use bytes::Bytes;
use serde_json::{Value, json};

use super::{API_MODEL, OWN_MODEL, between, streamed, streamed_with_usage};
use crate::support::proxy::Proxy;
use crate::support::{Http, chat, with};

/// gpt-4o-mini's list price: 0.15, 0.075 cached, 0.60 USD per million tokens.
fn price_of(usage: &Usage) -> NanoUsd {
    let fresh = usage.input_tokens - usage.cached_input_tokens;
    let pico = fresh * 150_000 + usage.cached_input_tokens * 75_000 + usage.output_tokens * 600_000;
    NanoUsd::from_pico(i128::from(pico))
}

#[tokio::test]
async fn every_endpoint_is_billed_for_what_it_produced() {
    let between = between().await;
    let chat = chat(API_MODEL);
    let calls: [(&str, Value); 8] = [
        ("/chat/completions", chat.clone()),
        ("/chat/completions", streamed(API_MODEL)),
        ("/chat/completions", streamed_with_usage(API_MODEL)),
        ("/chat/completions", with(chat, json!({"n": 3}))),
        ("/completions", json!({"model": API_MODEL, "prompt": "Once upon", "max_tokens": 5})),
        ("/completions", json!({"model": API_MODEL, "prompt": "Once upon", "max_tokens": 5, "stream": true})),
        ("/responses", json!({"model": API_MODEL, "input": "Hello there"})),
        ("/responses", json!({"model": API_MODEL, "input": "Hello there", "stream": true})),
    ];
    between.api.set(|settings| {
        settings.cached_input_tokens = 4;
        settings.reasoning_tokens = 3;
    });
    for (path, body) in calls {
        between.http.post(path, &body).await;
        let truth = between.api.produced().last().unwrap().usage;
        let entry = between.proxy.entries().await.remove(0);
        assert_eq!(entry.usage, truth, "{path} {body}");
        assert_eq!(entry.cost, price_of(&truth), "{path} {body}");
        assert_eq!(entry.usage_source, UsageSource::UpstreamUsage);
    }
}

#[tokio::test]
async fn embeddings_are_billed_by_their_input() {
    let between = between().await;
    between
        .http
        .post("/embeddings", &json!({"model": "text-embedding-3-small", "input": ["one two", "three"]}))
        .await;
    let entry = between.proxy.entries().await.remove(0);
    assert_eq!(entry.usage, Usage::new(3, 0));
    assert_eq!(entry.cost, NanoUsd::from_nanos(60));
}

#[tokio::test]
async fn usage_is_taken_from_wherever_the_server_puts_it() {
    for fault in [Fault::UsageInMidStream, Fault::UsageWithChoices] {
        let between = between().await;
        between.own.fail_next(1, &fault);
        between.http.post("/chat/completions", &streamed(OWN_MODEL)).await;
        let entry = between.proxy.entries().await.remove(0);
        assert_eq!(entry.usage, between.own.produced()[0].usage, "{fault:?}");
        assert_eq!(entry.usage_source, UsageSource::UpstreamUsage, "{fault:?}");
    }
}

#[tokio::test]
async fn a_stream_without_usage_is_metered_by_the_own_tokenizer_and_says_so() {
    let between = between().await;
    between.api.fail_next(1, &Fault::NoUsage);
    between.http.post("/chat/completions", &streamed(API_MODEL)).await;
    let entry = between.proxy.entries().await.remove(0);
    assert_eq!(entry.usage_source, UsageSource::OwnTokenizer);
    assert_eq!(entry.usage, between.api.produced()[0].usage);
}

#[tokio::test]
async fn an_answer_without_usage_is_estimated_and_says_so() {
    let between = between().await;
    between.api.fail_next(1, &Fault::NoUsage);
    between.http.post("/chat/completions", &chat(API_MODEL)).await;
    let entry = between.proxy.entries().await.remove(0);
    assert_ne!(entry.usage_source, UsageSource::UpstreamUsage);
    assert!(entry.usage.input_tokens > 0 && entry.usage.output_tokens > 0, "{:?}", entry.usage);
}

/// A proxy before a fake llama.cpp, whose server is told apart by its name.
async fn before_llama_cpp() -> (FakeBackend, Proxy) {
    let settings = Settings { output_tokens: 12, ..Settings::default() };
    let llama = FakeBackend::start(Personality::LlamaCpp, settings).await.unwrap();
    let config = format!(
        "[backends.llama]\nkind = \"self_hosted\"\nserver = \"llama_cpp\"\nbase_url = \"{}\"\n\
         hourly_usd = 1.0\nbilling = \"committed\"\n\
         capacity = {{ input_tokens_per_second = 1000, output_tokens_per_second = 100, max_in_flight = 4 }}\n\
         [routes.chat]\nmodels = [\"{OWN_MODEL}\"]\noffers = [{{ backend = \"llama\", model = \"tiny-llama\" }}]\n",
        llama.url()
    );
    (llama, Proxy::start(&config).await.ready().await)
}

#[tokio::test]
async fn usage_that_llama_cpp_reports_choice_by_choice_is_summed() {
    let (llama, proxy) = before_llama_cpp().await;
    let http = Http::new(&proxy.url());
    for body in [streamed(OWN_MODEL), streamed_with_usage(OWN_MODEL)] {
        for choices in [1, 3] {
            let reply = http.post("/chat/completions", &with(body.clone(), json!({"n": choices}))).await;
            let truth = llama.produced().last().unwrap().usage;
            assert_eq!(truth.output_tokens % choices, 0);
            let entry = proxy.entries().await.remove(0);
            assert_eq!((entry.usage, entry.usage_source), (truth, UsageSource::UpstreamUsage), "{choices}");
            let chunks = reply.text().matches("\"usage\"").count();
            let asked = body.get("stream_options").is_some();
            assert_eq!(chunks, if asked { usize::try_from(choices).unwrap() } else { 0 }, "{}", reply.text());
        }
    }
}

#[tokio::test]
async fn an_answer_of_several_choices_whose_usage_is_that_of_one_is_estimated() {
    let (llama, proxy) = before_llama_cpp().await;
    let http = Http::new(&proxy.url());
    http.post("/chat/completions", &with(chat(OWN_MODEL), json!({"n": 3}))).await;
    let entry = proxy.entries().await.remove(0);
    assert_eq!((entry.usage, entry.usage_source), (llama.produced()[0].usage, UsageSource::Estimate));
    http.post("/chat/completions", &chat(OWN_MODEL)).await;
    let entry = proxy.entries().await.remove(0);
    assert_eq!((entry.usage, entry.usage_source), (llama.produced()[1].usage, UsageSource::UpstreamUsage));
}

#[tokio::test]
async fn cumulative_usage_of_other_servers_is_not_summed() {
    let stream = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":25,\"completion_tokens\":4,\"total_tokens\":29}}\n\n\
                  data: {\"choices\":[{\"index\":1,\"delta\":{\"content\":\"b\"}}]}\n\n\
                  data: {\"choices\":[],\"usage\":{\"prompt_tokens\":25,\"completion_tokens\":6,\"total_tokens\":31}}\n\n\
                  data: [DONE]\n\n";
    let between = between().await;
    between.own.set(|settings| {
        let body = Bytes::from_static(stream.as_bytes());
        settings.verbatim = Some(Verbatim { content_type: "text/event-stream", body });
    });
    between.http.post("/chat/completions", &with(streamed(OWN_MODEL), json!({"n": 2}))).await;
    let usage = between.proxy.entries().await.remove(0).usage;
    assert_eq!(usage, Usage::new(25, 6));
}

#[tokio::test]
async fn a_call_knows_what_it_would_have_cost_on_the_other_side() {
    let between = between().await;
    between.http.post("/chat/completions", &chat(OWN_MODEL)).await;
    let entry = between.proxy.entries().await.remove(0);
    assert_eq!(entry.backend, "gpu");
    assert_eq!(entry.api_cost, Some(price_of(&entry.usage)));
    assert_eq!(entry.self_hosted_cost, Some(entry.cost));
}

#[tokio::test]
async fn calls_that_are_passed_through_are_metered_when_they_report_usage() {
    let between = between().await;
    let Settings { output_tokens, .. } = Settings::default();
    assert!(output_tokens > 0);
    between.http.post("/images/generations", &json!({"model": "gpt-image-1", "prompt": "a house"})).await;
    let entry = between.proxy.entries().await.remove(0);
    assert_eq!(entry.usage.output_tokens, 272);
}

#[tokio::test]
async fn sums_over_a_hundred_mixed_calls_equal_what_was_produced() {
    let between = between().await;
    let mut calls = tokio::task::JoinSet::new();
    for number in 0..100_u64 {
        let model = if number % 2 == 0 { API_MODEL } else { OWN_MODEL };
        let body = if number % 3 == 0 { streamed(model) } else { chat(model) };
        let (http, body) = (between.http.clone(), with(body, json!({"max_tokens": number % 7 + 1})));
        calls.spawn(async move { http.post("/chat/completions", &body).await.status.as_u16() });
    }
    while let Some(status) = calls.join_next().await {
        assert_eq!(status.unwrap(), 200);
    }
    let entries = between.proxy.entries().await;
    assert_eq!(entries.len(), 100);
    let billed = entries.iter().fold(Usage::default(), |sum, entry| sum + entry.usage);
    assert_eq!(billed, between.api.totals().usage + between.own.totals().usage);
}
