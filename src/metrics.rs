//! Every figure that Prometheus reads.
//!
//! Three rules. Labels come from the configuration, and what does not is folded into `other`, so a scrape
//! stays below `metrics.max_series` lines. Counters start at zero with the process and are there from the
//! first scrape: a counter restored from the ledger, or one that appears with its first event, would make
//! `increase()` lie. Money is counted in nano-dollars and divided when it is rendered.
//!
//! A caller resolves what it counts on ([`Metrics::series`], [`Metrics::backend`], [`Metrics::pool`]) once
//! and keeps it; counting then touches atomics only.

pub mod backend;
pub mod catalogue;
mod exposition;
mod instruments;
pub mod pool;
pub mod series;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use prometheus::{Registry, TextEncoder};

pub use self::backend::{AttemptResult, BackendSeries, CircuitState, Fault, SpendKind};
pub use self::pool::{CostPerRequest, PoolBackend, PoolObservation, PoolSeries};
pub use self::series::Series;

use self::instruments::{Counter, Gauge, Histogram, Level, Named};
use self::series::{Comparison, ModelTeams, TokenType, TokenTypes};
use crate::clock::Stopwatch;
use crate::config::{BackendKind, Config, Route};
use crate::economics::{NanoUsd, PriceCard, Prices, Timestamp, TokenPrice};
use crate::ledger::postgres::Shipping;
use crate::ledger::{Outcome, UsageSource};

/// What `GET /metrics` is served as.
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// The label value for everything that is not configured.
pub const OTHER: &str = "other";

const REVISION: &str = match option_env!("BREAKEVEN_REVISION") {
    Some(revision) => revision,
    None => "unknown",
};

/// Reasons that are there from the first scrape, at zero. Others may be given; they are `&'static str`, so
/// their number is bounded by the program.
pub const REJECTIONS: [&str; 14] = [
    "authentication",
    "bad_request",
    "budget",
    "draining",
    "internal",
    "ledger_unavailable",
    "no_backend",
    "not_allowed",
    "overloaded",
    "queue_full",
    "rate_limit",
    "timeout",
    "too_large",
    "unpriced",
];

/// Budgets shown; those beyond are counted in `breakeven_label_overflow_total`.
const MAX_BUDGETS: usize = 50;

/// Prices may take this part of all lines (one in four); those beyond are not shown.
const PRICES_SHARE: usize = 4;

/// Lines of one backend and model: three histograms of 15 buckets, and the unpriced calls.
const LINES_PER_MODEL_OF_BACKEND: usize = 3 * (15 + 3) + 1;
/// Lines of one model: a histogram of 10 buckets, and two counts.
const LINES_PER_MODEL: usize = 10 + 3 + 2;
/// Lines of one budget: its limit, what is spent, and the two ends of its period.
const LINES_PER_BUDGET: usize = 4;
/// Lines of one backend, model and team, without its tokens.
const LINES_PER_SERIES: usize = Outcome::ALL.len() + 1;

/// All metrics of a process. Cheap to clone; the clones count together.
#[derive(Debug, Clone)]
pub struct Metrics {
    store: Arc<Store>,
    registry: Registry,
}

#[derive(Debug)]
struct Store {
    known: ArcSwap<Known>,
    lines: AtomicUsize,
    backends: Named<BackendSeries>,
    pools: Named<PoolSeries>,
    models: Named<ModelShared>,
    rejected: Named<Named<Counter>>,
    fallbacks: Named<Named<[Counter; Fault::ALL.len()]>>,
    prices: ArcSwap<Vec<PriceInForce>>,
    budgets: ArcSwap<Vec<BudgetState>>,
    periods: ArcSwap<Vec<(Period, PeriodAmounts)>>,
    overhead: Histogram,
    token_counts: [Counter; UsageSource::ALL.len()],
    ledger_committed: Counter,
    ledger_dropped: Counter,
    ledger_pending: Level,
    ledger_committed_at: Gauge,
    shipping: OnceLock<Arc<Shipping>>,
    reload_success: Level,
    reloaded_at: Gauge,
    model_overflow: Counter,
    team_overflow: Counter,
    budget_overflow: Counter,
    shared_volume_stale: Level,
    shared_proxies: Level,
    planner_lease: Level,
    panics: Counter,
    render_duration: Gauge,
}

/// The label values that the configuration allows.
#[derive(Debug, Default)]
struct Known {
    teams: HashSet<String>,
    /// Models on a route or in the price book, with the token types that have a price of their own.
    models: HashMap<String, TokenTypes>,
    max_lines: usize,
}

