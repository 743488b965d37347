//! The control loop: sees what the last slot brought, asks each pool's policy, carries the answer out.
//!
//! [`Planner::tick`] is a function of the time that tests call; the loop around it is one line.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tracing::{info, warn};

use crate::economics::break_even::{break_even_requests_per_day, cheapest_fleet, hourly_costs, kappa};
use crate::economics::policy::policy_for;
use crate::economics::volume::VolumeWindow;
use crate::economics::{Billing, Decision, NanoUsd, Policy, Preference, Reason, Slot, Timestamp, Work};
use crate::gateway::{BandView, Gateway, Pin, Pool, PoolView};
use crate::ledger::{RentEntry, query};
use crate::metrics::{CostPerRequest, PoolObservation, SpendKind};

/// The planner looks at least this often, so that gauges and rent are fresh.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);
/// How far back a restart looks in the ledger.
const MEMORY: Duration = Duration::from_hours(24);
const HOURS_PER_DAY: f64 = 24.0;

/// Plans for every pool of a gateway.
pub struct Planner {
    gateway: Arc<Gateway>,
    pools: Vec<PoolPlanner>,
}

/// What the planner keeps of one pool between ticks.
struct PoolPlanner {
    pool: Arc<Pool>,
    policy: Box<dyn Policy>,
    window: VolumeWindow,
    /// The slot that is under way.
    slot: u64,
    decision: Option<Decision>,
    rent: Option<RentEntry>,
}

impl std::fmt::Debug for Planner {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Planner").field("pools", &self.pools.len()).finish_non_exhaustive()
    }
}

impl Planner {
    /// A planner that takes up the volume where the ledger left it.
    pub fn new(gateway: Arc<Gateway>) -> Self {
        let mut planner = Self { gateway, pools: Vec::new() };
        planner.adopt(planner.gateway.now());
        planner
    }

    /// Ticks until `shutdown`, and books the rent up to then.
    pub async fn run(mut self, mut shutdown: watch::Receiver<bool>) {
        let slot = self.gateway.state().config.policy.slot;
        let pause = (self.gateway.clock.real(slot) / 4).clamp(SHORTEST_PAUSE, LONGEST_PAUSE);
        let mut timer = tokio::time::interval(pause);
        timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        loop {
            tokio::select! {
                _ = timer.tick() => self.tick(self.gateway.now()),
                _ = shutdown.wait_for(|asked| *asked) => break,
            }
        }
        self.close(self.gateway.now());
    }

    /// One step: plans for each slot that is over, books rent, refreshes the gauges.
    pub fn tick(&mut self, now: Timestamp) {
        self.adopt(now);
        for planner in &mut self.pools {
            planner.tick(&self.gateway, now);
        }
        let stats = self.gateway.ledger.stats();
        self.gateway.metrics.ledger_stats(
            stats.committed,
            stats.unrecorded,
            stats.pending,
            stats.last_commit,
        );
    }

    /// Books the rent that has fallen due.
    pub fn close(&mut self, now: Timestamp) {
        for planner in &mut self.pools {
            planner.accrue(now);
            planner.book_rent(&self.gateway);
        }
    }

    /// Follows a reload: pools that are new get a planner, those that are gone lose theirs.
    fn adopt(&mut self, now: Timestamp) {
        let state = self.gateway.state();
        let is_current =
            |planner: &PoolPlanner| state.pools.iter().any(|pool| Arc::ptr_eq(pool, &planner.pool));
        for planner in self.pools.iter_mut().filter(|planner| !is_current(planner)) {
            planner.accrue(now);
            planner.book_rent(&self.gateway);
        }
        self.pools.retain(is_current);
        for pool in &state.pools {
            if !self.pools.iter().any(|planner| Arc::ptr_eq(&planner.pool, pool)) {
                let routes: Vec<String> = state
                    .routes
                    .iter()
                    .filter(|route| route.pool.as_ref().is_some_and(|of| Arc::ptr_eq(of, pool)))
                    .map(|route| route.spec.name.clone())
                    .collect();
                self.pools.push(PoolPlanner::new(&self.gateway, pool.clone(), &routes, now));
            }
        }
    }
}

