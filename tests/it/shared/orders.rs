//! Who orders replicas, where several proxies could.

use std::path::Path;
use std::time::Duration;

use breakeven::clock::Stopwatch;
use breakeven::demo::{FakeBackend, Personality, Settings};
use http::StatusCode;
use serde_json::json;

use super::process::{Peer, check_one_holder_at_a_time, held};
use super::{patience, until};
use crate::support::redis::Redis;
use crate::support::{Events, Http, chat, needs, with};

const MODEL: &str = "gpt-4o-mini";
const PATIENCE: Duration = Duration::from_secs(30);
/// The issue's bound, for the lease of the default.
const TAKEOVER: Duration = Duration::from_secs(10);

/// The configuration of proxies whose replica is at `own` and is started and stopped by shell commands.
fn text(redis: &Redis, own: &str, start: &str, stop: &str, lease: &str) -> String {
    let secret = redis.folder.path().join("url");
    std::fs::write(&secret, redis.url()).unwrap();
    format!(
        r#"
        [shared]
        redis = {{ file = "{}" }}
        lease = "{lease}"
        [policy]
        slot = "2s"
        [backends.openai]
        kind = "api"
        base_url = "http://127.0.0.1:1/v1"
        [backends.gpu]
        kind = "self_hosted"
        base_url = "{own}"
        hourly_usd = 2.99
        minimum = "1s"
        control = {{ kind = "command", start = ["sh", "-c", "{start}"], stop = ["sh", "-c", "{stop}"] }}
        capacity = {{ input_tokens_per_second = 15000, output_tokens_per_second = 10000, max_in_flight = 64 }}
        [routes.chat]
        models = ["{MODEL}"]
        policy = "cheapest"
        offers = [{{ backend = "openai" }}, {{ backend = "gpu" }}]
        "#,
        secret.display()
    )
}

/// Processes that have ordered a start, in turn.
fn starters(orders: &Path) -> Vec<u32> {
    let text = std::fs::read_to_string(orders).unwrap_or_default();
    text.lines().map(|line| line.parse().unwrap()).collect()
}

async fn holder(peers: &[Peer]) -> usize {
    until("somebody plans", PATIENCE, async || {
        for (index, peer) in peers.iter().enumerate() {
            if peer.holds_lease().await {
                return Some(index);
            }
        }
        None
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_proxy_orders_a_replica_and_when_it_is_killed_another_does_within_ten_seconds() {
    needs!(Redis);
    let redis = Redis::start().await;
    let orders = redis.folder.path().join("orders");
    let tokens = redis.folder.path().join("tokens");
    let start =
        format!("echo $PPID >> {}; echo $BREAKEVEN_LEASE_TOKEN >> {}", orders.display(), tokens.display());
    let text = text(&redis, "http://127.0.0.1:1/v1", &start, "true", "6s");
    let mut peers = vec![Peer::start(&text).await, Peer::start(&text).await];
    for peer in &peers {
        peer.pin("gpu", "gpu").await;
    }
    let first = holder(&peers).await;
    let id = peers[first].id();
    until("it is ordered", PATIENCE, async || (starters(&orders) == [id]).then_some(())).await;
    peers[first].kill().await;
    let killed = Stopwatch::start();
    let other = peers[1 - first].id();
    until("the other orders it", patience(TAKEOVER), async || {
        (starters(&orders) == [id, other]).then_some(())
    })
    .await;
    eprintln!("the other ordered the replica {:?} after the kill", killed.elapsed());
    peers[first].up().await;
    peers[first].pin("gpu", "gpu").await;
    peers[1 - first].end().await;
    let again = peers[first].id();
    until("what is given back is taken", patience(TAKEOVER), async || {
        (starters(&orders) == [id, other, again]).then_some(())
    })
    .await;
    check_one_holder_at_a_time(peers.iter().flat_map(held).collect());
    let tokens = until("each has its token", PATIENCE, async || {
        let tokens = std::fs::read_to_string(&tokens).unwrap_or_default();
        let tokens: Vec<u64> = tokens.lines().map(|token| token.parse().unwrap()).collect();
        Some(tokens).filter(|tokens| tokens.len() == 3)
    })
    .await;
    assert!(tokens.is_sorted_by(|one, next| one < next), "a late order can be told by its token: {tokens:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_is_not_stopped_while_a_stream_of_another_proxy_runs_there() {
    needs!(Redis);
    let redis = Redis::start().await;
    let stopped = redis.folder.path().join("stopped");
    let settings = Settings {
        output_tokens: 60,
        time_per_output_token: Duration::from_millis(100),
        ..Settings::default()
    };
    let own = FakeBackend::start(Personality::Vllm, settings).await.unwrap();
    let stop = format!("touch {}", stopped.display());
    let text = text(&redis, &own.url(), "true", &stop, "3s");
    let peers = [Peer::start(&text).await, Peer::start(&text).await];
    for peer in &peers {
        peer.pin("gpu", "gpu").await;
    }
    let observer = &peers[1 - holder(&peers).await];
    until("both serve", PATIENCE, async || {
        let status = observer.status().await;
        (status["shared"]["proxies"] == 2 && status["pools"][0]["replicas"]["ready"] == 1).then_some(())
    })
    .await;
    let body = with(chat(MODEL), json!({"stream": true}));
    let answer = Http::new(&observer.url()).open("/chat/completions", &body).await;
    assert_eq!(answer.status(), StatusCode::OK);
    let mut events = Events::of(answer);
    events.next().await.unwrap();
    for peer in &peers {
        peer.pin("gpu", "openai").await;
    }
    let mut last = String::new();
    while let Ok(event) = events.next().await {
        assert!(!stopped.exists(), "it is stopped under a stream");
        last = event;
    }
    assert_eq!(last, "data: [DONE]");
    until("it is stopped", PATIENCE, async || stopped.exists().then_some(())).await;
}
