//! What is counted for one pool: a self-hosted backend and the traffic it could take from the API.

use std::sync::Arc;
use std::time::Duration;

use super::catalogue::QUEUE_WAIT_BOUNDS;
use super::instruments::{Counter, Gauge, Histogram, Level, Money, Named};
use crate::economics::{NanoUsd, Reason, Work};

/// One pool.
#[derive(Debug)]
pub struct PoolSeries {
    pub(crate) volume: Gauge,
    pub(crate) threshold: Gauge,
    pub(crate) band_lower: Gauge,
    pub(crate) band_upper: Gauge,
    pub(crate) capacity: Gauge,
    pub(crate) kappa: Gauge,
    pub(crate) hourly: Gauge,
    pub(crate) pinned: Level,
    pub(crate) starting: Level,
    pub(crate) ready: Level,
    pub(crate) wanted: Level,
    pub(crate) busy_micros: Counter,
    pub(crate) rented_millis: Counter,
    pub(crate) queue_depth: Level,
    pub(crate) queue_wait: Histogram,
    pub(crate) all_self_hosted: Money,
    pub(crate) backends: Named<PoolBackend>,
}

/// One backend that serves the traffic of a pool.
#[derive(Debug, Default)]
pub struct PoolBackend {
    pub(crate) marginal_cost: Gauge,
    pub(crate) average_cost: Gauge,
    pub(crate) preferred: Level,
    pub(crate) flips: Counter,
    pub(crate) decisions: [Counter; Reason::ALL.len()],
}

/// What the planner last saw and computed for a pool; `None` for what does not exist (no break-even when
/// a replica can never pay).
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PoolObservation {
    pub volume_requests_per_hour: f64,
    pub threshold_requests_per_hour: Option<f64>,
    pub band_lower_requests_per_hour: Option<f64>,
    pub band_upper_requests_per_hour: Option<f64>,
    pub capacity_requests_per_hour: Option<f64>,
    /// API dollars that a fully used replica replaces, per dollar of rent.
    pub kappa: Option<f64>,
}

/// What a call of the present mix costs at one backend, in dollars.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct CostPerRequest {
    /// One more call.
    pub marginal_usd: Option<f64>,
    /// A call at the current volume, rent included.
    pub average_usd: Option<f64>,
}

impl PoolSeries {
    pub(crate) fn new() -> Self {
        let series = Self {
            volume: Gauge::default(),
            threshold: Gauge::default(),
            band_lower: Gauge::default(),
            band_upper: Gauge::default(),
            capacity: Gauge::default(),
            kappa: Gauge::default(),
            hourly: Gauge::default(),
            pinned: Level::default(),
            starting: Level::default(),
            ready: Level::default(),
            wanted: Level::default(),
            busy_micros: Counter::default(),
            rented_millis: Counter::default(),
            queue_depth: Level::default(),
            queue_wait: Histogram::new(QUEUE_WAIT_BOUNDS),
            all_self_hosted: Money::default(),
            backends: Named::default(),
        };
        series.volume.set(0.0);
        series
    }

    /// The counters of one backend in this pool, to be kept by whoever routes to it.
    pub fn backend(&self, name: &str) -> Arc<PoolBackend> {
        self.backends.get_or_add(name, PoolBackend::default)
    }

    pub fn observed(&self, seen: &PoolObservation) {
        self.volume.set(seen.volume_requests_per_hour);
        self.threshold.set_or_clear(seen.threshold_requests_per_hour);
        self.band_lower.set_or_clear(seen.band_lower_requests_per_hour);
        self.band_upper.set_or_clear(seen.band_upper_requests_per_hour);
        self.capacity.set_or_clear(seen.capacity_requests_per_hour);
        self.kappa.set_or_clear(seen.kappa);
    }

    pub fn costs(&self, backend: &str, costs: CostPerRequest) {
        let backend = self.backend(backend);
        backend.marginal_cost.set_or_clear(costs.marginal_usd);
        backend.average_cost.set_or_clear(costs.average_usd);
    }

    /// `backend` is preferred from now on; a change from another counts as a flip, the first choice does not.
    pub fn preferred(&self, backend: &str) {
        let chosen = self.backend(backend);
        let mut had_another = false;
        for (name, other) in self.backends.all().iter() {
            if name != backend && other.preferred.get() == 1 {
                had_another = true;
                other.preferred.set(0);
            }
        }
        chosen.preferred.set(1);
        if had_another {
            chosen.flips.add(1);
        }
    }

    pub fn pinned(&self, pinned: bool) {
        self.pinned.set(i64::from(pinned));
    }

    pub fn replicas(&self, starting: u32, ready: u32) {
        self.starting.set(i64::from(starting));
        self.ready.set(i64::from(ready));
    }

    /// Replicas that the policy wants, starting and ready.
    pub fn wanted_replicas(&self, wanted: u32) {
        self.wanted.set(i64::from(wanted));
    }

    /// Replica-time that did work.
    pub fn busy(&self, work: Work) {
        self.busy_micros.add(work.0);
    }

    /// Replica-time paid for.
    pub fn rented(&self, replica_millis: u64) {
        self.rented_millis.add(replica_millis);
    }

    /// A call waits for a slot; [`Self::left_queue`] must follow.
    pub fn entered_queue(&self) {
        self.queue_depth.add(1);
    }

    pub fn left_queue(&self, waited: Duration) {
        self.queue_depth.add(-1);
        self.queue_wait.observe(waited);
    }

    /// Rent of the replicas that all the traffic would have needed.
    pub fn all_self_hosted_cost(&self, rent: NanoUsd) {
        self.all_self_hosted.add(rent);
    }
}

impl PoolBackend {
    /// A call was sent here, for that reason.
    pub fn decision(&self, reason: Reason) {
        self.decisions[reason as usize].add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flip_is_a_change_of_preference_and_not_the_first_one() {
        let pool = PoolSeries::new();
        for name in ["openai", "openai", "gpu", "gpu", "openai"] {
            pool.preferred(name);
        }
        assert_eq!(pool.backend("gpu").flips.get(), 1);
        assert_eq!(pool.backend("openai").flips.get(), 1);
        assert_eq!(pool.backend("gpu").preferred.get(), 0);
        assert_eq!(pool.backend("openai").preferred.get(), 1);
    }

    #[test]
    fn a_break_even_that_does_not_exist_is_absent() {
        let pool = PoolSeries::new();
        pool.observed(&PoolObservation { threshold_requests_per_hour: Some(10.0), ..Default::default() });
        assert_eq!(pool.threshold.get(), Some(10.0));
        pool.observed(&PoolObservation::default());
        assert_eq!(pool.threshold.get(), None);
        assert_eq!(pool.volume.get(), Some(0.0));
    }
}
