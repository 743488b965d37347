//! Many proxies with one Redis: real servers, real processes.

mod orders;
mod process;
mod proxies;
mod store;
mod three;

use std::time::Duration;

use breakeven::config::{Secret, Shared};

use crate::support::redis::Redis;
use crate::support::soon;

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

/// How long a run of `BREAKEVEN_SHARED_SECONDS` lasts, for which somebody has freed the machine.
fn long_run() -> Option<u64> {
    std::env::var("BREAKEVEN_SHARED_SECONDS")
        .ok()
        .map(|seconds| seconds.parse().expect("a number of seconds"))
}

/// How long is waited for what is promised within `bound`: to the letter in a long run, five times as long where other
/// tests take the machine's time.
fn patience(bound: Duration) -> Duration {
    if long_run().is_some() { bound } else { bound * 5 }
}

/// Tries again until something is so, for at most `patience`.
async fn until<T>(what: &str, patience: Duration, look: impl AsyncFnMut() -> Option<T>) -> T {
    soon(patience, look).await.unwrap_or_else(|| panic!("not within {patience:?}: {what}"))
}
