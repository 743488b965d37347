//! Rosters that are scaled by a count, against a cluster made of values.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use proptest::prelude::*;

use super::super::Rules;
use super::super::tests::{START, at, rules as unscaled};
use super::*;
use crate::config;
use crate::economics::{NanoUsd, PoolSpec};
use crate::fleet::order::Report;
use crate::fleet::replica::{Replica, ReplicaState, acquire};
use crate::health::{Circuit, Probe};

const BOOT: Duration = Duration::from_secs(20);
const MAX: u32 = 4;

fn rules(stops_highest: bool) -> Rules {
    let rules = unscaled(MAX);
    Rules {
        pool: PoolSpec { minimum: Duration::ZERO, ..rules.pool },
        owner: Owner::Scale { stops_highest },
        is_resolved: !stops_highest,
        ..rules
    }
}

#[derive(Debug, Clone)]
struct Pod {
    /// The ordinal in a StatefulSet, else counted on for ever.
    number: u32,
    ready_from: Timestamp,
    is_marked: bool,
}

fn address(number: u32) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + number)), 8000)
}

/// A StatefulSet whose pods are numbered, or a Deployment behind a headless service.
struct Cluster {
    roster: Roster,
    replicas: Vec<Arc<Replica>>,
    is_ordered: bool,
    spec: u32,
    pods: Vec<Pod>,
    made: u32,
    is_away: bool,
    boots: bool,
    /// Counts that were written.
    written: Vec<u32>,
    events: Vec<FleetEventKind>,
    rent: NanoUsd,
}

impl Cluster {
    fn new(is_ordered: bool) -> Self {
        let settings = config::Circuit { failures: 3, open_for: Duration::from_secs(10) };
        let replica = |index| {
            let replica = Replica::new(index, format!("http://r{index}"), 4, Circuit::new(&settings));
            Arc::new(if is_ordered { replica } else { replica.found_by_name() })
        };
        let replicas: Vec<_> = (0..MAX).map(replica).collect();
        Self {
            roster: Roster::new(rules(is_ordered), &replicas, START),
            replicas,
            is_ordered,
            spec: 0,
            pods: Vec::new(),
            made: 0,
            is_away: false,
            boots: true,
            written: Vec::new(),
            events: Vec::new(),
            rent: NanoUsd::ZERO,
        }
    }

    fn running(&self) -> u32 {
        u32::try_from(self.pods.len()).unwrap()
    }

    /// What Kubernetes' controllers do.
    fn reconcile(&mut self, now: Timestamp) {
        while self.running() < self.spec {
            let number = if self.is_ordered { self.running() } else { self.made };
            self.made += 1;
            let ready_from = if self.boots { now + BOOT } else { now + Duration::from_hours(10_000) };
            self.pods.push(Pod { number, ready_from, is_marked: false });
        }
        while self.running() > self.spec {
            // Not ready ones first, then marked ones, then the newest; a StatefulSet the highest.
            let first = |pod: &Pod| {
                let rank = if pod.ready_from > now { 0 } else { 1 + u8::from(!pod.is_marked) };
                (if self.is_ordered { 0 } else { rank }, std::cmp::Reverse(pod.number))
            };
            let gone = (0..self.pods.len()).min_by_key(|index| first(&self.pods[*index])).unwrap();
            self.pods.remove(gone);
        }
    }

    fn answer(&mut self, action: Action, now: Timestamp) -> Report {
        match action {
            Action::Scale { .. } if self.is_away => Report::Scaled { result: Err("away".to_owned()) },
            Action::Scale { count } => {
                let running = self.running();
                for replica in self.replicas.iter().filter(|one| one.state() == ReplicaState::Stopping) {
                    let leaves = |pod: &&mut Pod| replica.address() == Some(address(pod.number));
                    self.pods.iter_mut().filter(leaves).for_each(|pod| pod.is_marked = true);
                }
                if let Some(count) = count.filter(|count| *count != self.spec) {
                    self.spec = count;
                    self.written.push(count);
                    self.reconcile(now);
                    // The status is that of before.
                    return Report::Scaled { result: Ok(kubernetes::Scale { wanted: count, running }) };
                }
                Report::Scaled { result: Ok(kubernetes::Scale { wanted: self.spec, running }) }
            }
            Action::Resolve => {
                let ready = self.pods.iter().filter(|pod| pod.ready_from <= now);
                let found: Vec<_> = ready.map(|pod| address(pod.number)).collect();
                // A name without addresses cannot be resolved.
                Report::Resolved { found: (!found.is_empty()).then_some(found) }
            }
            Action::Probe { replica, order } => {
                let subject = &self.replicas[replica as usize];
                let is_it = |pod: &&Pod| {
                    if self.is_ordered {
                        pod.number == replica
                    } else {
                        subject.address() == Some(address(pod.number))
                    }
                };
                let is_up = self.pods.iter().find(is_it).is_some_and(|pod| pod.ready_from <= now);
                let probe = if is_up { Probe::Up } else { Probe::Down("refused".to_owned()) };
                Report::Probe { replica, order, probe }
            }
            other => unreachable!("{other:?} is no action of a scaled roster"),
        }
    }

