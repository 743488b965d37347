//! How long a client may take over a request's head, apart from how long a connection may rest; and how long
//! it may leave an answer unread.
//!
//! hyper has one timer for heads and rests. It is set to the longer of them, the rest; here the shorter one
//! runs, from the first byte of a head until the request is handed to its handler. hyper has none for answers:
//! without one, a client that stops reading would hold its call, and the upstream's stream, for ever.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use crate::clock::poll_until;
use crate::upstream::joined;

const RESTING: u8 = 0;
const IN_HEAD: u8 = 1;
const HANDED_OVER: u8 = 2;

/// Where a connection stands between one request and the next.
#[derive(Debug, Clone, Default)]
pub struct Phase(Arc<AtomicU8>);

impl Phase {
    /// A request's head is complete.
    pub fn handed_over(&self) {
        self.0.store(HANDED_OVER, Ordering::Relaxed);
    }

    /// The head of its answer is ready: what comes next is another request's.
    pub fn answered(&self) {
        self.0.store(RESTING, Ordering::Relaxed);
    }
}

/// A connection that breaks when a head takes too long, or when the client takes nothing of an answer.
#[derive(Debug)]
pub struct Patient<S> {
    stream: S,
    phase: Phase,
    header_timeout: Duration,
    write_timeout: Duration,
    timer: Option<Pin<Box<Sleep>>>,
    /// Runs while bytes wait for a client that takes none.
    unread: Option<Pin<Box<Sleep>>>,
}

impl<S> Patient<S> {
    pub fn new(stream: S, phase: Phase, header_timeout: Duration, write_timeout: Duration) -> Self {
        Self { stream, phase, header_timeout, write_timeout, timer: None, unread: None }
    }

    /// What becomes of a write: one that waits too long breaks the connection.
    fn bounded<T>(&mut self, written: Poll<io::Result<T>>, context: &mut Context<'_>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.unread = None;
            return written;
        }
        let timer = self.unread.get_or_insert_with(|| Box::pin(tokio::time::sleep(self.write_timeout)));
        timer.as_mut().poll(context).map(|()| {
            Err(io::Error::new(io::ErrorKind::TimedOut, "the client took nothing of its answer for too long"))
        })
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patient<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buffer.filled().len();
        let polled = Pin::new(&mut this.stream).poll_read(context, buffer);
        let phase = &this.phase.0;
        if polled.is_ready() {
            if buffer.filled().len() > before && phase.load(Ordering::Relaxed) == RESTING {
                phase.store(IN_HEAD, Ordering::Relaxed);
            }
            return polled;
        }
        if phase.load(Ordering::Relaxed) != IN_HEAD {
            this.timer = None;
            return polled;
        }
        let timer = this.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(this.header_timeout)));
        match timer.as_mut().poll(context) {
            Poll::Ready(()) => {
                Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the request head took too long")))
            }
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Patient<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.bounded(written, context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = joined::poll_write(&mut self.stream, context, slices);
        self.bounded(written, context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        self.bounded(flushed, context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// hyper's timer of one connection. hyper asks for a new sleep after each call and drops it when the next one
/// comes, which would put a timer into the runtime's wheel and take it out again. This one stays there as long as
/// the connection lasts, and is set anew when it rings before anybody wants to wake.
#[derive(Debug, Clone)]
pub struct RestTimer(Arc<Mutex<Pin<Box<Sleep>>>>);

impl RestTimer {
    /// One whose sleeps will be about as long as `rest`.
    pub fn new(rest: Duration) -> Self {
        Self(Arc::new(Mutex::new(Box::pin(tokio::time::sleep(rest)))))
    }
}

impl hyper::rt::Timer for RestTimer {
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn hyper::rt::Sleep>> {
        self.sleep_until(self.now() + duration)
    }

    fn sleep_until(&self, deadline: Instant) -> Pin<Box<dyn hyper::rt::Sleep>> {
        Box::pin(Rest { deadline: deadline.into(), timer: self.clone() })
    }

    fn now(&self) -> Instant {
        tokio::time::Instant::now().into()
    }
}

/// Sleeps until its deadline, as long as there is no other sleep of the same timer.
#[derive(Debug)]
struct Rest {
    deadline: tokio::time::Instant,
    timer: RestTimer,
}

impl hyper::rt::Sleep for Rest {}

impl Future for Rest {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        poll_until(&mut self.timer.0.lock().unwrap_or_else(PoisonError::into_inner), self.deadline, context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_head_that_stops_half_way_breaks_and_a_rest_does_not() {
        let (mut client, server) = tokio::io::duplex(64);
        let phase = Phase::default();
        let mut server = Patient::new(server, phase.clone(), Duration::from_secs(10), Duration::from_mins(1));
        let mut buffer = [0; 64];
        let resting = tokio::time::timeout(Duration::from_mins(1), server.read(&mut buffer)).await;
        assert!(resting.is_err(), "a connection may rest");
        client.write_all(b"POST / HT").await.unwrap();
        assert_eq!(server.read(&mut buffer).await.unwrap(), 9);
        let error = server.read(&mut buffer).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_may_take_longer_than_a_head() {
        let (mut client, server) = tokio::io::duplex(64);
        let phase = Phase::default();
        let mut server = Patient::new(server, phase.clone(), Duration::from_secs(10), Duration::from_mins(1));
        let mut buffer = [0; 64];
        client.write_all(b"head").await.unwrap();
        assert_eq!(server.read(&mut buffer).await.unwrap(), 4);
        phase.handed_over();
        let body = tokio::time::timeout(Duration::from_mins(1), server.read(&mut buffer)).await;
        assert!(body.is_err(), "the body's own limit holds there");
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_nobody_takes_breaks_and_one_that_is_taken_slowly_does_not() {
        let (mut client, server) = tokio::io::duplex(16);
        let mut server =
            Patient::new(server, Phase::default(), Duration::from_secs(10), Duration::from_mins(1));
        let slow = tokio::spawn(async move {
            let mut piece = [0; 16];
            for _ in 0..10 {
                tokio::time::sleep(Duration::from_secs(50)).await;
                client.read_exact(&mut piece).await.unwrap();
            }
            client
        });
        server.write_all(&[0; 160]).await.unwrap();
        let client = slow.await.unwrap();
        let error = server.write_all(&[0; 160]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(client);
    }

    #[tokio::test(start_paused = true)]
    async fn sleeps_of_one_timer_end_in_time_one_after_the_other() {
        use hyper::rt::Timer as _;

        let timer = RestTimer::new(Duration::from_secs(10));
        for (sleeps, dropped_after) in [(10, 3), (10, 9), (10, 10), (2, 2), (10, 4), (30, 30)] {
            let (began, sleep) = (timer.now(), timer.sleep(Duration::from_secs(sleeps)));
            let waited = tokio::time::timeout(Duration::from_secs(dropped_after), sleep).await;
            assert_eq!(waited.is_ok(), dropped_after == sleeps);
            let slept = timer.now() - began;
            assert!(
                slept.as_secs_f64() - f64::from(u32::try_from(dropped_after).unwrap()) < 0.01,
                "{slept:?}"
            );
        }
    }
}
