//! The fleet-level decision: which backend a pool's traffic prefers, and how many replicas to hold.

use std::time::Duration;

use super::adaptive::Adaptive;
use super::catalog::{PoolSpec, Work};
use super::cheapest::Cheapest;
use super::constant::{ApiOnly, ShareOfWork};
use super::threshold::{Threshold, ThresholdPolicy};
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

impl Decision {
    /// Hold nothing, prefer the API.
    pub const fn api(reason: Reason) -> Self {
        Self { target_replicas: 0, preference: Preference::Api, reason }
    }

    /// Hold that many replicas and prefer them, or the API when there are none.
    pub const fn hold(replicas: u32, reason: Reason) -> Self {
        let preference = if replicas > 0 { Preference::SelfHosted } else { Preference::Api };
        Self { target_replicas: replicas, preference, reason }
    }
}

/// A rule that makes plans. It is told of each slot once, in order, and knows nothing of later ones.
pub trait Policy: Send {
    fn name(&self) -> &'static str;

    /// At the start of a slot (`at`): `finished` is the slot before it, empty at the very first call.
    /// Total: it cannot fail.
    fn decide(&mut self, pool: &PoolSpec, at: Timestamp, finished: &Slot, fleet: Fleet) -> Decision;
}

/// The policies that a route may name.
#[derive(Debug, Clone, PartialEq)]
pub enum PolicyKind {
    Threshold(Threshold),
    Cheapest,
    Adaptive,
    Api,
    SelfHosted,
    /// Share of calls for the self-hosted backend, 0 to 1.
    Split {
        self_hosted_share: f64,
    },
}

/// What the policies have in common.
#[derive(Debug, Clone, PartialEq)]
pub struct PolicySettings {
    /// What "current volume" means.
    pub window: Duration,
    /// Hysteresis: a change must be worth this share.
    pub margin: f64,
    pub min_dwell: Duration,
    /// How often a decision is made.
    pub slot: Duration,
}

impl Default for PolicySettings {
    fn default() -> Self {
        Self {
            window: Duration::from_mins(10),
            margin: 0.10,
            min_dwell: Duration::from_mins(5),
            slot: Duration::from_mins(1),
        }
    }
}

impl PolicySettings {
    /// Whether the last change is old enough for another.
    pub(super) fn may_change(&self, changed_at: Option<Timestamp>, at: Timestamp) -> bool {
        changed_at.is_none_or(|changed| at.since(changed) >= self.min_dwell)
    }

    /// Start of the slot that ends at `at`: when a window that learns of it first was opened.
    pub(super) fn opened_before(&self, at: Timestamp) -> Timestamp {
        at.saturating_sub(self.slot)
    }

    /// An instant inside the slot that ends at `at`.
    pub(super) fn last_instant_before(&self, at: Timestamp) -> Timestamp {
        at.saturating_sub(Duration::from_millis(1).min(self.slot))
    }
}

/// The policy that a route names, as the planner and the simulator run it.
pub fn policy_for(kind: &PolicyKind, settings: &PolicySettings) -> Box<dyn Policy> {
    let settings = settings.clone();
    match kind {
        PolicyKind::Threshold(threshold) => Box::new(ThresholdPolicy::new(threshold.clone(), settings)),
        PolicyKind::Cheapest => Box::new(Cheapest::new(settings)),
        PolicyKind::Adaptive => Box::new(Adaptive::new(settings.slot)),
        PolicyKind::Api => Box::new(ApiOnly),
        PolicyKind::SelfHosted => Box::new(ShareOfWork::all(settings)),
        PolicyKind::Split { self_hosted_share } => Box::new(ShareOfWork::split(*self_hosted_share, settings)),
    }
}
