//! Virtual keys and budgets, through a running proxy.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use breakeven::cli::{Cli, Command};
use breakeven::clock::Clock;
use breakeven::commands::keys;
use breakeven::config::{self, BudgetPeriod};
use breakeven::demo::{FakeBackend, Personality, Settings};
use breakeven::economics::{NanoUsd, Timestamp};
use breakeven::keys::store::{Store, path_beside};
use bytes::Bytes;
use clap::Parser as _;
use http::{Method, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{Http, Reply, chat, with};

const MODEL: &str = "gpt-4o-mini";
const OWN_MODEL: &str = "house-model";
/// The variable that holds the owner's key of the API.
const API_KEY: &str = "OWNERS_KEY";

/// A proxy that asks for virtual keys, and a folder with its ledger, which outlives it.
struct House {
    api: FakeBackend,
    own: FakeBackend,
    folder: TempDir,
    clock: Clock,
    lines: String,
    proxy: Option<breakeven::commands::serve::Proxy>,
}

impl House {
    async fn open(lines: &str) -> Self {
        Self::open_at(lines, Clock::system()).await
    }

    async fn open_at(lines: &str, clock: Clock) -> Self {
        let settings = Settings { output_tokens: 12, ..Settings::default() };
        let api = FakeBackend::start(Personality::OpenAi, settings.clone()).await.unwrap();
        let own = FakeBackend::start(Personality::Vllm, settings).await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        let mut house = Self { api, own, folder, clock, lines: lines.to_owned(), proxy: None };
        house.start().await;
        house
    }

    fn ledger(&self) -> PathBuf {
        self.folder.path().join("breakeven.db")
    }

    /// Starts the proxy, or starts it again on the same ledger.
    async fn start(&mut self) {
        if let Some(proxy) = self.proxy.take() {
            proxy.shut_down(std::future::pending()).await;
        }
        let text = format!(
            r#"
            [server]
            listen = "127.0.0.1:0"
            admin_listen = "127.0.0.1:0"
            workers = 1
            [ledger]
            path = "{ledger}"
            [backends.openai]
            kind = "api"
            base_url = "{api}"
            api_key = {{ env = "{API_KEY}" }}
            [backends.gpu]
            kind = "self_hosted"
            base_url = "{own}"
            hourly_usd = 2.99
            billing = "committed"
            capacity = {{ input_tokens_per_second = 15000, output_tokens_per_second = 10000, max_in_flight = 2000 }}
            [routes.api]
            models = ["{MODEL}"]
            policy = "api"
            offers = [{{ backend = "openai" }}]
            [routes.both]
            models = ["{OWN_MODEL}"]
            policy = "api"
            offers = [{{ backend = "openai", model = "{MODEL}" }}, {{ backend = "gpu" }}]
            {lines}
            "#,
            ledger = self.ledger().display(),
            api = self.api.url(),
            own = self.own.url(),
            lines = self.lines,
        );
        let variable = |name: &str| (name == API_KEY).then(|| "sk-the-owners".to_owned());
        let config = config::parse(&text, "test", &variable).unwrap_or_else(|problems| panic!("{problems}"));
        let proxy = breakeven::commands::serve::Proxy::start(config, self.clock.clone()).await.unwrap();
        let backends = proxy.gateway.state().backends.clone();
        let up = async {
            while !backends.iter().all(|backend| backend.is_serving()) {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), up).await.expect("backends come up");
        self.proxy = Some(proxy);
    }

    fn proxy(&self) -> &breakeven::commands::serve::Proxy {
        self.proxy.as_ref().unwrap()
    }

    fn http(&self) -> Http {
        Http::new(&format!("http://{}/v1", self.proxy().address))
    }

    /// Makes a key; its id and secret. It is in force at once.
    fn key(&self, options: &[&str]) -> (String, String) {
        let arguments = [&["create", "--name", "test", "--format", "json"], options].concat();
        let printed: Value = serde_json::from_str(&self.command(&arguments)).unwrap();
        self.refresh();
        (printed["id"].as_str().unwrap().to_owned(), printed["secret"].as_str().unwrap().to_owned())
    }

    fn refresh(&self) {
        let gateway = &self.proxy().gateway;
        gateway.keys.refresh(&gateway.state().config, gateway.now()).unwrap();
    }

    fn command(&self, arguments: &[&str]) -> String {
        let (out, code) = command(&self.ledger(), arguments, self.clock.now());
        assert_eq!(format!("{code:?}"), format!("{:?}", ExitCode::SUCCESS), "{out}");
        out
    }

    async fn call(&self, secret: &str, body: &Value) -> Reply {
        call(&self.http(), secret, "/chat/completions", body).await
    }

    /// What the ledger has of a key.
    async fn spent(&self, key: &str) -> NanoUsd {
        assert!(self.proxy().gateway.ledger.flush().await);
        let rows = breakeven::keys::spend_of_period(&self.ledger(), BudgetPeriod::Lifetime, self.clock.now());
        let rows = rows.unwrap();
        rows.iter().filter(|row| row.key == key).fold(NanoUsd::ZERO, |sum, row| sum + row.cost)
    }

    async fn quiet(&self) {
        let quiet = async {
            while self.proxy().gateway.in_flight() > 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), quiet).await.expect("calls end");
    }
}

