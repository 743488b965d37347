//! What the admin side tells, as JSON.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::config::RoutePolicy;
use crate::economics::time::millis;
use crate::economics::{NanoUsd, Timestamp};
use crate::gateway::{Gateway, Pin, Pool, Route};
use crate::ledger::Entry;
use crate::ledger::query::{self, Key};
use crate::metrics::CircuitState;
use crate::openai::query::query_value;

/// Calls that the page shows.
const RECENT_CALLS: usize = 20;
const EVENT_INTERVAL: Duration = Duration::from_secs(1);
/// The spend of the day is read from the ledger once in so many events.
const SPEND_EVERY: u32 = 5;
const DAY_MILLIS: u64 = 86_400_000;

/// `GET /api/status`, without what only the ledger knows.
pub fn status(gateway: &Gateway) -> Value {
    let state = gateway.state();
    let stats = gateway.ledger.stats();
    let now = gateway.now();
    let backends: Vec<Value> = state
        .backends
        .iter()
        .map(|backend| {
            let replicas = backend.fleet.snapshot();
            let circuit = [CircuitState::Open, CircuitState::HalfOpen, CircuitState::Closed]
                .into_iter()
                .find(|state| replicas.iter().any(|replica| replica.circuit == state.as_str()));
            json!({
                "name": backend.name(),
                "kind": if backend.is_api() { "api" } else { "self_hosted" },
                "healthy": backend.is_serving(),
                "circuit": circuit.map_or("closed", CircuitState::as_str),
                "in_flight": backend.fleet.in_flight(),
                "throttled": backend.throttle.throttled_until(now).is_some(),
                "requests_total": backend.series.attempts_ended(),
                "replicas": if backend.is_api() { Value::Null } else { json!(replicas) },
            })
        })
        .collect();
    json!({
        "now_ms": now.as_millis(),
        "version": env!("CARGO_PKG_VERSION"),
        "draining": gateway.is_draining(),
        "in_flight": gateway.in_flight(),
        "ledger": {
            "available": gateway.ledger.is_available(),
            "reason": gateway.ledger.unavailable_reason(),
            "pending": stats.pending,
            "unrecorded": stats.unrecorded,
        },
        "shared": gateway.sharing.as_ref().map(|sharing| json!({
            "fresh": sharing.is_fresh(),
            "proxies": sharing.proxies(),
            "proxy": sharing.identity().proxy,
            "lease_token": sharing.token(now),
        })),
        "pools": state.pools.iter().map(|pool| pool_status(pool)).collect::<Vec<_>>(),
        "routes": state.routes.iter().map(|route| route_status(route)).collect::<Vec<_>>(),
        "backends": backends,
    })
}

/// How far the guesses of output lengths are off, in tokens: positive `mean` when they are too long.
fn route_status(route: &Route) -> Value {
    let error = route.lengths.lock().ok().and_then(|lengths| lengths.error());
    json!({
        "name": route.spec.name,
        "output_estimate": error.map(|error| json!({
            "mean_error_tokens": error.mean,
            "mean_absolute_error_tokens": error.mean_absolute,
        })),
    })
}

fn pool_status(pool: &Pool) -> Value {
    let view = pool.view.load();
    let (preference, reason) = pool.plan();
    let api = pool.api.as_ref().map(|api| api.name());
    let preferred = match (preference, api) {
        (crate::economics::Preference::Api, Some(api)) => api,
        _ => pool.name(),
    };
    let pinned = pool.pin().map(|pin| if pin == Pin::Api { api.unwrap_or_default() } else { pool.name() });
    let counts = pool.backend.fleet.counts();
    let held = counts.ready + counts.starting;
    let rent = pool.spec.hourly.mul_div_floor(u64::from(held), 1);
    json!({
        "name": pool.name(),
        "policy": policy_name(&pool.policy),
        "billing": pool.spec.billing.as_str(),
        "requests_in_window": view.requests_in_window,
        "volume_requests_per_hour": view.volume_requests_per_hour,
        "break_even_requests_per_hour": view.break_even_requests_per_hour,
        "band": view.band,
        "capacity_requests_per_hour": view.capacity_requests_per_hour,
        "api_usd_per_hour": view.api_usd_per_hour,
        "self_hosted_usd_per_hour": view.self_hosted_usd_per_hour,
        "mix_usd_per_hour": view.mix_usd_per_hour,
        "preferred": preferred,
        "api_backend": api,
        "reason": reason.as_str(),
        "sentence": view.sentence,
        "pinned": pinned,
        "replicas": {
            "wanted": view.wanted,
            "starting": counts.starting,
            "ready": counts.ready,
            "max": pool.spec.max_replicas,
            "controlled": pool.is_controlled,
        },
        "kappa": view.kappa,
        "capacity": view.learnt,
        "rent_usd_per_hour": rent.to_usd_f64(),
        "startup_seconds": pool.backend.fleet.learned_startup().as_secs(),
    })
}

fn policy_name(policy: &RoutePolicy) -> &'static str {
    match policy {
        RoutePolicy::Threshold(_) => "threshold",
        RoutePolicy::Cheapest => "cheapest",
        RoutePolicy::Adaptive => "adaptive",
        RoutePolicy::Api => "api",
        RoutePolicy::SelfHosted => "self_hosted",
        RoutePolicy::Split { .. } => "split",
    }
}

