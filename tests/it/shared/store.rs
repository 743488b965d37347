//! What the store promises, asked directly.

use std::time::Duration;

use breakeven::clock::Stopwatch;
use breakeven::config::{Secret, Shared};
use breakeven::economics::{NanoUsd, Slot, Timestamp, Work};
use breakeven::shared::lease::{Beat, Booked, Wish};
use breakeven::shared::rates::Unit;
use breakeven::shared::{Exchange, Identity, Link, SharedError, Store, budgets, rates};

use super::{settings, until};
use crate::support::needs;
use crate::support::redis::Redis;

const PATIENCE: Duration = Duration::from_secs(10);

fn identity(name: &str) -> Identity {
    Identity { proxy: format!("proxy-{name}"), process: format!("process-{name}") }
}

async fn join(settings: &Shared, name: &str) -> Store {
    Link::new(settings.clone(), identity(name)).connect().await.unwrap()
}

async fn beat(store: &mut Store, wish: Wish, booked: &[Booked]) -> Beat {
    let mut exchange = Exchange::default();
    exchange.ask_lease(store, wish, booked);
    store.send(&exchange).await.unwrap().lease().unwrap()
}

/// Takes the lease as soon as it is to be had.
async fn take(store: &mut Store) -> u64 {
    until("the lease is free", PATIENCE, async || beat(store, Wish::Take, &[]).await.token).await
}

fn seen(requests: u64) -> Slot {
    Slot {
        api_cost: NanoUsd::from_nanos(i64::try_from(requests).unwrap() * 3),
        work: Work(requests * 5),
        requests,
        tokens: requests * 7,
    }
}

#[tokio::test]
async fn each_hears_the_sum_of_the_others_however_often_it_was_told() {
    needs!(Redis);
    let redis = Redis::start().await;
    let settings = settings(&redis);
    let mut stores = Vec::new();
    for name in ["a", "b", "c"] {
        stores.push(join(&settings, name).await);
    }
    for (store, requests) in stores.iter_mut().zip([1, 20, 300]) {
        for repeated in [requests / 2, requests, requests] {
            let mut exchange = Exchange::default();
            exchange.tell_volume(store, "gpu", 7, &seen(repeated), Duration::from_mins(1));
            exchange.ask_volume(store, "gpu", 8);
            assert_eq!(store.send(&exchange).await.unwrap().volume(store).unwrap(), None);
        }
    }
    for (store, others) in stores.iter_mut().zip([320, 301, 21]) {
        let mut exchange = Exchange::default();
        exchange.ask_volume(store, "gpu", 7);
        assert_eq!(store.send(&exchange).await.unwrap().volume(store).unwrap(), Some(seen(others)));
    }
    assert!(redis.command("PTTL test:volume:gpu:7").await.trim_start_matches(':').trim() > "0");
}

#[tokio::test]
async fn how_often_a_past_was_told_is_counted_for_as_long_as_volume_is_kept() {
    needs!(Redis);
    let redis = Redis::start().await;
    let mut store = join(&settings(&redis), "a").await;
    for told in 0..3 {
        let mut exchange = Exchange::default();
        exchange.ask_pasts(&store);
        assert_eq!(store.send(&exchange).await.unwrap().pasts().unwrap(), told);
        let mut exchange = Exchange::default();
        exchange.past_is_told(&store, Duration::from_mins(1));
        exchange.ask_pasts(&store);
        assert_eq!(store.send(&exchange).await.unwrap().pasts().unwrap(), told + 1);
    }
    assert!(redis.command("PTTL test:volume:pasts").await.trim_start_matches(':').trim() > "0");
}

