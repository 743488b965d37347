//! What the ledger has for today and for this month, as gauges.
//!
//! Counters begin at zero with the process; an owner also wants to know what the day has cost so far, whatever
//! was restarted meanwhile. A day can have millions of rows, so each look reads only what has been added since
//! the last one. Rows come into the ledger's tables a little later than they happen, and rent is booked once a
//! slot for the slot before: a look ends that much before now, and no row is missed or read twice.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tracing::warn;

use super::Gateway;
use crate::clock::Stopwatch;
use crate::economics::Timestamp;
use crate::ledger::LedgerError;
use crate::ledger::query::{Reader, Row};
use crate::metrics::{Period, PeriodAmounts};

/// How long a row may take into the ledger's tables.
const IMPORT_LAG: Duration = Duration::from_secs(1);
/// How long days are read without asking whether the program ends.
const LONGEST_LOOK: Duration = Duration::from_millis(100);
const SHORTEST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
const DAY: Duration = Duration::from_hours(24);
const DAY_MILLIS: u64 = 86_400_000;

/// The sums of the current UTC day and month up to an instant.
#[derive(Debug, Default)]
pub struct Books {
    until: Timestamp,
    today: Row,
    month: Row,
}

impl Books {
    /// Reads on towards `until`, a day at most, the first time from the beginning of the month. True when it
    /// has come there.
    pub fn read(&mut self, ledger: &Reader, until: Timestamp) -> Result<bool, LedgerError> {
        let month = start_of_month(until);
        if self.until < month {
            *self = Self { until: month, ..Self::default() };
        }
        let midnight = start_of_day(self.until) + DAY;
        let next = until.min(midnight);
        if self.until < next {
            let fresh = ledger.totals(Some(self.until), Some(next), &[])?;
            for row in &fresh {
                self.today.add(row);
                self.month.add(row);
            }
            self.until = next;
        }
        if next == midnight {
            self.today = Row::default();
        }
        Ok(next >= until)
    }

    /// Reads day after day for as long as a look may take. One task for many days, because each would begin a
    /// thread of its own: the last one is not idle again when the next is asked for.
    fn read_on(&mut self, path: &Path, until: Timestamp) -> Result<bool, LedgerError> {
        let look = Stopwatch::start();
        let ledger = Reader::open(path)?;
        loop {
            let is_there = self.read(&ledger, until)?;
            if is_there || look.elapsed() > LONGEST_LOOK {
                return Ok(is_there);
            }
        }
    }

    pub fn amounts(&self) -> Vec<(Period, PeriodAmounts)> {
        vec![(Period::Today, amounts(&self.today)), (Period::Month, amounts(&self.month))]
    }
}

/// Keeps the gauges up until `shutdown`.
pub async fn run(gateway: Arc<Gateway>, mut shutdown: watch::Receiver<bool>) {
    let slot = gateway.state().config.policy.slot;
    let lag = slot + gateway.clock.scaled(IMPORT_LAG);
    let pause = gateway.clock.real(slot).clamp(SHORTEST_PAUSE, LONGEST_PAUSE);
    let mut timer = tokio::time::interval(pause);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut books = Books::default();
    let mut is_current = true;
    loop {
        tokio::select! {
            biased;
            _ = shutdown.wait_for(|asked| *asked) => return,
            _ = timer.tick(), if is_current => {}
            () = std::future::ready(()), if !is_current => {}
        }
        let (path, until) = (gateway.state().config.ledger.path.clone(), gateway.now().saturating_sub(lag));
        let read = tokio::task::spawn_blocking(move || {
            let result = books.read_on(&path, until);
            (books, result)
        });
        let Ok((read, result)) = read.await else { return };
        books = read;
        is_current = result.as_ref().copied().unwrap_or(true);
        match result {
            Ok(true) => gateway.metrics.ledger_amounts(books.amounts()),
            Ok(false) => {}
            Err(error) => {
                gateway.ledger.report(&error);
                warn!("the sums of the day cannot be read: {:#}", anyhow::Error::new(error));
            }
        }
    }
}

fn amounts(row: &Row) -> PeriodAmounts {
    PeriodAmounts {
        cost: row.spend(),
        api: row.spend() - row.rent,
        rent: row.rent,
        idle: row.idle,
        all_api: row.all_api,
        net_savings: row.net_savings(),
    }
}

const fn start_of_day(at: Timestamp) -> Timestamp {
    Timestamp::from_millis(at.as_millis() / DAY_MILLIS * DAY_MILLIS)
}

fn start_of_month(at: Timestamp) -> Timestamp {
    let day_of_month = i64::try_from(at.as_millis())
        .ok()
        .and_then(|millis| jiff::Timestamp::from_millisecond(millis).ok())
        .and_then(|instant| instant.strftime("%d").to_string().parse::<u64>().ok());
    let whole_days = day_of_month.unwrap_or(1).saturating_sub(1);
    Timestamp::from_millis(start_of_day(at).as_millis().saturating_sub(whole_days * DAY_MILLIS))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        let millis = text.parse::<jiff::Timestamp>().unwrap().as_millisecond();
        Timestamp::from_millis(u64::try_from(millis).unwrap())
    }

    #[test]
    fn days_and_months_begin_at_midnight_utc() {
        let now = at("2026-11-25T13:45:01.5Z");
        assert_eq!(start_of_day(now), at("2026-11-25T00:00:00Z"));
        assert_eq!(start_of_month(now), at("2026-11-01T00:00:00Z"));
        assert_eq!(start_of_month(at("2026-11-01T00:00:00Z")), at("2026-11-01T00:00:00Z"));
    }
}
