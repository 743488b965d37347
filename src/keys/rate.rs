//! A rate limit in one atomic: a bucket that holds a minute's worth and refills steadily.
//!
//! What is kept is the instant at which the bucket will be full again (the generic cell rate algorithm). A take
//! moves it on by the time that refilling takes; there is no window whose edge could let through twice the limit
//! in a moment, and the time to wait is known exactly. Within any minute at most the bucket and one refill pass.
//!
//! With other proxies, what may be taken until the next answer is bounded besides by what was allotted; the
//! bound rises with time by this proxy's part of the refill, so that it goes on if no answer comes.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use crate::economics::Timestamp;
use crate::shared::rates::Allotment;

const MINUTE_NANOS: u128 = 60_000_000_000;

/// So many units a minute.
#[derive(Debug)]
pub struct Rate {
    per_minute: u64,
    /// Nanoseconds since the Unix epoch: enough until the year 2554.
    full_at: AtomicU64,
    shared: Shared,
}

/// Our part of a limit that several proxies share. Units are counted from the beginning of the process.
#[derive(Debug)]
struct Shared {
    taken: AtomicI64,
    /// What may have been taken at `since`; [`i64::MAX`] while no other proxy was ever heard of.
    allotted: AtomicI64,
    /// Milliseconds since the Unix epoch.
    since: AtomicU64,
    proxies: AtomicU64,
    /// Free over all proxies, at `since`.
    free: AtomicI64,
    /// `taken` when it was last claimed, and when the last answer came.
    claimed: AtomicI64,
    answered: AtomicI64,
    was_short: AtomicBool,
}

/// How a [`Rate`] stands with the other proxies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    pub taken: i64,
    /// `taken` when the last answer came.
    pub before: i64,
    /// What may be taken until the answer.
    pub kept: u64,
    pub is_busy: bool,
}

/// Nothing was claimed yet.
const NEVER: i64 = i64::MIN;

/// A limit as the `x-ratelimit-*` headers tell it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateView {
    pub limit: u64,
    pub remaining: u64,
    /// Until the bucket is full.
    pub reset: Duration,
}

impl Rate {
    /// A full bucket. A limit of zero lets nothing through.
    pub fn new(per_minute: u64) -> Self {
        let shared = Shared {
            taken: AtomicI64::new(0),
            allotted: AtomicI64::new(i64::MAX),
            since: AtomicU64::new(0),
            proxies: AtomicU64::new(1),
            free: AtomicI64::new(i64::MAX),
            claimed: AtomicI64::new(NEVER),
            answered: AtomicI64::new(0),
            was_short: AtomicBool::new(false),
        };
        Self { per_minute, full_at: AtomicU64::new(0), shared }
    }

    pub fn per_minute(&self) -> u64 {
        self.per_minute
    }

    /// Takes `units`, or says how long to wait. More than a minute's worth is taken from a full bucket, and
    /// what is missing is waited for by those who come after.
    pub fn take(&self, units: u64, now: Timestamp) -> Result<(), Duration> {
        if self.per_minute == 0 {
            return Err(Duration::from_mins(1));
        }
        self.take_share(units, now)?;
        self.take_own(units, now).inspect_err(|_| self.shared.add(units, 0))
    }

    fn take_own(&self, units: u64, now: Timestamp) -> Result<(), Duration> {
        let (now, cost) = (nanos(now), self.time_of(units));
        let needed = u128::from(cost).min(MINUTE_NANOS);
        let mut full_at = self.full_at.load(Ordering::Relaxed);
        loop {
            let debt = full_at.saturating_sub(now);
            let after = u128::from(debt) + needed;
            if after > MINUTE_NANOS {
                return Err(Duration::from_nanos(u64::try_from(after - MINUTE_NANOS).unwrap_or(u64::MAX)));
            }
            let next = full_at.max(now).saturating_add(cost);
            match self.full_at.compare_exchange_weak(full_at, next, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Ok(()),
                Err(moved) => full_at = moved,
            }
        }
    }

    /// Takes of our part, if anything is left of it.
    fn take_share(&self, units: u64, now: Timestamp) -> Result<(), Duration> {
        let shared = &self.shared;
        let most = self.allotted_at(now);
        let take = |taken: i64| (taken < most).then(|| taken.saturating_add_unsigned(units));
        let taken = shared.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        taken.map(drop).map_err(|_| {
            shared.was_short.store(true, Ordering::Relaxed);
            // What is owed comes back with time; what the others hold, with the next answer.
            let owed = 1_i64.saturating_sub(shared.free.load(Ordering::Relaxed)).max(0).unsigned_abs();
            Duration::from_nanos(self.time_of(owed)).max(NEXT_ANSWER)
        })
    }

