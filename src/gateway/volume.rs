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
    /// The others may know our whole past.
    is_told: bool,
    /// The slot in which we were in touch last.
    in_touch: Option<u64>,
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

    /// The same of a slot that nobody exchanges any more: the past is to be told.
    pub fn note_past(&mut self, slot: u64, seen: Slot) {
        self.note_own(slot, seen);
        self.is_told = false;
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

    /// What happens from now on is neither heard nor told.
    pub fn lose_touch(&mut self) {
        self.is_caught_up = false;
        self.is_told = false;
    }

    /// An exchange of the slots from `first` up to the present one begins. If those before were never exchanged in
    /// whole, because we stood still, touch was lost without a failure.
    pub fn keep_in_touch(&mut self, first: u64, present: u64) {
        if self.in_touch.replace(present).is_some_and(|last| last < first) {
            self.lose_touch();
        }
    }

    /// Somebody has told a past of which we have not heard.
    pub fn miss_a_past(&mut self) {
        self.is_caught_up = false;
    }

    pub fn is_in_touch(&self) -> bool {
        self.is_caught_up && self.is_told
    }

    /// Our past is being told; whether the others may not know all of it.
    pub fn begin_to_tell(&mut self) -> bool {
        !std::mem::replace(&mut self.is_told, true)
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
    fn touch_is_lost_by_a_failure_by_a_past_that_comes_late_and_by_standing_still_for_longer_than_is_exchanged()
     {
        let mut volume = SharedVolume::default();
        let catch_up = |volume: &mut SharedVolume| {
            let had_untold = volume.begin_to_tell();
            volume.catch_up(BTreeMap::new());
            assert!(volume.is_in_touch());
            had_untold
        };
        assert!(!volume.is_in_touch() && catch_up(&mut volume));
        for present in [3, 4, 4, 7] {
            volume.keep_in_touch(present - 3, present);
            assert!(volume.is_in_touch());
        }
        volume.keep_in_touch(8, 11);
        assert!(!volume.is_in_touch() && catch_up(&mut volume));
        volume.miss_a_past();
        assert!(!volume.is_in_touch() && !catch_up(&mut volume), "the others know ours");
        volume.note_past(1, requests(4));
        assert!(!volume.is_in_touch() && catch_up(&mut volume));
        volume.lose_touch();
        assert!(!volume.is_in_touch() && catch_up(&mut volume));
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
