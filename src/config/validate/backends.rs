//! The endpoints: addresses, keys, time limits, and what a self-hosted one costs and can do.

use std::time::Duration;

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use super::super::pattern::{expand, is_pattern};
use super::super::raw::{
    BandTable, Kind, ParameterTreatment, ParameterWord, RawBackend, RawCircuit, RawHealth, RawTimeouts,
};
use super::super::read::{At, Named};
use super::super::scalar::{HeaderValue, OneOrMore, Usd};
use super::super::{
    Addresses, Backend, BackendKind, Circuit, Costs, Dialect, Health, ParameterRule, Place, Secret,
    SelfHosted, Timeouts, defaults, dialect,
};
use super::{Checker, Secrets, place_of, time};
use crate::economics::{Billing, Capacity, NanoUsd, PoolSpec};

impl Checker<'_> {
    /// One [`Backend`] for each table, in the order of the file, whatever is wrong with it.
    pub(super) fn backends(&mut self, raw: Option<&Named<RawBackend>>) -> Vec<Backend> {
        let raw = raw.map_or(&[][..], |named| &named.0);
        if raw.is_empty() {
            self.findings.problem(
                &Place::default(),
                "there is no backend",
                "write `[backends.openai]` with `kind = \"api\"` and `base_url = \"https://api.openai.com/v1\"`",
            );
        }
        if let Some((_, extra)) = raw.get(defaults::MOST_BACKENDS) {
            let what = format!("is one backend more than {}", defaults::MOST_BACKENDS);
            self.findings.problem(&extra.place, what, "list the replicas of one backend in its `base_url`");
        }
        let known = raw.iter().take(defaults::MOST_BACKENDS);
        known.map(|(name, table)| self.backend(name, table)).collect()
    }

    fn backend(&mut self, name: &str, at: &At<RawBackend>) -> Backend {
        let raw = &at.value;
        let kind = self.kind(at);
        let is_api = kind == Kind::Api;
        if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) {
            self.findings.problem(
                &at.place,
                format!("`{name}` cannot be a header's or a metric's value"),
                "name a backend with letters, digits, `-`, `_` and `.`",
            );
        }
        let software = raw.server.as_ref().map(|server| server.value).unwrap_or_default();
        let addresses = raw.addresses.as_ref().map_or(Addresses::Urls, |addresses| addresses.value);
        let base_urls = self.base_urls(at);
        let default_health = if is_api { None } else { health_path(software, &base_urls) };
        Backend {
            name: name.to_owned(),
            api_key: raw.api_key.as_ref().and_then(|reference| self.secret(reference)),
            authorities: self.authorities(raw.ca_file.as_ref(), &base_urls),
            costs: self.costs(raw, is_api),
            headers: self.headers(raw),
            timeouts: self.timeouts(raw.timeouts.as_ref(), is_api),
            health: self.health(raw.health.as_ref(), default_health),
            circuit: self.circuit(raw.circuit.as_ref()),
            dialect: self.dialect(raw, if is_api { Dialect::default() } else { software.dialect() }),
            kind: if is_api {
                self.refuse_self_hosted_keys(raw);
                BackendKind::Api
            } else {
                BackendKind::SelfHosted(Box::new(self.self_hosted(name, at, &base_urls)))
            },
            base_urls,
            addresses,
        }
    }

    fn kind(&mut self, at: &At<RawBackend>) -> Kind {
        if let Some(kind) = &at.value.kind {
            return kind.value;
        }
        self.findings.missing(
            &at.place,
            "kind",
            "write `kind = \"api\"` (paid per token) or `kind = \"self_hosted\"` (rented by the hour)",
        );
        if at.value.hourly_usd.is_some() || at.value.capacity.is_some() {
            Kind::SelfHosted
        } else {
            Kind::Api
        }
    }

    fn base_urls(&mut self, at: &At<RawBackend>) -> Vec<String> {
        let Some(At { value: OneOrMore(written), place }) = &at.value.base_url else {
            self.findings.missing(
                &at.place,
                "base_url",
                "write where it answers, as `http://127.0.0.1:8000/v1`",
            );
            return Vec::new();
        };
        if written.is_empty() {
            self.findings.problem(place, "is empty", "write one base URL, or one per replica");
        }
        let is_api = at.value.kind.as_ref().is_some_and(|kind| kind.value == Kind::Api);
        if is_api && written.len() > 1 {
            self.findings.problem(place, "an API has one base URL", "write one backend for each API");
        }
        let sends_key = at.value.api_key.is_some() || at.value.costs_key.is_some();
        let mut urls: Vec<String> = Vec::new();
        for one in written {
            let Some(url) = self.base_url(one) else { continue };
            if is_pattern(&url) && (is_api || written.len() > 1) {
                let remedy = "write it as the only base URL of a self-hosted backend, or list the replicas";
                self.findings.problem(&one.place, "`{replica}` has no replicas to number here", remedy);
            }
            if urls.contains(&url) {
                self.findings.problem(&one.place, format!("`{url}` is listed twice"), "remove one of them");
            } else {
                if is_api && sends_key && is_plain_http_to_a_network(&url) {
                    self.findings.warning(&one.place, "the key goes over the network in clear", "use https");
                }
                urls.push(url);
            }
        }
        urls
    }

    /// A base URL without its trailing slash; a pattern stays one.
    fn base_url(&mut self, written: &At<String>) -> Option<String> {
        let url = written.value.trim_end_matches('/');
        let first = expand(url, 0);
        match url_fault(&first, CREDENTIALS, false) {
            None => {
                if first.parse::<http::Uri>().is_ok_and(|uri| uri.path() == "/") {
                    let remedy = format!("clients' paths begin with `/v1`; did you mean `{url}/v1`?");
                    self.findings.warning(&written.place, "has no path", remedy);
                }
                Some(url.to_owned())
            }
            Some(fault) => {
                self.findings.problem(
                    &written.place,
                    fault,
                    "write a base URL, as `http://127.0.0.1:8000/v1`",
                );
                None
            }
        }
    }

    fn authorities(
        &mut self,
        file: Option<&At<String>>,
        base_urls: &[String],
    ) -> Vec<CertificateDer<'static>> {
        let Some(At { value: path, place }) = file else { return Vec::new() };
        if !base_urls.iter().any(|url| url.starts_with("https://")) {
            self.findings.warning(place, "is never looked at: no base URL is `https://`", "remove it");
        }
        if self.surroundings.secrets == Secrets::NotNeeded {
            return Vec::new();
        }
        let path = self.surroundings.folder.join(path);
        let Some(pem) = self.file(&path, place) else { return Vec::new() };
        let read = CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<Vec<_>, _>>();
        let mut roots = RootCertStore::empty();
        match read {
            Ok(found) if !found.is_empty() && found.iter().all(|one| roots.add(one.clone()).is_ok()) => found,
            _ => {
                let what = format!("`{}` is not one or more certificates in PEM", path.display());
                self.findings.problem(place, what, "write the path of its authority's certificate");
                Vec::new()
            }
        }
    }

    fn costs(&mut self, raw: &RawBackend, is_api: bool) -> Option<Costs> {
        if !is_api {
            let written = [place_of(raw.costs_key.as_ref()), place_of(raw.costs_projects.as_ref())];
            for place in written.into_iter().flatten() {
                let remedy = "remove it: the rent of replicas is on no invoice for tokens";
                self.findings.problem(&place, "belongs to `api` backends", remedy);
            }
            return None;
        }
        let projects = raw.costs_projects.as_ref();
        if let (Some(at), None) = (projects, &raw.costs_key) {
            let remedy = "write `costs_key = { env = \"OPENAI_ADMIN_KEY\" }`, or remove it";
            self.findings.problem(&at.place, "there is no `costs_key` to ask with", remedy);
        }
        let projects = projects.map_or(&[][..], |at| &at.value);
        for empty in projects.iter().filter(|at| at.value.is_empty()) {
            self.findings.problem(&empty.place, "is empty", "write a project's id, as `proj_abc`");
        }
        let key = self.secret(raw.costs_key.as_ref()?)?;
        Some(Costs { key, projects: projects.iter().map(|at| at.value.clone()).collect() })
    }

    fn headers(&mut self, raw: &RawBackend) -> Vec<(String, Secret)> {
        let written = raw.headers.as_ref().map_or(&[][..], |named| &named.0);
        written
            .iter()
            .filter_map(|(name, at)| {
                self.check_header_name(name, &at.place, raw.api_key.is_some());
                let value = match &at.value {
                    HeaderValue::Secret(reference) => {
                        self.secret(&At { value: reference.clone(), place: at.place.clone() })?
                    }
                    HeaderValue::Plain(_) if is_credential(name) => {
                        self.findings.problem(
                            &at.place,
                            "is a credential in plain text, which this file must not hold",
                            "write `{ env = \"NAME\" }` or `{ file = \"/path\" }`",
                        );
                        return None;
                    }
                    HeaderValue::Plain(text) if http::HeaderValue::from_str(text).is_err() => {
                        self.findings.problem(
                            &at.place,
                            "is no header value",
                            "write visible characters only",
                        );
                        return None;
                    }
                    HeaderValue::Plain(text) => Secret::new(text.clone()),
                };
                Some((name.clone(), value))
            })
            .collect()
    }

    fn check_header_name(&mut self, name: &str, place: &Place, has_api_key: bool) {
        const OURS: [&str; 8] = [
            "host",
            "content-length",
            "transfer-encoding",
            "connection",
            "te",
            "trailer",
            "upgrade",
            "accept-encoding",
        ];
        let lower = name.to_ascii_lowercase();
        if http::HeaderName::from_bytes(name.as_bytes()).is_err() {
            self.findings.problem(place, "is not a header's name", "write it as `OpenAI-Organization`");
        } else if OURS.contains(&lower.as_str()) {
            self.findings.problem(place, "is a header that the proxy sets itself", "remove it");
        } else if lower == "authorization" && has_api_key {
            self.findings.problem(place, "is sent for `api_key` already", "keep one of the two");
        }
    }

    fn timeouts(&mut self, raw: Option<&At<RawTimeouts>>, is_api: bool) -> Timeouts {
        let empty = RawTimeouts::default();
        let raw = raw.map_or(&empty, |raw| &raw.value);
        let by_kind = |api: Duration, own: Duration| if is_api { api } else { own };
        let first_byte = by_kind(defaults::API_FIRST_BYTE, defaults::OWN_FIRST_BYTE);
        let between = by_kind(defaults::API_BETWEEN_BYTES, defaults::OWN_BETWEEN_BYTES);
        let idle = by_kind(defaults::API_IDLE_CONNECTION, defaults::OWN_IDLE_CONNECTION);
        let timeouts = Timeouts {
            connect: self.time_above_zero(raw.connect.as_ref(), defaults::CONNECT_TIMEOUT),
            first_byte: self.time_above_zero(raw.first_byte.as_ref(), first_byte),
            between_bytes: self.time_above_zero(raw.between_bytes.as_ref(), between),
            total: self.time_above_zero(raw.total.as_ref(), defaults::TOTAL_TIMEOUT),
            idle_connection: time(raw.idle_connection.as_ref(), idle),
        };
        if let Some(place) = place_of(raw.total.as_ref()).or_else(|| place_of(raw.first_byte.as_ref()))
            && timeouts.total < timeouts.first_byte
        {
            self.findings.problem(
                &place,
                "the total time is shorter than the time to the first byte",
                "raise `total` or lower `first_byte`",
            );
        }
        timeouts
    }

    fn health(&mut self, raw: Option<&At<RawHealth>>, default_path: Option<String>) -> Health {
        let empty = RawHealth::default();
        let raw = raw.map_or(&empty, |raw| &raw.value);
        let path = match &raw.path {
            None => default_path,
            Some(at) if at.value.is_empty() => None,
            Some(at) => {
                if !is_path(&at.value) {
                    self.findings.problem(&at.place, "is not a path", "write it as `/health`, or `\"\"`");
                }
                Some(at.value.clone())
            }
        };
        Health {
            path,
            interval: self.time_above_zero(raw.interval.as_ref(), defaults::HEALTH_INTERVAL),
            timeout: self.time_above_zero(raw.timeout.as_ref(), defaults::HEALTH_TIMEOUT),
        }
    }

    fn circuit(&mut self, raw: Option<&At<RawCircuit>>) -> Circuit {
        let empty = RawCircuit::default();
        let raw = raw.map_or(&empty, |raw| &raw.value);
        Circuit {
            failures: self.number(
                raw.failures.as_ref(),
                defaults::CIRCUIT_FAILURES,
                1..=1_000_000,
                "write how many failures in a row open the circuit, as 5",
            ),
            open_for: self.time_above_zero(raw.open_for.as_ref(), defaults::CIRCUIT_OPEN_FOR),
        }
    }

    fn dialect(&mut self, raw: &RawBackend, mut dialect: Dialect) -> Dialect {
        for (member, at) in raw.parameters.as_ref().map_or(&[][..], |named| &named.0) {
            if matches!(member.as_str(), "model" | "stream" | "messages" | "input" | "prompt") {
                self.findings.problem(&at.place, "is what a call consists of", "remove it");
            }
            let rule = match &at.value {
                ParameterTreatment::Word(ParameterWord::Pass) => None,
                ParameterTreatment::Word(ParameterWord::Drop) => Some(ParameterRule::Drop),
                ParameterTreatment::Word(ParameterWord::Refuse) => Some(ParameterRule::Refuse),
                ParameterTreatment::Rename(table) => match &table.rename {
                    None => {
                        self.findings.missing(&at.place, "rename", "write `{ rename = \"max_tokens\" }`");
                        None
                    }
                    Some(name) => Some(ParameterRule::Rename(name.value.clone())),
                },
            };
            match rule {
                Some(rule) => dialect.parameters.insert(member.clone(), rule),
                None => dialect.parameters.remove(member),
            };
        }
        if let Some(allowed) = &raw.stream_options {
            dialect.no_stream_options = !allowed.value;
        }
        dialect
    }

    fn refuse_self_hosted_keys(&mut self, raw: &RawBackend) {
        let written = [
            place_of(raw.server.as_ref()),
            place_of(raw.addresses.as_ref()),
            place_of(raw.hourly_usd.as_ref()),
            place_of(raw.billing.as_ref()),
            place_of(raw.request_usd.as_ref()),
            place_of(raw.capacity.as_ref()),
            place_of(raw.startup.as_ref()),
            place_of(raw.minimum.as_ref()),
            place_of(raw.max_replicas.as_ref()),
            place_of(raw.control.as_ref()),
            place_of(raw.metrics.as_ref()),
        ];
        for place in written.into_iter().flatten() {
            self.findings.problem(
                &place,
                "belongs to self-hosted backends",
                "remove it, or write `kind = \"self_hosted\"`",
            );
        }
    }

    fn self_hosted(&mut self, name: &str, at: &At<RawBackend>, base_urls: &[String]) -> SelfHosted {
        let raw = &at.value;
        let urls = base_urls.len();
        let control = self.control(raw.control.as_ref());
        self.check_addresses(raw, base_urls, &control);
        let software = raw.server.as_ref().map(|server| server.value).unwrap_or_default();
        let max_replicas = self.number(
            raw.max_replicas.as_ref(),
            urls.max(1) as u64,
            1..=defaults::MOST_REPLICAS,
            "write how many replicas may run at once",
        );
        if let Some(place) = place_of(raw.max_replicas.as_ref()).filter(|_| (max_replicas as usize) < urls) {
            let what = format!("is less than the {urls} base URLs");
            self.findings.problem(&place, what, "raise it, or list fewer URLs");
        }
        SelfHosted {
            pool: PoolSpec {
                hourly: self.hourly(at),
                billing: raw.billing.as_ref().map_or(Billing::WhileRunning, |billing| billing.value),
                request_fee: self.not_negative(
                    raw.request_usd.as_ref(),
                    "write what is paid per request, in USD, as 0.0000136",
                ),
                capacity: self.capacity(name, at),
                startup: self.at_most(raw.startup.as_ref(), defaults::STARTUP, defaults::LONGEST_STARTUP),
                minimum: self.at_most(raw.minimum.as_ref(), defaults::MINIMUM, defaults::LONGEST_MINIMUM),
                max_replicas,
            },
            control,
            server: software,
            metrics_url: self.metrics_url(raw.metrics.as_ref(), software),
        }
    }

    fn hourly(&mut self, at: &At<RawBackend>) -> NanoUsd {
        const REMEDY: &str = "write what one replica costs for an hour, in USD";
        let Some(written) = &at.value.hourly_usd else {
            self.findings.missing(&at.place, "hourly_usd", REMEDY);
            return NanoUsd::ZERO;
        };
        if written.value.0.as_nanos() > defaults::DEAREST_PLAUSIBLE_HOUR_NANO_USD {
            let what = "is more than any machine costs an hour";
            self.findings.warning(&written.place, what, format!("{REMEDY}, not for a month"));
        }
        self.not_negative(Some(written), REMEDY)
    }

    fn not_negative(&mut self, written: Option<&At<Usd>>, remedy: &str) -> NanoUsd {
        let Some(written) = written else { return NanoUsd::ZERO };
        if written.value.0 < NanoUsd::ZERO {
            self.findings.problem(&written.place, "must not be negative", remedy);
            return NanoUsd::ZERO;
        }
        written.value.0
    }

    fn at_most(
        &mut self,
        written: Option<&At<super::Time>>,
        default: Duration,
        longest: Duration,
    ) -> Duration {
        if let Some(at) = written.filter(|at| at.value.0 > longest) {
            let what = format!("is longer than {} hours", longest.as_secs() / 3600);
            self.findings.problem(&at.place, what, "write a shorter time; is the unit right?");
        }
        time(written, default)
    }

    fn capacity(&mut self, name: &str, at: &At<RawBackend>) -> Capacity {
        let example = format!(
            "write `capacity = {{ input_tokens_per_second = {}, output_tokens_per_second = {}, \
             max_in_flight = {} }}` (an 8B model on one H100), and measure yours with \
             `breakeven calibrate --backend {name}`",
            defaults::QUICK_START_INPUT_TOKENS_PER_SECOND,
            defaults::QUICK_START_OUTPUT_TOKENS_PER_SECOND,
            defaults::QUICK_START_MAX_IN_FLIGHT,
        );
        let Some(capacity) = &at.value.capacity else {
            if self.surroundings.needs_capacity {
                self.findings.missing(&at.place, "capacity", example);
            }
            return Capacity { input_tokens_per_second: 1, output_tokens_per_second: 1, max_in_flight: 1 };
        };
        let raw = &capacity.value;
        let mut rate = |key: &str, written: Option<&At<super::Count>>, most: u64| {
            if written.is_none() {
                self.findings.missing(&capacity.place, key, example.clone());
            }
            self.number::<u64>(written, 1, 1..=most, "write what one replica sustains")
        };
        // A pod of the newest GPUs is a thousand times below this; work stays exact in 64 bits.
        let most_tokens = 1_000_000_000;
        let input = rate("input_tokens_per_second", raw.input_tokens_per_second.as_ref(), most_tokens);
        let output = rate("output_tokens_per_second", raw.output_tokens_per_second.as_ref(), most_tokens);
        let in_flight = rate("max_in_flight", raw.max_in_flight.as_ref(), 1_000_000);
        Capacity {
            input_tokens_per_second: input,
            output_tokens_per_second: output,
            max_in_flight: u32::try_from(in_flight).unwrap_or(u32::MAX),
        }
    }

    fn metrics_url(&mut self, written: Option<&At<String>>, software: dialect::Server) -> Option<String> {
        let Some(written) = written else { return software.metrics_path().map(str::to_owned) };
        if written.value.is_empty() {
            return None;
        }
        if !is_path(&written.value)
            && let Some(fault) = url_fault(&expand(&written.value, 0), CREDENTIALS, true)
        {
            self.findings.problem(&written.place, fault, "write a path as `/metrics`, a URL, or `\"\"`");
        }
        Some(written.value.clone())
    }

    /// A band of a threshold, as its two edges.
    pub(super) fn band(&mut self, table: &BandTable, place: &Place) -> Option<(f64, f64)> {
        let Some(up) = table.up.as_ref().map(|up| up.value.0) else {
            self.findings.problem(place, "has no `up`", "write the volume above which it changes");
            return None;
        };
        let down = table.down.as_ref().map_or(up * defaults::BAND_DOWN_SHARE, |down| down.value.0);
        Some((up, down))
    }
}

