//! Replicas that are started and stopped by their count.
//!
//! No order names a replica. The count that is to be follows from the phases: every replica that is starting,
//! ready or draining has its pod, one that is stopping has none any more. Whenever that differs from the count
//! that was last confirmed, and every [`RESYNC`] besides, the count is asked for, one request at a time. What is
//! asked for is a level and no step, so a request may be lost or repeated.
//!
//! Nothing is asked for before the workload's count has been read: what it says beyond the replicas that answer
//! are replicas that start, by an earlier order of ours or of another process.

use std::time::Duration;

use super::super::event::FleetEventKind;
use super::super::kubernetes;
use super::super::slot::{Phase, Slot};
use super::{Action, EAGER_PROBE, Owner, Roster, pause};
use crate::economics::Timestamp;

/// How often a count that is as it should be is looked at.
pub(super) const RESYNC: Duration = Duration::from_secs(30);

/// What is known of the workload's count.
#[derive(Debug, Default)]
pub(super) struct Count {
    /// It has been read since we decide.
    is_known: bool,
    /// What was last confirmed; none after a failure, when it may be either.
    confirmed: Option<u32>,
    /// When that was asked for.
    covers: Timestamp,
    /// What is being asked for, and since when.
    asking: Option<(Option<u32>, Timestamp)>,
    failures: u32,
    ask_at: Timestamp,
    look_at: Timestamp,
}

impl Roster {
    /// Whether the count may be followed: there is none, or it is known.
    pub(super) fn knows_count(&self) -> bool {
        !self.is_scaled() || self.count.is_known
    }

    pub(super) fn is_scaled(&self) -> bool {
        matches!(self.rules.owner, Owner::Scale { .. })
    }

    fn stops_highest(&self) -> bool {
        self.rules.owner == Owner::Scale { stops_highest: true }
    }

    /// From now on we decide, and what somebody else may have done meanwhile is to be read first.
    pub(super) fn take_over_count(&mut self, now: Timestamp) {
        self.count.is_known = false;
        self.count.look_at = now;
    }

    /// The count that the phases ask for. Where the highest replica goes first, those below the highest one that
    /// has its pod have theirs, too.
    fn wanted_count(&self) -> u32 {
        let has_pod = |phase: Phase| {
            matches!(
                phase,
                Phase::Unknown | Phase::Starting { .. } | Phase::Ready { .. } | Phase::Draining { .. }
            )
        };
        let with_pod = (0_u32..).zip(&self.slots).filter(|(_, slot)| has_pod(slot.phase));
        if self.stops_highest() {
            with_pod.last().map_or(0, |(index, _)| index + 1)
        } else {
            u32::try_from(with_pod.count()).unwrap_or(u32::MAX)
        }
    }

    /// Whether a replica above this one keeps its pod, so that this one's pod cannot go.
    pub(super) fn is_below_another(&self, index: usize) -> bool {
        self.stops_highest() && index + 1 < self.wanted_count() as usize
    }

    /// Asks for the count that is to be, if that is due.
    pub(super) fn settle_count(&mut self, now: Timestamp, actions: &mut Vec<Action>) {
        // What is not looked at yet may be among the pods that the count speaks of.
        let is_unclear = self.slots.iter().any(|slot| slot.phase == Phase::Unknown);
        if !self.is_scaled() || is_unclear || self.count.asking.is_some() || now < self.count.ask_at {
            return;
        }
        let is_stopping = self.is_stopping();
        let (may_write, may_read) = (self.has_target && self.count.is_known, self.has_target || is_stopping);
        let wanted = self.wanted_count();
        let has_news =
            self.slots.iter().any(|slot| matches!(slot.phase, Phase::Stopping { ordered: false, .. }));
        let differs = may_write && (has_news || self.count.confirmed != Some(wanted));
        let is_due = differs || (may_read && now >= self.count.look_at);
        if !is_due {
            return;
        }
        let count = may_write.then_some(wanted);
        for slot in &mut self.slots {
            if let Phase::Stopping { ordered: false, failures, retry_at, clean_up } = slot.phase
                && may_write
            {
                slot.enter(Phase::Stopping { ordered: true, failures, retry_at, clean_up });
                self.events.push((slot.replica.index, FleetEventKind::StopOrdered));
            }
        }
        self.count.asking = Some((count, now));
        actions.push(Action::Scale { count });
    }

    pub(super) fn scaled(&mut self, result: Result<kubernetes::Scale, String>, now: Timestamp) {
        let Some((asked, since)) = self.count.asking.take() else { return };
        match result {
            Err(reason) => self.scale_failed(&reason, now),
            Ok(scale) => {
                self.count.failures = 0;
                self.count.ask_at = now;
                self.count.confirmed = asked.or(Some(scale.wanted));
                self.count.covers = since;
                if self.has_target && !self.count.is_known {
                    self.count.is_known = true;
                    self.adopt(scale.wanted, now);
                }
                self.confirm_stops(scale.running, now);
                self.count.look_at = now + if self.is_stopping() { EAGER_PROBE } else { RESYNC };
            }
        }
    }

