//! Counting tokens off the request path, on a bounded number of threads.
//!
//! Needed only where an upstream reports no usage: a client that went away, a server that says nothing.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tracing::error;

/// Threads that count: a tokenizer does some eighty megabytes a second on each.
const THREADS: usize = 2;
/// Jobs that may wait; beyond, the caller estimates instead.
const MAX_WAITING: usize = 1024;
/// How much nicer than others the threads are, where a nice value is a thread's.
#[cfg(target_os = "linux")]
const NICE: i32 = 10;
/// How often the end of all counts is looked for.
const LOOK: Duration = Duration::from_millis(5);

/// Told whether to count or, when there is no room, to estimate.
type Job = Box<dyn FnOnce(bool) + Send>;

/// A small pool of threads, started with the first job.
#[derive(Debug, Default)]
pub struct Counter {
    sender: OnceLock<SyncSender<Job>>,
    /// Jobs that were taken and are not done.
    open: Arc<AtomicUsize>,
}

impl Counter {
    /// Runs a job soon, elsewhere. Gives it back when too many wait.
    pub fn submit(&self, job: Job) -> Result<(), Job> {
        let sender = self.sender.get_or_init(|| start(&self.open));
        self.open.fetch_add(1, Ordering::SeqCst);
        sender.try_send(job).map_err(|error| {
            self.open.fetch_sub(1, Ordering::SeqCst);
            match error {
                TrySendError::Full(job) | TrySendError::Disconnected(job) => job,
            }
        })
    }

    /// Returns when all that was submitted is done, or after `patience`: false then.
    pub async fn finish(&self, patience: Duration) -> bool {
        let done = async {
            while self.open.load(Ordering::SeqCst) > 0 {
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::time::timeout(patience, done).await.is_ok()
    }
}

fn start(open: &Arc<AtomicUsize>) -> SyncSender<Job> {
    let (sender, receiver) = sync_channel::<Job>(MAX_WAITING);
    let receiver = Arc::new(Mutex::new(receiver));
    for number in 0..THREADS {
        let (receiver, open) = (receiver.clone(), open.clone());
        let spawned = std::thread::Builder::new()
            .name(format!("token-counter-{number}"))
            .spawn(move || work(&receiver, &open));
        if let Err(error) = spawned {
            error!(%error, "cannot start a thread that counts tokens: counts will be estimates");
        }
    }
    sender
}

/// Gives this thread a tenth of the weight of those that serve calls: when thousands of streams break off at once, their
/// counts are a second's work, and a worker that shares its core with them would get a third of it.
#[cfg(target_os = "linux")]
fn step_back() {
    // On Linux, unlike elsewhere, this is the thread's alone. Lowering needs no permission; where it is refused all the
    // same, counts take turns with calls.
    if let Err(error) = rustix::process::nice(NICE) {
        tracing::warn!(%error, "cannot lower the priority of a thread that counts tokens");
    }
}

fn work(receiver: &Mutex<Receiver<Job>>, open: &AtomicUsize) {
    #[cfg(target_os = "linux")]
    step_back();
    loop {
        let job = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = job else { return };
        // A bug in one count must not end the thread for all that follow; the panic hook has logged it.
        drop(catch_unwind(AssertUnwindSafe(|| job(true))));
        open.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    #[cfg(target_os = "linux")]
    #[test]
    fn counts_have_less_weight_than_the_thread_that_asks_for_them() {
        let (sender, receiver) = std::sync::mpsc::channel();
        let job = move |_: bool| sender.send(rustix::process::getpriority_process(None)).unwrap();
        assert!(super::Counter::default().submit(Box::new(job)).is_ok(), "there is room");
        let own = rustix::process::getpriority_process(None).unwrap();
        assert_eq!(receiver.recv().unwrap().unwrap(), (own + super::NICE).min(19));
    }
}
