//! Rows that a worker settles in one turn of its runtime: they reach the journal with one `write`.
//!
//! A worker looks at its sockets and finds the answers of many calls. Each settles, puts its row into the thread's
//! group, and waits; a task of the same runtime, woken by the group's first row and therefore run behind the calls that
//! are ready by then, writes the group and wakes them. So a row is in the kernel's hands before the last byte of its
//! answer leaves, as if it had been written alone, and nothing waits for a clock. Where no answer waits, because the
//! client is gone or gets an error, the group is written at once.

use std::cell::RefCell;
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use super::journal::Batch;
use super::writer::Shared;

/// A group of so many bytes is written at once.
const MAX_BYTES: usize = 64 * 1024;

thread_local! {
    static GROUP: RefCell<Group> = const { RefCell::new(Group::new()) };
}

#[derive(Debug)]
struct Group {
    /// Where the rows go, as long as a [`Gathering`] runs on this thread.
    shared: Option<Arc<Shared>>,
    batch: Batch,
    /// Groups that this thread has written.
    written: u64,
    /// Of the task that writes.
    writer: Option<Waker>,
    /// Of the calls whose rows are in the group.
    waiting: Vec<Waker>,
}

/// A place in the groups of the thread that asked for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Membership(u64);

impl Group {
    const fn new() -> Self {
        Self { shared: None, batch: Batch::new(), written: 0, writer: None, waiting: Vec::new() }
    }

    fn write(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        if let Some(shared) = &self.shared {
            shared.journal.append(&self.batch);
        }
        self.batch.clear();
        self.written += 1;
    }
}

/// Adds a row to the thread's group. `None` where rows of this ledger are not gathered on this thread.
pub(super) fn add(shared: &Arc<Shared>, write: impl FnOnce(&mut Vec<u8>)) -> Option<Membership> {
    let add = |group: &RefCell<Group>| {
        let mut group = group.borrow_mut();
        let group = &mut *group;
        if !group.shared.as_ref().is_some_and(|own| Arc::ptr_eq(own, shared)) {
            return None;
        }
        group.batch.add(write);
        let membership = Membership(group.written);
        if group.batch.rows() == 1
            && let Some(writer) = &group.writer
        {
            writer.wake_by_ref();
        }
        if group.batch.bytes() >= MAX_BYTES {
            group.write();
        }
        Some(membership)
    };
    // A call may be settled while its thread ends and the group is gone.
    GROUP.try_with(add).ok().flatten()
}

impl Membership {
    /// Whether the row is in the journal, or waits in memory because that could not be written. To be asked on the
    /// thread that settled the call.
    pub(super) fn poll_written(self, context: &mut Context<'_>) -> Poll<()> {
        let look = |group: &RefCell<Group>| {
            let mut group = group.borrow_mut();
            if group.written > self.0 {
                return Poll::Ready(());
            }
            group.waiting.push(context.waker().clone());
            Poll::Pending
        };
        GROUP.try_with(look).unwrap_or(Poll::Ready(()))
    }

    /// Writes the group if the row is still in it.
    pub(super) fn write(self) {
        turn(|group| {
            if group.written == self.0 {
                group.write();
            }
        });
    }
}

/// Gathers the rows of the thread that polls it. It never ends; dropped, it writes what is there.
#[derive(Debug)]
pub(super) struct Gathering(pub(super) Arc<Shared>);

impl Future for Gathering {
    type Output = Infallible;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Infallible> {
        turn(|group| {
            group.write();
            if group.shared.is_none() {
                group.shared = Some(Arc::clone(&self.0));
            }
            if !group.writer.as_ref().is_some_and(|writer| writer.will_wake(context.waker())) {
                group.writer = Some(context.waker().clone());
            }
        });
        Poll::Pending
    }
}

impl Drop for Gathering {
    fn drop(&mut self) {
        turn(|group| {
            group.write();
            if group.shared.as_ref().is_some_and(|shared| Arc::ptr_eq(shared, &self.0)) {
                (group.shared, group.writer) = (None, None);
            }
        });
    }
}

