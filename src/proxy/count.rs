//! Counting tokens off the request path, on a bounded number of threads.
//!
//! Needed only where an upstream reports no usage: a client that went away, a server that says nothing.

use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use tracing::error;

/// Threads that count: a tokenizer does some eighty megabytes a second on each.
const THREADS: usize = 2;
/// Jobs that may wait; beyond, the caller estimates instead.
const MAX_WAITING: usize = 1024;

/// Told whether to count or, when there is no room, to estimate.
type Job = Box<dyn FnOnce(bool) + Send>;

/// A small pool of threads, started with the first job.
#[derive(Debug, Default)]
pub struct Counter {
    sender: OnceLock<SyncSender<Job>>,
}

impl Counter {
    /// Runs a job soon, elsewhere. Gives it back when too many wait.
    pub fn submit(&self, job: Job) -> Result<(), Job> {
        let sender = self.sender.get_or_init(start);
        sender.try_send(job).map_err(|error| match error {
            TrySendError::Full(job) | TrySendError::Disconnected(job) => job,
        })
    }
}

fn start() -> SyncSender<Job> {
    let (sender, receiver) = sync_channel::<Job>(MAX_WAITING);
    let receiver = Arc::new(Mutex::new(receiver));
    for number in 0..THREADS {
        let receiver = receiver.clone();
        let spawned = std::thread::Builder::new()
            .name(format!("token-counter-{number}"))
            .spawn(move || work(&receiver));
        if let Err(error) = spawned {
            error!(%error, "cannot start a thread that counts tokens: counts will be estimates");
        }
    }
    sender
}

fn work(receiver: &Mutex<Receiver<Job>>) {
    loop {
        let job = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = job else { return };
        job(true);
    }
}
