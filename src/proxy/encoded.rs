//! Event streams that come compressed.
//!
//! They pass as they came and are decoded on the side for their usage. The exception is a stream with the usage
//! chunk that only we asked for: it cannot be cut out of compressed bytes, so the client gets such a stream
//! decoded. (Routed calls do not offer encodings upstream; this is a server that compresses unasked.)

use std::io::{self, Write};

use bytes::{Bytes, BytesMut};

use crate::openai::StreamReader;
use crate::openai::encoding::{Coding, Decoder};

#[derive(Debug)]
pub struct EncodedEvents {
    decoder: Decoder<Sink>,
    /// The client gets what is decoded.
    unpacks: bool,
    /// What came is not what it claimed to be.
    is_unreadable: bool,
}

#[derive(Debug)]
struct Sink {
    reader: StreamReader,
    /// What goes to the client, if it gets what is decoded.
    out: Option<BytesMut>,
}

impl EncodedEvents {
    /// `strips`: `reader` cuts the usage chunk. Out of a coding that is decoded late it is not cut: better a
    /// chunk that nobody asked for than a stream that comes in lumps.
    pub fn new(coding: Coding, reader: StreamReader, strips: bool) -> Self {
        let unpacks = strips && coding.is_prompt();
        let sink = Sink { reader, out: unpacks.then(BytesMut::new) };
        Self { decoder: Decoder::new(coding, sink), unpacks, is_unreadable: false }
    }

    /// Whether the client gets the stream without its coding.
    pub fn unpacks(&self) -> bool {
        self.unpacks
    }

    /// What passes to the client for a piece that came.
    pub fn push(&mut self, chunk: Bytes) -> Bytes {
        if !self.is_unreadable && self.decoder.push(&chunk).is_err() {
            self.is_unreadable = true;
        }
        if self.unpacks { self.decoder.sink().take() } else { chunk }
    }

    /// What was held back.
    pub fn finish(&mut self) -> Bytes {
        if !self.is_unreadable {
            // A body that was cut off is known by the events that are missing.
            drop(self.decoder.finish());
        }
        let sink = self.decoder.sink();
        let held = sink.reader.finish();
        if let Some(out) = &mut sink.out {
            out.extend_from_slice(&held);
        }
        sink.take()
    }

    pub fn reader(&self) -> &StreamReader {
        &self.decoder.sink_ref().reader
    }

    /// Whether the client's stream cannot go on.
    pub fn is_broken(&self) -> bool {
        self.is_unreadable && self.unpacks
    }

    /// Whether the stream is known to have come to its end; of one that could not be read nothing is known.
    pub fn is_complete(&self) -> bool {
        if self.is_unreadable { !self.unpacks } else { self.reader().is_complete() }
    }
}

impl Sink {
    fn take(&mut self) -> Bytes {
        self.out.as_mut().map(|out| out.split().freeze()).unwrap_or_default()
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let passed = self.reader.push(Bytes::copy_from_slice(bytes));
        if let Some(out) = &mut self.out {
            out.extend_from_slice(&passed);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