/// Does something with the thread's group, and then wakes those whose rows are no longer in it.
fn turn(change: impl FnOnce(&mut Group)) {
    let turn = |group: &RefCell<Group>| {
        let mut waiting = {
            let mut group = group.borrow_mut();
            change(&mut group);
            std::mem::take(&mut group.waiting)
        };
        waiting.drain(..).for_each(Waker::wake);
        // For its room.
        group.borrow_mut().waiting = waiting;
    };
    // Nothing is in it any more when the thread has ended.
    GROUP.try_with(turn).ok();
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::pin::Pin;
    use std::task::Poll;

    use crate::clock::Clock;
    use crate::config::{Fsync, LedgerSettings, WhenUnavailable};
    use crate::ledger::testing::entry;
    use crate::ledger::{Ledger, Ticket, query};

    fn open(directory: &tempfile::TempDir, fsync: Fsync) -> (Ledger, LedgerSettings) {
        let path = directory.path().join("breakeven.db");
        let settings =
            LedgerSettings { path, fsync, when_unavailable: WhenUnavailable::Continue, postgres: None };
        (Ledger::open(&settings, Clock::system()).unwrap(), settings)
    }

    /// A ledger whose rows this thread gathers, without writing them at any turn's end.
    async fn gathering(fsync: Fsync) -> (Ledger, Pin<Box<impl Future>>, tempfile::TempDir) {
        let directory = tempfile::tempdir().unwrap();
        let (ledger, _settings) = open(&directory, fsync);
        let mut gathering = Box::pin({
            let ledger = ledger.clone();
            async move { ledger.gather().await }
        });
        let still_runs = poll_fn(|context| Poll::Ready(gathering.as_mut().poll(context).is_pending())).await;
        assert!(still_runs);
        (ledger, gathering, directory)
    }

    async fn written(ticket: Ticket) {
        poll_fn(|context| ticket.poll_written(context)).await;
    }

    #[tokio::test]
    async fn rows_of_one_turn_are_written_together_before_anybody_goes_on() {
        let directory = tempfile::tempdir().unwrap();
        let (ledger, settings) = open(&directory, Fsync::Batch);
        let gathering = tokio::spawn({
            let ledger = ledger.clone();
            async move { ledger.gather().await }
        });
        tokio::task::yield_now().await;
        for turn in 0..3 {
            let tickets: Vec<Ticket> = (1..=20).map(|n| ledger.append(&entry(turn * 20 + n))).collect();
            assert_eq!(ledger.stats().pending + ledger.stats().committed, turn * 20, "they are in the group");
            for ticket in tickets {
                written(ticket).await;
                assert_eq!(ledger.stats().pending + ledger.stats().committed, (turn + 1) * 20);
            }
        }
        let _nobody_waits = ledger.append(&entry(61));
        gathering.abort();
        assert!(gathering.await.is_err(), "it was told to end");
        assert!(ledger.flush().await);
        let ids = query::recent(&settings.path, 100)
            .unwrap()
            .iter()
            .map(|row| row.id.as_u64_pair().0)
            .collect::<Vec<_>>();
        assert_eq!(ids, (1..=61).rev().collect::<Vec<_>>(), "what was in the group at its end is there too");
    }

    #[tokio::test]
    async fn a_large_group_does_not_wait_for_the_turns_end() {
        let (ledger, _gathering, _directory) = gathering(Fsync::Batch).await;
        let _waiting: Vec<Ticket> = (1..=1001).map(|n| ledger.append(&entry(n))).collect();
        let there = ledger.stats();
        assert!((700..1001).contains(&(there.pending + there.committed)), "{there:?}");
    }

    #[tokio::test]
    async fn a_row_that_nobody_waits_for_is_written_at_once_with_those_before_it() {
        let (ledger, _gathering, _directory) = gathering(Fsync::Batch).await;
        let there = || ledger.stats().pending + ledger.stats().committed;
        let waits = ledger.append(&entry(1));
        assert_eq!(there(), 0, "it is in the group");
        drop(ledger.append(&entry(2)));
        assert_eq!(there(), 2);
        let later = ledger.append(&entry(3));
        drop(waits);
        assert_eq!(there(), 2, "a row that is written already writes no other");
        drop(later);
        assert_eq!(there(), 3);
    }

    #[tokio::test]
    async fn a_row_that_must_be_on_disk_is_not_held_back() {
        let (ledger, _gathering, _directory) = gathering(Fsync::Always).await;
        let ticket = ledger.append(&entry(1));
        assert_eq!(ledger.stats().pending + ledger.stats().committed, 1);
        ledger.durable(ticket).await;
    }
}
