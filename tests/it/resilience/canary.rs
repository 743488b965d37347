//! A secret and a prompt that must be found upstream and nowhere else.

use std::path::Path;
use std::time::Duration;

use breakeven::demo::{FakeBackend, Fault, Personality, Settings};
use breakeven::proxy::headers::Head;
use breakeven::upstream::send::Outgoing;
use bytes::Bytes;
use http::Method;
use serde_json::json;
use tempfile::TempDir;

use super::{LEDGER, Served};
use crate::support::postgres::Postgres;
use crate::support::redis::Redis;
use crate::support::{Http, chat, soon, with};

const CLIENT_KEY: &str = "sk-canary-client-7f3a9c";
const OWN_KEY: &str = "sk-canary-configured-5d2e81";
const ADMIN_TOKEN: &str = "canary-admin-token-c41b06";
const REDIS_PASSWORD: &str = "canary-redis-6be0d4";
const POSTGRES_PASSWORD: &str = "canary-postgres-1f97c2";
const WEBHOOK_SECRET: &str = "canary-webhook-a3850e";
const PROMPT: &str = "the-canary-sings-at-dawn-90aa17";
const MODEL: &str = "gpt-4o-mini";

fn with_prompt(model: &str) -> serde_json::Value {
    with(chat(model), json!({"messages": [{"role": "user", "content": PROMPT}], "user": PROMPT}))
}

fn read_all(folder: &Path, found: &mut Vec<(String, Vec<u8>)>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            read_all(&path, found);
        } else if path.file_name().is_some_and(|name| name != "breakeven.toml") {
            found.push((path.display().to_string(), std::fs::read(&path).unwrap()));
        }
    }
}

/// Calls of every kind that can go well or wrong; what the client is answered when it is not the answer.
async fn provoke(
    served: &Served,
    api: &FakeBackend,
    own: &FakeBackend,
    client_key: &str,
) -> Vec<(String, Vec<u8>)> {
    let http = Http::new(&served.url());
    let request = |method: Method, path: &str| {
        http.request(method, path)
            .header("content-type", "application/json")
            .header("authorization", format!("Bearer {client_key}"))
    };
    let mut answers = Vec::new();
    let mut post = async |path: &str, body: String| {
        let reply = http.send(request(Method::POST, path), Bytes::from(body)).await;
        answers.push((format!("answer to {path}"), reply.body.to_vec()));
        reply.status.as_u16()
    };
    for stream in [false, true] {
        for model in [MODEL, "house-model"] {
            let body = with(with_prompt(model), json!({"stream": stream}));
            assert_eq!(post("/chat/completions", body.to_string()).await, 200);
        }
    }
    let faults =
        [Fault::Status(500), Fault::ResetBeforeHeaders, Fault::ResetAfter(2), Fault::ErrorEventAfter(1)];
    for fault in &faults {
        api.set(|settings| settings.faults = vec![fault.clone()]);
        own.set(|settings| settings.faults = vec![fault.clone()]);
        for stream in [false, true] {
            let body = with(with_prompt("house-model"), json!({"stream": stream}));
            post("/chat/completions", body.to_string()).await;
        }
    }
    api.set(|settings| settings.faults.clear());
    own.set(|settings| settings.faults.clear());
    let whole = with_prompt(MODEL).to_string();
    post("/chat/completions", whole[..whole.len() - 9].to_owned()).await;
    post("/chat/completions", with(with_prompt(MODEL), json!({"model": [PROMPT]})).to_string()).await;
    post("/chat/completions", with(with_prompt(MODEL), json!({"max_tokens": PROMPT})).to_string()).await;
    post("/chat/completions", with(with_prompt(MODEL), json!({"model": null})).to_string()).await;
    post("/responses", json!({"model": MODEL, "input": PROMPT}).to_string()).await;
    post("/embeddings", json!({"model": "text-embedding-3-small", "input": PROMPT}).to_string()).await;
    post("/moderations", json!({"input": PROMPT}).to_string()).await;
    post("/nowhere", json!({"prompt": PROMPT}).to_string()).await;
    answers
}

