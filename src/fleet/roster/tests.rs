//! The roster at work, on a clock that tests move.

use proptest::prelude::*;

use super::*;
use crate::config;
use crate::economics::Capacity;
use crate::fleet::replica::{ReplicaState, acquire};
use crate::health::Circuit;

pub(super) const START: Timestamp = Timestamp::from_secs(1_700_000_000);

pub(super) fn at(seconds: u64) -> Timestamp {
    START + Duration::from_secs(seconds)
}

fn pool(max_replicas: u32) -> PoolSpec {
    PoolSpec {
        hourly: "3.6".parse().unwrap(),
        billing: Billing::WhileRunning,
        request_fee: NanoUsd::ZERO,
        capacity: Capacity {
            input_tokens_per_second: 15_000,
            output_tokens_per_second: 10_000,
            max_in_flight: 4,
        },
        startup: Duration::from_secs(30),
        minimum: Duration::from_mins(1),
        max_replicas,
    }
}

pub(super) fn rules(max_replicas: u32) -> Rules {
    Rules {
        pool: pool(max_replicas),
        owner: Owner::Us { can_stop_strangers: true },
        probe_every: Some(Duration::from_secs(5)),
        probe_failures: 3,
        longest_call: Duration::from_mins(10),
        one_address: false,
        is_resolved: false,
        queue_every: None,
    }
}

/// A roster and a world that answers it: which machines run, which starts fail.
struct World {
    roster: Roster,
    replicas: Vec<Arc<Replica>>,
    /// Since when each machine answers.
    answers_from: Vec<Option<Timestamp>>,
    boots_in: Duration,
    starts_fail: bool,
    stops_fail: bool,
    /// Orders in the order given: `+0`, `-0`.
    orders: Vec<String>,
    rent: NanoUsd,
}

impl World {
    fn new(rules: Rules) -> Self {
        let settings = config::Circuit { failures: 3, open_for: Duration::from_secs(10) };
        let replicas: Vec<_> = (0..rules.pool.max_replicas)
            .map(|index| {
                Arc::new(Replica::new(
                    index,
                    format!("http://r{index}"),
                    rules.pool.capacity.max_in_flight,
                    Circuit::new(&settings),
                ))
            })
            .collect();
        Self {
            roster: Roster::new(rules, &replicas, START),
            answers_from: vec![None; replicas.len()],
            replicas,
            boots_in: Duration::from_secs(30),
            starts_fail: false,
            stops_fail: false,
            orders: Vec::new(),
            rent: NanoUsd::ZERO,
        }
    }

    fn answering(mut self, replicas: &[usize]) -> Self {
        for index in replicas {
            self.answers_from[*index] = Some(START);
        }
        self
    }

    /// Steps until nothing more is to be done at `seconds`.
    fn step(&mut self, target: u32, seconds: u64) {
        self.step_with(Some(target), seconds);
    }

    fn step_with(&mut self, target: Option<u32>, seconds: u64) {
        let now = at(seconds);
        loop {
            let actions = self.roster.step(target, now);
            if actions.is_empty() {
                break;
            }
            if actions.iter().any(|action| matches!(action, Action::Start { .. })) {
                assert!(self.held() <= target.unwrap(), "nothing is started beyond the target");
            }
            for action in actions {
                let report = self.answer(action, now);
                self.roster.hear(report, now);
            }
        }
        self.rent += self.roster.accrue(now).rent;
    }

    fn answer(&mut self, action: Action, now: Timestamp) -> Report {
        match action {
            Action::Start { replica, order } => {
                self.orders.push(format!("+{replica}"));
                let result = if self.starts_fail { Err("no machine".to_owned()) } else { Ok(()) };
                // An order is repeatable: what boots or runs goes on.
                if result.is_ok() {
                    self.answers_from[replica as usize].get_or_insert(now + self.boots_in);
                }
                Report::Start { replica, order, result }
            }
            Action::Stop { replica, order, .. } => {
                self.orders.push(format!("-{replica}"));
                let result = if self.stops_fail { Err("no way".to_owned()) } else { Ok(()) };
                if result.is_ok() {
                    self.answers_from[replica as usize] = None;
                }
                Report::Stop { replica, order, result }
            }
            Action::Probe { replica, order } => {
                let up = self.answers_from[replica as usize].is_some_and(|from| from <= now);
                let probe = if up { Probe::Up } else { Probe::Down("connection refused".to_owned()) };
                Report::Probe { replica, order, probe }
            }
            Action::ReadQueue { replica } => Report::QueueRead { replica },
            Action::Scale { .. } | Action::Resolve => unreachable!("these are started one by one"),
        }
    }

