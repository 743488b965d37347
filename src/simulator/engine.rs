//! The loop: show the finished slot to the policy, carry out what it wants, serve, bill.

use crate::economics::layers::slots_in;
use crate::economics::{Billing, NanoUsd, Policy, PoolSpec, Slot, Timestamp};

use super::Demand;
use super::fleet::SimulatedFleet;

/// What a run cost and what it did.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    pub name: String,
    pub api: NanoUsd,
    pub rent: NanoUsd,
    pub replica_hours: f64,
    pub starts: u64,
    pub api_requests: u64,
    pub self_hosted_requests: u64,
    /// The target of each slot.
    pub schedule: Vec<u32>,
    /// Replicas that served in each slot.
    pub ready: Vec<u32>,
    /// API bill and rent of each slot, for the picture.
    pub spent: Vec<NanoUsd>,
}

impl Outcome {
    pub fn total(&self) -> NanoUsd {
        self.api + self.rent
    }
}

/// Replays `demand` under `policy`, starting with an empty fleet at `start`.
pub fn run(policy: &mut dyn Policy, pool: &PoolSpec, demand: &Demand, start: Timestamp) -> Outcome {
    let name = policy.name().to_owned();
    let mut finished = Slot::default();
    let mut at = start;
    let target = |_: u32, slot: &Slot, fleet: &SimulatedFleet, now: u32| {
        let decision = policy.decide(pool, at, &finished, fleet.seen_at(now));
        finished = *slot;
        at = at + demand.slot;
        decision.target_replicas
    };
    replay(name, pool, demand, target)
}

/// Replays `demand` with a constant fleet.
pub fn run_fixed(replicas: u32, pool: &PoolSpec, demand: &Demand) -> Outcome {
    replay("fixed".to_owned(), pool, demand, |_, _, _, _| replicas)
}

/// The cheapest constant fleet, chosen with hindsight.
pub fn best_fixed(pool: &PoolSpec, demand: &Demand) -> Outcome {
    (0..=pool.max_replicas)
        .map(|replicas| run_fixed(replicas, pool, demand))
        .min_by_key(Outcome::total)
        .expect("zero replicas is always a choice")
}

fn replay(
    name: String,
    pool: &PoolSpec,
    demand: &Demand,
    mut target: impl FnMut(u32, &Slot, &SimulatedFleet, u32) -> u32,
) -> Outcome {
    let mut fleet =
        SimulatedFleet::new(slots_in(pool.startup, demand.slot), slots_in(pool.minimum, demand.slot));
    let mut outcome = Outcome {
        name,
        api: NanoUsd::ZERO,
        rent: NanoUsd::ZERO,
        replica_hours: 0.0,
        starts: 0,
        api_requests: 0,
        self_hosted_requests: 0,
        schedule: Vec::with_capacity(demand.slots.len()),
        ready: Vec::with_capacity(demand.slots.len()),
        spent: Vec::with_capacity(demand.slots.len()),
    };
    let rent = demand.slot_rent(pool);
    for (index, slot) in demand.slots.iter().enumerate() {
        let now = u32::try_from(index).expect("a horizon is below 2^32 slots");
        let wanted = target(now, slot, &fleet, now).min(pool.max_replicas);
        fleet.hold(wanted, now);
        let ready = fleet.pass(now);
        let api = slot.api_cost - slot.saved_by(pool, ready, demand.slot);
        outcome.api += api;
        outcome.schedule.push(wanted);
        outcome.ready.push(ready);
    }
    fleet.settle(u32::try_from(demand.slots.len()).expect("a horizon is below 2^32 slots"));
    outcome.rent = NanoUsd::from_nanos(rent.as_nanos() * i64::try_from(fleet.replica_slots()).expect("fits"));
    outcome.starts = fleet.starts();
    outcome
}