fn command(ledger: &Path, arguments: &[&str], now: Timestamp) -> (String, ExitCode) {
    let ledger = ledger.to_str().unwrap();
    let line = [&["breakeven", "keys", "--ledger", ledger], arguments].concat();
    let Command::Keys(parsed) = Cli::parse_from(line).command else { panic!("it is `keys`") };
    let mut out = Vec::new();
    let code = keys::run_at(&parsed, now, &mut out).unwrap();
    (String::from_utf8(out).unwrap(), code)
}

/// Makes a key beside a ledger: its id and secret.
pub(crate) fn make(ledger: &Path) -> (String, String) {
    let arguments = ["create", "--name", "test", "--format", "json"];
    let (printed, _) = command(ledger, &arguments, Clock::system().now());
    let printed: Value = serde_json::from_str(&printed).unwrap();
    (printed["id"].as_str().unwrap().to_owned(), printed["secret"].as_str().unwrap().to_owned())
}

async fn call(http: &Http, secret: &str, path: &str, body: &Value) -> Reply {
    let request = http.request(Method::POST, path).header("authorization", format!("Bearer {secret}"));
    http.send(request.header("content-type", "application/json"), Bytes::from(body.to_string())).await
}

const KEYS: &str = "[auth]\nmode = \"keys\"\n";

