//! The control loop: sees what the last slot brought, asks each pool's policy, carries the answer out.
//!
//! [`Planner::tick`] is a function of the time that tests call; the loop around it is one line. A policy is
//! told of each slot once, in order, exactly as the simulator tells it, and every change of its target goes
//! into the ledger: replaying the ledger gives the same decisions.

mod capacity;
mod past;
mod pool;
mod rent;
mod startup;
#[cfg(test)]
mod tests;
mod view;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::economics::Timestamp;
use crate::gateway::{Gateway, Pool};
pub use capacity::{at_speed, speed_in};
use pool::PoolPlanner;
pub use pool::{CAPACITY_EVENT, REPLICAS_EVENT, STARTUP_EVENT};
use rent::RentBook;
pub use startup::startup_in;

/// The planner looks at least this often, so that gauges and rent are fresh.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// With other proxies it looks so many times between two exchanges.
const LOOKS_A_REFRESH: u32 = 2;
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);

/// Plans for every pool of a gateway.
pub struct Planner {
    gateway: Arc<Gateway>,
    pools: Vec<PoolPlanner>,
    /// Pools that a reload has replaced, while calls that began with them are in flight.
    retired: Vec<Arc<Pool>>,
}

impl std::fmt::Debug for Planner {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Planner").field("pools", &self.pools.len()).finish_non_exhaustive()
    }
}

impl Planner {
    /// A planner that takes up the volume where the ledger left it.
    pub fn new(gateway: Arc<Gateway>) -> Self {
        let mut planner = Self { gateway, pools: Vec::new(), retired: Vec::new() };
        planner.adopt(planner.gateway.now());
        planner
    }

    /// Ticks until `shutdown`, and books the rent up to then.
    pub async fn run(mut self, mut shutdown: watch::Receiver<bool>) {
        let slot = self.gateway.state().config.policy.slot;
        let longest = match &self.gateway.sharing {
            Some(sharing) => sharing.refresh() / LOOKS_A_REFRESH,
            None => LONGEST_PAUSE,
        };
        let pause = (self.gateway.clock.real(slot) / 4).min(longest).max(SHORTEST_PAUSE);
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
        self.settle_retired(now);
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
            planner.close(&self.gateway, now);
        }
        self.settle_retired(now);
    }

    /// Books what has fallen due since the planner ended: the rent of replicas until their stop was confirmed.
    pub fn book_rest(gateway: &Gateway) {
        let now = gateway.now();
        for pool in &gateway.state().pools {
            let duty = gateway.rent_duty(pool.name(), true, now);
            let mut rent = RentBook::default();
            rent.accrue(pool, duty, now);
            rent.book(gateway, pool, duty);
        }
    }

    /// Follows a reload: pools that are new get a planner, those that are gone lose theirs.
    fn adopt(&mut self, now: Timestamp) {
        let state = self.gateway.state();
        let is_current =
            |planner: &PoolPlanner| state.pools.iter().any(|pool| Arc::ptr_eq(pool, &planner.pool));
        let (current, gone): (Vec<_>, Vec<_>) = self.pools.drain(..).partition(is_current);
        self.pools = current;
        for mut planner in gone {
            planner.close(&self.gateway, now);
            self.retired.push(planner.pool.clone());
        }
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

    /// A call holds its pool to its end, and what it worked is attributed there: books it, and forgets the pools
    /// that no call holds any more.
    fn settle_retired(&mut self, now: Timestamp) {
        for pool in &self.retired {
            let mut rent = RentBook::default();
            rent.attribute(pool, now);
            rent.end_row(&self.gateway.ledger);
        }
        self.retired.retain(|pool| Arc::strong_count(pool) > 1 || pool.has_attributed());
    }
}
