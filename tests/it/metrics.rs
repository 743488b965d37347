//! The scrape as Prometheus sees it: complete from the start, bounded, exact in money.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use breakeven::config::{self, Config};
use breakeven::economics::{NanoUsd, Reason, Timestamp, Usage, Work};
use breakeven::gateway::books::Books;
use breakeven::ledger::postgres::Shipping;
use breakeven::ledger::query::{self, Row};
use breakeven::ledger::{Entry, Outcome, UsageSource};
use breakeven::metrics::{
    self, AttemptResult, BudgetState, CircuitState, CostPerRequest, Fault, Metrics, Period, PeriodAmounts,
    PoolObservation, SpendKind, catalogue,
};

use crate::ledger::{api_call, open};

#[test]
fn every_configured_series_is_there_at_zero_before_the_first_call() {
    let scrape = Scrape::of(&Metrics::new(&config(&["chat"], &["search"], 2000)));
    for series in [
        r#"breakeven_requests_total{backend="gpu",model="chat",team="search",outcome="timeout"}"#,
        r#"breakeven_requests_total{backend="openai",model="chat",team="other",outcome="success"}"#,
        r#"breakeven_tokens_total{backend="gpu",model="chat",team="other",type="input_cached"}"#,
        r#"breakeven_request_cost_usd_total{backend="gpu",model="chat",team="search"}"#,
        r#"breakeven_all_api_cost_usd_total{model="chat",team="search"}"#,
        r#"breakeven_spend_usd_total{backend="openai",kind="tokens"}"#,
        r#"breakeven_spend_usd_total{backend="gpu",kind="capacity"}"#,
        r#"breakeven_route_decisions_total{pool="gpu",backend="openai",reason="overflow"}"#,
        r#"breakeven_route_flips_total{pool="gpu",to="gpu"}"#,
        r#"breakeven_fallbacks_total{from="gpu",to="openai",reason="circuit_open"}"#,
        r#"breakeven_rejected_requests_total{team="search",reason="budget"}"#,
        r#"breakeven_time_to_first_token_seconds_bucket{backend="gpu",model="chat",le="+Inf"}"#,
        "breakeven_panics_total",
        "breakeven_ledger_shipped_records_total",
        "breakeven_ledger_unshipped_records",
        "breakeven_ledger_ship_failures_total",
    ] {
        assert_eq!(scrape.value(series), Some(0.0), "{series}");
    }
    assert_eq!(scrape.value(r#"breakeven_capacity_price_usd_per_hour{pool="gpu"}"#), Some(2.99));
    assert_eq!(
        scrape.value(
            r#"breakeven_token_price_usd_per_million_tokens{backend="openai",model="chat",type="input"}"#
        ),
        Some(0.15)
    );
}

#[test]
fn every_family_of_the_catalogue_is_rendered_and_no_other() {
    let metrics = Metrics::new(&config(&["chat"], &[], 2000));
    everything_happens(&metrics);
    metrics.render();
    let text = metrics.render();
    let rendered: Vec<&str> =
        text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    let mut promised: Vec<&str> = catalogue::ALL.iter().map(|family| family.name).collect();
    promised.sort_unstable();
    assert_eq!(rendered, promised);
}

#[test]
fn money_is_rendered_to_the_nano_dollar() {
    let metrics = Metrics::new(&config(&["chat"], &[], 2000));
    let series = metrics.series("openai", "chat", "");
    for _ in 0..3 {
        series.cost(NanoUsd::from_nanos(1_234_567_890_000_001));
    }
    let line =
        r#"breakeven_request_cost_usd_total{backend="openai",model="chat",team="other"} 3703703.670000003"#;
    assert!(metrics.render().lines().any(|found| found == line), "{}", metrics.render());
}

#[test]
fn a_name_that_is_not_configured_is_counted_as_other() {
    let metrics = Metrics::new(&config(&["chat"], &["search"], 2000));
    metrics.series("openai", "no-such-model", "no-such-team").finished(Outcome::Success);
    let scrape = Scrape::of(&metrics);
    let other = r#"breakeven_requests_total{backend="openai",model="other",team="other",outcome="success"}"#;
    assert_eq!(scrape.value(other), Some(1.0));
    assert_eq!(scrape.value(r#"breakeven_label_overflow_total{label="model"}"#), Some(1.0));
    assert_eq!(scrape.value(r#"breakeven_label_overflow_total{label="team"}"#), Some(1.0));
    assert!(!metrics.render().contains("no-such"));
}

#[test]
fn a_dated_model_counts_under_its_configured_name() {
    let metrics = Metrics::new(&config(&["chat"], &[], 2000));
    metrics.series("openai", "chat-2024-07-18", "").finished(Outcome::Success);
    let series = r#"breakeven_requests_total{backend="openai",model="chat",team="other",outcome="success"}"#;
    assert_eq!(Scrape::of(&metrics).value(series), Some(1.0));
}

#[test]
fn a_scrape_never_has_more_lines_than_allowed() {
    let models: Vec<String> = (0..200).map(|n| format!("model-{n}")).collect();
    let models: Vec<&str> = models.iter().map(String::as_str).collect();
    for max_series in [800, 2000, 5000] {
        let metrics = Metrics::new(&config(&models, &["search", "support"], max_series));
        everything_happens(&metrics);
        metrics.budgets((0..60).map(budget).collect());
        for model in &models {
            for (backend, team) in [("openai", "search"), ("gpu", "support"), ("gpu", "")] {
                metrics.series(backend, model, team).finished(Outcome::Success);
            }
        }
        let scrape = Scrape::of(&metrics);
        assert!(scrape.0.len() <= max_series, "{} lines of {max_series}", scrape.0.len());
        let finished: f64 = scrape.sum("breakeven_requests_total{");
        assert!((finished - 601.0).abs() < 1e-9, "all calls are counted somewhere: {finished}");
    }
}

#[test]
fn a_reload_adds_series_and_keeps_counts() {
    let metrics = Metrics::new(&config(&["chat"], &[], 2000));
    metrics.series("openai", "chat", "").finished(Outcome::Success);
    metrics.reconfigure(&config(&["chat", "mini"], &["search"], 2000));
    let scrape = Scrape::of(&metrics);
    let kept = r#"breakeven_requests_total{backend="openai",model="chat",team="other",outcome="success"}"#;
    let added = r#"breakeven_requests_total{backend="openai",model="mini",team="search",outcome="success"}"#;
    assert_eq!(scrape.value(kept), Some(1.0));
    assert_eq!(scrape.value(added), Some(0.0));
}

#[test]
fn reloading_many_times_does_not_eat_the_room_for_series() {
    let config = config(&["chat"], &["search"], 2000);
    let metrics = Metrics::new(&config);
    let before = Scrape::of(&metrics).0.len();
    for _ in 0..100 {
        metrics.reconfigure(&config);
    }
    assert_eq!(Scrape::of(&metrics).0.len(), before + 1, "one more: the time of the first scrape");
    assert_eq!(Scrape::of(&metrics).value(r#"breakeven_label_overflow_total{label="model"}"#), Some(0.0));
}

/// Samples of one scrape by series.
struct Scrape(BTreeMap<String, f64>);

impl Scrape {
    fn of(metrics: &Metrics) -> Self {
        let text = metrics.render();
        let samples = text.lines().filter(|line| !line.starts_with('#')).map(|line| {
            let (series, value) = line.rsplit_once(' ').expect("a sample has a value");
            (series.to_owned(), value.parse().expect("a value is a number"))
        });
        Self(samples.collect())
    }

    fn value(&self, series: &str) -> Option<f64> {
        self.0.get(series).copied()
    }

    fn sum(&self, prefix: &str) -> f64 {
        self.0.iter().filter(|(series, _)| series.starts_with(prefix)).map(|(_, value)| value).sum()
    }
}

/// One of everything that can be counted.
fn everything_happens(metrics: &Metrics) {
    let at = Timestamp::from_secs(1_800_000_000);
    let usd = NanoUsd::from_nanos(1_000_000_000);
    let shipping = Arc::new(Shipping::default());
    shipping.note(3, 0, at);
    metrics.follow_shipping(shipping);
    let series = metrics.series("openai", "chat", "");
    series.finished(Outcome::Success);
    series.tokens(&Usage::new(10, 20), 0);
    series.counts_compared(9, 10);
    series.first_token(Duration::from_millis(30));
    series.decoding(Duration::from_millis(300), 20);
    series.duration(Duration::from_millis(400));
    series.unpriced();
    let backend = metrics.backend("openai");
    backend.attempt_began();
    backend.attempt_ended(AttemptResult::Ok);
    backend.retried(Fault::Timeout);
    backend.circuit(CircuitState::Open);
    backend.spend(SpendKind::Tokens, usd);
    backend.reconciliation_drift(Some(0.01));
    let pool = metrics.pool("gpu");
    pool.observed(&PoolObservation {
        volume_requests_per_hour: 100.0,
        threshold_requests_per_hour: Some(90.0),
        band_lower_requests_per_hour: Some(81.0),
        band_upper_requests_per_hour: Some(99.0),
        capacity_requests_per_hour: Some(4000.0),
        kappa: Some(3.0),
    });
    for backend in ["openai", "gpu"] {
        pool.costs(backend, CostPerRequest { marginal_usd: Some(0.0), average_usd: Some(0.001) });
        pool.backend(backend).decision(Reason::Cheapest);
        pool.preferred(backend);
    }
    pool.entered_queue();
    pool.left_queue(Duration::from_millis(3));
    pool.replicas(1, 2);
    pool.wanted_replicas(3);
    pool.busy(Work::from_replica_seconds(1));
    pool.rented(1000);
    pool.all_self_hosted_cost(usd);
    metrics.rejected("", "budget");
    metrics.fell_back("openai", "gpu", Fault::Http5xx);
    metrics.overhead(Duration::from_micros(80));
    metrics.tokens_counted(UsageSource::UpstreamUsage);
    metrics.ledger_committed(1, at);
    metrics.ledger_pending(0);
    metrics.ledger_amounts(vec![(Period::Today, PeriodAmounts { cost: usd, ..PeriodAmounts::default() })]);
    metrics.budgets(vec![budget(0)]);
    metrics.config_loaded(at);
}

fn budget(number: u32) -> BudgetState {
    let at = Timestamp::from_secs(1_800_000_000);
    let usd = NanoUsd::from_nanos(1_000_000_000);
    BudgetState { name: format!("budget-{number}"), limit: usd, spent: usd, from: at, to: at }
}

/// An API and a self-hosted backend that both serve `models`.
fn config(models: &[&str], teams: &[&str], max_series: usize) -> Config {
    let text = format!(
        r#"
        metrics = {{ teams = {teams:?}, max_series = {max_series} }}
        [backends.openai]
        kind = "api"
        base_url = "http://127.0.0.1:1/v1"
        [backends.gpu]
        kind = "self_hosted"
        base_url = "http://127.0.0.1:2/v1"
        hourly_usd = 2.99
        capacity = {{ input_tokens_per_second = 15000, output_tokens_per_second = 10000, max_in_flight = 64 }}
        [routes.chat]
        models = {models:?}
        offers = [
          {{ backend = "openai", price = {{ input = 0.15, output = 0.60 }} }},
          {{ backend = "gpu", model = "llama" }},
        ]
        "#
    );
    config::parse(&text, "metrics.toml", &|_| None).unwrap_or_else(|problems| panic!("{problems}"))
}

#[test]
fn the_content_type_is_the_text_format() {
    assert!(metrics::CONTENT_TYPE.starts_with("text/plain; version=0.0.4"));
}

#[test]
fn the_manual_has_a_row_for_every_family() {
    let manual = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/metrics.md")).unwrap();
    for family in catalogue::ALL {
        let labels: Vec<String> = family.labels.iter().map(|label| format!("`{label}`")).collect();
        let labels = if labels.is_empty() { "none".to_owned() } else { labels.join(", ") };
        let kind = format!("{:?}", family.kind).to_lowercase();
        let help = family.help.replace('|', "\\|");
        let row = format!("| `{}` | {kind} | {labels} | {help} |", family.name);
        assert!(manual.contains(&row), "docs/metrics.md lacks the row\n{row}");
    }
}

#[test]
fn every_alert_has_a_paragraph_in_the_runbook_and_a_test() {
    let file =
        |path: &str| std::fs::read_to_string(format!("{}/{path}", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let (alerts, tests, runbook) = (
        file("deploy/prometheus/alerts.yml"),
        file("deploy/prometheus/rules_test.yml"),
        file("docs/runbook.md"),
    );
    let names: Vec<&str> =
        alerts.lines().filter_map(|line| line.trim_start().strip_prefix("- alert: ")).collect();
    assert!(names.len() > 20);
    for name in names {
        let heading = format!("\n## {name}\n");
        assert!(runbook.contains(&heading), "docs/runbook.md lacks {name}");
        assert!(alerts.contains(&format!("docs/runbook.md#{}\n", name.to_lowercase())), "{name} has no link");
        let case = format!("alertname: {name}\n");
        let fires = tests.split(&case).skip(1).any(|rest| rest.trim_start().starts_with("exp_alerts:"));
        assert!(fires, "{name} is not tested");
    }
}

#[test]
fn the_sums_of_day_and_month_are_those_of_the_ledger_however_often_they_are_read() {
    const DAY: u64 = 86_400;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    // The second of January 1970 and the days after it.
    let seconds = [DAY + 10, DAY + 70, 2 * DAY - 1, 2 * DAY, 2 * DAY + 5, 3 * DAY + 7, 40 * DAY];
    let ledger = open(&path);
    for (id, second) in (1..).zip(seconds) {
        let _batch = ledger.append(&Entry { closed_at: Timestamp::from_secs(second), ..api_call(id, 0) });
    }
    drop(ledger);

    let reader = query::Reader::open(&path).unwrap();
    let mut books = Books::default();
    for until in (0..=41).flat_map(|day| [day * DAY, day * DAY + 8, day * DAY + 60]) {
        while !books.read(&reader, Timestamp::from_secs(until)).unwrap() {}
        let month = if until >= 31 * DAY { 31 * DAY } else { 0 };
        for (period, since) in [(Period::Today, until / DAY * DAY), (Period::Month, month)] {
            let range = (Some(Timestamp::from_secs(since)), Some(Timestamp::from_secs(until)));
            let rows = query::totals(&path, range.0, range.1, &[]).unwrap();
            let expected: NanoUsd = rows.iter().map(Row::spend).sum();
            let amounts = books.amounts();
            let (_, found) = amounts.iter().find(|(of, _)| *of == period).unwrap();
            assert_eq!(found.cost, expected, "{period:?} until {until}");
        }
    }
    assert_ne!(books.amounts()[1].1.cost, NanoUsd::ZERO, "the last month had a call");
}
