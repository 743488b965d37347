//! A budget and what has been taken from it.
//!
//! A call is admitted while anything is left, and holds the most that it can cost until it is settled; so
//! however many calls come at once, what is spent exceeds the budget by one call at most. What a call holds is a
//! value that gives it back when it is dropped, and that expires by itself after [`reserved::LIFETIME`]. A few
//! numbers must change together, so they are behind a lock that is held for a few nanoseconds and never over
//! anything that waits.
//!
//! With other proxies, the limit is what was allotted to this one ([`Account::claim`], [`Account::allot`]); it
//! stays in force until there is another answer, however long that takes.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::period;
use super::reserved::{Minute, Reserved};
use crate::config::{Budget, BudgetPeriod};
use crate::economics::{NanoUsd, Timestamp};
use crate::metrics::BudgetState;
use crate::shared::budgets::{Allotment, Claim};

#[derive(Debug)]
pub struct Account {
    pub budget: Budget,
    book: Mutex<Book>,
}

#[derive(Debug)]
struct Book {
    from: Timestamp,
    to: Option<Timestamp>,
    spent: NanoUsd,
    held: Reserved,
    /// None while no other proxy was ever heard of.
    share: Option<Share>,
    /// What was spent and held when it was last claimed.
    claimed: Option<NanoUsd>,
    /// A call was turned away since the last claim.
    was_short: bool,
}

/// Our part of a budget that several proxies spend.
#[derive(Debug, Clone, Copy)]
struct Share {
    /// What we may have spent and hold in all.
    allotted: NanoUsd,
    others_spent: NanoUsd,
    proxies: u32,
}

/// Nothing is left of a budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spent {
    /// When its period ends; never for a lifetime.
    pub until: Option<Timestamp>,
    /// Other proxies may use some of it yet, and what they do not need they give back.
    pub is_held_elsewhere: bool,
}

impl Account {
    pub fn new(budget: Budget, spent: NanoUsd, now: Timestamp) -> Arc<Self> {
        let (from, to) = period::bounds(budget.period, now);
        let book =
            Book { from, to, spent, held: Reserved::default(), share: None, claimed: None, was_short: false };
        Arc::new(Self { budget, book: Mutex::new(book) })
    }

    /// Holds the most that a call can cost, if anything is left.
    pub fn hold(self: &Arc<Self>, most: NanoUsd, now: Timestamp) -> Result<Hold, Spent> {
        let mut book = self.book_at(now);
        let limit = book.share.map_or(self.budget.limit, |share| share.allotted);
        let used = book.spent + book.held.total();
        if used >= limit {
            book.was_short = true;
            let is_held_elsewhere =
                book.share.is_some_and(|share| used + share.others_spent < self.budget.limit);
            return Err(Spent { until: book.to, is_held_elsewhere });
        }
        let amount = most.max(NanoUsd::ZERO);
        let since = book.held.add(amount, now);
        Ok(Hold { account: self.clone(), amount, since })
    }

    /// Adds what was spent without having been held.
    pub fn charge(&self, cost: NanoUsd, now: Timestamp) {
        let mut book = self.book_at(now);
        book.spent += cost;
    }

    /// What is held by calls that are under way.
    pub fn held(&self) -> NanoUsd {
        self.lock().held.total()
    }

    pub fn state(&self, now: Timestamp) -> BudgetState {
        let book = self.book_at(now);
        BudgetState {
            name: self.budget.name.clone(),
            limit: self.budget.limit,
            spent: book.spent + book.share.map_or(NanoUsd::ZERO, |share| share.others_spent),
            from: book.from,
            to: book.to.unwrap_or(book.from),
        }
    }

