//! Proxies of one process that share a Redis: volume, budgets, rate limits.

use std::time::Duration;

use breakeven::clock::Stopwatch;
use breakeven::demo::{FakeBackend, Personality, Settings};
use breakeven::economics::{NanoUsd, Slot};
use http::StatusCode;
use serde_json::json;

use super::{patience, until};
use crate::support::proxy::Proxy;
use crate::support::redis::Redis;
use crate::support::{Http, Reply, chat, needs, with};

const MODEL: &str = "gpt-4o-mini";
const PATIENCE: Duration = Duration::from_secs(20);
/// After so long everybody knows what anybody did.
const KNOWN_WITHIN: Duration = Duration::from_secs(2);

/// Fake backends, a Redis, and the configuration of proxies between them.
struct World {
    redis: Redis,
    _api: FakeBackend,
    _own: FakeBackend,
    text: String,
}

impl World {
    async fn new(lines: &str) -> Self {
        let redis = Redis::start().await;
        let settings = Settings { output_tokens: 50, ..Settings::default() };
        let api = FakeBackend::start(Personality::OpenAi, settings.clone()).await.unwrap();
        let own = FakeBackend::start(Personality::Vllm, settings).await.unwrap();
        let secret = redis.folder.path().join("url");
        std::fs::write(&secret, redis.url()).unwrap();
        let text = format!(
            r#"
            [shared]
            redis = {{ file = "{}" }}
            lease = "3s"
            [policy]
            slot = "2s"
            [backends.openai]
            kind = "api"
            base_url = "{}"
            [backends.gpu]
            kind = "self_hosted"
            base_url = "{}"
            hourly_usd = 2.99
            capacity = {{ input_tokens_per_second = 15000, output_tokens_per_second = 10000, max_in_flight = 64 }}
            [routes.chat]
            models = ["{MODEL}"]
            policy = "cheapest"
            offers = [{{ backend = "openai" }}, {{ backend = "gpu" }}]
            {lines}
            "#,
            secret.display(),
            api.url(),
            own.url(),
        );
        Self { redis, _api: api, _own: own, text }
    }

    async fn proxies(&self, count: usize) -> Vec<Proxy> {
        let mut proxies = Vec::new();
        for _ in 0..count {
            proxies.push(Proxy::start(&self.text).await);
        }
        for proxy in &proxies {
            until("everybody is heard", PATIENCE, async || {
                let sharing = proxy.running.gateway.sharing.as_ref().unwrap();
                (sharing.is_fresh() && sharing.proxies() as usize == count).then_some(())
            })
            .await;
        }
        proxies
    }
}

async fn call(proxy: &Proxy, headers: &[(&str, &str)]) -> Reply {
    let http = Http::new(&proxy.url());
    let mut request = http.request(http::Method::POST, "/chat/completions");
    for (name, value) in headers.iter().chain(&[("content-type", "application/json")]) {
        request = request.header(*name, *value);
    }
    let body = with(chat(MODEL), json!({"max_tokens": 50}));
    http.send(request, body.to_string().into()).await
}

async fn calls(proxy: &Proxy, count: usize) {
    for _ in 0..count {
        let reply = call(proxy, &[]).await;
        assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
    }
}

/// Calls in the window and calls an hour, as the status shows them.
fn volume(proxy: &Proxy) -> (u64, f64) {
    let view = proxy.running.gateway.state().pools[0].view.load_full();
    (view.requests_in_window, view.volume_requests_per_hour)
}

