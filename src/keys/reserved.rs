//! What calls under way hold of a budget, each amount for a limited time.
//!
//! A call gives back what it holds when it ends, and every call ends: by its timeouts, or because its client does
//! not read. Should one not, or last as long as a realtime session may, its amount expires, so that no budget
//! stays closed for something that nobody will pay. Amounts are kept by the minute, which bounds what is kept.

use std::collections::VecDeque;
use std::time::Duration;

use crate::economics::{NanoUsd, Timestamp};

/// What is held longer is given back. Longer than any call takes by default (`timeouts.total`).
pub const LIFETIME: Duration = Duration::from_hours(1);
const LIFETIME_MINUTES: u64 = LIFETIME.as_secs() / 60;
const MILLIS_PER_MINUTE: u64 = 60_000;

/// The minute in which something began to be held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Minute(u64);

/// Amounts held, by the minute in which they began: at most as many as [`LIFETIME`] has, and one.
#[derive(Debug, Default)]
pub struct Reserved {
    total: NanoUsd,
    minutes: VecDeque<(Minute, NanoUsd)>,
}

impl Reserved {
    pub fn total(&self) -> NanoUsd {
        self.total
    }

    /// Holds an amount. Returns what to give it back with.
    pub fn add(&mut self, amount: NanoUsd, now: Timestamp) -> Minute {
        let minute = Minute(now.as_millis() / MILLIS_PER_MINUTE);
        self.total += amount;
        match self.minutes.back_mut() {
            Some((last, held)) if *last >= minute => {
                *held += amount;
                *last
            }
            _ => {
                self.minutes.push_back((minute, amount));
                minute
            }
        }
    }

    /// Gives an amount back, unless it has expired.
    pub fn give_back(&mut self, amount: NanoUsd, since: Minute) {
        let Ok(index) = self.minutes.binary_search_by_key(&since, |(minute, _)| *minute) else { return };
        self.minutes[index].1 -= amount;
        self.total -= amount;
    }

    /// Gives back what is held for too long.
    pub fn expire(&mut self, now: Timestamp) {
        let oldest = Minute((now.as_millis() / MILLIS_PER_MINUTE).saturating_sub(LIFETIME_MINUTES));
        while let Some((_, amount)) = self.minutes.pop_front_if(|(minute, _)| *minute < oldest) {
            self.total -= amount;
        }
    }
}
