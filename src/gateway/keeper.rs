//! Keeps virtual keys and budgets up to date while the proxy runs.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tracing::error;

use super::Gateway;
use crate::keys::RefreshError;

/// A key that was made or revoked, and a budget that was changed, are in force after so long.
const INTERVAL: Duration = Duration::from_secs(1);

/// Looks once a second until `shutdown`. While something cannot be read, what was known stays in force.
pub async fn run(gateway: Arc<Gateway>, mut shutdown: watch::Receiver<bool>) {
    let mut timer = tokio::time::interval(INTERVAL);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = shutdown.wait_for(|asked| *asked) => return,
            _ = timer.tick() => {}
        }
        let looking = gateway.clone();
        let looked =
            tokio::task::spawn_blocking(move || looking.keys.refresh(&looking.state().config, looking.now()));
        match looked.await {
            Ok(Ok(())) => gateway.metrics.budgets(gateway.keys.states(gateway.now())),
            Ok(Err(error)) => {
                if let RefreshError::Ledger(error) = &error {
                    gateway.ledger.report(error);
                }
                error!("keys and budgets cannot be brought up to date: {:#}", anyhow::Error::new(error));
            }
            Err(_) => return,
        }
    }
}
