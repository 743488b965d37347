//! What the fleet that was wanted has cost beside what it has saved.
//!
//! The shadows say what each rule would have lost; this says what was really done, all layers and changes of rule
//! included. It is reckoned from the targets, not from the replicas that run, so that it is the same in a replay.

use super::experts::Life;

#[derive(Debug, Default)]
pub(super) struct Realised {
    /// Slots since the order of each replica, the oldest first.
    ages: Vec<u32>,
    of_late: f64,
    in_all: f64,
    last_saved: f64,
}

impl Realised {
    /// Rent less savings, in rents of a slot, fading.
    pub(super) fn of_late(&self) -> f64 {
        self.of_late
    }

    /// The same since the beginning, and what the replicas that are held would still lose if the next slot were like
    /// the last: the rest of each start-up or minimum, and the rent that those which serve do not earn.
    pub(super) fn at_stake(&self, life: Life) -> f64 {
        let committed = life.committed();
        let rest: u32 = self.ages.iter().map(|age| committed.saturating_sub(*age)).sum();
        let serving = self.ages.iter().filter(|age| **age >= committed).count();
        #[expect(clippy::cast_precision_loss, reason = "at most `max_replicas`")]
        let unearned = (serving as f64 - self.last_saved).max(0.0);
        self.in_all + f64::from(rest) + unearned
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
        self.of_late = self.of_late * keep + rent - saved;
        self.in_all += rent - saved;
        self.last_saved = saved;
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
            realised.of_late()
        };
        let losses: Vec<f64> = [2, 2, 0, 0, 0].into_iter().map(&mut pass).collect();
        assert_eq!(losses, [2.0, 4.0, 2.5, 1.0, 1.0]);
    }
}
