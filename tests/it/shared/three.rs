//! Three processes, three clients, one Redis, one Postgres; one process and Redis are killed in turn.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use breakeven::clock::Stopwatch;
use breakeven::demo::{FakeBackend, Personality, Settings};
use breakeven::economics::{NanoUsd, Timestamp};
use breakeven::ledger::query;
use serde_json::json;
use tokio::task::JoinSet;

use super::process::{Peer, check_one_holder_at_a_time, held, ids, now};
use super::{long_run, patience, until};
use crate::support::postgres::Postgres;
use crate::support::redis::Redis;
use crate::support::{Http, chat, needs, soon, with};

const MODEL: &str = "gpt-4o-mini";
const CAPPED: &str = "capped-model";
const PEERS: usize = 3;
/// Calls at once of each client.
const TASKS: usize = 4;
/// A pause of each task between two calls.
const PACE: Duration = Duration::from_millis(10);
const PATIENCE: Duration = Duration::from_secs(30);
/// The issue's bounds.
const TAKEOVER: Duration = Duration::from_secs(10);
const KNOWN_WITHIN: Duration = Duration::from_secs(2);
/// Rent of a replica is one dollar a second, so that it can be compared with the time.
const HOURLY_USD: u32 = 3600;
const SLOT_SECONDS: f64 = 2.0;
/// Seconds of load; `BREAKEVEN_SHARED_SECONDS` makes it longer.
const SECONDS: u64 = 15;

/// What the clients have seen.
#[derive(Debug, Default)]
struct Seen {
    started: AtomicU64,
    ended: AtomicU64,
    refused: AtomicU64,
    /// By proxy.
    ended_at: [AtomicU64; PEERS],
    broken: AtomicU64,
    ids: std::sync::Mutex<HashSet<String>>,
    faults: std::sync::Mutex<Vec<String>>,
    stop: AtomicBool,
    /// By proxy: its connections may break.
    may_break: [AtomicBool; PEERS],
}

/// Calls one proxy until it is told to stop.
async fn client(url: String, peer: usize, model: &'static str, seen: Arc<Seen>) {
    let http = Http::new(&url);
    let body = with(chat(model), json!({"max_tokens": 50})).to_string();
    let mut pace = tokio::time::interval(PACE);
    while !seen.stop.load(Ordering::SeqCst) {
        pace.tick().await;
        let request = http.request(http::Method::POST, "/chat/completions");
        let request = request.header("content-type", "application/json");
        seen.started.fetch_add(1, Ordering::SeqCst);
        let fault = match http.start(request, body.clone().into()).await {
            Ok(answer) => {
                let (head, body) = answer.into_parts();
                let read = http_body_util::BodyExt::collect(body).await;
                match (read, head.status.as_u16()) {
                    (Ok(_), 200) => {
                        let id = head.headers["x-breakeven-request-id"].to_str().unwrap().to_owned();
                        seen.ids.lock().unwrap().insert(id);
                        seen.ended.fetch_add(1, Ordering::SeqCst);
                        seen.ended_at[peer].fetch_add(1, Ordering::SeqCst);
                        continue;
                    }
                    (Ok(body), 429) if model == CAPPED => {
                        let body = body.to_bytes();
                        assert!(String::from_utf8_lossy(&body).contains("insufficient_quota"), "{body:?}");
                        seen.refused.fetch_add(1, Ordering::SeqCst);
                        continue;
                    }
                    (Ok(body), status) => format!("{status}: {:?}", body.to_bytes()),
                    (Err(error), _) => error.to_string(),
                }
            }
            Err(error) => error.to_string(),
        };
        if seen.may_break[peer].load(Ordering::SeqCst) {
            seen.broken.fetch_add(1, Ordering::SeqCst);
        } else {
            seen.faults.lock().unwrap().push(format!("proxy {peer}: {fault}"));
        }
    }
}

/// What came of looking whether every live proxy sees the truth.
#[derive(Debug)]
struct Accuracy {
    looks: usize,
    /// The longest time until all of them saw the calls that had ended when it was asked.
    slowest: Duration,
    /// For who reads that it is not so.
    when: &'static str,
    /// Calls that a killed proxy had no time to tell of, until it is back with its ledger.
    untold: u64,
    patience: Duration,
}

