//! How long a client may take over a request's head, apart from how long a connection may rest.
//!
//! hyper has one timer for both. It is set to the longer of them, the rest; here the shorter one runs, from
//! the first byte of a head until the request is handed to its handler.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

const RESTING: u8 = 0;
const IN_HEAD: u8 = 1;
const HANDED_OVER: u8 = 2;

/// Where a connection stands between one request and the next.
#[derive(Debug, Clone, Default)]
pub struct Phase(Arc<AtomicU8>);

impl Phase {
    /// For connections whose heads are not timed here.
    pub fn never() -> Self {
        Self(Arc::new(AtomicU8::new(HANDED_OVER)))
    }

    /// A request's head is complete.
    pub fn handed_over(&self) {
        self.0.store(HANDED_OVER, Ordering::Relaxed);
    }

    /// The head of its answer is ready: what comes next is another request's.
    pub fn answered(&self) {
        self.0.store(RESTING, Ordering::Relaxed);
    }
}

/// A connection that breaks when a head takes too long.
#[derive(Debug)]
pub struct Patient<S> {
    stream: S,
    phase: Phase,
    header_timeout: Duration,
    timer: Option<Pin<Box<Sleep>>>,
}

impl<S> Patient<S> {
    pub fn new(stream: S, phase: Phase, header_timeout: Duration) -> Self {
        Self { stream, phase, header_timeout, timer: None }
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
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
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
        let mut server = Patient::new(server, phase.clone(), Duration::from_secs(10));
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
        let mut server = Patient::new(server, phase.clone(), Duration::from_secs(10));
        let mut buffer = [0; 64];
        client.write_all(b"head").await.unwrap();
        assert_eq!(server.read(&mut buffer).await.unwrap(), 4);
        phase.handed_over();
        let body = tokio::time::timeout(Duration::from_mins(1), server.read(&mut buffer)).await;
        assert!(body.is_err(), "the body's own limit holds there");
    }
}