    /// Replicas that count towards the target.
    fn held(&self) -> u32 {
        let is_held =
            |replica: &&Arc<Replica>| matches!(replica.state(), ReplicaState::Starting | ReplicaState::Ready);
        u32::try_from(self.replicas.iter().filter(is_held).count()).unwrap()
    }

    fn states(&self) -> Vec<&'static str> {
        self.replicas.iter().map(|replica| replica.state().as_str()).collect()
    }

    fn orders(&self) -> String {
        self.orders.join(" ")
    }

    /// Rent so far in replica-seconds: the price is 3.60 USD an hour, a tenth of a cent a second.
    fn paid_seconds(&self) -> i64 {
        self.rent.as_nanos() / 1_000_000
    }

    fn events(&mut self) -> Vec<FleetEventKind> {
        self.roster.take_events().into_iter().map(|(_, kind)| kind).collect()
    }
}

#[test]
fn replicas_follow_the_target_and_take_calls_only_when_they_answer() {
    let mut world = World::new(rules(3));
    world.step(2, 0);
    assert_eq!(world.states(), ["starting", "starting", "stopped"]);
    assert!(acquire(&world.replicas, None, at(0)).is_none());
    world.step(2, 29);
    assert_eq!(world.states(), ["starting", "starting", "stopped"]);
    world.step(2, 30);
    assert_eq!(world.states(), ["ready", "ready", "stopped"]);
    assert!(acquire(&world.replicas, None, at(30)).is_some());
    world.step(9, 31);
    assert_eq!(world.states(), ["ready", "ready", "starting"]);
}

#[test]
fn the_most_recently_started_stops_first_and_rent_runs_from_order_to_stop() {
    let mut world = World::new(rules(2));
    world.step(1, 0);
    world.step(2, 10);
    world.step(1, 100);
    assert_eq!(world.orders(), "+0 +1 -1");
    assert_eq!(world.paid_seconds(), 100 + 90);
    world.step(0, 200);
    assert_eq!(world.paid_seconds(), 200 + 90);
    world.step(0, 300);
    assert_eq!(world.paid_seconds(), 200 + 90);
}

#[test]
fn an_earlier_stop_is_deferred_until_the_minimum_is_paid_and_it_serves_meanwhile() {
    let mut world = World::new(rules(1));
    world.step(1, 0);
    world.step(0, 30);
    assert_eq!(world.states(), ["ready"]);
    assert!(acquire(&world.replicas, None, at(30)).is_some());
    world.step(0, 59);
    assert_eq!(world.states(), ["ready"]);
    world.step(0, 60);
    assert_eq!(world.states(), ["stopped"]);
    assert_eq!(world.paid_seconds(), 60);
}

#[test]
fn a_starting_replica_whose_minimum_is_paid_is_stopped_without_waiting() {
    let mut world = World::new(rules(1));
    world.boots_in = Duration::from_secs(100);
    world.step(1, 0);
    world.step(0, 60);
    assert_eq!((world.orders().as_str(), world.paid_seconds()), ("+0 -0", 60));
}

#[test]
fn a_replica_is_kept_while_a_call_runs_and_takes_no_other() {
    let mut world = World::new(rules(1));
    world.step(1, 0);
    world.step(1, 30);
    let lease = acquire(&world.replicas, None, at(30)).unwrap();
    world.step(0, 70);
    assert_eq!(world.states(), ["draining"]);
    assert!(acquire(&world.replicas, None, at(70)).is_none());
    world.step(0, 200);
    assert_eq!(world.states(), ["draining"]);
    drop(lease);
    world.step(0, 201);
    assert_eq!(world.states(), ["stopped"]);
    assert_eq!(world.paid_seconds(), 201);
}

#[test]
fn a_drain_lasts_no_longer_than_the_longest_call_may() {
    let mut world = World::new(rules(1));
    world.step(1, 0);
    world.step(1, 30);
    let _lease = acquire(&world.replicas, None, at(30)).unwrap();
    world.step(0, 100);
    world.step(0, 699);
    assert_eq!(world.states(), ["draining"]);
    world.step(0, 700);
    assert_eq!(world.states(), ["stopped"]);
}

