//! The configuration in force: typed, validated, immutable.
//!
//! What the owner wrote is parsed in `raw`, checked in `validate`, and becomes a [`Config`] only when
//! nothing is wrong with it. Everything below may rely on that.

pub mod defaults;
pub mod dialect;
mod load;
pub mod pattern;
pub mod postgres;
mod problem;
mod raw;
mod read;
pub mod reload;
mod scalar;
mod schema;
pub mod secret;
mod validate;

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use rustls::pki_types::CertificateDer;

pub use load::{
    CONFIG_VARIABLE, QuickStart, SEARCH_PATHS, find, ledger_settings, parse, quick_start, variable,
};
pub use postgres::{PostgresServer, PostgresSettings};
pub use problem::{Place, Problem, Problems};
pub use scalar::parse_duration;
pub use schema::schema;
pub use secret::Secret;

pub use crate::economics::{Band, PolicyKind as RoutePolicy, PolicySettings as PolicyParameters, Threshold};
use crate::economics::{NanoUsd, PoolSpec, PriceCard};

/// A table whose names the owner writes. Clients look up in it and add nothing, so nobody can make names collide,
/// and a quick hash will do.
pub type ByName<T> = HashMap<String, T, foldhash::fast::RandomState>;

/// Index of a backend in [`Config::backends`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackendId(pub u16);

/// Index of a route in [`Config::routes`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RouteId(pub u16);

#[derive(Debug, Clone)]
pub struct Config {
    pub server: Server,
    pub limits: Limits,
    pub auth: Auth,
    pub ledger: LedgerSettings,
    /// None: this proxy is alone.
    pub shared: Option<Shared>,
    pub policy: PolicyParameters,
    pub retry: Retry,
    pub metrics: MetricsSettings,
    pub log: LogSettings,
    pub telemetry: TelemetrySettings,
    pub unknown_price: UnknownPrice,
    /// Budgets besides those of single virtual keys.
    pub budgets: Vec<Budget>,
    pub backends: Vec<Backend>,
    pub routes: Vec<Route>,
    /// Model names that clients ask for, and the route that serves them.
    pub models: ByName<RouteId>,
    /// Prices by upstream model name, for `api` backends.
    pub prices: PriceBook,
    /// What works, and is probably not what was meant: for `check` and the log.
    pub warnings: Vec<Problem>,
    /// SHA-256 of the text it was made from, in hex; recorded with every ledger row.
    pub digest: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    pub listen: SocketAddr,
    pub admin_listen: SocketAddr,
    /// Without one, the admin side answers on loopback only.
    pub admin_token: Option<Secret>,
    pub tls: Option<Tls>,
    pub admin_tls: Option<Tls>,
    /// Threads that serve applications; each has its own runtime and upstream connections.
    pub workers: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    pub certificate: PathBuf,
    pub private_key: PathBuf,
}

/// Bounds on what clients may occupy.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    pub max_connections: usize,
    pub max_in_flight: usize,
    /// Of connections and calls, what one caller may hold while it is alone.
    pub caller_share: f64,
    /// Larger request bodies are refused with 413.
    pub max_body_bytes: usize,
    /// The same of uploads, which pass through.
    pub max_upload_bytes: u64,
    /// What the bodies of all calls that wait for an answer may take together.
    pub max_buffered_bytes: usize,
    pub max_header_bytes: usize,
    /// Time to send a complete request head, from the first byte or from the connection's start.
    pub header_timeout: Duration,
    /// Time to send the request body; between two pieces of an upload.
    pub body_timeout: Duration,
    /// Longest time a connection may be idle between requests.
    pub idle_timeout: Duration,
    /// Streams may go on for so long after SIGTERM.
    pub drain_timeout: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Auth {
    pub mode: AuthMode,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AuthMode {
    /// The client's own key goes to the first API backend, and only there.
    PassThrough,
    /// Clients hold virtual keys made by `breakeven keys create`.
    Keys,
}

/// How this proxy meets the others of its deployment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shared {
    /// URL of Redis, with its password.
    pub redis: Secret,
    /// Certificate authorities in PEM, instead of the system's.
    pub ca: Option<PathBuf>,
    /// What all keys begin with.
    pub prefix: String,
    /// Time between two exchanges.
    pub refresh: Duration,
    /// A proxy that was silent for so long is taken for dead.
    pub lease: Duration,
    pub connect_timeout: Duration,
    /// For one exchange.
    pub timeout: Duration,
}

/// What some calls may cost together in a period.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Budget {
    pub name: String,
    pub scope: BudgetScope,
    pub limit: NanoUsd,
    pub period: BudgetPeriod,
    pub when_spent: WhenSpent,
}

/// The calls that a budget counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BudgetScope {
    All,
    Team(String),
    Route(String),
    /// Public id of a virtual key.
    Key(String),
}

