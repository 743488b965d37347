//! The ledger's total of a day beside the provider's invoice.

use std::io::{self, Write as _};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use breakeven::clock::Clock;
use breakeven::demo::{Costs, FakeBackend, Personality, Settings};
use breakeven::economics::Timestamp;
use breakeven::gateway::invoices;
use serde_json::{Value, json};
use tempfile::NamedTempFile;
use tracing::subscriber::DefaultGuard;

use crate::support::proxy::Proxy;
use crate::support::{Http, chat};

const KEY: &str = "sk-admin-canary-7d21";
const WARNING: &str = "cannot be compared";
const DAY: Duration = Duration::from_hours(24);
/// 14 November 2023.
const NOON: Timestamp = Timestamp::from_secs(1_699_963_200);

/// A proxy whose provider writes invoices, and what it says meanwhile.
struct House {
    provider: FakeBackend,
    proxy: Proxy,
    clock: Clock,
    said: Said,
    _listening: DefaultGuard,
    _key: NamedTempFile,
}

impl House {
    async fn open() -> Self {
        Self::open_with("").await
    }

    /// With more tables at the end of the configuration.
    async fn open_with(tables: &str) -> Self {
        let said = Said::default();
        let log = tracing_subscriber::fmt().with_ansi(false).with_writer(said.clone()).finish();
        let listening = tracing::subscriber::set_default(log);
        let provider = FakeBackend::start(Personality::OpenAi, Settings::default()).await.unwrap();
        let mut key = NamedTempFile::new().unwrap();
        key.write_all(KEY.as_bytes()).unwrap();
        let clock = Clock::manual(NOON);
        let text = format!(
            r#"
            [backends.openai]
            kind = "api"
            base_url = "{}"
            costs_key = {{ file = "{}" }}
            costs_projects = ["proj_a", "proj_b"]
            [routes.chat]
            models = ["gpt-4o-mini"]
            policy = "api"
            offers = [{{ backend = "openai", price = {{ input = 0.15, output = 0.60 }} }}]
            {tables}
            "#,
            provider.url(),
            key.path().display(),
        );
        let proxy = Proxy::start_at(&text, clock.clone()).await;
        Self { provider, proxy, clock, said, _listening: listening, _key: key }
    }

