//! The state machine of the replicas: values in, actions out, no I/O.
//!
//! [`Roster::hear`] takes what orders and probes have shown, [`Roster::step`] moves towards the target and
//! says what to do next. The rules:
//! - A start is paid from its order, and its replica takes calls only when a probe has seen it answer.
//! - The most recently started replica stops first, not before its shortest billed time is over, and not
//!   before its calls have ended (or had the longest time that a call may take).
//! - What somebody else has started is found when it answers: at our start, while we do not decide, and when we
//!   begin to, for as long as a start that is under way may take.
//! - A start that fails, and a replica that is lost, is cleaned up by a stop and tried again after a pause
//!   that doubles; while the pause lasts the fleet starts nothing else in its stead, so that a cloud without
//!   machines is not asked again and again.
//! - Rent ends when the stop is confirmed; until then it counts.
//!
//! Replicas that are scaled by their count ([`scale`]) and those found by a name ([`addresses`]) follow the same
//! rules.

pub(super) mod addresses;
mod company;
mod scale;

use std::sync::Arc;
use std::time::Duration;

use super::event::FleetEventKind;
use super::order::{Action, Report};
use super::rent::RentDelta;
use super::replica::Replica;
use super::slot::{Phase, Slot};
use crate::economics::time::millis;
use crate::economics::{Billing, NanoUsd, PoolSpec, Timestamp};
use crate::health::Probe;
use addresses::Discovery;
use scale::Count;

/// First pause after a failed start or stop; doubles up to [`MAX_PAUSE`].
pub(super) const FIRST_PAUSE: Duration = Duration::from_secs(5);
pub(super) const MAX_PAUSE: Duration = Duration::from_mins(5);
/// A start which takes more than this many times its usual time has failed.
pub(super) const START_PATIENCE: u32 = 4;
/// No start is given up before this.
pub(super) const MIN_START_PATIENCE: Duration = Duration::from_mins(1);
/// How often a starting, or a doubtful, replica is probed, unless the configured interval is shorter.
pub(super) const EAGER_PROBE: Duration = Duration::from_secs(1);
/// After a failed start, so many failed stops in a row mean that there is nothing to stop.
pub(super) const CLEAN_UP_ATTEMPTS: u32 = 3;

/// Who starts and stops the replicas, as far as the rules differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// We do, by a command or a webhook. `can_stop_strangers`: whether a replica that we did not start can
    /// be stopped.
    Us { can_stop_strangers: bool },
    /// We do, by their count. `stops_highest`: the replica with the highest number goes first, and comes last;
    /// otherwise which one goes is not said.
    Scale { stops_highest: bool },
    /// Somebody else does; we only look.
    Others,
}

#[derive(Debug, Clone)]
pub(super) struct Rules {
    pub(super) pool: PoolSpec,
    pub(super) owner: Owner,
    /// Time between probes; none: nothing to probe, assumed ready.
    pub(super) probe_every: Option<Duration>,
    /// Failed probes in a row that mean that a ready replica is lost.
    pub(super) probe_failures: u32,
    /// A drain ends after this even if calls are still in flight.
    pub(super) longest_call: Duration,
    /// All replicas share one address, so a probe cannot tell them apart.
    pub(super) one_address: bool,
    /// Replicas are at the addresses of a name.
    pub(super) is_resolved: bool,
    /// How often the server's own queue is read; none: it has no metrics.
    pub(super) queue_every: Option<Duration>,
}

/// The replicas of one backend, their rent, and what is being done about them.
#[derive(Debug)]
pub(super) struct Roster {
    rules: Rules,
    slots: Vec<Slot>,
    count: Count,
    discovery: Option<Discovery>,
    /// Failed starts in a row, over all replicas.
    failures: u32,
    retry_at: Timestamp,
    /// Whether somebody says how many replicas to hold. Until then, and after it was taken back (another
    /// process decides), we only look, as if others controlled them.
    has_target: bool,
    /// At our end, stops that are on their way go on without a target.
    is_releasing: bool,
    /// How long it takes until other proxies have heard of a drain, and we of their calls.
    company: Duration,
    /// Moving average of measured start-up times.
    startup: Option<Duration>,
    accrued_to: Timestamp,
    events: Vec<(u32, FleetEventKind)>,
}

