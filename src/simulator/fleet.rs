//! The life of replicas: billed from the order, ready after the start-up, gone once the minimum is paid.

use crate::economics::Fleet;

/// Minimum of replicas that are paid anyway.
const FOR_EVER: u32 = u32::MAX;

/// The replicas of one pool, counted in slots.
#[derive(Debug, Clone)]
pub struct SimulatedFleet {
    startup: u32,
    minimum: u32,
    /// Oldest first.
    replicas: Vec<Replica>,
    starts: u64,
    replica_slots: u64,
}

#[derive(Debug, Clone, Copy)]
struct Replica {
    /// Slot of the order, and the first in which it serves.
    ordered: u32,
    ready: u32,
}

impl SimulatedFleet {
    /// An empty fleet whose replicas are ready `startup` slots after the order and billed for at least `minimum`.
    pub fn new(startup: u32, minimum: u32) -> Self {
        Self { startup, minimum, replicas: Vec::new(), starts: 0, replica_slots: 0 }
    }

    /// A fleet that is there from the beginning, whatever is wanted.
    pub fn standing(replicas: u32) -> Self {
        Self {
            replicas: vec![Replica { ordered: 0, ready: 0 }; replicas as usize],
            minimum: FOR_EVER,
            ..Self::new(0, 0)
        }
    }

    /// The replicas at the beginning of slot `now`.
    pub fn seen_at(&self, now: u32) -> Fleet {
        let ready = self.ready_at(now);
        Fleet { starting: self.len() - ready, ready }
    }

    /// Replicas that are ordered from now on are ready after so many slots.
    pub fn start_in(&mut self, startup: u32) {
        self.startup = startup;
    }

    /// Carries out a target at the beginning of slot `now`: orders what is missing, and stops the most
    /// recently started replicas whose minimum is paid. A stop that must wait is simply asked for again.
    pub fn hold(&mut self, target: u32, now: u32) {
        while self.len() < target {
            self.replicas.push(Replica { ordered: now, ready: now.saturating_add(self.startup) });
            self.starts += 1;
        }
        while self.len() > target {
            let is_paid = |replica: &Replica| now - replica.ordered >= self.minimum;
            let Some(index) = self.replicas.iter().rposition(is_paid) else { return };
            self.replicas.remove(index);
        }
    }

    /// Passes slot `now`: how many replicas serve in it, and how many are billed.
    pub fn pass(&mut self, now: u32) -> (u32, u64) {
        let billed = u64::from(self.len());
        self.replica_slots += billed;
        (self.ready_at(now), billed)
    }

    /// Bills what the minimums of the replicas that are left still demand at the horizon, in replica-slots.
    pub fn settle(&mut self, horizon: u32) -> u64 {
        if self.minimum == FOR_EVER {
            return 0;
        }
        let unpaid = |replica: &Replica| u64::from(self.minimum.saturating_sub(horizon - replica.ordered));
        let unpaid = self.replicas.iter().map(unpaid).sum();
        self.replica_slots += unpaid;
        unpaid
    }

    pub fn starts(&self) -> u64 {
        self.starts
    }

    /// Slots billed so far, summed over the replicas.
    pub fn replica_slots(&self) -> u64 {
        self.replica_slots
    }

    fn len(&self) -> u32 {
        u32::try_from(self.replicas.len()).expect("a fleet is at most `max_replicas`")
    }

    fn ready_at(&self, now: u32) -> u32 {
        let ready = self.replicas.iter().filter(|replica| now >= replica.ready).count();
        u32::try_from(ready).expect("a fleet is at most `max_replicas`")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replica_is_billed_from_the_order_and_serves_after_the_start() {
        let mut fleet = SimulatedFleet::new(2, 1);
        let passed: Vec<_> = (0..4)
            .map(|now| {
                fleet.hold(1, now);
                fleet.pass(now)
            })
            .collect();
        assert_eq!(passed, [(0, 1), (0, 1), (1, 1), (1, 1)]);
        assert_eq!((fleet.starts(), fleet.replica_slots()), (1, 4));
    }

    #[test]
    fn a_stop_waits_for_the_minimum_and_the_youngest_stops_first() {
        let mut fleet = SimulatedFleet::new(0, 3);
        fleet.hold(1, 0);
        fleet.hold(2, 2);
        fleet.hold(0, 3);
        assert_eq!(fleet.seen_at(3).ready, 1, "the first has paid its minimum, the second has not");
        fleet.hold(0, 5);
        assert_eq!(fleet.seen_at(5), Fleet::default());
    }

    #[test]
    fn unpaid_minimums_are_due_at_the_horizon() {
        let mut fleet = SimulatedFleet::new(0, 10);
        fleet.hold(2, 4);
        fleet.pass(4);
        assert_eq!(fleet.settle(5), 18);
        assert_eq!(fleet.replica_slots(), 20);
    }

    #[test]
    fn a_standing_fleet_is_there_whatever_is_wanted() {
        let mut fleet = SimulatedFleet::standing(3);
        fleet.hold(0, 0);
        assert_eq!(fleet.pass(0), (3, 3));
        assert_eq!((fleet.settle(1), fleet.starts()), (0, 0));
    }
}
