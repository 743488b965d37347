//! What follows a forecast, counted: a Markov chain over classes of forecasts, and the cheapest rule on it.
//!
//! A forecast says the mean, and a start pays by the odds. So the forecasts of the next start-up and of the one
//! after it are put into classes, the changes from class to class are counted on all layers together, with
//! forgetting, and value iteration finds when a replica should be started and kept if changes went on that way.
//! With `P` the counted odds, `g` the mean gain of a class over a step, `D` the steps of a start-up and `γ` a
//! discount, the costs to come are
//!
//! ```text
//! off = min( start, g + γ P off )        start = D + G + γᴰ Pᴰ on,  G the gains missed in D steps
//! on  = min( off, 1 + γ P on )
//! ```
//!
//! (with `D` and `G` discounted in the same way). A step is one unit, a fifth of a start-up, so that the work is
//! the same for slots of any length. Costs are in rents of a step.

use super::history::rate;

/// Lower edges of the classes of one forecast but the first, in rents.
const EDGES: [f64; 12] = [0.05, 0.2, 0.4, 0.55, 0.7, 0.85, 1.0, 1.15, 1.35, 1.6, 2.0, 2.7];

const CLASSES_OF_ONE: usize = EDGES.len() + 1;
const CLASSES: usize = CLASSES_OF_ONE * CLASSES_OF_ONE;

/// Costs to come count half after so many steps.
const HORIZON: f64 = 120.0;

/// Rounds of value iteration each time; the next time goes on where this one ended.
const ROUNDS: usize = 10;

/// Counts are scaled back when the weight of the newest has grown to this.
const LARGEST_WEIGHT: f64 = 1e6;

/// A pair of forecasts, coarsely.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Class(u8);

impl Class {
    pub(super) fn of(near: f64, next: f64) -> Self {
        let class = |forecast: f64| EDGES.iter().take_while(|edge| forecast >= **edge).count();
        let index = class(near) * CLASSES_OF_ONE + class(next);
        Self(u8::try_from(index).expect("there are 169 classes"))
    }

    fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// What the chain holds to be cheapest in a class.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Advice {
    pub start: bool,
    pub keep: bool,
}

/// Costs to come of each class.
type Values = Vec<f64>;

#[derive(Debug, Clone)]
pub(super) struct Chain {
    /// Weighted counts of the changes from each class.
    changes: Vec<[f32; CLASSES]>,
    /// Weighted sums of the gains in the step after each class.
    gains: Values,
    /// Weight of what is counted next; the past fades because this grows.
    weight: f64,
    on: Values,
    off: Values,
    advice: Vec<Advice>,
}

impl Chain {
    pub(super) fn new() -> Self {
        Self {
            changes: vec![[0.0; CLASSES]; CLASSES],
            gains: vec![0.0; CLASSES],
            weight: 1.0,
            on: vec![0.0; CLASSES],
            off: vec![0.0; CLASSES],
            advice: vec![Advice::default(); CLASSES],
        }
    }

    pub(super) fn advice(&self, class: Class) -> Advice {
        self.advice[class.index()]
    }

    /// Counts a change of class in one step, and its mean gain.
    #[expect(clippy::cast_possible_truncation, reason = "a count needs no more than that")]
    pub(super) fn learn(&mut self, from: Class, to: Class, gain: f64) {
        self.changes[from.index()][to.index()] += self.weight as f32;
        self.gains[from.index()] += self.weight * gain;
    }

    /// What was counted keeps the share `keep` of its weight.
    #[expect(clippy::cast_possible_truncation, reason = "a count needs no more than that")]
    pub(super) fn fade(&mut self, keep: f64) {
        self.weight /= keep;
        if self.weight > LARGEST_WEIGHT {
            let scale = 1.0 / self.weight;
            self.changes.iter_mut().flatten().for_each(|count| *count *= scale as f32);
            self.gains.iter_mut().for_each(|sum| *sum *= scale);
            self.weight = 1.0;
        }
    }

