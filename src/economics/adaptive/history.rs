//! The recent gains of a layer, and their rhythm.

use std::time::Duration;

use crate::economics::Timestamp;
use crate::economics::time::millis;

/// Running sums of the last slots, so that the mean of any stretch of them is one subtraction.
#[derive(Debug, Clone)]
pub(super) struct History {
    sums: Vec<f64>,
    /// Slots seen.
    seen: usize,
}

impl History {
    /// Remembers the last `slots`.
    pub(super) fn new(slots: usize) -> Self {
        Self { sums: vec![0.0; slots + 1], seen: 0 }
    }

    /// Remembers the last `slots` from now on. Of slots that were forgotten, the mean of the others is believed.
    #[expect(clippy::cast_precision_loss, reason = "a few slots")]
    pub(super) fn resize(&mut self, slots: usize) {
        let known = self.seen.min(self.sums.len() - 1);
        let before = self.sum_before(self.seen - known);
        let mean = (self.sum_before(self.seen) - before) / known.max(1) as f64;
        let mut sums = vec![0.0; slots + 1];
        for back in 0..=slots.min(self.seen) {
            let slot = self.seen - back;
            let forgotten = back.saturating_sub(known);
            let sum = if forgotten > 0 { before - mean * forgotten as f64 } else { self.sum_before(slot) };
            let place = slot % sums.len();
            sums[place] = sum;
        }
        self.sums = sums;
    }

    pub(super) fn push(&mut self, gain: f64) {
        let sum = self.sum_before(self.seen) + gain;
        self.seen += 1;
        let place = self.seen % self.sums.len();
        self.sums[place] = sum;
    }

    /// Mean of the slots that ended from `newest` to `oldest` slots ago; what is before the beginning is nil.
    #[expect(clippy::cast_precision_loss, reason = "a few slots")]
    pub(super) fn mean(&self, newest: usize, oldest: usize) -> f64 {
        let from = self.seen.saturating_sub(oldest);
        let to = self.seen.saturating_sub(newest);
        (self.sum_before(to) - self.sum_before(from)) / (oldest - newest) as f64
    }

    fn sum_before(&self, slot: usize) -> f64 {
        self.sums[slot % self.sums.len()]
    }
}

/// An exponentially weighted mean that starts at nil.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Fading {
    pub mean: f64,
}

impl Fading {
    /// Moves by `rate`, 0 to 1, towards a value.
    pub(super) fn see(&mut self, value: f64, rate: f64) {
        self.mean += rate * (value - self.mean);
    }
}

/// Rate of a mean which forgets half in `half_life` slots.
pub(super) fn rate(half_life: f64) -> f64 {
    1.0 - (-1.0 / half_life).exp2()
}

/// Length of the pieces that a period is cut into, unless slots are longer.
const PIECE: Duration = Duration::from_mins(1);

/// The mean gain at each point of a period: an hour, a day, a week.
#[derive(Debug, Clone)]
pub(super) struct Rhythm {
    piece_millis: u64,
    slot_millis: u64,
    rate: f64,
    /// NaN where nothing was seen yet.
    means: Vec<f32>,
}

impl Rhythm {
    /// `weight` is that of the newest period in the mean.
    pub(super) fn new(period: Duration, slot: Duration, weight: f64) -> Self {
        let piece = PIECE.max(slot);
        let pieces = usize::try_from(period.as_millis() / piece.as_millis()).unwrap_or(1).max(1);
        let slots_a_piece = piece.as_secs_f64() / slot.as_secs_f64();
        Self {
            piece_millis: millis(piece).max(1),
            slot_millis: millis(slot).max(1),
            rate: 1.0 - (1.0 - weight).powf(1.0 / slots_a_piece),
            means: vec![f32::NAN; pieces],
        }
    }

    #[expect(clippy::cast_possible_truncation, reason = "a mean needs no more than that")]
    pub(super) fn see(&mut self, at: Timestamp, gain: f64) {
        let place = self.place(at.as_millis());
        let mean = &mut self.means[place];
        let old = f64::from(*mean);
        *mean = (if old.is_nan() { gain } else { old + self.rate * (gain - old) }) as f32;
    }

    /// Mean over slots `from..to` ahead of `at`; `unseen` stands for what was never seen.
    #[expect(clippy::cast_precision_loss, reason = "a few slots")]
    pub(super) fn mean(&self, at: Timestamp, (from, to): (usize, usize), unseen: f64) -> f64 {
        let mut sum = 0.0;
        for slot in from..to {
            let mean = f64::from(self.means[self.place(at.as_millis() + slot as u64 * self.slot_millis)]);
            sum += if mean.is_nan() { unseen } else { mean };
        }
        sum / (to - from) as f64
    }

    /// Mean over the `slots` before `at`.
    pub(super) fn mean_before(&self, at: Timestamp, slots: usize, unseen: f64) -> f64 {
        let back = Duration::from_millis(self.slot_millis.saturating_mul(slots as u64));
        self.mean(at.saturating_sub(back), (0, slots), unseen)
    }

    fn place(&self, millis: u64) -> usize {
        let pieces = self.means.len() as u64;
        usize::try_from(millis / self.piece_millis % pieces).expect("below the length of a vector")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_of_a_stretch_is_exact_and_bounded_memory_keeps_the_newest() {
        let mut history = History::new(4);
        (1..=10).for_each(|gain| history.push(f64::from(gain)));
        assert!((history.mean(0, 4) - 8.5).abs() < 1e-12);
        assert!((history.mean(1, 3) - 8.5).abs() < 1e-12);
    }

    #[test]
    fn a_longer_memory_keeps_what_is_known_and_believes_its_mean() {
        let mut history = History::new(4);
        (1..=10).for_each(|gain| history.push(f64::from(gain)));
        history.resize(8);
        assert!((history.mean(0, 4) - 8.5).abs() < 1e-12);
        assert!((history.mean(4, 8) - 8.5).abs() < 1e-12);
        history.push(11.0);
        history.resize(2);
        assert!((history.mean(0, 2) - 10.5).abs() < 1e-12);
        let mut young = History::new(4);
        young.push(6.0);
        young.resize(8);
        assert!((young.mean(0, 6) - 1.0).abs() < 1e-12, "before the beginning there is nothing");
    }

    #[test]
    fn a_rhythm_remembers_its_point_of_the_period() {
        let minute = Duration::from_mins(1);
        let mut rhythm = Rhythm::new(Duration::from_hours(1), minute, 0.5);
        let at = |minutes: u64| Timestamp::from_secs(minutes * 60);
        rhythm.see(at(5), 4.0);
        assert!((rhythm.mean(at(60), (5, 6), 0.0) - 4.0).abs() < 1e-6);
        assert!((rhythm.mean(at(60), (4, 6), 1.0) - 2.5).abs() < 1e-6, "what was never seen is not nil");
    }
}