impl Accuracy {
    /// Within 1% of the truth within two seconds, from below and from above.
    async fn look(&mut self, peers: &[&Peer], seen: &Seen) {
        let (ended, began) = (seen.ended.load(Ordering::SeqCst) - self.untold, Stopwatch::start());
        for peer in peers {
            let mut volume = 0;
            let close = soon(self.patience, async || {
                volume = peer.status().await["pools"][0]["requests_in_window"].as_u64().unwrap();
                let most = seen.started.load(Ordering::SeqCst);
                assert!(volume * 100 <= most * 101, "it sees {volume} calls, {most} have begun");
                (volume * 100 >= ended * 99).then_some(())
            });
            let is_close = close.await.is_some();
            assert!(is_close, "{}: it sees {volume} calls of {ended} after {:?}", self.when, began.elapsed());
        }
        if self.patience == patience(KNOWN_WITHIN) {
            self.looks += 1;
            self.slowest = self.slowest.max(began.elapsed());
        }
    }

    /// Waits until all that was missed is made up for; how long that took.
    async fn catch_up(&mut self, when: &'static str, peers: &[&Peer], seen: &Seen) -> Duration {
        (self.when, self.patience) = (when, PATIENCE);
        let began = Stopwatch::start();
        self.look(peers, seen).await;
        self.patience = patience(KNOWN_WITHIN);
        began.elapsed()
    }