impl PoolPlanner {
    fn new(gateway: &Gateway, pool: Arc<Pool>, routes: &[String], now: Timestamp) -> Self {
        let slot = pool.slot_of(now);
        let mut planner = Self {
            policy: policy_for(&pool.policy, &pool.settings),
            window: VolumeWindow::new(pool.settings.window, now.saturating_sub(pool.settings.window)),
            slot,
            decision: None,
            rent: None,
            pool,
        };
        planner.remember(gateway, routes, now);
        planner
    }

    /// Feeds the policy what the ledger has of the last day, slot by slot.
    fn remember(&mut self, gateway: &Gateway, routes: &[String], now: Timestamp) {
        let path = gateway.state().config.ledger.path.clone();
        let rows = match query::volume_since(&path, now.saturating_sub(MEMORY)) {
            Ok(rows) => rows,
            Err(error) => {
                warn!(%error, "the volume of the last day cannot be read from the ledger: starting from zero");
                return;
            }
        };
        let mut rows = rows.into_iter().filter(|row| row.at < now && routes.contains(&row.route)).peekable();
        let Some(first) = rows.peek() else { return };
        let mut slot = self.pool.slot_of(first.at);
        let mut seen = Slot::default();
        let fleet = self.pool.backend.fleet.counts();
        for row in rows {
            while slot < self.pool.slot_of(row.at) {
                slot += 1;
                self.learn(slot, std::mem::take(&mut seen), fleet);
            }
            seen += Slot {
                api_cost: row.api_cost,
                work: row.work,
                requests: row.requests,
                tokens: row.usage.total_tokens(),
            };
        }
        while slot < self.slot {
            slot += 1;
            self.learn(slot, std::mem::take(&mut seen), fleet);
        }
        if let Some(decision) = self.decision {
            info!(
                pool = self.pool.name(),
                "`{}` takes up the volume of the last day from the ledger",
                self.pool.name()
            );
            self.carry_out(gateway, decision);
        }
    }

    /// Tells the policy of the slot before `slot`, and takes its decision.
    fn learn(&mut self, slot: u64, finished: Slot, fleet: crate::economics::Fleet) {
        let at = self.pool.slot_start(slot);
        self.window.add(at.saturating_sub(Duration::from_millis(1)), finished);
        self.decision = Some(self.policy.decide(&self.pool.spec, at, &finished, fleet));
    }

    fn tick(&mut self, gateway: &Gateway, now: Timestamp) {
        self.accrue(now);
        let current = self.pool.slot_of(now);
        let mut is_new = self.decision.is_none();
        while self.slot < current {
            let finished = self.pool.take(self.slot);
            self.slot += 1;
            self.count_counterfactual(&finished);
            self.learn(self.slot, finished, self.pool.backend.fleet.counts());
            self.reprice();
            self.book_rent(gateway);
            is_new = true;
        }
        if is_new {
            let decision = self.decision.unwrap_or_else(|| {
                let fleet = self.pool.backend.fleet.counts();
                self.policy.decide(&self.pool.spec, self.pool.slot_start(self.slot), &Slot::default(), fleet)
            });
            self.decision = Some(decision);
            self.carry_out(gateway, decision);
        } else if let Some(decision) = self.decision {
            // A pin may have come or gone since.
            self.order(decision);
        }
        self.publish(now);
    }

    /// What the replicas can do until the next slot sets the price of a replica-second.
    fn reprice(&self) {
        let ready = u64::from(self.pool.backend.fleet.counts().ready);
        let micros = u64::try_from(self.pool.settings.slot.as_micros()).unwrap_or(u64::MAX);
        self.pool.reprice(Work(ready.saturating_mul(micros)));
    }

