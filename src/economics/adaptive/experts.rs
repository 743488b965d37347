//! The rules among which a layer chooses, each with its shadow.
//!
//! A shadow is what the rule's replica would have cost: rent from the order, nothing earned during the
//! start-up, and the minimum paid to its end. Rules only see finished slots, so their losses are honest.

use super::super::lcp::LazyLayer;
use super::chain::Advice;
use super::forecast::STRETCHES;

/// What the rules of a layer look at; gains are in rents of a slot.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sight {
    /// Gain of the slot that has just finished.
    pub gain: f64,
    /// Means of the gain with the half-lives of [`HALF_LIVES`].
    pub means: [f64; HALF_LIVES.len()],
    /// Forecast means of the gain over the stretches ahead.
    pub forecast: [f64; STRETCHES],
    pub advice: Advice,
}

/// Half-lives of the means, in fifths of a start-up (at the default economy, in minutes).
pub(super) const HALF_LIVES: [f64; 9] = [0.2, 1.0, 2.0, 4.0, 8.0, 16.0, 5.0, 15.0, 60.0];

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Rule {
    /// Lazy capacity: `(a, b)`, the prices of going on and off in start-up rents.
    Lazy { up: f64, down: f64 },
    /// On above `up`, off below `down` of one mean.
    Mean { of: usize, up: f64, down: f64 },
    /// On above `up` of one mean; off when both it and the fast mean are below.
    FastDown { of: usize, up: f64, down: f64 },
    /// On when the forecast beyond the start-up is above `up`; off when the view ahead is below `down`.
    Forecast { view: View, up: f64, down: f64 },
    /// What the chain of forecasts holds to be cheapest.
    Chained,
}

/// How the stretches ahead become one number for a replica that is on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum View {
    /// The better of the first two.
    Best,
    /// The mean of the first two.
    Near,
    /// The mean of all.
    Far,
}

/// Index in [`HALF_LIVES`] of the fast mean.
const FAST: usize = 1;

/// All rules, in a fixed order.
pub(super) fn rules() -> Vec<Rule> {
    let mut rules = Vec::new();
    for up in [0.02, 0.1, 0.3, 1.0, 2.0, f64::INFINITY] {
        for down in [0.05, 0.3, 1.0, 2.0, 4.0, 12.0, f64::INFINITY] {
            rules.push(Rule::Lazy { up, down });
        }
    }
    for of in [6, 7, 8] {
        for (up, down) in [(1.0, 0.8), (1.25, 0.6), (1.0, 0.5)] {
            rules.push(Rule::Mean { of, up, down });
        }
    }
    for of in 0..6 {
        for up in [1.0, 1.4, 1.9] {
            for down in [0.2, 0.5, 0.8] {
                rules.push(Rule::FastDown { of, up, down });
            }
        }
    }
    for up in [0.8, 1.0, 1.2, 1.4, 1.6] {
        for down in [0.2, 0.4, 0.55, 0.7, 0.85, 1.0, 1.2] {
            for view in [View::Best, View::Near, View::Far] {
                rules.push(Rule::Forecast { view, up, down });
            }
        }
    }
    rules.push(Rule::Chained);
    rules
}

/// The rule that a layer follows before it knows better: lazy capacity with `a = b = 1`.
pub(super) fn first_rule(rules: &[Rule]) -> usize {
    let first = Rule::Lazy { up: 1.0, down: 1.0 };
    rules.iter().position(|rule| *rule == first).expect("it is one of the rules")
}

impl Rule {
    fn wants(self, sight: &Sight, lazy: &mut LazyLayer, on: bool, startup: f64) -> bool {
        match self {
            Self::Lazy { up, down } => {
                lazy.learn(sight.gain, up * startup, down * startup);
                lazy.is_on()
            }
            Self::Mean { of, up, down } => {
                let mean = sight.means[of];
                if on { mean >= down } else { mean > up }
            }
            Self::FastDown { of, up, down } => sight.means[of] > up || (on && sight.means[FAST] >= down),
            Self::Forecast { view, up, down } => {
                let [near, next, later] = sight.forecast;
                if !on {
                    return next > up;
                }
                let ahead = match view {
                    View::Best => near.max(next),
                    View::Near => f64::midpoint(near, next),
                    View::Far => (near + next + later) / 3.0,
                };
                ahead > down
            }
            Self::Chained => {
                if on {
                    sight.advice.keep
                } else {
                    sight.advice.start
                }
            }
        }
    }
}

/// A rule at work on a layer, and the replica that it would have.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Shadow {
    lazy: LazyLayer,
    wants: bool,
    held: bool,
    /// Slots since the order.
    age: u32,
    /// Fading sum of rent and of gains missed.
    pub loss: f64,
}

/// A replica's life in slots.
#[derive(Debug, Clone, Copy)]
pub(super) struct Life {
    pub startup: u32,
    pub minimum: u32,
}

impl Life {
    /// Slots that are paid whatever comes.
    pub(super) fn committed(self) -> u32 {
        self.startup.max(self.minimum)
    }
}

impl Shadow {
    /// A shadow that begins with a loss.
    pub(super) fn losing(loss: f64) -> Self {
        Self { loss, ..Self::default() }
    }

    pub(super) fn wants(&self) -> bool {
        self.wants
    }

    /// Charges the slot that has finished; returns the charge.
    pub(super) fn charge(&mut self, gain: f64, life: Life, keep: f64) -> f64 {
        let served = self.held && self.age >= life.startup;
        let charge = f64::from(u8::from(self.held)) + if served { 0.0 } else { gain };
        self.loss = self.loss * keep + charge;
        self.age += 1;
        charge
    }

    /// Decides for the next slot.
    pub(super) fn decide(&mut self, rule: Rule, sight: &Sight, life: Life) {
        self.wants = rule.wants(sight, &mut self.lazy, self.wants, f64::from(life.startup.max(1)));
        if self.wants && !self.held {
            (self.held, self.age) = (true, 0);
        } else if !self.wants && self.held && self.age >= life.minimum {
            self.held = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UP: Rule = Rule::Mean { of: 0, up: 1.0, down: 1.0 };

    fn sight(gain: f64) -> Sight {
        Sight {
            gain,
            means: [gain; HALF_LIVES.len()],
            forecast: [gain; STRETCHES],
            advice: Advice::default(),
        }
    }

    fn losses(life: Life, gains: &[f64]) -> Vec<f64> {
        let mut shadow = Shadow::default();
        gains
            .iter()
            .map(|gain| {
                let charge = shadow.charge(*gain, life, 1.0);
                shadow.decide(UP, &sight(*gain), life);
                charge
            })
            .collect()
    }

    #[test]
    fn a_shadow_pays_rent_and_misses_the_gain_while_it_starts() {
        let life = Life { startup: 2, minimum: 1 };
        assert_eq!(losses(life, &[3.0; 5]), [3.0, 4.0, 4.0, 1.0, 1.0]);
    }

    #[test]
    fn a_shadow_pays_its_minimum() {
        let life = Life { startup: 0, minimum: 3 };
        assert_eq!(losses(life, &[3.0, 0.0, 0.0, 0.0, 0.0]), [3.0, 1.0, 1.0, 1.0, 0.0]);
    }

    #[test]
    fn the_first_rule_is_lazy_capacity() {
        assert!(matches!(rules()[first_rule(&rules())], Rule::Lazy { .. }));
    }
}