/// One model, whichever backend serves it.
#[derive(Debug)]
struct ModelShared {
    counts: Arc<series::CountsCompared>,
    teams: Named<Comparison>,
}

#[derive(Debug)]
struct PriceInForce {
    backend: String,
    model: String,
    kind: TokenType,
    price: TokenPrice,
}

/// One budget, as the ledger stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BudgetState {
    pub name: String,
    pub limit: NanoUsd,
    pub spent: NanoUsd,
    pub from: Timestamp,
    pub to: Timestamp,
}

/// A calendar period of the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Period {
    Today,
    Month,
}

impl Period {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Today => "today",
            Self::Month => "month",
        }
    }
}

/// What the ledger has for a period, this process's predecessors included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PeriodAmounts {
    /// Token charges, rent and fees.
    pub cost: NanoUsd,
    pub api: NanoUsd,
    pub rent: NanoUsd,
    pub idle: NanoUsd,
    pub all_api: NanoUsd,
    /// Against the API alone; negative when the API alone would have cost less.
    pub net_savings: NanoUsd,
}

impl PeriodAmounts {
    fn named(&self) -> [(&'static str, NanoUsd); 6] {
        [
            ("cost", self.cost),
            ("api", self.api),
            ("rent", self.rent),
            ("idle", self.idle),
            ("all_api", self.all_api),
            ("net_savings", self.net_savings),
        ]
    }
}

impl Metrics {
    /// Metrics with every configured series at zero.
    ///
    /// # Panics
    /// Never: the catalogue's names are valid and unique, which a test shows.
    pub fn new(config: &Config) -> Self {
        let store = Arc::new(Store::new());
        let registry = Registry::new();
        registry
            .register(Box::new(exposition::Exposition::new(store.clone())))
            .expect("the catalogue's names are valid and unique");
        let metrics = Self { store, registry };
        metrics.reconfigure(config);
        metrics
    }

    /// Adds what a new configuration names, at zero, and replaces the prices in force. What it no longer
    /// names stays as it is, because counters do not disappear while a process runs.
    pub fn reconfigure(&self, config: &Config) {
        let store = &*self.store;
        store.known.store(Arc::new(Known::of(config)));
        for backend in &config.backends {
            self.backend_of_kind(&backend.name, matches!(backend.kind, BackendKind::SelfHosted(_)));
            if matches!(backend.kind, BackendKind::Api) {
                let confirmed = Timestamp::from_secs(config.prices.confirmed_at_seconds);
                self.backend(&backend.name).prices_confirmed(confirmed);
            }
        }
        for team in config.metrics.teams.iter().map(String::as_str).chain([OTHER]) {
            let reasons = store.rejections_of(team);
            for reason in REJECTIONS {
                reasons.get_or_add(reason, Counter::default);
            }
        }
        for backend in config.backends.iter().filter(|backend| backend.pool().is_some()) {
            self.pool(&backend.name).hourly.set(backend.hourly().to_usd_f64());
        }
        let mut prices = prices_in_force(config);
        prices.truncate(config.metrics.max_series / PRICES_SHARE);
        store.prices.store(Arc::new(prices));
        store.lines.store(store.fixed_lines(), Ordering::Relaxed);
        for route in &config.routes {
            self.add_route(config, route);
        }
    }

    /// The series of a backend, model and team. A team or model that is not configured, or for which there
    /// is no room, is `other`. To be resolved once and kept until the configuration changes.
    pub fn series(&self, backend: &str, model: &str, team: &str) -> Arc<Series> {
        let store = &*self.store;
        let known = store.known.load();
        let team = if known.teams.contains(team) {
            team
        } else {
            store.team_overflow.add(u64::from(!team.is_empty() && team != OTHER));
            OTHER
        };
        let (model, types) = known.model(model).unwrap_or_else(|| {
            store.model_overflow.add(u64::from(!model.is_empty() && model != OTHER));
            (OTHER, TokenTypes::PLAIN)
        });
        let backend = self.backend(backend);
        if let Some(found) = backend.models.get(model).and_then(|model| model.teams.get(team)) {
            found.show(types);
            return found;
        }
        if store.admit(&known, &backend, model, team, types) {
            return store.add_series(&backend, model, team, types);
        }
        store.model_overflow.add(u64::from(model != OTHER));
        if store.admit(&known, &backend, OTHER, team, TokenTypes::PLAIN) {
            return store.add_series(&backend, OTHER, team, TokenTypes::PLAIN);
        }
        store.team_overflow.add(u64::from(team != OTHER));
        store.add_series(&backend, OTHER, OTHER, TokenTypes::PLAIN)
    }

