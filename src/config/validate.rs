//! [`RawConfig`] → [`Config`], or every problem there is.
//!
//! Nothing stops at the first problem: what is wrong is reported and replaced by a default, so that the rest
//! can be checked as well, and a configuration with any problem never becomes a [`Config`].

mod backends;
mod budgets;
mod control;
mod postgres;
mod prices;
mod routes;
mod shared;

use std::io;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};
use toml::de::{DeTable, DeValue};

use self::backends::url_fault;
use super::problem::{Findings, Place, Problems};
use super::raw::{
    RawConfig, RawLedger, RawLimits, RawLog, RawMetrics, RawPolicy, RawRetry, RawServer, RawTelemetry,
};
use super::read::{At, FromToml};
use super::scalar::{Count, Number, SecretReference, Size, Time};
use super::{
    AuthMode, BackendKind, Config, Fsync, LedgerSettings, Limits, LogFormat, LogSettings, MetricsSettings,
    PolicyParameters, Retry, Secret, Server, TelemetrySettings, Tls, UnknownPrice, WhenUnavailable, defaults,
};

/// What the text refers to outside itself, so that a test can supply it.
pub(super) struct Surroundings<'a> {
    pub(super) env: &'a dyn Fn(&str) -> Option<String>,
    pub(super) read: &'a dyn Fn(&Path) -> io::Result<String>,
    /// Folder of the configuration file; files that it refers to are found from there.
    pub(super) folder: &'a Path,
    pub(super) secrets: Secrets,
    /// Whether a self-hosted backend must say what it sustains: not when that is about to be measured.
    pub(super) needs_capacity: bool,
}

/// What becomes of references to secrets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Secrets {
    /// Each is looked up, and one that is missing is a problem.
    Needed,
    /// None is looked up: nothing is going to be called.
    NotNeeded,
}

/// The configuration that a text describes, or everything that is wrong with it.
pub(super) fn parse(text: &str, origin: &str, surroundings: &Surroundings<'_>) -> Result<Config, Problems> {
    let mut checker = Checker { findings: Findings::new(text), surroundings };
    let config = checker.read(text).map(|raw| checker.config(&raw, text));
    let Findings { mut problems, mut warnings, .. } = checker.findings;
    warnings.sort_by_key(|warning| warning.place.line);
    match config {
        Some(config) if problems.is_empty() => Ok(Config { warnings, ..config }),
        _ => {
            problems.sort_by_key(|problem| problem.place.line);
            Err(Problems { origin: origin.to_owned(), problems })
        }
    }
}

/// The ledger's part of a configuration, whatever is wrong with the rest: a report needs nothing else, and none of
/// the other secrets.
pub(super) fn ledger_settings(
    text: &str,
    origin: &str,
    surroundings: &Surroundings<'_>,
) -> Result<LedgerSettings, Problems> {
    let mut checker = Checker { findings: Findings::new(text), surroundings };
    let settings = checker.read(text).map(|raw| checker.ledger(raw.ledger.as_ref()));
    let mut problems = checker.findings.problems;
    if settings.is_some() {
        problems.retain(|problem| problem.place.path.starts_with("ledger"));
    }
    match settings {
        Some(settings) if problems.is_empty() => Ok(settings),
        _ => Err(Problems { origin: origin.to_owned(), problems }),
    }
}

/// A check under way.
struct Checker<'a> {
    findings: Findings,
    surroundings: &'a Surroundings<'a>,
}

