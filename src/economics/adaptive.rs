//! How many replicas to hold when nobody knows what comes: layers, shadow rules, a short forecast.
//!
//! A fleet is a set of layers (see [`super::layers`]), each of which is on or off. For every layer a couple of
//! hundred rules run in the shadow: lazy capacity with many prices of a change, thresholds on smoothed gains,
//! thresholds on forecasts, the cheapest rule of a chain of forecasts. Each is charged what its
//! replica would have cost, start-up and minimum included.
//! The layer follows the rule that has lost least lately, judged by the layer's own losses and, with less
//! weight, by those on all layers, and changes only when another leads by the price of a start. The rule that
//! has a proof begins with a lead: what a few minutes say about two hundred rules is mostly luck.
//!
//! Forecasts are linear regressions learnt online. They earn their place like every other rule: where they are
//! no better than the simple rules, the simple rules are followed.
//!
//! Guards: nothing is started while a full replica would not earn its rent (`kappa < 1`). While that is so of the day's
//! traffic, the replicas may cost a start more than they save, and are given up when they do. Nor may they have cost more
//! than a start for each day since the beginning, unless the traffic was worth clearly more than the rent. Minimums are
//! honoured, and never more is wanted than the pool may hold. All quantities are in rents of a slot; money is
//! counted elsewhere.
//!
//! All this is about rent that is due while a replica runs. What is paid anyway is held, and what is paid by use is
//! held while it is cheaper.

mod chain;
mod experts;
mod forecast;
mod history;
mod realised;

use std::time::Duration;

use super::layers::{slot_rent, slots_in};
use super::policy::{Decision, Fleet, Policy, Reason, Slot};
use super::{Billing, PoolSpec, Timestamp, break_even};
use chain::{Advice, Chain, Class};
use experts::{HALF_LIVES, Life, Rule, Shadow, Sight};
use forecast::{FEATURES, Features, Regression, STRETCHES};
use history::{Fading, History, Rhythm, rate};
use realised::Realised;

/// Losses are halved in this time.
const LOSS_HALF_LIFE: Duration = Duration::from_hours(48);

/// What the regressions and the chain have learnt is halved in this time.
const FORECAST_HALF_LIFE: Duration = Duration::from_hours(96);

/// Weight of the losses on all layers beside the layer's own.
const SHARED: f64 = 0.3;

/// Lead of the first rule, in prices of a start. It fades with the losses.
const HEAD_START: f64 = 3.0;

/// The chain is solved again after so many units.
const SOLVE_EVERY: usize = 30;

/// Edges of the lags that the forecast sees, in fifths of a start-up.
const LAGS: [usize; 12] = [0, 1, 2, 4, 7, 11, 16, 22, 30, 45, 60, 90];

/// Half-lives of the long means of a layer, and of the volume, in fifths of a start-up.
const LONG_HALF_LIVES: [f64; 2] = [240.0, 1440.0];
const VOLUME_HALF_LIVES: [f64; 3] = [2.0, 8.0, 30.0];

/// Half-life of the ratio that tells whether a full replica would pay, in fifths of a start-up.
const KAPPA_HALF_LIFE: f64 = 60.0;

/// Half-life of the same ratio, and of what was lost, by which a fleet is given up.
const DAY: Duration = Duration::from_hours(24);

/// Traffic that is worth more than so many times the rent of its work may be tried at the risk of the difference.
const CLEARLY: f64 = 1.5;

/// The policy `adaptive`.
#[derive(Debug)]
pub struct Adaptive {
    slot: Duration,
    traffic: Traffic,
    state: Option<State>,
}

impl Adaptive {
    /// A policy that is asked once a slot of that length.
    pub fn new(slot: Duration) -> Self {
        Self { slot: slot.max(Duration::from_millis(1)), traffic: Traffic::default(), state: None }
    }
}

