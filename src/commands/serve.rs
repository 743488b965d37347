//! `breakeven serve`: configuration, gateway, servers, drain.

use std::path::PathBuf;
use std::pin::Pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::{error, info, warn};

use super::WRONG;
use crate::admin::Admin;
use crate::clock::Clock;
use crate::config::reload::Watcher;
use crate::config::{self, Config, Problems, QuickStart};
use crate::economics::{NanoUsd, Work};
use crate::gateway::{Gateway, RentDuty, books, invoices, keeper, sharing};
use crate::health::probe;
use crate::keys::RefreshError;
use crate::ledger::postgres::Shipper;
use crate::ledger::{Ledger, RentEntry};
use crate::metrics::SpendKind;
use crate::planner::Planner;
use crate::server::{Workers, process, tls};
use crate::telemetry;
use crate::upstream::Backend;

/// How often the configuration's content is compared with what is in force.
const CONFIG_INTERVAL: Duration = Duration::from_secs(2);
/// At the end, counts of calls without usage are waited for so long.
const COUNTING_PATIENCE: Duration = Duration::from_secs(10);
/// After a second signal, all that is left to do has so long.
const LAST_MOMENT: Duration = Duration::from_secs(1);
/// Reloads that may wait for their turn.
const MAX_RELOADS_WAITING: usize = 8;

/// Runs the proxy.
///
/// Without a configuration file, `--openai`, `--self-hosted`, `--hourly-usd` and `--model` are enough for a
/// first run.
#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    /// Configuration file; else ./breakeven.toml, ./config/breakeven.toml, /etc/breakeven/breakeven.toml.
    #[arg(long, value_name = "FILE", env = config::CONFIG_VARIABLE)]
    pub config: Option<PathBuf>,
    /// OpenAI's API is a backend; its key is in OPENAI_API_KEY, or the client's own goes there.
    #[arg(long, conflicts_with = "config")]
    pub openai: bool,
    /// Base URL of a self-hosted backend, such as http://127.0.0.1:8000/v1.
    #[arg(long, value_name = "URL", conflicts_with = "config")]
    pub self_hosted: Option<String>,
    /// Rent of one replica of it for one hour, in USD.
    #[arg(long, value_name = "USD", conflicts_with = "config")]
    pub hourly_usd: Option<String>,
    /// A model that both serve: NAME, or NAME=NAME_AT_THE_SELF_HOSTED_BACKEND. May be given several times.
    #[arg(long, value_name = "NAME", conflicts_with = "config")]
    pub model: Vec<String>,
}

/// Runs until a signal ends it.
pub fn run(arguments: &ServeArgs) -> anyhow::Result<ExitCode> {
    let (watcher, config) = match load(arguments) {
        Ok(loaded) => loaded,
        Err(problems) => {
            eprintln!("{problems}");
            return Ok(ExitCode::from(WRONG));
        }
    };
    telemetry::install(&config.log);
    telemetry::install_panic_hook();
    process::forbid_core_dumps();
    process::allow_open_files(&config.limits);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let _file_size_limit = process::survive_file_size_limit()?;
        let proxy = Proxy::start(config, Clock::system()).await?;
        proxy.serve(watcher).await
    })?;
    Ok(ExitCode::SUCCESS)
}

fn load(arguments: &ServeArgs) -> Result<(Option<Watcher>, Config), Problems> {
    let is_quick = arguments.openai || arguments.self_hosted.is_some();
    let found = if is_quick { None } else { config::find(arguments.config.as_deref()) };
    if let Some(path) = found {
        let (watcher, config) = Watcher::start(&path);
        return config.map(|config| (Some(watcher), config));
    }
    let start = QuickStart {
        openai: arguments.openai,
        self_hosted: arguments.self_hosted.clone(),
        hourly_usd: arguments.hourly_usd.clone(),
        models: arguments.model.clone(),
    };
    config::quick_start(&start, &config::variable).map(|config| (None, config))
}

/// A running proxy: what `serve` runs until a signal, and `demo` and tests for as long as they like.
#[derive(Debug)]
pub struct Proxy {
    pub gateway: Arc<Gateway>,
    /// Where applications connect.
    pub address: std::net::SocketAddr,
    pub admin_address: std::net::SocketAddr,
    admin: Admin,
    workers: Arc<Workers>,
    tls: Option<tls::Acceptor>,
    admin_tls: Option<tls::Acceptor>,
    stop: watch::Sender<bool>,
    tasks: JoinSet<()>,
    planner: tokio::task::JoinHandle<()>,
    planner_stop: watch::Sender<bool>,
    sharing: tokio::task::JoinHandle<()>,
    sharing_stop: watch::Sender<bool>,
    fleets: Fleets,
    shipper: Option<Shipper>,
    reloads: mpsc::Receiver<Reload>,
}

