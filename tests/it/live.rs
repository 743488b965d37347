//! The control loop with real processes: replicas that a command starts and stops, under a compressed trace.
//!
//! The proxy's clock runs faster than the wall's, so a slot of half a minute takes half a second. What the run
//! has cost and every decision are compared with `simulate` on the run's own ledger.

use std::path::Path;
use std::time::Duration;

use breakeven::clock::{Clock, Stopwatch};
use breakeven::commands::economy::EconomyArgs;
use breakeven::commands::serve::Proxy;
use breakeven::commands::simulate::{self, Format, PolicyName, SimulateArgs};
use breakeven::config::Config;
use breakeven::demo::{FakeBackend, Personality, Settings};
use breakeven::economics::{NanoUsd, PoolSpec, Timestamp};
use breakeven::fleet::ReplicaState;
use breakeven::gateway::Pin;
use breakeven::ledger::query;
use breakeven::planner::{REPLICAS_EVENT, STARTUP_EVENT};
use http::StatusCode;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::support::{Http, Reply, chat, free_ports, with};

/// Seconds of the proxy's clock in one of the wall's.
const SPEED: u32 = 60;
const SLOT_MILLIS: u64 = 30_000;
const START: Timestamp = Timestamp::from_secs(1_764_000_000);
/// Slots of the trace, and whether calls come in them.
const TRACE: [(u32, bool); 5] = [(4, false), (32, true), (18, false), (30, true), (16, false)];
const REPLICAS: u16 = 2;
/// Wall time between two calls.
const PAUSE: Duration = Duration::from_millis(100);
/// Longest that a call may take: no cold start, which takes four seconds, is in it.
const PROMPT: Duration = Duration::from_secs(2);

/// What one call has shown.
struct Served {
    reply: Reply,
    took: Duration,
}

/// Starts a proxy whose configuration and ledger are in `folder`.
async fn start(folder: &Path, api: &FakeBackend) -> Proxy {
    let path = folder.join("breakeven.toml");
    std::fs::write(&path, config(folder, &api.url())).unwrap();
    let config = Config::load(&path).unwrap_or_else(|problems| panic!("{problems}"));
    Proxy::start(config, Clock::accelerated(START, SPEED)).await.unwrap()
}

/// The start command is the replica; a shell around it writes down when it began and ended. It serves what its capacity
/// says: two calls at a time of about 300 ms are 7 a second, and each is 17 seconds of work on a clock of 60 times.
fn config(folder: &Path, api: &str) -> String {
    let port = free_ports(REPLICAS);
    let lives = folder.join("lives-{replica}");
    let script = format!(
        "date +%s%N >> {lives}; \
         {bin} fake-backend --listen 127.0.0.1:{{{port}+replica}} --ttft-ms 4 --tpot-ms 18 --startup-ms 3400 & pid=$!; \
         trap 'kill $pid; wait $pid; date +%s%N >> {lives}; exit 0' TERM; wait $pid",
        lives = lives.display(),
        bin = env!("CARGO_BIN_EXE_breakeven"),
    );
    format!(
        r#"
        [server]
        listen = "127.0.0.1:0"
        admin_listen = "127.0.0.1:0"
        workers = 1

        [ledger]
        path = {ledger:?}

        [policy]
        slot = "30s"

        [backends.openai]
        kind = "api"
        base_url = "{api}"

        [backends.gpu]
        kind = "self_hosted"
        base_url = "http://127.0.0.1:{{{port}+replica}}/v1"
        hourly_usd = 2.99
        billing = "while_running"
        capacity = {{ input_tokens_per_second = 3, output_tokens_per_second = 3, max_in_flight = 2 }}
        # Less than half of what it takes.
        startup = "90s"
        minimum = "1m"
        max_replicas = {REPLICAS}
        control = {{ kind = "command", start = ["sh", "-c", {script:?}], stop = ["true"] }}

        [routes.chat]
        models = ["house-model"]
        policy = "adaptive"
        offers = [
          {{ backend = "openai", price = {{ input = 1000, output = 1000 }} }},
          {{ backend = "gpu", model = "llama" }},
        ]
        "#,
        ledger = folder.join("breakeven.db").to_string_lossy(),
    )
}