#[test]
fn a_draining_replica_that_is_wanted_again_is_kept_rather_than_another_started() {
    let mut world = World::new(rules(2));
    world.step(1, 0);
    world.step(1, 30);
    let _lease = acquire(&world.replicas, None, at(30)).unwrap();
    world.step(0, 70);
    world.step(1, 80);
    assert_eq!(world.states(), ["ready", "stopped"]);
    assert_eq!(world.orders(), "+0");
    assert!(world.events().contains(&FleetEventKind::Kept));
}

#[test]
fn a_failed_start_is_paid_cleaned_up_and_tried_again_after_a_pause_that_doubles() {
    let mut world = World::new(rules(1));
    world.starts_fail = true;
    for second in 0..40 {
        world.step(1, second);
    }
    assert_eq!(world.orders(), "+0 -0 +0 -0 +0 -0 +0 -0", "at 0, 5, 15 and 35 s");
    assert_eq!(world.states(), ["failed"]);
    assert_eq!(world.paid_seconds(), 4 * 60, "each failed start pays the minimum");
    world.starts_fail = false;
    world.step(1, 75);
    world.step(1, 105);
    assert_eq!(world.states(), ["ready"]);
}

#[test]
fn a_cloud_without_machines_is_not_asked_for_the_next_replica_at_once() {
    let mut world = World::new(rules(4));
    world.starts_fail = true;
    world.step(1, 0);
    world.step(1, 4);
    assert_eq!(world.orders(), "+0 -0");
    world.step(1, 5);
    assert_eq!(world.orders(), "+0 -0 +1 -1", "another replica is tried, in case the first is at fault");
    world.step(1, 14);
    assert_eq!(world.orders.len(), 4);
}

#[test]
fn a_start_that_never_answers_is_given_up() {
    let mut world = World::new(rules(1));
    world.boots_in = Duration::from_secs(100_000);
    world.step(1, 0);
    world.step(1, 120);
    assert_eq!(world.states(), ["starting"]);
    world.step(1, 121);
    assert_eq!(world.states(), ["failed"]);
    assert!(world.events().iter().any(|event| matches!(event, FleetEventKind::StartFailed { .. })));
    assert_eq!(world.paid_seconds(), 121);
}

#[test]
fn a_stop_that_fails_is_tried_again_and_paid_until_it_is_done() {
    let mut world = World::new(rules(1));
    world.step(1, 0);
    world.step(1, 30);
    world.stops_fail = true;
    for second in 100..400 {
        world.step(0, second);
    }
    assert_eq!(world.states(), ["stopping"]);
    assert_eq!(world.paid_seconds(), 399);
    world.stops_fail = false;
    for second in 400..1_000 {
        world.step(0, second);
    }
    assert_eq!(world.states(), ["stopped"]);
    assert!(world.paid_seconds() <= 399 + 300, "the pause is bounded");
}

#[test]
fn a_ready_replica_that_dies_is_replaced() {
    let mut world = World::new(rules(1));
    for second in 0..=60 {
        world.step(1, second);
    }
    world.answers_from[0] = None;
    for second in 61..=70 {
        world.step(1, second);
    }
    assert!(world.events().iter().any(|event| matches!(event, FleetEventKind::Lost { .. })));
    for second in 71..=120 {
        world.step(1, second);
    }
    assert_eq!((world.orders().as_str(), world.states()), ("+0 -0 +0", vec!["ready"]));
}

#[test]
fn a_busy_replica_that_does_not_answer_its_probe_is_not_dead() {
    let mut world = World::new(rules(1));
    world.step(1, 0);
    world.step(1, 30);
    let lease = acquire(&world.replicas, None, at(30)).unwrap();
    let silence = || Report::Probe { replica: 0, order: 1, probe: Probe::Silent };
    (31..50).for_each(|second| world.roster.hear(silence(), at(second)));
    assert_eq!(world.states(), ["ready"]);
    drop(lease);
    (50..53).for_each(|second| world.roster.hear(silence(), at(second)));
    assert_eq!(world.states(), ["stopping"]);
}

#[test]
fn running_replicas_are_taken_over_and_nothing_is_done_until_somebody_says_what_is_wanted() {
    let mut world = World::new(rules(2)).answering(&[1]);
    world.step_with(None, 0);
    assert_eq!(world.states(), ["stopped", "ready"]);
    world.step_with(None, 100);
    assert_eq!((world.orders().as_str(), world.paid_seconds()), ("", 100));
    world.step(0, 100);
    assert_eq!(world.orders(), "-1");
}

