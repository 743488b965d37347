//! Many proxies with one Redis: real servers, real processes.

mod orders;
mod process;
mod proxies;
mod store;
mod three;

use std::time::Duration;

use breakeven::config::{Secret, Shared};

use crate::support::redis::Redis;

/// Settings of a deployment that is quick to notice who is gone.
fn settings(redis: &Redis) -> Shared {
    Shared {
        redis: Secret::new(redis.url()),
        ca: None,
        prefix: "test:".to_owned(),
        refresh: Duration::from_millis(100),
        lease: Duration::from_millis(600),
        connect_timeout: Duration::from_secs(5),
        timeout: Duration::from_secs(5),
    }
}

/// Tries again until something is so, for at most `patience`.
async fn until<T>(what: &str, patience: Duration, look: impl AsyncFnMut() -> Option<T>) -> T {
    soon(patience, look).await.unwrap_or_else(|| panic!("not within {patience:?}: {what}"))
}

/// The same, for who can say more of why it is not so.
async fn soon<T>(patience: Duration, mut look: impl AsyncFnMut() -> Option<T>) -> Option<T> {
    let mut timer = tokio::time::interval(Duration::from_millis(10));
    let found = async {
        loop {
            timer.tick().await;
            if let Some(found) = look().await {
                return found;
            }
        }
    };
    tokio::time::timeout(patience, found).await.ok()
}
