//! What each step of a call costs by itself: `cargo bench --bench hot_path`.

use std::borrow::Cow;
use std::hint::black_box;
use std::sync::Arc;

use breakeven::clock::{Clock, Stopwatch};
use breakeven::config::{self, BudgetPeriod};
use breakeven::economics::{NanoUsd, Tier, Usage};
use breakeven::gateway::{Circumstances, Gateway, Route, choose};
use breakeven::keys::Keys;
use breakeven::keys::admission::Bounds;
use breakeven::keys::secret::Digest;
use breakeven::keys::store::{Record, Store, path_beside};
use breakeven::ledger::{Ledger, Outcome};
use breakeven::openai::usage::{self, Reported};
use breakeven::openai::{Call, Change, Endpoint, StreamReader, tokenizer};
use breakeven::proxy::bill;
use breakeven::proxy::exchange::{Caller, Exchange};
use bytes::Bytes;
use divan::{Bencher, counter::BytesCount};
use serde_json::Value;
use serde_json::value::RawValue;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const SIZES: [usize; 3] = [1024, 16 * 1024, 200 * 1024];
const EVENTS_PER_READ: [usize; 3] = [1, 12, 200];

const ANSWER: &str = r#"{"id":"chatcmpl-1","object":"chat.completion","created":1732000000,"model":"gpt-4o-mini-2024-07-18","choices":[{"index":0,"message":{"role":"assistant","content":"CONTENT","refusal":null},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":231,"completion_tokens":128,"total_tokens":359,"prompt_tokens_details":{"cached_tokens":0,"audio_tokens":0},"completion_tokens_details":{"reasoning_tokens":0,"audio_tokens":0}},"service_tier":"default"}"#;

const EVENT: &str = r#"data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1732000000,"model":"gpt-4o-mini-2024-07-18","system_fingerprint":"fp_0123456789","choices":[{"index":0,"delta":{"content":" the quick brown fox, so it goes"},"logprobs":null,"finish_reason":null}]}"#;

const CONFIG: &str = r#"
[backends.openai]
kind = "api"
base_url = "http://127.0.0.1:9/v1"

[backends.gpu]
kind = "self_hosted"
base_url = "http://127.0.0.1:9/v1"
hourly_usd = 2.99
capacity = { input_tokens_per_second = 15000, output_tokens_per_second = 10000, max_in_flight = 8192 }

[routes.chat]
models = ["gpt-4o-mini"]
policy = "cheapest"
offers = [{ backend = "openai" }, { backend = "gpu", model = "meta-llama/Llama-3.1-8B-Instruct" }]
"#;

fn main() {
    divan::main();
}

/// A request of about so many bytes: one message for each 2 KB.
fn request(length: usize) -> Bytes {
    let sentence = "The quarterly report says \\\"costs fell\\\" by 12.5% — mostly for café supplies.\\n";
    let messages: Vec<String> = (0..length.div_ceil(2048))
        .map(|_| {
            let text = sentence.repeat(length.min(2048) / sentence.len());
            format!(r#"{{"role":"user","content":"{text}"}}"#)
        })
        .collect();
    format!(
        r#"{{"messages":[{}],"model":"gpt-4o-mini","max_tokens":256,"temperature":0.7}}"#,
        messages.join(",")
    )
    .into()
}

fn answer() -> Bytes {
    ANSWER.replace("CONTENT", &"Some words of an answer. ".repeat(24)).into()
}

fn reported() -> Reported {
    usage::from_body(Endpoint::ChatCompletions, &answer()).expect("the answer has usage")
}

struct Bench {
    gateway: Arc<Gateway>,
    route: Arc<Route>,
    call: Call,
    body: Bytes,
}

impl Bench {
    fn new(ledger: Ledger) -> Self {
        let config = config::parse(CONFIG, "bench.toml", &|_| None).expect("the configuration is valid");
        let gateway = Gateway::new(Arc::new(config), Clock::system(), ledger).expect("URLs are valid");
        let body = request(1024);
        let call = Call::read(Endpoint::ChatCompletions, &body).expect("the request is valid");
        let route = gateway.state().route_of(&call.model).expect("the model is on a route").clone();
        Self { gateway, route, call, body }
    }

    /// An exchange in the state that it has when an answer is there.
    fn exchange(&self) -> Box<Exchange> {
        let presence = self.gateway.enter(usize::MAX).expect("nothing is in flight");
        let state = self.gateway.state();
        let endpoint = Endpoint::ChatCompletions;
        let mut exchange = Exchange::open(
            self.gateway.clone(),
            state,
            endpoint,
            Caller::default(),
            Stopwatch::start(),
            presence,
        );
        let choice = choose(exchange.state(), &self.route, &self.call, circumstances(&self.gateway));
        let choice = choice.expect("an offer can serve it");
        exchange.set_call(self.call.clone(), &self.body, Some(self.route.clone()), choice.reason);
        let first = choice.order[0];
        let backend = &self.route.offers[first].backend;
        let place = backend.acquire().expect("the backend has room");
        exchange.begin_attempt(backend, Some(first), place);
        exchange.set_status(200);
        exchange
    }
}

fn circumstances(gateway: &Gateway) -> Circumstances<'static> {
    Circumstances { wanted: None, home: None, dice: 0.5, now: gateway.now() }
}