#[test]
fn while_another_process_decides_its_replicas_are_found_used_and_forgotten() {
    let mut world = World::new(rules(2));
    world.step_with(None, 0);
    assert_eq!(world.states(), ["stopped", "stopped"]);
    world.answers_from[1] = Some(at(5));
    (1..=10).for_each(|second| world.step_with(None, second));
    assert_eq!(world.states(), ["stopped", "ready"]);
    world.answers_from[1] = None;
    (11..=30).for_each(|second| world.step_with(None, second));
    assert_eq!((world.orders().as_str(), world.states()), ("", vec!["stopped", "failed"]));
}

#[test]
fn a_replica_that_we_cannot_stop_is_used_as_long_as_it_is_there() {
    let rules = Rules { owner: Owner::Us { can_stop_strangers: false }, ..rules(1) };
    let mut world = World::new(rules).answering(&[0]);
    world.step(0, 0);
    world.step(0, 100);
    assert_eq!((world.orders().as_str(), world.states()), ("", vec!["ready"]));
}

#[test]
fn replicas_of_others_are_used_and_paid_while_they_answer() {
    let rules = Rules { owner: Owner::Others, ..rules(2) };
    let mut world = World::new(rules).answering(&[0]);
    (0..=10).for_each(|second| world.step(2, second));
    assert_eq!((world.orders().as_str(), world.states()), ("", vec!["ready", "stopped"]));
    world.answers_from[0] = None;
    (11..=20).for_each(|second| world.step(2, second));
    assert_eq!(world.states(), ["failed", "stopped"]);
    let paid = world.paid_seconds();
    assert!((11..=20).contains(&paid), "no shortest time is added: {paid}");
    world.answers_from[0] = Some(at(30));
    (21..=40).for_each(|second| world.step(2, second));
    assert_eq!(world.states(), ["ready", "stopped"]);
    assert!(world.paid_seconds() - paid <= 10);
}

#[test]
fn without_a_probe_replicas_of_others_are_assumed_to_be_there() {
    let rules = Rules { owner: Owner::Others, probe_every: None, ..rules(1) };
    let mut world = World::new(rules);
    assert_eq!(world.states(), ["ready"]);
    world.step(0, 10);
    assert_eq!(world.paid_seconds(), 10);
}

#[test]
fn committed_replicas_are_paid_whether_they_run_or_not_and_paid_per_use_never() {
    let committed = PoolSpec { billing: Billing::Committed, ..pool(3) };
    let mut world = World::new(Rules { pool: committed, ..rules(3) });
    world.step(1, 0);
    world.step(0, 50);
    assert_eq!(world.paid_seconds(), 150);
    let per_use = PoolSpec { billing: Billing::PerUse, ..pool(3) };
    let mut world = World::new(Rules { pool: per_use, ..rules(3) });
    world.step(3, 0);
    world.step(3, 50);
    assert_eq!(world.paid_seconds(), 0);
}

#[test]
fn behind_one_address_the_answer_of_a_replica_does_not_stand_for_the_next() {
    let mut world = World::new(Rules { one_address: true, ..rules(2) });
    world.step(1, 0);
    world.step(1, 30);
    world.answers_from[1] = Some(START);
    world.boots_in = Duration::ZERO;
    world.step(2, 40);
    assert_eq!(world.states(), ["ready", "starting"]);
    world.step(2, 70);
    assert_eq!(world.states(), ["ready", "ready"]);
}

#[test]
fn the_startup_time_is_learnt() {
    let mut world = World::new(rules(1));
    assert_eq!(world.roster.learned_startup(), Duration::from_secs(30));
    world.boots_in = Duration::from_secs(50);
    (0..=50).for_each(|second| world.step(1, second));
    assert_eq!(world.roster.learned_startup(), Duration::from_secs(50));
}

#[test]
fn an_answer_about_an_earlier_life_is_ignored() {
    let mut world = World::new(rules(1));
    world.step(1, 0);
    world.roster.hear(Report::Probe { replica: 0, order: 0, probe: Probe::Up }, at(1));
    world.roster.hear(Report::Start { replica: 0, order: 0, result: Err("old".to_owned()) }, at(1));
    assert_eq!(world.states(), ["starting"]);
}