/// Sends the trace's calls at their time, whether or not earlier ones are answered.
async fn drive(proxy: &Proxy) -> Vec<Served> {
    let http = Http::new(&format!("http://{}/v1", proxy.address));
    let mut calls = JoinSet::new();
    let mut timer = tokio::time::interval(PAUSE);
    for (slots, is_busy) in TRACE {
        let until =
            slots * u32::try_from(SLOT_MILLIS).unwrap() / SPEED / u32::try_from(PAUSE.as_millis()).unwrap();
        for _ in 0..until {
            timer.tick().await;
            if is_busy {
                let http = http.clone();
                calls.spawn(async move {
                    let watch = Stopwatch::start();
                    let body = with(chat("house-model"), json!({"max_tokens": 16}));
                    let reply = http.post("/chat/completions", &body).await;
                    Served { reply, took: watch.elapsed() }
                });
            }
        }
    }
    calls.join_all().await
}

/// Pins the pool to the API and waits until no replica is paid for any more. The slot in which it was pinned.
async fn stop_all(proxy: &Proxy) -> u64 {
    let pinned = slot_of(proxy.gateway.now());
    let pool = proxy.gateway.state().pools[0].clone();
    pool.set_pin(Some(Pin::Api));
    let is_up =
        || pool.backend.fleet.replicas().iter().any(|replica| replica.state() != ReplicaState::Stopped);
    let stopped = async {
        while is_up() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), stopped).await.expect("the replicas stop");
    pinned
}

fn slot_of(at: Timestamp) -> u64 {
    at.as_millis() / SLOT_MILLIS
}

/// When each process of a replica began and ended, in nanoseconds of the wall's clock.
fn lives(folder: &Path, replica: u16) -> Vec<(u64, u64)> {
    let text = std::fs::read_to_string(folder.join(format!("lives-{replica}"))).unwrap();
    let instants: Vec<u64> = text.lines().map(|line| line.parse().unwrap()).collect();
    assert!(instants.len().is_multiple_of(2), "every replica that began has ended: {text}");
    instants.chunks(2).map(|life| (life[0], life[1])).collect()
}

/// `simulate --ledger` with the run's own configuration, from the slot of the first row on: its JSON, and the target
/// of every slot.
fn replay(folder: &Path, slots: usize) -> (Value, Vec<u32>) {
    let economy = EconomyArgs { config: Some(folder.join("breakeven.toml")), ..EconomyArgs::default() };
    let arguments = SimulateArgs {
        ledger: Some(folder.join("breakeven.db")),
        policy: vec![PolicyName::Adaptive],
        schedule: Some(folder.join("schedule.csv")),
        format: Format::Json,
        horizon: Some(Duration::from_millis(SLOT_MILLIS) * u32::try_from(slots).unwrap()),
        economy,
        ..SimulateArgs::default()
    };
    let mut out = Vec::new();
    simulate::run(&arguments, &mut out).unwrap();
    let schedule = std::fs::read_to_string(folder.join("schedule.csv")).unwrap();
    let targets = schedule.lines().filter_map(|line| line.trim().parse().ok()).collect();
    (serde_json::from_slice(&out).unwrap(), targets)
}

/// What the planner wanted in each of `count` slots from `first` on, as the ledger tells it.
fn decided(folder: &Path, first: u64, count: usize) -> Vec<u32> {
    let events = query::events(&folder.join("breakeven.db"), Timestamp::ZERO).unwrap();
    let wanted: Vec<(u64, u32)> = events
        .iter()
        .filter(|event| event.kind == REPLICAS_EVENT && event.subject == "gpu")
        .filter_map(|event| {
            let target = event.detail.strip_suffix(" wanted")?.parse().unwrap();
            Some((slot_of(event.at), target))
        })
        .collect();
    let at = |slot: u64| wanted.iter().rev().find(|(from, _)| *from <= slot).map_or(0, |(_, target)| *target);
    (first..).take(count).map(at).collect()
}