    /// What may have been taken by now.
    fn allotted_at(&self, now: Timestamp) -> i64 {
        let shared = &self.shared;
        let allotted = shared.allotted.load(Ordering::Relaxed);
        let proxies = shared.proxies.load(Ordering::Relaxed).max(1);
        let passed = now.as_millis().saturating_sub(shared.since.load(Ordering::Relaxed));
        let refill = u128::from(passed) * u128::from(self.per_minute) / u128::from(60_000 * proxies);
        allotted.saturating_add_unsigned(u64::try_from(refill).unwrap_or(u64::MAX))
    }

    /// While no answer comes, what has come back and was not taken is our part of a minute's worth at most.
    pub fn go_on_alone(&self, now: Timestamp) {
        let shared = &self.shared;
        if shared.allotted.load(Ordering::Relaxed) == i64::MAX {
            return;
        }
        let part = self.per_minute / shared.proxies.load(Ordering::Relaxed).max(1);
        let most = i64::try_from(part.max(1)).unwrap_or(i64::MAX);
        let taken = shared.taken.load(Ordering::Relaxed);
        let more = self.allotted_at(now).saturating_sub(taken);
        if more > most {
            self.set_allotted(taken, most, now);
        }
    }

    /// What to tell the other proxies, if it has changed or `is_due` anyway. Half of what was allotted and not
    /// taken is given back at once.
    pub fn claim(&self, is_due: bool, now: Timestamp) -> Option<Standing> {
        let shared = &self.shared;
        let taken = shared.taken.load(Ordering::Relaxed);
        let claimed = shared.claimed.swap(taken, Ordering::Relaxed);
        let is_first = claimed == NEVER;
        let is_busy = shared.was_short.swap(false, Ordering::Relaxed) || (!is_first && claimed != taken);
        if !is_due && !is_busy && !is_first {
            return None;
        }
        let allotted = shared.allotted.load(Ordering::Relaxed);
        let kept = if allotted == i64::MAX { 0 } else { (self.allotted_at(now) - taken).max(0) / 2 };
        if allotted != i64::MAX {
            self.set_allotted(taken, kept, now);
        }
        let before = shared.answered.load(Ordering::Relaxed);
        Some(Standing { taken, before, kept: kept.unsigned_abs(), is_busy })
    }

    /// Takes the answer to a claim.
    pub fn allot(&self, standing: Standing, allotment: Allotment, proxies: u32, now: Timestamp) {
        let shared = &self.shared;
        shared.proxies.store(u64::from(proxies.max(1)), Ordering::Relaxed);
        shared.free.store(allotment.free, Ordering::Relaxed);
        shared.answered.store(standing.taken, Ordering::Relaxed);
        self.set_allotted(standing.taken, i64::try_from(allotment.more).unwrap_or(i64::MAX), now);
    }

    /// The refill counts from `now` on. Between the two stores a call may see one without the other, which is
    /// worth one exchange's refill at most.
    fn set_allotted(&self, taken: i64, more: i64, now: Timestamp) {
        self.shared.since.store(now.as_millis(), Ordering::Relaxed);
        self.shared.allotted.store(taken.saturating_add(more).min(i64::MAX - 1), Ordering::Relaxed);
    }

    /// Corrects an earlier take of `taken` units to the `used` ones.
    pub fn correct(&self, taken: u64, used: u64, now: Timestamp) {
        self.shared.add(taken, used);
        let move_on = |full_at: u64| {
            Some(if used > taken {
                full_at.max(nanos(now)).saturating_add(self.time_of(used - taken))
            } else {
                full_at.saturating_sub(self.time_of(taken - used))
            })
        };
        let moved = self.full_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, move_on);
        debug_assert!(moved.is_ok(), "there is always a next instant");
    }

    pub fn view(&self, now: Timestamp) -> RateView {
        let debt = self.full_at.load(Ordering::Relaxed).saturating_sub(nanos(now));
        let free = MINUTE_NANOS.saturating_sub(u128::from(debt));
        let remaining = free * u128::from(self.per_minute) / MINUTE_NANOS;
        RateView {
            limit: self.per_minute,
            remaining: u64::try_from(remaining)
                .unwrap_or(u64::MAX)
                .min(self.shared.free.load(Ordering::Relaxed).max(0).unsigned_abs()),
            reset: Duration::from_nanos(debt),
        }
    }

    /// How long so many units take to come back. Rounded up, so that no limit is exceeded by rounding.
    fn time_of(&self, units: u64) -> u64 {
        let time = (u128::from(units) * MINUTE_NANOS).div_ceil(u128::from(self.per_minute.max(1)));
        // A year is long enough for a limit of one.
        u64::try_from(time).unwrap_or(u64::MAX).min(MOST_DEBT_NANOS)
    }
}

