//! zstd frames (RFC 8878) that arrive in pieces, decoded a block at a time.

use std::io::{self, Write};

use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

/// Larger windows are refused, as RFC 9659 says for content codings.
pub(super) const MAX_WINDOW_BYTES: u64 = 8 << 20;
/// The most that a block has, and so the most that is kept of one that is not complete.
const MAX_BLOCK_BYTES: usize = 128 << 10;
const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
const BLOCK_HEADER_BYTES: usize = 3;
const CHECKSUM_BYTES: usize = 4;

pub(super) struct Zstd<W: Write> {
    sink: W,
    decoder: FrameDecoder,
    /// What came of a header or a block that is not complete.
    pending: Vec<u8>,
    /// A frame has begun and not ended; whether a checksum follows it.
    frame: Option<Frame>,
}

#[derive(Clone, Copy)]
struct Frame {
    has_checksum: bool,
}

impl<W: Write> Zstd<W> {
    pub(super) fn new(sink: W) -> Self {
        let mut decoder = FrameDecoder::new();
        decoder.set_max_window_size(MAX_WINDOW_BYTES);
        Self { sink, decoder, pending: Vec::new(), frame: None }
    }

    pub(super) fn sink(&mut self) -> &mut W {
        &mut self.sink
    }

    pub(super) fn sink_ref(&self) -> &W {
        &self.sink
    }

    pub(super) fn push(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut pending = std::mem::take(&mut self.pending);
        pending.extend_from_slice(bytes);
        let mut at = 0;
        loop {
            let used = match self.frame {
                None => self.begin(&pending[at..])?,
                Some(frame) => self.block(frame, &pending[at..])?,
            };
            if used == 0 {
                break;
            }
            at += used;
        }
        pending.drain(..at);
        self.pending = pending;
        Ok(())
    }

    pub(super) fn finish(&mut self) -> io::Result<()> {
        if self.frame.is_some() || !self.pending.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }

    /// Begins a frame if all of its header is there. Returns the bytes that were used.
    fn begin(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let known = bytes.len().min(MAGIC.len());
        if bytes[..known] != MAGIC[..known] {
            return Err(malformed("not a frame"));
        }
        let Some(&descriptor) = bytes.get(MAGIC.len()) else { return Ok(0) };
        let length = header_bytes(descriptor);
        let Some(header) = bytes.get(..length) else { return Ok(0) };
        self.decoder.init(header).map_err(|error| malformed(&error.to_string()))?;
        self.frame = Some(Frame { has_checksum: descriptor & 0b100 != 0 });
        Ok(length)
    }

    /// Decodes a block if all of it is there. Returns the bytes that were used.
    fn block(&mut self, frame: Frame, bytes: &[u8]) -> io::Result<usize> {
        let Some(&[first, second, third]) = bytes.first_chunk::<BLOCK_HEADER_BYTES>() else { return Ok(0) };
        let header = usize::from(first) | usize::from(second) << 8 | usize::from(third) << 16;
        let (is_last, is_repeated, size) = (header & 1 == 1, header >> 1 & 3 == 1, header >> 3);
        if size > MAX_BLOCK_BYTES {
            return Err(malformed("a block is too long"));
        }
        let content = if is_repeated { 1 } else { size };
        let checksum = if is_last && frame.has_checksum { CHECKSUM_BYTES } else { 0 };
        let length = BLOCK_HEADER_BYTES + content + checksum;
        let Some(block) = bytes.get(..length) else { return Ok(0) };
        self.decoder
            .decode_blocks(block, BlockDecodingStrategy::UptoBlocks(1))
            .map_err(|error| malformed(&error.to_string()))?;
        self.decoder.collect_to_writer(&mut self.sink)?;
        if is_last {
            self.frame = None;
        }
        Ok(length)
    }
}

/// Length of a frame's header, the magic number included, by its descriptor.
fn header_bytes(descriptor: u8) -> usize {
    let is_single_segment = descriptor & 0b10_0000 != 0;
    let content_size = match descriptor >> 6 {
        0 => usize::from(is_single_segment),
        flag => 1 << flag,
    };
    let dictionary = match descriptor & 0b11 {
        3 => 4,
        flag => usize::from(flag),
    };
    MAGIC.len() + 1 + usize::from(!is_single_segment) + dictionary + content_size
}

fn malformed(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.to_owned())
}
