//! HTTP/2: many calls on one connection, and clients that hold them without taking their answers.
//!
//! In HTTP/2 a client grants each stream room for so many bytes. One that grants none is not seen at the socket,
//! where nothing is written, and hyper waits for it without asking the body again, so that no timer of the body
//! runs either. Here each stream is watched from outside: its answer is handed over in small pieces, and when
//! one of them is not taken for too long, the stream is reset and its call is booked. A connection without any
//! stream is closed after the same rest as one of HTTP/1.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tokio::sync::watch;
use tracing::debug;

use super::Stop;
use crate::clock::stands_still;
use crate::proxy::body::{Body, BodyError};

/// What is handed over at a time: HTTP/2's smallest largest frame. What is left unread of an answer is kept by
/// hyper in pieces of this size, one a stream.
const PIECE_BYTES: usize = 16 * 1024;

tokio::task_local! {
    static PACE: Arc<Pace>;
}

/// How far an answer has come. Odd while the client has not taken what was handed over.
#[derive(Debug, Default)]
struct Pace(AtomicU64);

impl Pace {
    fn note_taken(&self) {
        let steps = self.0.load(Ordering::Relaxed);
        self.0.store(steps.next_multiple_of(2), Ordering::Relaxed);
    }

    fn note_handed_over(&self) {
        let steps = self.0.load(Ordering::Relaxed);
        self.0.store(steps | 1, Ordering::Relaxed);
    }

    /// Ends when the client has taken nothing for so long; twice as late at most.
    async fn stalled(&self, patience: Duration) {
        stands_still(patience, || self.0.load(Ordering::Relaxed), |steps| steps % 2 == 1).await;
    }
}

/// Runs the streams of one connection.
#[derive(Debug, Clone)]
pub struct Streams {
    patience: Duration,
    count: Arc<Count>,
    stop: watch::Receiver<Stop>,
}

#[derive(Debug, Default)]
struct Count {
    open: AtomicUsize,
    /// That have ever been opened.
    opened: AtomicU64,
}

impl Streams {
    pub(super) fn new(patience: Duration, stop: watch::Receiver<Stop>) -> Self {
        Self { patience, count: Arc::default(), stop }
    }

    /// Ends when there has been no stream for so long; twice as late at most.
    pub async fn idle(&self, rest: Duration) {
        let is_empty = |_| self.count.open.load(Ordering::Relaxed) == 0;
        stands_still(rest, || self.count.opened.load(Ordering::Relaxed), is_empty).await;
    }
}

/// Counts a stream out on drop.
struct Open(Arc<Count>);

impl Open {
    fn of(count: &Arc<Count>) -> Self {
        count.open.fetch_add(1, Ordering::Relaxed);
        count.opened.fetch_add(1, Ordering::Relaxed);
        Self(count.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<F> hyper::rt::Executor<F> for Streams
where
    F: Future + Send + 'static,
    F::Output: Send,
{
    fn execute(&self, stream: F) {
        let (open, patience, mut stop) = (Open::of(&self.count), self.patience, self.stop.clone());
        tokio::spawn(async move {
            let _open = open;
            let pace = Arc::<Pace>::default();
            let mut stream = std::pin::pin!(PACE.scope(pace.clone(), stream));
            // To be looked at once more when answers are cut off is all that it needs.
            tokio::select! {
                biased;
                _ = &mut stream => return,
                () = pace.stalled(patience) => {
                    debug!("a stream was reset: its client took nothing for too long");
                    return;
                }
                _ = stop.wait_for(|stop| *stop >= Stop::CutOff) => {}
            }
            stream.await;
        });
    }
}

/// An answer that is handed over piece by piece, as its client takes it.
#[derive(Debug)]
pub struct Paced {
    body: Body,
    pace: Option<Arc<Pace>>,
    rest: Bytes,
}

impl Paced {
    /// Within a stream of [`Streams`], its answer.
    pub fn new(body: Body) -> Self {
        Self { body, pace: PACE.try_with(Arc::clone).ok(), rest: Bytes::new() }
    }
}

impl http_body::Body for Paced {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        if let Some(pace) = &this.pace {
            pace.note_taken();
        }
        if this.rest.is_empty() {
            match std::task::ready!(http_body::Body::poll_frame(Pin::new(&mut this.body), context)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => this.rest = data,
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                end => return Poll::Ready(end),
            }
        }
        if let Some(pace) = &this.pace {
            pace.note_handed_over();
        }
        let piece = this.rest.split_to(this.rest.len().min(PIECE_BYTES));
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && http_body::Body::is_end_stream(&self.body)
    }

    fn size_hint(&self) -> SizeHint {
        let (of_body, rest) = (http_body::Body::size_hint(&self.body), self.rest.len() as u64);
        let mut hint = SizeHint::new();
        if let Some(upper) = of_body.upper() {
            hint.set_upper(upper + rest);
        }
        hint.set_lower(of_body.lower() + rest);
        hint
    }
}

#[cfg(test)]
mod tests {
    use http_body::Body as _;
    use http_body_util::BodyExt as _;

    use super::*;

    #[tokio::test]
    async fn an_answer_in_pieces_is_the_same_answer() {
        for length in [0, 1, PIECE_BYTES, PIECE_BYTES + 1, 5 * PIECE_BYTES - 1] {
            let bytes: Bytes = (0..=250_u8).cycle().take(length).collect();
            let mut paced = Paced::new(Body::full(bytes.clone()));
            assert_eq!(paced.size_hint().exact(), Some(length as u64));
            let mut together = Vec::new();
            while let Some(frame) = paced.frame().await {
                let piece = frame.unwrap().into_data().unwrap();
                assert!(piece.len() <= PIECE_BYTES);
                together.extend_from_slice(&piece);
                assert_eq!(paced.size_hint().exact(), Some((length - together.len()) as u64));
            }
            assert!(paced.is_end_stream());
            assert_eq!(together, bytes);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_nothing_stalls_and_one_that_waits_for_us_does_not() {
        let pace = Pace::default();
        let patience = Duration::from_secs(10);
        let waits = tokio::time::timeout(Duration::from_mins(10), pace.stalled(patience)).await;
        assert!(waits.is_err(), "nothing was handed over yet");
        pace.note_handed_over();
        pace.note_taken();
        let waits = tokio::time::timeout(Duration::from_mins(10), pace.stalled(patience)).await;
        assert!(waits.is_err(), "all of it was taken");
        pace.note_handed_over();
        tokio::time::timeout(Duration::from_secs(21), pace.stalled(patience)).await.expect("it stalls");
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_rests_only_without_streams() {
        let streams = Streams::new(Duration::from_secs(10), watch::channel(Stop::No).1);
        let rest = Duration::from_mins(1);
        let open = Open::of(&streams.count);
        assert!(tokio::time::timeout(rest * 10, streams.idle(rest)).await.is_err());
        drop(open);
        tokio::time::timeout(rest * 2 + rest / 2, streams.idle(rest)).await.expect("it rests");
    }
}