impl Roster {
    pub(super) fn new(rules: Rules, replicas: &[Arc<Replica>], now: Timestamp) -> Self {
        let committed = rules.pool.billing == Billing::Committed;
        let slot = |replica: &Arc<Replica>| {
            let mut slot = Slot::new(Arc::clone(replica), now);
            // Behind one address, what answers is taken for the first replica.
            let may_run = replica.index == 0 || !rules.one_address;
            match rules.owner {
                Owner::Us { .. } | Owner::Scale { .. } if may_run => slot.enter(Phase::Unknown),
                Owner::Others if rules.probe_every.is_none() => slot.enter(Phase::Ready { since: now }),
                _ => slot.enter(Phase::Stopped),
            }
            if committed {
                slot.rent.open(now);
            }
            slot
        };
        let mut roster = Self {
            slots: replicas.iter().map(slot).collect(),
            count: Count::default(),
            discovery: rules.is_resolved.then(|| Discovery::new(now)),
            rules,
            failures: 0,
            retry_at: Timestamp::ZERO,
            has_target: false,
            is_releasing: false,
            company: Duration::ZERO,
            startup: None,
            accrued_to: now,
            events: Vec::new(),
        };
        if roster.rules.owner == Owner::Others && roster.rules.probe_every.is_none() {
            (0..roster.slots.len()).for_each(|index| roster.open_rent(index, now));
        }
        roster
    }

    pub(super) fn take_events(&mut self) -> Vec<(u32, FleetEventKind)> {
        std::mem::take(&mut self.events)
    }

    pub(super) fn learned_startup(&self) -> Duration {
        self.startup.unwrap_or(self.rules.pool.startup)
    }

    /// None until a start was seen to its end.
    pub(super) fn measured_startup(&self) -> Option<Duration> {
        self.startup
    }

    /// When the replica's present life began, and how many of its starts failed in a row.
    pub(super) fn history(&self, index: usize) -> (Option<Timestamp>, u32) {
        let slot = &self.slots[index];
        let runs = !matches!(slot.phase, Phase::Unknown | Phase::Stopped);
        (runs.then_some(slot.began_at), slot.failures)
    }

    pub(super) fn accrue(&mut self, now: Timestamp) -> RentDelta {
        let mut delta = RentDelta {
            from: self.accrued_to,
            to: now.max(self.accrued_to),
            replica_millis: 0,
            rent: NanoUsd::ZERO,
        };
        for slot in &mut self.slots {
            let (replica_millis, rent) = slot.rent.accrue(&self.rules.pool, delta.to);
            delta.replica_millis += replica_millis;
            delta.rent += rent;
        }
        self.accrued_to = delta.to;
        delta
    }

    pub(super) fn hear(&mut self, report: Report, now: Timestamp) {
        match report {
            Report::Scaled { result } => self.scaled(result, now),
            Report::Resolved { found } => self.resolved(found.as_deref(), now),
            Report::QueueRead { replica } => self.slots[replica as usize].is_reading_queue = false,
            Report::Start { replica, order, result } => {
                if self.slots[replica as usize].order == order {
                    self.start_answered(replica as usize, result, now);
                }
            }
            Report::Stop { replica, order, result } => {
                if self.slots[replica as usize].order == order {
                    self.stop_answered(replica as usize, result, now);
                }
            }
            Report::Probe { replica, order, probe } => {
                self.slots[replica as usize].is_probing = false;
                // An answer to a probe that was sent before the last order is about an earlier life.
                if self.slots[replica as usize].order == order {
                    self.probed(replica as usize, probe, now);
                }
            }
        }
    }

