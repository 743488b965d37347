//! The fleet-level decision: which backend a pool's traffic prefers, and how many replicas to hold.

use super::catalog::{PoolSpec, Work};
use super::{NanoUsd, Timestamp};

/// Demand of one finished slot: all the traffic that the pool could take from the API, wherever it was served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Slot {
    /// What the slot's calls cost, or would have cost, on the API.
    pub api_cost: NanoUsd,
    /// Work of the slot's calls on a replica.
    pub work: Work,
    pub requests: u64,
    pub tokens: u64,
}

impl std::ops::AddAssign for Slot {
    fn add_assign(&mut self, other: Self) {
        self.api_cost += other.api_cost;
        self.work += other.work;
        self.requests += other.requests;
        self.tokens += other.tokens;
    }
}

/// The replicas of a pool that are billed, by state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Fleet {
    pub starting: u32,
    pub ready: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Preference {
    Api,
    SelfHosted,
}

/// Why a call went where it went; also a metric label and a response header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    Cheapest,
    Hysteresis,
    Threshold,
    Pinned,
    OnlyOffer,
    Overflow,
    Unhealthy,
    Failover,
    NotEligible,
}

impl Reason {
    pub const ALL: [Self; 9] = [
        Self::Cheapest,
        Self::Hysteresis,
        Self::Threshold,
        Self::Pinned,
        Self::OnlyOffer,
        Self::Overflow,
        Self::Unhealthy,
        Self::Failover,
        Self::NotEligible,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Cheapest => "cheapest",
            Self::Hysteresis => "hysteresis",
            Self::Threshold => "threshold",
            Self::Pinned => "pinned",
            Self::OnlyOffer => "only_offer",
            Self::Overflow => "overflow",
            Self::Unhealthy => "unhealthy",
            Self::Failover => "failover",
            Self::NotEligible => "not_eligible",
        }
    }
}

/// What a policy wants until it is asked again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decision {
    /// Replicas wanted, starting and ready.
    pub target_replicas: u32,
    pub preference: Preference,
    pub reason: Reason,
}

/// A rule that makes plans. It is told of each slot once, in order, and knows nothing of later ones.
pub trait Policy: Send {
    fn name(&self) -> &'static str;

    /// At the start of a slot (`at`): `finished` is the slot before it, empty at the very first call.
    /// Total: it cannot fail.
    fn decide(&mut self, pool: &PoolSpec, at: Timestamp, finished: &Slot, fleet: Fleet) -> Decision;
}
