//! Compares what the ledger says of a day with what the provider charges for it.
//!
//! The ledger prices each call from a price list. Whether that is what is paid, the provider alone knows: a price
//! that has changed, a discount, calls that went past the proxy. So each hour the last closed day of every backend
//! with a `costs_key` is asked for, and `(own total - invoice) / invoice` is a gauge. Nothing else depends on it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt as _, Limited};
use reqwest::{StatusCode, Url};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::sync::{Mutex, watch};
use tokio::time::MissedTickBehavior;
use tracing::{info, warn};

use super::Gateway;
use crate::config::{Backend, BackendKind, Config, Costs};
use crate::economics::money::ParseMoneyError;
use crate::economics::{NanoUsd, Timestamp};
use crate::health::probe;
use crate::ledger::query::{self, Key, Row};
use crate::ledger::{LedgerError, postgres};

const INTERVAL: Duration = Duration::from_hours(1);
/// Bound on how often a clock that runs fast makes us ask.
const SHORTEST_PAUSE: Duration = Duration::from_secs(1);
/// A day counts as closed so long after its end: providers book its last costs late, and so may a ledger.
const SETTLING: Duration = Duration::from_hours(6);
const DAY: Duration = Duration::from_hours(24);
const DAY_MILLIS: u64 = 86_400_000;
/// Bound on one page, in real time.
const TIMEOUT: Duration = Duration::from_secs(30);
/// A day's costs are one bucket, and a result a project or a line of the invoice.
const MAX_PAGE_BYTES: usize = 1 << 20;
const MAX_PAGES: usize = 8;

/// What came of earlier rounds, by backend. Its lock is held for a round, so that there is one at a time.
#[derive(Debug, Default)]
pub struct Invoices(Mutex<HashMap<String, Noted>>);

/// Starts of days.
#[derive(Debug, Default)]
struct Noted {
    compared: Option<Timestamp>,
    warned: Option<Timestamp>,
}

/// A UTC day.
#[derive(Debug, Clone, Copy)]
struct Day {
    start: Timestamp,
}

impl Day {
    /// The last one that is over and settled; none in the first days of the epoch.
    fn last_closed(now: Timestamp) -> Option<Self> {
        let day = now.saturating_sub(SETTLING).as_millis() / DAY_MILLIS;
        Some(Self { start: Timestamp::from_millis(day.checked_sub(1)? * DAY_MILLIS) })
    }

    fn end(self) -> Timestamp {
        self.start + DAY
    }
}

/// Compares at once and then every hour, until `shutdown`.
pub async fn run(gateway: Arc<Gateway>, mut shutdown: watch::Receiver<bool>) {
    let mut timer = tokio::time::interval(gateway.clock.real(INTERVAL).max(SHORTEST_PAUSE));
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let rounds = async {
        loop {
            timer.tick().await;
            compare(&gateway).await;
        }
    };
    tokio::select! {
        biased;
        _ = shutdown.wait_for(|asked| *asked) => {}
        () = rounds => {}
    }
}

/// One round: asks each provider for the last closed day, and sets the gauges.
pub async fn compare(gateway: &Gateway) {
    let mut noted = gateway.invoices.0.lock().await;
    let config = gateway.state().config.clone();
    let Some(day) = Day::last_closed(gateway.now()) else { return };
    noted.retain(|name, _| config.backends.iter().any(|backend| backend.name == *name));
    for backend in config.backends.iter().filter(|backend| matches!(backend.kind, BackendKind::Api)) {
        match &backend.costs {
            Some(costs) => {
                let outcome = compared(gateway, &config, backend, costs, day).await;
                note(gateway, &backend.name, day, outcome, noted.entry(backend.name.clone()).or_default());
            }
            None => gateway.metrics.backend(&backend.name).reconciliation_drift(None),
        }
    }
}

/// The drift of one backend, said in the log.
async fn compared(
    gateway: &Gateway,
    config: &Config,
    backend: &Backend,
    costs: &Costs,
    day: Day,
) -> Result<f64, Fault> {
    let own = own_total(gateway, config, &backend.name, day).await?;
    let invoice = invoice(backend, costs, day).await?;
    let drift = drift(own, invoice).ok_or(Fault::NothingInvoiced { own, invoice })?;
    let (name, date) = (&backend.name, date(day));
    info!(backend = %name, "`{name}` on {date}: the ledger has {own} USD, the invoice {invoice} USD");
    Ok(drift)
}

/// Sets the gauge. A failure is said once a day, and leaves what an earlier round found of the same day.
fn note(gateway: &Gateway, name: &str, day: Day, outcome: Result<f64, Fault>, noted: &mut Noted) {
    let series = gateway.metrics.backend(name);
    match outcome {
        Ok(drift) => {
            noted.compared = Some(day.start);
            series.reconciliation_drift(Some(drift));
        }
        Err(fault) => {
            if noted.compared != Some(day.start) {
                series.reconciliation_drift(None);
            }
            if noted.warned.replace(day.start) != Some(day.start) {
                let date = date(day);
                warn!(backend = %name, "the invoice of `{name}` for {date} cannot be compared: {fault}");
            }
        }
    }
}