    /// Rent of the replicas that all of a slot's traffic would have needed.
    fn count_counterfactual(&self, finished: &Slot) {
        let spec = &self.pool.spec;
        let slot = self.pool.settings.slot;
        let replicas = match spec.billing {
            Billing::Committed => spec.max_replicas,
            Billing::WhileRunning => finished.replicas_filled(slot).clamp(1, spec.max_replicas.max(1)),
            Billing::PerUse => {
                self.pool.series.all_self_hosted_cost(self.pool.rent_of(finished.work));
                return;
            }
        };
        let start = self.pool.slot_start(self.slot - 1).as_millis();
        let rent = spec.rent_between(start, start + crate::economics::time::millis(slot));
        self.pool.series.all_self_hosted_cost(rent.mul_div_floor(u64::from(replicas), 1));
    }

    fn carry_out(&self, gateway: &Gateway, decision: Decision) {
        let (before, _) = self.pool.plan();
        self.pool.set_plan(decision);
        let (after, reason) = self.pool.plan();
        self.order(decision);
        let name = self.preferred_name(after);
        if before != after {
            info!(
                pool = self.pool.name(),
                backend = name,
                reason = reason.as_str(),
                "preferring `{name}`: {}",
                reason.as_str()
            );
            gateway.note("preference", self.pool.name(), format!("preferring `{name}`: {}", reason.as_str()));
        }
    }

    /// Orders replicas, the owner's pin first: pinned to the API none is held.
    fn order(&self, decision: Decision) {
        let wanted = match self.pool.pin() {
            Some(Pin::Api) => 0,
            Some(Pin::SelfHosted) => decision.target_replicas.max(1),
            None => decision.target_replicas,
        };
        self.pool.series.wanted_replicas(wanted);
        if self.pool.is_controlled {
            self.pool.backend.fleet.set_target(wanted);
        }
    }

    fn preferred_name(&self, preference: Preference) -> &str {
        match (preference, &self.pool.api) {
            (Preference::Api, Some(api)) => api.name(),
            _ => self.pool.name(),
        }
    }

    /// Takes the rent that fell due, into the metrics and towards the next entry.
    fn accrue(&mut self, now: Timestamp) {
        let delta = self.pool.backend.fleet.accrue(now);
        let (attributed, busy) = self.pool.take_attributed();
        let backend = &self.pool.backend;
        backend.series.spend(SpendKind::Capacity, delta.rent);
        self.pool.series.rented(delta.replica_millis);
        let counts = backend.fleet.counts();
        self.pool.series.replicas(counts.starting, counts.ready);
        backend.series.up(backend.is_serving());
        let rent = match self.pool.spec.billing {
            Billing::PerUse => delta.rent + attributed,
            Billing::Committed | Billing::WhileRunning => delta.rent,
        };
        let entry = self.rent.get_or_insert_with(|| RentEntry {
            backend: backend.name().to_owned(),
            from: delta.from,
            to: delta.from,
            replica_millis: 0,
            busy: Work::ZERO,
            rent: NanoUsd::ZERO,
            attributed: NanoUsd::ZERO,
            idle: NanoUsd::ZERO,
        });
        entry.to = delta.to.max(entry.to);
        entry.replica_millis += delta.replica_millis;
        entry.busy += busy;
        entry.rent += rent;
        entry.attributed += attributed;
        entry.idle = entry.rent - entry.attributed;
    }

    fn book_rent(&mut self, gateway: &Gateway) {
        let Some(entry) = self.rent.take() else { return };
        if entry.rent != NanoUsd::ZERO || entry.attributed != NanoUsd::ZERO || entry.replica_millis > 0 {
            gateway.ledger.append_rent(&entry);
        }
    }