    fn start_answered(&mut self, index: usize, result: Result<(), String>, now: Timestamp) {
        let Err(reason) = result else { return };
        match self.slots[index].phase {
            Phase::Starting { .. } => self.start_failed(index, reason, now),
            Phase::Ready { .. } | Phase::Draining { .. } => self.lost(index, reason, now),
            Phase::Unknown | Phase::Stopped | Phase::Stopping { .. } => {}
        }
    }

    fn stop_answered(&mut self, index: usize, result: Result<(), String>, now: Timestamp) {
        let Phase::Stopping { failures, clean_up, .. } = self.slots[index].phase else { return };
        let Err(reason) = result else { return self.stopped(index, now) };
        let failures = failures + 1;
        if clean_up && failures >= CLEAN_UP_ATTEMPTS {
            return self.stopped(index, now);
        }
        let retry_in = pause(failures);
        self.slots[index].enter(Phase::Stopping {
            ordered: false,
            failures,
            retry_at: now + retry_in,
            clean_up,
        });
        self.tell(index, FleetEventKind::StopFailed { reason, retry_in });
    }

    fn stopped(&mut self, index: usize, now: Timestamp) {
        self.close_rent(index, now);
        let slot = &mut self.slots[index];
        let ran_for = now.since(slot.began_at);
        slot.watched_until = Timestamp::ZERO;
        slot.enter(Phase::Stopped);
        self.tell(index, FleetEventKind::Stopped { ran_for });
    }

    fn probed(&mut self, index: usize, probe: Probe, now: Timestamp) {
        let slot = &mut self.slots[index];
        if probe == Probe::Up {
            slot.bad_probes = 0;
            return self.seen_up(index, now);
        }
        let is_ours_to_find = slot.phase == Phase::Unknown;
        if is_ours_to_find {
            return slot.enter(Phase::Stopped);
        }
        let is_busy = probe == Probe::Silent && slot.replica.in_flight() > 0;
        if !matches!(slot.phase, Phase::Ready { .. }) || is_busy {
            return;
        }
        slot.bad_probes += 1;
        slot.probe_at = slot.probe_at.min(now + EAGER_PROBE);
        if slot.bad_probes >= self.rules.probe_failures.max(1) {
            let reason = match probe {
                Probe::Down(reason) => reason,
                Probe::Up | Probe::Silent => "it does not answer".to_owned(),
            };
            self.lost(index, reason, now);
        }
    }

    fn seen_up(&mut self, index: usize, now: Timestamp) {
        match (self.slots[index].phase, self.rules.owner) {
            (Phase::Unknown, _) => self.found(index, FleetEventKind::Adopted, now),
            (Phase::Stopped, _) if !self.decides() => self.found(index, FleetEventKind::Appeared, now),
            (Phase::Stopped, _) if now < self.slots[index].watched_until => {
                self.found(index, FleetEventKind::Adopted, now);
            }
            (Phase::Starting { ordered_at }, _) => {
                let after = now.since(ordered_at);
                // Behind one address another replica may have answered; time is the only witness.
                if self.rules.one_address && self.ready() > 0 && after < self.learned_startup() {
                    return;
                }
                // A pod that replaces another, or that was found or given up starting, shows less than a start.
                if self.slots[index].is_ours && self.slots[index].began_at == ordered_at {
                    self.learn_startup(after);
                }
                self.slots[index].enter(Phase::Ready { since: now });
                self.tell(index, FleetEventKind::Ready { after });
            }
            // One that breaks down again and again right after it was ready is not well.
            (Phase::Ready { since }, _) if now.since(since) >= pause(self.slots[index].failures) => {
                self.failures = 0;
                self.slots[index].failures = 0;
            }
            (Phase::Stopped | Phase::Ready { .. } | Phase::Draining { .. } | Phase::Stopping { .. }, _) => {}
        }
    }