impl Policy for Adaptive {
    fn name(&self) -> &'static str {
        "adaptive"
    }

    fn decide(&mut self, pool: &PoolSpec, at: Timestamp, finished: &Slot, fleet: Fleet) -> Decision {
        let slot = self.slot;
        let scales = Scales::new(pool, slot);
        self.traffic.see(pool, slot, finished, scales);
        let target = match pool.billing {
            Billing::Committed => pool.max_replicas,
            Billing::PerUse if self.traffic.pays() => self.traffic.fills(),
            Billing::PerUse => 0,
            Billing::WhileRunning => {
                let state = self.state.get_or_insert_with(|| State::new(scales, slot));
                state.fit(scales, pool.max_replicas as usize, slot);
                state.learn(pool, slot, at, finished, &self.traffic.volume);
                state.target(&self.traffic, fleet, slot)
            }
        };
        Decision::hold(target.min(pool.max_replicas), Reason::Cheapest)
    }
}

/// The traffic of late, whatever is held.
#[derive(Debug, Default)]
struct Traffic {
    /// The volume in replicas.
    volume: [Fading; VOLUME_HALF_LIVES.len()],
    /// The most of it, halved in a day.
    busiest: f64,
    of_late: Worth,
    of_the_day: Worth,
    /// Slots since the beginning.
    slots: u32,
    /// What the traffic since then was worth beyond [`CLEARLY`] the rent of its work, in rents of a slot.
    clear_worth: f64,
}

/// What traffic is worth beside the rent of its work.
#[derive(Debug, Default)]
struct Worth {
    worth: Fading,
    rent_of_work: Fading,
}

impl Worth {
    fn see(&mut self, worth: f64, rent_of_work: f64, rate: f64) {
        self.worth.see(worth, rate);
        self.rent_of_work.see(rent_of_work, rate);
    }

    /// Whether a replica that is always full would earn its rent.
    fn pays(&self) -> bool {
        self.worth.mean >= self.rent_of_work.mean
    }
}

impl Traffic {
    fn see(&mut self, pool: &PoolSpec, slot: Duration, finished: &Slot, scales: Scales) {
        let replicas = finished.work.as_replica_seconds_f64() / slot.as_secs_f64();
        for (mean, half_life) in self.volume.iter_mut().zip(VOLUME_HALF_LIVES) {
            mean.see(replicas, scales.rate(half_life));
        }
        let day = rate(slots_of_a_day(slot));
        self.busiest = replicas.max(self.busiest * (1.0 - day));
        let worth = finished.worth(pool).to_usd_f64();
        let rent_of_work = break_even::rent_of_work(pool, finished).to_usd_f64();
        self.of_late.see(worth, rent_of_work, scales.rate(KAPPA_HALF_LIFE));
        self.of_the_day.see(worth, rent_of_work, day);
        self.slots += 1;
        self.clear_worth += (worth - CLEARLY * rent_of_work) / slot_rent(pool, slot);
    }

    fn pays(&self) -> bool {
        self.of_late.pays()
    }

    /// What replicas may have lost by now, in rents of a slot: a start for each day that has begun, and what the traffic
    /// was clearly worth.
    fn may_be_lost(&self, price_of_a_start: f64, slot: Duration) -> f64 {
        let days = (f64::from(self.slots) / slots_of_a_day(slot)).ceil();
        days * price_of_a_start + self.clear_worth.max(0.0)
    }

    /// Replicas that the volume fills at its busiest.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "`as` saturates")]
    fn fills(&self) -> u32 {
        self.busiest.ceil() as u32
    }
}

/// Times of a pool in slots.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Scales {
    startup: u32,
    minimum: u32,
    /// Slots of a fifth of a start-up, at least one.
    unit: usize,
    /// Slots of a stretch that is forecast.
    stretch: usize,
}

impl Scales {
    fn new(pool: &PoolSpec, slot: Duration) -> Self {
        let startup = slots_in(pool.startup, slot);
        Self {
            startup,
            minimum: slots_in(pool.minimum, slot),
            unit: (startup as usize).div_ceil(5).max(1),
            stretch: (startup as usize).max(1),
        }
    }

    fn life(self) -> Life {
        Life { startup: self.startup, minimum: self.minimum }
    }

