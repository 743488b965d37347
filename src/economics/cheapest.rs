//! What costs less at the current volume, changed only on evidence.
//!
//! The volume is the mean of a window. Every slot adds to the evidence by how much dearer the present fleet is
//! than the best one, as a share of the best, less the margin; the fleet changes when the evidence is worth
//! one and a half windows (a cumulative-sum test, Page 1954). So the closer to break-even, the longer it
//! looks: at ten times break-even two minutes are enough, at 1.2 times hours, and noise around break-even
//! moves nothing. A change is never made before the last one is `min_dwell` old.

use super::break_even::{cheapest_fleet, hourly_cost};
use super::catalog::Billing;
use super::policy::{Decision, Fleet, Policy, PolicySettings, Reason, Slot};
use super::volume::VolumeWindow;
use super::{NanoUsd, PoolSpec, Timestamp};

/// A fleet this many times dearer than the best counts as no worse, so that one quiet slot is no proof.
const MOST_EXCESS: f64 = 10.0;

/// Evidence needed for a change, in windows.
const EVIDENCE_WINDOWS: f64 = 1.5;

/// The policy `cheapest`.
#[derive(Debug, Clone)]
pub struct Cheapest {
    settings: PolicySettings,
    window: Option<VolumeWindow>,
    replicas: u32,
    /// Hours times the share by which the present fleet was dearer than the best.
    evidence: f64,
    changed_at: Option<Timestamp>,
}

impl Cheapest {
    pub fn new(settings: PolicySettings) -> Self {
        Self { settings, window: None, replicas: 0, evidence: 0.0, changed_at: None }
    }

    /// The fleet for a volume while rent is due only for what runs, or only for what works.
    fn follow(&mut self, pool: &PoolSpec, at: Timestamp, hour: &Slot) -> Decision {
        let (best, best_cost) = cheapest_fleet(pool, hour);
        let excess = excess(hourly_cost(pool, hour, self.replicas), best_cost);
        let hours = self.settings.slot.as_secs_f64() / 3600.0;
        self.evidence = (self.evidence + (excess - self.settings.margin) * hours).max(0.0);
        let enough = EVIDENCE_WINDOWS * self.settings.window.as_secs_f64() / 3600.0;
        let wants = best != self.replicas;
        if wants && self.evidence >= enough && self.settings.may_change(self.changed_at, at) {
            (self.replicas, self.evidence, self.changed_at) = (best, 0.0, Some(at));
        }
        let reason = if best == self.replicas { Reason::Cheapest } else { Reason::Hysteresis };
        Decision::hold(self.replicas, reason)
    }
}

/// By how much `cost` exceeds `best`, as a share of `best`.
fn excess(cost: NanoUsd, best: NanoUsd) -> f64 {
    let more = (cost - best).to_usd_f64();
    if more <= 0.0 { 0.0 } else { (more / best.to_usd_f64().max(f64::MIN_POSITIVE)).min(MOST_EXCESS) }
}

impl Policy for Cheapest {
    fn name(&self) -> &'static str {
        "cheapest"
    }

    fn decide(&mut self, pool: &PoolSpec, at: Timestamp, finished: &Slot, _: Fleet) -> Decision {
        let settings = &self.settings;
        let window =
            self.window.get_or_insert_with(|| VolumeWindow::new(settings.window, settings.opened_before(at)));
        window.add(settings.last_instant_before(at), *finished);
        // Paid anyway, a replica's marginal price is nil: fill it first, at any volume.
        if pool.billing == Billing::Committed {
            return Decision::hold(pool.max_replicas, Reason::Cheapest);
        }
        match window.per_hour(at) {
            Some(hour) => self.follow(pool, at, &hour),
            None => Decision::api(Reason::Cheapest),
        }
    }
}