    /// Somebody else started it, and it answers.
    fn found(&mut self, index: usize, kind: FleetEventKind, now: Timestamp) {
        self.begin(index, now, false);
        self.slots[index].enter(Phase::Ready { since: now });
        self.tell(index, kind);
    }

    fn ready(&self) -> usize {
        self.slots.iter().filter(|slot| matches!(slot.phase, Phase::Ready { .. })).count()
    }

    /// A quarter of each new measurement.
    fn learn_startup(&mut self, measured: Duration) {
        self.startup = Some(self.startup.map_or(measured, |known| (known * 3 + measured) / 4));
    }

    fn start_failed(&mut self, index: usize, reason: String, now: Timestamp) {
        let retry_in = self.pause_after_failure(index, now);
        self.tell(index, FleetEventKind::StartFailed { reason, retry_in });
        self.slots[index].enter(Phase::Stopping {
            ordered: false,
            failures: 0,
            retry_at: now,
            clean_up: true,
        });
    }

    fn lost(&mut self, index: usize, reason: String, now: Timestamp) {
        self.tell(index, FleetEventKind::Lost { reason });
        self.pause_after_failure(index, now);
        if !self.decides() && (self.is_scaled() || !self.slots[index].is_ours) {
            self.close_rent(index, now);
            self.slots[index].enter(Phase::Stopped);
        } else if self.is_scaled() {
            // Kubernetes starts it again by itself, while its count says so.
            self.slots[index].enter(Phase::Starting { ordered_at: now });
        } else {
            let stopping = Phase::Stopping { ordered: false, failures: 0, retry_at: now, clean_up: true };
            self.slots[index].enter(stopping);
        }
    }

    fn pause_after_failure(&mut self, index: usize, now: Timestamp) -> Duration {
        self.failures += 1;
        let slot = &mut self.slots[index];
        slot.failures += 1;
        slot.bad_probes = 0;
        slot.retry_at = now + pause(slot.failures);
        self.retry_at = now + pause(self.failures);
        self.retry_at.max(slot.retry_at).since(now)
    }

    fn begin(&mut self, index: usize, now: Timestamp, is_ours: bool) {
        self.open_rent(index, now);
        let slot = &mut self.slots[index];
        slot.began_at = now;
        slot.is_ours = is_ours;
        slot.was_ready = false;
        slot.bad_probes = 0;
    }

    /// A committed replica's rent runs all the time, one paid per use has none.
    fn open_rent(&mut self, index: usize, now: Timestamp) {
        if self.rules.pool.billing == Billing::WhileRunning {
            self.slots[index].rent.open(now);
        }
    }

    fn close_rent(&mut self, index: usize, now: Timestamp) {
        if self.rules.pool.billing == Billing::WhileRunning {
            // Of a replica that we did not start we know whether it answers; a gap is no new start.
            let minimum = if self.slots[index].is_ours { self.rules.pool.minimum } else { Duration::ZERO };
            self.slots[index].rent.close(&self.rules.pool, now, minimum);
        }
    }

    fn tell(&mut self, index: usize, kind: FleetEventKind) {
        self.events.push((self.slots[index].replica.index, kind));
    }

    /// Lets go of the replicas that would have no owner without us, at once; the next steps stop them.
    pub(super) fn abandon(&mut self, now: Timestamp, is_owned: impl Fn(u32) -> bool) {
        for slot in &mut self.slots {
            let runs = slot.is_held() || matches!(slot.phase, Phase::Draining { .. });
            if runs && is_owned(slot.replica.index) {
                slot.enter(Phase::Stopping { ordered: false, failures: 0, retry_at: now, clean_up: true });
            }
        }
    }

    /// Whether a stop is on its way.
    pub(super) fn is_stopping(&self) -> bool {
        self.slots.iter().any(|slot| matches!(slot.phase, Phase::Stopping { .. }))
    }

