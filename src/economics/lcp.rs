//! Lazy capacity provisioning: change only when staying would have been dearer than the change.
//!
//! Per layer, `lo` is what being on would have earned and `hi` what being off would have saved since the
//! last change. The layer goes on when `lo` reaches `a` times the price of a start, and off when `hi`
//! reaches `b` times that price. With `a = b = 1` and no start-up delay it is 3-competitive (Lin, Wierman,
//! Andrew and Thereska 2011; Albers and Quedenfeld 2018).

use std::time::Duration;

use super::layers::slots_in;
use super::policy::{Decision, Fleet, Policy, Preference, Reason, Slot};
use super::{PoolSpec, Timestamp};

/// One layer's state. Amounts are in rents of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LazyLayer {
    lo: f64,
    hi: f64,
    on: bool,
}

impl LazyLayer {
    pub fn is_on(&self) -> bool {
        self.on
    }

    /// Learns the gain of a finished slot. `up` and `down` are the prices of a change, `a·β` and `b·β`.
    pub fn learn(&mut self, gain: f64, up: f64, down: f64) {
        let surplus = gain - 1.0;
        self.lo = (self.lo + surplus).max(0.0);
        self.hi = (self.hi - surplus).max(0.0);
        if !self.on && self.lo >= up {
            (self.on, self.hi) = (true, 0.0);
        } else if self.on && self.hi >= down {
            (self.on, self.lo) = (false, 0.0);
        }
    }
}

/// The policy `lcp`: every layer on its own, with `a = b = 1`. The price of a change is at least the rent of a slot, because
/// a slot that has begun is paid.
#[derive(Debug, Clone)]
pub struct LazyCapacity {
    slot: Duration,
    layers: Vec<LazyLayer>,
}

impl LazyCapacity {
    pub fn new(slot: Duration) -> Self {
        Self { slot, layers: Vec::new() }
    }
}

impl Policy for LazyCapacity {
    fn name(&self) -> &'static str {
        "lcp"
    }

    fn decide(&mut self, pool: &PoolSpec, _: Timestamp, finished: &Slot, _: Fleet) -> Decision {
        let beta = f64::from(slots_in(pool.startup, self.slot).max(1));
        self.layers.resize(pool.max_replicas as usize, LazyLayer::default());
        for (layer, gain) in self.layers.iter_mut().zip(finished.gains_in_rents(pool, self.slot)) {
            layer.learn(gain, beta, beta);
        }
        let on = self.layers.iter().filter(|layer| layer.is_on()).count();
        let target_replicas = u32::try_from(on).expect("at most `max_replicas`");
        let preference = if on > 0 { Preference::SelfHosted } else { Preference::Api };
        Decision { target_replicas, preference, reason: Reason::Cheapest }
    }
}