#[divan::bench(args = SIZES)]
fn conversation(bencher: Bencher<'_, '_>, length: usize) {
    let body = request(length);
    let call = Call::read(Endpoint::ChatCompletions, &body).expect("the request is valid");
    bencher.bench(|| call.conversation(black_box(&body)));
}

#[divan::bench(args = SIZES)]
fn read_call(bencher: Bencher<'_, '_>, length: usize) {
    let body = request(length);
    let bencher = bencher.counter(BytesCount::new(body.len()));
    bencher.bench(|| Call::read(Endpoint::ChatCompletions, black_box(&body)));
}

/// What a request says of itself, by a parser that borrows the text.
#[derive(serde::Deserialize)]
#[expect(dead_code, reason = "made, not looked at")]
struct Parsed<'a> {
    #[serde(borrow)]
    model: Cow<'a, str>,
    stream: Option<bool>,
    max_tokens: Option<u64>,
    #[serde(borrow)]
    messages: Vec<&'a RawValue>,
}

/// What `read_call` would cost with `serde_json`.
#[divan::bench(args = SIZES)]
fn parse_call_with_serde_json(bencher: Bencher<'_, '_>, length: usize) {
    let body = request(length);
    let bencher = bencher.counter(BytesCount::new(body.len()));
    bencher.bench(|| serde_json::from_slice::<Parsed<'_>>(black_box(&body)).map(drop));
}

#[divan::bench(args = SIZES)]
fn rename_model(bencher: Bencher<'_, '_>, length: usize) {
    let body = request(length);
    let call = Call::read(Endpoint::ChatCompletions, &body).expect("the request is valid");
    let change = Change { model: Some("meta-llama/Llama-3.1-8B"), ..Change::default() };
    bencher.bench(|| call.rewrite(black_box(&body), &change));
}

#[divan::bench]
fn route(bencher: Bencher<'_, '_>) {
    let bench = Bench::new(Ledger::off());
    let state = bench.gateway.state();
    bencher.bench(|| {
        let route = state.route_of(black_box("gpt-4o-mini")).expect("the model is on a route");
        choose(&state, route, &bench.call, circumstances(&bench.gateway))
    });
}

/// Events that one read brought, watched together.
#[divan::bench(args = EVENTS_PER_READ)]
fn watch_events(bencher: Bencher<'_, '_>, events: usize) {
    let piece = Bytes::from(format!("{EVENT}\n\n").repeat(events));
    let bencher = bencher.counter(BytesCount::new(piece.len()));
    let mut reader = StreamReader::new(Endpoint::ChatCompletions, true);
    bencher.bench_local(|| reader.push(black_box(piece.clone())));
}

#[divan::bench]
fn usage_of_answer(bencher: Bencher<'_, '_>) {
    let answer = answer();
    bencher.bench(|| usage::from_body(Endpoint::ChatCompletions, black_box(&answer)));
}

#[divan::bench]
fn price(bencher: Bencher<'_, '_>) {
    let bench = Bench::new(Ledger::off());
    let state = bench.gateway.state();
    let usage = Usage::new(231, 128);
    bencher.bench(|| {
        let served = &bench.route.offers[0];
        bill::bill(&state.config, &bench.route, served, "gpt-4o-mini", black_box(&usage), Tier::Standard)
    });
}

#[divan::bench(args = SIZES)]
fn count_tokens(bencher: Bencher<'_, '_>, length: usize) {
    let body = request(length);
    let bencher = bencher.counter(BytesCount::new(body.len()));
    bencher.bench(|| tokenizer::count_call("gpt-4o-mini", Endpoint::ChatCompletions, black_box(&body)));
}

/// The same text without its JSON and its messages: the tokenizer's own speed.
#[divan::bench(args = SIZES)]
fn count_tokens_of_text(bencher: Bencher<'_, '_>, length: usize) {
    let body: Value = serde_json::from_slice(&request(length)).expect("the request is JSON");
    let messages = body["messages"].as_array().expect("the request has messages");
    let text: String = messages.iter().filter_map(|message| message["content"].as_str()).collect();
    let bencher = bencher.counter(BytesCount::new(text.len()));
    bencher.bench(|| bpe_openai::o200k_base().count(black_box(&text)));
}

/// From an open record to bill and metrics, without a ledger.
#[divan::bench]
fn settle(bencher: Bencher<'_, '_>) {
    settle_with(bencher, Ledger::off());
}

/// The same with the row in the journal.
#[divan::bench]
fn settle_with_ledger(bencher: Bencher<'_, '_>) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let settings = config::LedgerSettings {
        path: directory.path().join("bench.db"),
        fsync: config::Fsync::Batch,
        when_unavailable: config::WhenUnavailable::Refuse,
        postgres: None,
    };
    let ledger = Ledger::open(&settings, Clock::system()).expect("the ledger opens");
    settle_with(bencher, ledger);
}