/// What has secrets besides the listeners and the backends.
struct More {
    folder: TempDir,
    /// What clients show.
    client_key: String,
    /// Lines of `[ledger]`, and sections.
    ledger: String,
    sections: String,
    environment: Vec<(&'static str, String)>,
}

async fn nothing_leaks(format: &str, more: impl FnOnce(&FakeBackend) -> More) -> String {
    let settings = Settings { api_key: Some(OWN_KEY.into()), ..Settings::default() };
    let api = FakeBackend::start(Personality::OpenAi, settings).await.unwrap();
    let own = FakeBackend::start(Personality::Vllm, Settings::default()).await.unwrap();
    let More { folder, client_key, ledger, sections, environment } = more(&own);
    let config = format!(
        r#"
        {ledger}
        [log]
        filter = "trace"
        format = "{format}"
        [backends.openai]
        kind = "api"
        base_url = "{}"
        api_key = {{ env = "CANARY_KEY" }}
        [backends.gpu]
        kind = "self_hosted"
        base_url = "{}"
        hourly_usd = 2.99
        billing = "committed"
        capacity = {{ input_tokens_per_second = 15000, output_tokens_per_second = 10000, max_in_flight = 8 }}
        circuit = {{ failures = 100, open_for = "10ms" }}
        [routes.chat]
        models = ["{MODEL}"]
        policy = "api"
        offers = [{{ backend = "openai" }}]
        [routes.own]
        models = ["house-model"]
        policy = "self_hosted"
        offers = [{{ backend = "gpu", model = "llama" }}, {{ backend = "openai", model = "{MODEL}" }}]
        {sections}
        "#,
        api.url(),
        own.url()
    );
    let mut environment: Vec<_> = environment.iter().map(|(name, value)| (*name, value.as_str())).collect();
    environment.extend([("CANARY_KEY", OWN_KEY), ("CANARY_TOKEN", ADMIN_TOKEN)]);
    let token = "admin_token = { env = \"CANARY_TOKEN\" }";
    let mut served = Served::start_in(folder, token, &config, &environment).await;
    let mut found = provoke(&served, &api, &own, &client_key).await;
    if sections.contains("[backends.hooked]") {
        let signed = async || {
            let calls = own.calls();
            calls.iter().any(|call| !call.header("x-breakeven-signature").is_empty()).then_some(())
        };
        assert!(soon(Duration::from_secs(20), signed).await.is_some(), "no order: {}", served.log());
    }

    let admin = Http::new(&served.admin_url());
    for path in
        ["/metrics", "/api/status", "/api/spend", "/api/spend?by=nonsense", "/readyz", "/", "/api/nothing"]
    {
        let with_token =
            admin.request(Method::GET, path).header("authorization", format!("Bearer {ADMIN_TOKEN}"));
        let reply = admin.send(with_token, Bytes::new()).await;
        assert_ne!(reply.status, 401, "{path}");
        found.push((path.to_owned(), reply.body.to_vec()));
        let without = admin.get(path).await;
        found.push((format!("{path} without a token"), without.body.to_vec()));
    }
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", served.process())).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "a crash leaves no memory behind: {core}");
    served.signal("-TERM");
    assert!(
        tokio::time::timeout(Duration::from_secs(30), served.child.wait()).await.unwrap().unwrap().success()
    );
    read_all(served.folder.path(), &mut found);

    assert!(found.iter().any(|(name, content)| name.ends_with("/log") && content.len() > 1000));
    assert!(found.iter().any(|(name, content)| name.ends_with("breakeven.db") && content.len() > 4096));
    for (name, content) in &found {
        let others = [OWN_KEY, ADMIN_TOKEN, REDIS_PASSWORD, POSTGRES_PASSWORD, WEBHOOK_SECRET, PROMPT];
        for canary in others.into_iter().chain([client_key.as_str()]) {
            let at = memchr::memmem::find(content, canary.as_bytes());
            assert!(at.is_none(), "{canary} is in {name}: {}", String::from_utf8_lossy(content));
        }
    }
    let calls = own.calls();
    assert!(calls.iter().any(|call| memchr::memmem::find(&call.body, PROMPT.as_bytes()).is_some()));
    assert!(
        calls.iter().all(|call| call.header("authorization").is_empty()),
        "a key went to the other backend"
    );
    assert!(api.calls().iter().all(|call| call.header("authorization") == format!("Bearer {OWN_KEY}")));
    served.log()
}

/// What a debugger, a careless log line or a crash report would print of the whole state, with a call under way.
#[tokio::test]
async fn the_printed_state_holds_neither_secrets_nor_prompts() {
    let settings = Settings { api_key: Some(OWN_KEY.into()), ..Settings::default() };
    let api = FakeBackend::start(Personality::OpenAi, settings).await.unwrap();
    let secrets = tempfile::tempdir().unwrap();
    let file = secrets.path().join("key");
    std::fs::write(&file, OWN_KEY).unwrap();
    let config = format!(
        "[backends.openai]\nkind = \"api\"\nbase_url = \"{}\"\napi_key = {{ file = \"{}\" }}\n\
         headers = {{ X-Api-Key = {{ file = \"{1}\" }} }}\n\
         [routes.chat]\nmodels = [\"{MODEL}\"]\npolicy = \"api\"\noffers = [{{ backend = \"openai\" }}]\n",
        api.url(),
        file.display()
    );
    let proxy = crate::support::proxy::Proxy::start(&config).await;
    api.set(|settings| settings.time_per_output_token = Duration::from_mins(1));
    let http = Http::new(&proxy.url());
    let mut events = crate::support::Events::of(
        http.open("/chat/completions", &with(with_prompt(MODEL), json!({"stream": true}))).await,
    );
    events.next().await.unwrap();
    let printed = format!("{:?} {:?}", proxy.running, proxy.running.gateway.state());
    assert!(printed.len() > 2000 && printed.contains("openai"));
    let mut headers = http::HeaderMap::new();
    headers.insert("authorization", CLIENT_KEY.parse().unwrap());
    let request = Outgoing {
        method: Method::POST,
        path_and_query: format!("/v1/chat/completions?api-key={CLIENT_KEY}"),
        head: Head::new(headers),
        body: PROMPT.into(),
    };
    let printed = format!("{printed} {request:?} {:?}", request.head);
    for canary in [OWN_KEY, CLIENT_KEY, PROMPT] {
        assert!(!printed.contains(canary), "{canary} is in {printed}");
    }
}

#[tokio::test]
async fn secrets_and_prompts_are_nowhere_but_upstream_with_text_logs_and_a_webhook() {
    let more = |own: &FakeBackend| More {
        folder: tempfile::tempdir().unwrap(),
        client_key: CLIENT_KEY.to_owned(),
        ledger: String::new(),
        sections: format!(
            r#"
            [policy]
            slot = "1s"
            [backends.hooked]
            kind = "self_hosted"
            base_url = "http://127.0.0.1:1/v1"
            hourly_usd = 2.99
            capacity = {{ input_tokens_per_second = 15000, output_tokens_per_second = 10000, max_in_flight = 8 }}
            control = {{ kind = "webhook", url = "{}/orders", secret = {{ env = "CANARY_WEBHOOK" }} }}
            [routes.hooked]
            models = ["hooked-model"]
            policy = "self_hosted"
            offers = [{{ backend = "hooked" }}]
            "#,
            own.url()
        ),
        environment: vec![("CANARY_WEBHOOK", WEBHOOK_SECRET.to_owned())],
    };
    nothing_leaks("text", more).await;
}

/// With real servers where they are installed, else with ones that are away.
#[tokio::test]
async fn secrets_and_prompts_are_nowhere_but_upstream_with_json_logs_and_many_proxies() {
    let redis = if Redis::is_installed() {
        Some(Redis::start_with(|_, _| vec!["--requirepass".into(), REDIS_PASSWORD.into()]).await)
    } else {
        None
    };
    let postgres = if Postgres::is_installed() { Some(Postgres::start().await) } else { None };
    let at = redis.as_ref().map_or("127.0.0.1:1".to_owned(), |redis| redis.address().to_string());
    let port = postgres.as_ref().map_or(1, Postgres::port);
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("ledger")).unwrap();
    let (_, client_key) = crate::keys::make(&folder.path().join(LEDGER));
    let more = |_: &FakeBackend| More {
        folder,
        client_key,
        ledger: "postgres = { url = { env = \"CANARY_POSTGRES\" } }".to_owned(),
        sections: "[auth]\nmode = \"keys\"\n[shared]\nredis = { env = \"CANARY_REDIS\" }\n".to_owned(),
        environment: vec![
            ("CANARY_REDIS", format!("redis://:{REDIS_PASSWORD}@{at}/0")),
            ("CANARY_POSTGRES", format!("postgres://proxy:{POSTGRES_PASSWORD}@127.0.0.1:{port}/postgres")),
        ],
    };
    let log = nothing_leaks("json", more).await;
    assert_eq!(log.contains("volume and budgets are shared"), redis.is_some(), "{log}");
}