    fn step(&mut self, target: Option<u32>, seconds: u64) {
        let now = at(seconds);
        loop {
            let actions = self.roster.step(target, now);
            self.events.extend(self.roster.take_events().into_iter().map(|(_, kind)| kind));
            if actions.is_empty() {
                break;
            }
            for action in actions {
                let report = self.answer(action, now);
                self.roster.hear(report, now);
            }
        }
        self.rent += self.roster.accrue(now).rent;
    }

    /// Gives the workload to another process.
    fn hand_over(&mut self, other: &mut Self) {
        std::mem::swap(&mut self.spec, &mut other.spec);
        std::mem::swap(&mut self.pods, &mut other.pods);
        std::mem::swap(&mut self.made, &mut other.made);
    }

    fn run(&mut self, target: u32, seconds: std::ops::Range<u64>) {
        seconds.for_each(|second| self.step(Some(target), second));
    }

    fn count(&self, state: ReplicaState) -> u32 {
        u32::try_from(self.replicas.iter().filter(|replica| replica.state() == state).count()).unwrap()
    }

    /// Addresses of the ready replicas.
    fn ready_at(&self) -> Vec<SocketAddr> {
        let ready = self.replicas.iter().filter(|replica| replica.state() == ReplicaState::Ready);
        ready.filter_map(|replica| replica.address()).collect()
    }

    /// The pods that are to be are ready replicas, and nothing else is.
    fn is_settled(&self, count: u32) -> bool {
        let numbers: Vec<_> = self.pods.iter().map(|pod| pod.number).collect();
        let are_there = if self.is_ordered {
            numbers == (0..count).collect::<Vec<_>>()
                && (0..count as usize).all(|index| self.replicas[index].state() == ReplicaState::Ready)
        } else {
            let [mut pods, mut ready] = [numbers.into_iter().map(address).collect(), self.ready_at()];
            pods.sort_unstable();
            ready.sort_unstable();
            pods == ready
        };
        are_there
            && (self.spec, self.running()) == (count, count)
            && self.count(ReplicaState::Ready) == count
            && self.count(ReplicaState::Stopped) + self.count(ReplicaState::Failed) == MAX - count
    }

    fn slot(&self, index: usize) -> &Slot {
        &self.roster.slots[index]
    }

    fn told(&self, label: &str) -> usize {
        self.events.iter().filter(|kind| kind.as_str() == label).count()
    }
}

#[test]
fn a_target_becomes_one_count_and_its_pods_become_ready_replicas() {
    for is_ordered in [false, true] {
        let mut cluster = Cluster::new(is_ordered);
        cluster.run(2, 0..60);
        assert_eq!((&cluster.written[..], cluster.count(ReplicaState::Ready)), (&[2][..], 2));
        // Measured from the order to the first good probe, names resolved every five seconds.
        let learnt = cluster.roster.learned_startup().as_secs();
        assert!((20..=26).contains(&learnt), "{learnt} s");
        cluster.run(0, 60..100);
        assert_eq!((&cluster.written[..], cluster.count(ReplicaState::Stopped)), (&[2, 0][..], MAX));
    }
}

#[test]
fn nobody_elses_count_is_written_before_it_was_read() {
    let mut cluster = Cluster::new(false);
    cluster.spec = 3;
    cluster.reconcile(at(0));
    // Three pods start already, by the process before us. None of them answers yet.
    cluster.run(3, 0..60);
    assert_eq!((&cluster.written[..], cluster.count(ReplicaState::Ready)), (&[][..], 3));
    // What we have not ordered teaches nothing.
    assert_eq!(cluster.roster.learned_startup(), Duration::from_secs(30));
}

#[test]
fn a_call_in_flight_keeps_its_pod_and_the_drained_pod_is_the_one_that_goes() {
    let mut cluster = Cluster::new(false);
    cluster.run(1, 0..40);
    cluster.run(2, 40..80);
    let lease = [0, 1].map(|_| acquire(&cluster.replicas, None, at(80)).unwrap());
    let [kept, draining] = &lease;
    cluster.run(1, 80..120);
    assert_eq!(cluster.spec, 2, "the count waits for the call");
    assert_eq!(draining.state(), ReplicaState::Draining);
    let goes = draining.address().unwrap();
    let stays = kept.address().unwrap();
    drop(lease);
    cluster.run(1, 120..140);
    assert_eq!((cluster.spec, cluster.ready_at()), (1, vec![stays]));
    assert!(cluster.pods.iter().all(|pod| address(pod.number) != goes));
}

