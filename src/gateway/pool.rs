//! One self-hosted backend together with the traffic that it could take from the API.

use std::sync::atomic::{AtomicI64, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use serde::Serialize;

use crate::config::{self, BackendKind, Config, Control, RoutePolicy};
use crate::economics::policy::{PolicyKind, PolicySettings};
use crate::economics::time::millis;
use crate::economics::work::{CallValue, WorkPrice, WorkPrices};
use crate::economics::{
    Billing, Decision, NanoUsd, PoolSpec, Preference, Reason, Slot, Timestamp, Usage, Work,
};
use crate::metrics::{Metrics, PoolBackend, PoolSeries};
use crate::upstream::Backend;

use super::volume::SharedVolume;

/// What an owner has pinned a pool to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pin {
    Api,
    SelfHosted,
}

/// The live state of a pool. The request path adds demand and reads the plan; the planner does the reverse.
#[derive(Debug)]
pub struct Pool {
    pub backend: Arc<Backend>,
    pub api: Option<Arc<Backend>>,
    pub spec: PoolSpec,
    pub policy: PolicyKind,
    pub settings: PolicySettings,
    pub series: Arc<PoolSeries>,
    pub own_series: Arc<PoolBackend>,
    pub api_series: Option<Arc<PoolBackend>>,
    /// What the planner saw last, for the status.
    pub view: ArcSwap<PoolView>,
    /// Whether we start and stop replicas. If not, an idle replica is not known to be paid: the preference
    /// alone decides, so that whoever scales it can follow.
    pub is_controlled: bool,
    slot_millis: u64,
    /// Bits: preference, and the reason in the others.
    plan: AtomicU8,
    pin: AtomicU8,
    /// Nano-dollars a replica-second.
    price: AtomicI64,
    /// Demand of the open slot and of those after it, by the slot's number.
    demand: [Demand; DEMAND_SLOTS],
    /// Where there are other proxies. Never touched on the request path.
    volume: Option<Mutex<SharedVolume>>,
    /// The slot that the planner will ask for next.
    open_slot: AtomicU64,
    first_tokens: AtomicU64,
    late_first_tokens: AtomicU64,
    /// Rent attributed to calls, and work done, since the last rent entry.
    attributed: AtomicI64,
    busy: AtomicU64,
    /// Values of recent work. Only ever tried on the request path.
    prices: Mutex<WorkPrices>,
}

/// Slots whose demand is counted at once: the open one, and those that begin before the planner closes it.
const DEMAND_SLOTS: usize = 4;

#[derive(Debug, Default)]
struct Demand {
    api_cost: AtomicI64,
    work: AtomicU64,
    requests: AtomicU64,
    tokens: AtomicU64,
}

/// One pool as `GET /api/status` shows it. Volumes are a clock hour's, amounts in dollars.
#[derive(Debug, Clone, Default, Serialize)]
pub struct PoolView {
    pub volume_requests_per_hour: f64,
    /// Calls in the window, over all proxies.
    pub requests_in_window: u64,
    pub break_even_requests_per_hour: Option<f64>,
    pub band: Option<BandView>,
    pub capacity_requests_per_hour: Option<f64>,
    pub api_usd_per_hour: Option<f64>,
    pub self_hosted_usd_per_hour: Option<f64>,
    pub mix_usd_per_hour: Option<f64>,
    pub kappa: Option<f64>,
    pub sentence: String,
    /// Replicas ordered.
    pub wanted: u32,
    pub learnt: Option<LearntView>,
}

/// What the replicas turned out to sustain.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LearntView {
    /// Relative to the configured capacity.
    pub speed: f64,
    pub input_tokens_per_second: u64,
    pub output_tokens_per_second: u64,
}

/// First tokens of streams that the pool's replicas served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FirstTokens {
    pub count: u64,
    /// Of these, later than [`FIRST_TOKEN_OBJECTIVE`].
    pub late: u64,
}

/// Replicas are as fast as they are while 99 of 100 first tokens come within this time.
pub const FIRST_TOKEN_OBJECTIVE: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Copy, Serialize)]
pub struct BandView {
    pub up: f64,
    pub down: f64,
}

impl Pool {
    /// The pool of a backend, by the policy of the first route that offers it and leaves something to
    /// decide, else of the first route that offers it.
    pub fn of(
        backend: &Arc<Backend>,
        config: &Config,
        backends: &[Arc<Backend>],
        metrics: &Metrics,
    ) -> Option<Self> {
        let BackendKind::SelfHosted(own) = &backend.spec.kind else { return None };
        let route = deciding_route(backend, config)?;
        let api = route
            .offers
            .iter()
            .map(|offer| &backends[usize::from(offer.backend.0)])
            .find(|offer| offer.is_api());
        let series = metrics.pool(backend.name());
        let settings = config.policy.clone();
        Some(Self {
            backend: backend.clone(),
            api: api.cloned(),
            spec: own.pool.clone(),
            policy: route.policy.clone(),
            slot_millis: millis(settings.slot).max(1),
            settings,
            own_series: series.backend(backend.name()),
            api_series: api.map(|api| series.backend(api.name())),
            series,
            view: ArcSwap::default(),
            is_controlled: own.control != Control::None,
            plan: AtomicU8::new(pack(initial(&own.pool, api.is_some()))),
            pin: AtomicU8::new(0),
            price: AtomicI64::new(0),
            demand: Default::default(),
            volume: config.shared.as_ref().map(|_| Mutex::default()),
            open_slot: AtomicU64::new(0),
            first_tokens: AtomicU64::new(0),
            late_first_tokens: AtomicU64::new(0),
            attributed: AtomicI64::new(0),
            busy: AtomicU64::new(0),
            prices: Mutex::default(),
        })
    }