    /// What the provider charges for any day, page by page, and who may know.
    fn charge(&self, key: &str, pages: Vec<Vec<(Value, &'static str)>>) {
        self.provider.set(|settings| settings.costs = Some(Costs { key: key.to_owned(), pages }));
    }

    /// One call, and what it cost, in dollars.
    async fn call(&self) -> String {
        let reply = Http::new(&self.proxy.url()).post("/chat/completions", &chat("gpt-4o-mini")).await;
        assert_eq!(reply.status, 200);
        self.proxy.entries().await[0].cost.to_string()
    }

    async fn compare(&self) {
        invoices::compare(&self.proxy.running.gateway).await;
    }

    fn scrape(&self) -> String {
        self.proxy.running.gateway.metrics.render()
    }

    fn drift(&self) -> Option<f64> {
        let scrape = self.scrape();
        let start = "breakeven_reconciliation_drift_ratio{backend=\"openai\"} ";
        let value = scrape.lines().find_map(|line| line.strip_prefix(start))?;
        Some(value.parse().unwrap())
    }

    fn warnings(&self) -> usize {
        self.said.text().matches(WARNING).count()
    }
}

/// Everything that was logged.
#[derive(Debug, Clone, Default)]
struct Said(Arc<Mutex<Vec<u8>>>);

impl Said {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl io::Write for Said {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl tracing_subscriber::fmt::MakeWriter<'_> for Said {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

#[tokio::test]
async fn the_day_before_is_compared_to_the_nano_dollar_whatever_its_amounts_look_like() {
    let house = House::open().await;
    let own = house.call().await;
    let number = own.parse::<f64>().unwrap();
    house.charge(KEY, vec![vec![(json!(number), "usd")], vec![], vec![(json!(own), "USD")]]);
    house.clock.advance(DAY);
    house.compare().await;
    assert_eq!(house.drift(), Some(-0.5));
    let said = house.said.text();
    assert!(said.contains(&format!("the ledger has {own} USD, the invoice")), "{said}");
    assert!(!said.contains(KEY) && !house.scrape().contains(KEY));

    let midnight = NOON.as_millis() / 1000 - 12 * 3600;
    let query = format!(
        "start_time={midnight}&end_time={}&bucket_width=1d&limit=1&project_ids=proj_a&project_ids=proj_b&page=2",
        midnight + 86_400
    );
    let mut requests = house.provider.requests().into_iter();
    let asked = requests.find(|seen| seen.uri.query() == Some(&query)).expect("the last page is asked for");
    assert_eq!(asked.uri.path(), "/v1/organization/costs");
    assert_eq!(asked.header("authorization"), format!("Bearer {KEY}"));
}

#[tokio::test]
async fn a_key_that_may_not_read_costs_is_said_once_a_day_and_not_shown() {
    let house = House::open().await;
    house.charge("another", vec![]);
    house.clock.advance(DAY);
    house.compare().await;
    let before = house.warnings();
    house.compare().await;
    assert_eq!((house.drift(), house.warnings()), (None, before));
    house.clock.advance(DAY);
    house.compare().await;
    assert_eq!((house.drift(), house.warnings()), (None, before + 1));
    let said = house.said.text();
    assert!(said.contains("answers 401 Unauthorized; may `costs_key` read"), "{said}");
    assert!(!said.contains("sk-a") && !house.scrape().contains("sk-a"), "{said}");
}

#[tokio::test]
async fn what_is_known_of_a_day_stays_for_that_day_alone() {
    let house = House::open().await;
    house.charge(KEY, vec![]);
    house.clock.advance(DAY);
    house.compare().await;
    assert_eq!(house.drift(), Some(0.0), "nothing was called and nothing is charged");
    house.charge(KEY, vec![vec![(json!(1), "eur")]]);
    house.compare().await;
    assert_eq!(house.drift(), Some(0.0), "the last hour's answer for the same day");
    house.clock.advance(DAY);
    house.compare().await;
    assert_eq!(house.drift(), None);
    assert!(house.said.text().contains("costs are in `eur`"), "{}", house.said.text());
}

#[tokio::test]
async fn calls_that_are_on_no_invoice_have_no_ratio_and_are_said() {
    let house = House::open().await;
    let own = house.call().await;
    house.charge(KEY, vec![vec![(json!("0.0"), "usd")]]);
    house.clock.advance(DAY);
    house.compare().await;
    assert_eq!(house.drift(), None);
    let expected = format!("the ledger has {own} USD, and the invoice 0.00 USD");
    assert!(house.said.text().contains(&expected), "{}", house.said.text());
}

#[tokio::test]
async fn a_list_of_costs_without_an_end_is_given_up() {
    let house = House::open().await;
    house.charge(KEY, vec![vec![(json!(1), "usd")]; 100]);
    house.clock.advance(DAY);
    house.compare().await;
    assert_eq!(house.drift(), None);
    assert!(house.said.text().contains("has more than 8 pages"), "{}", house.said.text());
}

#[tokio::test]
async fn one_of_many_proxies_does_not_take_its_own_ledger_for_that_of_all() {
    let mut redis = NamedTempFile::new().unwrap();
    // Nobody answers there, which the comparison does not ask about.
    redis.write_all(b"redis://127.0.0.1:1/0").unwrap();
    let shared = format!("[shared]\nredis = {{ file = \"{}\" }}", redis.path().display());
    let house = House::open_with(&shared).await;
    house.charge(KEY, vec![]);
    house.clock.advance(DAY);
    house.compare().await;
    assert_eq!(house.drift(), None);
    assert!(house.said.text().contains("other proxies have ledgers of their own"), "{}", house.said.text());
}
