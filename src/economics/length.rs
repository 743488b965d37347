//! How long an answer will be, guessed before it is written.
//!
//! Per route, finished answers are sorted by the `max_tokens` that was asked for (an octave each, and one
//! class for none) and averaged with a fading memory; the guess is the average of the class, pulled towards
//! the route's while the class is young, and never above `max_tokens`. The estimator keeps its own error.

/// Classes of `max_tokens`: none, then octaves up to 2³⁰.
const CLASSES: usize = 32;

/// A mean forgets half of what it knew in this many answers.
const HALF_LIFE_ANSWERS: f64 = 500.0;

/// Answers a class needs to be trusted as much as the route's average.
const TRUST: f64 = 10.0;

/// Guess for a route that has seen nothing.
const FIRST_GUESS: f64 = 256.0;

#[derive(Debug, Clone, Copy, Default)]
struct FadingMean {
    sum: f64,
    weight: f64,
}

impl FadingMean {
    fn add(&mut self, value: f64) {
        let keep = (-1.0 / HALF_LIFE_ANSWERS).exp2();
        self.sum = self.sum * keep + value;
        self.weight = self.weight * keep + 1.0;
    }

    /// The mean, as if `trust` answers of `prior` had been seen before.
    fn towards(&self, prior: f64, trust: f64) -> f64 {
        (self.sum + prior * trust) / (self.weight + trust)
    }
}

/// The lengths of one route's answers.
#[derive(Debug, Clone, Default)]
pub struct OutputLength {
    all: FadingMean,
    classes: [FadingMean; CLASSES],
    error: FadingMean,
    absolute_error: FadingMean,
}

/// How far the guesses were off, in tokens, over the last answers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LengthError {
    /// Positive when the guesses were too long.
    pub mean: f64,
    pub mean_absolute: f64,
}

impl OutputLength {
    /// Output tokens to expect of a call.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a mean of counts")]
    pub fn estimate(&self, max_tokens: Option<u64>) -> u64 {
        let route = self.all.towards(FIRST_GUESS, 1.0);
        let guess = self.classes[class(max_tokens)].towards(route, TRUST).round() as u64;
        guess.min(max_tokens.unwrap_or(u64::MAX))
    }

    /// Learns from a finished answer; the error is that of the guess it would have got now.
    #[expect(clippy::cast_precision_loss, reason = "token counts are small")]
    pub fn learn(&mut self, max_tokens: Option<u64>, output_tokens: u64) {
        let off = self.estimate(max_tokens) as f64 - output_tokens as f64;
        self.error.add(off);
        self.absolute_error.add(off.abs());
        self.all.add(output_tokens as f64);
        self.classes[class(max_tokens)].add(output_tokens as f64);
    }

    /// None before the first answer.
    pub fn error(&self) -> Option<LengthError> {
        (self.error.weight > 0.0).then(|| LengthError {
            mean: self.error.towards(0.0, 0.0),
            mean_absolute: self.absolute_error.towards(0.0, 0.0),
        })
    }
}

fn class(max_tokens: Option<u64>) -> usize {
    let octave = |max: u64| usize::try_from(max.checked_ilog2().unwrap_or(0)).unwrap_or(CLASSES);
    max_tokens.map_or(0, |max| (octave(max) + 1).min(CLASSES - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guess_never_exceeds_what_was_asked_for() {
        assert_eq!(OutputLength::default().estimate(Some(16)), 16);
        assert_eq!(OutputLength::default().estimate(None), 256);
    }

    #[test]
    fn the_length_of_a_route_is_learnt_and_the_error_shrinks() {
        let mut length = OutputLength::default();
        (0..50).for_each(|_| length.learn(None, 40));
        let early = length.error().unwrap();
        (0..2000).for_each(|_| length.learn(None, 40));
        let late = length.error().unwrap();
        assert_eq!(length.estimate(None), 40);
        assert!(late.mean_absolute < early.mean_absolute / 2.0, "{early:?} {late:?}");
    }

    #[test]
    fn calls_that_ask_for_little_are_told_from_those_that_ask_for_much() {
        let mut length = OutputLength::default();
        for _ in 0..500 {
            length.learn(Some(20), 15);
            length.learn(Some(4000), 900);
        }
        assert!(length.estimate(Some(24)) < 40 && length.estimate(Some(3000)) > 800);
    }

    #[test]
    fn nothing_seen_has_no_error() {
        assert_eq!(OutputLength::default().error(), None);
    }
}