/// Bound on connecting to the collector of spans.
const SPAN_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Somebody asks for a reload, and waits for what comes of it.
pub type Reload = oneshot::Sender<Result<(), String>>;

impl Proxy {
    /// Opens the ledger, binds both listeners, starts everything.
    pub async fn start(config: Config, clock: Clock) -> anyhow::Result<Self> {
        let config = Arc::new(config);
        let ledger = Ledger::open(&config.ledger, clock.clone())?;
        let gateway = Gateway::new(config.clone(), clock, ledger)?;
        match gateway.keys.refresh(&config, gateway.now()) {
            Err(RefreshError::Ledger(error)) if gateway.ledger.report(&error) => {
                // The damaged file is replaced by then, and what was spent is what the journal still has.
                gateway.ledger.flush().await;
                gateway.keys.refresh(&config, gateway.now())?;
            }
            refreshed => refreshed?,
        }
        gateway.spans.start(config.telemetry.otlp_endpoint.as_deref(), span_client)?;
        let shipper = ship(&config, &gateway)?;
        let listener = bind(config.server.listen).await?;
        let admin_listener = bind(config.server.admin_listen).await?;
        let address = listener.local_addr()?;
        let admin_address = admin_listener.local_addr()?;
        let acceptor = |settings: &Option<config::Tls>, protocols| {
            settings.as_ref().map(|settings| tls::Acceptor::new(settings, protocols)).transpose()
        };
        let tls = acceptor(&config.server.tls, tls::ALL_HTTP)?;
        let admin_tls = acceptor(&config.server.admin_tls, tls::HTTP1)?;
        let workers = Arc::new(Workers::start(&gateway, tls.as_ref())?);
        let (stop, stopped) = watch::channel(false);
        let (planner_stop, planner_stopped) = watch::channel(false);
        let (reload_sender, reloads) = mpsc::channel(MAX_RELOADS_WAITING);
        let mut tasks = JoinSet::new();
        let mut fleets = Fleets::default();
        fleets.follow(&gateway);
        gateway.metrics.config_loaded(gateway.now());
        tasks.spawn(books::run(gateway.clone(), planner_stopped.clone()));
        tasks.spawn(keeper::run(gateway.clone(), planner_stopped.clone()));
        tasks.spawn(invoices::run(gateway.clone(), planner_stopped.clone()));
        let (sharing_stop, sharing_stopped) = watch::channel(false);
        let sharing = tokio::spawn(sharing::run(gateway.clone(), sharing_stopped));
        let planner = tokio::spawn(Planner::new(gateway.clone()).run(planner_stopped));
        let (accepting, limiting) = (workers.clone(), gateway.clone());
        tasks.spawn(async move { accepting.accept(listener, limiting, stopped).await });
        let admin = Admin::new(gateway.clone(), reload_sender);
        admin.serve(admin_listener, admin_tls.clone(), &mut tasks);
        let scheme = |tls: &Option<tls::Acceptor>| if tls.is_some() { "https" } else { "http" };
        let (scheme, admin_scheme) = (scheme(&tls), scheme(&admin_tls));
        info!(
            %address,
            admin = %admin_address,
            "listening on {scheme}://{address}/v1, admin on {admin_scheme}://{admin_address}"
        );
        for warning in &config.warnings {
            warn!("{warning}");
        }
        Ok(Self {
            gateway,
            address,
            admin_address,
            admin,
            workers,
            tls,
            admin_tls,
            stop,
            tasks,
            planner,
            planner_stop,
            sharing,
            sharing_stop,
            fleets,
            shipper,
            reloads,
        })
    }

