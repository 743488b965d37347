//! Replays demand in virtual time through the very policies that run live.
//!
//! A trace becomes a [`Tally`] of what its traffic costs and takes, a slot each; scaled, it is the [`Demand`]
//! that [`engine`] serves under a policy, and [`hindsight`] prices for somebody who knew it all.

pub mod engine;
pub mod fleet;
pub mod hindsight;
pub mod trace;

use std::time::Duration;

use trace::TraceError;

use crate::economics::layers::slots_in;
use crate::economics::time::millis;
use crate::economics::{Capacity, NanoUsd, PoolSpec, PriceCard, Slot, Tier, Usage, Work, break_even};

/// Slots of one trace at most, nearly four years of minutes: a wrong arrival must not eat memory and hours.
pub const MOST_SLOTS: usize = 2_000_000;

/// Bills and work of a trace, in replica-seconds, beyond these are refused: half of what their integers can hold, or
/// less.
pub const LARGEST_BILL_USD: f64 = 4e9;
pub const LARGEST_WORK_SECONDS: f64 = 4e12;

/// The slots of a trace while it is read.
#[derive(Debug, Clone)]
pub struct Tally {
    slot: Duration,
    slots: Vec<Slot>,
    startups: Vec<(usize, Duration)>,
    /// Dollars and replica-seconds so far.
    bill: f64,
    work: f64,
}

impl Tally {
    /// An empty tally with slots of that length, at least a millisecond.
    pub fn new(slot: Duration) -> Self {
        Self {
            slot: slot.max(Duration::from_millis(1)),
            slots: Vec::new(),
            startups: Vec::new(),
            bill: 0.0,
            work: 0.0,
        }
    }

    /// Length of a slot.
    pub fn slot(&self) -> Duration {
        self.slot
    }

    /// Adds what arrived so long after the start of the trace.
    pub fn add(&mut self, arrival: Duration, seen: Slot) -> Result<(), TraceError> {
        let index = self.index(arrival);
        if index >= MOST_SLOTS {
            return Err(TraceError::TooLong { arrival });
        }
        self.bill += seen.api_cost.to_usd_f64();
        self.work += seen.work.as_replica_seconds_f64();
        if !(self.bill < LARGEST_BILL_USD && self.work < LARGEST_WORK_SECONDS) {
            return Err(TraceError::TooLarge);
        }
        if self.slots.len() <= index {
            self.slots.resize(index + 1, Slot::default());
        }
        self.slots[index] += seen;
        Ok(())
    }

    /// Notes that replicas were known to take `startup` to start, from so long after the start of the trace on.
    pub fn note_startup(&mut self, since: Duration, startup: Duration) {
        self.startups.push((self.index(since), startup));
    }

    fn index(&self, since: Duration) -> usize {
        usize::try_from(since.as_millis() / self.slot.as_millis()).unwrap_or(usize::MAX)
    }

    /// The demand of a horizon (by default the trace's own), every sum times `scale`.
    pub fn demand(&self, scale: f64, horizon: Option<Duration>) -> Demand {
        let count = horizon.map_or(self.slots.len(), |horizon| slots_in(horizon, self.slot) as usize);
        let count = count.min(MOST_SLOTS);
        let kept = || self.slots.iter().take(count);
        let mut arrivals: Vec<u64> = kept().map(|slot| slot.requests).collect();
        arrivals.resize(count, 0);
        let mut scaled = Scaled { scale, ..Scaled::default() };
        let mut slots: Vec<Slot> = kept().map(|slot| scaled.next(slot)).collect();
        slots.resize(count, Slot::default());
        Demand { slot: self.slot, slots, arrivals, startups: self.startups.clone() }
    }

    /// The scale at which the mean API bill is `rho` times the rent of one replica; none for a free trace.
    pub fn scale_for(&self, rho: f64, pool: &PoolSpec, horizon: Option<Duration>) -> Option<f64> {
        let unscaled = self.demand(1.0, horizon).rho(pool)?;
        (unscaled > 0.0).then(|| rho / unscaled)
    }
}

/// What a call, or the sum of several, costs on the API and takes of a replica.
pub fn priced(card: &PriceCard, capacity: &Capacity, usage: &Usage, requests: u64) -> Slot {
    if requests > 1 {
        return priced_sum(card, capacity, usage, requests);
    }
    demand_of(card.cost(usage, Tier::Standard), capacity, usage, requests)
}

/// The sum of calls of which nobody knows how many there were. It is no long context, however long.
pub fn priced_sum(card: &PriceCard, capacity: &Capacity, usage: &Usage, requests: u64) -> Slot {
    demand_of(card.standard.cost(usage), capacity, usage, requests)
}

