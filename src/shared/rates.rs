//! Rate limits of keys: like budgets, of which a limit's worth comes back every minute.

use redis::from_redis_value;

use super::{Answers, Exchange, SharedError, Store, number};

/// What a key's limit counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    Requests,
    Tokens,
}

/// How this process stands with a limit. Amounts are units since the process began.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// Public id of the key.
    pub key: String,
    pub unit: Unit,
    pub per_minute: u64,
    pub taken: i64,
    /// `taken` as it was when the last answer came.
    pub before: i64,
    /// What we may still take until the answer.
    pub kept: u64,
    /// Whether calls have taken of it, or were refused, since the last claim.
    pub is_busy: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allotment {
    /// What we may take beyond what we had taken when we asked.
    pub more: u64,
    /// What is free of the limit, over all proxies; negative when it is owed.
    pub free: i64,
}

impl Exchange {
    pub fn claim_rate(&mut self, store: &Store, claim: &Claim, proxies: u32) {
        let unit = match claim.unit {
            Unit::Requests => "requests",
            Unit::Tokens => "tokens",
        };
        self.pipeline
            .cmd("EVALSHA")
            .arg(&store.scripts.rate)
            .arg(1)
            .arg(store.keys.named(&format!("rate:{}:{unit}", claim.key)))
            .arg(&store.identity.process)
            .arg(claim.per_minute)
            .arg(claim.taken)
            .arg(claim.before)
            .arg(claim.kept)
            .arg(u8::from(claim.is_busy))
            .arg(proxies.max(1))
            .arg(store.lease_millis());
        self.questions += 1;
    }
}

impl Answers {
    pub fn rate(&mut self) -> Result<Allotment, SharedError> {
        let (more, free): (String, String) = from_redis_value(self.next()?)?;
        Ok(Allotment { more: number(&more)?, free: number(&free)? })
    }
}
