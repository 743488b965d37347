//! Body framing: received bytes in, body bytes out, any slicing.
//!
//! Everything that is already here leaves as one piece. A single chunk is passed on without a copy; several are
//! joined into one buffer, which costs a copy of a few hundred bytes each and saves a write each.

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};

use super::{MAX_HEAD_BYTES, MAX_HEADERS};

/// Longest line with a chunk's size and its extensions.
const MAX_SIZE_LINE: usize = 4 * 1024;
/// Digits of the largest size that is accepted: 2^60 bytes.
const MAX_SIZE_DIGITS: usize = 15;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed(pub &'static str);

#[derive(Debug)]
pub enum Decoder {
    Length { left: u64 },
    Chunked { state: Chunk, trailers: Option<Box<HeaderMap>> },
    UntilClose { closed: bool },
}

/// What comes next in a chunked body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chunk {
    Size,
    Data { left: u64 },
    DataEnd,
    Trailers,
    Done,
}

impl Decoder {
    pub fn empty() -> Self {
        Self::length(0)
    }

    pub fn length(left: u64) -> Self {
        Self::Length { left }
    }

    pub fn chunked() -> Self {
        Self::Chunked { state: Chunk::Size, trailers: None }
    }

    pub fn until_close() -> Self {
        Self::UntilClose { closed: false }
    }

    pub fn is_done(&self) -> bool {
        match self {
            Self::Length { left } => *left == 0,
            Self::Chunked { state, .. } => *state == Chunk::Done,
            Self::UntilClose { closed } => *closed,
        }
    }

    /// Bytes still to come, if that is known.
    pub fn exact_length(&self) -> Option<u64> {
        match self {
            Self::Length { left } => Some(*left),
            _ => None,
        }
    }

    /// Trailer fields, once the body has ended.
    pub fn take_trailers(&mut self) -> Option<HeaderMap> {
        match self {
            Self::Chunked { trailers, .. } => trailers.take().map(|trailers| *trailers),
            _ => None,
        }
    }

    /// Whether trailer fields are still to be taken.
    pub fn has_trailers(&self) -> bool {
        matches!(self, Self::Chunked { trailers: Some(_), .. })
    }

    /// The other side closed. Returns whether the body is complete with that.
    pub fn end_of_stream(&mut self) -> bool {
        if let Self::UntilClose { closed } = self {
            *closed = true;
        }
        self.is_done()
    }

    /// All body bytes in `unread`; `None` if more has to be received first, or the body has ended.
    pub fn decode(&mut self, unread: &mut BytesMut) -> Result<Option<Bytes>, Malformed> {
        match self {
            Self::Length { left } => Ok(take(unread, left)),
            Self::UntilClose { .. } => Ok((!unread.is_empty()).then(|| unread.split().freeze())),
            Self::Chunked { state, trailers } => decode_chunks(state, trailers, unread),
        }
    }
}

/// At most `left` bytes off the front of `unread`.
fn take(unread: &mut BytesMut, left: &mut u64) -> Option<Bytes> {
    let here = usize::try_from(*left).unwrap_or(usize::MAX).min(unread.len());
    *left -= here as u64;
    (here > 0).then(|| unread.split_to(here).freeze())
}

fn decode_chunks(
    state: &mut Chunk,
    trailers: &mut Option<Box<HeaderMap>>,
    unread: &mut BytesMut,
) -> Result<Option<Bytes>, Malformed> {
    let mut joined = Joined::default();
    while !unread.is_empty() {
        let progress = match state {
            Chunk::Size => read_size(state, unread)?,
            Chunk::Data { left } => {
                joined.take(unread, left);
                if *left == 0 {
                    *state = Chunk::DataEnd;
                }
                true
            }
            Chunk::DataEnd => read_data_end(state, unread)?,
            Chunk::Trailers => read_trailers(state, trailers, unread)?,
            Chunk::Done => false,
        };
        if !progress {
            break;
        }
    }
    Ok(joined.finish())
}