    /// Improves the advice by what has been counted; a start takes `startup` steps.
    pub(super) fn solve(&mut self, startup: usize) {
        let odds = Odds::of(&self.changes);
        let mean = |(sum, visits): (&f64, &f64)| if *visits > 0.0 { sum / visits } else { 0.0 };
        let gains: Values = self.gains.iter().zip(&odds.visits).map(mean).collect();
        let (mut missed, mut rent) = (vec![0.0; CLASSES], 0.0);
        for _ in 0..startup {
            missed = odds.after(&missed).iter().zip(&gains).map(|(later, gain)| gain + later).collect();
            rent = 1.0 + odds.discount * rent;
        }
        for _ in 0..ROUNDS {
            let stay = odds.after(&self.off);
            let hold: Values = odds.after(&self.on).iter().map(|later| 1.0 + later).collect();
            // A replica that is there at once is held for a step.
            let mut ready = if startup == 0 { hold.clone() } else { self.on.clone() };
            for _ in 0..startup {
                ready = odds.after(&ready);
            }
            for class in 0..CLASSES {
                let start = rent + missed[class] + ready[class];
                let idle = gains[class] + stay[class];
                self.off[class] = start.min(idle);
                self.on[class] = hold[class].min(self.off[class]);
                self.advice[class] = Advice { start: start < idle, keep: hold[class] <= self.off[class] };
            }
        }
    }
}

/// The odds of the class after a step, without the many that are nil.
#[derive(Debug)]
struct Odds {
    rows: Vec<Vec<(Class, f64)>>,
    visits: Values,
    discount: f64,
}

impl Odds {
    /// A class that was never left is expected to last.
    fn of(changes: &[[f32; CLASSES]]) -> Self {
        let visits: Values =
            changes.iter().map(|row| row.iter().map(|count| f64::from(*count)).sum()).collect();
        let classes = || (0..=u8::MAX).map(Class);
        let row = |((row, visits), own): ((&[f32; CLASSES], &f64), Class)| {
            if *visits == 0.0 {
                return vec![(own, 1.0)];
            }
            let seen = classes().zip(row).filter(|(_, count)| **count > 0.0);
            seen.map(|(class, count)| (class, f64::from(*count) / visits)).collect()
        };
        let rows = changes.iter().zip(&visits).zip(classes()).map(row).collect();
        Self { rows, visits, discount: 1.0 - rate(HORIZON) }
    }

    /// Discounted expectation of what comes a step later.
    fn after(&self, values: &[f64]) -> Values {
        let expected = |row: &[(Class, f64)]| -> f64 {
            row.iter().map(|(class, odds)| odds * values[class.index()]).sum()
        };
        self.rows.iter().map(|row| self.discount * expected(row.as_slice())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A chain that has seen phases of `on` and `off` steps, forecast only once they have begun, at a gain of 3.
    fn phases(on: usize, off: usize, startup: usize) -> Chain {
        let mut chain = Chain::new();
        let (busy, idle) = (Class::of(3.0, 3.0), Class::of(0.0, 0.0));
        for _ in 0..40 {
            (1..on).for_each(|_| chain.learn(busy, busy, 3.0));
            chain.learn(busy, idle, 3.0);
            (1..off).for_each(|_| chain.learn(idle, idle, 0.0));
            chain.learn(idle, busy, 0.0);
        }
        (0..40).for_each(|_| chain.solve(startup));
        chain
    }

    fn check(chain: &Chain, busy: Advice, idle: Advice) {
        assert_eq!(chain.advice(Class::of(3.0, 3.0)), busy);
        assert_eq!(chain.advice(Class::of(0.0, 0.0)), idle);
    }

    const YES: Advice = Advice { start: true, keep: true };
    const NO: Advice = Advice { start: false, keep: false };
    const ONLY_KEEP: Advice = Advice { start: false, keep: true };

    #[test]
    fn long_phases_are_followed() {
        check(&phases(60, 60, 5), YES, NO);
        check(&phases(60, 60, 0), YES, NO);
    }

    #[test]
    fn a_short_pause_is_held_through() {
        check(&phases(30, 4, 5), YES, YES);
    }

    #[test]
    fn a_burst_shorter_than_a_start_is_left_to_the_api() {
        check(&phases(2, 60, 5), ONLY_KEEP, NO);
    }

    #[test]
    fn a_chain_that_has_seen_nothing_starts_nothing() {
        let mut chain = Chain::new();
        chain.solve(5);
        check(&chain, NO, NO);
    }

    #[test]
    fn what_is_long_ago_is_forgotten() {
        let mut chain = phases(60, 60, 5);
        (0..2000).for_each(|_| chain.fade(0.98));
        let (busy, idle) = (Class::of(3.0, 3.0), Class::of(0.0, 0.0));
        for _ in 0..100 {
            chain.learn(busy, idle, 3.0);
            chain.learn(idle, idle, 0.0);
        }
        chain.learn(idle, busy, 0.0);
        (0..40).for_each(|_| chain.solve(5));
        check(&chain, ONLY_KEEP, NO);
    }
}
