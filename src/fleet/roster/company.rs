//! Other proxies, which send calls to the same replicas, and one of which orders them.

use std::time::Duration;

use super::super::slot::Phase;
use super::Roster;
use crate::economics::Timestamp;

impl Roster {
    /// Other proxies send calls to the same replicas, and hear of a drain after so long.
    pub(in crate::fleet) fn keep_company(&mut self, round_trip: Duration) {
        self.company = round_trip;
    }

    /// From now on what is to stop is stopped, although nobody sets a target any more.
    pub(in crate::fleet) fn release(&mut self) {
        self.is_releasing = true;
    }

    /// Whether a replica that has been let go since `since` may stop: our calls and those of the others, who have
    /// heard of it, have ended, or had the longest time that a call may take.
    pub(super) fn has_drained(&self, index: usize, since: Timestamp, now: Timestamp) -> bool {
        let replica = &self.slots[index].replica;
        let is_idle = replica.in_flight() == 0 && replica.others_in_flight() == 0;
        let drained_for = now.since(since);
        (is_idle && drained_for >= self.company) || drained_for >= self.rules.longest_call
    }

    /// Another process decides: what we were about to stop is its business. One that takes calls does so again,
    /// of any other a probe says what it does.
    pub(super) fn stand_back(&mut self, now: Timestamp) {
        for index in 0..self.slots.len() {
            match self.slots[index].phase {
                Phase::Draining { .. } => self.slots[index].resume(now),
                Phase::Stopping { ordered: false, .. } => {
                    self.close_rent(index, now);
                    self.slots[index].enter(Phase::Unknown);
                }
                _ => {}
            }
        }
    }
}
