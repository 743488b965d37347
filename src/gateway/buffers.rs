//! Memory that request bodies take while their calls wait for an answer, all together.

use std::sync::atomic::{AtomicUsize, Ordering};

/// A body up to this size is not counted: the bound on calls in flight bounds those.
pub const UNCOUNTED_BYTES: usize = 64 * 1024;

/// How much is held.
#[derive(Debug, Default)]
pub struct Buffers(AtomicUsize);

/// There is no room for a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full {
    pub limit: usize,
}

impl Buffers {
    /// Room for one body, empty yet, within `limit` bytes for all.
    pub fn room(&self, limit: usize) -> Room<'_> {
        Room { held: 0, limit, all: &self.0 }
    }
}

/// What one body takes, given back on drop.
#[derive(Debug)]
pub struct Room<'a> {
    held: usize,
    limit: usize,
    all: &'a AtomicUsize,
}

impl Room<'_> {
    /// Grows to so many bytes in all; when there is no room for them, it gives back what it had.
    pub fn cover(&mut self, bytes: usize) -> Result<(), Full> {
        let more = bytes.saturating_sub(self.held);
        if bytes <= UNCOUNTED_BYTES || more == 0 {
            return Ok(());
        }
        let before = self.all.fetch_add(more, Ordering::Relaxed);
        self.held += more;
        if before.saturating_add(more) <= self.limit {
            return Ok(());
        }
        self.give_back();
        Err(Full { limit: self.limit })
    }

    fn give_back(&mut self) {
        self.all.fetch_sub(std::mem::take(&mut self.held), Ordering::Relaxed);
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        if self.held > 0 {
            self.give_back();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_share_one_bound_and_give_their_room_back() {
        let buffers = Buffers::default();
        let limit = 10 * UNCOUNTED_BYTES;
        let (mut one, mut other) = (buffers.room(limit), buffers.room(limit));
        for size in [1, UNCOUNTED_BYTES, 3 * UNCOUNTED_BYTES, 6 * UNCOUNTED_BYTES] {
            assert_eq!(one.cover(size), Ok(()), "{size}");
        }
        assert_eq!(other.cover(4 * UNCOUNTED_BYTES), Ok(()));
        assert_eq!(other.cover(4 * UNCOUNTED_BYTES + 1), Err(Full { limit }));
        assert_eq!(buffers.room(limit).cover(UNCOUNTED_BYTES), Ok(()), "a small one always has room");
        drop(one);
        assert_eq!(buffers.0.load(Ordering::Relaxed), 0);
    }
}
