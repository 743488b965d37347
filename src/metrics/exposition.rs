//! From atomics to Prometheus families, at each scrape.

use std::collections::BTreeMap;
use std::sync::Arc;

use prometheus::core::{Collector, Desc};
use prometheus::proto;

use super::backend::{AttemptResult, BackendSeries, CircuitState, Fault};
use super::catalogue::{self as family, Family, Kind};
use super::instruments::{Gauge, Histogram};
use super::pool::PoolSeries;
use super::series::{ModelTeams, Series};
use super::{ModelShared, Store};
use crate::economics::Reason;
use crate::ledger::postgres::Shipping;
use crate::ledger::{Outcome, UsageSource};

/// The bridge to the `prometheus` registry.
pub(super) struct Exposition {
    store: Arc<Store>,
    descriptions: Vec<Desc>,
}

impl Exposition {
    pub(super) fn new(store: Arc<Store>) -> Self {
        let describe = |family: &&Family| {
            let labels = family.labels.iter().map(|label| (*label).to_owned()).collect();
            Desc::new(
                family.name.to_owned(),
                family.help.to_owned(),
                labels,
                std::collections::HashMap::new(),
            )
            .expect("the catalogue has valid names")
        };
        Self { store, descriptions: family::ALL.iter().map(describe).collect() }
    }
}

impl Collector for Exposition {
    fn desc(&self) -> Vec<&Desc> {
        self.descriptions.iter().collect()
    }

    fn collect(&self) -> Vec<proto::MetricFamily> {
        let mut page = Page::default();
        let store = &*self.store;
        for (name, backend) in store.backends.all().iter() {
            page.backend(name, backend);
        }
        for (name, pool) in store.pools.all().iter() {
            page.pool(name, pool);
        }
        for (name, model) in store.models.all().iter() {
            page.model(name, model);
        }
        page.whole(store);
        page.0.into_values().collect()
    }
}

