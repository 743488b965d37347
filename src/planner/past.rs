//! How a restart takes up the volume where the ledger left it.

use std::time::Duration;

use tracing::{info, warn};

use super::capacity::{CapacityWatch, speed_in};
use super::pool::PoolPlanner;
use super::startup::{StartupWatch, startup_in};
use crate::economics::volume::VolumeWindow;
use crate::economics::{Slot, Timestamp};
use crate::gateway::Gateway;
use crate::ledger::query::{self, Volume};

/// How far back a restart looks in the ledger, in time and in slots: a day of minutes, and no policy remembers
/// more than a few hours of shorter ones.
const MEMORY: Duration = Duration::from_hours(24);
const MOST_SLOTS: u32 = 10_000;

impl PoolPlanner {
    /// Feeds the policy what the ledger has, slot by slot, up to the start of the present slot; what closed in the
    /// present slot is put with what will. False when there is nothing.
    pub(super) fn remember(&mut self, gateway: &Gateway, routes: &[String], now: Timestamp) -> bool {
        let settings = &self.pool.settings;
        let since = now.saturating_sub(MEMORY.min(settings.slot * MOST_SLOTS));
        let path = gateway.state().config.ledger.path.clone();
        let rows = match query::volume_since(&path, since) {
            Ok(rows) => rows,
            Err(error) => {
                gateway.ledger.report(&error);
                let error = anyhow::Error::new(error);
                warn!("the volume of the last day cannot be read: {error:#}; starting from zero");
                return false;
            }
        };
        let events = query::events(&path, since).unwrap_or_default();
        let of_pool = || events.iter().rev().filter(|event| event.subject == self.pool.name());
        let (speed, startup) = (of_pool().find_map(speed_in), of_pool().find_map(startup_in));
        self.capacity = CapacityWatch::new(speed.unwrap_or(1.0), now);
        self.startup = StartupWatch::new(startup.unwrap_or(self.pool.spec.startup));
        let mut rows = rows.into_iter().filter(|row| row.at < now && routes.contains(&row.route)).peekable();
        let Some(first) = rows.peek() else { return false };
        let mut slot = self.pool.slot_of(first.at);
        self.window = VolumeWindow::new(settings.window, self.pool.slot_start(slot));
        let mut seen = Slot::default();
        for row in rows {
            while slot < self.pool.slot_of(row.at) {
                slot += 1;
                self.remember_slot(slot, std::mem::take(&mut seen));
            }
            seen += demand(&row);
        }
        while slot < self.slot {
            slot += 1;
            self.remember_slot(slot, std::mem::take(&mut seen));
        }
        self.pool.record(now, &seen);
        info!(pool = self.pool.name(), "`{}` takes up the volume in the ledger", self.pool.name());
        true
    }
}

fn demand(row: &Volume) -> Slot {
    Slot { api_cost: row.api_cost, work: row.work, requests: row.requests, tokens: row.usage.total_tokens() }
}
