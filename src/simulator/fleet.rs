//! The life of replicas: billed from the order, ready after the start-up, gone once the minimum is paid.

use crate::economics::Fleet;

/// The replicas of one pool, counted in slots.
#[derive(Debug, Clone)]
pub struct SimulatedFleet {
    startup: u32,
    minimum: u32,
    /// Slot of each order, oldest first.
    ordered: Vec<u32>,
    starts: u64,
    replica_slots: u64,
}

impl SimulatedFleet {
    /// An empty fleet whose replicas are ready `startup` slots after the order and billed for at least `minimum`.
    pub fn new(startup: u32, minimum: u32) -> Self {
        Self { startup, minimum, ordered: Vec::new(), starts: 0, replica_slots: 0 }
    }

    /// The replicas at the beginning of slot `now`.
    pub fn seen_at(&self, now: u32) -> Fleet {
        let ready = self.ready_at(now);
        Fleet { starting: self.len() - ready, ready }
    }

    /// Carries out a target at the beginning of slot `now`: orders what is missing, and stops the most
    /// recently started replicas whose minimum is paid. A stop that must wait is simply asked for again.
    pub fn hold(&mut self, target: u32, now: u32) {
        while self.len() < target {
            self.ordered.push(now);
            self.starts += 1;
        }
        while self.len() > target {
            let Some(index) = self.ordered.iter().rposition(|ordered| now - ordered >= self.minimum) else {
                return;
            };
            self.ordered.remove(index);
        }
    }

    /// Bills slot `now` and answers how many replicas serve in it.
    pub fn pass(&mut self, now: u32) -> u32 {
        self.replica_slots += self.ordered.len() as u64;
        self.ready_at(now)
    }

    /// Bills what the minimums of the replicas that are left still demand at the horizon.
    pub fn settle(&mut self, horizon: u32) {
        let unpaid = |ordered: &u32| u64::from(self.minimum.saturating_sub(horizon - ordered));
        self.replica_slots += self.ordered.iter().map(unpaid).sum::<u64>();
    }

    pub fn starts(&self) -> u64 {
        self.starts
    }

    /// Slots billed so far, summed over the replicas.
    pub fn replica_slots(&self) -> u64 {
        self.replica_slots
    }

    fn len(&self) -> u32 {
        u32::try_from(self.ordered.len()).expect("a fleet is at most `max_replicas`")
    }

    fn ready_at(&self, now: u32) -> u32 {
        let ready = self.ordered.iter().filter(|ordered| now - **ordered >= self.startup).count();
        u32::try_from(ready).expect("a fleet is at most `max_replicas`")
    }
}