    /// Serves until SIGTERM or SIGINT, then drains. A second signal ends it at once.
    pub async fn serve(mut self, mut watcher: Option<Watcher>) -> anyhow::Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut hangup = signal(SignalKind::hangup())?;
        let mut look = tokio::time::interval(CONFIG_INTERVAL);
        loop {
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                _ = hangup.recv() => drop(self.reload(watcher.as_mut())),
                _ = look.tick() => {
                    if let Some(changed) = watcher.as_mut().and_then(Watcher::poll) {
                        drop(self.apply(changed));
                    }
                }
                Some(reply) = self.reloads.recv() => {
                    let result = self.reload(watcher.as_mut());
                    // Who asked may have gone.
                    drop(reply.send(result));
                }
            }
        }
        let again = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        self.shut_down(again).await;
        Ok(())
    }

    /// Stops accepting, lets calls finish, books rent and flushes the ledger. `abort` ends the waiting, whatever it is
    /// for: what is left then is in the journal.
    pub async fn shut_down(mut self, abort: impl Future<Output = ()>) {
        let mut patience = Patience::until(abort);
        info!("draining: no new connections, {} calls in flight", self.gateway.in_flight());
        self.gateway.begin_drain();
        // Who asks for a reload now is told so, instead of waiting for the drain.
        self.reloads.close();
        while let Ok(reply) = self.reloads.try_recv() {
            drop(reply);
        }
        self.stop.send_replace(true);
        let drain_timeout = self.gateway.state().config.limits.drain_timeout;
        self.workers.drain(&self.gateway, drain_timeout, patience.asked_to_hurry()).await;
        patience.begin_last_moment();
        let counted = patience.lasts(self.gateway.counter.finish(COUNTING_PATIENCE)).await;
        if counted != Some(true) {
            warn!("calls without usage are still being counted; they are not in the ledger");
        }
        self.planner_stop.send_replace(true);
        if let Some(Err(error)) = patience.lasts(&mut self.planner).await {
            error!(%error, "the planner had ended: {error}");
        }
        if patience.lasts(self.fleets.stop()).await.is_none() {
            warn!("replicas have not confirmed their stop; look after them");
        }
        self.admin.stop();
        patience.lasts(async { while self.tasks.join_next().await.is_some() {} }).await;
        Planner::book_rest(&self.gateway);
        // Last, so that the planner's lease is held until its work is done.
        self.sharing_stop.send_replace(true);
        if let Some(Err(error)) = patience.lasts(&mut self.sharing).await {
            error!(%error, "the exchange with other proxies had ended: {error}");
        }
        let flushed = patience.lasts(self.gateway.ledger.flush()).await;
        if let Some(abandoned) = self.gateway.ledger.abandon(&std::env::temp_dir()) {
            error!(rows = abandoned.rows, "{abandoned}");
        } else if flushed != Some(true) {
            warn!("the ledger has not imported everything; the next start will, from its journal");
        }
        if let Some(shipper) = self.shipper.take() {
            patience.lasts(shipper.finish()).await;
        }
        patience.lasts(self.gateway.spans.shut_down()).await;
        info!("stopped");
    }

    fn reload(&mut self, watcher: Option<&mut Watcher>) -> Result<(), String> {
        match watcher {
            Some(watcher) => {
                let loaded = watcher.reload();
                self.apply(loaded)
            }
            None => Err("there is no configuration file to reload".to_owned()),
        }
    }

    /// Puts a configuration in force, or keeps the one that is and says why.
    fn apply(&mut self, loaded: Result<Config, Problems>) -> Result<(), String> {
        let gateway = &self.gateway;
        let applied = loaded.map_err(|problems| problems.to_string()).and_then(|config| {
            let (token, bound) = (&config.server.admin_token, self.admin_address);
            // What the file says of the address holds after a restart only.
            if token.is_none() && !bound.ip().is_loopback() {
                return Err(format!(
                    "server.admin_token: missing, and the admin side listens on {bound} until a restart: put the \
                     token back, or restart"
                ));
            }
            for key in gateway.state().config.restart_needed(&config) {
                warn!(key, "`{key}` has changed and needs a restart");
            }
            let mut renewed = Vec::new();
            let server = &config.server;
            for (acceptor, settings) in [(&self.tls, &server.tls), (&self.admin_tls, &server.admin_tls)] {
                if let (Some(acceptor), Some(settings)) = (acceptor, settings) {
                    renewed.push((acceptor, acceptor.load(settings).map_err(|error| format!("{error:#}"))?));
                }
            }
            gateway.reconfigure(Arc::new(config)).map_err(|error| error.to_string())?;
            for (acceptor, loaded) in renewed {
                acceptor.renew(loaded);
            }
            Ok(())
        });
        match &applied {
            Ok(()) => {
                telemetry::follow(&gateway.state().config.log);
                self.fleets.follow(gateway);
                gateway.metrics.config_loaded(gateway.now());
                gateway.note("reload", "configuration", "a new configuration is in force".to_owned());
                info!("the configuration was reloaded");
            }
            Err(why) => {
                gateway.metrics.config_refused();
                error!("the configuration was not reloaded, the one before stays in force:\n{why}");
            }
        }
        applied
    }
}

