//! Backends as the request path sees them: where they are, with what credentials, in what health.

pub mod client;
pub mod delivery;
pub mod http1;
pub mod joined;
pub mod pool;
pub mod send;
pub mod upload;

use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use http::uri::{Authority, Scheme};
use http::{HeaderName, HeaderValue, Uri};

use std::time::Duration;

use crate::clock::Clock;
use crate::config::{self, BackendId, BackendKind, ParameterRule};
use crate::economics::Timestamp;
use crate::fleet::{Availability, Fleet, FleetEvent, Lease, ReplicaState};
use crate::health::{Circuit, Throttle};
use crate::ledger::{Event, Ledger};
use crate::metrics::BackendSeries;

/// One configured backend and its live state. A reload that does not change it keeps it.
#[derive(Debug)]
pub struct Backend {
    pub id: BackendId,
    pub spec: config::Backend,
    /// Its replicas; an API is a fleet of one that is always there.
    pub fleet: Arc<Fleet>,
    /// What it says of its rate limits.
    pub throttle: Throttle,
    pub series: Arc<BackendSeries>,
    /// What its dialect does with members of a request body.
    pub rules: Vec<(String, ParameterRule)>,
    /// Set when the server refused `stream_options`; it is not sent again.
    pub refuses_stream_options: AtomicBool,
    passes_credentials: bool,
    /// Where each replica is.
    bases: Vec<BaseUrl>,
    label: HeaderValue,
    credential: Option<HeaderValue>,
    extra_headers: Vec<(HeaderName, HeaderValue)>,
}

/// A base URL taken apart once, so that no call formats or parses one.
#[derive(Debug, Clone)]
pub struct BaseUrl {
    scheme: Scheme,
    authority: Authority,
    host: HeaderValue,
    /// Path below the host without a trailing slash: `/v1`.
    prefix: String,
}

#[derive(Debug, thiserror::Error)]
#[error("`{url}` is not a base URL: it needs a scheme and a host, like `http://127.0.0.1:8000/v1`")]
pub struct BaseUrlError {
    url: String,
}

impl BaseUrl {
    pub fn parse(url: &str) -> Result<Self, BaseUrlError> {
        let error = || BaseUrlError { url: url.to_owned() };
        let parts = url.parse::<Uri>().map_err(|_| error())?.into_parts();
        let (Some(scheme), Some(authority)) = (parts.scheme, parts.authority) else { return Err(error()) };
        let prefix =
            parts.path_and_query.map(|path| path.path().trim_end_matches('/').to_owned()).unwrap_or_default();
        let host = HeaderValue::from_str(authority.as_str()).map_err(|_| error())?;
        Ok(Self { scheme, authority, host, prefix })
    }

    /// What is asked of the server for a client's path and query: `/v1/models` below a base of
    /// `https://host/openai/v1` is `/openai/v1/models`. Paths outside `/v1` stay as they are.
    pub fn target<'a>(&self, path_and_query: &'a str) -> Cow<'a, str> {
        let below =
            path_and_query.strip_prefix("/v1").filter(|rest| rest.is_empty() || rest.starts_with(['/', '?']));
        match below {
            Some(rest) if self.prefix != "/v1" => {
                if self.prefix.is_empty() && !rest.starts_with('/') {
                    Cow::Owned(format!("/{rest}"))
                } else {
                    Cow::Owned(format!("{}{rest}", self.prefix))
                }
            }
            _ => Cow::Borrowed(path_and_query),
        }
    }

    /// The URL of a client's path and query.
    pub fn join(&self, path_and_query: &str) -> Option<Uri> {
        self.join_at(None, path_and_query)
    }

    /// The same, with an address in the place of the host.
    pub fn join_at(&self, address: Option<SocketAddr>, path_and_query: &str) -> Option<Uri> {
        let authority = match address {
            Some(address) => Authority::try_from(address.to_string()).ok()?,
            None => self.authority.clone(),
        };
        Uri::builder()
            .scheme(self.scheme.clone())
            .authority(authority)
            .path_and_query(&*self.target(path_and_query))
            .build()
            .ok()
    }

    /// Scheme and host alone: `https://host`.
    pub fn origin(&self) -> String {
        format!("{}://{}", self.scheme, self.authority)
    }

    /// The value of `Host`.
    pub fn host(&self) -> &HeaderValue {
        &self.host
    }
}

