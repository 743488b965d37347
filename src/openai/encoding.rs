//! Content codings: what is compressed, decoded as it passes.
//!
//! A [`Decoder`] takes a body in pieces of any size and writes what it decodes to a sink, at once as far as the
//! coding allows: gzip, deflate and Brotli show each flush of the sender; zstd, as its decoder holds back a window,
//! what is older than the window and, at the end of its frame, the rest. Nothing is kept but the coding's window
//! (32 KiB, 16 MiB, and 8 MiB), and a body may not expand beyond [`MAX_EXPANSION`], so that
//! a few bytes cannot keep a thread busy.

mod zstd;

use std::io::{self, Write};

use brotli_decompressor::DecompressorWriter;
use flate2::write::{MultiGzDecoder, ZlibDecoder};

use self::zstd::Zstd;

/// Decoded bytes that a byte may stand for, over a whole body. Answers of models compress to a tenth or so.
pub const MAX_EXPANSION: u64 = 256;
/// Decoded bytes that any body may have, however few its own are.
const FREE_BYTES: u64 = 1 << 20;
/// What Brotli's decoder hands over at a time.
const BROTLI_BUFFER_BYTES: usize = 16 << 10;

/// A content coding that can be read (RFC 9110, 8.4.1; RFC 7932; RFC 8878).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coding {
    Gzip,
    Deflate,
    Brotli,
    Zstd,
}

/// What a `content-encoding` header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// The bytes are what they are.
    Identity,
    Coded(Coding),
    /// A coding that is not read, or several on top of each other.
    Unknown,
}

impl Encoding {
    /// `header` is the value of `content-encoding`, if there is one.
    pub fn of(header: Option<&str>) -> Self {
        let name = header.unwrap_or_default().trim();
        let is = |coding: &str| name.eq_ignore_ascii_case(coding);
        match name {
            _ if name.is_empty() || is("identity") => Self::Identity,
            _ if is("gzip") || is("x-gzip") => Self::Coded(Coding::Gzip),
            _ if is("deflate") => Self::Coded(Coding::Deflate),
            _ if is("br") => Self::Coded(Coding::Brotli),
            _ if is("zstd") => Self::Coded(Coding::Zstd),
            _ => Self::Unknown,
        }
    }
}

impl Coding {
    /// Whether each flush of the sender can be decoded when it comes.
    pub const fn is_prompt(self) -> bool {
        !matches!(self, Self::Zstd)
    }
}

/// Decodes a body that arrives in pieces into a sink.
pub struct Decoder<W: Write> {
    inner: Inner<Bounded<W>>,
    has_begun: bool,
}

enum Inner<W: Write> {
    Gzip(Box<MultiGzDecoder<W>>),
    Deflate(Box<ZlibDecoder<W>>),
    Brotli(Box<DecompressorWriter<W>>),
    Zstd(Box<Zstd<W>>),
}

impl<W: Write> Decoder<W> {
    pub fn new(coding: Coding, sink: W) -> Self {
        let sink = Bounded { sink, left: FREE_BYTES };
        let inner = match coding {
            Coding::Gzip => Inner::Gzip(Box::new(MultiGzDecoder::new(sink))),
            Coding::Deflate => Inner::Deflate(Box::new(ZlibDecoder::new(sink))),
            Coding::Brotli => Inner::Brotli(Box::new(DecompressorWriter::new(sink, BROTLI_BUFFER_BYTES))),
            Coding::Zstd => Inner::Zstd(Box::new(Zstd::new(sink))),
        };
        Self { inner, has_begun: false }
    }

