//! The planner under a clock that tests move, with a real gateway and a real ledger.

use tempfile::TempDir;

use super::*;
use crate::clock::Clock;
use crate::config;
use crate::economics::{NanoUsd, PoolSpec, Preference, Reason, Slot, Work};
use crate::gateway::Pin;
use crate::ledger::{Event, Ledger, RentEntry, query};

/// A gateway at a time of its own, with a ledger.
struct World {
    clock: Clock,
    gateway: Arc<Gateway>,
    planner: Planner,
    folder: TempDir,
}

const MINUTE: Duration = Duration::from_mins(1);
const START: Timestamp = Timestamp::from_secs(1_764_000_000);

fn config(folder: &TempDir, own: &str, route: &str) -> Arc<config::Config> {
    let path = folder.path().join("breakeven.db");
    let text = format!(
        r#"
        ledger = {{ path = {path:?} }}
        policy = {{ window = "10m", min_dwell = "2m", slot = "60s" }}

        [backends.openai]
        kind = "api"
        base_url = "http://127.0.0.1:1/v1"

        [backends.gpu]
        kind = "self_hosted"
        base_url = "http://127.0.0.1:2/v1"
        hourly_usd = 2.99
        health = {{ path = "" }}
        capacity = {{ input_tokens_per_second = 15000, output_tokens_per_second = 10000, max_in_flight = 2 }}
        {own}

        [routes.chat]
        models = ["gpt-4o-mini"]
        offers = [{{ backend = "openai" }}, {{ backend = "gpu", model = "llama" }}]
        {route}
        "#
    );
    Arc::new(config::parse(&text, "test", &|_| None).unwrap_or_else(|problems| panic!("{problems}")))
}

const COMMANDED: &str = "startup = '2m'\nminimum = '1m'\nmax_replicas = 3\n\
    control = { kind = 'command', start = ['true'], stop = ['true'] }";
const CHEAPEST: &str = "policy = 'cheapest'";

impl World {
    fn new(own: &str, route: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = config(&folder, own, route);
        let clock = Clock::manual(START);
        let ledger = Ledger::open(&config.ledger, clock.clone()).unwrap();
        let gateway = Gateway::new(config, clock.clone(), ledger).unwrap();
        let planner = Planner::new(gateway.clone());
        Self { clock, gateway, planner, folder }
    }

    fn pool(&self) -> Arc<Pool> {
        self.gateway.state().pools[0].clone()
    }

    fn spec(&self) -> PoolSpec {
        self.pool().spec.clone()
    }

    /// Lets a slot pass in which calls worth so many dollars an hour close, which fill `replicas`.
    fn pass_slot(&mut self, usd_per_hour: f64, replicas: f64) {
        let seen = slot(usd_per_hour, replicas);
        self.pool().record(self.gateway.now(), &seen);
        self.pass(MINUTE);
    }

    fn pass(&mut self, time: Duration) {
        self.clock.advance(time);
        self.planner.tick(self.gateway.now() + Duration::from_millis(5));
    }

    fn target(&self) -> u32 {
        self.pool().backend.fleet.target().expect("a target is set")
    }

    async fn events(&self, kind: &str) -> Vec<Event> {
        assert!(self.gateway.ledger.flush().await);
        let path = self.folder.path().join("breakeven.db");
        let events = query::events(&path, Timestamp::ZERO).unwrap();
        events.into_iter().filter(|event| event.kind == kind).collect()
    }

    async fn rent(&self) -> Vec<RentEntry> {
        assert!(self.gateway.ledger.flush().await);
        query::rent(&self.folder.path().join("breakeven.db"), Timestamp::ZERO).unwrap()
    }

