//! What the planner does for one pool, a slot at a time.

use std::sync::Arc;
use std::time::Duration;

use tracing::info;

use super::capacity::CapacityWatch;
use super::rent::RentBook;
use crate::economics::policy::policy_for;
use crate::economics::volume::VolumeWindow;
use crate::economics::{Billing, Decision, Policy, PoolSpec, Preference, Reason, Slot, Timestamp, Work};
use crate::gateway::{Gateway, Pin, Pool};
use crate::ledger::Event;

/// Kind of the ledger's events that say how many replicas a policy wants, from the start of a slot on.
pub const REPLICAS_EVENT: &str = "replicas";
/// Kind of the ledger's events that say how fast a pool's replicas turned out to be.
pub const CAPACITY_EVENT: &str = "capacity";

/// Real time after the end of a slot in which a call that closed in it may still be adding itself up, at most
/// this share of a slot.
const SETTLING: Duration = Duration::from_millis(5);
const SETTLING_SHARE: u32 = 16;

/// What the planner keeps of one pool between ticks.
pub(super) struct PoolPlanner {
    pub(super) pool: Arc<Pool>,
    pub(super) policy: Box<dyn Policy>,
    pub(super) window: VolumeWindow,
    /// The slot that is under way.
    pub(super) slot: u64,
    pub(super) decision: Decision,
    /// Replicas ordered last: the decision's, or what a pin makes of it.
    pub(super) ordered: u32,
    pub(super) capacity: CapacityWatch,
    rent: RentBook,
    settling: Duration,
}

impl PoolPlanner {
    pub(super) fn new(gateway: &Gateway, pool: Arc<Pool>, routes: &[String], now: Timestamp) -> Self {
        let slot = pool.slot_of(now);
        let mut planner = Self {
            policy: policy_for(&pool.policy, &pool.settings),
            window: VolumeWindow::new(pool.settings.window, pool.slot_start(slot)),
            slot,
            decision: Decision::api(Reason::Cheapest),
            ordered: 0,
            capacity: CapacityWatch::new(1.0, now),
            rent: RentBook::default(),
            settling: gateway.clock.scaled(SETTLING).min(pool.settings.slot / SETTLING_SHARE),
            pool,
        };
        planner.pool.open(slot);
        if !planner.remember(gateway, routes, now) {
            planner.decide(slot, &Slot::default());
        }
        planner.reprice();
        planner.note_target(gateway);
        planner.carry_out(gateway);
        planner
    }

    pub(super) fn tick(&mut self, gateway: &Gateway, now: Timestamp) {
        self.accrue(now);
        let current = self.pool.slot_of(now.saturating_sub(self.settling));
        let is_new = self.slot < current;
        while self.slot < current {
            self.slot += 1;
            self.pool.open(self.slot);
            let finished = self.pool.take(self.slot - 1);
            self.count_counterfactual(&finished);
            let before = self.decision.target_replicas;
            self.learn(self.slot, finished);
            if before != self.decision.target_replicas {
                self.note_target(gateway);
            }
            self.end_capacity_slot(gateway, now);
            self.rent.book(&gateway.ledger);
        }
        if is_new {
            self.reprice();
            self.carry_out(gateway);
        } else {
            // A pin may have come or gone since.
            self.order();
        }
        self.publish(now);
    }

    /// Books the rent up to `now`.
    pub(super) fn close(&mut self, gateway: &Gateway, now: Timestamp) {
        self.accrue(now);
        self.rent.book(&gateway.ledger);
    }

    /// Tells the policy of the slot before `slot`, and takes its decision. The demand is as it was seen, in
    /// replica-seconds of the configured speed.
    pub(super) fn learn(&mut self, slot: u64, finished: Slot) {
        let finished = self.capacity.seen(finished);
        let last_instant = self.pool.slot_start(slot).saturating_sub(Duration::from_millis(1));
        self.window.add(last_instant, finished);
        self.decide(slot, &finished);
    }

    fn decide(&mut self, slot: u64, finished: &Slot) {
        let fleet = self.pool.backend.fleet.counts();
        self.decision = self.policy.decide(&self.spec(), self.pool.slot_start(slot), finished, fleet);
    }