fn error_code(reply: &Reply) -> String {
    reply.json()["error"]["code"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn only_who_holds_a_key_in_force_is_let_in() {
    let house = House::open(KEYS).await;
    let (id, secret) = house.key(&["--team", "search"]);
    let reply = house.call(&secret, &chat(MODEL)).await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
    for wrong in ["", "sk-be-wrong", "sk-the-owners"] {
        let reply = house.call(wrong, &chat(MODEL)).await;
        assert_eq!(
            (reply.status, error_code(&reply).as_str()),
            (StatusCode::UNAUTHORIZED, "invalid_api_key")
        );
    }
    assert_eq!(house.http().get("/models").await.status, StatusCode::UNAUTHORIZED);
    house.command(&["revoke", &id]);
    let refused = async {
        while house.call(&secret, &chat(MODEL)).await.status != StatusCode::UNAUTHORIZED {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(2), refused)
        .await
        .expect("a revoked key ends within two seconds");
    let (_, expiring) = house.key(&["--expires", "0s"]);
    assert_eq!(house.call(&expiring, &chat(MODEL)).await.status, StatusCode::UNAUTHORIZED);
    assert_eq!(command(&house.ledger(), &["revoke", "key_none"], house.clock.now()).1, ExitCode::from(1));
}

#[tokio::test]
async fn the_secret_is_nowhere_but_with_the_client() {
    let house = House::open(KEYS).await;
    let (id, secret) = house.key(&["--budget-usd", "1"]);
    for header in ["authorization", "x-api-key", "api-key"] {
        let value = if header == "authorization" { format!("Bearer {secret}") } else { secret.clone() };
        let request = house.http().request(Method::POST, "/chat/completions").header(header, value);
        let request = request.header("x-other", &secret);
        let reply = house.http().send(request, Bytes::from(chat(MODEL).to_string())).await;
        assert_eq!(reply.status, StatusCode::OK, "{header}");
    }
    let in_url = house.http().get(&format!("/files?key={secret}")).await;
    assert_eq!(in_url.status, StatusCode::BAD_REQUEST);
    for request in house.api.requests() {
        assert!(!format!("{request:?}").contains(&secret));
    }
    let metrics = Http::new(&format!("http://{}", house.proxy().admin_address)).get("/metrics").await;
    assert!(!metrics.text().contains(&secret));
    assert!(house.spent(&id).await > NanoUsd::ZERO);
    assert!(!house.command(&["list", "--format", "json"]).contains(&secret));
    let mut files = vec![house.folder.path().to_owned()];
    let mut read = 0;
    while let Some(path) = files.pop() {
        if path.is_dir() {
            files.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        let bytes = std::fs::read(&path).unwrap();
        assert!(memchr::memmem::find(&bytes, secret.as_bytes()).is_none(), "{}", path.display());
        read += 1;
    }
    assert!(read >= 2, "the ledger and the keys were looked at");
}

#[tokio::test]
async fn a_thousand_calls_at_once_at_99_percent_of_a_budget_overspend_by_one_at_most() {
    let house = House::open(KEYS).await;
    let body = with(chat(MODEL), json!({"max_tokens": 12}));
    let (probe, secret) = house.key(&[]);
    house.call(&secret, &body).await;
    let one = house.spent(&probe).await;
    let limit = NanoUsd::from_nanos(one.as_nanos() * 400);
    let (id, secret) = house.key(&["--budget-usd", &limit.to_string()]);
    let gateway = &house.proxy().gateway;
    let account = gateway.keys.find(secret.as_bytes(), gateway.now()).unwrap().account.clone().unwrap();
    account.charge(NanoUsd::from_nanos(one.as_nanos() * 396), gateway.now());
    let http = house.http();
    let calls: Vec<_> = (0..1000)
        .map(|_| {
            let (http, secret, body) = (http.clone(), secret.clone(), body.clone());
            tokio::spawn(async move { call(&http, &secret, "/chat/completions", &body).await })
        })
        .collect();
    let (mut served, mut refused) = (0, 0);
    for call in calls {
        match call.await.unwrap().status {
            StatusCode::OK => served += 1,
            StatusCode::TOO_MANY_REQUESTS => refused += 1,
            other => panic!("{other}"),
        }
    }
    assert_eq!(served + refused, 1000);
    assert!((1..=5).contains(&served), "{served}");
    house.quiet().await;
    let spent = house.spent(&id).await + NanoUsd::from_nanos(one.as_nanos() * 396);
    assert!(spent <= limit + one, "{spent} of {limit}");
    assert_eq!(account.state(gateway.now()).spent, spent);
    assert_eq!(gateway.keys.held(), NanoUsd::ZERO);
}

#[tokio::test]
async fn a_spent_budget_is_told_as_openai_does_and_outlives_a_restart_until_its_period_ends() {
    let noon = "2026-11-30T12:00:00Z".parse::<jiff::Timestamp>().unwrap().as_millisecond();
    let clock = Clock::manual(Timestamp::from_millis(u64::try_from(noon).unwrap()));
    let mut house = House::open_at(KEYS, clock.clone()).await;
    let (id, secret) = house.key(&["--budget-usd", "0.000001", "--period", "day"]);
    assert_eq!(house.call(&secret, &chat(MODEL)).await.status, StatusCode::OK);
    for _ in 0..2 {
        let reply = house.call(&secret, &chat(MODEL)).await;
        assert_eq!(reply.status, StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(reply.json()["error"]["type"], "insufficient_quota");
        assert_eq!(error_code(&reply), "insufficient_quota");
        assert_eq!(reply.header("retry-after"), "43201");
        assert_eq!(reply.header("x-should-retry"), "false");
        assert!(house.spent(&id).await > NanoUsd::from_nanos(1000));
        house.start().await;
    }
    clock.advance(Duration::from_hours(12));
    let reply = house.call(&secret, &chat(MODEL)).await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
    let spent = house.spent(&id).await;
    let listed: Value = serde_json::from_str(&house.command(&["list", "--format", "json"])).unwrap();
    assert_eq!(listed[0]["spent_lifetime_usd"], spent.to_string());
}

#[tokio::test]
async fn a_rate_limit_is_told_with_the_time_to_wait() {
    let clock = Clock::manual(Timestamp::from_secs(1_800_000_000));
    let house = House::open_at(KEYS, clock.clone()).await;
    let (_, secret) = house.key(&["--rpm", "2"]);
    let first = house.call(&secret, &chat(MODEL)).await;
    assert_eq!(first.header("x-ratelimit-limit-requests"), "2");
    assert_eq!(first.header("x-ratelimit-remaining-requests"), "1");
    assert_eq!(house.call(&secret, &chat(MODEL)).await.status, StatusCode::OK);
    let refused = house.call(&secret, &chat(MODEL)).await;
    assert_eq!(refused.status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(error_code(&refused), "rate_limit_exceeded");
    assert_eq!(refused.header("retry-after"), "30");
    assert_eq!(refused.header("x-ratelimit-remaining-requests"), "0");
    clock.advance(Duration::from_secs(30));
    assert_eq!(house.call(&secret, &chat(MODEL)).await.status, StatusCode::OK);
    let (_, few_tokens) = house.key(&["--tpm", "1"]);
    assert_eq!(house.call(&few_tokens, &chat(MODEL)).await.status, StatusCode::OK);
    let refused = house.call(&few_tokens, &chat(MODEL)).await;
    assert_eq!(
        (refused.status, refused.json()["error"]["type"].as_str().unwrap()),
        (StatusCode::TOO_MANY_REQUESTS, "tokens")
    );
}

#[tokio::test]
async fn a_key_for_certain_routes_and_backends_opens_no_others() {
    let house = House::open(KEYS).await;
    let (_, of_route) = house.key(&["--routes", "both"]);
    assert_eq!(house.call(&of_route, &chat(OWN_MODEL)).await.status, StatusCode::OK);
    let reply = house.call(&of_route, &chat(MODEL)).await;
    assert_eq!((reply.status, error_code(&reply).as_str()), (StatusCode::NOT_FOUND, "model_not_found"));
    let unread = call(&house.http(), &of_route, "/images/generations", &json!({"prompt": "a cat"})).await;
    assert_eq!(unread.status, StatusCode::FORBIDDEN);
    let (_, of_backend) = house.key(&["--backends", "gpu"]);
    assert_eq!(house.call(&of_backend, &chat(OWN_MODEL)).await.header("x-breakeven-backend"), "gpu");
    assert_eq!(house.call(&of_backend, &chat(MODEL)).await.status, StatusCode::FORBIDDEN);
}

#[tokio::test]
async fn a_spent_budget_can_leave_the_cheaper_backend() {
    let house = House::open(
        "[budgets.all]\nusd = \"0.000001\"\nperiod = \"day\"\nwhen_spent = \"cheaper_backend\"\n",
    )
    .await;
    assert_eq!(house.call("sk-own", &chat(OWN_MODEL)).await.header("x-breakeven-backend"), "openai");
    let next = house.call("sk-own", &chat(OWN_MODEL)).await;
    assert_eq!((next.status, next.header("x-breakeven-backend")), (StatusCode::OK, "gpu"));
    assert_eq!(error_code(&house.call("sk-own", &chat(MODEL)).await), "insufficient_quota");
}

#[tokio::test]
async fn a_team_and_a_route_have_budgets_without_keys() {
    let house = House::open(
        "[budgets.search]\nteam = \"search\"\nusd = \"0.000001\"\n[budgets.both]\nroute = \"both\"\nusd = 0\n",
    )
    .await;
    let as_team = |team: &str| {
        let request = house.http().request(Method::POST, "/chat/completions");
        let request = request.header("x-breakeven-tags", format!("team={team}"));
        let (http, body) = (house.http(), Bytes::from(chat(MODEL).to_string()));
        async move { http.send(request, body).await.status }
    };
    assert_eq!(as_team("search").await, StatusCode::OK);
    assert_eq!(as_team("search").await, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(as_team("rank").await, StatusCode::OK);
    assert_eq!(house.call("sk-own", &chat(OWN_MODEL)).await.status, StatusCode::TOO_MANY_REQUESTS);
}

#[tokio::test]
async fn nothing_stays_held_when_clients_go_or_backends_fail() {
    let house = House::open(KEYS).await;
    let (_, secret) = house.key(&["--budget-usd", "1", "--tpm", "100000000"]);
    house.api.fail_next(3, &breakeven::demo::Fault::Status(500));
    for _ in 0..3 {
        house.call(&secret, &chat(MODEL)).await;
    }
    for _ in 0..20 {
        let body = Bytes::from(with(chat(MODEL), json!({"stream": true})).to_string());
        let request = house.http().request(Method::POST, "/chat/completions");
        let request = request.header("authorization", format!("Bearer {secret}"));
        drop(house.http().start(request, body).await.unwrap());
    }
    house.quiet().await;
    let gateway = &house.proxy().gateway;
    let settled = async {
        while gateway.keys.held() != NanoUsd::ZERO {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), settled).await.expect("what was held is given back");
}

#[test]
fn the_file_of_keys_is_beside_the_ledger_and_a_server_is_not_needed() {
    let folder = tempfile::tempdir().unwrap();
    let ledger = folder.path().join("breakeven.db");
    let now = Timestamp::from_secs(1_800_000_000);
    let (out, _) = command(&ledger, &["create", "--name", "ci", "--expires", "30d", "--rpm", "5"], now);
    assert!(out.contains("secret  sk-be-"), "{out}");
    let stored = Store::open(&path_beside(&ledger)).unwrap().all().unwrap().remove(0);
    assert_eq!((stored.name.as_str(), stored.requests_per_minute), ("ci", Some(5)));
    assert_eq!(stored.expires_at, Some(now + Duration::from_hours(30 * 24)));
    assert!(command(&ledger, &["list"], now).0.contains("active"));
    assert!(command(&ledger, &["list"], now + Duration::from_hours(31 * 24)).0.contains("expired"));
}
