//! Server-sent events, as byte ranges.
//!
//! The scanner only finds where events end; it copies nothing and decodes nothing, so what passes through is
//! what came. Lines end with LF, CR or CRLF, wherever the bytes happen to be split
//! (<https://html.spec.whatwg.org/multipage/server-sent-events.html>).

use std::borrow::Cow;

use memchr::memchr2;

/// Finds the ends of events in a stream that arrives in pieces. The ranges between ends are adjacent and
/// concatenate to the stream.
#[derive(Debug, Clone, Default)]
pub struct Scanner {
    /// The present line has bytes before the piece at hand.
    line_has_bytes: bool,
    /// The last byte was a CR: a LF that follows belongs to it.
    after_cr: bool,
}

impl Scanner {
    /// The position after the first event that ends in `bytes`: after a blank line. `None` when it goes on
    /// in the next piece; then all of `bytes` has been taken note of. After an end, call it again with what
    /// follows that end.
    ///
    /// An end is reported without waiting for the LF of a CRLF that is split: that LF then leads the next
    /// event's bytes.
    #[inline]
    pub fn event_end(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut at = self.skip_split_newline(bytes);
        loop {
            let Some(offset) = memchr2(b'\n', b'\r', &bytes[at..]) else {
                self.line_has_bytes |= at < bytes.len();
                return None;
            };
            let had_bytes = std::mem::take(&mut self.line_has_bytes);
            let is_blank = offset == 0 && !had_bytes;
            at += offset + 1;
            if bytes[at - 1] == b'\r' {
                self.after_cr = true;
                at += self.skip_split_newline(&bytes[at..]);
            }
            if is_blank {
                return Some(at);
            }
        }
    }

    /// Whether a LF that comes next belongs to the event before.
    pub fn awaits_newline(&self) -> bool {
        self.after_cr
    }

    #[inline]
    fn skip_split_newline(&mut self, bytes: &[u8]) -> usize {
        match bytes.first() {
            Some(b'\n') if self.after_cr => {
                self.after_cr = false;
                1
            }
            Some(_) => {
                self.after_cr = false;
                0
            }
            None => 0,
        }
    }
}

/// The fields of an event that matter.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Event<'a> {
    /// `event:`, empty if absent.
    pub name: &'a [u8],
    /// The `data:` lines, joined by LF; `None` for comments and blank lines.
    pub data: Option<Cow<'a, [u8]>>,
}

/// Reads an event's bytes. Borrows unless its data has several lines.
#[inline]
pub fn parse(bytes: &[u8]) -> Event<'_> {
    let mut event = Event::default();
    let mut rest = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    while !rest.is_empty() {
        let end = memchr2(b'\n', b'\r', rest).unwrap_or(rest.len());
        let line = &rest[..end];
        rest = rest.get(end + 1..).unwrap_or_default();
        if let Some(value) = field(line, b"data") {
            event.data = Some(match event.data.take() {
                None => Cow::Borrowed(value),
                Some(before) => Cow::Owned([&before, &b"\n"[..], value].concat()),
            });
        } else if let Some(name) = field(line, b"event") {
            event.name = name;
        }
    }
    event
}

/// The value of a line `name: value`; a line without a colon has an empty value.
fn field<'a>(line: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    match line.strip_prefix(name)? {
        [] => Some(&[]),
        [b':', b' ', value @ ..] | [b':', value @ ..] => Some(value),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Event name and data, as the standard says, read from the whole text character by character.
    fn reference(text: &str) -> Vec<(String, String)> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text).replace("\r\n", "\n").replace('\r', "\n");
        let (mut events, mut name, mut data) = (Vec::new(), String::new(), None::<String>);
        let mut lines: Vec<&str> = text.split('\n').collect();
        lines.pop();
        for line in lines {
            if line.is_empty() {
                if let Some(data) = data.take() {
                    events.push((std::mem::take(&mut name), data));
                }
                name.clear();
                continue;
            }
            let (field, value) = line.split_once(':').unwrap_or((line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value);
            match field {
                "data" => data = Some(data.map_or(value.to_owned(), |data| data + "\n" + value)),
                "event" => value.clone_into(&mut name),
                _ => {}
            }
        }
        events
    }

    /// The same through the scanner, with the bytes cut at `cuts`.
    fn scanned(bytes: &[u8], cuts: &[usize]) -> Vec<(String, String)> {
        let (mut scanner, mut events) = (Scanner::default(), Vec::new());
        let (mut whole, mut partial) = (Vec::new(), Vec::new());
        let mut edges: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect();
        edges.extend([0, bytes.len()]);
        edges.sort_unstable();
        for piece in edges.windows(2) {
            let mut piece = &bytes[piece[0]..piece[1]];
            while let Some(end) = scanner.event_end(piece) {
                partial.extend_from_slice(&piece[..end]);
                piece = &piece[end..];
                let event = parse(&partial);
                if let Some(data) = event.data {
                    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
                    events.push((text(event.name), text(&data)));
                }
                whole.append(&mut partial);
            }
            partial.extend_from_slice(piece);
        }
        whole.append(&mut partial);
        assert_eq!(whole, bytes, "the ranges concatenate to the stream");
        events
    }

    fn any_stream() -> impl Strategy<Value = String> {
        let line = prop_oneof![
            "data: ?[a-zé漢🎉:{}\"]{0,8}",
            "data[:x]?",
            "event: ?[a-z]{0,5}",
            ":[a-z ]{0,5}",
            "id: 1",
            "[a-z]{1,3}",
            Just(String::new()),
            Just(String::new()),
        ];
        let newline = prop_oneof![Just("\n"), Just("\r"), Just("\r\n")];
        let lines = proptest::collection::vec((line, newline), 0..24);
        (any::<bool>(), lines).prop_map(|(bom, lines)| {
            let body: String = lines.into_iter().map(|(line, newline)| line + newline).collect();
            if bom { format!("\u{feff}{body}") } else { body }
        })
    }

    proptest! {
        #[test]
        fn any_split_gives_the_events_that_the_standard_gives(
            text in any_stream(), cuts in proptest::collection::vec(any::<usize>(), 0..8),
        ) {
            prop_assert_eq!(scanned(text.as_bytes(), &cuts), reference(&text));
        }

        #[test]
        fn byte_by_byte_is_the_same(text in any_stream()) {
            let cuts: Vec<usize> = (0..=text.len()).collect();
            prop_assert_eq!(scanned(text.as_bytes(), &cuts), reference(&text));
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let mut scanner = Scanner::default();
            let mut rest = &bytes[..];
            while let Some(end) = scanner.event_end(rest) {
                parse(&rest[..end]);
                rest = &rest[end..];
            }
        }
    }

    #[test]
    fn an_event_ends_without_waiting_for_the_rest_of_a_split_newline() {
        let mut scanner = Scanner::default();
        assert_eq!(scanner.event_end(b"data: 1\r\n\r"), Some(10));
        assert!(scanner.awaits_newline());
        assert_eq!(scanner.event_end(b"\ndata: 2\r\n\r\n"), Some(12));
    }

    #[test]
    fn a_single_line_of_data_is_borrowed() {
        assert!(matches!(parse(b"data: x\n\n").data, Some(Cow::Borrowed(b"x"))));
        assert_eq!(
            parse(b"event: e\ndata:x\ndata: y\n\n"),
            Event { name: b"e", data: Some(b"x\ny".to_vec().into()) }
        );
        assert_eq!(parse(b": keep-alive\n\n").data, None);
    }
}