/// The families filled so far, by name.
#[derive(Default)]
struct Page(BTreeMap<&'static str, proto::MetricFamily>);

impl Page {
    fn backend(&mut self, name: &str, backend: &BackendSeries) {
        self.level(family::IN_FLIGHT, &[name], backend.in_flight.get());
        for result in AttemptResult::ALL {
            let count = backend.attempts[result as usize].get();
            self.count(family::ATTEMPTS, &[name, result.as_str()], count);
        }
        for fault in Fault::ALL.into_iter().filter(|fault| *fault != Fault::CircuitOpen) {
            self.count(family::RETRIES, &[name, fault.as_str()], backend.retries[fault as usize].get());
        }
        self.level(family::BACKEND_UP, &[name], backend.up.get());
        for state in CircuitState::ALL {
            let labels = [name, state.as_str()];
            self.level(family::CIRCUIT_STATE, &labels, i64::from(backend.is_in(state)));
            self.count(family::CIRCUIT_TRANSITIONS, &labels, backend.transitions[state as usize].get());
        }
        for (kind, amount) in backend.spends() {
            self.number(family::SPEND, &[name, kind.as_str()], amount.to_usd_f64());
        }
        self.gauge(family::PRICE_BOOK_TIME, &[name], &backend.prices_confirmed);
        self.gauge(family::RECONCILIATION_DRIFT, &[name], &backend.reconciliation_drift);
        for (model, teams) in backend.models.all().iter() {
            self.model_of_backend(name, model, teams);
        }
    }

    fn model_of_backend(&mut self, backend: &str, name: &str, of_teams: &ModelTeams) {
        let model = &of_teams.model;
        self.histogram(family::DURATION, &[backend, name], &model.duration);
        self.histogram(family::FIRST_TOKEN, &[backend, name], &model.first_token);
        self.histogram(family::PER_OUTPUT_TOKEN, &[backend, name], &model.per_output_token);
        self.count(family::UNPRICED, &[backend, name], model.unpriced.get());
        for (team, series) in of_teams.teams.all().iter() {
            self.series([backend, name, team], series);
        }
    }

    fn series(&mut self, [backend, model, team]: [&str; 3], series: &Series) {
        for outcome in Outcome::ALL {
            let labels = [backend, model, team, outcome.as_str()];
            self.count(family::REQUESTS, &labels, series.outcomes[outcome as usize].get());
        }
        for (kind, tokens) in series.tokens_by_type() {
            self.count(family::TOKENS, &[backend, model, team, kind.as_str()], tokens);
        }
        self.number(family::REQUEST_COST, &[backend, model, team], series.cost.get().to_usd_f64());
    }

    fn model(&mut self, name: &str, model: &ModelShared) {
        self.histogram(family::TOKEN_ESTIMATE_ERROR, &[name], &model.counts.error);
        self.count(family::TOKEN_COUNTS_COMPARED, &[name, "own"], model.counts.own.get());
        self.count(family::TOKEN_COUNTS_COMPARED, &[name, "upstream"], model.counts.upstream.get());
        for (team, comparison) in model.teams.all().iter() {
            self.number(family::ALL_API_COST, &[name, team], comparison.all_api.get().to_usd_f64());
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "replica-seconds, exact up to 285 years of microseconds")]
    fn pool(&mut self, name: &str, pool: &PoolSeries) {
        self.level(family::QUEUE_DEPTH, &[name], pool.queue_depth.get());
        self.histogram(family::QUEUE_WAIT, &[name], &pool.queue_wait);
        self.number(family::ALL_SELF_HOSTED_COST, &[name], pool.all_self_hosted.get().to_usd_f64());
        self.gauge(family::CAPACITY_PRICE, &[name], &pool.hourly);
        self.gauge(family::VOLUME, &[name], &pool.volume);
        self.gauge(family::THRESHOLD, &[name], &pool.threshold);
        self.gauge(family::BAND, &[name, "lower"], &pool.band_lower);
        self.gauge(family::BAND, &[name, "upper"], &pool.band_upper);
        self.gauge(family::POOL_CAPACITY, &[name], &pool.capacity);
        self.gauge(family::KAPPA, &[name], &pool.kappa);
        self.level(family::PINNED, &[name], pool.pinned.get());
        self.level(family::REPLICAS, &[name, "starting"], pool.starting.get());
        self.level(family::REPLICAS, &[name, "ready"], pool.ready.get());
        self.level(family::WANTED_REPLICAS, &[name], pool.wanted.get());
        self.number(family::BUSY, &[name], pool.busy_micros.get() as f64 / 1e6);
        self.number(family::RENTED, &[name], pool.rented_millis.get() as f64 / 1e3);
        for (backend, of_pool) in pool.backends.all().iter() {
            self.gauge(family::MARGINAL_COST, &[backend, name], &of_pool.marginal_cost);
            self.gauge(family::AVERAGE_COST, &[backend, name], &of_pool.average_cost);
            self.level(family::PREFERRED, &[name, backend], of_pool.preferred.get());
            self.count(family::FLIPS, &[name, backend], of_pool.flips.get());
            for reason in Reason::ALL {
                let labels = [name, backend, reason.as_str()];
                self.count(family::DECISIONS, &labels, of_pool.decisions[reason as usize].get());
            }
        }
    }

    fn whole(&mut self, store: &Store) {
        for (team, reasons) in store.rejected.all().iter() {
            for (reason, count) in reasons.all().iter() {
                self.count(family::REJECTED, &[team, reason], count.get());
            }
        }
        for (from, targets) in store.fallbacks.all().iter() {
            for (to, faults) in targets.all().iter() {
                for fault in Fault::ALL {
                    self.count(family::FALLBACKS, &[from, to, fault.as_str()], faults[fault as usize].get());
                }
            }
        }
        self.histogram(family::OVERHEAD, &[], &store.overhead);
        for price in store.prices.load().iter() {
            let labels = [&*price.backend, &*price.model, price.kind.as_str()];
            self.number(family::TOKEN_PRICE, &labels, price.price.to_usd_per_million_f64());
        }
        for budget in store.budgets.load().iter() {
            let name = [&*budget.name];
            self.number(family::BUDGET_LIMIT, &name, budget.limit.to_usd_f64());
            self.number(family::BUDGET_SPENT, &name, budget.spent.to_usd_f64());
            self.number(family::BUDGET_START, &name, super::instruments::seconds(budget.from));
            self.number(family::BUDGET_END, &name, super::instruments::seconds(budget.to));
        }
        for (period, amounts) in store.periods.load().iter() {
            for (amount, value) in amounts.named() {
                self.number(family::LEDGER_AMOUNT, &[period.as_str(), amount], value.to_usd_f64());
            }
        }
        for source in UsageSource::ALL {
            self.count(family::TOKEN_COUNTS, &[source.as_str()], store.token_counts[source as usize].get());
        }
        self.count(family::LEDGER_RECORDS, &["committed"], store.ledger_committed.get());
        self.count(family::LEDGER_RECORDS, &["dropped"], store.ledger_dropped.get());
        self.level(family::LEDGER_PENDING, &[], store.ledger_pending.get());
        self.gauge(family::LEDGER_COMMIT_TIME, &[], &store.ledger_committed_at);
        self.shipping(store.shipping.get().map_or(&Shipping::default(), Arc::as_ref));
        self.level(family::RELOAD_SUCCESS, &[], store.reload_success.get());
        self.gauge(family::RELOAD_TIME, &[], &store.reloaded_at);
        self.count(family::LABEL_OVERFLOW, &["model"], store.model_overflow.get());
        self.count(family::LABEL_OVERFLOW, &["team"], store.team_overflow.get());
        self.count(family::LABEL_OVERFLOW, &["budget"], store.budget_overflow.get());
        self.level(family::SHARED_VOLUME_STALE, &[], store.shared_volume_stale.get());
        self.level(family::SHARED_PROXIES, &[], store.shared_proxies.get());
        self.level(family::PLANNER_LEASE, &[], store.planner_lease.get());
        self.count(family::PANICS, &[], store.panics.get());
        self.gauge(family::RENDER_DURATION, &[], &store.render_duration);
        self.number(family::BUILD_INFO, &[env!("CARGO_PKG_VERSION"), super::REVISION], 1.0);
    }

    /// The copy in Postgres; where there is none, nothing waits for it and nothing went there.
    fn shipping(&mut self, shipping: &Shipping) {
        self.count(family::LEDGER_SHIPPED, &[], shipping.rows());
        self.count(family::LEDGER_UNSHIPPED, &[], shipping.waiting());
        self.count(family::LEDGER_SHIP_FAILURES, &[], shipping.failures());
        if let Some(at) = shipping.shipped_at() {
            self.number(family::LEDGER_SHIP_TIME, &[], super::instruments::seconds(at));
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "Prometheus has floats only; exact up to 2^53")]
    fn count(&mut self, family: &'static Family, labels: &[&str], count: u64) {
        self.number(family, labels, count as f64);
    }

    #[expect(clippy::cast_precision_loss, reason = "Prometheus has floats only; exact up to 2^53")]
    fn level(&mut self, family: &'static Family, labels: &[&str], level: i64) {
        self.number(family, labels, level as f64);
    }

    fn gauge(&mut self, family: &'static Family, labels: &[&str], gauge: &Gauge) {
        if let Some(value) = gauge.get() {
            self.number(family, labels, value);
        }
    }

    fn number(&mut self, family: &'static Family, labels: &[&str], value: f64) {
        let mut metric = proto::Metric::from_label(pairs(family, labels));
        if family.kind == Kind::Counter {
            let mut counter = proto::Counter::default();
            counter.set_value(value);
            metric.set_counter(counter);
        } else {
            let mut gauge = proto::Gauge::default();
            gauge.set_value(value);
            metric.set_gauge(gauge);
        }
        self.push(family, metric);
    }

    fn histogram(&mut self, family: &'static Family, labels: &[&str], histogram: &Histogram) {
        let reading = histogram.read();
        let bucket = |(bound, count): (f64, u64)| {
            let mut bucket = proto::Bucket::default();
            bucket.set_upper_bound(bound);
            bucket.set_cumulative_count(count);
            bucket
        };
        let mut value = proto::Histogram::default();
        value.set_bucket(reading.cumulative.into_iter().map(bucket).collect());
        value.set_sample_count(reading.count);
        value.set_sample_sum(reading.sum);
        let mut metric = proto::Metric::from_label(pairs(family, labels));
        metric.set_histogram(value);
        self.push(family, metric);
    }

    fn push(&mut self, family: &'static Family, metric: proto::Metric) {
        let entry = self.0.entry(family.name).or_insert_with(|| {
            let mut empty = proto::MetricFamily::default();
            empty.set_name(family.name.to_owned());
            empty.set_help(family.help.to_owned());
            empty.set_field_type(match family.kind {
                Kind::Counter => proto::MetricType::COUNTER,
                Kind::Gauge => proto::MetricType::GAUGE,
                Kind::Histogram => proto::MetricType::HISTOGRAM,
            });
            empty
        });
        entry.mut_metric().push(metric);
    }
}

fn pairs(family: &Family, values: &[&str]) -> Vec<proto::LabelPair> {
    debug_assert_eq!(family.labels.len(), values.len(), "{} has other labels", family.name);
    let pair = |(name, value): (&&str, &&str)| {
        let mut pair = proto::LabelPair::default();
        pair.set_name((*name).to_owned());
        pair.set_value((*value).to_owned());
        pair
    };
    family.labels.iter().zip(values).map(pair).collect()
}
