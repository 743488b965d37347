//! What a replica sustains, corrected by what it shows.
//!
//! The configured capacity says how much work a replica-second does; the backend may do more or less. While a
//! replica is full, the work it finishes a second (in configured replica-seconds, so exactly 1 if the config
//! is right) is an observation. The estimate moves towards observations at which the latency objective held
//! and never above the largest of them; when the objective broke, what was tried is too much.

use super::catalog::Capacity;

/// Share of the way that one observation moves the estimate.
const STEP: f64 = 0.1;

/// After a broken objective the estimate is at most this share of the speed at which it broke.
const BACK_OFF: f64 = 0.95;

/// What a fleet did over a while in which every replica was full.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FullSpeed {
    /// Work finished, in configured replica-seconds, for each second of each replica.
    pub speed: f64,
    /// Whether time to first token and time per output token were within the objective.
    pub objective_held: bool,
}

/// The learnt speed of a pool's replicas, relative to the configured capacity.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LearntCapacity {
    speed: f64,
    /// The fastest at which the objective held; the configured speed until something was seen.
    held: Option<f64>,
}

impl Default for LearntCapacity {
    fn default() -> Self {
        Self { speed: 1.0, held: None }
    }
}

impl LearntCapacity {
    /// Goes on from a speed that was learnt before, and held the objective then.
    pub fn resumed(speed: f64) -> Self {
        Self { speed, held: None }
    }

    /// Observations that are not a speed (no time passed, nothing finished) teach nothing.
    pub fn see(&mut self, seen: FullSpeed) {
        if !seen.speed.is_finite() || seen.speed <= 0.0 {
            return;
        }
        if seen.objective_held {
            let held = self.held.map_or(seen.speed, |held| held.max(seen.speed));
            self.held = Some(held);
            self.speed = (self.speed + STEP * (seen.speed - self.speed)).min(held);
        } else {
            let most = seen.speed * BACK_OFF;
            self.held = self.held.map(|held| held.min(most));
            self.speed = self.speed.min(most);
        }
    }

    /// Speed relative to the config: 1 until something else is known.
    pub fn relative_speed(&self) -> f64 {
        self.speed
    }

    /// The configured capacity at the learnt speed.
    pub fn applied_to(&self, configured: &Capacity) -> Capacity {
        Capacity {
            input_tokens_per_second: scaled(configured.input_tokens_per_second, self.speed),
            output_tokens_per_second: scaled(configured.output_tokens_per_second, self.speed),
            max_in_flight: configured.max_in_flight,
        }
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "`as` saturates, and a speed is positive"
)]
#[expect(clippy::cast_precision_loss, reason = "tokens a second are few")]
fn scaled(tokens_per_second: u64, speed: f64) -> u64 {
    ((tokens_per_second as f64 * speed).round() as u64).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(speed: f64) -> FullSpeed {
        FullSpeed { speed, objective_held: true }
    }

    #[test]
    fn the_estimate_goes_where_a_full_replica_is() {
        let mut capacity = LearntCapacity::default();
        (0..100).for_each(|_| capacity.see(held(0.6)));
        assert!((capacity.relative_speed() - 0.6).abs() < 0.01);
        (0..100).for_each(|_| capacity.see(held(1.5)));
        assert!((capacity.relative_speed() - 1.5).abs() < 0.01);
    }

    #[test]
    fn it_is_never_above_what_held_the_objective() {
        let mut capacity = LearntCapacity::default();
        for (step, speed) in [0.9, 1.4, 0.7, 1.1, 2.0].into_iter().cycle().take(200).enumerate() {
            let objective_held = speed < 1.2;
            capacity.see(FullSpeed { speed, objective_held });
            assert!(capacity.relative_speed() <= 1.1, "step {step}: {capacity:?}");
        }
    }

    #[test]
    fn what_is_not_a_speed_teaches_nothing() {
        let mut capacity = LearntCapacity::default();
        for speed in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            capacity.see(held(speed));
        }
        assert_eq!(capacity, LearntCapacity::default());
    }
}
