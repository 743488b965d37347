//! The handle by which a stop reaches a start that is still under way.

use tokio::sync::watch;

/// A start that may still be under way: a command that runs, or a webhook that is not answered.
#[derive(Debug)]
pub(super) struct Process {
    stop: watch::Sender<bool>,
    ended: watch::Receiver<bool>,
}

/// The other end of a [`Process`], for the task that does the starting. When it is dropped, the
/// start has ended.
#[derive(Debug)]
pub(super) struct Reins {
    stop: watch::Receiver<bool>,
    ended: watch::Sender<bool>,
}

impl Reins {
    pub(super) fn report_end(&self) {
        self.ended.send_replace(true);
    }

    /// Returns when a stop is asked for; never when nobody can ask any more.
    pub(super) async fn asked_to_stop(&mut self) {
        if self.stop.wait_for(|asked| *asked).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl Process {
    pub(super) fn new() -> (Self, Reins) {
        let (stop, stop_asked) = watch::channel(false);
        let (ended_by, ended) = watch::channel(false);
        (Self { stop, ended }, Reins { stop: stop_asked, ended: ended_by })
    }

    pub(super) fn is_running(&self) -> bool {
        !*self.ended.borrow() && self.ended.has_changed().is_ok()
    }

    /// Stops it, if it still runs, and waits for its end.
    pub(super) async fn end(&self) {
        self.stop.send_replace(true);
        let mut ended = self.ended.clone();
        // An error says that its task is gone.
        drop(ended.wait_for(|ended| *ended).await);
    }
}