    /// Refreshes the gauges and what the status shows.
    fn publish(&mut self, now: Timestamp) {
        let spec = &self.pool.spec;
        let hour = self.window.per_hour(now).unwrap_or_default();
        let counts = self.pool.backend.fleet.counts();
        let replicas = counts.ready.max(1);
        let break_even = break_even_requests_per_day(spec, &hour, 1).map(|daily| daily / HOURS_PER_DAY);
        let margin = self.pool.settings.margin;
        let band =
            break_even.map(|volume| BandView { up: volume * (1.0 + margin), down: volume * (1.0 - margin) });
        let volume = count(hour.requests);
        let capacity = (hour.requests > 0 && hour.work > Work::ZERO)
            .then(|| volume / hour.work.as_replica_seconds_f64() * 3600.0 * f64::from(spec.max_replicas));
        let costs = (hour.requests > 0).then(|| hourly_costs(spec, &hour));
        let kappa = kappa(spec, &hour);
        self.pool.series.observed(&PoolObservation {
            volume_requests_per_hour: volume,
            threshold_requests_per_hour: break_even,
            band_lower_requests_per_hour: band.map(|band| band.down),
            band_upper_requests_per_hour: band.map(|band| band.up),
            capacity_requests_per_hour: capacity,
            kappa,
        });
        self.publish_costs(&hour, replicas);
        let (preference, reason) = self.pool.plan();
        let name = self.preferred_name(preference).to_owned();
        self.pool.series.preferred(&name);
        self.pool.series.pinned(self.pool.pin().is_some());
        let dollars = |amount: NanoUsd| amount.to_usd_f64();
        let view = PoolView {
            volume_requests_per_hour: volume,
            break_even_requests_per_hour: break_even,
            band,
            capacity_requests_per_hour: capacity,
            api_usd_per_hour: costs.map(|costs| dollars(costs.api)),
            self_hosted_usd_per_hour: costs.map(|costs| dollars(costs.self_hosted)),
            mix_usd_per_hour: costs.map(|costs| dollars(costs.mix)),
            kappa,
            wanted: self.decision.map_or(0, |decision| decision.target_replicas),
            sentence: sentence(&name, preference, reason, volume, break_even, cheapest_fleet(spec, &hour)),
        };
        self.pool.view.store(Arc::new(view));
    }

    fn publish_costs(&self, hour: &Slot, replicas: u32) {
        let spec = &self.pool.spec;
        let per_request =
            |amount: NanoUsd| (hour.requests > 0).then(|| amount.to_usd_f64() / count(hour.requests));
        let fee = spec.request_fee.to_usd_f64();
        let rent = spec.hourly.mul_div_floor(u64::from(replicas), 1);
        let marginal = match spec.billing {
            Billing::PerUse => per_request(self.pool.rent_of(hour.work)).map(|rent| rent + fee),
            Billing::Committed | Billing::WhileRunning => Some(fee),
        };
        let own =
            CostPerRequest { marginal_usd: marginal, average_usd: per_request(rent).map(|rent| rent + fee) };
        self.pool.series.costs(self.pool.name(), own);
        if let Some(api) = &self.pool.api {
            let average = per_request(hour.api_cost);
            self.pool
                .series
                .costs(api.name(), CostPerRequest { marginal_usd: average, average_usd: average });
        }
    }
}

/// Who serves and why, for a person.
fn sentence(
    name: &str,
    preference: Preference,
    reason: Reason,
    volume: f64,
    break_even: Option<f64>,
    (replicas, cost): (u32, NanoUsd),
) -> String {
    if reason == Reason::Pinned {
        return format!("`{name}` serves because it is pinned.");
    }
    let Some(break_even) = break_even else {
        return format!("`{name}` serves; there is no traffic yet to compare costs by.");
    };
    let side = if volume >= break_even { "above" } else { "below" };
    let held = match (preference, reason) {
        (_, Reason::Threshold) => " by your threshold",
        (_, Reason::Hysteresis) => " until the change is worth the margin and the dwell time has passed",
        _ => "",
    };
    let plan = match replicas {
        0 => "the API alone is the cheapest".to_owned(),
        1 => "one replica is the cheapest".to_owned(),
        more => format!("{more} replicas are the cheapest"),
    };
    format!(
        "`{name}` serves{held}: {volume:.0} requests an hour are {side} break-even ({break_even:.0}), so {plan}, at ${cost:.2} an hour."
    )
}

#[expect(clippy::cast_precision_loss, reason = "a volume, not an amount")]
fn count(requests: u64) -> f64 {
    requests as f64
}
