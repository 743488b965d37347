//! Replays demand in virtual time through the very policies that run live.

pub mod engine;
pub mod fleet;
pub mod hindsight;
pub mod trace;

use std::time::Duration;

use crate::economics::{NanoUsd, PoolSpec, Slot};

/// Demand cut into slots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Demand {
    pub slot: Duration,
    pub slots: Vec<Slot>,
}

impl Demand {
    /// Rent of one replica for one slot.
    pub fn slot_rent(&self, pool: &PoolSpec) -> NanoUsd {
        pool.rent_between(0, crate::economics::time::millis(self.slot))
    }

    pub fn api_cost(&self) -> NanoUsd {
        self.slots.iter().map(|slot| slot.api_cost).sum()
    }
}
