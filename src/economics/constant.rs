//! Policies that do not look at the price: all on one side, or a fixed share.

use std::time::Duration;

use super::policy::{Decision, Fleet, Policy, PolicySettings, Reason, Slot};
use super::volume::VolumeWindow;
use super::{PoolSpec, Timestamp};

/// The policy `api`: everything is bought, nothing is rented.
#[derive(Debug, Clone, Copy, Default)]
pub struct ApiOnly;

impl Policy for ApiOnly {
    fn name(&self) -> &'static str {
        "api"
    }

    fn decide(&mut self, _: &PoolSpec, _: Timestamp, _: &Slot, _: Fleet) -> Decision {
        Decision::api(Reason::Pinned)
    }
}

/// The policies `self_hosted` and `split`: replicas enough for a share of the window's work, at least one.
#[derive(Debug, Clone)]
pub struct ShareOfWork {
    name: &'static str,
    /// Thousandths of the calls.
    share: u64,
    settings: PolicySettings,
    window: Option<VolumeWindow>,
}

impl ShareOfWork {
    pub fn all(settings: PolicySettings) -> Self {
        Self { name: "self_hosted", share: 1000, settings, window: None }
    }

    /// `share` is 0 to 1 and counted in thousandths.
    pub fn split(share: f64, settings: PolicySettings) -> Self {
        let share = Duration::try_from_secs_f64(share.clamp(0.0, 1.0)).unwrap_or_default().as_millis();
        let share = u64::try_from(share).expect("at most a thousand");
        Self { name: "split", share, settings, window: None }
    }
}

impl Policy for ShareOfWork {
    fn name(&self) -> &'static str {
        self.name
    }

    fn decide(&mut self, pool: &PoolSpec, at: Timestamp, finished: &Slot, _: Fleet) -> Decision {
        if self.share == 0 {
            return Decision::api(Reason::Pinned);
        }
        let settings = &self.settings;
        let window =
            self.window.get_or_insert_with(|| VolumeWindow::new(settings.window, settings.opened_before(at)));
        window.add(settings.last_instant_before(at), *finished);
        let hour = window.per_hour(at).unwrap_or_default().scaled(self.share, 1000);
        let needed = hour.replicas_filled(Duration::from_hours(1)).max(1);
        Decision::hold(needed.min(pool.max_replicas), Reason::Pinned)
    }
}