    /// The price of a start-up, and of a change of rule.
    fn price_of_a_change(self) -> f64 {
        f64::from(self.startup.max(1))
    }

    /// What a replica costs at least once it is ordered, in rents of a slot.
    fn price_of_a_start(self) -> f64 {
        f64::from(self.life().committed().max(1))
    }

    /// A rate whose half-life is given in units.
    #[expect(clippy::cast_precision_loss, reason = "a few slots")]
    fn rate(self, half_life: f64) -> f64 {
        rate(half_life * self.unit as f64)
    }

    /// Slots from the first that is forecast to the last.
    fn reach(self) -> usize {
        4 * self.stretch
    }

    /// Slots that a layer remembers one by one.
    fn memory(self) -> usize {
        (LAGS[LAGS.len() - 1] * self.unit).max(self.reach())
    }
}

#[derive(Debug)]
struct State {
    scales: Scales,
    rules: Vec<Rule>,
    layers: Vec<Layer>,
    regression: Regression,
    chain: Chain,
    slots_seen: usize,
    /// Losses of each rule on all layers.
    shared: Vec<f64>,
    realised: Realised,
    keep_realised: f64,
    keep_loss: f64,
    /// What a slot leaves of what the regressions and the chain have learnt.
    keep_learnt: f64,
}

#[derive(Debug)]
struct Layer {
    history: History,
    means: [Fading; HALF_LIVES.len()],
    long_means: [Fading; LONG_HALF_LIVES.len()],
    hour: Rhythm,
    day: Rhythm,
    week: Rhythm,
    /// Features of the last slots, in a ring: what was known then about what has come since.
    known: Vec<Features>,
    /// Classes of the forecasts of the last unit, in a ring; none before they were made.
    classes: Vec<Option<Class>>,
    seen: usize,
    /// Until a layer has earned something it is asleep: it teaches nothing, counts nowhere and is not held, so that
    /// no decision depends on how many more replicas there might be.
    has_earned: bool,
    shadows: Vec<Shadow>,
    pick: usize,
}

impl State {
    fn new(scales: Scales, slot: Duration) -> Self {
        let rules = experts::rules();
        let keep = |half_life: Duration| (-slot.as_secs_f64() / half_life.as_secs_f64()).exp2();
        let mut belief = [0.0; FEATURES];
        belief[..4].copy_from_slice(&[0.4, 0.2, 0.2, 0.2]);
        Self {
            scales,
            layers: Vec::new(),
            shared: handicaps(&rules, scales),
            rules,
            regression: Regression::new(belief),
            chain: Chain::new(),
            slots_seen: 0,
            realised: Realised::default(),
            keep_realised: keep(DAY),
            keep_loss: keep(LOSS_HALF_LIFE),
            keep_learnt: keep(FORECAST_HALF_LIFE),
        }
    }

    /// Follows a pool whose start-up was measured anew, or that may hold more replicas than before. What was
    /// learnt is in rents and shares, so it stays; only memories that are cut into units are cut anew.
    fn fit(&mut self, scales: Scales, layers: usize, slot: Duration) {
        let has_other_units = (scales.unit, scales.stretch) != (self.scales.unit, self.scales.stretch);
        self.scales = scales;
        if has_other_units {
            self.layers.iter_mut().for_each(|layer| layer.cut_anew(scales));
        }
        if self.layers.len() != layers {
            let first = experts::first_rule(&self.rules);
            let handicaps = handicaps(&self.rules, scales);
            self.layers.resize_with(layers, || Layer::new(scales, slot, &handicaps, first));
        }
    }