async fn all_see(proxies: &[Proxy], truth: u64) {
    until(&format!("everybody sees {truth} calls"), patience(KNOWN_WITHIN), async || {
        proxies.iter().all(|proxy| volume(proxy).0 == truth).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_proxy_sees_the_volume_of_all_and_so_does_one_that_comes_later() {
    needs!(Redis);
    let world = World::new("").await;
    let mut proxies = world.proxies(3).await;
    for (proxy, count) in proxies.iter().zip([10, 25, 0]) {
        calls(proxy, count).await;
    }
    all_see(&proxies, 35).await;
    proxies.push(Proxy::start(&world.text).await);
    all_see(&proxies, 35).await;
    // The seconds that the volume is averaged over: they were looked at within one. Who comes later may have heard of
    // the calls a moment before it knows how long there was somebody to count them.
    until("the windows began at the same time", patience(KNOWN_WITHIN), async || {
        let open = proxies.iter().map(|proxy| 35.0 * 3600.0 / volume(proxy).1);
        let (least, most) = open.fold((f64::MAX, 0.0_f64), |(a, b), c| (a.min(c), b.max(c)));
        (most - least < 1.0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_redis_each_goes_on_with_its_own_volume_and_catches_up() {
    needs!(Redis);
    let mut world = World::new("").await;
    let proxies = world.proxies(2).await;
    calls(&proxies[0], 5).await;
    all_see(&proxies, 5).await;
    world.redis.kill().await;
    let stale = |proxy: &Proxy| !proxy.running.gateway.sharing.as_ref().unwrap().is_fresh();
    until("it is noticed", PATIENCE, async || proxies.iter().all(stale).then_some(())).await;
    calls(&proxies[0], 7).await;
    calls(&proxies[1], 11).await;
    let own = async || (volume(&proxies[0]).0 == 12 && volume(&proxies[1]).0 >= 11).then_some(());
    until("each sees its own", PATIENCE, own).await;
    // Lines of several slots are missing in Redis then, which besides has forgotten everything.
    world.redis.up().await;
    until("it is back", PATIENCE, async || (!proxies.iter().any(stale)).then_some(())).await;
    all_see(&proxies, 23).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_proxy_finds_in_its_ledger_only_when_it_has_met_the_others_is_heard_by_all() {
    needs!(Redis);
    let world = World::new("").await;
    let proxies = world.proxies(2).await;
    calls(&proxies[0], 5).await;
    all_see(&proxies, 5).await;
    let state = proxies[0].running.gateway.state();
    let pool = &state.pools[0];
    let long_ago = pool.slot_of(proxies[0].running.gateway.now()) - 20;
    let found = Slot { requests: 9, ..Slot::default() };
    pool.with_volume(|volume| volume.note_past(long_ago, found)).unwrap();
    all_see(&proxies, 14).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_starts_without_redis_and_counts_for_itself_meanwhile() {
    needs!(Redis);
    let mut world = World::new("[budgets.all]\nusd = 100").await;
    world.redis.kill().await;
    let proxy = Proxy::start(&world.text).await;
    calls(&proxy, 3).await;
    let own = async || (volume(&proxy).0 == 3).then_some(());
    until("it sees its own", PATIENCE, own).await;
    world.redis.up().await;
    let sharing = proxy.running.gateway.sharing.as_ref().unwrap();
    until("it meets Redis", PATIENCE, async || sharing.is_fresh().then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_budget_is_spent_by_all_together_and_overspent_by_one_call_each_at_most() {
    needs!(Redis);
    let world = World::new("[budgets.all]\nusd = 0.004\nperiod = \"month\"").await;
    let proxies = world.proxies(3).await;
    let limit = NanoUsd::from_nanos(4_000_000);
    // Until nobody lets a call in for several exchanges, and longer than a store without a memory keeps still.
    let mut last = Stopwatch::start();
    let mut admitted = 0;
    // Calls that were let in after one was told not to try again: each proxy may have a last one.
    let (mut is_told_final, mut late) = (false, 0);
    let spent_all = async || {
        for proxy in &proxies {
            let reply = call(proxy, &[]).await;
            assert!(matches!(reply.status.as_u16(), 200 | 429), "{}", reply.text());
            is_told_final |= reply.header("x-should-retry") == "false";
            if reply.status == StatusCode::OK {
                late += usize::from(is_told_final);
                assert!(late <= proxies.len(), "{late} calls are let in after one was told that none is");
                (last, admitted) = (Stopwatch::start(), admitted + 1);
            }
        }
        (last.elapsed() > Duration::from_secs(4)).then_some(())
    };
    until("the budget is spent", Duration::from_mins(1), spent_all).await;
    assert!(is_told_final, "in the end SDKs are told not to try again");
    let mut spent = NanoUsd::ZERO;
    let mut dearest = NanoUsd::ZERO;
    for proxy in &proxies {
        for entry in proxy.entries().await {
            spent += entry.cost;
            dearest = dearest.max(entry.cost);
        }
    }
    eprintln!("{admitted} calls were admitted; {spent} of {limit} spent, a call costs {dearest} at most");
    assert!(spent >= limit, "{spent} of {limit} could be spent");
    assert!(spent <= limit + dearest + dearest + dearest, "{spent} of {limit} was spent");
    for proxy in &proxies {
        let state = || proxy.running.gateway.keys.states(proxy.running.gateway.now())[0].spent;
        until("its state shows what all have spent", patience(KNOWN_WITHIN), async || {
            (state() == spent).then_some(())
        })
        .await;
    }
}
