//! What the events of a stream have in common.
//!
//! A server writes the same event for each piece of text, with another text in it. So an event that begins and ends as
//! one that was read with care means the same, and all there is to do is to find where its text ends. OpenAI pads each
//! event with a string of random length (`obfuscation`); what is in that may differ, too.

use std::ops::Range;

use memchr::{memchr2, memmem};

use crate::openai::json::end_of_string;

/// Longer events are no pattern.
const MAX_BYTES: usize = 2048;

const PADDING: &[u8] = b"\"obfuscation\":\"";

/// Where a piece of an event stands in memory.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Place {
    address: usize,
    length: usize,
}

impl Place {
    pub(super) fn of(piece: &[u8]) -> Self {
        Self { address: piece.as_ptr().addr(), length: piece.len() }
    }

    /// The same as a range of `bytes`, if it is one.
    pub(super) fn within(self, bytes: &[u8]) -> Option<Range<usize>> {
        let start = self.address.checked_sub(bytes.as_ptr().addr())?;
        let end = start + self.length;
        (end <= bytes.len()).then_some(start..end)
    }
}

/// An event with one text, and all others that differ in nothing but that.
#[derive(Debug, Default)]
pub(super) struct Pattern {
    /// The event; empty before there is one.
    event: Vec<u8>,
    text: Range<usize>,
    /// What the padding stands at, empty at the event's end if there is none.
    padding: Range<usize>,
}

impl Pattern {
    /// Takes an event, complete with the blank line that ends it, whose only text stands at `text`, inside its quotes.
    pub(super) fn learn(&mut self, event: &[u8], text: Range<usize>) {
        self.event.clear();
        if event.len() > MAX_BYTES || !event.ends_with(b"\n\n") || event.contains(&b'\r') {
            return;
        }
        let after = &event[text.end..];
        let padding = memmem::find(after, PADDING).and_then(|at| {
            let start = text.end + at + PADDING.len();
            Some(start..start + end_of_string(&event[start..])?)
        });
        self.padding = padding.unwrap_or(event.len()..event.len());
        self.text = text;
        self.event.extend_from_slice(event);
    }

    /// The text of the event that `bytes` begin with, and the event's length, if it is one of these.
    #[inline]
    pub(super) fn read<'b>(&self, bytes: &'b [u8]) -> Option<(&'b [u8], usize)> {
        if self.event.is_empty() {
            return None;
        }
        let after = bytes.strip_prefix(&self.event[..self.text.start])?;
        let (text, after) = inside(after)?;
        let mut after = after.strip_prefix(&self.event[self.text.end..self.padding.start])?;
        if self.padding.start < self.event.len() {
            after = inside(after)?.1.strip_prefix(&self.event[self.padding.end..])?;
        }
        Some((text, bytes.len() - after.len()))
    }
}

/// Splits at the end of a string, which no line may end in.
#[inline]
fn inside(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (inside, after) = bytes.split_at(end_of_string(bytes)?);
    memchr2(b'\n', b'\r', inside).is_none().then_some((inside, after))
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVENT: &str =
        "data: {\"choices\":[{\"delta\":{\"content\":\"TEXT\"}}],\"obfuscation\":\"PAD\"}\n\n";

    fn with(text: &str, padding: &str) -> String {
        EVENT.replace("TEXT", text).replace("PAD", padding)
    }

    fn pattern(event: &str) -> Pattern {
        let mut pattern = Pattern::default();
        let start = event.find("TEXT").unwrap();
        pattern.learn(event.as_bytes(), start..start + 4);
        pattern
    }

    #[test]
    fn events_that_differ_in_text_and_padding_are_told() {
        let pattern = pattern(EVENT);
        for text in ["", "a", "é \\\"quoted\\\" \\\\", &"long ".repeat(100)] {
            let event = with(text, "x");
            let more = format!("{event}data: [DONE]\n\n");
            assert_eq!(pattern.read(more.as_bytes()), Some((text.as_bytes(), event.len())), "{text}");
        }
    }

    #[test]
    fn what_differs_elsewhere_or_is_not_all_there_is_not_told() {
        let pattern = pattern(EVENT);
        let event = with("a", "x");
        for length in 0..event.len() {
            assert_eq!(pattern.read(&event.as_bytes()[..length]), None, "{length}");
        }
        for other in [
            event.replace("delta", "other"),
            event.replace("obfuscation", "other"),
            event.replace("\"a\"", "null"),
            event.replace("\"a\"", "\"a\",\"refusal\":\"b\""),
            event.replace('a', "a\nb"),
            event.replace('x', "x\r"),
        ] {
            assert_ne!(other, event);
            assert_eq!(pattern.read(other.as_bytes()), None, "{other}");
        }
        assert_eq!(Pattern::default().read(event.as_bytes()), None);
    }

    #[test]
    fn what_ends_otherwise_or_is_long_is_no_pattern() {
        for event in
            [EVENT.trim_end().to_owned(), EVENT.replace('\n', "\r\n"), with("TEXT", &"x".repeat(MAX_BYTES))]
        {
            assert_eq!(pattern(&event).read(event.as_bytes()), None);
        }
    }
}
