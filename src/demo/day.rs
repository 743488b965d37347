//! The made-up day: how many calls an hour there are at each time of it, and how large a call is.
//!
//! One hump between two nights, with a few percent of slow unrest on it. Its volume is above break-even from
//! about half past nine to about eight in the evening, and far below it at night.

use std::f64::consts::TAU;
use std::time::Duration;

/// Length of the day that is compressed.
pub const DAY: Duration = Duration::from_hours(24);

/// How much faster than life a day passes in a minute.
pub const SPEED_OF_A_MINUTE: u32 = 1_440;

const NIGHT_PER_HOUR: f64 = 60.0;
const NOON_PER_HOUR: f64 = 700.0;
/// The quietest hour of the night.
const QUIETEST_HOUR: f64 = 3.0;
/// Above 1: the hump is narrower than the valley.
const SHARPNESS: f64 = 1.3;

/// Mean size of a call while a day lasts a minute.
const INPUT_TOKENS: f64 = 2_500.0;
const OUTPUT_TOKENS: f64 = 120.0;

/// The traffic of a day that passes at some speed.
///
/// The machine that runs the demo sees the same number of calls a second at any speed: when the day is
/// shorter there are fewer calls in it, and each is larger by as much, so that the money stays the same.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Day {
    /// Calls of this day for one call of a day that lasts a minute.
    scale: f64,
}

impl Day {
    pub fn at_speed(speed: u32) -> Self {
        let scale = f64::from(SPEED_OF_A_MINUTE) / f64::from(speed.max(1));
        Self { scale: scale.clamp(0.1, 10.0) }
    }

    /// Calls an hour, so long after midnight.
    pub fn calls_per_hour(&self, after_midnight: Duration) -> f64 {
        let hour = after_midnight.as_secs_f64() / 3600.0;
        let hump = (0.5 - 0.5 * (TAU * (hour - QUIETEST_HOUR) / 24.0).cos()).powf(SHARPNESS);
        let unrest = 1.0 + 0.04 * (TAU * hour / 1.7).sin() + 0.03 * (TAU * hour / 0.61).sin();
        (NIGHT_PER_HOUR + (NOON_PER_HOUR - NIGHT_PER_HOUR) * hump) * unrest * self.scale
    }

    /// Input and output tokens of a call; `draw` is its place between the smallest (0) and the largest (1).
    pub fn call_size(&self, draw: f64) -> (u64, u64) {
        let relative = (0.5 + draw) / self.scale;
        (tokens(INPUT_TOKENS * relative), tokens(OUTPUT_TOKENS * relative))
    }

    /// Input and output tokens of a call in the mean.
    pub fn mean_call_size(&self) -> (u64, u64) {
        self.call_size(0.5)
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a few thousand tokens, made up")]
fn tokens(count: f64) -> u64 {
    count.round().max(1.0) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at_hour(hour: u64) -> Duration {
        Duration::from_hours(hour)
    }

    #[test]
    fn a_day_is_above_400_calls_an_hour_once_and_comes_back() {
        let day = Day::at_speed(SPEED_OF_A_MINUTE);
        let above: Vec<bool> = (0..24).map(|hour| day.calls_per_hour(at_hour(hour)) > 400.0).collect();
        let changes = above.windows(2).filter(|pair| pair[0] != pair[1]).count();
        assert_eq!((above[0], above[14], above[23], changes), (false, true, false, 2));
    }

    #[test]
    fn a_faster_day_has_fewer_and_larger_calls_and_costs_the_same() {
        let (slow, fast) = (Day::at_speed(SPEED_OF_A_MINUTE), Day::at_speed(3 * SPEED_OF_A_MINUTE));
        let input_an_hour = |day: Day| {
            let (input, _) = day.mean_call_size();
            f64::from(u32::try_from(input).unwrap()) * day.calls_per_hour(at_hour(12))
        };
        assert!((input_an_hour(fast) / input_an_hour(slow) - 1.0).abs() < 0.001);
        assert!(fast.calls_per_hour(at_hour(12)) * 2.9 < slow.calls_per_hour(at_hour(12)));
    }

    #[test]
    fn the_real_rate_stays_below_300_calls_a_second_at_any_speed() {
        for speed in [1_440, 2_880, 5_760, 14_400] {
            let day = Day::at_speed(speed);
            let most = (0..24).map(|hour| day.calls_per_hour(at_hour(hour))).fold(0.0, f64::max);
            assert!(most * f64::from(speed) / 3600.0 < 320.0, "speed {speed}: {most} an hour");
        }
    }
}
