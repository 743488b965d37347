//! Who is there, and who plans.
//!
//! One proxy holds the planner's lease: it orders replicas and books their rent. It renews the lease with every
//! exchange, and acts only until a little before the lease can have ended, by its own clock from the moment it
//! asked. Each new holder has a higher token than all before it.

use std::time::Duration;

use redis::from_redis_value;

use super::{Answers, Exchange, SharedError, Store, number};
use crate::economics::Timestamp;

/// What a proxy wants of the planner's lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// To have it, or to go on having it.
    Take,
    /// To give it back, and be forgotten.
    Leave,
}

/// Rent of a pool is in a ledger up to an instant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Booked {
    pub pool: String,
    pub until: Timestamp,
}

/// What the store says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Beat {
    /// By Redis's clock.
    pub now: Timestamp,
    /// Proxies that were heard lately, this one included.
    pub proxies: u32,
    /// None: another process has the lease, or nobody has.
    pub token: Option<u64>,
    pub booked: Vec<Booked>,
}

/// The holder stops acting this part of a lease before its end.
const MARGIN_PART: u32 = 6;

/// How long after it asked a holder may act.
pub fn validity(lease: Duration) -> Duration {
    lease.saturating_sub(lease / MARGIN_PART)
}

impl Exchange {
    pub fn ask_lease(&mut self, store: &Store, wish: Wish, booked: &[Booked]) {
        let names = ["lease", "token", "proxies", "rent"];
        let command = self.pipeline.cmd("EVALSHA").arg(&store.scripts.beat).arg(names.len());
        for name in names {
            command.arg(store.keys.named(name));
        }
        command.arg(&store.identity.process).arg(store.lease_millis());
        command.arg(match wish {
            Wish::Take => "take",
            Wish::Leave => "leave",
        });
        for Booked { pool, until } in booked {
            command.arg(pool).arg(until.as_millis());
        }
        self.questions += 1;
    }
}

impl Answers {
    pub fn lease(&mut self) -> Result<Beat, SharedError> {
        let words: Vec<String> = from_redis_value(self.next()?)?;
        let [now, proxies, token, _holder, booked @ ..] = words.as_slice() else {
            return Err(SharedError::Strange("the answer about the lease is short".to_owned()));
        };
        let booked = booked.as_chunks().0.iter().map(|[pool, until]| {
            Ok(Booked { pool: pool.clone(), until: Timestamp::from_millis(number(until)?) })
        });
        let token = number(token)?;
        Ok(Beat {
            now: Timestamp::from_millis(number(now)?),
            proxies: number(proxies)?,
            token: (token > 0).then_some(token),
            booked: booked.collect::<Result<_, SharedError>>()?,
        })
    }
}