    /// Learns a finished slot that ended at `at`, and lets every rule decide for the next.
    fn learn(&mut self, pool: &PoolSpec, slot: Duration, at: Timestamp, finished: &Slot, volume: &[Fading]) {
        let scales = self.scales;
        self.realised.pass(finished.gains_in_rents(pool, slot), scales.life(), self.keep_realised);
        let began = at.saturating_sub(slot);
        self.shared.iter_mut().for_each(|loss| *loss *= self.keep_loss);
        let keep_lesson = self.keep_lesson();
        for (index, gain) in finished.gains_in_rents(pool, slot).enumerate() {
            let layer = &mut self.layers[index];
            layer.charge(gain, scales.life(), self.keep_loss, &mut self.shared);
            layer.see(gain, began, scales);
            layer.teach(&mut self.regression, scales, keep_lesson);
            let features = layer.features(at, scales, index, volume);
            let forecast = self.regression.forecast(&features);
            let advice = layer.count(&mut self.chain, forecast, scales);
            layer.remember(features);
            layer.decide(&self.rules, gain, forecast, advice, scales.life());
        }
        self.improve_chain();
        for layer in &mut self.layers {
            layer.choose(&self.shared, scales.price_of_a_change());
        }
    }

    /// Forgetting of one lesson, so that a slot's lessons together forget what a slot should, however many teach.
    #[expect(clippy::cast_precision_loss, reason = "the number of layers is small")]
    fn keep_lesson(&self) -> f64 {
        let teachers = self.layers.iter().filter(|layer| layer.lesson(self.scales).is_some()).count();
        self.keep_learnt.powf(1.0 / teachers.max(1) as f64)
    }

    fn improve_chain(&mut self) {
        let Scales { startup, unit, .. } = self.scales;
        self.chain.fade(self.keep_learnt);
        self.slots_seen += 1;
        if self.slots_seen.is_multiple_of(SOLVE_EVERY * unit) {
            self.chain.solve((startup as usize).div_ceil(unit));
        }
    }

    /// Layers whose rule wants a replica.
    fn wanted(&self) -> u32 {
        let wants = |layer: &&Layer| layer.has_earned && layer.shadows[layer.pick].wants();
        let wanted = self.layers.iter().filter(wants).count();
        u32::try_from(wanted).expect("at most `max_replicas` layers")
    }

    /// As many replicas as may be held if one start-up may be lost of late, and what was saved besides.
    fn replicas_at_the_price_of_a_start(&self) -> u32 {
        let starts_left = 1.0 - self.realised.of_late() / self.scales.price_of_a_change();
        self.held_and(if starts_left < 0.0 { starts_left } else { starts_left.round() })
    }

    /// As many replicas as may be held if so much may be lost since the beginning.
    fn replicas_at_the_price_of(&self, loss: f64) -> u32 {
        let left = loss - self.realised.at_stake(self.scales.life());
        self.held_and((left / self.scales.price_of_a_start()).floor())
    }

    /// The replicas that are held and so many more; none if there is a start too many.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "`as` saturates")]
    fn held_and(&self, starts: f64) -> u32 {
        if starts < 0.0 { 0 } else { self.realised.held().saturating_add(starts as u32) }
    }

    /// What is wanted, within the guards.
    fn target(&mut self, traffic: &Traffic, fleet: Fleet, slot: Duration) -> u32 {
        let held = fleet.starting + fleet.ready;
        let mut target = self.wanted();
        if !traffic.pays() {
            target = target.min(held);
        }
        if !traffic.of_the_day.pays() {
            target = target.min(self.replicas_at_the_price_of_a_start());
        }
        let may_be_lost = traffic.may_be_lost(self.scales.price_of_a_start(), slot);
        target = target.min(self.replicas_at_the_price_of(may_be_lost));
        self.realised.hold(target, self.scales.life());
        target
    }
}

impl Layer {
    fn new(scales: Scales, slot: Duration, handicaps: &[f64], first: usize) -> Self {
        Self {
            history: History::new(scales.memory()),
            means: [Fading::default(); HALF_LIVES.len()],
            long_means: [Fading::default(); LONG_HALF_LIVES.len()],
            hour: Rhythm::new(Duration::from_hours(1), slot, 0.25),
            day: Rhythm::new(Duration::from_hours(24), slot, 0.4),
            week: Rhythm::new(Duration::from_hours(7 * 24), slot, 0.7),
            known: vec![[0.0; FEATURES]; scales.reach() + 1],
            classes: vec![None; scales.unit],
            seen: 0,
            has_earned: false,
            shadows: handicaps.iter().map(|loss| Shadow::losing(*loss)).collect(),
            pick: first,
        }
    }