impl Checker<'_> {
    /// The text as tables; none when it is not TOML.
    fn read(&mut self, text: &str) -> Option<RawConfig> {
        let (document, errors) = DeTable::parse_recoverable(text);
        for error in &errors {
            let line = error.span().map(|span| self.findings.line_of(span.start));
            let place = Place { path: String::new(), line };
            // The parser's message quotes nothing of the text, which may hold a secret.
            self.findings.problem(&place, error.message().replace('\n', " "), "mend the TOML here");
        }
        if !errors.is_empty() {
            return None;
        }
        let root = DeValue::Table(document.into_inner());
        RawConfig::read(&root, &Place::default(), &mut self.findings)
    }

    fn config(&mut self, raw: &RawConfig, text: &str) -> Config {
        let server = self.server(raw.server.as_ref());
        let unknown_price = raw
            .prices
            .as_ref()
            .and_then(|prices| prices.value.unknown.as_ref())
            .map_or(UnknownPrice::ApiOnly, |unknown| unknown.value);
        let prices = self.price_book(raw.prices.as_ref());
        let backends = self.backends(raw.backends.as_ref());
        let auth = self.auth(raw, &backends);
        let (routes, models) = self.routes(raw.routes.as_ref(), raw.backends.as_ref(), &backends, &prices);
        let policy = self.policy(raw.policy.as_ref());
        self.warn_if_only_the_starter_can_stop(raw.shared.as_ref(), &backends);
        let config = Config {
            limits: self.limits(raw.limits.as_ref()),
            ledger: self.ledger(raw.ledger.as_ref()),
            shared: raw.shared.as_ref().and_then(|shared| self.shared(shared, &policy)),
            policy,
            retry: self.retry(raw.retry.as_ref()),
            metrics: self.metrics(raw.metrics.as_ref()),
            log: self.log(raw.log.as_ref()),
            telemetry: self.telemetry(raw.telemetry.as_ref()),
            budgets: self.budgets(raw.budgets.as_ref(), &routes, auth.mode),
            server,
            auth,
            unknown_price,
            backends,
            routes,
            models,
            prices,
            warnings: Vec::new(),
            digest: hex(&Sha256::digest(text.as_bytes())),
        };
        self.warn_if_open_relay(&config, raw);
        config
    }

    fn server(&mut self, raw: Option<&At<RawServer>>) -> Server {
        let empty = RawServer::default();
        let table = raw.map_or(&empty, |raw| &raw.value);
        let listen = self.address(table.listen.as_ref(), defaults::LISTEN);
        let admin_listen = self.address(table.admin_listen.as_ref(), defaults::ADMIN_LISTEN);
        let admin_token = table.admin_token.as_ref().and_then(|reference| self.secret(reference));
        let place =
            first_place([place_of(table.admin_listen.as_ref()), place_of(table.listen.as_ref())], raw);
        if collide(listen, admin_listen) {
            self.findings.problem(
                &place,
                format!("both listeners are on {listen}"),
                "give `listen` and `admin_listen` different ports",
            );
        }
        if !admin_listen.ip().is_loopback() && table.admin_token.is_none() {
            self.findings.problem(
                &place,
                "the admin side is open to a network without a token",
                "write `admin_token = { env = \"BREAKEVEN_ADMIN_TOKEN\" }`, or listen on 127.0.0.1",
            );
        }
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
        Server {
            listen,
            admin_listen,
            admin_token,
            tls: table.tls.as_ref().and_then(|tls| self.tls(tls)),
            admin_tls: table.admin_tls.as_ref().and_then(|tls| self.tls(tls)),
            workers: self.size(
                table.workers.as_ref(),
                cores as u64,
                1..=defaults::MOST_WORKERS,
                "leave it out for one a core",
            ),
        }
    }

    fn address(&mut self, written: Option<&At<String>>, default: &str) -> SocketAddr {
        let default = default.parse().expect("a default address is one");
        let Some(written) = written else { return default };
        written.value.parse().unwrap_or_else(|_| {
            self.findings.problem(
                &written.place,
                format!("`{}` is not an address", written.value),
                format!("write an IP address and a port, as `{default}` or `0.0.0.0:{}`", default.port()),
            );
            default
        })
    }

    fn tls(&mut self, tls: &At<super::raw::RawTls>) -> Option<Tls> {
        let mut file = |key: &str, written: Option<&At<String>>| {
            let Some(written) = written else {
                self.findings.missing(&tls.place, key, "write the path of a PEM file");
                return None;
            };
            let path = self.surroundings.folder.join(&written.value);
            self.file(&path, &written.place)?;
            Some(path)
        };
        let certificate = file("certificate", tls.value.certificate.as_ref());
        let private_key = file("private_key", tls.value.private_key.as_ref());
        Some(Tls { certificate: certificate?, private_key: private_key? })
    }

    fn limits(&mut self, raw: Option<&At<RawLimits>>) -> Limits {
        let empty = RawLimits::default();
        let raw = raw.map_or(&empty, |raw| &raw.value);
        let most = u64::from(u32::MAX);
        Limits {
            max_connections: self.size(
                raw.max_connections.as_ref(),
                defaults::MAX_CONNECTIONS,
                1..=most,
                "write how many clients may be connected",
            ),
            max_in_flight: self.size(
                raw.max_in_flight.as_ref(),
                defaults::MAX_IN_FLIGHT,
                1..=most,
                "write how many calls may be under way",
            ),
            caller_share: self.share(
                raw.caller_share.as_ref(),
                defaults::CALLER_SHARE,
                defaults::SMALLEST_CALLER_SHARE..=1.0,
                "write the share of one caller that is alone, as 0.9; 1 for no fairness",
            ),
            max_body_bytes: self.size(
                as_count(raw.max_body_bytes.as_ref()).as_ref(),
                defaults::MAX_BODY_BYTES,
                1024..=defaults::LARGEST_BODY,
                "write a size, as `32MiB`",
            ),
            max_upload_bytes: self.size(
                as_count(raw.max_upload_bytes.as_ref()).as_ref(),
                defaults::MAX_UPLOAD_BYTES,
                1024..=defaults::LARGEST_UPLOAD,
                "write a size, as `512MiB`",
            ),
            max_buffered_bytes: self.size(
                as_count(raw.max_buffered_bytes.as_ref()).as_ref(),
                defaults::MAX_BUFFERED_BYTES,
                defaults::LEAST_BUFFERED..=defaults::MOST_BUFFERED,
                "write a size, as `512MiB`",
            ),
            max_header_bytes: self.size(
                as_count(raw.max_header_bytes.as_ref()).as_ref(),
                defaults::MAX_HEADER_BYTES,
                defaults::SMALLEST_HEAD..=defaults::LARGEST_HEAD,
                "write a size, as `64KiB`",
            ),
            header_timeout: self.time_above_zero(raw.header_timeout.as_ref(), defaults::HEADER_TIMEOUT),
            body_timeout: self.time_above_zero(raw.body_timeout.as_ref(), defaults::BODY_TIMEOUT),
            idle_timeout: self.time_above_zero(raw.idle_timeout.as_ref(), defaults::IDLE_TIMEOUT),
            drain_timeout: time(raw.drain_timeout.as_ref(), defaults::DRAIN_TIMEOUT),
        }
    }

    fn ledger(&mut self, raw: Option<&At<RawLedger>>) -> LedgerSettings {
        let empty = RawLedger::default();
        let raw = raw.map_or(&empty, |raw| &raw.value);
        if let Some(path) = raw.path.as_ref().filter(|path| path.value.is_empty()) {
            self.findings.problem(&path.place, "is empty", "write the path of a file, as `breakeven.db`");
        }
        LedgerSettings {
            path: raw.path.as_ref().map_or(defaults::LEDGER_PATH.into(), |path| PathBuf::from(&path.value)),
            fsync: raw.fsync.as_ref().map_or(Fsync::Batch, |fsync| fsync.value),
            when_unavailable: raw
                .when_unavailable
                .as_ref()
                .map_or(WhenUnavailable::Refuse, |choice| choice.value),
            postgres: raw.postgres.as_ref().and_then(|postgres| self.postgres(postgres)),
        }
    }

    fn policy(&mut self, raw: Option<&At<RawPolicy>>) -> PolicyParameters {
        let empty = RawPolicy::default();
        let table = raw.map_or(&empty, |raw| &raw.value);
        let window = time(table.window.as_ref(), defaults::WINDOW);
        let slot = time(table.slot.as_ref(), defaults::SLOT);
        if slot < defaults::SHORTEST_SLOT || slot > defaults::LONGEST_SLOT {
            let place = place_of(table.slot.as_ref()).unwrap_or_default();
            self.findings.problem(&place, "must be between 1s and 1h", "write how often to decide, as `60s`");
        } else if window < slot || window > defaults::LONGEST_WINDOW {
            let place = first_place([place_of(table.window.as_ref()), place_of(table.slot.as_ref())], raw);
            self.findings.problem(
                &place,
                "the window must be at least one slot, and at most a day",
                "write the time that the volume is averaged over, as `10m`",
            );
        }
        PolicyParameters {
            window,
            margin: self.share(
                table.margin.as_ref(),
                defaults::MARGIN,
                0.0..=0.99,
                "write a share of the cost, as 0.10",
            ),
            min_dwell: time(table.min_dwell.as_ref(), defaults::MIN_DWELL),
            slot,
        }
    }

    fn retry(&mut self, raw: Option<&At<RawRetry>>) -> Retry {
        let empty = RawRetry::default();
        let raw = raw.map_or(&empty, |raw| &raw.value);
        let backoff = time(raw.backoff.as_ref(), defaults::BACKOFF);
        let max_backoff = time(raw.max_backoff.as_ref(), defaults::MAX_BACKOFF.max(backoff));
        if let Some(place) = place_of(raw.max_backoff.as_ref()).filter(|_| max_backoff < backoff) {
            self.findings.problem(&place, "is shorter than `backoff`", "write the longest pause, as `5s`");
        }
        Retry {
            max_attempts: self.number(
                raw.max_attempts.as_ref(),
                defaults::MAX_ATTEMPTS,
                1..=defaults::MOST_ATTEMPTS,
                "write how many attempts a call may have in all, 1 for no retry",
            ),
            backoff,
            max_backoff,
            budget_ratio: self.share(
                raw.budget_ratio.as_ref(),
                defaults::BUDGET_RATIO,
                0.0..=1.0,
                "write a share of all calls, as 0.2",
            ),
        }
    }

    fn metrics(&mut self, raw: Option<&At<RawMetrics>>) -> MetricsSettings {
        let empty = RawMetrics::default();
        let raw = raw.map_or(&empty, |raw| &raw.value);
        let teams = raw.teams.as_ref().map_or(&[][..], |teams| &teams.value);
        for (index, team) in teams.iter().enumerate() {
            let repeated = teams[..index].iter().any(|earlier| earlier.value == team.value);
            if team.value.is_empty() || team.value == "other" || repeated {
                self.findings.problem(
                    &team.place,
                    format!("`{}` is empty, repeated or reserved", team.value),
                    "write each value of the tag `team` once; `other` is what the rest is called",
                );
            }
        }
        if let Some(at) = raw.teams.as_ref().filter(|teams| teams.value.len() > defaults::MOST_TEAMS) {
            let what = format!("more than {} teams", defaults::MOST_TEAMS);
            self.findings.problem(
                &at.place,
                what,
                "list those that a dashboard shows; the ledger has them all",
            );
        }
        MetricsSettings {
            teams: teams.iter().map(|team| team.value.clone()).collect(),
            max_series: self.size(
                raw.max_series.as_ref(),
                defaults::MAX_SERIES,
                100..=1_000_000,
                "write how many series Prometheus may get from this proxy, as 2000",
            ),
        }
    }

    fn telemetry(&mut self, raw: Option<&At<RawTelemetry>>) -> TelemetrySettings {
        let endpoint = raw.and_then(|raw| raw.value.otlp_endpoint.as_ref());
        if let Some(At { value, place }) = endpoint {
            if cfg!(not(feature = "otel")) {
                let remedy = "build it with `cargo build --release --features otel`, or remove the key";
                self.findings.problem(place, "needs a build with the feature `otel`", remedy);
            }
            if let Some(fault) = url_fault(value, "are not sent to a collector", false) {
                self.findings.problem(
                    place,
                    fault,
                    "write the collector's base URL, as `http://127.0.0.1:4318`",
                );
            }
        }
        TelemetrySettings { otlp_endpoint: endpoint.map(|at| at.value.clone()) }
    }

    fn log(&mut self, raw: Option<&At<RawLog>>) -> LogSettings {
        let empty = RawLog::default();
        let raw = raw.map_or(&empty, |raw| &raw.value);
        let filter = raw.filter.as_ref().map_or(defaults::LOG_FILTER, |filter| filter.value.as_str());
        if let Some(at) = &raw.filter
            && tracing_subscriber::EnvFilter::try_new(filter).is_err()
        {
            let what = format!("`{filter}` is not a log filter");
            self.findings.problem(
                &at.place,
                what,
                "write a level, as `info`, or `breakeven=debug,hyper=warn`",
            );
        }
        LogSettings {
            filter: filter.to_owned(),
            format: raw.format.as_ref().map_or(LogFormat::Text, |format| format.value),
        }
    }

    /// Whoever reaches a listener without virtual keys spends the owner's key.
    fn warn_if_open_relay(&mut self, config: &Config, raw: &RawConfig) {
        let exposed = !config.server.listen.ip().is_loopback() && config.auth.mode == AuthMode::PassThrough;
        let spends =
            |backend: &&super::Backend| matches!(backend.kind, BackendKind::Api) && backend.api_key.is_some();
        if let Some(backend) = config.backends.iter().find(spends).filter(|_| exposed) {
            let server = raw.server.as_ref();
            let place = first_place([server.and_then(|at| place_of(at.value.listen.as_ref()))], server);
            self.findings.warning(
                &place,
                format!(
                    "whoever reaches {} spends the key of backend `{}`",
                    config.server.listen, backend.name
                ),
                "listen on 127.0.0.1 or in a network that you trust, or remove `api_key` so that clients bring \
                 their own",
            );
        }
    }

    /// The value of a secret, or a problem that says where it is missing, never what it is.
    fn secret(&mut self, reference: &At<SecretReference>) -> Option<Secret> {
        if self.surroundings.secrets == Secrets::NotNeeded {
            return Some(Secret::new(String::new()));
        }
        let (value, name, remedy) = match &reference.value {
            SecretReference::Env(name) => {
                let remedy = format!("export `{name}` where breakeven runs");
                ((self.surroundings.env)(name), format!("environment variable `{name}`"), remedy)
            }
            SecretReference::File(path) => {
                let path = self.surroundings.folder.join(path);
                let text = self.file(&path, &reference.place)?;
                let name = format!("file `{}`", path.display());
                (Some(text), name, "write the secret into it".to_owned())
            }
        };
        let value = value.map(|value| value.trim_end_matches(['\r', '\n']).to_owned());
        let fault = match value.as_deref() {
            None => "is not set",
            Some("") => "is empty",
            Some(value) if value.bytes().all(|byte| (0x21..0x7f).contains(&byte)) => {
                return Some(Secret::new(value.to_owned()));
            }
            Some(_) => "holds characters that a header cannot carry",
        };
        self.findings.problem(&reference.place, format!("{name} {fault}"), remedy);
        None
    }

    fn file(&mut self, path: &Path, place: &Place) -> Option<String> {
        match (self.surroundings.read)(path) {
            Ok(text) => Some(text),
            Err(error) => {
                let what = format!("cannot read `{}`: {error}", path.display());
                self.findings.problem(place, what, "write the path of a file that breakeven may read");
                None
            }
        }
    }

    /// A whole number within bounds.
    fn number<N: TryFrom<u64>>(
        &mut self,
        written: Option<&At<Count>>,
        default: u64,
        bounds: RangeInclusive<u64>,
        remedy: &str,
    ) -> N {
        let convert = |value: u64| {
            N::try_from(value).unwrap_or_else(|_| unreachable!("the bounds fit the type they are for"))
        };
        let Some(written) = written else { return convert(default) };
        if bounds.contains(&written.value.0) {
            return convert(written.value.0);
        }
        let (least, most) = bounds.into_inner();
        let what = if written.value.0 < least {
            format!("must be at least {least}")
        } else {
            format!("must be at most {most}")
        };
        self.findings.problem(&written.place, what, remedy);
        convert(default)
    }

    fn size<N: TryFrom<u64>>(
        &mut self,
        written: Option<&At<Count>>,
        default: u64,
        bounds: RangeInclusive<u64>,
        remedy: &str,
    ) -> N {
        self.number(written, default, bounds, remedy)
    }

    fn share(
        &mut self,
        written: Option<&At<Number>>,
        default: f64,
        bounds: RangeInclusive<f64>,
        remedy: &str,
    ) -> f64 {
        let Some(written) = written else { return default };
        if bounds.contains(&written.value.0) {
            return written.value.0;
        }
        let what = format!("must be between {} and {}", bounds.start(), bounds.end());
        self.findings.problem(&written.place, what, remedy);
        default
    }

    fn time_above_zero(&mut self, written: Option<&At<Time>>, default: Duration) -> Duration {
        if let Some(at) = written.filter(|at| at.value.0.is_zero()) {
            self.findings.problem(&at.place, "must be longer than zero", "write a duration, as `10s`");
        }
        time(written, default)
    }
}

fn time(written: Option<&At<Time>>, default: Duration) -> Duration {
    written.map_or(default, |at| at.value.0)
}

fn as_count(size: Option<&At<Size>>) -> Option<At<Count>> {
    size.map(|at| At { value: Count(at.value.0), place: at.place.clone() })
}

fn place_of<T>(at: Option<&At<T>>) -> Option<Place> {
    at.map(|at| at.place.clone())
}

/// The first key of several that was written, or else the table that they would be in.
fn first_place<T, const N: usize>(places: [Option<Place>; N], table: Option<&At<T>>) -> Place {
    places.into_iter().flatten().next().or_else(|| table.map(|at| at.place.clone())).unwrap_or_default()
}

/// Whether two listeners cannot both be had. Port 0 is a different port each time.
fn collide(one: SocketAddr, other: SocketAddr) -> bool {
    let same_address = one.ip() == other.ip() || one.ip().is_unspecified() || other.ip().is_unspecified();
    one.port() != 0 && one.port() == other.port() && same_address
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        for nibble in [byte >> 4, byte & 15] {
            text.push(char::from_digit(u32::from(nibble), 16).expect("a nibble is a digit"));
        }
        text
    })
}
