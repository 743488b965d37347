//! Budgets: each proxy is allotted a part of what is left, and spends it without asking.
//!
//! The script (`budget.lua`) allots never more than the budget to all proxies together. What a proxy does not
//! need it gives back, half of it each time, and who is busy gets half of what is free. What was allotted to a
//! proxy that died is free again after `shared.lease`; what it has spent stays spent.

use std::time::Duration;

use redis::from_redis_value;

use super::{Answers, Exchange, SharedError, Store, number};
use crate::economics::time::millis;
use crate::economics::{NanoUsd, Timestamp};

/// How a proxy stands with a budget.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    pub name: String,
    /// When the budget's period began.
    pub from: Timestamp,
    /// How long from now on its record is needed.
    pub life: Duration,
    pub limit: NanoUsd,
    /// What our calls have spent in the period.
    pub spent: NanoUsd,
    /// The same, with what calls under way hold.
    pub used: NanoUsd,
    /// What we may use until the answer; none when we were never allotted anything.
    pub kept: Option<NanoUsd>,
    /// What we might have used before we gave part of it back.
    pub had: Option<NanoUsd>,
    /// Whether calls have used it since the last claim.
    pub is_busy: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allotment {
    /// What we may have used in all until we ask again.
    pub allotted: NanoUsd,
    pub others_spent: NanoUsd,
}

impl Exchange {
    pub fn claim_budget(&mut self, store: &Store, claim: &Claim, proxies: u32) {
        let key = store.keys.named(&format!("budget:{}:{}", claim.name, claim.from.as_millis()));
        self.pipeline
            .cmd("EVALSHA")
            .arg(&store.scripts.budget)
            .arg(1)
            .arg(key)
            .arg(&store.identity.proxy)
            .arg(claim.limit.as_nanos())
            .arg(claim.spent.as_nanos())
            .arg(claim.used.as_nanos())
            .arg(claim.kept.map_or(-1, NanoUsd::as_nanos))
            .arg(u8::from(claim.is_busy))
            .arg(proxies.max(1))
            .arg(store.lease_millis())
            .arg(millis(claim.life))
            .arg(claim.had.map_or(-1, NanoUsd::as_nanos));
        self.questions += 1;
    }
}

impl Answers {
    pub fn budget(&mut self) -> Result<Allotment, SharedError> {
        let (allotted, others_spent, _left): (String, String, String) = from_redis_value(self.next()?)?;
        Ok(Allotment {
            allotted: NanoUsd::from_nanos(number(&allotted)?),
            others_spent: NanoUsd::from_nanos(number(&others_spent)?),
        })
    }
}