/// The software's own health path, or the list of models, which every OpenAI-compatible server has.
fn health_path(software: dialect::Server, base_urls: &[String]) -> Option<String> {
    if let Some(path) = software.health_path() {
        return Some(path.to_owned());
    }
    let base: http::Uri = expand(base_urls.first()?, 0).parse().ok()?;
    Some(format!("{}/models", base.path().trim_end_matches('/')))
}

fn is_path(text: &str) -> bool {
    text.starts_with('/') && text.parse::<http::uri::PathAndQuery>().is_ok()
}

/// Of the credentials of a backend.
const CREDENTIALS: &str = "belong in `api_key` or `headers`";

/// What is wrong with a URL, without the URL: its user part would be a secret.
/// `why`: what to say of a user and a password in it.
pub(super) fn url_fault(url: &str, why: &str, query_allowed: bool) -> Option<String> {
    let parsed = url.parse::<http::Uri>().ok().filter(|_| url.contains("://"));
    let authority = parsed.as_ref().and_then(http::Uri::authority).filter(|it| !it.host().is_empty());
    let (Some(uri), Some(authority)) = (&parsed, authority) else {
        return Some("is not a URL with a scheme and a host".to_owned());
    };
    if !matches!(uri.scheme_str(), Some("http" | "https")) {
        return Some("is neither http nor https".to_owned());
    }
    if authority.as_str().contains('@') {
        return Some(format!("must not hold a user or a password, which {why}"));
    }
    if url.contains('#') || (uri.query().is_some() && !query_allowed) {
        return Some("must not have a query or a fragment".to_owned());
    }
    None
}

pub(super) fn is_plain_http_to_a_network(url: &str) -> bool {
    url.parse::<http::Uri>().is_ok_and(|uri| uri.scheme_str() == Some("http")) && !is_on_loopback(url)
}

pub(super) fn is_on_loopback(url: &str) -> bool {
    let Ok(uri) = url.parse::<http::Uri>() else { return false };
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Whether a header's name says that its value is a credential.
fn is_credential(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    ["auth", "key", "token", "secret", "cookie", "password"].iter().any(|word| name.contains(word))
}
