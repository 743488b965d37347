//! What the replicas turn out to sustain.
//!
//! Only a slot in which every look found every ready replica full says how fast they are; the first of a row of
//! such slots only warms up, because work is counted when its call ends. The speed is relative to the configured
//! capacity, and what the policy sees of demand is divided by it: at speed 0.5 the same call takes twice the
//! replica-seconds. It is applied in steps, so that noise moves nothing, and each step is in the ledger.

use super::pool::CAPACITY_EVENT;
use crate::economics::capacity::{FullSpeed, LearntCapacity};
use crate::economics::{Capacity, Slot, Timestamp, Work};
use crate::fleet::Availability;
use crate::gateway::{FirstTokens, LearntView, Pool};
use crate::ledger::Event;

/// Looks a slot needs to say something.
const LEAST_LOOKS: u32 = 3;
/// A replica with this share of its places taken counts as full: between two calls a place is free for a moment.
const FULL_SHARE: f64 = 0.9;
/// A speed is applied when it has moved by this share of the applied one.
const STEP: f64 = 0.05;
/// First tokens later than the objective may be one in so many.
const ONE_LATE_IN: u64 = 100;
/// First tokens a slot needs to say that the objective held.
const LEAST_FIRST_TOKENS: u64 = 10;

/// Watches one pool.
#[derive(Debug)]
pub(super) struct CapacityWatch {
    learnt: LearntCapacity,
    /// The speed that demand is divided by.
    applied: f64,
    ready: u32,
    looks: u32,
    full_looks: u32,
    busy: Work,
    began: Timestamp,
    /// Whether the slot before was full as well.
    is_warm: bool,
}

impl CapacityWatch {
    pub(super) fn new(speed: f64, now: Timestamp) -> Self {
        Self {
            learnt: LearntCapacity::resumed(speed),
            applied: speed,
            ready: 0,
            looks: 0,
            full_looks: 0,
            busy: Work::ZERO,
            began: now,
            is_warm: false,
        }
    }

    /// Looks at the pool; `busy` is the work that calls settled since the last look have done there.
    /// Besides other proxies, whose work is not seen here, nothing is learnt.
    pub(super) fn look(&mut self, pool: &Pool, busy: Work, is_alone: bool) {
        let fleet = &pool.backend.fleet;
        let ready = fleet.counts().ready;
        if self.looks > 0 && ready != self.ready {
            self.full_looks = 0;
            self.is_warm = false;
        }
        self.ready = ready;
        let places = f64::from(ready) * f64::from(pool.spec.capacity.max_in_flight);
        let is_full =
            fleet.availability() == Availability::Full || f64::from(fleet.in_flight()) >= places * FULL_SHARE;
        self.looks += 1;
        self.full_looks += u32::from(ready > 0 && is_full && is_alone);
        self.busy += busy;
    }

    /// Ends a slot; the speed to apply from now on, if it has changed.
    pub(super) fn end_slot(&mut self, first: FirstTokens, now: Timestamp) -> Option<f64> {
        let was_full = self.looks >= LEAST_LOOKS && self.full_looks == self.looks;
        let elapsed = now.since(self.began).as_secs_f64() * f64::from(self.ready);
        if was_full && self.is_warm && elapsed > 0.0 {
            self.see(self.busy.as_replica_seconds_f64() / elapsed, first);
        }
        self.is_warm = was_full;
        (self.looks, self.full_looks, self.busy, self.began) = (0, 0, Work::ZERO, now);
        let speed = self.learnt.relative_speed();
        let has_moved = (speed / self.applied - 1.0).abs() >= STEP;
        has_moved.then(|| {
            self.applied = (speed * 100.0).round().max(1.0) / 100.0;
            self.applied
        })
    }

    /// A speed above the estimate counts only if first tokens were seen to be in time.
    fn see(&mut self, speed: f64, first: FirstTokens) {
        let is_late = first.late * ONE_LATE_IN > first.count;
        let is_shown = first.count >= LEAST_FIRST_TOKENS;
        if is_shown || speed <= self.learnt.relative_speed() {
            self.learnt.see(FullSpeed { speed, objective_held: !(is_shown && is_late) });
        }
    }

    /// Demand in replica-seconds as they turned out.
    pub(super) fn seen(&self, slot: Slot) -> Slot {
        at_speed(slot, self.applied)
    }

    /// What replicas have room for, in replica-seconds of the configured speed.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "`as` saturates")]
    #[expect(clippy::cast_precision_loss, reason = "an estimate of a speed is no exact number")]
    pub(super) fn room(&self, work: Work) -> Work {
        Work((work.0 as f64 * self.applied).round() as u64)
    }

    pub(super) fn view(&self, configured: &Capacity) -> LearntView {
        let learnt = self.learnt.applied_to(configured);
        LearntView {
            speed: self.learnt.relative_speed(),
            input_tokens_per_second: learnt.input_tokens_per_second,
            output_tokens_per_second: learnt.output_tokens_per_second,
        }
    }
}

/// Demand in replica-seconds of replicas that do `speed` times what is configured.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "`as` saturates")]
#[expect(clippy::cast_precision_loss, reason = "an estimate of a speed is no exact number")]
pub fn at_speed(slot: Slot, speed: f64) -> Slot {
    Slot { work: Work((slot.work.0 as f64 / speed).round() as u64), ..slot }
}

/// The speed that an event of [`CAPACITY_EVENT`] tells of.
pub fn speed_in(event: &Event) -> Option<f64> {
    let speed: f64 = event.detail.split(' ').next()?.parse().ok()?;
    (event.kind == CAPACITY_EVENT && speed.is_finite() && speed > 0.0).then_some(speed)
}