#[test]
fn what_has_no_owner_without_us_is_abandoned_at_once() {
    let mut world = World::new(rules(2));
    world.step(2, 0);
    world.step(2, 30);
    world.roster.release();
    world.roster.abandon(at(31), |replica| replica == 1);
    world.step_with(None, 31);
    assert_eq!((world.orders().as_str(), world.states()), ("+0 +1 -1", vec!["ready", "stopped"]));
}

#[test]
fn when_another_process_decides_nothing_is_stopped_and_a_drain_is_taken_back() {
    let mut world = World::new(rules(2));
    world.step(2, 0);
    world.step(2, 30);
    let lease = acquire(&world.replicas[1..], None, at(31));
    world.step(0, 61);
    assert_eq!((world.orders().as_str(), world.states()), ("+0 +1 -0", vec!["stopped", "draining"]));
    world.step_with(None, 62);
    drop(lease);
    world.step_with(None, 63);
    assert_eq!(world.states(), ["stopped", "ready"]);
    world.stops_fail = true;
    world.step(0, 130);
    world.step_with(None, 140);
    world.step_with(None, 141);
    assert_eq!(
        world.states(),
        ["stopped", "ready"],
        "a stop that failed is another's business: it still answers"
    );
}

#[test]
fn a_drain_waits_until_other_proxies_have_heard_of_it_and_their_calls_have_ended() {
    let mut world = World::new(rules(1));
    world.step(1, 0);
    world.step(1, 30);
    world.roster.keep_company(Duration::from_secs(2));
    world.step(0, 61);
    world.step(0, 62);
    assert_eq!(world.states(), ["draining"]);
    world.replicas[0].hear_others(1, false);
    world.step(0, 70);
    assert_eq!(world.states(), ["draining"]);
    world.replicas[0].hear_others(0, false);
    world.step(0, 71);
    assert_eq!(world.states(), ["stopped"]);
}

#[test]
fn a_start_that_is_let_go_and_kept_takes_no_call_before_it_answers_and_is_measured_from_its_order() {
    for decides_all_along in [true, false] {
        let mut world = World::new(rules(1));
        world.boots_in = Duration::from_secs(100);
        world.roster.keep_company(Duration::from_secs(2));
        world.step(1, 0);
        world.step(0, 61);
        assert_eq!(world.states(), ["draining"]);
        world.step_with(decides_all_along.then_some(1), 62);
        assert_eq!(world.states(), ["starting"]);
        (63..=100).for_each(|second| world.step(1, second));
        assert_eq!((world.states(), world.orders.len()), (vec!["ready"], 1));
        assert_eq!(world.roster.measured_startup(), Some(Duration::from_secs(100)));
    }
}

#[derive(Debug, Clone)]
enum Turn {
    Target(u32),
    Wait(u64),
    Lease,
    Release,
    StartsFail(bool),
    StopsFail(bool),
    Dies(usize),
}

fn turn() -> impl Strategy<Value = Turn> {
    prop_oneof![
        3 => (0_u32..5).prop_map(Turn::Target),
        6 => (0_u64..90).prop_map(Turn::Wait),
        2 => Just(Turn::Lease),
        2 => Just(Turn::Release),
        1 => any::<bool>().prop_map(Turn::StartsFail),
        1 => any::<bool>().prop_map(Turn::StopsFail),
        1 => (0_usize..3).prop_map(Turn::Dies),
    ]
}

proptest! {
    #[test]
    fn whatever_happens_rent_is_the_time_between_order_and_stop_and_the_target_is_reached_in_the_end(
        turns in prop::collection::vec(turn(), 1..60)
    ) {
        let mut world = World::new(rules(3));
        let (mut target, mut second) = (0, 0);
        let mut leases = Vec::new();
        // The same account, kept independently: seconds in which a replica was not stopped.
        let mut run_seconds = 0;
        for turn in turns {
            match turn {
                Turn::Target(wanted) => target = wanted,
                Turn::Lease => leases.extend(acquire(&world.replicas, None, at(second))),
                Turn::Release => drop(leases.pop()),
                Turn::StartsFail(fail) => world.starts_fail = fail,
                Turn::StopsFail(fail) => world.stops_fail = fail,
                Turn::Dies(replica) => world.answers_from[replica] = None,
                Turn::Wait(seconds) => {
                    for _ in 0..seconds {
                        second += 1;
                        let running = world.replicas.iter().filter(|replica| {
                            !matches!(replica.state(), ReplicaState::Stopped | ReplicaState::Failed)
                        });
                        run_seconds += i64::try_from(running.count()).unwrap();
                        world.step(target, second);
                    }
                }
            }
            world.step(target, second);
            let starts = i64::try_from(world.orders.iter().filter(|order| order.starts_with('+')).count()).unwrap();
            prop_assert!(world.paid_seconds() >= run_seconds);
            prop_assert!(world.paid_seconds() <= run_seconds + 60 * starts);
        }
        leases.clear();
        world.starts_fail = false;
        world.stops_fail = false;
        for _ in 0..1_500 {
            second += 1;
            world.step(target, second);
        }
        prop_assert_eq!(world.states().iter().filter(|state| **state == "ready").count(), target.min(3) as usize);
        prop_assert!(world.replicas.iter().all(|replica| replica.in_flight() == 0));
    }
}

