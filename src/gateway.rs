//! The shared state of a running gateway: what the request path reads as snapshots and adds to as atomics.

pub mod books;
pub mod buffers;
mod conversations;
pub mod invoices;
pub mod keeper;
pub mod once;
mod pool;
mod retries;
mod route;
pub mod shares;
pub mod sharing;
mod volume;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use arc_swap::ArcSwap;

pub use conversations::{CACHE_KEPT, Conversations, Home};
pub use pool::{BandView, FIRST_TOKEN_OBJECTIVE, FirstTokens, LearntView, Pin, Pool, PoolView};
pub use retries::RetryBudget;
pub use route::{Choice, Circumstances, Refusal, choose};
pub use shares::{Identity, Shares};
pub use sharing::{Authority, RentDuty, Sharing, kept_slots};
pub use volume::SharedSlot;

use crate::clock::Clock;
use crate::config::{self, BackendId, Config, RouteId};
use crate::economics::length::OutputLength;
use crate::economics::{PriceCard, Timestamp};
use crate::keys::Keys;
use crate::ledger::{Event, Ledger};
use crate::metrics::{Metrics, Series};
use crate::openai::tokenizer::Ratio;
use crate::proxy::count::Counter;
use crate::proxy::vocabularies::Vocabularies;
use crate::shared;
use crate::telemetry::spans::Spans;
use crate::upstream::{Backend, BaseUrlError};
use buffers::Buffers;
use shares::Held;

/// Everything that a call needs besides itself. One for the process, shared by all workers.
#[derive(Debug)]
pub struct Gateway {
    pub clock: Clock,
    pub ledger: Ledger,
    pub metrics: Metrics,
    pub retries: RetryBudget,
    pub counter: Counter,
    pub vocabularies: Vocabularies,
    pub keys: Keys,
    pub spans: Spans,
    pub conversations: Conversations,
    /// What is billed when it is read, as far as it was read lately.
    pub billed: once::Once,
    pub invoices: invoices::Invoices,
    /// None: there are no other proxies.
    pub sharing: Option<Sharing>,
    state: ArcSwap<State>,
    in_flight: AtomicUsize,
    /// What request bodies take.
    pub buffers: Buffers,
    shares: Arc<Shares>,
    draining: AtomicBool,
    cut_off: AtomicBool,
}

/// What a configuration became. A reload makes a new one, and takes over what has not changed.
#[derive(Debug)]
pub struct State {
    pub config: Arc<Config>,
    pub backends: Vec<Arc<Backend>>,
    pub routes: Vec<Arc<Route>>,
    pub pools: Vec<Arc<Pool>>,
}

/// A route with the live state of its offers.
#[derive(Debug)]
pub struct Route {
    pub id: RouteId,
    pub spec: config::Route,
    pub offers: Vec<Offer>,
    /// The pool of the first self-hosted offer, whose plan decides between the two sides.
    pub pool: Option<Arc<Pool>>,
    /// Tokens a byte of this route's requests.
    pub ratio: Ratio,
    /// Lengths of its answers. Only ever tried, never waited for.
    pub lengths: Mutex<OutputLength>,
}

#[derive(Debug)]
pub struct Offer {
    pub backend: Arc<Backend>,
    pub spec: config::Offer,
    /// What its replicas cost, if they are rented.
    pub pool: Option<Arc<Pool>>,
    series: ArcSwap<HashMap<(String, String), Arc<Series>>>,
}

impl Offer {
    /// Its price for a client's model, if one is known.
    pub fn card<'a>(&'a self, config: &'a Config, model: &'a str) -> Option<&'a PriceCard> {
        self.spec.price.as_ref().or_else(|| config.prices.card(self.upstream_model(model)))
    }

    /// The model's name at the backend.
    pub fn upstream_model<'a>(&'a self, model: &'a str) -> &'a str {
        self.spec.model.as_deref().unwrap_or(model)
    }

    /// The metric series of a client's model and team here, resolved once.
    pub fn series(&self, metrics: &Metrics, model: &str, team: &str) -> Arc<Series> {
        let known = self.series.load();
        // The key is owned, so look by comparison: a route has a handful of models and teams.
        if let Some(found) = known.iter().find(|((m, t), _)| m == model && t == team) {
            return found.1.clone();
        }
        let found = metrics.series(self.backend.name(), model, team);
        if known.len() < MAX_CACHED_SERIES {
            let mut more = HashMap::clone(&known);
            more.insert((model.to_owned(), team.to_owned()), found.clone());
            self.series.store(Arc::new(more));
        }
        found
    }
}

