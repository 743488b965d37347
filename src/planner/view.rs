//! What gauges and the status show of a pool.

use std::sync::Arc;
use std::time::Duration;

use super::pool::PoolPlanner;
use crate::economics::break_even::{break_even_requests_per_day, cheapest_fleet, hourly_costs, kappa};
use crate::economics::volume::VolumeWindow;
use crate::economics::{Billing, NanoUsd, Preference, Reason, Slot, Timestamp, Work};
use crate::gateway::{BandView, PoolView};
use crate::metrics::{CostPerRequest, PoolObservation};

const HOURS_PER_DAY: f64 = 24.0;

impl PoolPlanner {
    /// Refreshes the gauges and what the status shows.
    pub(super) fn publish(&mut self, now: Timestamp) {
        let spec = &self.spec();
        let mut window = self.live_window(now);
        let requests_in_window = window.total(now).requests;
        let hour = window.per_hour(now).unwrap_or_default();
        let counts = self.pool.backend.fleet.counts();
        let replicas = counts.ready.max(1);
        let break_even = break_even_requests_per_day(spec, &hour, 1).map(|daily| daily / HOURS_PER_DAY);
        let margin = self.pool.settings.margin;
        let band =
            break_even.map(|volume| BandView { up: volume * (1.0 + margin), down: volume * (1.0 - margin) });
        let volume = count(hour.requests);
        let capacity = (hour.requests > 0 && hour.work > Work::ZERO)
            .then(|| volume / hour.work.as_replica_seconds_f64() * 3600.0 * f64::from(spec.max_replicas));
        let costs = (hour.requests > 0).then(|| hourly_costs(spec, &hour));
        let kappa = kappa(spec, &hour);
        self.pool.series.observed(&PoolObservation {
            volume_requests_per_hour: volume,
            threshold_requests_per_hour: break_even,
            band_lower_requests_per_hour: band.map(|band| band.down),
            band_upper_requests_per_hour: band.map(|band| band.up),
            capacity_requests_per_hour: capacity,
            kappa,
        });
        self.publish_costs(&hour, replicas);
        let (preference, reason) = self.pool.plan();
        let name = self.preferred_name(preference).to_owned();
        self.pool.series.preferred(&name);
        self.pool.series.pinned(self.pool.pin().is_some());
        let dollars = |amount: NanoUsd| amount.to_usd_f64();
        let view = PoolView {
            volume_requests_per_hour: volume,
            requests_in_window,
            break_even_requests_per_hour: break_even,
            band,
            capacity_requests_per_hour: capacity,
            api_usd_per_hour: costs.map(|costs| dollars(costs.api)),
            self_hosted_usd_per_hour: costs.map(|costs| dollars(costs.self_hosted)),
            mix_usd_per_hour: costs.map(|costs| dollars(costs.mix)),
            kappa,
            wanted: self.ordered,
            learnt: Some(self.capacity.view(&spec.capacity)),
            sentence: sentence(
                &name,
                preference,
                reason,
                Volume { requests: volume, break_even },
                cheapest_fleet(spec, &hour),
            ),
        };
        self.pool.view.store(Arc::new(view));
    }

    /// The window with what is known of the slots that are not closed yet, over all proxies.
    fn live_window(&self, now: Timestamp) -> VolumeWindow {
        let mut window = self.window.clone();
        for slot in self.pool.open_slots(now) {
            let mut seen = self.pool.demand(slot);
            seen += self.pool.with_volume(|volume| volume.others(slot)).unwrap_or_default();
            let last_instant = self.pool.slot_start(slot + 1).saturating_sub(Duration::from_millis(1));
            window.add(now.min(last_instant), self.capacity.seen(seen));
        }
        window
    }

    fn publish_costs(&self, hour: &Slot, replicas: u32) {
        let spec = &self.pool.spec;
        let per_request =
            |amount: NanoUsd| (hour.requests > 0).then(|| amount.to_usd_f64() / count(hour.requests));
        let fee = spec.request_fee.to_usd_f64();
        let rent = spec.hourly.mul_div_floor(u64::from(replicas), 1);
        let marginal = match spec.billing {
            Billing::PerUse => per_request(self.pool.rent_of(hour.work)).map(|rent| rent + fee),
            Billing::Committed | Billing::WhileRunning => Some(fee),
        };
        let own =
            CostPerRequest { marginal_usd: marginal, average_usd: per_request(rent).map(|rent| rent + fee) };
        self.pool.series.costs(self.pool.name(), own);
        if let Some(api) = &self.pool.api {
            let average = per_request(hour.api_cost);
            self.pool
                .series
                .costs(api.name(), CostPerRequest { marginal_usd: average, average_usd: average });
        }
    }
}

/// Requests an hour; by use, and where the API costs nothing, no volume breaks even.
#[derive(Clone, Copy)]
struct Volume {
    requests: f64,
    break_even: Option<f64>,
}

/// Who serves and why, for a person.
fn sentence(
    name: &str,
    preference: Preference,
    reason: Reason,
    volume: Volume,
    (replicas, cost): (u32, NanoUsd),
) -> String {
    if reason == Reason::Pinned {
        return format!("`{name}` serves because it is pinned.");
    }
    let Volume { requests, break_even } = volume;
    if requests <= 0.0 {
        return format!("`{name}` serves; there is no traffic yet to compare costs by.");
    }
    let compared = break_even.map_or_else(String::new, |break_even| {
        let side = if requests >= break_even { "above" } else { "below" };
        format!(" are {side} break-even ({break_even:.0})")
    });
    let held = match (preference, reason) {
        (_, Reason::Threshold) => " by your threshold",
        (_, Reason::Hysteresis) => " until the change is worth the margin and the dwell time has passed",
        _ => "",
    };
    let plan = match replicas {
        0 => "the API alone is the cheapest".to_owned(),
        1 => "one replica is the cheapest".to_owned(),
        more => format!("{more} replicas are the cheapest"),
    };
    format!(
        "`{name}` serves{held}: {requests:.0} requests an hour{compared}, so {plan}, at ${cost:.2} an hour."
    )
}

#[expect(clippy::cast_precision_loss, reason = "a volume, not an amount")]
fn count(requests: u64) -> f64 {
    requests as f64
}