#[test]
fn a_start_that_the_process_before_us_ordered_is_found_and_let_go_if_it_is_not_wanted() {
    let mut world = World::new(rules(1));
    // It was ordered 10 s ago, and answers in 90.
    world.answers_from[0] = Some(at(90));
    (0..=89).for_each(|second| world.step(0, second));
    assert_eq!(world.states(), ["stopped"]);
    world.step(0, 90);
    assert_eq!(world.states(), ["ready"], "its minimum may have begun now");
    (91..=150).for_each(|second| world.step(0, second));
    assert_eq!((world.states(), world.orders().as_str(), world.paid_seconds()), (vec!["stopped"], "-0", 60));
    // What we have stopped is not asked again: an address may start its machine when it is asked.
    world.answers_from[0] = Some(at(155));
    (151..=400).for_each(|second| world.step(0, second));
    assert_eq!(world.states(), ["stopped"]);
}

#[derive(Debug, Clone)]
enum Change {
    Target(u32),
    /// Which of the processes decides from now on; none while the lease is lost.
    Decides(Option<usize>),
    /// A process is replaced by one that knows nothing.
    Restarts(usize),
    Wait(u64),
    StartsFail(bool),
    StopsFail(bool),
    Dies(usize),
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        3 => (0_u32..5).prop_map(Change::Target),
        3 => prop::option::of(0_usize..2).prop_map(Change::Decides),
        1 => (0_usize..2).prop_map(Change::Restarts),
        6 => (0_u64..90).prop_map(Change::Wait),
        1 => any::<bool>().prop_map(Change::StartsFail),
        1 => any::<bool>().prop_map(Change::StopsFail),
        1 => (0_usize..3).prop_map(Change::Dies),
    ]
}

proptest! {
    /// Two processes take turns to decide over the same machines, and may be replaced: in the end as many machines
    /// run as are wanted, and both send calls to them.
    #[test]
    fn whoever_decided_before_no_machine_is_forgotten(changes in prop::collection::vec(change(), 1..60)) {
        let new = || World::new(rules(3));
        let (mut processes, mut machines) = ([new(), new()], vec![None; 3]);
        let (mut target, mut decides, mut second) = (0, Some(0), 0);
        let mut wait = |processes: &mut [World; 2], machines: &mut Vec<_>, target, decides: Option<usize>, seconds| {
            for _ in 0..seconds {
                second += 1;
                for (index, process) in processes.iter_mut().enumerate() {
                    std::mem::swap(&mut process.answers_from, machines);
                    process.step_with((decides == Some(index)).then_some(target), second);
                    std::mem::swap(&mut process.answers_from, machines);
                }
            }
        };
        for change in changes {
            match change {
                Change::Target(wanted) => target = wanted,
                Change::Decides(who) => decides = who,
                Change::Restarts(index) => processes[index] = new(),
                Change::StartsFail(fail) => processes.iter_mut().for_each(|process| process.starts_fail = fail),
                Change::StopsFail(fail) => processes.iter_mut().for_each(|process| process.stops_fail = fail),
                Change::Dies(machine) => machines[machine] = None,
                Change::Wait(seconds) => wait(&mut processes, &mut machines, target, decides, seconds),
            }
        }
        for process in &mut processes {
            (process.starts_fail, process.stops_fail) = (false, false);
        }
        wait(&mut processes, &mut machines, target, decides.or(Some(0)), 1_500);
        let wanted = target.min(3) as usize;
        prop_assert_eq!(machines.iter().flatten().count(), wanted, "{:?}", machines);
        for process in &processes {
            prop_assert_eq!(process.states().iter().filter(|state| **state == "ready").count(), wanted);
        }
    }
}