/// Resolved series kept with an offer; others are looked up each time.
const MAX_CACHED_SERIES: usize = 16;

impl Gateway {
    pub fn new(config: Arc<Config>, clock: Clock, ledger: Ledger) -> Result<Arc<Self>, BaseUrlError> {
        let metrics = Metrics::new(&config);
        let retries = RetryBudget::new(config.retry.budget_ratio);
        let sharing = config
            .shared
            .clone()
            .map(|settings| Sharing::new(settings, shared::Identity::beside(&config.ledger.path)));
        let state = State::build(config, &clock, &metrics, &ledger, None)?;
        state.order_under(sharing.as_ref());
        Ok(Arc::new(Self {
            clock,
            ledger,
            metrics,
            retries,
            counter: Counter::default(),
            vocabularies: Vocabularies::default(),
            keys: Keys::default(),
            spans: Spans::default(),
            conversations: Conversations::default(),
            billed: once::Once::default(),
            invoices: invoices::Invoices::default(),
            sharing,
            state: ArcSwap::from_pointee(state),
            in_flight: AtomicUsize::new(0),
            buffers: Buffers::default(),
            shares: Arc::default(),
            draining: AtomicBool::new(false),
            cut_off: AtomicBool::new(false),
        }))
    }

    /// The state in force. Held for the length of a call, so that a reload cannot change it half-way.
    pub fn state(&self) -> Arc<State> {
        self.state.load_full()
    }

    /// Puts a new configuration in force for the calls that come.
    pub fn reconfigure(&self, config: Arc<Config>) -> Result<(), BaseUrlError> {
        self.metrics.reconfigure(&config);
        let before = self.state.load_full();
        let state = State::build(config, &self.clock, &self.metrics, &self.ledger, Some(&before))?;
        state.order_under(self.sharing.as_ref());
        self.state.store(Arc::new(state));
        Ok(())
    }

    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }

    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Counts a call in; none when `limit` are in already.
    pub fn enter(self: &Arc<Self>, limit: usize) -> Option<Presence> {
        let before = self.in_flight.fetch_add(1, Ordering::Relaxed);
        let presence = Presence { gateway: self.clone(), free: limit.saturating_sub(before), held: None };
        (before < limit).then_some(presence)
    }

    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    pub fn begin_drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Whether answers that are under way are to end now, with a word of why.
    pub fn is_cut_off(&self) -> bool {
        self.cut_off.load(Ordering::Relaxed)
    }

    pub fn cut_off(&self) {
        self.cut_off.store(true, Ordering::Relaxed);
    }

    /// Notes a change that an owner may want to see later.
    pub fn note(&self, kind: &str, subject: &str, detail: String) {
        let event = Event { at: self.now(), kind: kind.to_owned(), subject: subject.to_owned(), detail };
        self.ledger.append_event(&event);
    }
}

/// A call that is in flight, counted out on drop.
#[derive(Debug)]
pub struct Presence {
    gateway: Arc<Gateway>,
    /// Places that were free when it came, its own included.
    free: usize,
    held: Option<Held>,
}

