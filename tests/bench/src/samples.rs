//! Exact percentiles of recorded times.

use serde::{Deserialize, Serialize};

/// Durations in nanoseconds.
#[derive(Default)]
pub struct Samples(Vec<u64>);

/// Microseconds, nearest rank.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Percentiles {
    pub p50: f64,
    pub p99: f64,
    pub max: f64,
}

impl Samples {
    pub fn push(&mut self, nanos: u64) {
        self.0.push(nanos);
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// `None` if nothing was recorded.
    pub fn percentiles(&mut self) -> Option<Percentiles> {
        self.0.sort_unstable();
        let last = self.0.len().checked_sub(1)?;
        let at = |hundredths: usize| {
            let rank = (self.0.len() * hundredths).div_ceil(100).max(1) - 1;
            micros(self.0[rank.min(last)])
        };
        Some(Percentiles { p50: at(50), p99: at(99), max: at(100) })
    }
}

#[expect(clippy::cast_precision_loss, reason = "times under an hour fit a double's mantissa")]
pub fn micros(nanos: u64) -> f64 {
    nanos as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_rank() {
        let mut samples = Samples::default();
        (1..=100).rev().for_each(|micros| samples.push(micros * 1000));
        let got = samples.percentiles().unwrap();
        assert_eq!((got.p50, got.p99, got.max), (50.0, 99.0, 100.0));
    }

    #[test]
    fn nothing_recorded_has_no_percentiles() {
        assert!(Samples::default().percentiles().is_none());
    }
}