/// None where the invoice is nothing to compare with.
#[expect(clippy::cast_precision_loss, reason = "a gauge, not an amount")]
fn drift(own: NanoUsd, invoice: NanoUsd) -> Option<f64> {
    if invoice > NanoUsd::ZERO {
        let (own, invoice) = (i128::from(own.as_nanos()), i128::from(invoice.as_nanos()));
        return Some((own - invoice) as f64 / invoice as f64);
    }
    (own == NanoUsd::ZERO && invoice == NanoUsd::ZERO).then_some(0.0)
}

fn date(day: Day) -> String {
    let start = i64::try_from(day.start.as_millis()).ok();
    let start = start.and_then(|millis| jiff::Timestamp::from_millisecond(millis).ok());
    start.map_or_else(String::new, |start| start.strftime("%Y-%m-%d").to_string())
}

/// Why a day could not be compared. Says nothing of an answer's body.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error("the ledger cannot be read: {0}")]
    Ledger(String),
    #[error("the ledger has not imported all of its journal")]
    LedgerBehind,
    #[error("other proxies have ledgers of their own; `ledger.postgres` would bring them together")]
    PartOfTheLedger,
    #[error("the provider does not answer: {0}")]
    Unreachable(String),
    #[error("the provider answers {0}; may `costs_key` read the organisation's costs?")]
    Status(StatusCode),
    #[error("the provider's answer is no list of that day's costs")]
    NotCosts,
    #[error("the provider's list of costs has more than {MAX_PAGES} pages")]
    TooManyPages,
    #[error("the provider's costs are in `{0}`, and the ledger's in usd")]
    Currency(String),
    #[error("the ledger has {own} USD, and the invoice {invoice} USD")]
    NothingInvoiced { own: NanoUsd, invoice: NanoUsd },
}

impl From<LedgerError> for Fault {
    fn from(error: LedgerError) -> Self {
        Self::Ledger(probe::root_cause(&error))
    }
}

impl From<reqwest::Error> for Fault {
    fn from(error: reqwest::Error) -> Self {
        Self::Unreachable(probe::root_cause(&error))
    }
}

/// What the ledger has for a backend on a day: that of all proxies if they have one, else our own.
async fn own_total(gateway: &Gateway, config: &Config, name: &str, day: Day) -> Result<NanoUsd, Fault> {
    let (since, until) = (Some(day.start), Some(day.end()));
    let by = [Key::Backend];
    let rows = match &config.ledger.postgres {
        Some(settings) => postgres::totals(settings, since, until, &by)
            .await
            .map_err(|error| Fault::Ledger(probe::root_cause(&error)))?,
        None if config.shared.is_some() => return Err(Fault::PartOfTheLedger),
        None => {
            if !gateway.ledger.flush().await {
                return Err(Fault::LedgerBehind);
            }
            let path = config.ledger.path.clone();
            let read = tokio::task::spawn_blocking(move || query::totals(&path, since, until, &by));
            read.await.map_err(|error| Fault::Ledger(error.to_string()))??
        }
    };
    Ok(rows.iter().filter(|row| row.keys == [name]).map(Row::spend).sum())
}

/// What the provider charges for a day.
async fn invoice(backend: &Backend, costs: &Costs, day: Day) -> Result<NanoUsd, Fault> {
    let base_url = backend.base_urls.first().map_or("", String::as_str);
    let tls = base_url.starts_with("https://");
    let client = probe::client(backend.timeouts.connect, tls, &backend.authorities)?;
    let mut nanos = 0_i128;
    let mut next = None;
    for _ in 0..MAX_PAGES {
        let page = page(&client, address(base_url, costs, day, next.as_deref())?, backend, costs).await?;
        nanos += page.nanos(day)?;
        next = page.next.filter(|_| page.has_more);
        if next.is_none() {
            return i64::try_from(nanos).map(NanoUsd::from_nanos).map_err(|_| Fault::NotCosts);
        }
    }
    Err(Fault::TooManyPages)
}

fn address(base_url: &str, costs: &Costs, day: Day, page: Option<&str>) -> Result<Url, Fault> {
    let parsed = Url::parse(&format!("{base_url}/organization/costs"));
    let mut url = parsed.map_err(|error| Fault::Unreachable(error.to_string()))?;
    let seconds = |at: Timestamp| (at.as_millis() / 1000).to_string();
    let mut query = url.query_pairs_mut();
    query.append_pair("start_time", &seconds(day.start)).append_pair("end_time", &seconds(day.end()));
    query.append_pair("bucket_width", "1d").append_pair("limit", "1");
    query.extend_pairs(costs.projects.iter().map(|project| ("project_ids", project)));
    query.extend_pairs(page.map(|page| ("page", page)));
    drop(query);
    Ok(url)
}

