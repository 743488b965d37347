//! What the planner does for one pool, a slot at a time.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tracing::info;

use super::capacity::CapacityWatch;
use super::rent::RentBook;
use super::startup::StartupWatch;
use crate::economics::policy::policy_for;
use crate::economics::volume::VolumeWindow;
use crate::economics::{Billing, Decision, Policy, PoolSpec, Preference, Reason, Slot, Timestamp, Work};
use crate::gateway::{Authority, Gateway, Pin, Pool, RentDuty, SharedSlot, kept_slots};
use crate::ledger::Event;

/// Kind of the ledger's events that say how many replicas a policy wants, from the start of a slot on.
pub const REPLICAS_EVENT: &str = "replicas";
/// Kind of the ledger's events that say how fast a pool's replicas turned out to be.
pub const CAPACITY_EVENT: &str = "capacity";
/// Kind of the ledger's events that say how long a pool's replicas turned out to take to start.
pub const STARTUP_EVENT: &str = "startup";

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
    pub(super) startup: StartupWatch,
    rent: RentBook,
    settling: Duration,
    /// What the policy was told of the other proxies, by slot.
    told: BTreeMap<u64, Slot>,
    /// The reading of the others' past that the policy knows.
    catch_ups: u64,
    /// Our part of the work of the last slot, and the whole.
    own_work: (Work, Work),
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
            startup: StartupWatch::new(pool.spec.startup),
            rent: RentBook::default(),
            settling: settling(gateway, pool.settings.slot),
            told: BTreeMap::new(),
            catch_ups: 0,
            own_work: (Work::ZERO, Work::ZERO),
            pool,
        };
        planner.pool.open(slot);
        if !planner.remember(gateway, routes, now) {
            planner.decide(slot, &Slot::default());
        }
        planner.reprice();
        planner.note_target(gateway);
        planner.carry_out(gateway, now);
        planner
    }

    pub(super) fn tick(&mut self, gateway: &Gateway, now: Timestamp) {
        let duty = gateway.rent_duty(self.pool.name(), false, now);
        self.accrue(gateway, duty, now);
        let current = self.pool.slot_of(now.saturating_sub(self.settling));
        let mut is_new = self.slot < current;
        let before = self.decision.target_replicas;
        if self.catch_up() {
            is_new = true;
            if before != self.decision.target_replicas {
                self.note_target(gateway);
            }
        }
        while self.slot < current {
            self.slot += 1;
            let finished = self.finish(self.slot - 1);
            if !matches!(duty, RentDuty::Leave { .. }) {
                self.count_counterfactual(&finished);
            }
            let before = self.decision.target_replicas;
            self.follow_startup(gateway);
            self.learn(self.slot, finished);
            if before != self.decision.target_replicas {
                self.note_target(gateway);
            }
            self.end_capacity_slot(gateway, now);
            self.rent.book(gateway, &self.pool, duty);
        }
        if is_new {
            self.reprice();
            self.carry_out(gateway, now);
        } else {
            // A pin, or the planner's lease, may have come or gone since.
            self.order(gateway, now);
        }
        self.publish(now);
    }

    /// Closes a slot: its traffic over all proxies, with what of earlier slots came too late for them.
    fn finish(&mut self, slot: u64) -> Slot {
        self.pool.open(slot + 1);
        let own = self.pool.take(slot);
        let (told, kept) = (&mut self.told, kept_slots(&self.pool));
        let others = self.pool.with_volume(|volume| {
            let mut sum = volume.others(slot);
            for (earlier, told) in told.iter_mut().rev().take(LATE_SLOTS) {
                let heard = volume.others(*earlier);
                sum += beyond(heard, *told);
                *told = heard;
            }
            told.insert(slot, volume.others(slot));
            volume.forget_before(slot.saturating_sub(kept));
            told.retain(|earlier, _| *earlier + kept > slot);
            sum
        });
        let mut whole = own;
        whole += others.unwrap_or_default();
        self.own_work = (own.work, whole.work);
        whole
    }

    /// When the others' past was read anew and is not what the policy was told, tells it everything again. True
    /// when it has.
    fn catch_up(&mut self) -> bool {
        let slot = self.slot;
        let read = self.pool.with_volume(|volume| (volume.catch_ups(), volume.before(slot)));
        let Some((catch_ups, past)) = read.filter(|(catch_ups, _)| *catch_ups != self.catch_ups) else {
            return false;
        };
        self.catch_ups = catch_ups;
        let is_known = |at: &SharedSlot| self.told.get(&at.slot).copied().unwrap_or_default() == at.others;
        let opened = self.pool.slot_of(self.window.began());
        let is_told = |first: &&SharedSlot| first.slot >= opened && past.iter().all(is_known);
        let Some(first) = past.first().filter(|first| !is_told(first)) else { return false };
        self.policy = policy_for(&self.pool.policy, &self.pool.settings);
        self.window = VolumeWindow::new(self.pool.settings.window, self.pool.slot_start(first.slot));
        info!(pool = self.pool.name(), "`{}` takes up the volume of the other proxies", self.pool.name());
        for SharedSlot { slot, own, others } in past {
            let mut whole = own;
            whole += others;
            self.told.insert(slot, others);
            self.learn(slot + 1, whole);
        }
        true
    }

    /// Books the rent up to `now`.
    pub(super) fn close(&mut self, gateway: &Gateway, now: Timestamp) {
        let duty = gateway.rent_duty(self.pool.name(), true, now);
        self.accrue(gateway, duty, now);
        self.rent.book(gateway, &self.pool, duty);
    }

    /// Tells the policy of a slot that is only in our ledger.
    pub(super) fn remember_slot(&mut self, slot: u64, finished: Slot) {
        self.pool.with_volume(|volume| volume.note_past(slot - 1, finished));
        self.learn(slot, finished);
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

    /// The pool as the policy sees it: with the start-up time that was measured.
    pub(super) fn spec(&self) -> PoolSpec {
        PoolSpec { startup: self.startup.applied(), ..self.pool.spec.clone() }
    }

    fn follow_startup(&mut self, gateway: &Gateway) {
        let measured = self.pool.backend.fleet.measured_startup();
        if let Some(detail) = self.startup.follow(measured, self.pool.settings.slot) {
            let name = self.pool.name();
            info!(pool = name, "a replica of `{name}` is ready after {detail}");
            self.note_event(gateway, STARTUP_EVENT, detail);
        }
    }

    fn accrue(&mut self, gateway: &Gateway, duty: RentDuty, now: Timestamp) {
        let busy = self.rent.accrue(&self.pool, duty, now);
        self.capacity.look(&self.pool, busy, gateway.is_alone());
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

    /// What the replicas can do until the next slot, for such a part of the calls as we see of them, sets the
    /// price of a replica-second.
    pub(super) fn reprice(&self) {
        let ready = u64::from(self.pool.backend.fleet.counts().ready);
        let micros = u64::try_from(self.pool.settings.slot.as_micros()).unwrap_or(u64::MAX);
        let room = self.capacity.room(Work(ready.saturating_mul(micros)));
        let (own, whole) = self.own_work;
        let part = if whole == Work::ZERO { room } else { part_of(room, own, whole) };
        self.pool.reprice(part);
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

    fn carry_out(&mut self, gateway: &Gateway, now: Timestamp) {
        let (before, _) = self.pool.plan();
        self.pool.set_plan(self.decision);
        let (after, reason) = self.pool.plan();
        self.order(gateway, now);
        if before != after {
            let (name, reason) = (self.preferred_name(after), reason.as_str());
            info!(pool = self.pool.name(), backend = name, reason, "preferring `{name}`: {reason}");
            gateway.note("preference", self.pool.name(), format!("preferring `{name}`: {reason}"));
        }
    }

    /// Orders replicas, if that is for us to do. The owner's pin goes first: pinned to the API none is held, unless it is paid anyway.
    fn order(&mut self, gateway: &Gateway, now: Timestamp) {
        let spec = &self.pool.spec;
        self.ordered = match (spec.billing, self.pool.pin()) {
            (Billing::Committed, _) => spec.max_replicas,
            (_, Some(Pin::Api)) => 0,
            (_, Some(Pin::SelfHosted)) => self.decision.target_replicas.max(1),
            (_, None) => self.decision.target_replicas,
        };
        self.pool.series.wanted_replicas(self.ordered);
        if self.pool.is_controlled {
            let fleet = &self.pool.backend.fleet;
            match gateway.authority(now) {
                Authority::Alone => fleet.set_target(self.ordered),
                Authority::Holder(until) => fleet.set_target_until(self.ordered, until),
                Authority::Observer => fleet.clear_target(),
            }
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

/// Slots before the last one whose late part is still put with it.
const LATE_SLOTS: usize = 3;

/// How long after the end of a slot it is closed: until our own calls have added themselves up, and until the
/// others' part is here.
fn settling(gateway: &Gateway, slot: Duration) -> Duration {
    match &gateway.sharing {
        Some(sharing) => gateway.clock.scaled(sharing.settling()).min(slot * 3 / 4),
        None => gateway.clock.scaled(SETTLING).min(slot / SETTLING_SHARE),
    }
}

/// What of `heard` is more than `told`.
fn beyond(heard: Slot, told: Slot) -> Slot {
    Slot {
        api_cost: heard.api_cost.saturating_sub_at_zero(told.api_cost),
        work: Work(heard.work.0.saturating_sub(told.work.0)),
        requests: heard.requests.saturating_sub(told.requests),
        tokens: heard.tokens.saturating_sub(told.tokens),
    }
}

/// `room` times `own / whole`, rounded down.
fn part_of(room: Work, own: Work, whole: Work) -> Work {
    let part = u128::from(room.0) * u128::from(own.0) / u128::from(whole.0.max(1));
    Work(u64::try_from(part).unwrap_or(u64::MAX))
}