fn read_size(state: &mut Chunk, unread: &mut BytesMut) -> Result<bool, Malformed> {
    let Some(end) = memchr::memchr(b'\n', unread) else {
        let too_long = unread.len() > MAX_SIZE_LINE;
        return if too_long { Err(Malformed("a chunk's size line is too long")) } else { Ok(false) };
    };
    let line =
        unread[..end].strip_suffix(b"\r").ok_or(Malformed("a chunk's size line does not end in CR LF"))?;
    let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
    let rest_is_extension = matches!(line.get(digits), None | Some(b';' | b' ' | b'\t'));
    if digits == 0 || digits > MAX_SIZE_DIGITS || !rest_is_extension {
        return Err(Malformed("a chunk's size is not a hexadecimal number"));
    }
    let size = line[..digits].iter().fold(0_u64, |size, byte| size << 4 | u64::from(hex_value(*byte)));
    unread.advance(end + 1);
    *state = if size == 0 { Chunk::Trailers } else { Chunk::Data { left: size } };
    Ok(true)
}

fn hex_value(digit: u8) -> u8 {
    match digit {
        b'0'..=b'9' => digit - b'0',
        _ => (digit | 0x20) - b'a' + 10,
    }
}

fn read_data_end(state: &mut Chunk, unread: &mut BytesMut) -> Result<bool, Malformed> {
    if unread.len() < 2 {
        return Ok(false);
    }
    if unread[..2] != *b"\r\n" {
        return Err(Malformed("a chunk is longer than its size"));
    }
    unread.advance(2);
    *state = Chunk::Size;
    Ok(true)
}

fn read_trailers(
    state: &mut Chunk,
    trailers: &mut Option<Box<HeaderMap>>,
    unread: &mut BytesMut,
) -> Result<bool, Malformed> {
    let end = if unread.starts_with(b"\r\n") {
        2
    } else if let Some(end) = memchr::memmem::find(unread, b"\r\n\r\n") {
        *trailers = Some(Box::new(parse_trailers(&unread[..end + 4])?));
        end + 4
    } else if unread.len() > MAX_HEAD_BYTES {
        return Err(Malformed("the trailer section is longer than 64 KiB"));
    } else {
        return Ok(false);
    };
    unread.advance(end);
    *state = Chunk::Done;
    Ok(true)
}

fn parse_trailers(section: &[u8]) -> Result<HeaderMap, Malformed> {
    let mut fields = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let Ok(httparse::Status::Complete((_, fields))) = httparse::parse_headers(section, &mut fields) else {
        return Err(Malformed("the trailer section cannot be parsed"));
    };
    let mut trailers = HeaderMap::with_capacity(fields.len());
    for field in fields {
        let name = HeaderName::from_bytes(field.name.as_bytes());
        let value = HeaderValue::from_bytes(field.value);
        let (Ok(name), Ok(value)) = (name, value) else {
            return Err(Malformed("a trailer field is not valid"));
        };
        trailers.append(name, value);
    }
    Ok(trailers)
}

/// One piece as it is, several joined.
#[derive(Default)]
enum Joined {
    #[default]
    Nothing,
    One(Bytes),
    Several(BytesMut),
}

impl Joined {
    fn take(&mut self, unread: &mut BytesMut, left: &mut u64) {
        let room = unread.len();
        let Some(piece) = take(unread, left) else { return };
        *self = match std::mem::take(self) {
            Self::Nothing => Self::One(piece),
            Self::One(first) => {
                let mut buffer = BytesMut::with_capacity(first.len() + room);
                buffer.extend_from_slice(&first);
                buffer.extend_from_slice(&piece);
                Self::Several(buffer)
            }
            Self::Several(mut buffer) => {
                buffer.extend_from_slice(&piece);
                Self::Several(buffer)
            }
        };
    }