async fn page(client: &reqwest::Client, url: Url, backend: &Backend, costs: &Costs) -> Result<Page, Fault> {
    let mut request = client.get(url).timeout(TIMEOUT).bearer_auth(costs.key.expose());
    for (name, value) in
        backend.headers.iter().filter(|(name, _)| !name.eq_ignore_ascii_case("authorization"))
    {
        request = request.header(name, value.expose());
    }
    let answer = request.send().await?;
    if !answer.status().is_success() {
        return Err(Fault::Status(answer.status()));
    }
    let body = Limited::new(reqwest::Body::from(answer), MAX_PAGE_BYTES).collect().await;
    let body = body.map_err(|error| Fault::Unreachable(probe::root_cause(error.as_ref())))?;
    serde_json::from_slice(&body.to_bytes()).map_err(|_| Fault::NotCosts)
}

#[derive(Debug, Deserialize)]
struct Page {
    data: Vec<Bucket>,
    #[serde(default)]
    has_more: bool,
    #[serde(default, rename = "next_page")]
    next: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Bucket {
    /// Seconds since the Unix epoch.
    start_time: u64,
    results: Vec<Item>,
}

#[derive(Debug, Deserialize)]
struct Item {
    amount: Amount,
}

#[derive(Debug, Deserialize)]
struct Amount {
    /// A number, or a text that holds one.
    value: Box<RawValue>,
    currency: String,
}

impl Page {
    /// The sum of its amounts in nano-dollars.
    fn nanos(&self, day: Day) -> Result<i128, Fault> {
        if self.data.iter().any(|bucket| Timestamp::from_secs(bucket.start_time) != day.start) {
            return Err(Fault::NotCosts);
        }
        let items = self.data.iter().flat_map(|bucket| &bucket.results);
        items.map(|item| item.amount.usd().map(|usd| i128::from(usd.as_nanos()))).sum()
    }
}

impl Amount {
    /// Exact to the nano-dollar. A share of a day may have more decimals, and is rounded then.
    fn usd(&self) -> Result<NanoUsd, Fault> {
        if !self.currency.eq_ignore_ascii_case("usd") {
            return Err(Fault::Currency(self.currency.chars().take(8).collect()));
        }
        let decimal = self.value.get().trim_matches('"');
        match decimal.parse() {
            Ok(usd) => Ok(usd),
            Err(ParseMoneyError::TooFine(_)) => {
                let usd = decimal.parse().map_err(|_| Fault::NotCosts)?;
                Ok(NanoUsd::from_usd_f64_estimate(usd))
            }
            Err(_) => Err(Fault::NotCosts),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn amount(value: &str, currency: &str) -> Result<i64, Fault> {
        let text = format!(r#"{{"value": {value}, "currency": "{currency}"}}"#);
        serde_json::from_str::<Amount>(&text).unwrap().usd().map(NanoUsd::as_nanos)
    }

    #[test]
    fn an_amount_is_a_number_or_a_text_exact_to_the_nano_dollar() {
        for (value, nanos) in [
            ("0.06", 60_000_000),
            ("\"0.060000001\"", 60_000_001),
            ("9.45e-6", 9_450),
            ("-1", -1_000_000_000),
            ("\"0.00345149999999999999999999\"", 3_451_500),
        ] {
            assert_eq!(amount(value, "USD").unwrap(), nanos, "{value}");
        }
        for value in ["\"much\"", "null", "1e99", "{}"] {
            assert!(matches!(amount(value, "usd"), Err(Fault::NotCosts)), "{value}");
        }
        assert!(matches!(amount("1", "eur"), Err(Fault::Currency(_))));
    }

    #[test]
    fn a_day_is_closed_when_it_has_settled() {
        let day =
            |hours| Day::last_closed(Timestamp::ZERO + Duration::from_hours(hours)).map(|day| day.start);
        assert_eq!(day(29), None);
        assert_eq!(day(30), Some(Timestamp::ZERO));
        assert_eq!(day(53), Some(Timestamp::ZERO));
        assert_eq!(day(54), Some(Timestamp::ZERO + DAY));
    }

    #[test]
    fn an_invoice_of_nothing_agrees_with_nothing_alone() {
        let usd = NanoUsd::from_nanos;
        assert_eq!(drift(usd(0), usd(0)), Some(0.0));
        assert_eq!(drift(usd(0), usd(5)), Some(-1.0));
        assert_eq!(drift(usd(15), usd(10)), Some(0.5));
        assert_eq!(drift(usd(1), usd(0)), None);
        assert_eq!(drift(usd(0), usd(-5)), None);
    }
}