    /// Other units: the gains that are remembered stay, what was known in the old units teaches nothing.
    fn cut_anew(&mut self, scales: Scales) {
        self.history.resize(scales.memory());
        self.known = vec![[0.0; FEATURES]; scales.reach() + 1];
        self.classes = vec![None; scales.unit];
    }

    fn charge(&mut self, gain: f64, life: Life, keep: f64, shared: &mut [f64]) {
        self.has_earned |= gain > 0.0;
        for (shadow, shared) in self.shadows.iter_mut().zip(shared) {
            let charge = shadow.charge(gain, life, keep);
            *shared += if self.has_earned { charge } else { 0.0 };
        }
    }

    fn see(&mut self, gain: f64, began: Timestamp, scales: Scales) {
        self.history.push(gain);
        for (mean, half_life) in self.means.iter_mut().zip(HALF_LIVES) {
            mean.see(gain, scales.rate(half_life));
        }
        for (mean, half_life) in self.long_means.iter_mut().zip(LONG_HALF_LIVES) {
            mean.see(gain, scales.rate(half_life));
        }
        self.hour.see(began, gain);
        self.day.see(began, gain);
        self.week.see(began, gain);
    }

    /// What was known `reach` slots ago; none while the layer is asleep.
    fn lesson(&self, scales: Scales) -> Option<&Features> {
        let then = self.seen.checked_sub(scales.reach())?;
        self.has_earned.then(|| &self.known[then % self.known.len()])
    }

    /// Shows the regression what came after what was known `reach` slots ago.
    fn teach(&self, regression: &mut Regression, scales: Scales, keep: f64) {
        let Some(known) = self.lesson(scales) else { return };
        let reach = scales.reach();
        let came = stretches(scales).map(|(from, to)| self.history.mean(reach - to, reach - from));
        regression.learn(known, came, keep);
    }

    fn features(&self, at: Timestamp, scales: Scales, index: usize, volume: &[Fading]) -> Features {
        let (unit, stretch) = (scales.unit, scales.stretch);
        let long = self.long_means[0].mean;
        let mut features = [0.0; FEATURES];
        let mut place = features.iter_mut();
        let mut put = |value: f64| *place.next().expect("as many as are put") = value;
        for lags in LAGS.windows(2) {
            put(self.history.mean(lags[0] * unit, lags[1] * unit));
        }
        for mean in &self.long_means {
            put(mean.mean);
        }
        for ahead in stretches(scales) {
            put(self.hour.mean(at, ahead, long));
            put(self.day.mean(at, ahead, long));
        }
        let today = self.day.mean(at, (0, 2 * stretch), long);
        put(self.week.mean(at, (stretch, 3 * stretch), today));
        put(self.day.mean_before(at, 10 * unit, long));
        put(self.hour.mean_before(at, 6 * unit, long));
        #[expect(clippy::cast_precision_loss, reason = "the number of layers is small")]
        let below = index as f64;
        for replicas in volume {
            put(2.0 * (replicas.mean - below).clamp(0.0, 1.0));
        }
        put(0.3);
        features
    }

    /// Shows the chain the change of class in the last unit, and asks it what is best now.
    fn count(&mut self, chain: &mut Chain, forecast: [f64; STRETCHES], scales: Scales) -> Advice {
        let [near, next, _] = forecast;
        let class = Class::of(near, next);
        let place = self.seen % self.classes.len();
        if let Some(before) = self.classes[place].filter(|_| self.has_earned) {
            chain.learn(before, class, self.history.mean(0, scales.unit));
        }
        self.classes[place] = Some(class);
        chain.advice(class)
    }

    fn remember(&mut self, features: Features) {
        let place = self.seen % self.known.len();
        self.known[place] = features;
        self.seen += 1;
    }