    /// The pool as the policy sees it: with the start-up time that was measured, once it is more than a slot off
    /// what the owner wrote. A smaller difference changes no plan for the better, and would make the replay of
    /// a ledger differ.
    pub(super) fn spec(&self) -> PoolSpec {
        let configured = &self.pool.spec;
        let learned = self.pool.backend.fleet.learned_startup();
        let startup = if learned.abs_diff(configured.startup) > self.pool.settings.slot {
            learned
        } else {
            configured.startup
        };
        PoolSpec { startup, ..configured.clone() }
    }

    fn accrue(&mut self, now: Timestamp) {
        let busy = self.rent.accrue(&self.pool, now);
        self.capacity.look(&self.pool, busy);
        let backend = &self.pool.backend;
        let counts = backend.fleet.counts();
        self.pool.series.replicas(counts.starting, counts.ready);
        backend.series.up(backend.is_serving());
    }

    fn end_capacity_slot(&mut self, gateway: &Gateway, now: Timestamp) {
        if let Some(speed) = self.capacity.end_slot(self.pool.take_first_tokens(), now) {
            let name = self.pool.name();
            info!(pool = name, speed, "replicas of `{name}` do {speed} times the configured capacity");
            // Demand is counted by it from the slot that begins on.
            self.note_event(gateway, CAPACITY_EVENT, format!("{speed} times the configured capacity"));
        }
    }

    /// What the replicas can do until the next slot sets the price of a replica-second.
    pub(super) fn reprice(&self) {
        let ready = u64::from(self.pool.backend.fleet.counts().ready);
        let micros = u64::try_from(self.pool.settings.slot.as_micros()).unwrap_or(u64::MAX);
        self.pool.reprice(self.capacity.room(Work(ready.saturating_mul(micros))));
    }

    /// Rent of the replicas that all of a slot's traffic would have needed.
    fn count_counterfactual(&self, finished: &Slot) {
        let spec = &self.pool.spec;
        let slot = self.pool.settings.slot;
        let replicas = match spec.billing {
            Billing::Committed => spec.max_replicas,
            Billing::WhileRunning => finished.replicas_filled(slot).clamp(1, spec.max_replicas.max(1)),
            Billing::PerUse => {
                self.pool.series.all_self_hosted_cost(self.pool.rent_of(finished.work));
                return;
            }
        };
        let start = self.pool.slot_start(self.slot - 1).as_millis();
        let rent = spec.rent_between(start, start + crate::economics::time::millis(slot));
        self.pool.series.all_self_hosted_cost(rent.mul_div_floor(u64::from(replicas), 1));
    }

    fn carry_out(&mut self, gateway: &Gateway) {
        let (before, _) = self.pool.plan();
        self.pool.set_plan(self.decision);
        let (after, reason) = self.pool.plan();
        self.order();
        if before != after {
            let (name, reason) = (self.preferred_name(after), reason.as_str());
            info!(pool = self.pool.name(), backend = name, reason, "preferring `{name}`: {reason}");
            gateway.note("preference", self.pool.name(), format!("preferring `{name}`: {reason}"));
        }
    }

    /// Orders replicas. The owner's pin goes first: pinned to the API none is held, unless it is paid anyway.
    fn order(&mut self) {
        let spec = &self.pool.spec;
        self.ordered = match (spec.billing, self.pool.pin()) {
            (Billing::Committed, _) => spec.max_replicas,
            (_, Some(Pin::Api)) => 0,
            (_, Some(Pin::SelfHosted)) => self.decision.target_replicas.max(1),
            (_, None) => self.decision.target_replicas,
        };
        self.pool.series.wanted_replicas(self.ordered);
        if self.pool.is_controlled {
            self.pool.backend.fleet.set_target(self.ordered);
        }
    }

    fn note_target(&self, gateway: &Gateway) {
        self.note_event(gateway, REPLICAS_EVENT, format!("{} wanted", self.decision.target_replicas));
    }

    /// Notes something that holds from the start of the present slot on.
    fn note_event(&self, gateway: &Gateway, kind: &str, detail: String) {
        let at = self.pool.slot_start(self.slot);
        let (kind, subject) = (kind.to_owned(), self.pool.name().to_owned());
        gateway.ledger.append_event(&Event { at, kind, subject, detail });
    }

    pub(super) fn preferred_name(&self, preference: Preference) -> &str {
        match (preference, &self.pool.api) {
            (Preference::Api, Some(api)) => api.name(),
            _ => self.pool.name(),
        }
    }
}