/// How long the end of the process waits: as long as each of its steps allows, or a moment more once `abort` says so.
struct Patience<F> {
    abort: Pin<Box<F>>,
    /// Set when `abort` has come.
    ends_at: Option<Instant>,
}

impl<F: Future<Output = ()>> Patience<F> {
    fn until(abort: F) -> Self {
        Self { abort: Box::pin(abort), ends_at: None }
    }

    /// Returns when `abort` has come.
    async fn asked_to_hurry(&mut self) {
        if self.ends_at.is_none() {
            self.abort.as_mut().await;
            self.ends_at = Some(Instant::now() + LAST_MOMENT);
        }
    }

    /// Gives the last moment anew, to what comes after the calls.
    fn begin_last_moment(&mut self) {
        self.ends_at = self.ends_at.map(|_| Instant::now() + LAST_MOMENT);
    }

    /// Does the work, unless patience ends before it does.
    async fn lasts<T>(&mut self, work: impl Future<Output = T>) -> Option<T> {
        let ends = async {
            self.asked_to_hurry().await;
            tokio::time::sleep_until(self.ends_at.unwrap_or_else(Instant::now)).await;
        };
        tokio::select! {
            biased;
            done = work => Some(done),
            () = ends => None,
        }
    }
}

/// Begins to copy the ledger to Postgres, if the configuration says where.
fn ship(config: &Config, gateway: &Gateway) -> anyhow::Result<Option<Shipper>> {
    let Some(postgres) = config.ledger.postgres.clone() else { return Ok(None) };
    let shipper = Shipper::start(postgres, &config.ledger.path, gateway.clock.clone())?;
    gateway.metrics.follow_shipping(shipper.shipping());
    Ok(Some(shipper))
}

/// The loops that look after the replicas of each backend in force.
#[derive(Debug, Default)]
struct Fleets {
    running: Vec<(Arc<Backend>, watch::Sender<bool>)>,
    tasks: JoinSet<()>,
}

impl Fleets {
    /// Starts loops for backends that are new, and ends those of backends that are gone.
    fn follow(&mut self, gateway: &Arc<Gateway>) {
        let state = gateway.state();
        self.running.retain(|(backend, stop)| {
            let stays = state.backends.iter().any(|other| Arc::ptr_eq(other, backend));
            if !stays {
                stop.send_replace(true);
            }
            stays
        });
        for backend in &state.backends {
            if !self.running.iter().any(|(other, _)| Arc::ptr_eq(other, backend)) {
                let (stop, stopped) = watch::channel(false);
                self.tasks.spawn(look_after(gateway.clone(), backend.clone(), stopped));
                self.running.push((backend.clone(), stop));
            }
        }
    }

    async fn stop(&mut self) {
        for (_, stop) in self.running.drain(..) {
            stop.send_replace(true);
        }
        while self.tasks.join_next().await.is_some() {}
    }
}

/// Looks after a backend's replicas. When a reload took the backend, books the rent that fell due since; at
/// the end of the program [`Planner::book_rest`] does that for all.
async fn look_after(gateway: Arc<Gateway>, backend: Arc<Backend>, stop: watch::Receiver<bool>) {
    backend.fleet.clone().run(stop).await;
    if gateway.state().backends.iter().any(|other| Arc::ptr_eq(other, &backend)) {
        return;
    }
    let now = gateway.now();
    let delta = backend.fleet.accrue(now);
    if matches!(gateway.rent_duty(backend.name(), true, now), RentDuty::Leave { .. }) {
        return;
    }
    if delta.rent != NanoUsd::ZERO {
        backend.series.spend(SpendKind::Capacity, delta.rent);
        gateway.ledger.append_rent(&RentEntry {
            backend: backend.name().to_owned(),
            from: delta.from,
            to: delta.to,
            replica_millis: delta.replica_millis,
            busy: Work::ZERO,
            rent: delta.rent,
            attributed: NanoUsd::ZERO,
            idle: delta.rent,
        });
    }
}

/// What sends spans off.
fn span_client() -> reqwest::Client {
    probe::client(SPAN_CONNECT_TIMEOUT, true, &[]).expect("TLS with built-in roots can be set up")
}

async fn bind(address: std::net::SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| {
        format!("cannot listen on {address}; is something else there, or another breakeven?")
    })
}
