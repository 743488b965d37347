//! A pool's volume where there are several proxies: what we have seen, what the others have, slot by slot.

use std::collections::BTreeMap;

use crate::economics::Slot;

/// Kept for as long as a proxy that was away may want to catch up.
#[derive(Debug, Default)]
pub struct SharedVolume {
    own: BTreeMap<u64, Slot>,
    others: BTreeMap<u64, Slot>,
    /// How often the others' whole past was read.
    catch_ups: u64,
    is_caught_up: bool,
}

/// A slot that is over, or under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedSlot {
    pub slot: u64,
    pub own: Slot,
    pub others: Slot,
}

impl SharedVolume {
    /// What we have seen in a slot so far, in all.
    pub fn note_own(&mut self, slot: u64, seen: Slot) {
        self.own.insert(slot, seen);
    }

    /// What the others have seen in a slot so far, in all.
    pub fn hear(&mut self, slot: u64, others: Slot) {
        self.others.insert(slot, others);
    }

    /// The others' past as it was read whole.
    pub fn catch_up(&mut self, others: BTreeMap<u64, Slot>) {
        self.others = others;
        self.is_caught_up = true;
        self.catch_ups += 1;
    }

    /// What happens from now on is not heard.
    pub fn lose_touch(&mut self) {
        self.is_caught_up = false;
    }

    pub fn is_caught_up(&self) -> bool {
        self.is_caught_up
    }

    pub fn catch_ups(&self) -> u64 {
        self.catch_ups
    }

    pub fn own_since(&self, slot: u64) -> Vec<(u64, Slot)> {
        self.own.range(slot..).map(|(slot, seen)| (*slot, *seen)).collect()
    }

    pub fn others(&self, slot: u64) -> Slot {
        self.others.get(&slot).copied().unwrap_or_default()
    }

    pub fn in_slot(&self, slot: u64) -> SharedSlot {
        let own = self.own.get(&slot).copied().unwrap_or_default();
        SharedSlot { slot, own, others: self.others(slot) }
    }

    /// Every slot before `end`, from the first in which anybody has been looking.
    pub fn before(&self, end: u64) -> Vec<SharedSlot> {
        let firsts = [self.own.keys().next(), self.others.keys().next()];
        let first = firsts.into_iter().flatten().min().copied().unwrap_or(end);
        (first..end).map(|slot| self.in_slot(slot)).collect()
    }

    pub fn forget_before(&mut self, slot: u64) {
        self.own = self.own.split_off(&slot);
        self.others = self.others.split_off(&slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn requests(requests: u64) -> Slot {
        Slot { requests, ..Slot::default() }
    }

    #[test]
    fn the_past_begins_with_the_first_who_looked_and_has_no_gaps() {
        let mut volume = SharedVolume::default();
        volume.note_own(5, requests(2));
        volume.catch_up(BTreeMap::from([(3, Slot::default()), (5, requests(7))]));
        let sums: Vec<_> =
            volume.before(7).iter().map(|at| (at.slot, at.own.requests + at.others.requests)).collect();
        assert_eq!(sums, vec![(3, 0), (4, 0), (5, 9), (6, 0)]);
    }

    #[test]
    fn what_is_told_again_counts_once() {
        let mut volume = SharedVolume::default();
        (0..3).for_each(|_| volume.hear(1, requests(4)));
        assert_eq!(volume.others(1), requests(4));
    }

    #[test]
    fn what_is_forgotten_is_gone_on_both_sides() {
        let mut volume = SharedVolume::default();
        volume.note_own(1, requests(1));
        volume.hear(2, requests(1));
        volume.note_own(3, requests(1));
        volume.forget_before(3);
        assert_eq!(volume.before(4).len(), 1);
    }
}