/// How long a budget is for. Days and months are those of UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BudgetPeriod {
    Day,
    Month,
    Lifetime,
}

/// What happens to a call whose budget has nothing left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenSpent {
    /// 429.
    Refuse,
    /// It goes to self-hosted backends only, where one more call adds nothing to the bill; 429 without one.
    CheaperBackend,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LedgerSettings {
    pub path: PathBuf,
    pub fsync: Fsync,
    pub when_unavailable: WhenUnavailable,
    /// Where a copy of every row goes, so that many proxies have one ledger.
    pub postgres: Option<PostgresSettings>,
}

/// What a power cut can lose. A killed process loses nothing either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fsync {
    /// The last byte of a response waits until its row is on disk.
    Always,
    /// Rows are synced in groups, a few times a second.
    Batch,
}

/// What happens to new calls while the ledger cannot record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenUnavailable {
    /// 503, with the reason.
    Refuse,
    /// Go on, and count what is unrecorded.
    Continue,
}

/// Attempts beyond the first, before the client has had a byte.
#[derive(Debug, Clone, PartialEq)]
pub struct Retry {
    /// Attempts of one call in all, over all backends.
    pub max_attempts: u32,
    /// Pause before the second attempt at the same backend; doubles, with jitter.
    pub backoff: Duration,
    pub max_backoff: Duration,
    /// Retries of the whole process, as a share of its calls.
    pub budget_ratio: f64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetricsSettings {
    /// Values of the tag `team` that become a metric label; the rest is `other`.
    pub teams: Vec<String>,
    pub max_series: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TelemetrySettings {
    /// Where spans of calls go by OTLP over HTTP; none: where the environment says, if it does.
    pub otlp_endpoint: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogSettings {
    /// A `tracing` filter: `info`, `breakeven=debug,hyper=warn`.
    pub filter: String,
    pub format: LogFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

/// What happens to a call whose model has no price.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnknownPrice {
    /// Refuse it with 400.
    Reject,
    /// Send it to the API, count it as unpriced.
    ApiOnly,
    /// Price it as the dearest known model, marked estimated.
    Estimate,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Backend {
    pub name: String,
    pub kind: BackendKind,
    /// Base URLs, without a trailing slash: one for an API, one per replica for a self-hosted backend, or one
    /// with `{replica}` in it ([`pattern`]).
    pub base_urls: Vec<String>,
    /// What the hosts of `base_urls` stand for.
    pub addresses: Addresses,
    pub api_key: Option<Secret>,
    /// What its certificate is verified against; empty: the public authorities.
    pub authorities: Vec<CertificateDer<'static>>,
    /// How the provider is asked for its invoice; none: it is not.
    pub costs: Option<Costs>,
    /// Headers added to every request to it (`OpenAI-Organization`, ..).
    pub headers: Vec<(String, Secret)>,
    pub timeouts: Timeouts,
    pub health: Health,
    pub circuit: Circuit,
    pub dialect: Dialect,
}

/// What may be asked of a provider's list of costs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Costs {
    /// Sent there and nowhere else.
    pub key: Secret,
    /// Ids of projects; empty: the whole organisation.
    pub projects: Vec<String>,
}

#[derive(Debug, Clone, PartialEq)]
pub enum BackendKind {
    Api,
    SelfHosted(Box<SelfHosted>),
}

#[derive(Debug, Clone, PartialEq)]
pub struct SelfHosted {
    pub pool: PoolSpec,
    pub control: Control,
    pub server: dialect::Server,
    /// Where the server's own metrics are (vLLM's and llama.cpp's queue), if it has any: a path below each
    /// replica's host, or one URL, in which `{replica}` is the replica's number ([`pattern`]).
    pub metrics_url: Option<String>,
}

/// Who starts and stops replicas.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    /// Somebody else, who may read `breakeven_pool_wanted_replicas`.
    None,
    /// Programs, given the replica's number in `BREAKEVEN_REPLICA`.
    Command { start: Vec<String>, stop: Vec<String> },
    /// Signed POST requests.
    Webhook { url: String, secret: Option<Secret> },
    /// The count of a Kubernetes workload.
    Kubernetes(Workload),
}

/// How replicas are found by a backend's base URLs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Addresses {
    /// Each replica has a URL, or they share one behind a load balancer.
    #[default]
    Urls,
    /// The host of the one URL is a name, and each of its addresses a replica.
    Dns,
}

/// Something in Kubernetes that has a `scale`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// Group and version: `apps/v1`.
    pub api_version: String,
    /// Its kind's name in URLs and roles: `deployments`.
    pub resource: String,
    /// None: that of the credentials.
    pub namespace: Option<String>,
    pub name: String,
    /// Credentials; none: those of the pod that we run in.
    pub kubeconfig: Option<PathBuf>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timeouts {
    pub connect: Duration,
    /// Until response headers, and until the first byte of a stream.
    pub first_byte: Duration,
    pub between_bytes: Duration,
    pub total: Duration,
    /// Idle pooled connections are dropped before servers do it (vLLM and llama.cpp: 5 s).
    pub idle_connection: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// Path below the base URL's host, e.g. `/health`; none: passive health only.
    pub path: Option<String>,
    pub interval: Duration,
    pub timeout: Duration,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Circuit {
    /// Failures in a row that open it.
    pub failures: u32,
    /// How long it stays open before a trial.
    pub open_for: Duration,
}

/// What a server cannot take as it is; by table, not by branches.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Dialect {
    /// Top-level members of the request body, and what is done with them.
    pub parameters: BTreeMap<String, ParameterRule>,
    /// Whether `stream_options` may be sent.
    pub no_stream_options: bool,
    /// Whether usage is that of one choice: a stream reports it of each, in a chunk of its own, and another answer of
    /// one of them alone.
    pub usage_per_choice: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ParameterRule {
    Drop,
    Rename(String),
    Refuse,
}

#[derive(Debug, Clone)]
pub struct Route {
    pub name: String,
    pub models: Vec<String>,
    pub policy: RoutePolicy,
    pub offers: Vec<Offer>,
}

/// One backend's way to serve the models of a route.
#[derive(Debug, Clone)]
pub struct Offer {
    pub backend: BackendId,
    /// The model's name there; none: the name that the client used.
    pub model: Option<String>,
    /// Prices of this offer, over the price book.
    pub price: Option<PriceCard>,
    /// Longest input and output together, in tokens.
    pub context_window: Option<u64>,
    /// The model's `tokenizer.json`, for when a self-hosted server reports no usage.
    pub tokenizer: Option<PathBuf>,
    pub features: Features,
}

/// What an offer can serve. A call that needs more goes where it can (`not_eligible`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts about a server, one config key each")]
pub struct Features {
    pub tools: bool,
    pub json_schema: bool,
    pub vision: bool,
    pub audio: bool,
    pub logprobs: bool,
    /// More than one choice (`n` > 1).
    pub multiple_choices: bool,
    pub embeddings: bool,
    pub responses: bool,
}

/// Prices of the API's models.
#[derive(Debug, Clone, Default)]
pub struct PriceBook {
    pub cards: ByName<PriceCard>,
    /// When the prices were last confirmed, in seconds since the Unix epoch.
    pub confirmed_at_seconds: u64,
}

impl PriceBook {
    /// The card of a model: its own name, the name without a dated suffix (`-2024-07-18`), or what a
    /// fine-tuned model (`ft:gpt-4o-mini:acme::id`) was made from.
    pub fn card(&self, model: &str) -> Option<&PriceCard> {
        let known = |name: &str| self.cards.get(name).or_else(|| self.cards.get(undated(name)?));
        known(model).or_else(|| {
            let colon = model.strip_prefix("ft:")?.find(':')? + "ft:".len();
            known(&model[..colon])
        })
    }
}

/// `gpt-4o-mini-2024-07-18` → `gpt-4o-mini`.
pub fn undated(model: &str) -> Option<&str> {
    let (base, date) = model.split_at_checked(model.len().checked_sub(11)?)?;
    let shape = |(index, byte): (usize, u8)| {
        if matches!(index, 0 | 5 | 8) { byte == b'-' } else { byte.is_ascii_digit() }
    };
    date.bytes().enumerate().all(shape).then_some(base)
}

impl Config {
    pub fn backend(&self, id: BackendId) -> &Backend {
        &self.backends[usize::from(id.0)]
    }

    pub fn route(&self, id: RouteId) -> &Route {
        &self.routes[usize::from(id.0)]
    }

    /// Index of the backend with that name.
    pub fn backend_named(&self, name: &str) -> Option<BackendId> {
        let index = self.backends.iter().position(|backend| backend.name == name)?;
        u16::try_from(index).ok().map(BackendId)
    }

    /// The first `api` backend: models on no route and paths that are not understood go there.
    pub fn default_backend(&self) -> Option<BackendId> {
        let index = self.backends.iter().position(|backend| matches!(backend.kind, BackendKind::Api))?;
        u16::try_from(index).ok().map(BackendId)
    }

    /// The one backend that the client's own credentials may go to: whose they are cannot be told, so they are those of
    /// the first `api` backend.
    pub fn recipient_of_credentials(&self) -> Option<BackendId> {
        self.default_backend().filter(|_| self.auth.mode == AuthMode::PassThrough)
    }
}

impl Backend {
    pub fn pool(&self) -> Option<&PoolSpec> {
        match &self.kind {
            BackendKind::Api => None,
            BackendKind::SelfHosted(own) => Some(&own.pool),
        }
    }

    /// Rent of one replica for one hour; zero for an API.
    pub fn hourly(&self) -> NanoUsd {
        self.pool().map_or(NanoUsd::ZERO, |pool| pool.hourly)
    }
}
