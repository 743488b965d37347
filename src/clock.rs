//! The one place that reads the time.

use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::time::Sleep;
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

    /// When `patience` is over that began with it.
    pub fn deadline(&self, patience: Duration) -> Deadline {
        Deadline::from_std(self.0) + patience.min(FAR)
    }

    /// From when another was started until this one was.
    pub fn since(&self, other: Self) -> Duration {
        self.0.duration_since(other.0)
    }
}

/// When a wait is over.
pub type Deadline = tokio::time::Instant;

/// Waits for `future` no longer than `patience`. One that is ready at once, as most are, needs no timer and no
/// look at the clock.
pub async fn within<F: Future + Unpin>(patience: Duration, mut future: F) -> Result<F::Output, Elapsed> {
    let at_once = std::future::poll_fn(|context| Poll::Ready(Pin::new(&mut future).poll(context))).await;
    match at_once {
        Poll::Ready(output) => Ok(output),
        Poll::Pending => tokio::time::timeout(patience, future).await,
    }
}

/// Ends when what `read` gives has not changed for so long, and `counts` then; twice as late at most. Whatever moves has to
/// count itself, and nothing else.
pub async fn stands_still(patience: Duration, read: impl Fn() -> u64, counts: impl Fn(u64) -> bool) {
    loop {
        let before = read();
        tokio::time::sleep(patience).await;
        if read() == before && counts(before) {
            return;
        }
    }
}

/// Timers that bound the waits of one thread's calls. A new one would be put into the runtime's wheel for each wait and
/// taken out again, and hardly one ever rings. These stay in the wheel when a wait is over, and serve the next.
#[derive(Debug, Default)]
pub struct Alarms(Mutex<Vec<Pin<Box<Sleep>>>>);

/// Timers kept for the next waits. Each keeps the memory of the task that it would have woken until it is used again,
/// or rings.
const SPARE_ALARMS: usize = 64;
/// As good as never.
const FAR: Duration = Duration::from_hours(24 * 365);

/// What was waited for did not come in time.
#[derive(Debug)]
pub struct TimedOut;

impl Alarms {
    /// Waits for `future` until `deadline` at most.
    pub async fn until<F: Future>(
        &self,
        deadline: Deadline,
        mut future: Pin<&mut F>,
    ) -> Result<F::Output, TimedOut> {
        let spare = self.spare().pop();
        let mut timer = spare.unwrap_or_else(|| Box::pin(tokio::time::sleep_until(deadline)));
        let outcome = std::future::poll_fn(|context| match future.as_mut().poll(context) {
            Poll::Ready(output) => Poll::Ready(Ok(output)),
            Poll::Pending => poll_until(&mut timer, deadline, context).map(|()| Err(TimedOut)),
        });
        let outcome = outcome.await;
        let mut spare = self.spare();
        if spare.len() < SPARE_ALARMS {
            spare.push(timer);
        }
        outcome
    }

    fn spare(&self) -> MutexGuard<'_, Vec<Pin<Box<Sleep>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits until `deadline` with a timer that was used before and may be set to any time. One that would ring earlier is
/// left to, and set anew then.
pub fn poll_until(timer: &mut Pin<Box<Sleep>>, deadline: Deadline, context: &mut Context<'_>) -> Poll<()> {
    if timer.deadline() > deadline {
        timer.as_mut().reset(deadline);
    }
    loop {
        ready!(timer.as_mut().poll(context));
        if timer.deadline() == deadline {
            return Poll::Ready(());
        }
        timer.as_mut().reset(deadline);
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

    #[tokio::test(start_paused = true)]
    async fn an_alarm_rings_in_time_whatever_it_was_set_to_before() {
        use std::pin::pin;

        let alarms = Alarms::default();
        for (patience, takes) in [(10, 3), (10, 9), (10, 11), (2, 3), (10, 4), (30, 40), (u64::MAX, 1)] {
            let began = Deadline::now();
            let work = pin!(tokio::time::sleep(Duration::from_secs(takes)));
            let outcome = alarms.until(began + Duration::from_secs(patience).min(FAR), work).await;
            assert_eq!(outcome.is_ok(), takes < patience);
            assert_eq!(began.elapsed().as_secs(), takes.min(patience));
        }
        assert_eq!(alarms.spare().len(), 1);
    }
}