    fn finish(self) -> Option<Bytes> {
        match self {
            Self::Nothing => None,
            Self::One(piece) => Some(piece),
            Self::Several(buffer) => Some(buffer.freeze()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Feeds `wire` in pieces of `step` bytes; the body, the pieces it came in, and what was left unread.
    fn run(mut decoder: Decoder, wire: &[u8], step: usize) -> Result<(Vec<u8>, usize, Vec<u8>), Malformed> {
        let (mut unread, mut body, mut pieces) = (BytesMut::new(), Vec::new(), 0);
        for piece in wire.chunks(step) {
            unread.extend_from_slice(piece);
            while let Some(bytes) = decoder.decode(&mut unread)? {
                body.extend_from_slice(&bytes);
                pieces += 1;
            }
        }
        assert!(decoder.end_of_stream(), "the body did not end");
        Ok((body, pieces, unread.to_vec()))
    }

    #[test]
    fn chunks_that_arrive_together_leave_together() {
        let wire = b"5\r\nhello\r\n6;x=1\r\n world\r\n0\r\n\r\nHTTP/1.1";
        let (body, pieces, rest) = run(Decoder::chunked(), wire, wire.len()).unwrap();
        assert_eq!((body.as_slice(), pieces, rest.as_slice()), (&b"hello world"[..], 1, &b"HTTP/1.1"[..]));
    }

    #[test]
    fn trailers_are_kept() {
        let mut decoder = Decoder::chunked();
        let mut unread = BytesMut::from(&b"1\r\na\r\n0\r\nx-sum: 7\r\n\r\n"[..]);
        assert_eq!(decoder.decode(&mut unread).unwrap().unwrap(), "a");
        assert!(decoder.is_done() && decoder.has_trailers());
        assert_eq!(decoder.take_trailers().unwrap()["x-sum"], "7");
    }

    #[test]
    fn a_body_that_is_cut_is_not_complete() {
        for wire in [&b"5\r\nhel"[..], b"5\r\nhello\r\n", b"5\r\nhello\r\n0\r\n", b""] {
            let mut decoder = Decoder::chunked();
            let mut unread = BytesMut::from(wire);
            while decoder.decode(&mut unread).unwrap().is_some() {}
            assert!(!decoder.end_of_stream());
        }
        let mut decoder = Decoder::length(3);
        assert_eq!(decoder.decode(&mut BytesMut::from(&b"ab"[..])).unwrap().unwrap(), "ab");
        assert!(!decoder.end_of_stream());
    }

    #[test]
    fn sizes_that_lie_are_refused() {
        for wire in [
            &b"\r\nx"[..],
            b"g\r\n",
            b"-1\r\n",
            b"0x5\r\nhello",
            b"ffffffffffffffff\r\n",
            b"5\nhello\r\n",
            b"5\r\nhello!\r\n",
        ] {
            let mut decoder = Decoder::chunked();
            let mut unread = BytesMut::from(wire);
            let outcome = loop {
                match decoder.decode(&mut unread) {
                    Ok(Some(_)) => {}
                    other => break other,
                }
            };
            assert!(outcome.is_err(), "{:?}", String::from_utf8_lossy(wire));
        }
    }

    #[test]
    fn lines_without_an_end_are_refused() {
        let mut long = BytesMut::from(&vec![b'1'; MAX_SIZE_LINE + 1][..]);
        assert!(Decoder::chunked().decode(&mut long).is_err());
        let mut trailers = BytesMut::from(&b"0\r\n"[..]);
        trailers.extend_from_slice(&vec![b'a'; MAX_HEAD_BYTES + 1]);
        assert!(Decoder::chunked().decode(&mut trailers).is_err());
    }

    proptest! {
        #[test]
        fn a_chunked_body_is_the_same_however_it_is_cut(
            chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..200), 0..12),
            step in 1_usize..64,
        ) {
            let mut wire = Vec::new();
            for chunk in &chunks {
                wire.extend_from_slice(format!("{:X}\r\n", chunk.len()).as_bytes());
                wire.extend_from_slice(chunk);
                wire.extend_from_slice(b"\r\n");
            }
            wire.extend_from_slice(b"0\r\n\r\n");
            let (body, _, rest) = run(Decoder::chunked(), &wire, step).unwrap();
            prop_assert_eq!(body, chunks.concat());
            prop_assert!(rest.is_empty());
        }

        #[test]
        fn no_input_makes_the_decoder_panic_or_loop(wire in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut decoder = Decoder::chunked();
            let mut unread = BytesMut::from(&wire[..]);
            let mut given = 0;
            while let Ok(Some(bytes)) = decoder.decode(&mut unread) {
                given += bytes.len();
                prop_assert!(given <= wire.len());
            }
        }
    }
}