    /// Looks again and again for some time.
    async fn watch(&mut self, when: &'static str, peers: &[&Peer], seen: &Seen, time: Duration) {
        self.when = when;
        let began = Stopwatch::start();
        let mut pace = tokio::time::interval(Duration::from_millis(500));
        while began.elapsed() < time {
            pace.tick().await;
            self.look(peers, seen).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_proxies_agree_under_load_while_one_of_them_and_redis_are_killed() {
    needs!(Redis, Postgres);
    let seconds = long_run().unwrap_or(SECONDS);
    let quarter = Duration::from_secs(seconds) / 4;
    let mut redis = Redis::start().await;
    let postgres = Postgres::start().await;
    let settings = Settings { output_tokens: 50, ..Settings::default() };
    let api = FakeBackend::start(Personality::OpenAi, settings.clone()).await.unwrap();
    let own = FakeBackend::start(Personality::Vllm, settings).await.unwrap();
    let secret = redis.folder.path().join("url");
    std::fs::write(&secret, redis.url()).unwrap();
    let database = redis.folder.path().join("database");
    std::fs::write(&database, format!("{}?sslmode=disable", postgres.url("postgres"))).unwrap();
    let limit = NanoUsd::from_nanos(10_000_000);
    let text = format!(
        r#"
        postgres = {{ url = {{ file = "{database}" }} }}
        [shared]
        redis = {{ file = "{secret}" }}
        lease = "{lease}"
        [policy]
        slot = "{SLOT_SECONDS}s"
        window = "10m"
        [budgets.capped]
        route = "capped"
        usd = "{limit}"
        [backends.openai]
        kind = "api"
        base_url = "{api}"
        [backends.gpu]
        kind = "self_hosted"
        base_url = "{own}"
        hourly_usd = {HOURLY_USD}
        health = {{ interval = "1s" }}
        capacity = {{ input_tokens_per_second = 15000, output_tokens_per_second = 10000, max_in_flight = 64 }}
        [routes.chat]
        models = ["{MODEL}"]
        policy = "cheapest"
        offers = [{{ backend = "openai" }}, {{ backend = "gpu" }}]
        [routes.capped]
        models = ["{CAPPED}"]
        policy = "api"
        offers = [{{ backend = "openai", model = "{MODEL}" }}]
        "#,
        secret = secret.display(),
        database = database.display(),
        lease = if seconds < 60 { "3s" } else { "6s" },
        api = api.url(),
        own = own.url(),
    );
    let (mut peers, first_start) = (Vec::new(), now());
    for _ in 0..PEERS {
        peers.push(Peer::start(&text).await);
    }
    let began = now();
    for peer in &peers {
        until("everybody is heard", PATIENCE, async || {
            (peer.status().await["shared"]["proxies"] == PEERS).then_some(())
        })
        .await;
    }
    let holder = until("somebody plans", PATIENCE, async || holder(&peers).await).await;

    let (seen, capped) = (Arc::new(Seen::default()), Arc::new(Seen::default()));
    let mut clients = JoinSet::new();
    for (index, peer) in peers.iter().enumerate() {
        for _ in 0..TASKS {
            clients.spawn(client(peer.url(), index, MODEL, seen.clone()));
        }
        clients.spawn(client(peer.url(), index, CAPPED, capped.clone()));
    }
    let may_break = |index: usize, may: bool| {
        for seen in [&seen, &capped] {
            seen.may_break[index].store(may, Ordering::SeqCst);
        }
    };
    let mut accuracy =
        Accuracy { looks: 0, slowest: Duration::ZERO, when: "", untold: 0, patience: patience(KNOWN_WITHIN) };
    accuracy.watch("at first", &peers.iter().collect::<Vec<_>>(), &seen, quarter).await;

    // One proxy is killed: the one that plans. What it did in its last moment nobody has heard.
    let before = seen.ended_at[holder].load(Ordering::SeqCst);
    accuracy.watch("at first", &peers.iter().collect::<Vec<_>>(), &seen, Duration::from_secs(1)).await;
    may_break(holder, true);
    peers[holder].kill().await;
    let killed = Stopwatch::start();
    accuracy.untold = seen.ended_at[holder].load(Ordering::SeqCst) - before;
    until("another plans", patience(TAKEOVER), async || holder_besides(&peers, holder).await).await;
    let takeover = killed.elapsed();
    let others: Vec<&Peer> =
        peers.iter().enumerate().filter(|(index, _)| *index != holder).map(|(_, peer)| peer).collect();
    accuracy.watch("without one", &others, &seen, quarter.saturating_sub(takeover)).await;
    peers[holder].up().await;
    may_break(holder, false);
    let everybody: Vec<&Peer> = peers.iter().collect();
    let untold = std::mem::take(&mut accuracy.untold);
    let again = async || (!peers[holder].is_stale().await).then_some(());
    until("it is in touch again", PATIENCE, again).await;
    let restarted = accuracy.catch_up("after the restart", &everybody, &seen).await;
    accuracy.watch("with it again", &everybody, &seen, Duration::from_secs(1)).await;

    // Redis is killed, and has forgotten everything when it is back.
    redis.kill().await;
    for peer in &peers {
        until("it says that it is alone", PATIENCE, async || peer.is_stale().await.then_some(())).await;
    }
    let before = seen.ended.load(Ordering::SeqCst);
    until("calls go on", PATIENCE, async || (seen.ended.load(Ordering::SeqCst) > before + 100).then_some(()))
        .await;
    redis.up().await;
    let back = Stopwatch::start();
    for peer in &peers {
        until("it is in touch again", PATIENCE, async || (!peer.is_stale().await).then_some(())).await;
    }
    accuracy.catch_up("after Redis was away", &everybody, &seen).await;
    let caught_up = back.elapsed();
    until("somebody plans again", PATIENCE, async || holder_besides(&peers, PEERS).await).await;
    accuracy.watch("with Redis again", &everybody, &seen, quarter).await;

    for seen in [&seen, &capped] {
        seen.stop.store(true, Ordering::SeqCst);
    }
    while let Some(client) = clients.join_next().await {
        client.unwrap();
    }
    for seen in [&seen, &capped] {
        let faults = seen.faults.lock().unwrap();
        assert!(faults.is_empty(), "{} faults: {:?}", faults.len(), &faults[..faults.len().min(5)]);
    }
    let truth = seen.ended.load(Ordering::SeqCst);
    accuracy.look(&everybody, &seen).await;
    let all_shipped = async || (shipped(&postgres).await.len() >= rows(&peers).len()).then_some(());
    until("every row is in Postgres", PATIENCE, all_shipped).await;
    for peer in &mut peers {
        peer.end().await;
    }
    let ended = now();

    check_one_holder_at_a_time(peers.iter().flat_map(held).collect());
    check_rows(&peers, &[&seen, &capped], shipped(&postgres).await);
    let (spent, dearest) = spent(&peers);
    let rent = rent(&peers);
    let (least, most) = (ended.since(began).as_secs_f64(), ended.since(first_start).as_secs_f64());
    eprintln!(
        "{truth} calls, at most {untold} not told by the killed proxy until it was back, {} broken by the kill, {} admitted and {} refused by the budget\n\
         volume: {} looks, the slowest proxy within 1% after {:?}; takeover after {takeover:?}; \
         caught up {restarted:?} after the killed one was in touch, {caught_up:?} after Redis was back\n\
         budget: {spent} of {limit} spent, a call costs {dearest} at most\n\
         rent: {rent} USD booked in {least:.1} to {most:.1} s at 1 USD a second",
        seen.broken.load(Ordering::SeqCst),
        capped.ended.load(Ordering::SeqCst),
        capped.refused.load(Ordering::SeqCst),
        accuracy.looks,
        accuracy.slowest,
    );
    assert!(capped.refused.load(Ordering::SeqCst) > 0, "the budget was never spent");
    // One call a proxy, and what the killed one had not told yet: at most a second's calls of its one client.
    let bound = dearest.mul_div_floor(PEERS as u64 + 100, 1);
    assert!(spent <= limit + bound, "{spent} of {limit}");
    // Rent runs from when the first proxy sees the replica. One that is killed right after it has booked a slot
    // leaves it to be booked twice.
    assert!(rent > least - SLOT_SECONDS && rent < most + SLOT_SECONDS, "{rent} USD for {least} to {most} s");
}

async fn holder(peers: &[Peer]) -> Option<usize> {
    for (index, peer) in peers.iter().enumerate() {
        if peer.holds_lease().await {
            return Some(index);
        }
    }
    None
}

async fn holder_besides(peers: &[Peer], dead: usize) -> Option<()> {
    for (index, peer) in peers.iter().enumerate() {
        if index != dead && peer.holds_lease().await {
            return Some(());
        }
    }
    None
}

/// Ids of all calls in the ledgers of the proxies.
fn rows(peers: &[Peer]) -> Vec<String> {
    peers.iter().flat_map(|peer| ids(&peer.ledger())).collect()
}

/// Ids of all calls in Postgres.
async fn shipped(postgres: &Postgres) -> Vec<String> {
    let rows = postgres.rows("postgres", "SELECT id::text FROM breakeven.calls").await;
    rows.iter().map(|row| row.get(0)).collect()
}

/// Every call whose end was seen has a row in one ledger and in Postgres, and no row is there twice.
fn check_rows(peers: &[Peer], seen: &[&Arc<Seen>], mut shipped: Vec<String>) {
    let mut rows = rows(peers);
    let unique: HashSet<&String> = rows.iter().collect();
    assert_eq!(unique.len(), rows.len(), "no row is there twice");
    for seen in seen {
        let lost = seen.ids.lock().unwrap().iter().filter(|id| !unique.contains(id)).count();
        assert_eq!(lost, 0, "rows are lost");
    }
    rows.sort();
    shipped.sort();
    assert!(rows == shipped, "{} rows in the ledgers, {} in Postgres", rows.len(), shipped.len());
}

/// What calls of the budget's route did cost, and the dearest of them.
fn spent(peers: &[Peer]) -> (NanoUsd, NanoUsd) {
    let rows = peers.iter().flat_map(|peer| query::recent(&peer.ledger(), usize::MAX).unwrap());
    rows.filter(|row| row.route == "capped")
        .fold((NanoUsd::ZERO, NanoUsd::ZERO), |(sum, most), row| (sum + row.cost, most.max(row.cost)))
}

fn rent(peers: &[Peer]) -> f64 {
    let rows = peers.iter().flat_map(|peer| query::rent(&peer.ledger(), Timestamp::ZERO).unwrap());
    rows.fold(NanoUsd::ZERO, |sum, row| sum + row.rent).to_usd_f64()
}
