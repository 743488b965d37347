//! What a fleet does in the world, as futures that end in a report.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use http::Uri;

use super::address::{self, Lookup};
use super::command::{self, Subject};
use super::kubernetes::Scaler;
use super::order::Report;
use super::reins::{Process, Reins};
use super::replica::{Replica, ReplicaState};
use super::server_metrics;
use super::webhook::{self, Verb};
use crate::clock::Clock;
use crate::config::{Backend, BackendKind, Control, Secret, pattern};
use crate::health::probe::{self, Expect, Probe};

/// What tasks need to know.
pub(super) struct Hands {
    backend: String,
    control: Control,
    replicas: Arc<[Arc<Replica>]>,
    client: reqwest::Client,
    key: Option<Secret>,
    health_path: Option<String>,
    probe_timeout: Duration,
    metrics_url: Option<String>,
    clock: Clock,
    lookup: Lookup,
    scaler: Option<Scaler>,
    /// Where the token of the planner's lease is, if there is one. 0: never held.
    pub(super) token: OnceLock<Arc<AtomicU64>>,
}

/// Whether any of the addresses that are asked wants TLS.
fn speaks_tls(replicas: &[Arc<Replica>], metrics_url: Option<&str>, control: &Control) -> bool {
    let webhook = match control {
        Control::Webhook { url, .. } => Some(url.as_str()),
        _ => None,
    };
    let replicas = replicas.iter().map(|replica| replica.base_url.as_str());
    replicas.chain(metrics_url).chain(webhook).any(|url| !url.starts_with("http://") && !url.starts_with('/'))
}

impl std::fmt::Debug for Hands {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Hands").field("backend", &self.backend).finish_non_exhaustive()
    }
}

impl Hands {
    pub(super) fn new(
        backend: &Backend,
        control: Control,
        replicas: Arc<[Arc<Replica>]>,
        clock: Clock,
        lookup: Lookup,
    ) -> Self {
        let metrics_url = match &backend.kind {
            BackendKind::Api => None,
            BackendKind::SelfHosted(own) => own.metrics_url.clone(),
        };
        let tls = speaks_tls(&replicas, metrics_url.as_deref(), &control);
        Self {
            backend: backend.name.clone(),
            replicas,
            client: probe::client(backend.timeouts.connect, tls, &backend.authorities)
                .expect("TLS with certificates that were parsed can be set up"),
            key: backend.api_key.clone(),
            health_path: backend.health.path.clone(),
            probe_timeout: backend.health.timeout,
            metrics_url,
            clock,
            lookup,
            scaler: match &control {
                Control::Kubernetes(workload) => Some(Scaler::new(workload.clone())),
                _ => None,
            },
            control,
            token: OnceLock::new(),
        }
    }

    /// Whether only the process that started a server can stop it.
    pub(super) fn stops_by_signal(&self) -> bool {
        matches!(&self.control, Control::Command { stop, .. } if stop.is_empty())
    }

    fn subject(&self, replica: u32) -> Subject {
        let base_url = self.replicas[replica as usize].url().into_owned();
        // An order that is late bears the token that it was given under.
        let token = self.token.get().map(|token| token.load(Ordering::SeqCst)).filter(|token| *token > 0);
        Subject { backend: self.backend.clone(), replica, base_url, token }
    }

    async fn probe(&self, replica: u32) -> Probe {
        let base_url = &self.replicas[replica as usize].url();
        let (url, expect) = match &self.health_path {
            Some(path) => (beside(base_url, path), Expect::Success),
            None => (format!("{base_url}/models"), Expect::AnyAnswer),
        };
        probe::probe(&self.client, &url, self.key.as_ref(), self.probe_timeout, expect).await
    }

    async fn read_queue(&self, replica: u32) {
        let Some(pattern) = &self.metrics_url else { return };
        let replica = &self.replicas[replica as usize];
        let url = if pattern.starts_with('/') {
            beside(&replica.url(), pattern)
        } else {
            pattern::expand(pattern, replica.index)
        };
        if let Some(queue) = server_metrics::fetch(&self.client, &url, self.probe_timeout).await {
            replica.note_queue(self.clock.now(), &queue);
        }
    }

