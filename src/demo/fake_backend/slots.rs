//! How many requests generate at once; the rest wait in line.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::log::Log;

#[derive(Debug)]
pub(super) struct Slots {
    semaphore: Mutex<Arc<Semaphore>>,
    counts: Arc<Counts>,
}

#[derive(Debug)]
struct Counts {
    /// Told of every change, for those who wait for one.
    log: Arc<Log>,
    running: AtomicUsize,
    waiting: AtomicUsize,
    most: AtomicUsize,
}

/// A place among those that generate, given back on drop.
#[derive(Debug)]
pub(super) struct Slot {
    counts: Arc<Counts>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Slots {
    pub(super) fn new(size: usize, log: Arc<Log>) -> Self {
        let (running, waiting, most) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
        let counts = Arc::new(Counts { log, running, waiting, most });
        Self { semaphore: Mutex::new(semaphore(size)), counts }
    }

    /// A new size for those who come from now on; whoever runs or waits keeps the old one.
    pub(super) fn resize(&self, size: usize) {
        *self.semaphore.lock().unwrap_or_else(PoisonError::into_inner) = semaphore(size);
    }

    pub(super) async fn take(&self) -> Slot {
        let semaphore = Arc::clone(&self.semaphore.lock().unwrap_or_else(PoisonError::into_inner));
        let in_line = InLine::new(&self.counts);
        let permit = semaphore.acquire_owned().await.ok();
        drop(in_line);
        let running = self.counts.running.fetch_add(1, Ordering::SeqCst) + 1;
        self.counts.most.fetch_max(running, Ordering::SeqCst);
        Slot { counts: Arc::clone(&self.counts), _permit: permit }
    }

    pub(super) fn running(&self) -> usize {
        self.counts.running.load(Ordering::SeqCst)
    }

    pub(super) fn waiting(&self) -> usize {
        self.counts.waiting.load(Ordering::SeqCst)
    }

    /// The most that ever ran at once.
    pub(super) fn most_running(&self) -> usize {
        self.counts.most.load(Ordering::SeqCst)
    }
}

fn semaphore(size: usize) -> Arc<Semaphore> {
    Arc::new(Semaphore::new(size.clamp(1, Semaphore::MAX_PERMITS)))
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.counts.running.fetch_sub(1, Ordering::SeqCst);
        self.counts.log.changed();
    }
}

struct InLine<'a>(&'a Counts);

impl<'a> InLine<'a> {
    fn new(counts: &'a Counts) -> Self {
        counts.waiting.fetch_add(1, Ordering::SeqCst);
        counts.log.changed();
        Self(counts)
    }
}

impl Drop for InLine<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}