    /// A new process with the same ledger.
    fn restart(self) -> Self {
        let Self { clock, gateway, planner, folder } = self;
        let config = gateway.state().config.clone();
        drop((planner, gateway));
        let ledger = Ledger::open(&config.ledger, clock.clone()).unwrap();
        let gateway = Gateway::new(config, clock.clone(), ledger).unwrap();
        let planner = Planner::new(gateway.clone());
        Self { clock, gateway, planner, folder }
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small numbers of a test")]
fn slot(usd_per_hour: f64, replicas: f64) -> Slot {
    Slot {
        api_cost: NanoUsd::from_nanos((usd_per_hour / 60.0 * 1e9) as i64),
        work: Work((replicas * 60e6) as u64),
        requests: 100,
        tokens: 1000,
    }
}

#[tokio::test]
async fn a_volume_above_break_even_is_followed_and_its_end_too() {
    let mut world = World::new(COMMANDED, CHEAPEST);
    assert_eq!(world.target(), 0);
    (0..10).for_each(|_| world.pass_slot(30.0, 1.5));
    assert_eq!(world.target(), 2);
    assert_eq!(world.pool().plan(), (Preference::SelfHosted, Reason::Cheapest));
    (0..60).for_each(|_| world.pass(MINUTE));
    assert_eq!(world.target(), 0);
    let targets = world.events(REPLICAS_EVENT).await;
    let said: Vec<_> = targets.iter().map(|event| event.detail.as_str()).collect();
    assert_eq!((said[0], said[said.len() - 1]), ("0 wanted", "0 wanted"));
    assert!(said.contains(&"2 wanted"), "{said:?}");
    assert!(targets.iter().all(|event| event.at.as_millis().is_multiple_of(60_000)), "{targets:?}");
}

#[tokio::test]
async fn a_planner_that_comes_late_tells_the_policy_of_every_slot() {
    let mut prompt = World::new(COMMANDED, CHEAPEST);
    let mut late = World::new(COMMANDED, CHEAPEST);
    for world in [&mut prompt, &mut late] {
        (0..10).for_each(|_| world.pass_slot(30.0, 1.5));
    }
    (0..30).for_each(|_| prompt.pass(MINUTE));
    late.pass(MINUTE * 30);
    assert_eq!(prompt.events(REPLICAS_EVENT).await, late.events(REPLICAS_EVENT).await);
    assert_eq!(prompt.target(), late.target());
}

#[tokio::test]
async fn a_call_that_adds_itself_up_late_counts_in_the_slot_that_is_open() {
    let mut world = World::new(COMMANDED, CHEAPEST);
    let closed_at = world.gateway.now();
    world.pass(MINUTE);
    world.pool().record(closed_at, &slot(60.0, 1.0));
    let open = world.pool().slot_of(world.gateway.now());
    assert_eq!(world.pool().take(open), slot(60.0, 1.0));
}

#[tokio::test]
async fn a_pin_goes_before_the_plan_and_unpinning_gives_it_back() {
    let mut world = World::new(COMMANDED, CHEAPEST);
    (0..10).for_each(|_| world.pass_slot(30.0, 1.5));
    world.pool().set_pin(Some(Pin::Api));
    world.pass(Duration::from_secs(1));
    assert_eq!((world.target(), world.pool().plan().1), (0, Reason::Pinned));
    world.pool().set_pin(None);
    world.pass(Duration::from_secs(1));
    assert_eq!(world.target(), 2);
    (0..60).for_each(|_| world.pass(MINUTE));
    world.pool().set_pin(Some(Pin::SelfHosted));
    world.pass(Duration::from_secs(1));
    assert_eq!(world.target(), 1);
}

#[tokio::test]
async fn replicas_that_are_paid_anyway_are_held_at_any_volume() {
    let own = format!("billing = 'committed'\n{COMMANDED}");
    for policy in [CHEAPEST, "policy = 'adaptive'"] {
        let mut world = World::new(&own, policy);
        assert_eq!(world.target(), 3, "{policy}");
        world.pass(MINUTE);
        assert_eq!(world.target(), 3, "{policy}");
    }
}

#[tokio::test]
async fn rent_in_the_ledger_is_the_lifetime_of_the_replicas_and_adds_up() {
    let mut world = World::new("billing = 'committed'\nmax_replicas = 3", CHEAPEST);
    let mut attributed = NanoUsd::ZERO;
    for step in 1..200_u64 {
        let share = NanoUsd::from_nanos(i64::try_from(step).unwrap() * 12_345);
        world.pool().attribute(share, Work(step));
        attributed += share;
        world.pass(Duration::from_millis(step * 137 % 9_001));
    }
    world.planner.close(world.gateway.now());
    let rows = world.rent().await;
    let lifetime = rows.last().unwrap().to.since(START);
    assert!(rows.iter().all(|row| row.attributed + row.idle == row.rent));
    let sum = |of: fn(&RentEntry) -> NanoUsd| rows.iter().map(of).sum::<NanoUsd>();
    let one = world.spec().rent_between(0, crate::economics::time::millis(lifetime));
    assert_eq!(sum(|row| row.rent), one + one + one);
    assert_eq!(sum(|row| row.attributed), attributed);
    let paid: u64 = rows.iter().map(|row| row.replica_millis).sum();
    assert_eq!(paid, 3 * crate::economics::time::millis(lifetime));
    assert!(rows.windows(2).all(|pair| pair[0].to == pair[1].from), "adjacent");
}

#[tokio::test]
async fn what_is_paid_by_use_is_never_idle() {
    let mut world = World::new("billing = 'per_use'", CHEAPEST);
    world.pool().attribute(NanoUsd::from_nanos(777), Work(10));
    world.pass(MINUTE);
    let rows = world.rent().await;
    assert_eq!(rows.len(), 1);
    assert_eq!((rows[0].rent, rows[0].idle), (NanoUsd::from_nanos(777), NanoUsd::ZERO));
}

#[tokio::test]
async fn what_is_paid_by_use_breaks_even_at_no_volume() {
    let mut world = World::new("billing = 'per_use'", CHEAPEST);
    world.pass_slot(30.0, 1.5);
    let view = world.pool().view.load_full();
    assert_eq!((view.break_even_requests_per_hour, view.kappa.is_some()), (None, true));
    assert!(view.sentence.contains("requests an hour, so"), "{}", view.sentence);
}

#[tokio::test]
async fn a_call_that_outlives_a_reload_is_attributed_all_the_same() {
    let mut world = World::new("", CHEAPEST);
    let held_by_a_call = world.pool();
    world.gateway.reconfigure(config(&world.folder, "", "policy = 'adaptive'")).unwrap();
    assert!(!Arc::ptr_eq(&held_by_a_call, &world.pool()));
    world.pass(MINUTE);
    held_by_a_call.attribute(NanoUsd::from_nanos(55), Work(10));
    drop(held_by_a_call);
    world.pass(MINUTE);
    assert!(world.planner.retired.is_empty());
    let rows = world.rent().await;
    assert_eq!(rows.iter().map(|row| row.attributed).sum::<NanoUsd>(), NanoUsd::from_nanos(55));
    assert!(rows.iter().all(|row| row.attributed + row.idle == row.rent));
}

#[tokio::test]
async fn a_restart_takes_up_what_the_ledger_has_and_what_closed_in_the_open_slot() {
    let mut world = World::new(COMMANDED, CHEAPEST);
    for minute in 0..10 {
        let closed_at = world.gateway.now() + Duration::from_secs(59);
        let _ticket = world.gateway.ledger.append(&entry(closed_at, slot(30.0, 1.5)));
        world.pass_slot(30.0, 1.5);
        assert_eq!(
            world.pool().slot_of(closed_at) + 1,
            world.pool().slot_of(world.gateway.now()),
            "{minute}"
        );
    }
    let (target, plan) = (world.target(), world.pool().plan());
    let open = world.gateway.now() + Duration::from_secs(1);
    let _ticket = world.gateway.ledger.append(&entry(open, slot(12.0, 0.5)));
    assert!(world.gateway.ledger.flush().await);
    world.clock.advance(Duration::from_secs(20));
    let world = world.restart();
    assert_eq!((world.target(), world.pool().plan()), (target, plan));
    let seen = world.pool().take(world.pool().slot_of(open));
    assert_eq!((seen.api_cost, seen.work), (slot(12.0, 0.5).api_cost, slot(12.0, 0.5).work));
}

fn entry(closed_at: Timestamp, seen: Slot) -> crate::ledger::Entry<'static> {
    crate::ledger::Entry {
        opened_at: closed_at,
        closed_at,
        route: "chat".into(),
        api_cost: Some(seen.api_cost),
        work: seen.work,
        ..crate::ledger::testing::entry(1)
    }
}

#[tokio::test]
async fn full_replicas_at_half_speed_are_learnt_noted_and_remembered() {
    let mut world = World::new("", CHEAPEST);
    let _leases: Vec<_> = (0..2).map(|_| world.pool().backend.fleet.acquire().unwrap()).collect();
    for _ in 0..60 {
        for _ in 0..4 {
            world.pool().attribute(NanoUsd::ZERO, Work(15_000_000 / 2));
            world.pass(MINUTE / 4);
        }
    }
    let speed = world.pool().view.load().learnt.unwrap().speed;
    assert!((speed - 0.5).abs() < 0.02, "{speed}");
    let noted = world.events(CAPACITY_EVENT).await;
    let last = noted.last().and_then(speed_in).unwrap();
    assert!((last - 0.5).abs() < 0.03, "{noted:?}");
    let mut world = world.restart();
    world.pass(Duration::from_secs(1));
    let resumed = world.pool().view.load().learnt.unwrap().speed;
    assert!((resumed - last).abs() < 1e-9, "{resumed} after {last}");
}

#[tokio::test]
async fn a_start_up_that_was_measured_is_remembered() {
    let world = World::new(COMMANDED, "policy = 'adaptive'");
    let at = world.gateway.now();
    let event = |subject: &str, detail: &str| Event {
        at,
        kind: STARTUP_EVENT.to_owned(),
        subject: subject.to_owned(),
        detail: detail.to_owned(),
    };
    world.gateway.ledger.append_event(&event("gpu", "612.500 s from the order"));
    world.gateway.ledger.append_event(&event("another", "1.000 s from the order"));
    assert!(world.gateway.ledger.flush().await);
    let mut world = world.restart();
    (0..3).for_each(|_| world.pass_slot(30.0, 1.5));
    assert_eq!(world.planner.pools[0].spec().startup, Duration::from_millis(612_500));
}

#[tokio::test]
async fn a_speed_above_the_estimate_needs_first_tokens_in_time() {
    let mut world = World::new("", CHEAPEST);
    let _leases: Vec<_> = (0..2).map(|_| world.pool().backend.fleet.acquire().unwrap()).collect();
    let mut pass_fast_slot = |first: Option<Duration>| {
        for _ in 0..4 {
            world.pool().attribute(NanoUsd::ZERO, Work(15_000_000 * 2));
            (0..10).for_each(|_| first.into_iter().for_each(|first| world.pool().first_token(first)));
            world.pass(MINUTE / 4);
        }
        world.pool().view.load().learnt.unwrap().speed
    };
    let unknown = (0..5).map(|_| pass_fast_slot(None)).last().unwrap();
    assert!((unknown - 1.0).abs() < 1e-9, "{unknown}");
    let late = (0..5).map(|_| pass_fast_slot(Some(Duration::from_secs(3)))).last().unwrap();
    assert!((late - 1.0).abs() < 1e-9, "{late}");
    let in_time = (0..50).map(|_| pass_fast_slot(Some(Duration::from_millis(300)))).last().unwrap();
    assert!(in_time > 1.8, "{in_time}");
}

#[tokio::test]
async fn replicas_with_room_teach_nothing() {
    let mut world = World::new("", CHEAPEST);
    let _lease = world.pool().backend.fleet.acquire().unwrap();
    for _ in 0..40 {
        world.pool().attribute(NanoUsd::ZERO, Work(1_000_000));
        world.pass(MINUTE / 4);
    }
    assert!((world.pool().view.load().learnt.unwrap().speed - 1.0).abs() < 1e-9);
}