    /// None when it was called back.
    async fn call_webhook(
        &self,
        verb: Verb,
        about: About,
        reins: Option<&mut Reins>,
    ) -> Option<Result<(), String>> {
        let Control::Webhook { url, secret } = &self.control else { return Some(Ok(())) };
        let About { replica, order, target } = about;
        let Subject { backend, base_url, token, .. } = self.subject(replica);
        // Unique over restarts of ours, too: order numbers begin anew then.
        let key = format!("{backend}-{replica}-{order}-{}", self.clock.now().as_millis());
        let body = webhook::Order { backend, action: verb, replica, base_url, target, token };
        webhook::send(&self.client, url, secret.as_ref(), &body, &key, &self.clock, reins).await
    }
}

/// Which order, and how many replicas are wanted.
#[derive(Debug, Clone, Copy)]
pub(super) struct About {
    pub(super) replica: u32,
    pub(super) order: u64,
    pub(super) target: u32,
}

/// Orders a start. None when it was broken off by a stop, which reports for itself.
pub(super) async fn start(hands: Arc<Hands>, about: About, mut reins: Reins) -> Option<Report> {
    let About { replica, order, .. } = about;
    let result = match &hands.control {
        Control::None | Control::Kubernetes(_) => Ok(()),
        Control::Command { start, .. } => command::start(start, &hands.subject(replica), reins).await?,
        Control::Webhook { .. } => hands.call_webhook(Verb::Start, about, Some(&mut reins)).await?,
    };
    Some(Report::Start { replica, order, result })
}

/// Orders a stop; it is done when the report says so.
pub(super) async fn stop(
    hands: Arc<Hands>,
    about: About,
    start: Option<Arc<Process>>,
    was_ready: bool,
) -> Option<Report> {
    let About { replica, order, .. } = about;
    let result = match &hands.control {
        Control::None | Control::Kubernetes(_) => Ok(()),
        Control::Command { stop, .. } => {
            command::stop(stop, &hands.subject(replica), start.as_deref(), was_ready).await
        }
        Control::Webhook { .. } => {
            if let Some(start) = start {
                start.end().await;
            }
            hands.call_webhook(Verb::Stop, about, None).await?
        }
    };
    Some(Report::Stop { replica, order, result })
}

/// Makes the workload's count `count`, or, without one, reads it.
pub(super) async fn scale(hands: Arc<Hands>, count: Option<u32>) -> Option<Report> {
    let scaler = hands.scaler.as_ref()?;
    let leaving = hands.replicas.iter().filter(|replica| replica.state() == ReplicaState::Stopping);
    let leaving: Vec<_> = leaving.filter_map(|replica| Some(replica.address()?.ip())).collect();
    Some(Report::Scaled { result: scaler.set(count, &leaving, &hands.clock).await })
}

/// Asks for the addresses of the name that all replicas share.
pub(super) async fn resolve(hands: Arc<Hands>) -> Option<Report> {
    let base_url = &hands.replicas.first()?.base_url;
    Some(Report::Resolved { found: address::resolve(&hands.lookup, base_url).await })
}

pub(super) async fn look(hands: Arc<Hands>, replica: u32, order: u64) -> Option<Report> {
    Some(Report::Probe { replica, order, probe: hands.probe(replica).await })
}

pub(super) async fn read_queue(hands: Arc<Hands>, replica: u32) -> Option<Report> {
    hands.read_queue(replica).await;
    Some(Report::QueueRead { replica })
}

/// A path on the host of a base URL: `http://h:1/v1` and `/health` → `http://h:1/health`.
fn beside(base_url: &str, path: &str) -> String {
    let origin = base_url
        .parse::<Uri>()
        .ok()
        .and_then(|uri| Some(format!("{}://{}", uri.scheme_str()?, uri.authority()?)));
    format!("{}/{}", origin.as_deref().unwrap_or(base_url), path.trim_start_matches('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_health_path_is_on_the_host_of_the_base_url() {
        assert_eq!(beside("http://127.0.0.1:8000/v1", "/health"), "http://127.0.0.1:8000/health");
        assert_eq!(beside("https://gpu.internal/v1", "ready?full=1"), "https://gpu.internal/ready?full=1");
    }
}
