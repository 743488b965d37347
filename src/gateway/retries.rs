//! The retry budget of the process: in an outage, retries are a share of the calls and not a multiple.

use std::sync::atomic::{AtomicI64, Ordering};

/// Thousandths of a retry that may be saved up: a burst of so many retries is always allowed.
const MOST: i64 = 100 * WHOLE;
const WHOLE: i64 = 1000;

/// Every call earns a share of a retry, every retry spends one.
#[derive(Debug)]
pub struct RetryBudget {
    saved: AtomicI64,
    earned_per_call: i64,
}

impl RetryBudget {
    /// `ratio`: retries a call, over many calls.
    #[expect(clippy::cast_possible_truncation, reason = "a ratio between 0 and 1, in thousandths")]
    pub fn new(ratio: f64) -> Self {
        Self { saved: AtomicI64::new(MOST), earned_per_call: (ratio.clamp(0.0, 1.0) * 1000.0) as i64 }
    }

    pub fn earn(&self) {
        if self.saved.load(Ordering::Relaxed) < MOST {
            self.saved.fetch_add(self.earned_per_call, Ordering::Relaxed);
        }
    }

    /// Takes a retry if there is one.
    pub fn spend(&self) -> bool {
        if self.saved.fetch_sub(WHOLE, Ordering::Relaxed) >= WHOLE {
            return true;
        }
        self.saved.fetch_add(WHOLE, Ordering::Relaxed);
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn over_many_calls_retries_are_a_share_of_them() {
        let budget = RetryBudget::new(0.1);
        while budget.spend() {}
        let mut retries = 0;
        for _ in 0..1000 {
            budget.earn();
            retries += u32::from(budget.spend());
        }
        assert_eq!(retries, 100);
    }
}