    /// Pods that are to be and do not answer yet are starting.
    fn adopt(&mut self, count: u32, now: Timestamp) {
        for index in 0..self.slots.len() {
            let is_missing =
                if self.stops_highest() { index < count as usize } else { self.wanted_count() < count };
            if is_missing && self.slots[index].phase == Phase::Stopped {
                self.begin(index, now, false);
                self.slots[index].enter(Phase::Starting { ordered_at: now });
            }
        }
    }

    /// Stops have happened when no more pods are there than are to be.
    fn confirm_stops(&mut self, running: u32, now: Timestamp) {
        if self.count.confirmed.is_none_or(|confirmed| running > confirmed) {
            return;
        }
        for index in 0..self.slots.len() {
            if matches!(self.slots[index].phase, Phase::Stopping { ordered: true, .. }) {
                self.slots[index].replica.set_address(None);
                self.slots[index].order += 1;
                self.stopped(index, now);
            }
        }
    }

    fn scale_failed(&mut self, reason: &str, now: Timestamp) {
        self.count.failures += 1;
        self.count.confirmed = None;
        let retry_in = pause(self.count.failures);
        self.count.ask_at = now + retry_in;
        let mut is_told = false;
        for index in 0..self.slots.len() {
            match self.slots[index].phase {
                Phase::Starting { ordered_at }
                    if self.slots[index].is_ours && ordered_at > self.count.covers =>
                {
                    self.start_failed(index, reason.to_owned(), now);
                    is_told = true;
                }
                Phase::Stopping { ordered: true, .. } => {
                    self.stop_answered(index, Err(reason.to_owned()), now);
                    is_told = true;
                }
                _ => {}
            }
        }
        if !is_told {
            self.tell(0, FleetEventKind::ScaleUnknown { reason: reason.to_owned(), retry_in });
        }
    }

    /// Another process decides from now on: what has not been asked for is not to be.
    pub(super) fn hand_over_count(&mut self, now: Timestamp) {
        if !self.is_scaled() {
            return;
        }
        for index in 0..self.slots.len() {
            match self.slots[index].phase {
                Phase::Stopping { ordered: false, clean_up, .. } if clean_up || self.has_departed(index) => {
                    self.stopped(index, now);
                }
                Phase::Draining { .. } | Phase::Stopping { ordered: false, .. } => self.take_back(index, now),
                _ => {}
            }
        }
    }

    /// Whether its pod has gone, and with it its address.
    fn has_departed(&self, index: usize) -> bool {
        self.slots[index].was_ready && !self.slots[index].replica.has_address()
    }

    /// A replica below another that has its pod has one, too: it was found stopped, or its pod could not be let
    /// go of.
    pub(super) fn fill_gaps(&mut self, now: Timestamp) {
        for index in 0..self.slots.len() {
            if !self.is_below_another(index) {
                continue;
            }
            match self.slots[index].phase {
                Phase::Stopped => {
                    self.begin(index, now, false);
                    self.slots[index].enter(Phase::Starting { ordered_at: now });
                }
                Phase::Stopping { .. } => self.take_back(index, now),
                _ => {}
            }
        }
    }

    /// Which of the stopped replicas start: where the highest goes first, the lowest, and none while one is still
    /// going.
    pub(super) fn startable(&self, now: Timestamp) -> Vec<usize> {
        let mut startable = self.select(|slot| slot.phase == Phase::Stopped && slot.retry_at <= now);
        if !self.stops_highest() {
            startable.sort_by_key(|index| self.slots[*index].failures);
            return startable;
        }
        if self.is_stopping() {
            return Vec::new();
        }
        let first = self.wanted_count() as usize;
        startable
            .into_iter()
            .zip(first..)
            .take_while(|(index, next)| index == next)
            .map(|(index, _)| index)
            .collect()
    }

    /// Which of the held replicas are let go: the first to stop first. Where the highest goes first, none below
    /// one that is not eligible.
    pub(super) fn order_of_drains(&self, eligible: impl Fn(&Slot) -> bool) -> Vec<usize> {
        let held = self.order_of_stops(Slot::is_held).into_iter();
        if self.stops_highest() {
            held.take_while(|index| eligible(&self.slots[*index])).collect()
        } else {
            held.filter(|index| eligible(&self.slots[*index])).collect()
        }
    }

    /// In which order replicas stop: the most recently started first, or the highest first.
    pub(super) fn order_of_stops(&self, is_meant: impl Fn(&Slot) -> bool) -> Vec<usize> {
        let mut order = self.select(is_meant);
        if !self.stops_highest() {
            order.sort_by_key(|index| (self.slots[*index].began_at, *index));
        }
        order.reverse();
        order
    }
}

#[cfg(test)]
mod tests;