impl Presence {
    /// Counts it as one of its caller's. False when that one has its share of the places already.
    pub fn claim(&mut self, who: Identity<'_>, share: f64) -> bool {
        self.held = self.gateway.shares.enter(who, self.free, share);
        self.held.is_some()
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.gateway.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

impl State {
    /// Lets orders bear the token of the planner's lease.
    fn order_under(&self, sharing: Option<&Sharing>) {
        let Some(sharing) = sharing else { return };
        for backend in &self.backends {
            backend.fleet.order_under(sharing.last_token());
        }
    }

    fn build(
        config: Arc<Config>,
        clock: &Clock,
        metrics: &Metrics,
        ledger: &Ledger,
        before: Option<&Self>,
    ) -> Result<Self, BaseUrlError> {
        let mut backends = Vec::with_capacity(config.backends.len());
        for (index, spec) in config.backends.iter().enumerate() {
            let id = BackendId(u16::try_from(index).unwrap_or(u16::MAX));
            let passes_credentials = config.recipient_of_credentials() == Some(id);
            let kept = before.and_then(|before| {
                before
                    .backends
                    .iter()
                    .find(|old| old.id == id && old.is_configured_as(spec, passes_credentials))
            });
            backends.push(match kept {
                Some(backend) => backend.clone(),
                None => Arc::new(Backend::new(
                    id,
                    spec.clone(),
                    passes_credentials,
                    metrics.backend(&spec.name),
                    clock,
                    ledger,
                )?),
            });
        }
        let mut pools: Vec<Arc<Pool>> = Vec::new();
        for backend in backends.iter().filter(|backend| !backend.is_api()) {
            let kept = before.and_then(|before| before.pools.iter().find(|pool| pool.fits(backend, &config)));
            if let Some(pool) =
                kept.cloned().or_else(|| Pool::of(backend, &config, &backends, metrics).map(Arc::new))
            {
                pools.push(pool);
            }
        }
        let routes = config
            .routes
            .iter()
            .enumerate()
            .map(|(index, spec)| Arc::new(Route::build(index, spec, &backends, &pools, before)))
            .collect();
        Ok(Self { config, backends, routes, pools })
    }

    pub fn route_of(&self, model: &str) -> Option<&Arc<Route>> {
        let id = self.config.models.get(model)?;
        self.routes.get(usize::from(id.0))
    }

    pub fn backend_named(&self, name: &str) -> Option<&Arc<Backend>> {
        self.backends.iter().find(|backend| backend.name() == name)
    }

    pub fn default_backend(&self) -> Option<&Arc<Backend>> {
        self.config.default_backend().map(|id| &self.backends[usize::from(id.0)])
    }

    pub fn pool_named(&self, name: &str) -> Option<&Arc<Pool>> {
        self.pools.iter().find(|pool| pool.name() == name)
    }
}

impl Route {
    fn build(
        index: usize,
        spec: &config::Route,
        backends: &[Arc<Backend>],
        pools: &[Arc<Pool>],
        before: Option<&State>,
    ) -> Self {
        let offers: Vec<Offer> = spec
            .offers
            .iter()
            .map(|offer| Offer {
                backend: backends[usize::from(offer.backend.0)].clone(),
                spec: offer.clone(),
                pool: pools.iter().find(|pool| pool.backend.id == offer.backend).cloned(),
                series: ArcSwap::default(),
            })
            .collect();
        let pool = offers.iter().find(|offer| !offer.backend.is_api()).and_then(|own| own.pool.clone());
        let old = before.and_then(|before| before.routes.iter().find(|old| old.spec.name == spec.name));
        let lengths =
            old.and_then(|old| old.lengths.lock().ok().map(|lengths| lengths.clone())).unwrap_or_default();
        let ratio = Ratio::new();
        Self {
            id: RouteId(u16::try_from(index).unwrap_or(u16::MAX)),
            spec: spec.clone(),
            offers,
            pool,
            ratio,
            lengths: Mutex::new(lengths),
        }
    }

    /// The route of a model that is on none: one API, under the model's own name.
    pub fn alone(backend: Arc<Backend>, model: &str) -> Self {
        let offer = config::Offer {
            backend: backend.id,
            model: None,
            price: None,
            context_window: None,
            tokenizer: None,
            features: config::dialect::api_features(),
        };
        Self {
            id: RouteId(u16::MAX),
            spec: config::Route {
                name: String::new(),
                models: vec![model.to_owned()],
                policy: config::RoutePolicy::Api,
                offers: vec![offer.clone()],
            },
            offers: vec![Offer { backend, spec: offer, pool: None, series: ArcSwap::default() }],
            pool: None,
            ratio: Ratio::new(),
            lengths: Mutex::default(),
        }
    }

    /// The offer that the API side of a comparison is priced by.
    pub fn api_offer(&self) -> Option<&Offer> {
        self.offers.iter().find(|offer| offer.backend.is_api())
    }

    pub fn own_offer(&self) -> Option<&Offer> {
        self.offers.iter().find(|offer| !offer.backend.is_api())
    }

    /// Output tokens to expect of a call.
    pub fn expected_output(&self, max_tokens: Option<u64>) -> u64 {
        match self.lengths.try_lock() {
            Ok(lengths) => lengths.estimate(max_tokens),
            Err(_) => max_tokens.unwrap_or(OUTPUT_GUESS).min(OUTPUT_GUESS),
        }
    }

    /// Learns from a call whose usage was reported. A lesson that finds the book in use is skipped.
    pub fn learn(&self, input_bytes: usize, input_tokens: u64, max_tokens: Option<u64>, output_tokens: u64) {
        self.ratio.observe(input_bytes, input_tokens);
        if let Ok(mut lengths) = self.lengths.try_lock() {
            lengths.learn(max_tokens, output_tokens);
        }
    }
}

/// Output tokens expected when the estimator is in use by another thread.
const OUTPUT_GUESS: u64 = 256;