    /// One step towards `target` (none: nobody has said what is wanted, nothing is started or let go); what
    /// it returns must be carried out and reported.
    pub(super) fn step(&mut self, target: Option<u32>, now: Timestamp) -> Vec<Action> {
        let mut actions = Vec::new();
        if target.is_some() && !self.has_target {
            self.take_over(now);
        }
        self.has_target = target.is_some();
        self.resolve(now, &mut actions);
        if self.rules.owner != Owner::Others {
            self.give_up_late_starts(now);
            match target {
                Some(target) => self.follow(target, now, &mut actions),
                None => self.hand_over_count(now),
            }
            if target.is_some() || self.is_releasing || self.is_scaled() {
                self.finish_drains(now);
                self.fill_gaps(now);
                self.order_stops(now, &mut actions);
                self.settle_count(now, &mut actions);
            } else {
                self.stand_back(now);
            }
        }
        self.look(now, &mut actions);
        actions
    }

    /// From now on we decide. What whoever did before has started answers within the time that starts may take.
    fn take_over(&mut self, now: Timestamp) {
        if self.is_scaled() {
            return self.take_over_count(now);
        }
        let watched_until = now + self.start_patience();
        self.slots.iter_mut().for_each(|slot| slot.watched_until = watched_until);
    }

    fn start_patience(&self) -> Duration {
        (self.rules.pool.startup.max(self.learned_startup()) * START_PATIENCE).max(MIN_START_PATIENCE)
    }

    fn give_up_late_starts(&mut self, now: Timestamp) {
        let patience = self.start_patience();
        for index in 0..self.slots.len() {
            if let Phase::Starting { ordered_at } = self.slots[index].phase
                && now.since(ordered_at) > patience
            {
                let reason = format!("it did not answer within {} s", patience.as_secs());
                self.start_failed(index, reason, now);
            }
        }
    }

    fn follow(&mut self, target: u32, now: Timestamp, actions: &mut Vec<Action>) {
        if !self.knows_count() || self.slots.iter().any(|slot| slot.phase == Phase::Unknown) {
            return;
        }
        let target = usize::try_from(target).unwrap_or(usize::MAX).min(self.slots.len());
        let held = self.slots.iter().filter(|slot| slot.is_held()).count();
        if held < target {
            let kept = self.keep(target - held, now);
            self.start(target - held - kept, now, actions);
        } else {
            self.drain(held - target, now);
        }
    }

    /// Takes back up to `count` drains, those first that would stop last.
    fn keep(&mut self, count: usize, now: Timestamp) -> usize {
        let draining = self.order_of_stops(|slot| matches!(slot.phase, Phase::Draining { .. }));
        let kept = count.min(draining.len());
        for index in draining.into_iter().rev().take(kept) {
            self.take_back(index, now);
        }
        kept
    }

    fn take_back(&mut self, index: usize, now: Timestamp) {
        self.slots[index].resume(now);
        self.tell(index, FleetEventKind::Kept);
    }

    fn start(&mut self, count: usize, now: Timestamp, actions: &mut Vec<Action>) {
        if now < self.retry_at {
            return;
        }
        for index in self.startable(now).into_iter().take(count) {
            self.begin(index, now, true);
            let slot = &mut self.slots[index];
            slot.order += 1;
            slot.probe_at = now;
            slot.enter(Phase::Starting { ordered_at: now });
            if !matches!(self.rules.owner, Owner::Scale { .. }) {
                actions.push(Action::Start { replica: slot.replica.index, order: slot.order });
            }
            self.tell(index, FleetEventKind::StartOrdered);
        }
    }

