//! The one place that reads the time.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::time::error::Elapsed;

use crate::economics::Timestamp;

/// A source of timestamps that never go backwards.
#[derive(Debug, Clone)]
pub enum Clock {
    /// Wall time at the start, then the monotonic clock, `speed` times as fast (1 but in the demo).
    System { origin: Timestamp, started: Instant, speed: u32 },
    /// Moved by whoever holds it: a test, or the demo, whose day waits for a slow machine. `speed` is what real
    /// waits are shortened by.
    Manual { millis: Arc<AtomicU64>, speed: u32 },
}

impl Clock {
    #[expect(clippy::disallowed_methods, reason = "this module is where the time comes in")]
    pub fn system() -> Self {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self::System { origin: Timestamp::ZERO + since_epoch, started: Instant::now(), speed: 1 }
    }

    /// A clock that starts at `origin` and runs `speed` times as fast as the wall's.
    #[expect(clippy::disallowed_methods, reason = "this module is where the time comes in")]
    pub fn accelerated(origin: Timestamp, speed: u32) -> Self {
        Self::System { origin, started: Instant::now(), speed }
    }

    pub fn manual(at: Timestamp) -> Self {
        Self::paced(at, 1)
    }

    /// A manual clock that is meant to be moved about `speed` times as fast as the wall's.
    pub fn paced(at: Timestamp, speed: u32) -> Self {
        Self::Manual { millis: Arc::new(AtomicU64::new(at.as_millis())), speed }
    }

    pub fn now(&self) -> Timestamp {
        match self {
            Self::System { .. } => self.at(Stopwatch::start()),
            Self::Manual { millis, .. } => Timestamp::from_millis(millis.load(Ordering::SeqCst)),
        }
    }

    /// What it showed when a stopwatch was started; a manual clock shows what it shows now.
    pub fn at(&self, start: Stopwatch) -> Timestamp {
        match self {
            Self::System { origin, started, speed } => *origin + start.0.duration_since(*started) * *speed,
            Self::Manual { .. } => self.now(),
        }
    }

    /// Moves a manual clock; a system clock moves by itself.
    pub fn advance(&self, by: Duration) {
        if let Self::Manual { millis, .. } = self {
            millis.fetch_add(crate::economics::time::millis(by), Ordering::SeqCst);
        }
    }

    /// How far this clock moves in so much real time.
    pub fn scaled(&self, real: Duration) -> Duration {
        match self {
            Self::System { speed, .. } | Self::Manual { speed, .. } => real * *speed,
        }
    }

    /// How much real time passes while this clock moves by `duration`.
    pub fn real(&self, duration: Duration) -> Duration {
        match self {
            Self::System { speed, .. } | Self::Manual { speed, .. } => duration / (*speed).max(1),
        }
    }
}

/// Measures real elapsed time, whatever the clock's speed: latencies are never accelerated.
#[derive(Debug, Clone, Copy)]
pub struct Stopwatch(Instant);

impl Stopwatch {
    #[expect(clippy::disallowed_methods, reason = "this module is where the time comes in")]
    pub fn start() -> Self {
        Self(Instant::now())
    }

    pub fn elapsed(&self) -> Duration {
        self.0.elapsed()
    }
}

/// Waits for `future` no longer than `patience`. One that is ready at once, as most are, needs no timer and no
/// look at the clock.
pub async fn within<F: Future + Unpin>(patience: Duration, mut future: F) -> Result<F::Output, Elapsed> {
    let at_once = std::future::poll_fn(|context| Poll::Ready(Pin::new(&mut future).poll(context))).await;
    match at_once {
        Poll::Ready(output) => Ok(output),
        Poll::Pending => tokio::time::timeout(patience, future).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_says_what_it_showed_when_a_stopwatch_was_started() {
        let clock = Clock::accelerated(Timestamp::from_secs(1_000), 60);
        let before = clock.now();
        let start = Stopwatch::start();
        assert!((before..=clock.now()).contains(&clock.at(start)));
        let manual = Clock::manual(Timestamp::from_secs(5));
        assert_eq!(manual.at(start), Timestamp::from_secs(5));
    }
}
