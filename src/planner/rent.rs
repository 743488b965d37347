//! Rent on its way into the ledger: what fell due, and which part of it served calls account for.
//!
//! `attributed + idle = rent`, to the nano-dollar, in every row; and as what falls due telescopes, the rows of
//! a backend add up to the lifetimes of its replicas. Idle is negative where replicas did more work than their
//! configured capacity says.
//!
//! With other proxies, each sees the same replicas, and one books their rent: who holds the planner's lease. The
//! others keep what fell due until they hear that it is in a ledger, so that whoever holds the lease next goes on
//! where the last one ended. What calls account for is booked by whom they came to.

use std::collections::VecDeque;

use crate::economics::time::millis;
use crate::economics::{Billing, NanoUsd, Timestamp, Work};
use crate::fleet::RentDelta;
use crate::gateway::{Gateway, Pool, RentDuty};
use crate::ledger::{Ledger, RentEntry};
use crate::metrics::SpendKind;

/// The row that is being filled.
#[derive(Debug, Default)]
pub(super) struct RentBook {
    entry: Option<RentEntry>,
    /// Fell due, and is in no row yet; oldest first.
    unbooked: VecDeque<RentDelta>,
}

/// Parts of rent that wait for their row: an hour at a look a second. More are put together, oldest first.
const MOST_UNBOOKED: usize = 3600;

impl RentBook {
    /// Takes the rent that fell due up to `now`, towards the next row. Returns the work done by calls that were
    /// settled meanwhile.
    pub(super) fn accrue(&mut self, pool: &Pool, duty: RentDuty, now: Timestamp) -> Work {
        self.unbooked.push_back(pool.backend.fleet.accrue(now));
        match duty {
            RentDuty::Alone => self.take_in(pool, None),
            RentDuty::Book { .. } => {}
            RentDuty::Leave { booked } => {
                while self.unbooked.front().is_some_and(|delta| Some(delta.to) <= booked) {
                    self.unbooked.pop_front();
                }
            }
        }
        while self.unbooked.len() > MOST_UNBOOKED {
            self.join_oldest();
        }
        self.attribute(pool, now)
    }

    /// Into the metrics, and into the row, what fell due after `since`.
    fn take_in(&mut self, pool: &Pool, since: Option<Timestamp>) {
        for delta in std::mem::take(&mut self.unbooked) {
            let Some(delta) = after(delta, since) else { continue };
            pool.backend.series.spend(SpendKind::Capacity, delta.rent);
            pool.series.rented(delta.replica_millis);
            let entry = self.entry(pool, delta.from);
            entry.from = delta.from.min(entry.from);
            entry.to = delta.to.max(entry.to);
            entry.replica_millis += delta.replica_millis;
            entry.rent += delta.rent;
            entry.idle = entry.rent - entry.attributed;
        }
    }

    fn join_oldest(&mut self) {
        let (Some(first), Some(second)) = (self.unbooked.pop_front(), self.unbooked.front_mut()) else {
            return;
        };
        second.from = first.from;
        second.replica_millis += first.replica_millis;
        second.rent += first.rent;
    }

    /// Takes only what calls account for: the rent itself is another pool's to book.
    pub(super) fn attribute(&mut self, pool: &Pool, now: Timestamp) -> Work {
        let (attributed, busy) = pool.take_attributed();
        let entry = self.entry(pool, now);
        entry.to = now.max(entry.to);
        entry.busy += busy;
        entry.attributed += attributed;
        if pool.spec.billing == Billing::PerUse {
            entry.rent += attributed;
        }
        entry.idle = entry.rent - entry.attributed;
        busy
    }

    /// Ends the row, with the rent if it is ours to book, and lets the other proxies know.
    pub(super) fn book(&mut self, gateway: &Gateway, pool: &Pool, duty: RentDuty) {
        let until = self.unbooked.back().map(|delta| delta.to);
        match duty {
            RentDuty::Alone => self.take_in(pool, None),
            RentDuty::Book { since } => self.take_in(pool, since),
            RentDuty::Leave { .. } => {}
        }
        self.end_row(&gateway.ledger);
        if let (RentDuty::Book { .. }, Some(sharing), Some(until)) = (duty, &gateway.sharing, until) {
            sharing.rent_booked(pool.name(), until);
        }
    }

    /// Ends the row, if anything is in it.
    pub(super) fn end_row(&mut self, ledger: &Ledger) {
        let Some(entry) = self.entry.take() else { return };
        debug_assert!(entry.attributed + entry.idle == entry.rent);
        if entry.rent != NanoUsd::ZERO || entry.attributed != NanoUsd::ZERO || entry.replica_millis > 0 {
            ledger.append_rent(&entry);
        }
    }

    fn entry(&mut self, pool: &Pool, from: Timestamp) -> &mut RentEntry {
        self.entry.get_or_insert_with(|| RentEntry {
            backend: pool.backend.name().to_owned(),
            from,
            to: from,
            replica_millis: 0,
            busy: Work::ZERO,
            rent: NanoUsd::ZERO,
            attributed: NanoUsd::ZERO,
            idle: NanoUsd::ZERO,
        })
    }
}

/// The part of what fell due that is after `since`; in proportion, rounded down, where that is in the middle.
fn after(delta: RentDelta, since: Option<Timestamp>) -> Option<RentDelta> {
    let Some(since) = since.filter(|since| delta.from < *since) else { return Some(delta) };
    if delta.to <= since {
        return None;
    }
    let (part, whole) = (millis(delta.to.since(since)), millis(delta.to.since(delta.from)));
    let replica_millis = u128::from(delta.replica_millis) * u128::from(part) / u128::from(whole);
    Some(RentDelta {
        from: since,
        to: delta.to,
        replica_millis: u64::try_from(replica_millis).unwrap_or(u64::MAX),
        rent: delta.rent.mul_div_floor(part, whole),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delta(from: u64, to: u64) -> RentDelta {
        let length = i64::try_from(to - from).unwrap();
        RentDelta {
            from: Timestamp::from_secs(from),
            to: Timestamp::from_secs(to),
            replica_millis: (to - from) * 2000,
            rent: NanoUsd::from_nanos(length * 30),
        }
    }

    #[test]
    fn what_another_has_booked_is_not_booked_again() {
        let since = Some(Timestamp::from_secs(13));
        assert_eq!(after(delta(10, 13), since), None);
        assert_eq!(after(delta(10, 20), since), Some(delta(13, 20)));
        assert_eq!(after(delta(13, 20), since), Some(delta(13, 20)));
        assert_eq!(after(delta(10, 20), None), Some(delta(10, 20)));
    }

    #[test]
    fn what_waits_long_is_put_together_and_nothing_of_it_is_lost() {
        let mut book = RentBook::default();
        book.unbooked.extend([delta(0, 4), delta(4, 5), delta(5, 9)]);
        book.join_oldest();
        book.join_oldest();
        assert_eq!(book.unbooked, [delta(0, 9)]);
    }
}