#[tokio::test]
async fn one_holds_the_lease_and_each_next_holder_has_a_higher_token() {
    needs!(Redis);
    let redis = Redis::start().await;
    let settings = settings(&redis);
    let (mut a, mut b) = (join(&settings, "a").await, join(&settings, "b").await);
    let first = take(&mut a).await;
    assert_eq!(beat(&mut b, Wish::Take, &[]).await.token, None);
    assert_eq!(beat(&mut a, Wish::Take, &[]).await.token, Some(first), "it is renewed under its token");
    assert_eq!(beat(&mut b, Wish::Take, &[]).await.proxies, 2);
    let second = take(&mut b).await;
    assert!(second > first, "{second} {first}");
    assert_eq!(beat(&mut a, Wish::Take, &[]).await.token, None, "who was silent has lost it");
    beat(&mut b, Wish::Leave, &[]).await;
    let third = beat(&mut a, Wish::Take, &[]).await;
    assert!(third.token > Some(second), "what is given back is free at once");
    assert_eq!(third.proxies, 1);
}

#[tokio::test]
async fn everybody_hears_what_rent_is_booked_and_it_stays_booked() {
    needs!(Redis);
    let redis = Redis::start().await;
    let settings = settings(&redis);
    let (mut a, mut b) = (join(&settings, "a").await, join(&settings, "b").await);
    let booked = |seconds| [Booked { pool: "gpu".to_owned(), until: Timestamp::from_secs(seconds) }];
    assert_eq!(beat(&mut a, Wish::Take, &booked(60)).await.booked, booked(60));
    assert_eq!(beat(&mut b, Wish::Take, &[]).await.booked, booked(60));
    assert_eq!(
        beat(&mut b, Wish::Take, &booked(59)).await.booked,
        booked(60),
        "an older word changes nothing"
    );
}

#[tokio::test]
async fn after_a_loss_of_memory_nobody_holds_the_lease_until_an_old_holder_has_stopped() {
    needs!(Redis);
    let mut redis = Redis::start().await;
    let settings = settings(&redis);
    let mut a = join(&settings, "a").await;
    let before = take(&mut a).await;
    redis.kill().await;
    redis.up().await;
    let (mut a, mut b) = (join(&settings, "a").await, join(&settings, "b").await);
    let asked = Stopwatch::start();
    assert_eq!(beat(&mut b, Wish::Take, &[]).await.token, None);
    assert_eq!(beat(&mut a, Wish::Take, &[]).await.token, None);
    let after = take(&mut b).await;
    assert!(asked.elapsed() >= settings.lease * 9 / 10, "{:?}", asked.elapsed());
    assert!(after > before, "the token is higher although the store had forgotten it");
}

fn nanos(nanos: i64) -> NanoUsd {
    NanoUsd::from_nanos(nanos)
}

/// A proxy with its part of one budget.
struct Spender {
    store: Store,
    spent: i64,
    allotted: Option<i64>,
    others_spent: i64,
}

impl Spender {
    async fn join(settings: &Shared, name: &str) -> Self {
        Self { store: join(settings, name).await, spent: 0, allotted: None, others_spent: 0 }
    }

    async fn claim(&mut self, limit: i64, is_busy: bool, proxies: u32) {
        let had = self.allotted.map(|allotted| allotted.max(self.spent));
        let kept = had.map(|had| self.spent + (had - self.spent) / 2);
        let claim = budgets::Claim {
            name: "all".to_owned(),
            from: Timestamp::ZERO,
            life: Duration::from_mins(1),
            limit: nanos(limit),
            spent: nanos(self.spent),
            used: nanos(self.spent),
            kept: kept.map(nanos),
            had: had.map(nanos),
            is_busy,
        };
        let mut exchange = Exchange::default();
        exchange.claim_budget(&self.store, &claim, proxies);
        let answer = self.store.send(&exchange).await.unwrap().budget().unwrap();
        self.allotted = Some(answer.allotted.as_nanos());
        self.others_spent = answer.others_spent.as_nanos();
    }
}