    /// The series of a backend.
    pub fn backend(&self, name: &str) -> Arc<BackendSeries> {
        self.backend_of_kind(name, false)
    }

    /// The series of a pool.
    pub fn pool(&self, name: &str) -> Arc<PoolSeries> {
        self.store.pools.get_or_add(name, PoolSeries::new)
    }

    /// A call was refused before any backend was tried. `reason` is a label: one of [`REJECTIONS`], or
    /// another word of the program's own.
    pub fn rejected(&self, team: &str, reason: &'static str) {
        let known = self.store.known.load();
        let team = if known.teams.contains(team) { team } else { OTHER };
        self.store.rejections_of(team).get_or_add(reason, Counter::default).add(1);
    }

    /// A call moved from one backend to another.
    pub fn fell_back(&self, from: &str, to: &str, fault: Fault) {
        self.store.fallbacks(from, to)[fault as usize].add(1);
    }

    /// Time that the proxy itself added to a call.
    pub fn overhead(&self, duration: Duration) {
        self.store.overhead.observe(duration);
    }

    /// Where a call's token counts came from.
    pub fn tokens_counted(&self, source: UsageSource) {
        self.store.token_counts[source as usize].add(1);
    }

    /// What the ledger has done since it was opened.
    pub fn ledger_stats(&self, committed: u64, dropped: u64, pending: u64, committed_at: Option<Timestamp>) {
        let store = &self.store;
        store.ledger_committed.raise_to(committed);
        store.ledger_dropped.raise_to(dropped);
        store.ledger_pending.set(i64::try_from(pending).unwrap_or(i64::MAX));
        if let Some(at) = committed_at {
            store.ledger_committed_at.set_time(at);
        }
    }

    /// The ledger is copied to Postgres; a second shipper would not be shown.
    pub fn follow_shipping(&self, shipping: Arc<Shipping>) {
        self.store.shipping.get_or_init(|| shipping);
    }

    /// Rows became durable at `at`.
    pub fn ledger_committed(&self, rows: u64, at: Timestamp) {
        self.store.ledger_committed.add(rows);
        self.store.ledger_committed_at.set_time(at);
    }

    /// Calls went unrecorded, as `ledger.when_unavailable = "continue"` allows.
    pub fn ledger_dropped(&self, rows: u64) {
        self.store.ledger_dropped.add(rows);
    }

    /// Rows accepted and not yet durable.
    pub fn ledger_pending(&self, rows: usize) {
        self.store.ledger_pending.set(i64::try_from(rows).unwrap_or(i64::MAX));
    }

    /// Replaces the totals of the current periods.
    pub fn ledger_amounts(&self, periods: Vec<(Period, PeriodAmounts)>) {
        self.store.periods.store(Arc::new(periods));
    }

    /// Replaces the state of all budgets; the first fifty are shown.
    pub fn budgets(&self, mut budgets: Vec<BudgetState>) {
        self.store.budget_overflow.add(budgets.len().saturating_sub(MAX_BUDGETS) as u64);
        budgets.truncate(MAX_BUDGETS);
        self.store.budgets.store(Arc::new(budgets));
    }

    /// A configuration was read at start or on reload, and is in force.
    pub fn config_loaded(&self, at: Timestamp) {
        self.store.reload_success.set(1);
        self.store.reloaded_at.set_time(at);
    }

    /// A reload was refused; the previous configuration stays.
    pub fn config_refused(&self) {
        self.store.reload_success.set(0);
    }

    /// Whether the other proxies' volume is unknown.
    pub fn shared_volume_stale(&self, stale: bool) {
        self.store.shared_volume_stale.set(i64::from(stale));
    }

    /// How many proxies there are, and whether this one orders replicas.
    pub fn shared(&self, proxies: u32, holds_lease: bool) {
        self.store.shared_proxies.set(i64::from(proxies));
        self.store.planner_lease.set(i64::from(holds_lease));
    }

    /// A panic was caught.
    pub fn panicked(&self) {
        self.store.panics.add(1);
    }