    /// Whether a reload may keep it.
    pub fn fits(&self, backend: &Arc<Backend>, config: &Config) -> bool {
        Arc::ptr_eq(&self.backend, backend)
            && deciding_route(backend, config).is_some_and(|route| route.policy == self.policy)
            && self.settings == config.policy
    }

    pub fn name(&self) -> &str {
        self.backend.name()
    }

    /// Number of the slot that an instant is in.
    pub fn slot_of(&self, at: Timestamp) -> u64 {
        at.as_millis() / self.slot_millis
    }

    pub fn slot_start(&self, slot: u64) -> Timestamp {
        Timestamp::from_millis(slot * self.slot_millis)
    }

    /// Adds a call to the demand of the slot in which it closed, or of the open one if that is over already.
    pub fn record(&self, closed_at: Timestamp, seen: &Slot) {
        let slot = self.slot_of(closed_at).max(self.open_slot.load(Ordering::Relaxed));
        let demand = self.demand_of(slot);
        demand.api_cost.fetch_add(seen.api_cost.as_nanos(), Ordering::Relaxed);
        demand.work.fetch_add(seen.work.0, Ordering::Relaxed);
        demand.requests.fetch_add(seen.requests, Ordering::Relaxed);
        demand.tokens.fetch_add(seen.tokens, Ordering::Relaxed);
        if let Ok(mut prices) = self.prices.try_lock() {
            prices.see(CallValue {
                worth: seen.api_cost.saturating_sub_at_zero(self.spec.request_fee),
                work: seen.work,
            });
        }
    }

    /// Opens a slot: what is recorded from now on is not of an earlier one.
    pub fn open(&self, slot: u64) {
        self.open_slot.store(slot, Ordering::Relaxed);
    }