    /// Decodes what can be.
    ///
    /// # Errors
    /// When the bytes are not what they claim to be, expand too far, or the sink takes no more. Nothing may be
    /// pushed after that.
    pub fn push(&mut self, bytes: &[u8]) -> io::Result<()> {
        let more = (bytes.len() as u64).saturating_mul(MAX_EXPANSION);
        let had_begun = self.has_begun;
        self.has_begun |= !bytes.is_empty();
        let sink = self.bounded();
        sink.left = sink.left.saturating_add(more);
        match &mut self.inner {
            Inner::Gzip(decoder) => decoder.write_all(bytes).and_then(|()| decoder.flush()),
            Inner::Deflate(decoder) => decoder.write_all(bytes).and_then(|()| decoder.flush()),
            Inner::Brotli(_) if !had_begun && bytes.first().copied().is_some_and(has_large_window) => {
                Err(io::ErrorKind::InvalidData.into())
            }
            Inner::Brotli(decoder) => decoder.write_all(bytes),
            Inner::Zstd(decoder) => decoder.push(bytes),
        }
    }

    /// The body is over. Whatever is left has gone to the sink then.
    ///
    /// # Errors
    /// When the body is incomplete.
    pub fn finish(&mut self) -> io::Result<()> {
        match &mut self.inner {
            Inner::Gzip(decoder) => decoder.try_finish(),
            Inner::Deflate(decoder) => decoder.try_finish(),
            Inner::Brotli(decoder) => decoder.close(),
            Inner::Zstd(decoder) => decoder.finish(),
        }
    }

    pub fn sink(&mut self) -> &mut W {
        &mut self.bounded().sink
    }

    pub fn sink_ref(&self) -> &W {
        match &self.inner {
            Inner::Gzip(decoder) => &decoder.get_ref().sink,
            Inner::Deflate(decoder) => &decoder.get_ref().sink,
            Inner::Brotli(decoder) => &decoder.get_ref().sink,
            Inner::Zstd(decoder) => &decoder.sink_ref().sink,
        }
    }

    fn bounded(&mut self) -> &mut Bounded<W> {
        match &mut self.inner {
            Inner::Gzip(decoder) => decoder.get_mut(),
            Inner::Deflate(decoder) => decoder.get_mut(),
            Inner::Brotli(decoder) => decoder.get_mut(),
            Inner::Zstd(decoder) => decoder.sink(),
        }
    }
}

impl<W: Write> std::fmt::Debug for Decoder<W> {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(match &self.inner {
            Inner::Gzip(_) => "Decoder(gzip)",
            Inner::Deflate(_) => "Decoder(deflate)",
            Inner::Brotli(_) => "Decoder(br)",
            Inner::Zstd(_) => "Decoder(zstd)",
        })
    }
}

/// Whether a Brotli stream that begins so has a window of up to a gigabyte: an extension, by a code that RFC 7932
/// reserves, and nothing that HTTP has.
fn has_large_window(first: u8) -> bool {
    first & 0x7f == 0x11
}

/// The whole of a body.
///
/// # Errors
/// `None` when it is more than `limit` bytes long or not what it claims to be.
pub fn decode(coding: Coding, bytes: &[u8], limit: usize) -> Result<Vec<u8>, DecodeError> {
    let mut decoder = Decoder::new(coding, Limited { bytes: Vec::new(), limit, is_over: false });
    let decoded = decoder.push(bytes).and_then(|()| decoder.finish());
    let sink = decoder.sink();
    match decoded {
        Ok(()) => Ok(std::mem::take(&mut sink.bytes)),
        Err(_) if sink.is_over => Err(DecodeError::TooLong),
        Err(_) => Err(DecodeError::Malformed),
    }
}

/// Why a body cannot be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DecodeError {
    TooLong,
    Malformed,
}

/// Takes bytes up to a limit.
#[derive(Debug)]
struct Limited {
    bytes: Vec<u8>,
    limit: usize,
    is_over: bool,
}

impl Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.limit {
            self.is_over = true;
            return Err(too_long());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Hands on as many bytes as may still come.
struct Bounded<W> {
    sink: W,
    left: u64,
}

impl<W: Write> Write for Bounded<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.left = self.left.checked_sub(bytes.len() as u64).ok_or_else(too_long)?;
        self.sink.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

fn too_long() -> io::Error {
    io::Error::other("the body is too long when it is decoded")
}

#[cfg(test)]
mod tests;