impl Shared {
    /// Corrects what was taken from `before` to `after` units.
    fn add(&self, before: u64, after: u64) {
        let correct = |taken: i64| Some(taken.saturating_sub_unsigned(before).saturating_add_unsigned(after));
        let corrected = self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, correct);
        debug_assert!(corrected.is_ok(), "there is always a sum");
    }
}

/// A call that found our part used up may try again after so long.
const NEXT_ANSWER: Duration = Duration::from_secs(1);

/// Longest time that one take can add: an hour.
const MOST_DEBT_NANOS: u64 = 3_600_000_000_000;

fn nanos(at: Timestamp) -> u64 {
    at.as_millis().saturating_mul(1_000_000)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(millis: u64) -> Timestamp {
        Timestamp::from_millis(1_800_000_000_000 + millis)
    }

    #[test]
    fn a_full_bucket_gives_its_limit_at_once_and_then_one_at_a_time() {
        let rate = Rate::new(60);
        assert_eq!((0..100).filter(|_| rate.take(1, at(0)).is_ok()).count(), 60);
        assert_eq!(rate.take(1, at(0)), Err(Duration::from_secs(1)));
        assert_eq!(rate.take(1, at(1000)), Ok(()));
        assert_eq!(rate.view(at(1000)), RateView { limit: 60, remaining: 0, reset: Duration::from_mins(1) });
    }

    #[test]
    fn what_was_taken_and_not_used_comes_back() {
        let rate = Rate::new(1000);
        rate.take(900, at(0)).unwrap();
        assert!(rate.take(200, at(0)).is_err());
        rate.correct(900, 100, at(0));
        assert_eq!(rate.take(900, at(0)), Ok(()));
    }

    #[test]
    fn a_call_larger_than_the_limit_passes_alone_and_is_waited_for() {
        let rate = Rate::new(100);
        assert_eq!(rate.take(300, at(0)), Ok(()));
        assert_eq!(rate.take(1, at(120_000)), Err(Duration::from_millis(600)));
        assert_eq!(rate.take(1, at(120_600)), Ok(()));
    }

    fn passing(rate: &Rate, now: Timestamp) -> usize {
        (0..1000).filter(|_| rate.take(1, now).is_ok()).count()
    }

    /// A limit of 600 a minute, of which this one of three proxies may take 10 more.
    fn allotted() -> Rate {
        let rate = Rate::new(600);
        let standing = rate.claim(true, at(0)).unwrap();
        rate.allot(standing, Allotment { more: 10, free: 500 }, 3, at(0));
        rate
    }

    #[test]
    fn what_was_allotted_and_its_part_of_the_refill_are_all_that_passes() {
        let rate = allotted();
        assert_eq!(rate.view(at(0)).remaining, 500);
        assert_eq!(passing(&rate, at(0)), 10);
        assert_eq!(passing(&rate, at(3000)), 10);
        let standing = rate.claim(false, at(3000)).unwrap();
        assert_eq!(standing, Standing { taken: 20, before: 0, kept: 0, is_busy: true });
    }

    #[test]
    fn without_an_answer_for_an_hour_it_lets_through_its_part_of_a_minute_and_goes_on() {
        let rate = allotted();
        (1..=7200).for_each(|half_second| rate.go_on_alone(at(half_second * 500)));
        assert_eq!(passing(&rate, at(3_600_000)), 200);
        assert_eq!(passing(&rate, at(3_630_000)), 100);
    }

    #[test]
    fn what_is_idle_is_claimed_when_it_is_due_and_gives_half_back() {
        let rate = allotted();
        assert!(rate.claim(false, at(0)).is_none());
        assert_eq!(rate.claim(true, at(0)).unwrap().kept, 5);
        assert_eq!(passing(&rate, at(0)), 5);
    }

    proptest! {
        #[test]
        fn in_any_stretch_no_more_passes_than_the_bucket_and_its_refill(
            limit in 1_u64..5000,
            steps in proptest::collection::vec((0_u64..5000, 1_u64..200), 1..100),
        ) {
            let rate = Rate::new(limit);
            let (mut now, mut passed) = (0_u64, 0_u64);
            for (step, units) in steps {
                now += step;
                let units = units.min(limit);
                passed += if rate.take(units, at(now)).is_ok() { units } else { 0 };
                prop_assert!(passed <= limit + limit * now / 60_000 + 1);
            }
        }
    }
}