#[tokio::test]
async fn what_is_allotted_to_all_is_never_more_than_the_budget_but_for_one_unit_each() {
    const LIMIT: i64 = 1_000_000;
    needs!(Redis);
    let redis = Redis::start().await;
    let settings = settings(&redis);
    let mut spenders = Vec::new();
    for name in ["a", "b", "c", "d"] {
        spenders.push(Spender::join(&settings, name).await);
    }
    let seed = fastrand::u64(..);
    let mut random = fastrand::Rng::with_seed(seed);
    let began = Stopwatch::start();
    while began.elapsed() < settings.lease * 3 {
        let one = random.usize(0..spenders.len());
        let spender = &mut spenders[one];
        let left = spender.allotted.unwrap_or(0) - spender.spent;
        spender.spent += if random.bool() { random.i64(0..=left.max(0)) } else { 0 };
        spender.claim(LIMIT, random.bool(), 4).await;
        let allotted: i64 = spenders.iter().filter_map(|spender| spender.allotted).sum();
        assert!(allotted <= LIMIT + 4, "{allotted} of {LIMIT} are allotted, seed {seed}");
    }
    let spent: i64 = spenders.iter().map(|spender| spender.spent).sum();
    assert!(spent > LIMIT * 99 / 100, "only {spent} of {LIMIT} could be spent, seed {seed}");
    for spender in &mut spenders {
        spender.claim(LIMIT, false, 4).await;
        assert_eq!(spender.others_spent, spent - spender.spent);
    }
}

#[tokio::test]
async fn what_a_dead_proxy_had_reserved_is_free_again_and_what_it_spent_is_not() {
    const LIMIT: i64 = 1000;
    needs!(Redis);
    let redis = Redis::start().await;
    let settings = settings(&redis);
    let mut dead = Spender::join(&settings, "dead").await;
    let mut live = Spender::join(&settings, "live").await;
    live.claim(LIMIT, false, 2).await;
    dead.claim(LIMIT, true, 2).await;
    dead.spent = 100;
    dead.claim(LIMIT, true, 2).await;
    assert!(dead.allotted > Some(200), "{:?}", dead.allotted);
    let all_but_its_spending = async || {
        live.claim(LIMIT, true, 2).await;
        (live.allotted >= Some((LIMIT - 100) / 2)).then_some(live.allotted)
    };
    let half_of_it = until("its reservation ends", PATIENCE, all_but_its_spending).await;
    assert_eq!(half_of_it, Some((LIMIT - 100) / 2));
    live.claim(LIMIT, true, 1).await;
    assert_eq!(live.allotted, Some(LIMIT - 100), "who is alone has all that is left");
}

#[tokio::test]
async fn after_a_loss_of_memory_a_budget_gives_nothing_until_everybody_was_heard() {
    const LIMIT: i64 = 1000;
    needs!(Redis);
    let mut redis = Redis::start().await;
    let settings = settings(&redis);
    let (mut a, mut b) = (Spender::join(&settings, "a").await, Spender::join(&settings, "b").await);
    for _ in 0..20 {
        a.claim(LIMIT, true, 2).await;
        b.claim(LIMIT, true, 2).await;
    }
    redis.kill().await;
    redis.up().await;
    (a.store, b.store) = (join(&settings, "a").await, join(&settings, "b").await);
    a.spent = a.allotted.unwrap();
    a.claim(LIMIT, true, 2).await;
    assert_eq!(a.allotted, Some(a.spent), "the other's part is not known yet");
    b.claim(LIMIT, true, 2).await;
    let more = until("it gives again", PATIENCE, async || {
        a.claim(LIMIT, true, 2).await;
        b.claim(LIMIT, false, 2).await;
        (a.allotted > Some(a.spent + 100)).then_some(a.allotted)
    });
    more.await;
}

