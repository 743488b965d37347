//! The loop that ships: read, insert, commit, remember; and wait when Postgres is away.
//!
//! The cursor moves after the commit, so rows arrive at least once; a row that is there already stays as it is, so
//! they are there once. One batch is in memory, however long Postgres is away: what waits is in the ledger's file.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use super::session::Session;
use super::source::{Source, waiting};
use super::{PostgresError, Shipping};
use crate::clock::Clock;
use crate::config::PostgresSettings;
use crate::ledger::writer::root_cause;

/// How often it looks for new rows, and how often it counts those that wait.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Pause after the first failure; it doubles with each, up to the longest, and half of it is chance.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub(super) struct Shipment {
    pub(super) settings: PostgresSettings,
    pub(super) path: PathBuf,
    pub(super) instance: String,
    pub(super) clock: Clock,
    pub(super) shipping: Arc<Shipping>,
    pub(super) stop: watch::Receiver<bool>,
}

/// Ships until it is told to stop, and then what is left, if Postgres takes it.
pub(super) async fn run(mut shipment: Shipment) {
    let mut failures = 0;
    loop {
        let Err(error) = shipment.session(&mut failures).await else { return };
        failures += 1;
        shipment.note_failure(&error, failures);
        let pause = pause(failures, fastrand::f64());
        if shipment.wait(pause).await {
            return;
        }
    }
}

/// How long to wait after so many failures in a row; `chance` is from 0 to 1.
fn pause(failures: u32, chance: f64) -> Duration {
    let doubled = FIRST_PAUSE.saturating_mul(1 << failures.saturating_sub(1).min(16));
    doubled.min(LONGEST_PAUSE).mul_f64(0.5 + chance / 2.0)
}

impl Shipment {
    /// Ships over one connection. Ends without an error when it was told to stop and nothing is left.
    async fn session(&mut self, failures: &mut u32) -> Result<(), PostgresError> {
        let source = Source::open(&self.path)?;
        self.shipping.note_waiting(source.shipped()?.rows_before(source.end()?));
        let begun = Session::begin(&self.settings, source.ledger_id()?, &self.instance, self.clock.now());
        let (mut session, there) = begun.await?;
        // A database that was restored, or is another one, lacks what the cursor says it has.
        source.set_shipped(source.shipped()?.min(there))?;
        drop(source);
        if std::mem::take(failures) > 0 {
            info!("Postgres is back: {} rows to ship", waiting(&self.path)?);
        }
        loop {
            let is_last = *self.stop.borrow();
            session.look_ahead(self.clock.now()).await?;
            self.pass(&mut session).await?;
            *failures = 0;
            if is_last {
                return Ok(());
            }
            self.wait(LOOK_EVERY).await;
        }
    }

    /// Ships all that is there.
    async fn pass(&self, session: &mut Session) -> Result<(), PostgresError> {
        let source = Source::open(&self.path)?;
        let mut place = source.shipped()?;
        loop {
            let batch = source.next(place, self.settings.batch_rows)?;
            if batch.rows() > 0 {
                session.ship(&batch).await?;
                source.set_shipped(batch.end)?;
                place = batch.end;
            }
            let waiting = place.rows_before(source.end()?);
            self.shipping.note(batch.rows() as u64, waiting, self.clock.now());
            if batch.rows() == 0 {
                return Ok(());
            }
        }
    }

    fn note_failure(&self, error: &PostgresError, failures: u32) {
        self.shipping.note_failure();
        // Once an outage: the metrics say how long it lasts.
        if failures == 1 {
            warn!(
                "{error}: {}; rows stay in the ledger meanwhile, and are shipped when it is back",
                root_cause(error)
            );
        }
    }

    /// Waits, and goes on counting what waits. True when it was told to stop.
    async fn wait(&mut self, pause: Duration) -> bool {
        let until = Instant::now() + pause;
        loop {
            let next = until.min(Instant::now() + LOOK_EVERY);
            tokio::select! {
                _ = self.stop.wait_for(|asked| *asked) => return true,
                () = sleep_until(next) => {}
            }
            if Instant::now() >= until {
                return false;
            }
            if let Ok(waiting) = waiting(&self.path) {
                self.shipping.note_waiting(waiting);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_half_of_each_is_chance() {
        let millis = |failures, chance| pause(failures, chance).as_millis();
        assert_eq!([1, 2, 3].map(|failures| millis(failures, 1.0)), [500, 1000, 2000]);
        assert_eq!((millis(1, 0.0), millis(7, 1.0), millis(u32::MAX, 0.0)), (250, 30_000, 15_000));
    }
}
