//! The loop: show the finished slot to the policy, carry out what it wants, serve, bill.

use crate::economics::layers::{offered, slots_in};
use crate::economics::{Billing, NanoUsd, Policy, PoolSpec, Preference, Reason, Slot, Timestamp};

use super::Demand;
use super::fleet::SimulatedFleet;

/// What a run cost and what it did.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    pub name: String,
    pub api: NanoUsd,
    /// Rent of the replicas, and fees paid per request.
    pub rent: NanoUsd,
    pub replica_hours: f64,
    pub starts: u64,
    /// Requests of the trace, before scaling; the shares of a slot that was split are summed.
    pub api_requests: u64,
    pub self_hosted_requests: u64,
    pub slots: Vec<ServedSlot>,
}

/// One slot of a run, for the picture and the schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServedSlot {
    /// Replicas wanted.
    pub target: u32,
    /// Replicas that served.
    pub ready: u32,
    /// API bill and rent.
    pub spent: NanoUsd,
}

impl Outcome {
    pub fn total(&self) -> NanoUsd {
        self.api + self.rent
    }
}

/// Replays `demand` under `policy`, from an empty fleet, the first slot beginning at `start`.
pub fn run(policy: &mut dyn Policy, pool: &PoolSpec, demand: &Demand, start: Timestamp) -> Outcome {
    let name = policy.name();
    let (mut finished, mut at, mut known) = (Slot::default(), start, pool.clone());
    replay(name, pool, demand, |slot, fleet, now| {
        known.startup = demand.startup_at(pool.startup, now as usize);
        let decision = policy.decide(&known, at, &finished, fleet.seen_at(now));
        (finished, at) = (*slot, at + demand.slot);
        let is_api_only = (decision.preference, decision.reason) == (Preference::Api, Reason::Pinned);
        Wanted { target: decision.target_replicas, serves: !is_api_only }
    })
}

/// Replays `demand` with a constant fleet.
pub fn run_fixed(replicas: u32, pool: &PoolSpec, demand: &Demand) -> Outcome {
    replay("fixed", pool, demand, |_, _, _| Wanted { target: replicas, serves: true })
}

/// The cheapest constant fleet, chosen with hindsight.
pub fn best_fixed(pool: &PoolSpec, demand: &Demand) -> Outcome {
    // More than the busiest slot can fill save nothing.
    (0..=demand.capped(pool).max_replicas)
        .map(|replicas| run_fixed(replicas, pool, demand))
        .min_by_key(Outcome::total)
        .expect("no replicas at all is always a choice")
}

/// What is wanted of the replicas in a slot.
struct Wanted {
    target: u32,
    /// Whether those that are there serve: pinned to the API none does, though it may be paid anyway.
    serves: bool,
}

fn replay(
    name: &str,
    pool: &PoolSpec,
    demand: &Demand,
    mut wanted: impl FnMut(&Slot, &SimulatedFleet, u32) -> Wanted,
) -> Outcome {
    let mut fleet = fleet(pool, demand);
    let mut served = Served::default();
    let mut slots = Vec::with_capacity(demand.slots.len());
    let slot_rent = demand.slot_rent(pool);
    for ((slot, arrived), now) in demand.slots.iter().zip(&demand.arrivals).zip(0..) {
        let Wanted { target, serves } = wanted(slot, &fleet, now);
        let target = target.min(pool.max_replicas);
        fleet.start_in(slots_in(demand.startup_of_order(pool.startup, now as usize), demand.slot));
        fleet.hold(target, now);
        let (ready, billed) = fleet.pass(now);
        let ready = if serves { ready } else { 0 };
        let spent = served.add(pool, demand, (slot, *arrived), ready) + rent(pool, slot_rent, billed);
        slots.push(ServedSlot { target, ready, spent });
    }
    let unpaid = fleet.settle(u32::try_from(demand.slots.len()).expect("a horizon is below 2^32 slots"));
    let settled = rent(pool, slot_rent, unpaid);
    if let Some(last) = slots.last_mut() {
        last.spent += settled;
    }
    let spent: NanoUsd = slots.iter().map(|slot| slot.spent).sum();
    Outcome {
        name: name.to_owned(),
        api: served.api,
        rent: spent - served.api,
        replica_hours: hours(fleet.replica_slots(), demand),
        starts: fleet.starts(),
        api_requests: demand.arrivals.iter().sum::<u64>() - served.whole_requests(),
        self_hosted_requests: served.whole_requests(),
        slots,
    }
}

/// A replica that is paid anyway is there from the beginning; one that is paid by use costs nothing to hold.
fn fleet(pool: &PoolSpec, demand: &Demand) -> SimulatedFleet {
    match pool.billing {
        Billing::Committed => SimulatedFleet::standing(pool.max_replicas),
        Billing::WhileRunning | Billing::PerUse => {
            SimulatedFleet::new(slots_in(pool.startup, demand.slot), slots_in(pool.minimum, demand.slot))
        }
    }
}

fn rent(pool: &PoolSpec, slot_rent: NanoUsd, billed: u64) -> NanoUsd {
    match pool.billing {
        Billing::PerUse => NanoUsd::ZERO,
        Billing::Committed | Billing::WhileRunning => slot_rent.mul_div_floor(billed, 1),
    }
}

/// What has been served so far.
#[derive(Debug, Default)]
struct Served {
    api: NanoUsd,
    requests: f64,
}

impl Served {
    /// Serves a slot; answers the API bill, the fees paid per request, and the rent of work paid by use.
    #[expect(clippy::cast_precision_loss, reason = "shares of requests, not amounts")]
    fn add(
        &mut self,
        pool: &PoolSpec,
        demand: &Demand,
        (slot, arrived): (&Slot, u64),
        ready: u32,
    ) -> NanoUsd {
        let room = offered(ready, demand.slot);
        let saved = slot.saved_by(pool, ready, demand.slot);
        if saved == NanoUsd::ZERO {
            self.api += slot.api_cost;
            return slot.api_cost;
        }
        let work = slot.work.0.min(room);
        let kept =
            if room >= slot.work.0 { slot.api_cost } else { slot.api_cost.mul_div_floor(room, slot.work.0) };
        self.requests += arrived as f64 * work as f64 / slot.work.0.max(1) as f64;
        self.api += slot.api_cost - kept;
        let by_use = match pool.billing {
            Billing::PerUse => pool.hourly.mul_div_floor(work, 3_600_000_000),
            Billing::Committed | Billing::WhileRunning => NanoUsd::ZERO,
        };
        slot.api_cost - saved + by_use
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a sum of shares of counts")]
    fn whole_requests(&self) -> u64 {
        self.requests.round() as u64
    }
}

#[expect(clippy::cast_precision_loss, reason = "hours, not an amount")]
fn hours(replica_slots: u64, demand: &Demand) -> f64 {
    replica_slots as f64 * demand.slot.as_secs_f64() / 3600.0
}
