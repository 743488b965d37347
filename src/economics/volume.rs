//! Current volume: what a pool's traffic was over the last while.

use std::collections::VecDeque;
use std::time::Duration;

use super::time::millis;
use super::{Slot, Timestamp};

/// Buckets a window is cut into; what is older than the window is forgotten to this precision.
const BUCKETS: u64 = 60;

/// A ring of buckets over the last `window`.
///
/// Time never goes backwards; an observation that is late is counted at the newest instant seen.
#[derive(Debug, Clone)]
pub struct VolumeWindow {
    window: Duration,
    bucket_millis: u64,
    began: Timestamp,
    newest: Timestamp,
    /// `(bucket number, sum)`, oldest first; empty buckets are absent, so there are at most [`BUCKETS`] + 1.
    buckets: VecDeque<(u64, Slot)>,
    total: Slot,
}

impl VolumeWindow {
    pub fn new(window: Duration, began: Timestamp) -> Self {
        let bucket_millis = (millis(window) / BUCKETS).max(1);
        Self { window, bucket_millis, began, newest: began, buckets: VecDeque::new(), total: Slot::default() }
    }

    /// When it began to count.
    pub fn began(&self) -> Timestamp {
        self.began
    }

    pub fn add(&mut self, at: Timestamp, seen: Slot) {
        self.newest = self.newest.max(at);
        let bucket = self.newest.as_millis() / self.bucket_millis;
        match self.buckets.back_mut() {
            Some((last, sum)) if *last == bucket => *sum += seen,
            _ => self.buckets.push_back((bucket, seen)),
        }
        self.total += seen;
        self.forget();
    }

    /// Everything seen in the window that ends at `at`.
    pub fn total(&mut self, at: Timestamp) -> Slot {
        self.newest = self.newest.max(at);
        self.forget();
        self.total
    }

    /// The window's traffic as it would be in an hour. A window that has not been open for its whole length
    /// counts from its opening; one that was never open says nothing.
    pub fn per_hour(&mut self, at: Timestamp) -> Option<Slot> {
        let total = self.total(at);
        let open = millis(self.newest.since(self.began).min(self.window));
        (open > 0).then(|| total.scaled(3_600_000, open))
    }

    fn forget(&mut self) {
        let newest = self.newest.as_millis() / self.bucket_millis;
        let kept = (millis(self.window) / self.bucket_millis).max(1);
        while let Some((_, sum)) = self.buckets.front().filter(|(bucket, _)| bucket + kept <= newest) {
            self.total = self.total.without(*sum);
            self.buckets.pop_front();
        }
    }
}

impl Slot {
    /// The slot's traffic `numerator / denominator` times, each sum rounded down.
    #[must_use]
    pub fn scaled(&self, numerator: u64, denominator: u64) -> Self {
        let scale = |amount: u64| {
            let scaled = u128::from(amount) * u128::from(numerator) / u128::from(denominator);
            u64::try_from(scaled).unwrap_or(u64::MAX)
        };
        Self {
            api_cost: self.api_cost.mul_div_floor(numerator, denominator),
            work: super::Work(scale(self.work.0)),
            requests: scale(self.requests),
            tokens: scale(self.tokens),
        }
    }

    fn without(&self, part: Self) -> Self {
        Self {
            api_cost: self.api_cost - part.api_cost,
            work: super::Work(self.work.0 - part.work.0),
            requests: self.requests - part.requests,
            tokens: self.tokens - part.tokens,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_secs(seconds)
    }

    fn requests(requests: u64) -> Slot {
        Slot { requests, ..Slot::default() }
    }

    fn window() -> VolumeWindow {
        VolumeWindow::new(Duration::from_mins(10), at(0))
    }

    #[test]
    fn a_gap_longer_than_the_window_forgets_everything() {
        let mut window = window();
        window.add(at(0), requests(100));
        assert_eq!(window.total(at(601)), Slot::default());
    }

    #[test]
    fn a_young_window_counts_from_its_opening() {
        let mut window = window();
        assert_eq!(window.per_hour(at(0)), None);
        window.add(at(60), requests(10));
        assert_eq!(window.per_hour(at(60)).unwrap().requests, 600);
    }

    #[test]
    fn what_is_in_the_window_is_counted_whole() {
        let mut window = window();
        (0..600).for_each(|second| window.add(at(second), requests(1)));
        assert_eq!(window.total(at(599)).requests, 600);
        assert_eq!(window.total(at(899)).requests, 300);
    }

    proptest! {
        #[test]
        fn the_total_is_the_sum_of_the_last_buckets(steps in prop::collection::vec((0_u64..100, 0_u64..50), 1..200)) {
            let mut window = window();
            let (mut now, mut seen) = (0, vec![]);
            for (wait, amount) in steps {
                now += wait;
                window.add(at(now), requests(amount));
                seen.push((now, amount));
                let first = (now / 10).saturating_sub(59);
                let expected: u64 = seen.iter().filter(|(when, _)| when / 10 >= first).map(|(_, amount)| amount).sum();
                prop_assert_eq!(window.total(at(now)).requests, expected);
            }
        }
    }
}
