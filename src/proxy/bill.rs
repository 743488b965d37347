//! What a call costs, and what the same call would have cost elsewhere.

use crate::config::{Config, UnknownPrice};
use crate::economics::{Billing, NanoUsd, PriceCard, Tier, Usage, Work};
use crate::gateway::{Offer, Pool, Route};

/// The amounts of one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bill {
    /// Attributed to the call: token charges, or its share of rent and the fee.
    pub cost: NanoUsd,
    /// Of `cost`, what is a share of rent.
    pub rent_share: NanoUsd,
    pub api_cost: Option<NanoUsd>,
    pub self_hosted_cost: Option<NanoUsd>,
    pub work: Work,
    pub unpriced: bool,
}

/// Bills a usage that an offer of a route served.
pub fn bill(config: &Config, route: &Route, served: &Offer, model: &str, usage: &Usage, tier: Tier) -> Bill {
    let api = if served.backend.is_api() { Some(served) } else { route.api_offer() };
    let own = if served.backend.is_api() { route.own_offer() } else { Some(served) };
    // Elsewhere it would have been served at the standard tier; where it was served, at the tier it was.
    let api_tier = if served.backend.is_api() { tier } else { Tier::Standard };
    let card = api.and_then(|offer| card(config, offer, model));
    let api_cost = card.map(|card| card.cost(usage, api_tier));
    let pool = own.and_then(|offer| offer.pool.as_deref());
    let work = pool.map_or(Work::ZERO, |pool| pool.work_of(usage));
    let self_hosted_cost = pool.map(|pool| pool.rent_of(work) + pool.spec.request_fee);
    match (served.backend.is_api(), pool) {
        (false, Some(pool)) => Bill {
            cost: self_hosted_cost.unwrap_or_default(),
            rent_share: pool.rent_of(work),
            api_cost,
            self_hosted_cost,
            work,
            unpriced: false,
        },
        _ => Bill {
            cost: api_cost.unwrap_or_default(),
            rent_share: NanoUsd::ZERO,
            api_cost,
            self_hosted_cost,
            work,
            unpriced: api_cost.is_none() && usage.total_tokens() > 0,
        },
    }
}

/// Bills a usage of a model on no route, served by the API under its own name.
pub fn bill_unrouted(config: &Config, model: &str, usage: &Usage, tier: Tier) -> Bill {
    let card = config.prices.card(model).or_else(|| estimate(config));
    let api_cost = card.map(|card| card.cost(usage, tier));
    Bill {
        cost: api_cost.unwrap_or_default(),
        api_cost,
        unpriced: config.prices.card(model).is_none() && usage.total_tokens() > 0,
        ..Bill::default()
    }
}

/// What an attempt is estimated to cost that had all of a request and brought no answer: its input at an API. On own
/// hardware the fee, and the work that its input is where rent is due by the second of work; elsewhere the time that
/// it took is rent that is due anyway.
pub fn attempt(config: &Config, offer: &Offer, model: &str, input: &Usage, tier: Tier) -> NanoUsd {
    if offer.backend.is_api() {
        return card(config, offer, model).map(|card| card.cost(input, tier)).unwrap_or_default();
    }
    let Some(pool) = &offer.pool else { return NanoUsd::ZERO };
    let rent = if is_paid_per_use(pool) { pool.rent_of(pool.work_of(input)) } else { NanoUsd::ZERO };
    pool.spec.request_fee + rent
}

/// Whether rent of this pool falls due by the second of work, so that a call's share is all there is.
pub fn is_paid_per_use(pool: &Pool) -> bool {
    pool.spec.billing == Billing::PerUse
}

fn card<'a>(config: &'a Config, offer: &'a Offer, model: &'a str) -> Option<&'a PriceCard> {
    offer.card(config, model).or_else(|| estimate(config))
}

/// The dearest card of the book, where the owner wants unknown models priced by it.
fn estimate(config: &Config) -> Option<&PriceCard> {
    if config.unknown_price != UnknownPrice::Estimate {
        return None;
    }
    config.prices.cards.values().max_by_key(|card| card.standard.output)
}
