//! The owner's own numbers, with a band between going up and coming down.

use std::time::Duration;

use super::policy::{Decision, Fleet, Policy, PolicySettings, Preference, Reason, Slot};
use super::volume::VolumeWindow;
use super::{PoolSpec, Timestamp};

/// Volumes a day. Those that are given must all be exceeded to go up; one that is undercut is enough to come down.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Threshold {
    pub requests_per_day: Option<Band>,
    pub tokens_per_day: Option<Band>,
    pub usd_per_day: Option<Band>,
}

/// Above `up` self-hosted is preferred, below `down` the API; between them nothing changes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Band {
    pub up: f64,
    pub down: f64,
}

impl Threshold {
    /// What the volume of an hour says: up, down, or nothing.
    fn verdict(&self, hour: &Slot) -> Option<Preference> {
        let bands: Vec<_> = [
            (self.requests_per_day, per_day(hour.requests)),
            (self.tokens_per_day, per_day(hour.tokens)),
            (self.usd_per_day, hour.api_cost.to_usd_f64() * 24.0),
        ]
        .into_iter()
        .filter_map(|(band, volume)| band.map(|band| (band, volume)))
        .collect();
        if bands.iter().any(|(band, volume)| *volume < band.down) {
            Some(Preference::Api)
        } else if !bands.is_empty() && bands.iter().all(|(band, volume)| *volume > band.up) {
            Some(Preference::SelfHosted)
        } else {
            None
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "a volume, not an amount")]
fn per_day(hourly: u64) -> f64 {
    hourly as f64 * 24.0
}

/// The policy `threshold`.
#[derive(Debug, Clone)]
pub struct ThresholdPolicy {
    threshold: Threshold,
    settings: PolicySettings,
    window: Option<VolumeWindow>,
    preference: Preference,
    changed_at: Option<Timestamp>,
}

impl ThresholdPolicy {
    pub fn new(threshold: Threshold, settings: PolicySettings) -> Self {
        Self { threshold, settings, window: None, preference: Preference::Api, changed_at: None }
    }
}

impl Policy for ThresholdPolicy {
    fn name(&self) -> &'static str {
        "threshold"
    }

    fn decide(&mut self, pool: &PoolSpec, at: Timestamp, finished: &Slot, _: Fleet) -> Decision {
        let settings = &self.settings;
        let window =
            self.window.get_or_insert_with(|| VolumeWindow::new(settings.window, settings.opened_before(at)));
        window.add(settings.last_instant_before(at), *finished);
        let Some(hour) = window.per_hour(at) else { return Decision::api(Reason::Threshold) };
        let verdict = self.threshold.verdict(&hour).unwrap_or(self.preference);
        if verdict != self.preference && settings.may_change(self.changed_at, at) {
            (self.preference, self.changed_at) = (verdict, Some(at));
        }
        match self.preference {
            Preference::Api => Decision::api(Reason::Threshold),
            Preference::SelfHosted => {
                let needed = hour.replicas_filled(Duration::from_hours(1)).clamp(1, pool.max_replicas.max(1));
                Decision::hold(needed.min(pool.max_replicas), Reason::Threshold)
            }
        }
    }
}
