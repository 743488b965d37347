//! The ledger: one row a call, with what it cost and what it would have cost elsewhere.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::economics::{NanoUsd, Timestamp, Usage, Work};

/// One row: a logical call, however many attempts it took. Text fields are configured names or tags, never
/// prompts, keys or error bodies.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    pub id: Uuid,
    pub opened_at: Timestamp,
    pub closed_at: Timestamp,
    /// First data event of a stream, or first byte of the body.
    pub first_token_at: Option<Timestamp>,
    /// Public id of the virtual key, empty with pass-through.
    pub key: String,
    pub team: String,
    /// `feature=rank,..`: the tags of the request as given, without the team, at most 256 bytes.
    pub tags: String,
    pub endpoint: String,
    /// Name of the route, empty for models on no route.
    pub route: String,
    pub requested_model: String,
    /// Name at the backend that served it.
    pub served_model: String,
    pub backend: String,
    pub reason: String,
    pub attempts: u32,
    /// HTTP status that the client got.
    pub status: u16,
    pub outcome: Outcome,
    pub stream: bool,
    pub usage: Usage,
    pub usage_source: UsageSource,
    /// `standard`, `batch`, `flex`, `priority`: the tier that was served.
    pub tier: String,
    /// What is attributed to this call: token charges on an API, its share of rent on a self-hosted backend.
    pub cost: NanoUsd,
    /// The same usage on the route's API offer, if it has one.
    pub api_cost: Option<NanoUsd>,
    /// The same usage as its work's share of rent on the route's self-hosted offer, if it has one.
    pub self_hosted_cost: Option<NanoUsd>,
    /// Replica-time the call takes on the route's self-hosted offer.
    pub work: Work,
    /// Charges of attempts that failed and were billed all the same; part of `cost`.
    pub attempts_cost: NanoUsd,
    /// No price was known: `cost` is zero or an estimate.
    pub unpriced: bool,
    pub config_digest: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Success,
    ClientError,
    UpstreamError,
    Timeout,
    Cancelled,
}

impl Outcome {
    pub const ALL: [Self; 5] =
        [Self::Success, Self::ClientError, Self::UpstreamError, Self::Timeout, Self::Cancelled];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::ClientError => "client_error",
            Self::UpstreamError => "upstream_error",
            Self::Timeout => "timeout",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Where a call's token counts came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UsageSource {
    UpstreamUsage,
    OwnTokenizer,
    Estimate,
    None,
}

impl UsageSource {
    pub const ALL: [Self; 4] = [Self::UpstreamUsage, Self::OwnTokenizer, Self::Estimate, Self::None];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::UpstreamUsage => "upstream_usage",
            Self::OwnTokenizer => "own_tokenizer",
            Self::Estimate => "estimate",
            Self::None => "none",
        }
    }
}

/// Rent of a self-hosted backend over an interval. Intervals of a backend are adjacent, never overlap, and
/// `attributed + idle = rent` to the nano-dollar.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RentEntry {
    pub backend: String,
    pub from: Timestamp,
    pub to: Timestamp,
    /// Replica-milliseconds paid for.
    pub replica_millis: u64,
    /// Replica-time that did work.
    pub busy: Work,
    pub rent: NanoUsd,
    /// Sum of the costs of the calls that were settled on this backend in the interval, rent share only.
    pub attributed: NanoUsd,
    /// `rent - attributed`; negative when calls were attributed more than the interval's rent.
    pub idle: NanoUsd,
}

/// A change that an owner may want to see later: preference, replicas, circuit, prices, reload.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    pub at: Timestamp,
    /// `preference`, `replicas`, `circuit`, `prices`, `reload`, `pin`.
    pub kind: String,
    /// Pool or backend it is about.
    pub subject: String,
    /// A sentence.
    pub detail: String,
}
