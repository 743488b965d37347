//! What a layer will earn in the next while.
//!
//! The mean gain over three stretches ahead is forecast by linear regressions on the recent past at several
//! lags, on longer means, on the hour's, the day's and the week's rhythm, and on what the layer would earn at
//! smoothed volumes. Recursive least squares with forgetting (Haykin, Adaptive Filter Theory, ch. 10) learns
//! them online, from all layers together. A stretch is one start-up long, or two.

/// Stretches ahead: during a start-up, in the start-up after it, and in the two after that.
pub(super) const STRETCHES: usize = 3;

/// What a forecast is made from.
pub(super) const FEATURES: usize = 26;

pub(super) type Features = [f64; FEATURES];

/// Strength of the belief in the first coefficients, in squared units of the features.
const RIDGE: f64 = 20.0;

/// The covariance is cut down when it grows beyond this, as it does while nothing happens.
const LARGEST_TRACE: f64 = 1e6;

/// Linear forecasts of several targets from the same features.
#[derive(Debug, Clone)]
pub(super) struct Regression {
    covariance: Box<[[f64; FEATURES]; FEATURES]>,
    coefficients: [Features; STRETCHES],
}

impl Regression {
    /// Believes at first that the near future is `first`, a weighted sum of the features.
    pub(super) fn new(first: Features) -> Self {
        let mut covariance = Box::new([[0.0; FEATURES]; FEATURES]);
        for (index, row) in covariance.iter_mut().enumerate() {
            row[index] = 1.0 / RIDGE;
        }
        Self { covariance, coefficients: [first; STRETCHES] }
    }

    pub(super) fn forecast(&self, features: &Features) -> [f64; STRETCHES] {
        self.coefficients.each_ref().map(|coefficients| dot(coefficients, features))
    }

    /// Learns what came; the past keeps the share `keep` of its weight.
    pub(super) fn learn(&mut self, features: &Features, came: [f64; STRETCHES], keep: f64) {
        let gain = self.covariance.each_ref().map(|row| dot(row, features));
        let scale = keep + dot(features, &gain);
        for (coefficients, came) in self.coefficients.iter_mut().zip(came) {
            let error = (came - dot(coefficients, features)) / scale;
            coefficients.iter_mut().zip(&gain).for_each(|(coefficient, gain)| *coefficient += gain * error);
        }
        let mut trace = 0.0;
        for (index, (row, row_gain)) in self.covariance.iter_mut().zip(&gain).enumerate() {
            let share = row_gain / scale;
            row.iter_mut().zip(&gain).for_each(|(cell, gain)| *cell = (*cell - share * gain) / keep);
            trace += row[index];
        }
        if trace > LARGEST_TRACE {
            self.covariance.iter_mut().flatten().for_each(|cell| *cell *= 0.5);
        }
    }
}

fn dot(left: &Features, right: &Features) -> f64 {
    left.iter().zip(right).map(|(left, right)| left * right).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_linear_law_is_found() {
        let mut regression = Regression::new([0.0; FEATURES]);
        let mut state = 1_u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f64::from(state >> 8) / f64::from(1_u32 << 24)
        };
        let law = |features: &Features| [2.0 * features[0] - features[5], features[25], 0.5];
        // The ridge holds the constant back until there is much more evidence than its own weight.
        for _ in 0..30_000 {
            let mut features = [0.0; FEATURES];
            features.fill_with(&mut next);
            features[1] = 1.0;
            regression.learn(&features, law(&features), 1.0);
        }
        let mut features = [0.3; FEATURES];
        features[1] = 1.0;
        for (found, expected) in regression.forecast(&features).into_iter().zip(law(&features)) {
            assert!((found - expected).abs() < 0.02, "{found} {expected}");
        }
    }
}
