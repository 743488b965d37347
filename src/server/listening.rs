//! A listener that stays calm when the system gives no connections.
//!
//! Without file descriptors `accept` fails at once, again and again: a loop around it alone would take a whole core and
//! fill the log, just when both are short.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;
use tracing::warn;

/// Pause after an accept that failed, for want of file descriptors mostly.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);
/// Failures are told so often at most.
const TOLD_EVERY: Duration = Duration::from_secs(10);

/// A listener, and what it has not told yet.
#[derive(Debug)]
pub struct Listening<L = TcpListener> {
    listener: L,
    /// Whose listener it is, as a log line says it.
    side: &'static str,
    told: Option<Instant>,
    untold: u64,
}

/// Where connections come from.
pub trait Listener {
    type Stream;

    fn accept(&self) -> impl Future<Output = io::Result<(Self::Stream, SocketAddr)>> + Send;
}

impl Listener for TcpListener {
    type Stream = TcpStream;

    async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        Self::accept(self).await
    }
}

impl<L: Listener> Listening<L> {
    pub fn new(listener: L, side: &'static str) -> Self {
        Self { listener, side, told: None, untold: 0 }
    }

    /// The next connection, however many tries it takes. Nothing is lost when it is dropped.
    pub async fn accept(&mut self) -> (L::Stream, SocketAddr) {
        loop {
            match self.listener.accept().await {
                Ok(accepted) => return accepted,
                Err(error) => {
                    self.tell(&error, Instant::now());
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Whether it was told: else it is counted until it is.
    fn tell(&mut self, error: &io::Error, now: Instant) -> bool {
        self.untold += 1;
        if self.told.is_some_and(|told| now.duration_since(told) < TOLD_EVERY) {
            return false;
        }
        let (times, side) = (self.untold, self.side);
        warn!(%error, times, side, "cannot accept connections on the {side} side ({times} tries): {error}");
        (self.told, self.untold) = (Some(now), 0);
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    /// A system without file descriptors.
    #[derive(Default)]
    struct Exhausted(AtomicU64);

    impl Listener for &Exhausted {
        type Stream = ();

        async fn accept(&self) -> io::Result<((), SocketAddr)> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Err(io::Error::from_raw_os_error(24))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_listener_without_file_descriptors_does_not_spin() {
        let system = Exhausted::default();
        let mut listening = Listening::new(&system, "admin");
        let accepted = tokio::time::timeout(Duration::from_secs(1), listening.accept()).await;
        assert!(accepted.is_err());
        let tries = system.0.load(Ordering::Relaxed);
        assert!((40..=51).contains(&tries), "{tries} tries in a second");
    }

    #[test]
    fn failures_are_told_at_intervals_with_how_many_they_were() {
        let system = Exhausted::default();
        let mut listening = Listening::new(&system, "admin");
        let error = io::Error::from_raw_os_error(24);
        let start = tokio::time::Instant::now();
        assert!(listening.tell(&error, start));
        for _ in 0..500 {
            assert!(!listening.tell(&error, start + Duration::from_secs(9)));
        }
        assert_eq!(listening.untold, 500);
        assert!(listening.tell(&error, start + TOLD_EVERY));
        assert_eq!(listening.untold, 0);
    }
}
