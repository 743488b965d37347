//! What a self-hosted backend costs and can do.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{NanoUsd, Usage};

/// When the rent of a replica is due. It decides what an idle replica is worth (see the crate's
/// architecture notes): paid anyway, paid while it is up, or paid per second of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Billing {
    Committed,
    #[default]
    WhileRunning,
    PerUse,
}

impl Billing {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Committed => "committed",
            Self::WhileRunning => "while_running",
            Self::PerUse => "per_use",
        }
    }
}

/// What one replica sustains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    pub input_tokens_per_second: u64,
    pub output_tokens_per_second: u64,
    pub max_in_flight: u32,
}

/// Work in micro-replica-seconds: a fully used replica does 1,000,000 a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Work(pub u64);

impl Work {
    pub const ZERO: Self = Self(0);

    pub const fn from_replica_seconds(seconds: u64) -> Self {
        Self(seconds * 1_000_000)
    }

    #[expect(clippy::cast_precision_loss, reason = "a ratio, not an amount")]
    pub fn as_replica_seconds_f64(self) -> f64 {
        self.0 as f64 / 1e6
    }
}

impl std::ops::Add for Work {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}

impl std::ops::AddAssign for Work {
    fn add_assign(&mut self, other: Self) {
        self.0 += other.0;
    }
}

impl std::iter::Sum for Work {
    fn sum<I: Iterator<Item = Self>>(works: I) -> Self {
        works.fold(Self::ZERO, |sum, work| sum + work)
    }
}

impl Capacity {
    /// Work of a call on one replica: `fresh_input / input_tps + output / output_tps`, rounded up to a
    /// micro-replica-second.
    pub fn work(&self, usage: &Usage) -> Work {
        let part = |tokens: u64, per_second: u64| {
            u64::try_from((u128::from(tokens) * 1_000_000).div_ceil(u128::from(per_second.max(1))))
                .unwrap_or(u64::MAX)
        };
        Work(
            part(usage.fresh_input_tokens(), self.input_tokens_per_second)
                .saturating_add(part(usage.output_tokens, self.output_tokens_per_second)),
        )
    }
}

/// One self-hosted backend, as the economics see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolSpec {
    /// Rent of one replica for one hour.
    pub hourly: NanoUsd,
    pub billing: Billing,
    /// Glue paid per request, whatever its size.
    pub request_fee: NanoUsd,
    pub capacity: Capacity,
    /// From the order to start until the replica is ready.
    pub startup: Duration,
    /// Shortest time that is billed.
    pub minimum: Duration,
    pub max_replicas: u32,
}

impl PoolSpec {
    /// What is compared unless something else is said: an 8B model on one H100 (prices of 2026-10).
    pub const fn small_model_on_an_h100() -> Self {
        Self {
            hourly: NanoUsd::from_nanos(2_990_000_000),
            billing: Billing::WhileRunning,
            request_fee: NanoUsd::ZERO,
            capacity: Capacity {
                input_tokens_per_second: 15_000,
                output_tokens_per_second: 10_000,
                max_in_flight: 64,
            },
            startup: Duration::from_mins(5),
            minimum: Duration::from_mins(1),
            max_replicas: 32,
        }
    }

    /// Rent of one replica over an interval that began `from_millis` and ends `to_millis` after its start:
    /// a difference of cumulative floors, so adjacent intervals add up exactly.
    pub fn rent_between(&self, from_millis: u64, to_millis: u64) -> NanoUsd {
        self.hourly.mul_div_floor(to_millis, 3_600_000) - self.hourly.mul_div_floor(from_millis, 3_600_000)
    }
}