fn spec(folder: &Path) -> PoolSpec {
    let config = Config::load(&folder.join("breakeven.toml")).unwrap_or_else(|problems| panic!("{problems}"));
    config.backends.iter().find_map(|backend| backend.pool()).unwrap().clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn real_replicas_follow_the_plan_and_cost_what_the_simulator_says() {
    let folder = tempfile::tempdir().unwrap();
    let api = FakeBackend::start(Personality::OpenAi, Settings::default()).await.unwrap();
    let proxy = start(folder.path(), &api).await;
    let served = drive(&proxy).await;
    let pinned = stop_all(&proxy).await;
    proxy.shut_down(std::future::pending()).await;
    check_calls(&served);
    check_rent(folder.path());
    check_replay(folder.path(), pinned);
}

/// No call fails or waits, and both sides have served.
fn check_calls(served: &[Served]) {
    for Served { reply, took } in served {
        assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
        assert!(*took < PROMPT, "{took:?} by `{}`", reply.header("x-breakeven-backend"));
    }
    let by = |name| served.iter().filter(|call| call.reply.header("x-breakeven-backend") == name).count();
    assert!(by("openai") > 20 && by("gpu") > 100, "{} and {}", by("openai"), by("gpu"));
}

/// Rent is the processes' lifetimes, to the shortest time that is billed.
fn check_rent(folder: &Path) {
    let rows = query::rent(&folder.join("breakeven.db"), Timestamp::ZERO).unwrap();
    assert!(rows.iter().all(|row| row.attributed + row.idle == row.rent));
    let lives: Vec<_> = (0..REPLICAS).flat_map(|replica| lives(folder, replica)).collect();
    // The start-up is measured in the first stretch, and no replica is stopped for that.
    assert_eq!(lives.len(), 4, "a life of each replica for each of the two busy stretches: {lives:?}");
    let paid: u64 = rows.iter().map(|row| row.replica_millis).sum();
    let lived: u64 = lives.iter().map(|(began, ended)| (ended - began) * u64::from(SPEED) / 1_000_000).sum();
    let unit = SLOT_MILLIS * u64::try_from(lives.len()).unwrap();
    assert!(paid >= lived && paid - lived < unit, "paid for {paid} ms, lived {lived} ms");
    let rent: NanoUsd = rows.iter().map(|row| row.rent).sum();
    let due = spec(folder).rent_between(0, paid);
    assert!((due - rent).as_nanos().unsigned_abs() <= lives.len() as u64, "{rent} for {paid} ms, not {due}");
}

/// The simulator takes the same decision in every slot whose decision was due before the pool was pinned, and its total
/// is within 5%: it counts start-ups in whole slots.
fn check_replay(folder: &Path, pinned: u64) {
    let mut first = u64::MAX;
    query::trace(&folder.join("breakeven.db"), Timestamp::ZERO, START + Duration::from_hours(24), |row| {
        first = first.min(slot_of(row.closed_at));
    })
    .unwrap();
    let (simulated, targets) = replay(folder, usize::try_from(pinned - first).unwrap());
    let taken = targets.len() - 1;
    assert_eq!(decided(folder, first, taken), targets[..taken]);
    assert!(targets.contains(&2) && targets.contains(&0), "{targets:?}");
    let events = query::events(&folder.join("breakeven.db"), Timestamp::ZERO).unwrap();
    assert!(events.iter().any(|event| event.kind == STARTUP_EVENT), "a start-up was measured: {events:?}");
    let rows = query::totals(&folder.join("breakeven.db"), None, None, &[]).unwrap();
    let live: NanoUsd = rows.iter().map(query::Row::spend).sum();
    let total = simulated["policies"][0]["total_usd"].as_f64().unwrap();
    let off = live.to_usd_f64() / total - 1.0;
    assert!(off.abs() < 0.05, "live {live}, simulated {total}: {:.1}% off", off * 100.0);
}