    /// All metrics in the Prometheus text format, to be served as [`CONTENT_TYPE`].
    ///
    /// # Panics
    /// Never: every family that is gathered has a name and a sample.
    pub fn render(&self) -> String {
        let stopwatch = Stopwatch::start();
        let text = TextEncoder::new()
            .encode_to_string(&self.registry.gather())
            .expect("every gathered family has a name and a sample");
        self.store.render_duration.set(stopwatch.elapsed().as_secs_f64());
        text
    }

    fn backend_of_kind(&self, name: &str, self_hosted: bool) -> Arc<BackendSeries> {
        self.store.backends.get_or_add(name, || BackendSeries::new(self_hosted))
    }

    /// Series of a route's models at its backends, at zero.
    fn add_route(&self, config: &Config, route: &Route) {
        let backends: Vec<_> = route.offers.iter().map(|offer| config.backend(offer.backend)).collect();
        for from in &backends {
            for to in backends.iter().filter(|to| to.name != from.name) {
                self.store.fallbacks(&from.name, &to.name);
            }
            if from.pool().is_some() {
                let pool = self.pool(&from.name);
                for backend in &backends {
                    pool.backend(&backend.name);
                }
            }
            for model in &route.models {
                for team in config.metrics.teams.iter().map(String::as_str).chain([OTHER]) {
                    self.series(&from.name, model, team);
                }
            }
        }
    }
}

impl Store {
    fn new() -> Self {
        let store = Self {
            known: ArcSwap::default(),
            lines: AtomicUsize::new(0),
            backends: Named::default(),
            pools: Named::default(),
            models: Named::default(),
            rejected: Named::default(),
            fallbacks: Named::default(),
            prices: ArcSwap::default(),
            budgets: ArcSwap::default(),
            periods: ArcSwap::default(),
            overhead: Histogram::new(catalogue::OVERHEAD_BOUNDS),
            token_counts: Default::default(),
            ledger_committed: Counter::default(),
            ledger_dropped: Counter::default(),
            ledger_pending: Level::default(),
            ledger_committed_at: Gauge::default(),
            shipping: OnceLock::new(),
            reload_success: Level::default(),
            reloaded_at: Gauge::default(),
            model_overflow: Counter::default(),
            team_overflow: Counter::default(),
            budget_overflow: Counter::default(),
            shared_volume_stale: Level::default(),
            shared_proxies: Level::default(),
            planner_lease: Level::default(),
            panics: Counter::default(),
            render_duration: Gauge::default(),
        };
        store.reload_success.set(1);
        store.shared_proxies.set(1);
        store
    }

    fn rejections_of(&self, team: &str) -> Arc<Named<Counter>> {
        self.rejected.get_or_add(team, Named::default)
    }

    fn fallbacks(&self, from: &str, to: &str) -> Arc<[Counter; Fault::ALL.len()]> {
        self.fallbacks.get_or_add(from, Named::default).get_or_add(to, Default::default)
    }

    fn model(&self, name: &str) -> Arc<ModelShared> {
        self.models.get_or_add(name, || ModelShared { counts: Arc::default(), teams: Named::default() })
    }

    fn add_series(&self, backend: &BackendSeries, model: &str, team: &str, types: TokenTypes) -> Arc<Series> {
        let shared = self.model(model);
        let comparison = shared.teams.get_or_add(team, Comparison::default);
        let of_backend = backend.models.get_or_add(model, ModelTeams::new);
        of_backend.teams.get_or_add(team, || {
            Series::new(types, comparison, shared.counts.clone(), of_backend.model.clone())
        })
    }

    /// Takes the lines that a series needs from what is left of the bound.
    fn admit(
        &self,
        known: &Known,
        backend: &BackendSeries,
        model: &str,
        team: &str,
        types: TokenTypes,
    ) -> bool {
        let shared = self.models.get(model);
        let new_model = if shared.is_none() { LINES_PER_MODEL } else { 0 };
        let new_of_backend = if backend.models.get(model).is_none() { LINES_PER_MODEL_OF_BACKEND } else { 0 };
        let compared = shared.is_some_and(|shared| shared.teams.get(team).is_some());
        let lines = new_model + new_of_backend + usize::from(!compared) + LINES_PER_SERIES + types.len();
        let take = |used: usize| Some(used + lines).filter(|used| *used <= known.max_lines);
        self.lines.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }

