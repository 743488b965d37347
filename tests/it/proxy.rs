//! The proxy between two fake servers, over real sockets.

mod attempts;
mod bodies;
mod canned;
mod captures;
mod clients;
mod conversations;
mod dialects;
mod disconnects;
mod encodings;
mod endpoints;
mod failures;
mod metering;
mod routing;
mod tokenizers;
mod wire;

use breakeven::demo::{FakeBackend, Personality, Settings};
use serde_json::{Value, json};

use crate::support::proxy::Proxy;
use crate::support::{Http, chat, with};

/// The model that the API serves alone.
const API_MODEL: &str = "gpt-4o-mini";
/// The model that the self-hosted backend serves first, the API if it must.
const OWN_MODEL: &str = "house-model";
/// Its name at the self-hosted backend.
const OWN_NAME: &str = "meta-llama/Llama-3.1-8B-Instruct";

/// A proxy between a fake OpenAI and a fake vLLM.
struct Between {
    api: FakeBackend,
    own: FakeBackend,
    proxy: Proxy,
    http: Http,
}

async fn between() -> Between {
    between_with("").await
}

/// With more lines at the top of the config.
async fn between_with(config: &str) -> Between {
    between_backends(config, "", "").await
}

/// With more lines in the sections of the API and of the self-hosted backend.
async fn between_backends(config: &str, api_lines: &str, own_lines: &str) -> Between {
    let settings = Settings { output_tokens: 12, ..Settings::default() };
    let api = FakeBackend::start(Personality::OpenAi, settings.clone()).await.unwrap();
    let own = FakeBackend::start(Personality::Vllm, settings).await.unwrap();
    let config = format!(
        r#"{config}
        [backends.openai]
        kind = "api"
        base_url = "{api}"
        {api_lines}

        [backends.gpu]
        kind = "self_hosted"
        base_url = "{own}"
        hourly_usd = 2.99
        billing = "committed"
        capacity = {{ input_tokens_per_second = 15000, output_tokens_per_second = 10000, max_in_flight = 2 }}
        {own_lines}

        [routes.api]
        models = ["{API_MODEL}"]
        policy = "api"
        offers = [{{ backend = "openai" }}]

        [routes.own]
        models = ["{OWN_MODEL}"]
        policy = "self_hosted"
        offers = [{{ backend = "gpu", model = "{OWN_NAME}" }}, {{ backend = "openai", model = "{API_MODEL}" }}]
        "#,
        api = api.url(),
        own = own.url(),
    );
    let proxy = Proxy::start(&config).await.ready().await;
    let http = Http::new(&proxy.url());
    Between { api, own, proxy, http }
}

fn streamed(model: &str) -> Value {
    with(chat(model), json!({"stream": true}))
}

fn streamed_with_usage(model: &str) -> Value {
    with(streamed(model), json!({"stream_options": {"include_usage": true}}))
}