fn demand_of(api_cost: NanoUsd, capacity: &Capacity, usage: &Usage, requests: u64) -> Slot {
    Slot { api_cost, work: capacity.work(usage), requests, tokens: usage.total_tokens() }
}

/// Slots times a scale. Counts are rounded as a running total, so that slots of a single request add up.
#[derive(Debug, Default)]
struct Scaled {
    scale: f64,
    requests: (u64, u64),
    tokens: (u64, u64),
}

impl Scaled {
    fn next(&mut self, slot: &Slot) -> Slot {
        Slot {
            api_cost: NanoUsd::from_nanos(times_signed(slot.api_cost.as_nanos(), self.scale)),
            work: Work(times(slot.work.0, self.scale)),
            requests: running(&mut self.requests, slot.requests, self.scale),
            tokens: running(&mut self.tokens, slot.tokens, self.scale),
        }
    }
}

fn running(totals: &mut (u64, u64), count: u64, scale: f64) -> u64 {
    let (seen, given) = *totals;
    let total = times(seen + count, scale);
    *totals = (seen + count, total);
    total - given
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "`as` saturates; a scale is positive"
)]
#[expect(clippy::cast_precision_loss, reason = "a scale is no exact number")]
fn times(amount: u64, scale: f64) -> u64 {
    (amount as f64 * scale).round() as u64
}

#[expect(clippy::cast_possible_truncation, reason = "`as` saturates")]
#[expect(clippy::cast_precision_loss, reason = "a scale is no exact number")]
fn times_signed(amount: i64, scale: f64) -> i64 {
    (amount as f64 * scale).round() as i64
}

/// Demand cut into slots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Demand {
    pub slot: Duration,
    pub slots: Vec<Slot>,
    /// Requests of the trace itself in each slot, before scaling.
    pub arrivals: Vec<u64>,
    /// How long replicas were known to take to start, from a slot on, in order; before, it is the pool's.
    pub startups: Vec<(usize, Duration)>,
}

impl Demand {
    /// Demand as it was seen, unscaled.
    pub fn new(slot: Duration, slots: Vec<Slot>) -> Self {
        let arrivals = slots.iter().map(|slot| slot.requests).collect();
        Self { slot, slots, arrivals, startups: Vec::new() }
    }

    /// Rent of one replica for one slot.
    pub fn slot_rent(&self, pool: &PoolSpec) -> NanoUsd {
        pool.rent_between(0, millis(self.slot))
    }

    /// All slots together.
    pub fn total(&self) -> Slot {
        self.slots.iter().fold(Slot::default(), |mut sum, slot| {
            sum += *slot;
            sum
        })
    }

    /// The start-up time as it was known at the beginning of a slot; before any was, `configured`.
    pub fn startup_at(&self, configured: Duration, slot: usize) -> Duration {
        let known = self.startups.iter().rev().find(|(from, _)| *from <= slot);
        known.map_or(configured, |(_, startup)| *startup)
    }

    /// How long a replica that is ordered in a slot really takes: as the next measurement says of the first ones.
    pub fn startup_of_order(&self, configured: Duration, slot: usize) -> Duration {
        let first = self.startups.first().map_or(configured, |(_, startup)| *startup);
        self.startup_at(first, slot)
    }

    pub fn api_cost(&self) -> NanoUsd {
        self.slots.iter().map(|slot| slot.api_cost).sum()
    }

    /// Mean API bill over the rent of one replica; none without slots or rent.
    #[expect(clippy::cast_precision_loss, reason = "a ratio, not an amount")]
    pub fn rho(&self, pool: &PoolSpec) -> Option<f64> {
        let rent = pool.hourly.to_usd_f64() * self.slots.len() as f64 * self.slot.as_secs_f64() / 3600.0;
        (rent > 0.0).then(|| self.api_cost().to_usd_f64() / rent)
    }

    pub fn kappa(&self, pool: &PoolSpec) -> Option<f64> {
        break_even::kappa(pool, &self.total())
    }

    /// The pool with no more replicas than the busiest slot can fill: the cap of every policy and of the
    /// optimum.
    #[must_use]
    pub fn capped(&self, pool: &PoolSpec) -> PoolSpec {
        let busiest = self.slots.iter().map(|slot| slot.replicas_filled(self.slot)).max().unwrap_or(0);
        PoolSpec { max_replicas: pool.max_replicas.min(busiest), ..pool.clone() }
    }
}