    /// The book of the current period. A call that began in the last one is charged to the one it ends in, as
    /// the ledger does it, so what it holds stays held.
    fn book_at(&self, now: Timestamp) -> MutexGuard<'_, Book> {
        let mut book = self.lock();
        book.held.expire(now);
        if book.to.is_some_and(|to| now >= to) {
            (book.from, book.to) = period::bounds(self.budget.period, now);
            book.spent = NanoUsd::ZERO;
            book.claimed = None;
            if let Some(share) = &mut book.share {
                // Nobody has spent anything yet, so everybody has the same part until they agree.
                let allotted = self.budget.limit.mul_div_floor(1, u64::from(share.proxies.max(1)));
                *share = Share { allotted, others_spent: NanoUsd::ZERO, ..*share };
            }
        }
        book
    }

    /// What to tell the other proxies, if it has changed or `is_due` anyway. Half of what was allotted and is
    /// not used is given back at once; the answer decides about the rest.
    pub fn claim(&self, is_due: bool, now: Timestamp) -> Option<Claim> {
        let mut book = self.book_at(now);
        let used = book.spent + book.held.total();
        let is_busy = book.was_short || book.claimed.is_some_and(|claimed| claimed != used);
        if !is_due && !is_busy && book.claimed.is_some() {
            return None;
        }
        (book.claimed, book.was_short) = (Some(used), false);
        let had = book.share.map(|share| share.allotted.max(used));
        if let Some(share) = &mut book.share
            && share.allotted > used
        {
            share.allotted = used + (share.allotted - used).mul_div_floor(1, 2);
        }
        Some(Claim {
            name: self.budget.name.clone(),
            from: book.from,
            life: book.to.map_or(LIFETIME_KEPT, |to| to.since(now) + CLOCKS_APART),
            limit: self.budget.limit,
            spent: book.spent,
            used,
            kept: book.share.map(|share| share.allotted.max(used)),
            had,
            is_busy,
        })
    }

    /// Takes the answer to a claim; one about a period that is over is too late.
    pub fn allot(&self, claim: &Claim, allotment: Allotment, proxies: u32) {
        let mut book = self.lock();
        if book.from == claim.from {
            let Allotment { allotted, others_spent } = allotment;
            book.share = Some(Share { allotted, others_spent, proxies });
        }
    }

    fn lock(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The record of a period is kept so much longer than the period, for a proxy whose clock is late.
const CLOCKS_APART: Duration = Duration::from_mins(10);
/// The record of a budget without a period is kept so long after it was last used.
const LIFETIME_KEPT: Duration = Duration::from_hours(400 * 24);

/// What one call holds of a budget, given back on drop.
#[derive(Debug)]
pub struct Hold {
    account: Arc<Account>,
    amount: NanoUsd,
    since: Minute,
}

impl Hold {
    /// Holds nothing, but charges when it is settled.
    pub fn of_nothing(account: &Arc<Account>) -> Self {
        Self { account: account.clone(), amount: NanoUsd::ZERO, since: Minute::default() }
    }

    pub fn account(&self) -> &Arc<Account> {
        &self.account
    }

    /// Gives back what is held and charges what the call did cost, as one change.
    pub fn settle(mut self, cost: NanoUsd, now: Timestamp) {
        let mut book = self.account.book_at(now);
        book.held.give_back(self.amount, self.since);
        book.spent += cost;
        drop(book);
        self.amount = NanoUsd::ZERO;
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut book = self.account.lock();
        book.held.give_back(self.amount, self.since);
    }
}

/// A budget of a virtual key, under the key's id.
pub fn of_key(id: &str, limit: NanoUsd, period: BudgetPeriod) -> Budget {
    Budget {
        name: id.to_owned(),
        scope: crate::config::BudgetScope::Key(id.to_owned()),
        limit,
        period,
        when_spent: crate::config::WhenSpent::Refuse,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DAY: Duration = Duration::from_hours(24);

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_secs(1_800_000_000 - 1_800_000_000 % 86_400 + seconds)
    }

    fn nanos(nanos: i64) -> NanoUsd {
        NanoUsd::from_nanos(nanos)
    }

    fn account(limit: i64, spent: i64) -> Arc<Account> {
        Account::new(of_key("key_1", nanos(limit), BudgetPeriod::Day), nanos(spent), at(0))
    }

    #[test]
    fn a_thousand_calls_at_once_overspend_by_one_at_most() {
        let account = account(1_000_000, 990_000);
        let admitted: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| {
                        (0..125).filter_map(|_| account.hold(nanos(3000), at(1)).ok()).collect::<Vec<_>>()
                    })
                })
                .collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(admitted.len(), 4);
        for hold in admitted {
            hold.settle(nanos(3000), at(2));
        }
        assert_eq!(account.state(at(2)).spent, nanos(1_002_000));
        assert_eq!(account.held(), NanoUsd::ZERO);
        assert_eq!(
            account.hold(nanos(1), at(2)).unwrap_err(),
            Spent { until: Some(at(86_400)), is_held_elsewhere: false }
        );
    }

    /// An account of 1000 of which 100 were spent here, shared by three.
    fn shared(allotted: i64) -> Arc<Account> {
        let account = account(1000, 100);
        let claim = account.claim(false, at(0)).expect("the first is always made");
        let allotment = Allotment { allotted: nanos(allotted), others_spent: nanos(50) };
        account.allot(&claim, allotment, 3);
        account
    }

    #[test]
    fn what_was_allotted_is_the_limit_until_the_next_answer() {
        let account = shared(300);
        assert_eq!(account.state(at(1)).spent, nanos(150));
        let holds = [account.hold(nanos(150), at(1)).unwrap(), account.hold(nanos(150), at(1)).unwrap()];
        assert!(account.hold(nanos(1), at(1)).is_err(), "300 are used or held");
        let claim = account.claim(false, at(1)).unwrap();
        assert_eq!((claim.spent, claim.used, claim.kept), (nanos(100), nanos(400), Some(nanos(400))));
        assert!(claim.is_busy);
        drop(holds);
        assert!(account.hold(nanos(1), at(1)).is_ok());
    }

    #[test]
    fn a_part_that_is_spent_is_not_the_budget() {
        let account = shared(300);
        account.charge(nanos(300), at(1));
        assert!(account.hold(nanos(1), at(1)).unwrap_err().is_held_elsewhere, "550 are left to the others");
        let claim = account.claim(true, at(1)).unwrap();
        account.allot(&claim, Allotment { allotted: nanos(400), others_spent: nanos(600) }, 3);
        assert!(!account.hold(nanos(1), at(2)).unwrap_err().is_held_elsewhere, "all of it is spent");
    }

    #[test]
    fn half_of_what_is_not_used_is_given_back_with_a_claim() {
        let account = shared(500);
        assert_eq!(account.claim(false, at(1)), None, "nothing has changed");
        let claim = account.claim(true, at(1)).unwrap();
        assert_eq!((claim.had, claim.kept, claim.is_busy), (Some(nanos(500)), Some(nanos(300)), false));
    }

    #[test]
    fn a_new_period_begins_with_an_equal_part_and_a_late_answer_changes_nothing() {
        let account = shared(500);
        let late = account.claim(true, at(86_399)).unwrap();
        account.charge(nanos(333), at(86_400));
        assert!(account.hold(nanos(1), at(86_400)).is_err(), "a third of 1000 is spent");
        account.allot(&late, Allotment { allotted: nanos(900), others_spent: nanos(9) }, 3);
        assert!(account.hold(nanos(1), at(86_401)).is_err());
        assert_eq!(account.state(at(86_401)).spent, nanos(333));
    }

    #[test]
    fn the_next_day_begins_with_nothing_spent_and_a_call_is_charged_to_the_day_in_which_it_ends() {
        let account = account(1000, 0);
        let hold = account.hold(nanos(500), at(86_399)).unwrap();
        account.charge(nanos(999), at(86_399));
        hold.settle(nanos(400), at(86_400));
        let state = account.state(at(86_400));
        assert_eq!((state.spent, state.from, state.to), (nanos(400), at(0) + DAY, at(0) + DAY + DAY));
    }

    #[test]
    fn what_a_call_that_never_ends_holds_expires_and_is_not_given_back_twice() {
        let account = account(1000, 0);
        let stuck = account.hold(nanos(1000), at(30)).unwrap();
        let later = at(30) + super::super::reserved::LIFETIME;
        assert!(account.hold(nanos(1), at(3000)).is_err(), "it is still held");
        let next = account.hold(nanos(400), later + Duration::from_mins(1)).unwrap();
        assert_eq!(account.held(), nanos(400));
        stuck.settle(nanos(700), later + Duration::from_mins(2));
        assert_eq!((account.held(), account.state(later).spent), (nanos(400), nanos(700)));
        drop(next);
        assert_eq!(account.held(), NanoUsd::ZERO);
    }

    proptest! {
        #[test]
        fn nothing_stays_held_and_all_that_was_settled_is_spent(
            calls in proptest::collection::vec((0_i64..500, 0_i64..500, 0_u8..3), 0..60),
        ) {
            let account = account(10_000, 0);
            let (mut open, mut spent) = (Vec::new(), 0);
            for (most, cost, fate) in calls {
                let Ok(hold) = account.hold(nanos(most), at(1)) else { continue };
                match fate {
                    0 => drop(hold),
                    1 => { hold.settle(nanos(cost), at(1)); spent += cost; }
                    _ => open.push(hold),
                }
            }
            drop(open);
            prop_assert_eq!(account.held(), NanoUsd::ZERO);
            prop_assert_eq!(account.state(at(1)).spent, nanos(spent));
        }
    }
}