/// `GET /api/spend?since=&until=&by=`: the rows of `breakeven report --format json`.
pub fn spend(gateway: &Gateway, query: &str) -> Result<Value, String> {
    let now = gateway.now();
    let time = |name: &str, default: Timestamp| match query_value(query, name) {
        None => Ok(default),
        Some(text) => crate::commands::report::parse_time(&text, now).map_err(|error| error.to_string()),
    };
    let (since, until) = (time("since", start_of_day(now))?, time("until", now + Duration::from_secs(1))?);
    let by = query_value(query, "by").unwrap_or_else(|| "backend".to_owned());
    let by =
        by.split(',').map(str::parse).collect::<Result<Vec<Key>, _>>().map_err(|error| error.to_string())?;
    let path = gateway.state().config.ledger.path.clone();
    let rows = query::totals(&path, Some(since), Some(until), &by).map_err(|error| error.to_string())?;
    Ok(crate::commands::report::rows_as_json(&by, &rows))
}

/// `POST /api/pin` and `/api/unpin`.
pub fn pin(gateway: &Gateway, body: &[u8], pins: bool) -> Result<(), String> {
    #[derive(serde::Deserialize)]
    struct Wish {
        pool: String,
        backend: Option<String>,
    }
    let wish: Wish = serde_json::from_slice(body)
        .map_err(|_| "send {\"pool\": \"NAME\", \"backend\": \"NAME\"}".to_owned())?;
    let state = gateway.state();
    let pool = state.pool_named(&wish.pool).ok_or_else(|| format!("there is no pool `{}`", wish.pool))?;
    let pin = match (pins, wish.backend.as_deref()) {
        (false, _) => None,
        (true, Some(name)) if name == pool.name() => Some(Pin::SelfHosted),
        (true, Some(name)) if pool.api.as_ref().is_some_and(|api| api.name() == name) => Some(Pin::Api),
        (true, name) => {
            return Err(format!("`{}` does not serve the pool `{}`", name.unwrap_or_default(), pool.name()));
        }
    };
    pool.set_pin(pin);
    let detail = match wish.backend.filter(|_| pins) {
        Some(backend) => format!("pinned to `{backend}`"),
        None => "unpinned".to_owned(),
    };
    tracing::info!(pool = pool.name(), "`{}` was {detail}", pool.name());
    gateway.note("pin", pool.name(), detail);
    Ok(())
}

/// Sends status and new calls until nobody reads them.
pub async fn send_events(gateway: Arc<Gateway>, sender: mpsc::Sender<Bytes>) {
    let mut timer = tokio::time::interval(EVENT_INTERVAL);
    let mut today = Value::Null;
    let mut recent = Value::Null;
    let mut count: u32 = 0;
    loop {
        timer.tick().await;
        let (books, reads_spend) = (gateway.clone(), count.is_multiple_of(SPEND_EVERY));
        count = count.wrapping_add(1);
        let read = tokio::task::spawn_blocking(move || {
            (reads_spend.then(|| spend_today(&books)), recent_calls(&books))
        });
        if let Ok((spend, calls)) = read.await {
            today = spend.flatten().unwrap_or(today);
            recent = calls.unwrap_or(recent);
        }
        let mut status = status(&gateway);
        status["spend"] = json!({ "today": today });
        status["recent"] = recent.clone();
        let event = Bytes::from(format!("event: status\ndata: {status}\n\n"));
        if sender.try_send(event).is_err() {
            return;
        }
    }
}

fn start_of_day(now: Timestamp) -> Timestamp {
    Timestamp::from_millis(now.as_millis() / DAY_MILLIS * DAY_MILLIS)
}

fn spend_today(gateway: &Gateway) -> Option<Value> {
    let now = gateway.now();
    let path = gateway.state().config.ledger.path.clone();
    let rows = query::totals(&path, Some(start_of_day(now)), Some(now + Duration::from_secs(1)), &[Key::Day])
        .ok()?;
    let mut sum = query::Row::default();
    for row in &rows {
        sum.add(row);
    }
    let text = |amount: NanoUsd| amount.to_string();
    Some(json!({
        "requests": sum.requests,
        "cost_usd": text(sum.spend()),
        "api_usd": text(sum.spend() - sum.rent),
        "rent_usd": text(sum.rent),
        "idle_usd": text(sum.idle),
        "all_api_usd": text(sum.all_api),
        "all_self_hosted_usd": text(sum.all_self_hosted),
        "net_savings_usd": text(sum.net_savings()),
    }))
}

fn recent_calls(gateway: &Gateway) -> Option<Value> {
    let path = gateway.state().config.ledger.path.clone();
    let calls = query::recent(&path, RECENT_CALLS).ok()?;
    Some(Value::Array(calls.iter().map(call).collect()))
}

fn call(entry: &Entry<'_>) -> Value {
    json!({
        "id": entry.id,
        "at_ms": entry.opened_at.as_millis(),
        "model": entry.requested_model,
        "backend": entry.backend,
        "reason": entry.reason,
        "status": entry.status,
        "outcome": entry.outcome.as_str(),
        "input_tokens": entry.usage.input_tokens,
        "output_tokens": entry.usage.output_tokens,
        "cost_usd": entry.cost.to_string(),
        "duration_ms": millis(entry.closed_at.since(entry.opened_at)),
        "stream": entry.stream,
    })
}

/// Whether a `Host` is a name of this machine's own loopback.
pub fn is_loopback_host(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_names_are_loopback() {
        for host in ["localhost", "localhost:4001", "127.0.0.1:4001", "127.9.9.9", "[::1]:4001"] {
            assert!(is_loopback_host(host), "{host}");
        }
        for host in ["", "evil.example", "127.0.0.1.evil.example:80", "10.0.0.1", "[::2]:1"] {
            assert!(!is_loopback_host(host), "{host}");
        }
    }
}