    /// Lets go of up to `count` replicas whose shortest billed time is over, the most recently started first.
    fn drain(&mut self, count: usize, now: Timestamp) {
        let minimum = match self.rules.pool.billing {
            Billing::WhileRunning => self.rules.pool.minimum,
            Billing::Committed | Billing::PerUse => Duration::ZERO,
        };
        let can_stop_strangers = self.rules.owner != (Owner::Us { can_stop_strangers: false });
        let order = self.order_of_drains(|slot| {
            millis(now.since(slot.began_at)) >= millis(minimum) && (slot.is_ours || can_stop_strangers)
        });
        for index in order.into_iter().take(count) {
            let slot = &mut self.slots[index];
            let is_up = matches!(slot.phase, Phase::Ready { .. });
            slot.enter(Phase::Draining { since: now, is_up });
            let in_flight = slot.replica.in_flight();
            if in_flight > 0 {
                self.tell(index, FleetEventKind::Draining { in_flight });
            }
        }
    }

    fn finish_drains(&mut self, now: Timestamp) {
        // The highest first: where it goes first, those below it wait for it.
        for index in (0..self.slots.len()).rev() {
            if let Phase::Draining { since, .. } = self.slots[index].phase
                && !self.is_below_another(index)
                && self.has_drained(index, since, now)
            {
                let stopping =
                    Phase::Stopping { ordered: false, failures: 0, retry_at: now, clean_up: false };
                self.slots[index].enter(stopping);
            }
        }
    }

    fn order_stops(&mut self, now: Timestamp, actions: &mut Vec<Action>) {
        if self.is_scaled() {
            return;
        }
        for index in 0..self.slots.len() {
            let slot = &mut self.slots[index];
            if let Phase::Stopping { ordered: false, failures, retry_at, clean_up } = slot.phase
                && retry_at <= now
            {
                slot.order += 1;
                slot.enter(Phase::Stopping { ordered: true, failures, retry_at, clean_up });
                actions.push(Action::Stop {
                    replica: slot.replica.index,
                    order: slot.order,
                    was_ready: slot.was_ready,
                });
                self.tell(index, FleetEventKind::StopOrdered);
            }
        }
    }

    /// Probes and queue readings that are due.
    fn look(&mut self, now: Timestamp, actions: &mut Vec<Action>) {
        let decides = self.decides();
        for slot in &mut self.slots {
            let wants_probe = match slot.phase {
                Phase::Unknown | Phase::Starting { .. } | Phase::Ready { .. } => true,
                Phase::Stopped => {
                    let is_of_others = !decides || now < slot.watched_until;
                    is_of_others && (slot.replica.index == 0 || !self.rules.one_address)
                }
                Phase::Draining { .. } | Phase::Stopping { .. } => false,
            };
            if let Some(every) = self.rules.probe_every.filter(|_| wants_probe && slot.replica.has_address())
                && !slot.is_probing
                && slot.probe_at <= now
            {
                let is_certain =
                    matches!(slot.phase, Phase::Ready { .. }) && slot.replica.circuit.is_closed();
                slot.is_probing = true;
                slot.probe_at = now + if is_certain { every } else { every.min(EAGER_PROBE) };
                actions.push(Action::Probe { replica: slot.replica.index, order: slot.order });
            }
            if let Some(every) = self.rules.queue_every.filter(|_| matches!(slot.phase, Phase::Ready { .. }))
                && !slot.is_reading_queue
                && slot.queue_at <= now
            {
                slot.is_reading_queue = true;
                slot.queue_at = now + every;
                actions.push(Action::ReadQueue { replica: slot.replica.index });
            }
        }
    }

    /// Whether starting and stopping is our business.
    fn decides(&self) -> bool {
        self.rules.owner != Owner::Others && self.has_target
    }

    fn select(&self, is_wanted: impl Fn(&Slot) -> bool) -> Vec<usize> {
        (0..self.slots.len()).filter(|index| is_wanted(&self.slots[*index])).collect()
    }
}

/// Pause after so many failures in a row: [`FIRST_PAUSE`], doubling, at most [`MAX_PAUSE`].
fn pause(failures: u32) -> Duration {
    (FIRST_PAUSE * 2_u32.pow(failures.saturating_sub(1).min(10))).min(MAX_PAUSE)
}

#[cfg(test)]
mod tests;
