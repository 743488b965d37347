//! Counts for a self-hosted server that reports no usage, with the tokenizer that came with its model.

use std::path::{Path, PathBuf};

use breakeven::demo::{FakeBackend, Fault, Personality, Settings};
use breakeven::ledger::{Entry, UsageSource};
use breakeven::openai::tokenizer::FileTokenizer;

use super::{OWN_MODEL, streamed};
use crate::support::proxy::Proxy;
use crate::support::{Events, Http, chat, read, spoken};

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tokens/tiny/tokenizer.json")
}

/// What is booked for a chat and a stream, each with the text that was spoken.
async fn calls(tokenizer: &Path) -> [(Entry<'static>, String); 2] {
    let settings = Settings { faults: vec![Fault::NoUsage], ..Settings::default() };
    let own = FakeBackend::start(Personality::Vllm, settings).await.unwrap();
    let config = format!(
        r#"
        [backends.gpu]
        kind = "self_hosted"
        base_url = "{}"
        hourly_usd = 2.99
        billing = "committed"
        capacity = {{ input_tokens_per_second = 15000, output_tokens_per_second = 10000, max_in_flight = 2 }}
        [routes.own]
        models = ["{OWN_MODEL}"]
        offers = [{{ backend = "gpu", model = "llama", tokenizer = "{}" }}]
        "#,
        own.url(),
        tokenizer.display()
    );
    let proxy = Proxy::start(&config).await.ready().await;
    let http = Http::new(&proxy.url());
    let unary = read(http.open("/chat/completions", &chat(OWN_MODEL)).await).await.json();
    let unary = unary["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    let first = proxy.entries().await.remove(0);
    let (events, _) = Events::of(http.open("/chat/completions", &streamed(OWN_MODEL)).await).rest().await;
    let second = proxy.entries().await.remove(0);
    [(first, unary), (second, spoken(&events))]
}

#[tokio::test]
async fn a_models_own_tokenizer_counts_what_its_server_does_not() {
    let tokenizer = FileTokenizer::read(&std::fs::read(tiny()).unwrap()).unwrap();
    for (entry, text) in calls(&tiny()).await {
        assert_eq!(entry.usage_source, UsageSource::OwnTokenizer);
        assert_eq!(entry.usage.output_tokens, tokenizer.count(&text), "{text}");
        let prompt = tokenizer.count("user") + tokenizer.count("What is the right time?");
        assert_eq!(entry.usage.input_tokens, prompt + 3 + 3, "the recipe's framing");
    }
}

#[tokio::test]
async fn a_file_that_is_no_tokenizer_leaves_an_estimate() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "{}").unwrap();
    for (entry, _) in calls(file.path()).await {
        assert_eq!(entry.usage_source, UsageSource::Estimate);
        assert!(entry.usage.input_tokens > 0 && entry.usage.output_tokens > 0, "{:?}", entry.usage);
    }
}
