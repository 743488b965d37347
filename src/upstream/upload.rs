//! Request bodies that pass through without being held: files, audio, images.

use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body as _, Frame};
use hyper::body::Incoming;
use tokio::time::Sleep;

/// Sees the pieces of a body that passes through.
pub type Watch = Box<dyn FnMut(&[u8]) + Send + Sync>;

/// Why an upload ended before its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UploadError {
    #[error("the upload is larger than allowed")]
    TooLarge,
    #[error("the upload paused for too long")]
    TooSlow,
    #[error("the upload broke off")]
    Broken,
}

/// What a client may send, and how long it may pause.
#[derive(Debug, Clone, Copy)]
pub struct UploadLimits {
    pub bytes: u64,
    pub pause: Duration,
}

/// A body on its way through. Its failure is the client's, which the upstream's connection cannot tell: whoever sends
/// it asks [`Self::failure`].
pub struct Upload {
    pub(super) incoming: Incoming,
    watch: Option<Watch>,
    left: u64,
    pause: Duration,
    /// Runs while nothing comes.
    timer: Option<Pin<Box<Sleep>>>,
    failure: Arc<OnceLock<UploadError>>,
}

impl std::fmt::Debug for Upload {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Upload").field("left", &self.left).finish_non_exhaustive()
    }
}

impl Upload {
    pub fn new(incoming: Incoming, limits: UploadLimits, watch: Option<Watch>) -> Self {
        let UploadLimits { bytes, pause } = limits;
        Self { incoming, watch, left: bytes, pause, timer: None, failure: Arc::default() }
    }

    /// Where it says why it ended early.
    pub fn failure(&self) -> Arc<OnceLock<UploadError>> {
        self.failure.clone()
    }

    pub(super) fn poll_frame(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, UploadError>>> {
        let Poll::Ready(frame) = Pin::new(&mut self.incoming).poll_frame(context) else {
            let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(self.pause)));
            return timer.as_mut().poll(context).map(|()| Some(Err(self.fail(UploadError::TooSlow))));
        };
        self.timer = None;
        Poll::Ready(match frame {
            None => None,
            Some(Err(_)) => Some(Err(self.fail(UploadError::Broken))),
            Some(Ok(frame)) => {
                let piece = frame.data_ref();
                let Some(left) = self.left.checked_sub(piece.map_or(0, Bytes::len) as u64) else {
                    return Poll::Ready(Some(Err(self.fail(UploadError::TooLarge))));
                };
                self.left = left;
                if let (Some(piece), Some(watch)) = (piece, &mut self.watch) {
                    watch(piece);
                }
                Some(Ok(frame))
            }
        })
    }

    fn fail(&self, why: UploadError) -> UploadError {
        *self.failure.get_or_init(|| why)
    }
}
