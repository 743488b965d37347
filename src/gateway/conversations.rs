//! Where conversations were last served, and how much of their prompt is cached there.
//!
//! A table of fixed size, one atomic word an entry: the place is given by the conversation's identity, and who
//! comes later has it. Entries are read without a lock and forgotten when a provider's prompt cache would have
//! dropped them. What is lost by a collision is a hint, nothing else.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::economics::Timestamp;

/// A prompt cache is believed to keep a conversation for so long after its last call: what OpenAI promises at
/// the least.
pub const CACHE_KEPT: Duration = Duration::from_mins(5);

/// Conversations that are remembered at most, in half a megabyte.
const PLACES: usize = 1 << 16;

/// Tokens are kept in steps of so many.
const TOKEN_STEP: u64 = 64;

/// Widths of an entry's fields, from the lowest: seconds, steps of tokens, replica, offer, identity.
const SECOND_BITS: u32 = 16;
const STEP_BITS: u32 = 14;
const REPLICA_BITS: u32 = 8;
const OFFER_BITS: u32 = 6;
const TAG_BITS: u32 = 20;

/// Where a conversation's last call was served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Home {
    /// Position in the route's offers.
    pub offer: usize,
    /// Position among the backend's replicas.
    pub replica: usize,
    /// Tokens of prompt and answer, which the next call repeats; rounded down.
    pub cached_tokens: u64,
}

/// The conversations of late.
#[derive(Debug, Default)]
pub struct Conversations {
    /// Made for the first that is remembered: many proxies never have one.
    places: OnceLock<Box<[AtomicU64]>>,
}

impl Conversations {
    /// Remembers where a call of `conversation` was served. Offers and replicas beyond what an entry can hold
    /// (64 and 256) are not remembered.
    pub fn remember(&self, conversation: u64, home: Home, now: Timestamp) {
        let fields = [
            (seconds(now), SECOND_BITS),
            ((home.cached_tokens / TOKEN_STEP).min(mask(STEP_BITS)), STEP_BITS),
            (home.replica as u64, REPLICA_BITS),
            (home.offer as u64, OFFER_BITS),
            (tag(conversation), TAG_BITS),
        ];
        if fields.iter().any(|(value, bits)| *value > mask(*bits)) {
            return;
        }
        let entry = fields.iter().rev().fold(0, |entry, (value, bits)| (entry << bits) | value);
        let places = self.places.get_or_init(|| (0..PLACES).map(|_| AtomicU64::new(0)).collect());
        places[place(conversation)].store(entry, Ordering::Relaxed);
    }

    /// Where its last call was served, if that is not too long ago.
    pub fn home(&self, conversation: u64, now: Timestamp) -> Option<Home> {
        let mut rest = self.places.get()?[place(conversation)].load(Ordering::Relaxed);
        let mut take = |bits: u32| {
            let value = rest & mask(bits);
            rest >>= bits;
            value
        };
        let (second, steps, replica, offer, tag_seen) =
            (take(SECOND_BITS), take(STEP_BITS), take(REPLICA_BITS), take(OFFER_BITS), take(TAG_BITS));
        let age = seconds(now).wrapping_sub(second) & mask(SECOND_BITS);
        (tag_seen == tag(conversation) && age <= CACHE_KEPT.as_secs()).then_some(Home {
            offer: usize::try_from(offer).ok()?,
            replica: usize::try_from(replica).ok()?,
            cached_tokens: steps * TOKEN_STEP,
        })
    }
}

const fn mask(bits: u32) -> u64 {
    (1 << bits) - 1
}

fn place(conversation: u64) -> usize {
    usize::try_from(conversation & (PLACES as u64 - 1)).unwrap_or(0)
}

/// Never zero, so that an empty place is nobody's.
fn tag(conversation: u64) -> u64 {
    (conversation >> (u64::BITS - TAG_BITS)) | 1
}

/// The low bits of the second; an entry that is a multiple of 18 hours old may be taken for a young one.
fn seconds(now: Timestamp) -> u64 {
    (now.as_millis() / 1000) & mask(SECOND_BITS)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOME: Home = Home { offer: 3, replica: 200, cached_tokens: 64_000 };
    const WHO: u64 = 0xfedc_ba98_7654_3210;

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_secs(1_800_000_000 + seconds)
    }

    #[test]
    fn what_is_remembered_is_found_until_the_cache_has_dropped_it() {
        let conversations = Conversations::default();
        assert_eq!(conversations.home(WHO, at(0)), None);
        conversations.remember(WHO, HOME, at(0));
        assert_eq!(conversations.home(WHO, at(300)), Some(HOME));
        assert_eq!(conversations.home(WHO, at(301)), None);
        // The seconds wrap around within this hour.
        conversations.remember(WHO, HOME, at(65_535 - 1_800_000_000 % 65_536));
        assert_eq!(conversations.home(WHO, at(65_535 - 1_800_000_000 % 65_536 + 60)), Some(HOME));
    }

    #[test]
    fn who_comes_later_has_the_place() {
        let conversations = Conversations::default();
        let other = WHO ^ (1 << 63);
        conversations.remember(WHO, HOME, at(0));
        assert_eq!(conversations.home(other, at(0)), None);
        conversations.remember(other, Home { offer: 0, ..HOME }, at(1));
        assert_eq!(conversations.home(WHO, at(1)), None);
        assert_eq!(conversations.home(other, at(1)).map(|home| home.offer), Some(0));
    }

    #[test]
    fn tokens_are_rounded_down_and_bounded_and_the_unkeepable_is_not_kept() {
        let conversations = Conversations::default();
        for (tokens, kept) in [(63, 0), (130, 128), (u64::MAX, mask(STEP_BITS) * TOKEN_STEP)] {
            conversations.remember(WHO, Home { cached_tokens: tokens, ..HOME }, at(0));
            assert_eq!(conversations.home(WHO, at(0)).map(|home| home.cached_tokens), Some(kept));
        }
        conversations.remember(1, Home { replica: 256, ..HOME }, at(0));
        conversations.remember(2, Home { offer: 64, ..HOME }, at(0));
        assert_eq!((conversations.home(1, at(0)), conversations.home(2, at(0))), (None, None));
    }
}