    /// Lines that do not depend on models and teams, those of the series that exist, and what `other` needs
    /// at each backend, so that there is always room to fold into.
    fn fixed_lines(&self) -> usize {
        const FALLBACKS: usize = Fault::ALL.len();
        const WHOLE: usize = 50 + MAX_BUDGETS * LINES_PER_BUDGET;
        const BACKEND: usize = 30;
        const POOL: usize = 32;
        const POOL_BACKEND: usize = 13;
        let others = LINES_PER_MODEL_OF_BACKEND + LINES_PER_SERIES + TokenTypes::PLAIN.len();
        let backends = self.backends.all();
        let series: usize = backends.values().map(|backend| lines_of_models(backend)).sum();
        let rejected: usize = self.rejected.all().values().map(|reasons| reasons.all().len()).sum();
        let fallbacks: usize = self.fallbacks.all().values().map(|to| to.all().len() * FALLBACKS).sum();
        let pool_backends = backends.len() * POOL_BACKEND;
        let pools = self.pools.all().len() * (POOL + pool_backends);
        let models: usize =
            self.models.all().values().map(|model| LINES_PER_MODEL + model.teams.all().len()).sum();
        WHOLE
            + backends.len() * (BACKEND + others)
            + LINES_PER_MODEL
            + 1
            + series
            + models
            + rejected
            + fallbacks
            + pools
            + self.prices.load().len()
    }
}

fn lines_of_models(backend: &BackendSeries) -> usize {
    let of_model = |model: &Arc<ModelTeams>| {
        let teams = model.teams.all();
        let series = teams.values().map(|series| LINES_PER_SERIES + series.tokens_by_type().count());
        LINES_PER_MODEL_OF_BACKEND + series.sum::<usize>()
    };
    backend.models.all().values().map(of_model).sum()
}

impl Known {
    fn of(config: &Config) -> Self {
        let cards = config.prices.cards.iter().map(|(name, card)| (name.clone(), priced_types(card)));
        let mut models: HashMap<String, TokenTypes> = cards.collect();
        for (name, route) in &config.models {
            let cards = api_cards(config, config.route(*route), name);
            let types = cards.map(|(_, card)| priced_types(card)).fold(TokenTypes::PLAIN, TokenTypes::and);
            models.insert(name.clone(), types);
        }
        let teams = config.metrics.teams.iter().cloned().collect();
        Self { teams, models, max_lines: config.metrics.max_series }
    }

    /// The label of a model: its own name, or its name without a date when only that is configured.
    fn model<'a>(&self, name: &'a str) -> Option<(&'a str, TokenTypes)> {
        let undated = crate::config::undated(name);
        [Some(name), undated].into_iter().flatten().find_map(|name| Some((name, *self.models.get(name)?)))
    }
}

/// The API backends of a route, with the prices of a model there.
fn api_cards<'a>(
    config: &'a Config,
    route: &'a Route,
    model: &'a str,
) -> impl Iterator<Item = (&'a str, &'a PriceCard)> {
    route.offers.iter().filter_map(move |offer| {
        let backend = config.backend(offer.backend);
        matches!(backend.kind, BackendKind::Api).then_some(())?;
        let name = offer.model.as_deref().unwrap_or(model);
        Some((backend.name.as_str(), offer.price.as_ref().or_else(|| config.prices.card(name))?))
    })
}

fn prices_in_force(config: &Config) -> Vec<PriceInForce> {
    let mut prices = Vec::new();
    for (route, model) in config.routes.iter().flat_map(|route| route.models.iter().map(move |m| (route, m)))
    {
        for (backend, card) in api_cards(config, route, model) {
            let types = priced_types(card);
            for kind in TokenType::ALL.into_iter().filter(|kind| types.contains(*kind)) {
                let price = price(&card.standard, kind);
                prices.push(PriceInForce { backend: backend.to_owned(), model: model.clone(), kind, price });
            }
        }
    }
    prices
}

fn priced_types(card: &PriceCard) -> TokenTypes {
    let differs = |kind: &TokenType| price(&card.standard, *kind) != price(&card.standard, kind.plain());
    TokenType::ALL.into_iter().filter(differs).fold(TokenTypes::PLAIN, TokenTypes::with)
}

fn price(prices: &Prices, kind: TokenType) -> TokenPrice {
    match kind {
        TokenType::Input => prices.input,
        TokenType::InputCached => prices.cached_input,
        TokenType::InputCacheWrite => prices.cache_write,
        TokenType::InputAudio => prices.audio_input,
        TokenType::InputImage => prices.image_input,
        TokenType::Output | TokenType::OutputReasoning => prices.output,
        TokenType::OutputAudio => prices.audio_output,
        TokenType::OutputImage => prices.image_output,
    }
}
