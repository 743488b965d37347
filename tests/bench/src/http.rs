//! An incremental reader of HTTP/1.1 messages: as much as this harness needs.

use memchr::{memchr, memmem};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Head,
    Length(usize),
    ChunkSize { size: usize, extension: bool },
    ChunkData(usize),
    ChunkEnd,
    Trailer { empty: bool },
}

/// What a message head said.
#[derive(Clone, Debug, Default)]
pub struct Head {
    /// Of a response; 0 for a request.
    pub status: u16,
    /// Of a request; empty for a response.
    pub target: String,
    pub close: bool,
}

pub enum Event<'a> {
    Head(&'a Head),
    Data(&'a [u8]),
    End,
}

/// A message must have a length or be chunked.
pub struct Reader {
    state: State,
    head: Head,
    partial: Vec<u8>,
}

impl Default for Reader {
    fn default() -> Self {
        Self { state: State::Head, head: Head::default(), partial: Vec::new() }
    }
}

impl Reader {
    /// Takes all of `input` and tells what it held. An error is a violation of the protocol.
    pub fn feed(&mut self, input: &[u8], mut on: impl FnMut(Event<'_>)) -> Result<(), String> {
        let joined;
        let mut rest = input;
        if !self.partial.is_empty() {
            self.partial.extend_from_slice(input);
            joined = std::mem::take(&mut self.partial);
            rest = &joined;
        }
        while !rest.is_empty() {
            rest = match self.state {
                State::Head => {
                    let Some(end) = memmem::find(rest, b"\r\n\r\n") else {
                        self.partial = rest.to_vec();
                        return Ok(());
                    };
                    (self.head, self.state) = parse_head(&rest[..end + 2])?;
                    on(Event::Head(&self.head));
                    self.end_if(self.state == State::Length(0), &mut on);
                    &rest[end + 4..]
                }
                State::Length(left) => {
                    let (data, rest) = rest.split_at(left.min(rest.len()));
                    on(Event::Data(data));
                    self.state = State::Length(left - data.len());
                    self.end_if(left == data.len(), &mut on);
                    rest
                }
                State::ChunkData(left) => {
                    let (data, rest) = rest.split_at(left.min(rest.len()));
                    on(Event::Data(data));
                    self.state = if left == data.len() {
                        State::ChunkEnd
                    } else {
                        State::ChunkData(left - data.len())
                    };
                    rest
                }
                _ => {
                    self.between_chunks(rest[0], &mut on)?;
                    &rest[1..]
                }
            };
        }
        Ok(())
    }

    fn between_chunks(&mut self, byte: u8, on: &mut impl FnMut(Event<'_>)) -> Result<(), String> {
        match (self.state, byte) {
            (State::ChunkSize { size: 0, .. }, b'\n') => self.state = State::Trailer { empty: true },
            (State::ChunkSize { size, .. }, b'\n') => self.state = State::ChunkData(size),
            (State::ChunkSize { size, .. }, b';' | b' ') => {
                self.state = State::ChunkSize { size, extension: true };
            }
            (State::ChunkSize { extension: true, .. }, _) | (_, b'\r') => {}
            (State::ChunkSize { size, extension }, _) => {
                let digit =
                    char::from(byte).to_digit(16).ok_or_else(|| format!("chunk size byte {byte:#x}"))?;
                self.state = State::ChunkSize { size: size * 16 + digit as usize, extension };
            }
            (State::ChunkEnd, b'\n') => self.state = State::ChunkSize { size: 0, extension: false },
            (State::Trailer { empty }, b'\n') => {
                self.state = State::Trailer { empty: true };
                self.end_if(empty, on);
            }
            (State::Trailer { .. }, _) => self.state = State::Trailer { empty: false },
            (state, _) => return Err(format!("byte {byte:#x} in {state:?}")),
        }
        Ok(())
    }

    fn end_if(&mut self, ended: bool, on: &mut impl FnMut(Event<'_>)) {
        if ended {
            self.state = State::Head;
            on(Event::End);
        }
    }
}

fn parse_head(head: &[u8]) -> Result<(Head, State), String> {
    let mut lines = head.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    let first = std::str::from_utf8(lines.next().unwrap_or_default()).map_err(|error| error.to_string())?;
    let mut parsed = Head::default();
    let mut state = State::Length(0);
    if let Some(status) = first.strip_prefix("HTTP/1.1 ") {
        parsed.status = status.get(..3).and_then(|code| code.parse().ok()).ok_or("no status")?;
    } else {
        first.split(' ').nth(1).ok_or("no request line")?.clone_into(&mut parsed.target);
    }
    for line in lines {
        let Some(colon) = memchr(b':', line) else { continue };
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if name.eq_ignore_ascii_case(b"content-length") {
            let length = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
            state = State::Length(length.ok_or("content-length")?);
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            state = State::ChunkSize { size: 0, extension: false };
        } else if name.eq_ignore_ascii_case(b"connection") {
            parsed.close = value.eq_ignore_ascii_case(b"close");
        }
    }
    Ok((parsed, state))
}

/// Splits a byte stream that comes in any slicing into lines.
#[derive(Default)]
pub struct Lines {
    carried: Vec<u8>,
}

impl Lines {
    pub fn clear(&mut self) {
        self.carried.clear();
    }

    pub fn feed(&mut self, mut data: &[u8], mut on_line: impl FnMut(&[u8])) {
        while let Some(end) = memchr(b'\n', data) {
            if self.carried.is_empty() {
                on_line(&data[..end]);
            } else {
                self.carried.extend_from_slice(&data[..end]);
                on_line(&self.carried);
                self.carried.clear();
            }
            data = &data[end + 1..];
        }
        self.carried.extend_from_slice(data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_framings_are_read_in_any_slicing() {
        let input = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;x=1\r\n world\r\n0\r\n\r\nHTTP/1.1 404 No\r\ncontent-length: 3\r\n\r\nabc";
        for step in [1, 2, 3, 7, 1000] {
            let (mut statuses, mut body, mut ends) = (Vec::new(), Vec::new(), 0);
            let mut reader = Reader::default();
            for piece in input.chunks(step) {
                let fed = reader.feed(piece, |event| match event {
                    Event::Head(head) => statuses.push(head.status),
                    Event::Data(data) => body.extend_from_slice(data),
                    Event::End => ends += 1,
                });
                fed.unwrap();
            }
            assert_eq!(
                (statuses.as_slice(), body.as_slice(), ends),
                (&[200, 404][..], &b"hello worldabc"[..], 2)
            );
        }
    }

    #[test]
    fn a_request_head_has_a_target() {
        let mut target = String::new();
        let mut reader = Reader::default();
        let fed = reader.feed(b"GET /v1/models?x HTTP/1.1\r\nhost: a\r\n\r\n", |event| {
            if let Event::Head(head) = event {
                target.clone_from(&head.target);
            }
        });
        fed.unwrap();
        assert_eq!(target, "/v1/models?x");
    }

    #[test]
    fn lines_are_the_same_in_any_slicing() {
        for step in [1, 2, 5, 100] {
            let (mut lines, mut got) = (Lines::default(), Vec::new());
            for piece in b"data: a\n\ndata: [DONE]\n\n".chunks(step) {
                lines.feed(piece, |line| got.push(String::from_utf8_lossy(line).into_owned()));
            }
            assert_eq!(got, ["data: a", "", "data: [DONE]", ""]);
        }
    }
}
