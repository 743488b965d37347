//! Where one call goes, given the fleet-level preference and the price of a replica-second.
//!
//! A call goes to the self-hosted backend when its API cost exceeds `price · work + request fee`. A
//! conversation has its prompt cache where its last call was served, so it moves only when the move is worth
//! more than recomputing that prompt: on a replica the recomputation is work at the current price, on the
//! API it is the discount on cached input.

use super::policy::{Preference, Reason};
use super::work::{CallValue, WorkPrice};
use super::{Capacity, NanoUsd, PriceCard, Tier, Usage};

/// What the fleet-level decision leaves to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolState {
    pub preference: Preference,
    pub reason: Reason,
    /// Replicas that can take a call now.
    pub ready_replicas: u32,
    /// Whether a replica has a place free.
    pub has_room: bool,
    pub price: WorkPrice,
}

/// Where a conversation's prompt is cached, and what the cache saves there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stickiness {
    pub at: Preference,
    /// Dollars that computing the cached prompt anew costs, at prices of where it is cached.
    pub cache_worth: NanoUsd,
}

impl Stickiness {
    /// The conversation's last call was served by the API: `cached` tokens of this call's input are cheaper
    /// there, if their model has a discount for them.
    pub fn on_api(card: &PriceCard, usage: &Usage, cached: u64) -> Self {
        let cached = if cached < LEAST_CACHED_BY_API { 0 } else { cached };
        let full = card.cost(usage, Tier::Standard);
        let discounted = card.cost(&usage.with_cached(cached).normalised(), Tier::Standard);
        Self { at: Preference::Api, cache_worth: full.saturating_sub_at_zero(discounted) }
    }

    /// A replica served it: the work of computing `cached` tokens is saved there, at the price of a
    /// replica-second.
    pub fn on_replica(price: WorkPrice, capacity: &Capacity, usage: &Usage, cached: u64) -> Self {
        let full = price.of(capacity.work(usage));
        let less = price.of(capacity.work(&usage.with_cached(cached).normalised()));
        Self { at: Preference::SelfHosted, cache_worth: full.saturating_sub_at_zero(less) }
    }
}

/// OpenAI caches no prompt that is shorter.
const LEAST_CACHED_BY_API: u64 = 1024;

/// One call's destination. A replica that is ready serves even when the API is preferred: its rent is paid.
pub fn route(pool: &PoolState, call: CallValue, conversation: Option<Stickiness>) -> (Preference, Reason) {
    if pool.ready_replicas == 0 {
        return (
            Preference::Api,
            if pool.preference == Preference::Api { pool.reason } else { Reason::Unhealthy },
        );
    }
    if !pool.has_room {
        return (Preference::Api, Reason::Overflow);
    }
    let bonus =
        |side| conversation.filter(|last| last.at == side).map_or(NanoUsd::ZERO, |last| last.cache_worth);
    let gain = call.worth - pool.price.of(call.work) + bonus(Preference::SelfHosted) - bonus(Preference::Api);
    match gain >= NanoUsd::ZERO {
        true => (Preference::SelfHosted, pool.reason),
        false if pool.price > WorkPrice::default() => (Preference::Api, Reason::Overflow),
        false => (Preference::Api, Reason::Cheapest),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{TokenPrice, Work};
    use super::*;

    fn pool(price_nanos: i64) -> PoolState {
        PoolState {
            preference: Preference::SelfHosted,
            reason: Reason::Cheapest,
            ready_replicas: 1,
            has_room: true,
            price: WorkPrice(NanoUsd::from_nanos(price_nanos)),
        }
    }

    fn call(worth: i64) -> CallValue {
        CallValue { worth: NanoUsd::from_nanos(worth), work: Work::from_replica_seconds(1) }
    }

    #[expect(clippy::unnecessary_wraps, reason = "it is what `route` takes")]
    fn sticky(at: Preference, worth: i64) -> Option<Stickiness> {
        Some(Stickiness { at, cache_worth: NanoUsd::from_nanos(worth) })
    }

    #[test]
    fn an_idle_replica_that_is_paid_gets_the_next_call() {
        let idle = PoolState { preference: Preference::Api, ..pool(0) };
        assert_eq!(route(&idle, call(1), None).0, Preference::SelfHosted);
    }

    #[test]
    fn a_full_or_absent_replica_never_does() {
        assert_eq!(
            route(&PoolState { has_room: false, ..pool(0) }, call(9), None),
            (Preference::Api, Reason::Overflow)
        );
        assert_eq!(route(&PoolState { ready_replicas: 0, ..pool(0) }, call(9), None).0, Preference::Api);
    }

    #[test]
    fn when_short_a_call_must_be_worth_its_work() {
        assert_eq!(route(&pool(100), call(100), None), (Preference::SelfHosted, Reason::Cheapest));
        assert_eq!(route(&pool(100), call(99), None), (Preference::Api, Reason::Overflow));
    }

    #[test]
    fn a_call_whose_fee_exceeds_its_api_price_stays_on_the_api() {
        assert_eq!(route(&pool(0), call(-1), None), (Preference::Api, Reason::Cheapest));
    }

    #[test]
    fn a_cache_is_worth_the_discount_on_the_api_and_the_work_on_a_replica() {
        let price = |text| TokenPrice::from_usd_per_million(text).unwrap();
        let mut card = PriceCard::flat(price("2"), price("8"));
        card.standard.cached_input = price("0.5");
        let usage = Usage::new(10_000, 100);
        let on_api = |cached| Stickiness::on_api(&card, &usage, cached).cache_worth;
        assert_eq!(on_api(4_000), "0.006".parse().unwrap());
        assert_eq!(on_api(99_000), "0.015".parse().unwrap(), "at most the whole input");
        assert_eq!(on_api(1_023), NanoUsd::ZERO, "too short to be cached there");
        let capacity =
            Capacity { input_tokens_per_second: 1_000, output_tokens_per_second: 100, max_in_flight: 1 };
        let on_replica =
            |nanos| Stickiness::on_replica(WorkPrice(NanoUsd::from_nanos(nanos)), &capacity, &usage, 4_000);
        assert_eq!(on_replica(50).cache_worth, NanoUsd::from_nanos(200), "four seconds of work");
        assert_eq!(on_replica(0).cache_worth, NanoUsd::ZERO, "while there is room work costs nothing");
    }

    #[test]
    fn a_conversation_stays_while_its_cache_is_worth_more_than_the_move() {
        assert_eq!(route(&pool(100), call(90), sticky(Preference::SelfHosted, 20)).0, Preference::SelfHosted);
        assert_eq!(route(&pool(100), call(90), sticky(Preference::SelfHosted, 5)).0, Preference::Api);
        assert_eq!(route(&pool(100), call(110), sticky(Preference::Api, 20)).0, Preference::Api);
        assert_eq!(route(&pool(100), call(110), sticky(Preference::Api, 5)).0, Preference::SelfHosted);
    }
}