#[test]
fn when_another_pod_goes_than_the_drained_one_the_addresses_tell() {
    let mut cluster = Cluster::new(false);
    cluster.run(2, 0..40);
    let before = cluster.ready_at();
    // Kubernetes evicts one and makes another.
    let evicted = cluster.pods.remove(0);
    cluster.reconcile(at(40));
    cluster.run(2, 40..80);
    let after = cluster.ready_at();
    assert_eq!((after.len(), cluster.told("departed")), (2, 1));
    assert!(before.contains(&address(evicted.number)) && !after.contains(&address(evicted.number)));
    assert_eq!(cluster.written, [2], "the count was right all the time");
}

#[test]
fn the_highest_of_numbered_replicas_goes_first_and_those_below_wait_for_it() {
    let mut cluster = Cluster::new(true);
    cluster.run(3, 0..40);
    let leases = [0, 1, 2].map(|_| acquire(&cluster.replicas, None, at(40)).unwrap());
    cluster.run(1, 40..50);
    let [first, second, third] = leases;
    drop((first, second));
    cluster.run(1, 50..60);
    assert_eq!((cluster.spec, cluster.slot(1).replica.state()), (3, ReplicaState::Draining));
    drop(third);
    cluster.run(1, 60..70);
    assert_eq!((cluster.spec, cluster.slot(0).replica.state()), (1, ReplicaState::Ready));
    cluster.run(2, 70..110);
    assert_eq!((cluster.spec, cluster.slot(1).replica.state()), (2, ReplicaState::Ready));
}

#[test]
fn of_numbered_replicas_that_are_let_go_the_lowest_is_kept_even_if_it_has_just_begun_again() {
    let mut cluster = Cluster::new(true);
    cluster.run(2, 0..40);
    let lease = acquire(&cluster.replicas, None, at(40)).unwrap();
    let other = acquire(&cluster.replicas, None, at(40)).unwrap();
    // Another process decides for a while, in which the lowest is down; so it is the younger when we do again.
    cluster.pods[0].ready_from = at(1000);
    (40..60).for_each(|second| cluster.step(None, second));
    cluster.run(0, 60..80);
    assert_eq!((cluster.spec, cluster.count(ReplicaState::Draining)), (2, 2), "calls are in flight");
    cluster.run(1, 80..100);
    assert_eq!(cluster.slot(0).replica.state(), ReplicaState::Starting, "no probe has seen it answer");
    drop((lease, other));
    cluster.pods[0].ready_from = at(100);
    cluster.run(1, 100..110);
    assert!(cluster.is_settled(1), "{:#?}", cluster.roster);
}

#[test]
fn a_numbered_replica_that_is_lost_below_another_is_waited_for() {
    let mut cluster = Cluster::new(true);
    cluster.run(2, 0..40);
    cluster.pods[0].ready_from = at(1000);
    cluster.run(2, 40..900);
    assert_eq!(cluster.spec, 2, "lowering the count would take the other one");
    assert_eq!(cluster.slot(1).replica.state(), ReplicaState::Ready);
    cluster.run(2, 900..1010);
    assert_eq!(cluster.count(ReplicaState::Ready), 2);
}

#[test]
fn a_pod_that_does_not_come_is_reported_paid_let_go_and_tried_again() {
    let mut cluster = Cluster::new(false);
    cluster.boots = false;
    cluster.run(1, 0..300);
    // Given up after four times the start-up time, and ordered again 5 s later.
    assert_eq!(cluster.told("start_failed"), 2);
    assert_eq!(cluster.written, [1, 0, 1, 0, 1]);
    let paid_seconds = cluster.rent.as_nanos() / 1_000_000;
    assert!((285..=300).contains(&paid_seconds), "{paid_seconds} s");
}

#[test]
fn an_api_server_that_is_away_is_asked_again_and_the_count_is_written_once_it_is_back() {
    let mut cluster = Cluster::new(false);
    cluster.run(1, 0..40);
    cluster.is_away = true;
    cluster.run(2, 40..100);
    assert!(cluster.told("start_failed") >= 2, "{:?}", cluster.events);
    assert_eq!((cluster.spec, cluster.count(ReplicaState::Ready)), (1, 1));
    cluster.is_away = false;
    cluster.run(2, 100..500);
    assert_eq!((cluster.spec, cluster.count(ReplicaState::Ready)), (2, 2));
}

#[test]
fn a_count_that_somebody_else_changed_is_put_right_within_half_a_minute() {
    let mut cluster = Cluster::new(false);
    cluster.run(1, 0..40);
    cluster.spec = 3;
    cluster.reconcile(at(40));
    cluster.run(1, 40..40 + RESYNC.as_secs() + 2);
    assert_eq!((cluster.spec, cluster.count(ReplicaState::Ready)), (1, 1));
}

