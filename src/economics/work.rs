//! The price of a replica-second.
//!
//! On replicas that are up and paid a call costs next to nothing while there is room. When the work exceeds
//! the room, serving one call sends another to the API, so a replica-second is worth what the best call that
//! does not fit would have paid for it. That price is read off a histogram of the recent work by its value,
//! the API dollars a replica-second saves: go down from the most valuable until the room is full.

use super::{NanoUsd, Work};

/// Classes of value, four an octave: from 2⁻⁸ to 2²⁴ nano-dollars a replica-millisecond.
const CLASSES: usize = 128;
const PER_OCTAVE: f64 = 4.0;
const FIRST_OCTAVE: f64 = -8.0;

/// What a call would save and take, before it is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallValue {
    /// The API bill it avoids, without the self-hosted backend's fee a request.
    pub worth: NanoUsd,
    pub work: Work,
}

/// Nano-dollars a replica-second; zero while there is room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct WorkPrice(pub NanoUsd);

impl WorkPrice {
    /// What `work` costs at this price.
    pub fn of(self, work: Work) -> NanoUsd {
        self.0.mul_div_floor(work.0, 1_000_000)
    }
}

/// Learns the price from the calls that a pool could take, wherever they were served.
#[derive(Debug, Clone)]
pub struct WorkPrices {
    /// Work seen a class of value, in replica-seconds, fading.
    seen: [f64; CLASSES],
    price: WorkPrice,
}

impl Default for WorkPrices {
    fn default() -> Self {
        Self { seen: [0.0; CLASSES], price: WorkPrice::default() }
    }
}

impl WorkPrices {
    pub fn see(&mut self, call: CallValue) {
        if call.work.0 > 0 && call.worth > NanoUsd::ZERO {
            self.seen[class_of(call)] += call.work.as_replica_seconds_f64();
        }
    }

    /// Ends a slot: prices the next one, in which the replicas have `room`, and lets the past fade by `keep`
    /// (0 to 1). The histogram is a sum over `1 / (1 - keep)` slots, so the room is scaled alike.
    pub fn end_slot(&mut self, room: Work, keep: f64) -> WorkPrice {
        let keep = keep.clamp(0.0, 0.999);
        let mut left = room.as_replica_seconds_f64() / (1.0 - keep);
        // The last class that fits not at all, or not whole, sets the price; if all fits, nothing does.
        let marginal = (0..CLASSES).rev().find(|class| {
            left -= self.seen[*class];
            left < 0.0
        });
        self.price = marginal.map_or_else(WorkPrice::default, price_of_class);
        self.seen.iter_mut().for_each(|work| *work *= keep);
        self.price
    }

    pub fn price(&self) -> WorkPrice {
        self.price
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to the classes")]
#[expect(clippy::cast_precision_loss, reason = "a ratio, not an amount")]
fn class_of(call: CallValue) -> usize {
    let per_milli = call.worth.as_nanos() as f64 / (call.work.0 as f64 / 1000.0);
    ((per_milli.log2() - FIRST_OCTAVE) * PER_OCTAVE).clamp(0.0, (CLASSES - 1) as f64) as usize
}

/// The lower edge of a class, so that a call of the marginal class is kept.
#[expect(clippy::cast_precision_loss, reason = "a class number is small")]
fn price_of_class(class: usize) -> WorkPrice {
    let per_milli = (class as f64 / PER_OCTAVE + FIRST_OCTAVE).exp2();
    WorkPrice(NanoUsd::from_usd_f64_estimate(per_milli * 1000.0 / 1e9))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(worth_nanos: i64, work_seconds: u64) -> CallValue {
        CallValue { worth: NanoUsd::from_nanos(worth_nanos), work: Work::from_replica_seconds(work_seconds) }
    }

    #[test]
    fn with_room_for_all_a_replica_second_costs_nothing() {
        let mut prices = WorkPrices::default();
        prices.see(call(1_000_000, 10));
        assert_eq!(prices.end_slot(Work::from_replica_seconds(10), 0.0), WorkPrice::default());
    }

    #[test]
    fn when_short_the_calls_worth_most_a_replica_second_stay() {
        let mut prices = WorkPrices::default();
        prices.see(call(1_000_000, 10));
        prices.see(call(9_000_000, 10));
        let price = prices.end_slot(Work::from_replica_seconds(10), 0.0);
        let stays = |call: CallValue| call.worth >= price.of(call.work);
        assert!(
            stays(call(9_000_000, 10)) && stays(call(1_000_000, 10)),
            "the dear ones fill the room, {price:?}"
        );
        let price = {
            prices.see(call(1_000_000, 10));
            prices.see(call(9_000_000, 10));
            prices.end_slot(Work::from_replica_seconds(9), 0.0)
        };
        let stays = |call: CallValue| call.worth >= price.of(call.work);
        assert!(stays(call(9_000_000, 10)) && !stays(call(1_000_000, 10)), "{price:?}");
    }

    #[test]
    fn without_any_room_everything_seen_is_too_cheap_or_marginal() {
        let mut prices = WorkPrices::default();
        prices.see(call(5_000_000, 1));
        let price = prices.end_slot(Work::ZERO, 0.0);
        assert!(price.0 > NanoUsd::from_nanos(4_000_000) && price.0 <= NanoUsd::from_nanos(5_000_000));
    }
}
