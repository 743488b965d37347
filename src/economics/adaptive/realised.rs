//! What the fleet that was wanted has cost beside what it has saved.
//!
//! The shadows say what each rule would have lost; this says what was really done, all layers and changes of rule
//! included. It is reckoned from the targets, not from the replicas that run, so that it is the same in a replay.

use super::experts::Life;

#[derive(Debug, Default)]
pub(super) struct Realised {
    /// Slots since the order of each replica, the oldest first.
    ages: Vec<u32>,
    loss: f64,
}

impl Realised {
    /// Rent less savings, in rents of a slot, fading.
    pub(super) fn loss(&self) -> f64 {
        self.loss
    }

    /// Replicas that are starting or ready.
    pub(super) fn held(&self) -> u32 {
        u32::try_from(self.ages.len()).expect("at most `max_replicas`")
    }

    /// Counts the slot that has finished, in which the layers would have earned `gains`.
    pub(super) fn pass(&mut self, gains: impl Iterator<Item = f64>, life: Life, keep: f64) {
        let served = self.ages.iter().filter(|age| **age >= life.startup);
        let saved: f64 = served.zip(gains).map(|(_, gain)| gain).sum();
        let rent = f64::from(self.held());
        self.loss = self.loss * keep + rent - saved;
        self.ages.iter_mut().for_each(|age| *age = age.saturating_add(1));
    }

    /// Orders what is missing, and stops what may be stopped, the youngest first.
    pub(super) fn hold(&mut self, target: u32, life: Life) {
        let target = target as usize;
        if self.ages.len() < target {
            self.ages.resize(target, 0);
        }
        while self.ages.len() > target && self.ages.last().is_some_and(|age| *age >= life.minimum) {
            self.ages.pop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replica_costs_rent_from_its_order_and_saves_after_its_start() {
        let life = Life { startup: 2, minimum: 4 };
        let mut realised = Realised::default();
        realised.hold(2, life);
        let mut pass = |target| {
            realised.pass([3.0, 0.5].into_iter(), life, 1.0);
            realised.hold(target, life);
            realised.loss()
        };
        let losses: Vec<f64> = [2, 2, 0, 0, 0].into_iter().map(&mut pass).collect();
        assert_eq!(losses, [2.0, 4.0, 2.5, 1.0, 1.0]);
    }
}
