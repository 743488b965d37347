//! Numbers that many threads write and a scrape reads: atomics, no locks, no labels.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;

use crate::economics::{NanoUsd, Timestamp};

/// A count that only grows.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Returns what was counted before.
    pub(crate) fn add(&self, amount: u64) -> u64 {
        self.0.fetch_add(amount, Ordering::Relaxed)
    }

    /// Takes over a count that is kept elsewhere and only grows.
    pub(crate) fn raise_to(&self, count: u64) {
        self.0.fetch_max(count, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A sum of amounts, in nano-dollars; divided only when it is rendered.
#[derive(Debug, Default)]
pub(crate) struct Money(AtomicI64);

impl Money {
    pub(crate) fn add(&self, amount: NanoUsd) {
        debug_assert!(amount >= NanoUsd::ZERO, "a counter of money never falls");
        self.0.fetch_add(amount.as_nanos(), Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> NanoUsd {
        NanoUsd::from_nanos(self.0.load(Ordering::Relaxed))
    }
}

/// A count that goes up and down.
#[derive(Debug, Default)]
pub(crate) struct Level(AtomicI64);

impl Level {
    pub(crate) fn add(&self, change: i64) {
        self.0.fetch_add(change, Ordering::Relaxed);
    }

    pub(crate) fn set(&self, value: i64) {
        self.0.store(value, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> i64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The last value of something; absent from a scrape until it has one.
#[derive(Debug)]
pub(crate) struct Gauge(AtomicU64);

impl Default for Gauge {
    fn default() -> Self {
        Self(AtomicU64::new(f64::NAN.to_bits()))
    }
}

impl Gauge {
    /// A value that is not finite is no value.
    pub(crate) fn set(&self, value: f64) {
        self.0.store(value.to_bits(), Ordering::Relaxed);
    }

    pub(crate) fn set_or_clear(&self, value: Option<f64>) {
        self.set(value.unwrap_or(f64::NAN));
    }

    pub(crate) fn set_time(&self, at: Timestamp) {
        self.set(seconds(at));
    }

    pub(crate) fn get(&self) -> Option<f64> {
        let value = f64::from_bits(self.0.load(Ordering::Relaxed));
        value.is_finite().then_some(value)
    }
}

/// Seconds since the Unix epoch.
#[expect(clippy::cast_precision_loss, reason = "a gauge of time, exact to the millisecond for 280,000 years")]
pub(crate) fn seconds(at: Timestamp) -> f64 {
    at.as_millis() as f64 / 1e3
}

/// Bucket bounds in units of 10⁻⁹ (nanoseconds, or billionths of a ratio), rising.
pub(crate) type Bounds = &'static [u64];

/// A histogram of whole billionths. Its count is the sum of its buckets, so the two always agree.
#[derive(Debug)]
pub(crate) struct Histogram {
    bounds: Bounds,
    /// One a bound, and one for what is above the last.
    buckets: Box<[AtomicU64]>,
    sum: AtomicU64,
}

impl Histogram {
    pub(crate) fn new(bounds: Bounds) -> Self {
        let buckets = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, buckets, sum: AtomicU64::new(0) }
    }

    pub(crate) fn observe(&self, duration: Duration) {
        self.observe_billionths(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX));
    }

    pub(crate) fn observe_billionths(&self, value: u64) {
        let bucket = self.bounds.iter().position(|bound| value <= *bound).unwrap_or(self.bounds.len());
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(value, Ordering::Relaxed);
    }

    /// Upper bound and cumulative count of each bucket but the last, the count of all, and their sum.
    #[expect(clippy::cast_precision_loss, reason = "seconds of a picture, not an amount")]
    pub(crate) fn read(&self) -> Reading {
        let mut count = 0;
        let mut cumulative = Vec::with_capacity(self.bounds.len());
        for (bound, bucket) in self.bounds.iter().zip(&self.buckets) {
            count += bucket.load(Ordering::Relaxed);
            cumulative.push((*bound as f64 / 1e9, count));
        }
        count += self.buckets[self.bounds.len()].load(Ordering::Relaxed);
        Reading { cumulative, count, sum: self.sum.load(Ordering::Relaxed) as f64 / 1e9 }
    }
}

pub(crate) struct Reading {
    pub(crate) cumulative: Vec<(f64, u64)>,
    pub(crate) count: u64,
    pub(crate) sum: f64,
}

/// Things by name: read without a lock, copied when one is added, never removed. Names come from the
/// configuration or are admitted by a budget, so it stays small.
#[derive(Debug)]
pub(crate) struct Named<T> {
    map: ArcSwap<HashMap<String, Arc<T>>>,
    growing: Mutex<()>,
}

impl<T> Default for Named<T> {
    fn default() -> Self {
        Self { map: ArcSwap::default(), growing: Mutex::default() }
    }
}

impl<T> Named<T> {
    pub(crate) fn get(&self, name: &str) -> Option<Arc<T>> {
        self.map.load().get(name).cloned()
    }

    pub(crate) fn get_or_add(&self, name: &str, make: impl FnOnce() -> T) -> Arc<T> {
        match self.get_or_admit(name, || Some(make())) {
            Some(value) => value,
            None => unreachable!("`make` always admits"),
        }
    }

    /// As `get_or_add`, but `admit` may refuse a new name.
    pub(crate) fn get_or_admit(&self, name: &str, admit: impl FnOnce() -> Option<T>) -> Option<Arc<T>> {
        if let Some(value) = self.get(name) {
            return Some(value);
        }
        let _growing = self.growing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(value) = self.get(name) {
            return Some(value);
        }
        let value = Arc::new(admit()?);
        let mut map = HashMap::clone(&self.map.load());
        map.insert(name.to_owned(), value.clone());
        self.map.store(Arc::new(map));
        Some(value)
    }

    pub(crate) fn all(&self) -> Arc<HashMap<String, Arc<T>>> {
        self.map.load_full()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_counts_a_value_on_a_bound_below_it() {
        let histogram = Histogram::new(&[1_000_000, 2_000_000]);
        histogram.observe(Duration::from_millis(1));
        histogram.observe(Duration::from_micros(1500));
        histogram.observe(Duration::from_secs(1));
        let reading = histogram.read();
        assert_eq!(reading.cumulative, [(0.001, 1), (0.002, 2)]);
        assert_eq!(reading.count, 3);
        assert!((reading.sum - 1.0025).abs() < 1e-12);
    }

    #[test]
    fn a_gauge_without_a_finite_value_is_absent() {
        let gauge = Gauge::default();
        assert_eq!(gauge.get(), None);
        gauge.set(1.5);
        assert_eq!(gauge.get(), Some(1.5));
        gauge.set(f64::INFINITY);
        assert_eq!(gauge.get(), None);
    }

    #[test]
    fn a_refused_name_leaves_no_trace() {
        let named: Named<u8> = Named::default();
        assert!(named.get_or_admit("a", || None).is_none());
        assert_eq!(*named.get_or_add("a", || 1), 1);
        assert_eq!(*named.get_or_add("a", || 2), 1);
        assert_eq!(named.all().len(), 1);
    }
}
