//! What somebody who knew the whole trace would have paid.
//!
//! The gain of a layer never grows with the layer, and replicas are alike, so the problem splits into one
//! on/off problem a layer: a layer earns `G[t]` in a slot, costs `c` while it serves and `D·c` more per start
//! (the rent until it is ready). Each is a dynamic programme over two states, `O(slots · replicas)` in all.
//! With a minimum of at most `D + 1` slots this is exact; a longer minimum only makes real fleets dearer, so
//! the figure is then a lower bound.

use crate::economics::layers::slots_in;
use crate::economics::{Billing, NanoUsd, PoolSpec};

use super::Demand;

/// The cheapest total in hindsight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Optimum {
    pub total: NanoUsd,
    /// False when the minimum is too long for the layers to be exact; the total is then a lower bound.
    pub exact: bool,
}

/// The offline optimum over fleets of at most `pool.max_replicas`.
pub fn optimum(pool: &PoolSpec, demand: &Demand) -> Optimum {
    let startup = slots_in(pool.startup, demand.slot);
    let minimum = slots_in(pool.minimum, demand.slot);
    let saved: i64 = (1..=pool.max_replicas).map(|layer| best_layer(pool, demand, layer, startup)).sum();
    let api: i64 = demand.slots.iter().map(|slot| slot.api_cost.as_nanos()).sum();
    Optimum { total: NanoUsd::from_nanos(api - saved), exact: minimum <= startup + 1 }
}

/// The most that one layer can save, net of its rent, in nano-dollars.
fn best_layer(pool: &PoolSpec, demand: &Demand, layer: u32, startup: u32) -> i64 {
    let rent = demand.slot_rent(pool).as_nanos();
    let start = rent * i64::from(startup);
    let (mut off, mut on) = (0_i64, i64::MIN / 4);
    for (index, slot) in demand.slots.iter().enumerate() {
        let gain = slot.layer_gain(pool, layer, demand.slot).as_nanos();
        // Fleets start empty, so nothing serves before the first start-up is over.
        let started = if index < startup as usize { i64::MIN / 4 } else { off - start };
        on = on.max(started) + gain - rent;
        off = off.max(on);
    }
    off
}
