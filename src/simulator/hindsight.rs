//! What somebody who knew the whole trace would have paid.
//!
//! The gain of a layer never grows with the layer, and replicas are alike, so the problem splits into one
//! on/off problem a layer: a layer earns `G[t]` in a slot, costs `c` while it serves and `D·c` more per start
//! (the rent until it is ready). Each is a dynamic programme over two states, `O(slots · replicas)` in all.
//! With a minimum of at most `D + 1` slots this is exact; a longer minimum only makes real fleets dearer, so
//! the figure is then a lower bound.

use std::time::Duration;

use crate::economics::layers::{offered, slots_in};
use crate::economics::{Billing, NanoUsd, PoolSpec};

use super::Demand;

/// The value of a state that cannot be reached.
const NEVER: i64 = i64::MIN / 4;

/// The cheapest total in hindsight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Optimum {
    pub total: NanoUsd,
    /// False when the minimum is too long for the layers to be exact, or the start-up time has changed; the total is
    /// then a lower bound.
    pub exact: bool,
}

/// The offline optimum over fleets of at most `pool.max_replicas`.
pub fn optimum(pool: &PoolSpec, demand: &Demand) -> Optimum {
    match pool.billing {
        Billing::WhileRunning => layered(pool, demand),
        Billing::Committed => {
            Optimum { total: super::engine::run_fixed(pool.max_replicas, pool, demand).total(), exact: true }
        }
        Billing::PerUse => paid_by_use(pool, demand),
    }
}

fn layered(pool: &PoolSpec, demand: &Demand) -> Optimum {
    let shortest = demand.startups.iter().map(|(_, startup)| *startup).fold(pool.startup, Duration::min);
    let startup = slots_in(shortest, demand.slot);
    let minimum = slots_in(pool.minimum, demand.slot);
    let layers = demand.capped(pool).max_replicas;
    let saved: i64 = (1..=layers).map(|layer| best_layer(pool, demand, layer, startup)).sum();
    Optimum {
        total: demand.api_cost() - NanoUsd::from_nanos(saved),
        exact: minimum <= startup + 1 && demand.startups.is_empty(),
    }
}

/// The most that one layer can save, net of its rent, in nano-dollars.
fn best_layer(pool: &PoolSpec, demand: &Demand, layer: u32, startup: u32) -> i64 {
    let rent = demand.slot_rent(pool).as_nanos();
    let start = rent * i64::from(startup);
    let (mut off, mut on) = (0_i64, NEVER);
    for (slot, index) in demand.slots.iter().zip(0_u32..) {
        let gain = slot.layer_gain(pool, layer, demand.slot).as_nanos();
        // Fleets start empty, so nothing serves before the first start-up is over.
        let started = if index < startup { NEVER } else { off - start };
        on = on.max(started) + gain - rent;
        off = off.max(on);
    }
    off
}

/// Paid by use a replica costs nothing to hold, so every slot is served where it is cheaper. The start-up is
/// left out, which makes it a lower bound.
fn paid_by_use(pool: &PoolSpec, demand: &Demand) -> Optimum {
    let saved = |slot: &crate::economics::Slot| {
        let work = slot.work.0.min(offered(pool.max_replicas, demand.slot));
        let net = slot.saved_by(pool, pool.max_replicas, demand.slot)
            - pool.hourly.mul_div_floor(work, 3_600_000_000);
        net.max(NanoUsd::ZERO)
    };
    Optimum { total: demand.api_cost() - demand.slots.iter().map(saved).sum(), exact: pool.startup.is_zero() }
}
