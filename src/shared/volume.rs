//! Volume: the sum of what each proxy has seen, slot by slot.
//!
//! A hash for each pool and slot has a field for each proxy, with that proxy's own sum so far. Only its proxy
//! writes a field, so a write that is repeated changes nothing, and whoever reads adds the fields up (a
//! grow-only counter; Shapiro et al., 2011). A proxy writes a field in every slot, if only zeros: the oldest
//! slot there is says since when the deployment has been looking.
//!
//! Only the last slots are exchanged all the time. Who tells older ones, because it was away or has found them in
//! its ledger, counts that up when it has told all, and who sees another count than before reads the past again.

use std::time::Duration;

use redis::from_redis_value;

use super::{Answers, Exchange, SharedError, Store, number};
use crate::economics::time::millis;
use crate::economics::{NanoUsd, Slot, Work};

/// What the other proxies have seen in a slot; none where no other has been looking.
pub type Others = Option<Slot>;

impl Exchange {
    /// Tells what we have seen in a slot, in all.
    pub fn tell_volume(&mut self, store: &Store, pool: &str, slot: u64, seen: &Slot, keep: Duration) {
        let key = key(store, pool, slot);
        let Slot { api_cost, work, requests, tokens } = seen;
        let value = format!("{} {} {requests} {tokens}", api_cost.as_nanos(), work.0);
        self.pipeline.hset(&key, &store.identity.proxy, value).ignore();
        self.pipeline.cmd("PEXPIRE").arg(&key).arg(millis(keep)).ignore();
    }

    pub fn ask_volume(&mut self, store: &Store, pool: &str, slot: u64) {
        self.pipeline.hgetall(key(store, pool, slot));
        self.questions += 1;
    }

    /// Our whole past has been told.
    pub fn past_is_told(&mut self, store: &Store, keep: Duration) {
        let key = pasts(store);
        self.pipeline.incr(&key, 1).ignore();
        self.pipeline.cmd("PEXPIRE").arg(&key).arg(millis(keep)).ignore();
    }

    pub fn ask_pasts(&mut self, store: &Store) {
        self.pipeline.get(pasts(store));
        self.questions += 1;
    }
}

impl Answers {
    /// How often a past was told, as far as the store remembers.
    pub fn pasts(&mut self) -> Result<u64, SharedError> {
        Ok(from_redis_value::<Option<u64>>(self.next()?)?.unwrap_or_default())
    }

    /// What the others have seen in the slot that was asked for.
    pub fn volume(&mut self, store: &Store) -> Result<Others, SharedError> {
        let fields: Vec<(String, String)> = from_redis_value(self.next()?)?;
        let mut others = None;
        for (proxy, value) in fields {
            if proxy != store.identity.proxy {
                *others.get_or_insert_with(Slot::default) += parse(&value)?;
            }
        }
        Ok(others)
    }
}

fn pasts(store: &Store) -> String {
    store.keys.named("volume:pasts")
}

fn key(store: &Store, pool: &str, slot: u64) -> String {
    store.keys.named(&format!("volume:{pool}:{slot}"))
}

fn parse(value: &str) -> Result<Slot, SharedError> {
    let strange = || SharedError::Strange(format!("`{value}` is no volume"));
    let mut numbers = value.split(' ');
    let mut next = || numbers.next().ok_or_else(strange);
    Ok(Slot {
        api_cost: NanoUsd::from_nanos(number(next()?)?),
        work: Work(number(next()?)?),
        requests: number(next()?)?,
        tokens: number(next()?)?,
    })
}