#[tokio::test]
async fn who_comes_first_to_an_empty_store_leaves_something_to_those_that_come_after_it() {
    const LIMIT: i64 = 1000;
    needs!(Redis);
    let redis = Redis::start().await;
    let settings = settings(&redis);
    let mut spenders = Vec::new();
    for name in ["a", "b", "c"] {
        // Each thinks that it is alone, until the answer to its first exchange.
        let mut spender = Spender::join(&settings, name).await;
        spender.claim(LIMIT, true, 1).await;
        spenders.push(spender);
    }
    let allotted: Vec<_> = spenders.iter().filter_map(|spender| spender.allotted).collect();
    assert_eq!(allotted, [500, 250, 125]);
    drop(spenders.split_off(1));
    let first = &mut spenders[0];
    until("it is alone, and has all of it", PATIENCE, async || {
        first.claim(LIMIT, true, 1).await;
        (first.allotted == Some(LIMIT)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_rate_limit_is_one_for_all_and_comes_back_with_time() {
    const PER_MINUTE: u64 = 6000;
    needs!(Redis);
    let redis = Redis::start().await;
    let settings = settings(&redis);
    let (mut a, mut b) = (join(&settings, "a").await, join(&settings, "b").await);
    let claim = |taken: i64, before: i64| rates::Claim {
        key: "key_1".to_owned(),
        unit: Unit::Requests,
        per_minute: PER_MINUTE,
        taken,
        before,
        kept: 0,
        is_busy: true,
    };
    let ask = async |store: &mut Store, taken, before| {
        let mut exchange = Exchange::default();
        exchange.claim_rate(store, &claim(taken, before), 2);
        store.send(&exchange).await.unwrap().rate().unwrap()
    };
    let first = ask(&mut a, 0, 0).await;
    assert_eq!((first.more, first.free), (PER_MINUTE / 2, 6000));
    let second = ask(&mut b, 0, 0).await;
    assert_eq!(second.more, PER_MINUTE / 4, "half of what is left");
    for _ in 0..2 {
        let repeated = ask(&mut a, 3000, 0).await;
        assert!((3000..3200).contains(&repeated.free), "{repeated:?}: what is told twice counts once");
    }
    let owed = ask(&mut b, 4000, 0).await;
    assert!(owed.free < 0 && owed.more == 0, "{owed:?}");
    until("it comes back", Duration::from_secs(20), async || {
        (ask(&mut a, 3000, 3000).await.more > 0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_server_that_is_away_hangs_or_holds_something_else_is_an_error_in_time() {
    needs!(Redis);
    let redis = Redis::start().await;
    let mut settings = settings(&redis);
    let mut store = join(&settings, "a").await;
    redis.command("SET test:volume:gpu:1 something").await;
    let mut exchange = Exchange::default();
    exchange.ask_volume(&store, "gpu", 1);
    assert!(matches!(store.send(&exchange).await, Err(SharedError::Redis(_))));
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    settings.connect_timeout = Duration::from_millis(100);
    for port in [silent.local_addr().unwrap().port(), 1] {
        settings.redis = Secret::new(format!("redis://127.0.0.1:{port}/0"));
        let asked = Stopwatch::start();
        assert!(Link::new(settings.clone(), identity("a")).connect().await.is_err(), "port {port}");
        assert!(asked.elapsed() < Duration::from_secs(5));
    }
}

#[tokio::test]
async fn with_tls_the_certificate_must_be_from_the_authority_that_is_named() {
    needs!(Redis);
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let certificate = certificate.self_signed(&key).unwrap();
    let redis = Redis::start_with(|folder, port| {
        let file = |name: &str, text: String| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path.display().to_string()
        };
        let (certificate, key) = (file("cert.pem", certificate.pem()), file("key.pem", key.serialize_pem()));
        let port = port.to_string();
        ["--port", "0", "--tls-port", &port, "--tls-cert-file", &certificate, "--tls-key-file", &key]
            .into_iter()
            .chain(["--tls-auth-clients", "no", "--requirepass", "hunter2"])
            .map(str::to_owned)
            .collect()
    })
    .await;
    let mut settings = settings(&redis);
    let port = redis.address().port();
    settings.redis = Secret::new(format!("rediss://:hunter2@localhost:{port}/0"));
    let link = |settings: &Shared| Link::new(settings.clone(), identity("a"));
    assert!(link(&settings).connect().await.is_err(), "nobody vouches for it");
    settings.ca = Some(redis.folder.path().join("cert.pem"));
    let mut store = link(&settings).connect().await.unwrap();
    take(&mut store).await;
    settings.redis = Secret::new(format!("rediss://:wrong@localhost:{port}/0"));
    let refused = format!("{:?}", link(&settings).connect().await.unwrap_err());
    assert!(!refused.contains("wrong"), "{refused}");
}