    fn decide(&mut self, rules: &[Rule], gain: f64, forecast: [f64; STRETCHES], advice: Advice, life: Life) {
        let sight = Sight { gain, means: self.means.map(|mean| mean.mean), forecast, advice };
        for (shadow, rule) in self.shadows.iter_mut().zip(rules) {
            shadow.decide(*rule, &sight, life);
        }
    }

    /// Changes to the rule that has lost least when it leads by the price of a change.
    fn choose(&mut self, shared: &[f64], price_of_a_change: f64) {
        let score = |index: usize| self.shadows[index].loss * (1.0 - SHARED) + shared[index] * SHARED;
        let best = (0..self.shadows.len()).min_by(|a, b| score(*a).total_cmp(&score(*b)));
        if let Some(best) = best.filter(|best| score(*best) + price_of_a_change < score(self.pick)) {
            self.pick = best;
        }
    }
}

/// What each rule has lost before anything was seen.
fn handicaps(rules: &[Rule], scales: Scales) -> Vec<f64> {
    let first = experts::first_rule(rules);
    let of_others = HEAD_START * scales.price_of_a_change();
    (0..rules.len()).map(|rule| if rule == first { 0.0 } else { of_others }).collect()
}

fn slots_of_a_day(slot: Duration) -> f64 {
    DAY.as_secs_f64() / slot.as_secs_f64()
}

/// Slots ahead that are forecast.
fn stretches(scales: Scales) -> [(usize, usize); STRETCHES] {
    let stretch = scales.stretch;
    [(0, stretch), (stretch, 2 * stretch), (2 * stretch, 4 * stretch)]
}

#[cfg(test)]
mod tests {
    use super::super::catalog::Work;
    use super::super::money::NanoUsd;
    use super::*;

    const MINUTE: Duration = Duration::from_mins(1);

    fn pool() -> PoolSpec {
        let hourly = NanoUsd::from_nanos(3_000_000_000);
        PoolSpec { hourly, max_replicas: 8, ..PoolSpec::small_model_on_an_h100() }
    }

    /// A slot that fills so many hundredths of a replica, at an API bill of five rents a replica.
    fn filling(hundredths: u32) -> Slot {
        Slot {
            api_cost: NanoUsd::from_nanos(i64::from(hundredths) * 2_500_000),
            work: Work(u64::from(hundredths) * 600_000),
            requests: 1,
            tokens: 1,
        }
    }

    /// A policy at work, and the fleet that does as it says.
    struct Run {
        policy: Adaptive,
        at: Timestamp,
        held: u32,
    }

    impl Run {
        fn new() -> Self {
            Self { policy: Adaptive::new(MINUTE), at: Timestamp::ZERO, held: 0 }
        }

        fn pass(&mut self, pool: &PoolSpec, finished: &Slot) -> u32 {
            let fleet = Fleet { starting: 0, ready: self.held };
            self.held = self.policy.decide(pool, self.at, finished, fleet).target_replicas;
            self.at = self.at + MINUTE;
            self.held
        }
    }

    #[test]
    fn a_start_up_that_is_measured_anew_lets_the_fleet_go_on() {
        let mut run = Run::new();
        let mut pool = pool();
        (0..180).for_each(|_| _ = run.pass(&pool, &filling(270)));
        for minutes in [9, 4, 30, 1] {
            pool.startup = MINUTE * minutes;
            let held: Vec<_> = (0..90).map(|_| run.pass(&pool, &filling(270))).collect();
            assert_eq!(held, [3; 90], "after a start-up of {minutes} minutes was measured");
        }
    }

    #[test]
    fn replicas_that_are_never_filled_change_no_decision() {
        let (mut few, mut many) = (Run::new(), Run::new());
        let (least, most) = (PoolSpec { max_replicas: 2, ..pool() }, pool());
        let mut random = 1_u32;
        for slot in 0..4000 {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let is_busy = slot / 40 % 3 == 1;
            let finished = filling(if is_busy { random >> 25 } else { 0 });
            assert_eq!(few.pass(&least, &finished), many.pass(&most, &finished), "slot {slot}");
        }
    }
}
