//! Writes of several small pieces as one: head and body, or a chunk with its size.
//!
//! `writev` goes through the kernel's layer of files and takes its vector apart; `send` does neither. Up to a few
//! kilobytes that is worth more than the copy (docs/performance.md).

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::AsyncWrite;

/// What is longer than that is not copied.
const MAX_JOINED: usize = 8 * 1024;

/// Writes pieces one behind the other, as `poll_write_vectored` does.
pub fn poll_write<S: AsyncWrite + Unpin>(
    stream: &mut S,
    context: &mut Context<'_>,
    pieces: &[IoSlice<'_>],
) -> Poll<io::Result<usize>> {
    thread_local! {
        static JOINED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    let length = pieces.iter().fold(0_usize, |length, piece| length.saturating_add(piece.len()));
    if length > MAX_JOINED {
        return Pin::new(stream).poll_write_vectored(context, pieces);
    }
    JOINED.with_borrow_mut(|joined| {
        joined.clear();
        for piece in pieces {
            joined.extend_from_slice(piece);
        }
        Pin::new(stream).poll_write(context, joined)
    })
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    /// Takes at most so many bytes of a write, and notes of how many pieces it was.
    #[derive(Default)]
    struct Taking {
        most: usize,
        taken: Vec<u8>,
        pieces: Vec<usize>,
    }

    impl AsyncWrite for Taking {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            let count = bytes.len().min(self.most);
            self.taken.extend_from_slice(&bytes[..count]);
            self.pieces.push(1);
            Poll::Ready(Ok(count))
        }

        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            pieces: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            let all = pieces.iter().flat_map(|piece| piece.to_vec()).collect::<Vec<_>>();
            let count = all.len().min(self.most);
            self.taken.extend_from_slice(&all[..count]);
            self.pieces.push(pieces.len());
            Poll::Ready(Ok(count))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn small_pieces_leave_as_one_and_large_ones_as_they_are() {
        let mut context = Context::from_waker(Waker::noop());
        let large = vec![b'x'; MAX_JOINED];
        let mut stream = Taking { most: 3, ..Taking::default() };
        let small = [IoSlice::new(b"head"), IoSlice::new(b""), IoSlice::new(b"body")];
        assert!(matches!(poll_write(&mut stream, &mut context, &small), Poll::Ready(Ok(3))));
        stream.most = usize::MAX;
        assert!(matches!(poll_write(&mut stream, &mut context, &small), Poll::Ready(Ok(8))));
        let pieces = [IoSlice::new(b"1"), IoSlice::new(&large)];
        assert!(
            matches!(poll_write(&mut stream, &mut context, &pieces), Poll::Ready(Ok(count)) if count == MAX_JOINED + 1)
        );
        assert_eq!(stream.pieces, [1, 1, 2]);
        assert_eq!(stream.taken, [b"heaheadbody1", &large[..]].concat());
    }
}