fn settle_with(bencher: Bencher<'_, '_>, ledger: Ledger) {
    let (bench, reported, answer) = (Bench::new(ledger), reported(), answer());
    bencher
        .with_inputs(|| bench.exchange())
        .bench_values(|exchange| exchange.settle_unary(Outcome::Success, Some(&reported), &answer));
}

/// Everything before the answer but reading and sending.
#[divan::bench]
fn open_route_and_begin(bencher: Bencher<'_, '_>) {
    let bench = Bench::new(Ledger::off());
    bencher.bench(|| {
        // Leaving it to drop would book it.
        std::mem::ManuallyDrop::new(bench.exchange())
    });
}

#[divan::bench]
fn request_id() -> uuid::Uuid {
    uuid::Uuid::now_v7()
}

/// Finding a virtual key by its secret and admitting a call to its budget and its limits, then settling it.
#[divan::bench(args = [1, 100, 10_000])]
fn admit_with_a_key_among(bencher: Bencher<'_, '_>, keys: usize) {
    let folder = tempfile::tempdir().expect("there is a temporary folder");
    let text = format!(
        "[auth]\nmode = \"keys\"\n[ledger]\npath = \"{}\"\n{}",
        folder.path().join("breakeven.db").display(),
        CONFIG.replacen("kind = \"api\"", "kind = \"api\"\napi_key = { env = \"KEY\" }", 1)
    );
    let config = config::parse(&text, "bench", &|_| Some("sk-owner".to_owned())).expect("it is right");
    let store = Store::open(&path_beside(&config.ledger.path)).expect("the file can be made");
    let now = Clock::system().now();
    let secret = |number: usize| format!("sk-be-{number:043}");
    for number in 0..keys {
        let key = Record {
            id: format!("key_{number}"),
            digest: Digest::of(secret(number).as_bytes()),
            name: String::new(),
            team: String::new(),
            budget: Some((NanoUsd::from_nanos(i64::MAX / 2), BudgetPeriod::Month)),
            requests_per_minute: Some(u64::MAX >> 1),
            tokens_per_minute: Some(u64::MAX >> 1),
            routes: Vec::new(),
            backends: Vec::new(),
            created_at: now,
            expires_at: None,
            revoked_at: None,
        };
        store.insert(&key).expect("it is new");
    }
    let live = Keys::default();
    live.refresh(&config, now).expect("the keys can be read");
    let secrets: Vec<String> = (0..keys).map(secret).collect();
    let mut next = 0;
    bencher.bench_local(|| {
        next = (next + 1) % keys;
        let key = live.find(secrets[next].as_bytes(), now).expect("it is in force");
        let bounds = Bounds { cost: NanoUsd::from_nanos(1000), tokens: 100 };
        let (mut admission, _) = live.admit(Some(&key), ("", "chat"), bounds, now).expect("there is enough");
        admission.settle(NanoUsd::from_nanos(900), 90, now);
    });
}