#[test]
fn a_process_that_no_longer_decides_writes_nothing_and_keeps_what_runs() {
    let mut cluster = Cluster::new(false);
    cluster.run(2, 0..40);
    let leases = [0, 1].map(|_| acquire(&cluster.replicas, None, at(40)).unwrap());
    cluster.run(1, 40..45);
    assert_eq!(cluster.count(ReplicaState::Draining), 1);
    drop(leases);
    cluster.step(None, 46);
    assert_eq!((&cluster.written[..], cluster.count(ReplicaState::Ready)), (&[2][..], 2));
    // The other process has three; ours sees them come and does not mind.
    cluster.spec = 3;
    cluster.reconcile(at(46));
    (46..100).for_each(|second| cluster.step(None, second));
    assert_eq!((&cluster.written[..], cluster.count(ReplicaState::Ready)), (&[2][..], 3));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever was wanted, broke or was away before: once things are well, there are as many pods as are
    /// wanted, each is a ready replica, and no count was ever written that nobody had wanted.
    #[test]
    fn in_the_end_the_count_is_what_is_wanted(
        is_ordered in any::<bool>(),
        days in prop::collection::vec((0..=MAX, 1_u64..60, 0_u8..8, any::<bool>()), 1..12),
        last in 0..=MAX,
    ) {
        let mut cluster = Cluster::new(is_ordered);
        let mut now = 0;
        let mut calls = Vec::new();
        for (target, seconds, trouble, is_called) in days {
            cluster.is_away = trouble == 1;
            cluster.boots = trouble != 2;
            if trouble == 3 && !is_ordered && !cluster.pods.is_empty() {
                cluster.pods.remove(0);
                cluster.reconcile(at(now));
            }
            if is_called {
                calls.extend(acquire(&cluster.replicas, None, at(now)));
            } else {
                calls.pop();
            }
            for second in now..now + seconds {
                cluster.step((trouble != 4).then_some(target), second);
                prop_assert!(cluster.spec <= MAX);
            }
            now += seconds;
        }
        drop(calls);
        cluster.is_away = false;
        cluster.boots = true;
        if is_ordered {
            // A StatefulSet's pod below one that serves cannot be let go by a count: there it is the kubelet that
            // starts its container again, which now succeeds.
            for pod in &mut cluster.pods {
                pod.ready_from = pod.ready_from.min(at(now) + BOOT);
            }
        }
        // Pods that never boot are given up after two minutes, with pauses of up to five.
        for second in now..now + 2_500 {
            cluster.step(Some(last), second);
        }
        prop_assert!(cluster.is_settled(last), "{} wanted, {:?}: {:#?}", last, cluster.pods, cluster.roster);
    }

    /// Two processes take turns to decide over one workload, and may be replaced: in the end there are as many pods
    /// as are wanted, and both send calls to all of them.
    #[test]
    fn whoever_decided_before_the_count_is_what_is_wanted(
        is_ordered in any::<bool>(),
        days in prop::collection::vec((0..=MAX, 1_u64..60, 0_u8..8, prop::option::of(0_usize..2)), 1..12),
        last in (0..=MAX, 0_usize..2),
    ) {
        let mut processes = [Cluster::new(is_ordered), Cluster::new(is_ordered)];
        let mut now = 0;
        let mut run = |processes: &mut [Cluster; 2], target, decides: Option<usize>, seconds: u64| {
            for second in now..now + seconds {
                let [one, other] = processes;
                one.step((decides == Some(0)).then_some(target), second);
                one.hand_over(other);
                other.step((decides == Some(1)).then_some(target), second);
                other.hand_over(one);
            }
            now += seconds;
        };
        for (target, seconds, trouble, decides) in days {
            for process in &mut processes {
                process.is_away = trouble == 1;
                process.boots = trouble != 2;
            }
            if trouble == 3 {
                let mut fresh = Cluster::new(is_ordered);
                fresh.hand_over(&mut processes[0]);
                processes[0] = fresh;
            }
            run(&mut processes, target, decides, seconds);
        }
        for process in &mut processes {
            (process.is_away, process.boots) = (false, true);
            process.pods.iter_mut().for_each(|pod| pod.ready_from = pod.ready_from.min(at(1_000)));
        }
        let (target, decides) = last;
        run(&mut processes, target, Some(decides), 2_500);
        let [one, other] = &mut processes;
        prop_assert!(one.is_settled(target), "{} wanted, {:?}: {:#?}", target, one.pods, one.roster);
        one.hand_over(other);
        prop_assert!(other.is_settled(target), "{} wanted, {:?}: {:#?}", target, other.pods, other.roster);
    }
}