impl Backend {
    pub fn new(
        id: BackendId,
        spec: config::Backend,
        passes_credentials: bool,
        series: Arc<BackendSeries>,
        clock: &Clock,
        ledger: &Ledger,
    ) -> Result<Self, BaseUrlError> {
        let book = ledger.clone();
        let sink = move |event: FleetEvent| {
            book.append_event(&Event {
                at: event.at,
                kind: "replicas".to_owned(),
                subject: event.backend.clone(),
                detail: event.to_string(),
            });
        };
        let fleet = Fleet::with_events(&spec, clock.clone(), Box::new(sink));
        let bases = fleet
            .replicas()
            .iter()
            .map(|replica| BaseUrl::parse(&replica.base_url))
            .collect::<Result<_, _>>()?;
        let credential = spec.api_key.as_ref().and_then(|key| sensitive(&format!("Bearer {}", key.expose())));
        let extra_headers = spec
            .headers
            .iter()
            .filter_map(|(name, value)| {
                Some((HeaderName::from_bytes(name.as_bytes()).ok()?, sensitive(value.expose())?))
            })
            .collect();
        Ok(Self {
            id,
            fleet,
            throttle: Throttle::default(),
            series,
            rules: spec.dialect.parameters.clone().into_iter().collect(),
            refuses_stream_options: AtomicBool::new(spec.dialect.no_stream_options),
            passes_credentials,
            bases,
            label: HeaderValue::from_str(&spec.name).unwrap_or(HeaderValue::from_static("backend")),
            credential,
            extra_headers,
            spec,
        })
    }

    /// Whether a reload may keep it: nothing of its configuration has changed.
    pub fn is_configured_as(&self, spec: &config::Backend, passes_credentials: bool) -> bool {
        self.spec == *spec && self.passes_credentials == passes_credentials
    }

    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// Its name as a header's value.
    pub fn label(&self) -> &HeaderValue {
        &self.label
    }

    /// Where each replica is.
    pub fn bases(&self) -> &[BaseUrl] {
        &self.bases
    }

    pub fn is_api(&self) -> bool {
        matches!(self.spec.kind, BackendKind::Api)
    }

    /// Whether a replica is ready and its circuit lets calls through.
    pub fn is_serving(&self) -> bool {
        self.fleet.availability() != Availability::NoReplica
    }

    /// How long it is until a replica that is up may be asked again; nothing when one may be, or when there is none.
    pub fn recovers_in(&self, now: Timestamp) -> Duration {
        let ready = self.fleet.replicas().iter().filter(|replica| replica.state() == ReplicaState::Ready);
        let waits =
            ready.map(|replica| replica.circuit.open_until().map_or(Duration::ZERO, |at| at.since(now)));
        waits.min().unwrap_or_default()
    }

    /// What replaces the client's credentials on the way there.
    pub fn credential(&self) -> Option<&HeaderValue> {
        self.credential.as_ref()
    }

    /// Whether the client's own credentials may go there; to one backend at most.
    pub fn passes_credentials(&self) -> bool {
        self.passes_credentials
    }

    pub fn extra_headers(&self) -> &[(HeaderName, HeaderValue)] {
        &self.extra_headers
    }

    /// Takes a place on one of its replicas.
    pub fn acquire(self: &Arc<Self>) -> Option<Place> {
        self.acquire_near(None)
    }

    /// As [`Self::acquire`], preferring the replica in that position.
    pub fn acquire_near(self: &Arc<Self>, home: Option<usize>) -> Option<Place> {
        let lease = self.fleet.acquire_near(home)?;
        Some(Place { backend: self.clone(), lease })
    }
}

fn sensitive(value: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(value).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// One call's place on a replica, given back on drop.
#[derive(Debug)]
pub struct Place {
    backend: Arc<Backend>,
    lease: Lease,
}

impl Place {
    pub fn base(&self) -> &BaseUrl {
        &self.backend.bases[self.lease.index as usize]
    }

    /// Position of the replica.
    pub fn replica(&self) -> usize {
        self.lease.index as usize
    }

    pub fn circuit(&self) -> &Circuit {
        &self.lease.circuit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clients_path_goes_below_the_base() {
        for (base, path, url) in [
            ("https://api.openai.com/v1", "/v1/models?limit=2", "https://api.openai.com/v1/models?limit=2"),
            (
                "http://127.0.0.1:8000/v1/",
                "/v1/chat/completions",
                "http://127.0.0.1:8000/v1/chat/completions",
            ),
            ("http://gpu/openai/v1", "/v1/models", "http://gpu/openai/v1/models"),
            ("http://gpu", "/v1/models", "http://gpu/models"),
            ("http://gpu/v1", "/v1beta/x", "http://gpu/v1beta/x"),
            ("http://gpu/v1", "/v1", "http://gpu/v1"),
        ] {
            assert_eq!(BaseUrl::parse(base).unwrap().join(path).unwrap().to_string(), url);
        }
    }

    #[test]
    fn a_base_without_a_host_is_refused() {
        for url in ["", "/v1", "127.0.0.1:8000", "http://"] {
            assert!(BaseUrl::parse(url).is_err(), "{url}");
        }
    }
}