    /// Counts how long a stream's first token took.
    pub fn first_token(&self, after: Duration) {
        self.first_tokens.fetch_add(1, Ordering::Relaxed);
        if after > FIRST_TOKEN_OBJECTIVE {
            self.late_first_tokens.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Takes what was counted since it was last asked.
    pub fn take_first_tokens(&self) -> FirstTokens {
        FirstTokens {
            count: self.first_tokens.swap(0, Ordering::Relaxed),
            late: self.late_first_tokens.swap(0, Ordering::Relaxed),
        }
    }

    /// Takes the demand of a slot that is over.
    pub fn take(&self, slot: u64) -> Slot {
        let take = || {
            let demand = self.demand_of(slot);
            Slot {
                api_cost: NanoUsd::from_nanos(demand.api_cost.swap(0, Ordering::Relaxed)),
                work: Work(demand.work.swap(0, Ordering::Relaxed)),
                requests: demand.requests.swap(0, Ordering::Relaxed),
                tokens: demand.tokens.swap(0, Ordering::Relaxed),
            }
        };
        let noted = self.with_volume(|volume| {
            let seen = take();
            volume.note_own(slot, seen);
            seen
        });
        noted.unwrap_or_else(take)
    }

    /// Demand of a slot so far, which goes on.
    pub fn demand(&self, slot: u64) -> Slot {
        let demand = self.demand_of(slot);
        Slot {
            api_cost: NanoUsd::from_nanos(demand.api_cost.load(Ordering::Relaxed)),
            work: Work(demand.work.load(Ordering::Relaxed)),
            requests: demand.requests.load(Ordering::Relaxed),
            tokens: demand.tokens.load(Ordering::Relaxed),
        }
    }

    fn demand_of(&self, slot: u64) -> &Demand {
        &self.demand[usize::try_from(slot % DEMAND_SLOTS as u64).unwrap_or(0)]
    }

    /// The slots that are not closed yet at an instant.
    pub fn open_slots(&self, now: Timestamp) -> std::ops::RangeInclusive<u64> {
        let open = self.open_slot.load(Ordering::Relaxed);
        open..=self.slot_of(now).clamp(open, open + DEMAND_SLOTS as u64 - 1)
    }

    /// Notes the demand of the slots that are not closed yet, for the other proxies.
    pub fn note_demand(&self, now: Timestamp) {
        self.with_volume(|volume| {
            // Under the lock, so that none of them is closed meanwhile.
            for slot in self.open_slots(now) {
                volume.note_own(slot, self.demand(slot));
            }
        });
    }

    /// Where there are other proxies, does something with the volume that is shared.
    pub fn with_volume<T>(&self, then: impl FnOnce(&mut SharedVolume) -> T) -> Option<T> {
        let volume = self.volume.as_ref()?;
        Some(then(&mut volume.lock().unwrap_or_else(PoisonError::into_inner)))
    }

    /// Attributes a served call's share of the rent.
    pub fn attribute(&self, share: NanoUsd, work: Work) {
        self.attributed.fetch_add(share.as_nanos(), Ordering::Relaxed);
        self.busy.fetch_add(work.0, Ordering::Relaxed);
    }

    /// Takes what was attributed since it was last asked.
    pub fn take_attributed(&self) -> (NanoUsd, Work) {
        let attributed = NanoUsd::from_nanos(self.attributed.swap(0, Ordering::Relaxed));
        (attributed, Work(self.busy.swap(0, Ordering::Relaxed)))
    }

    /// Whether [`Self::take_attributed`] would take anything.
    pub fn has_attributed(&self) -> bool {
        self.attributed.load(Ordering::Relaxed) != 0 || self.busy.load(Ordering::Relaxed) != 0
    }

    /// Rent of a call's work: its share of a replica's time at the hourly price, rounded down.
    pub fn rent_of(&self, work: Work) -> NanoUsd {
        self.spec.hourly.mul_div_floor(work.0, MICRO_SECONDS_PER_HOUR)
    }

    pub fn work_of(&self, usage: &Usage) -> Work {
        self.spec.capacity.work(usage)
    }

    pub fn plan(&self) -> (Preference, Reason) {
        match self.pin() {
            Some(Pin::Api) => (Preference::Api, Reason::Pinned),
            Some(Pin::SelfHosted) => (Preference::SelfHosted, Reason::Pinned),
            None => unpack(self.plan.load(Ordering::Relaxed)),
        }
    }

    pub fn set_plan(&self, decision: Decision) {
        self.plan.store(pack((decision.preference, decision.reason)), Ordering::Relaxed);
    }

    pub fn pin(&self) -> Option<Pin> {
        match self.pin.load(Ordering::Relaxed) {
            1 => Some(Pin::Api),
            2 => Some(Pin::SelfHosted),
            _ => None,
        }
    }

    pub fn set_pin(&self, pin: Option<Pin>) {
        let code = match pin {
            None => 0,
            Some(Pin::Api) => 1,
            Some(Pin::SelfHosted) => 2,
        };
        self.pin.store(code, Ordering::Relaxed);
    }

    /// The price of a replica-second: work times price where that is how it is paid, else what scarcity makes it.
    pub fn work_price(&self) -> WorkPrice {
        match self.spec.billing {
            Billing::PerUse => WorkPrice(self.spec.hourly.mul_div_floor(1, 3600)),
            Billing::Committed | Billing::WhileRunning => {
                WorkPrice(NanoUsd::from_nanos(self.price.load(Ordering::Relaxed)))
            }
        }
    }

    /// Ends a slot for the price of a replica-second: `room` is what the ready replicas can do in the next.
    pub fn reprice(&self, room: Work) {
        if let Ok(mut prices) = self.prices.lock() {
            let price = prices.end_slot(room, PRICE_KEEP);
            self.price.store(price.0.as_nanos(), Ordering::Relaxed);
        }
    }
}

const MICRO_SECONDS_PER_HOUR: u64 = 3_600_000_000;
/// Share of the last slot's values that the price of a replica-second still goes by.
const PRICE_KEEP: f64 = 0.8;

fn initial(pool: &PoolSpec, has_api: bool) -> (Preference, Reason) {
    match (has_api, pool.billing) {
        (false, _) => (Preference::SelfHosted, Reason::OnlyOffer),
        (true, Billing::Committed) => (Preference::SelfHosted, Reason::Cheapest),
        (true, Billing::WhileRunning | Billing::PerUse) => (Preference::Api, Reason::Cheapest),
    }
}

fn deciding_route<'a>(backend: &Backend, config: &'a Config) -> Option<&'a config::Route> {
    let offering = |route: &&config::Route| route.offers.iter().any(|offer| offer.backend == backend.id);
    let decides = |route: &&config::Route| {
        matches!(route.policy, RoutePolicy::Threshold(_) | RoutePolicy::Cheapest | RoutePolicy::Adaptive)
    };
    let mut offers = config.routes.iter().filter(offering);
    offers.clone().find(decides).or_else(|| offers.next())
}

fn pack((preference, reason): (Preference, Reason)) -> u8 {
    let position = Reason::ALL.iter().position(|other| *other == reason).unwrap_or(0);
    let position = u8::try_from(position).unwrap_or(0);
    (position << 1) | u8::from(preference == Preference::SelfHosted)
}

fn unpack(plan: u8) -> (Preference, Reason) {
    let preference = if plan & 1 == 1 { Preference::SelfHosted } else { Preference::Api };
    (preference, Reason::ALL[usize::from(plan >> 1) % Reason::ALL.len()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_is_what_was_stored() {
        for reason in Reason::ALL {
            for preference in [Preference::Api, Preference::SelfHosted] {
                assert_eq!(unpack(pack((preference, reason))), (preference, reason));
            }
        }
    }
}
