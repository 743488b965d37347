//! Rent on its way into the ledger: what fell due, and which part of it served calls account for.
//!
//! `attributed + idle = rent`, to the nano-dollar, in every row; and as what falls due telescopes, the rows of
//! a backend add up to the lifetimes of its replicas. Idle is negative where replicas did more work than their
//! configured capacity says.

use crate::economics::{Billing, NanoUsd, Timestamp, Work};
use crate::gateway::Pool;
use crate::ledger::{Ledger, RentEntry};
use crate::metrics::SpendKind;

/// The row that is being filled.
#[derive(Debug, Default)]
pub(super) struct RentBook {
    entry: Option<RentEntry>,
}

impl RentBook {
    /// Takes the rent that fell due up to `now`, into the metrics and towards the next row. Returns the work done
    /// by calls that were settled meanwhile.
    pub(super) fn accrue(&mut self, pool: &Pool, now: Timestamp) -> Work {
        let delta = pool.backend.fleet.accrue(now);
        pool.backend.series.spend(SpendKind::Capacity, delta.rent);
        pool.series.rented(delta.replica_millis);
        let entry = self.entry(pool, delta.from);
        entry.to = delta.to.max(entry.to);
        entry.replica_millis += delta.replica_millis;
        entry.rent += delta.rent;
        self.attribute(pool, now)
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

    /// Ends the row, if anything is in it.
    pub(super) fn book(&mut self, ledger: &Ledger) {
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
