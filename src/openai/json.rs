//! A borrowed walk over the top-level members of a JSON object.
//!
//! Top-level syntax is checked in full. Nested values are skipped, not built: their strings and brackets are
//! matched, so every boundary is right on valid JSON, and what is wrong inside them is left for the server
//! to say. Strings, where nearly all the bytes of a request are, are crossed as [`end_of_string`] does.

mod strings;

use std::borrow::Cow;
use std::ops::Range;

use memchr::memchr;

pub use strings::end_of_string;
use strings::plain_string;

/// After so many bytes without a quote or bracket, an array of numbers is likely.
const LONG_PLAIN: u32 = 64;
/// Digits that fit a `u64` whatever they are.
const PLAIN_DIGITS: usize = 19;
/// Kinds of brackets are compared down to this depth; below it only their number is.
const CHECKED_DEPTH: u32 = 128;

/// Where a body stops being JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{what} at byte {at}")]
pub struct JsonError {
    pub at: usize,
    pub what: &'static str,
}

/// One member of an object, as positions in the text that was walked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// The key with its quotes.
    pub key: Range<usize>,
    pub value: Range<usize>,
    /// The key is written with escapes.
    pub is_escaped: bool,
}

impl Member {
    /// The key's text. An escaped key (`"mod\u0065l"`) is the same key to every server.
    pub fn name<'a>(&self, text: &'a [u8]) -> Cow<'a, [u8]> {
        let raw = &text[self.key.start + 1..self.key.end - 1];
        match self.is_escaped.then(|| unescape(raw)).flatten() {
            Some(text) => Cow::Owned(text.into_bytes()),
            None => Cow::Borrowed(raw),
        }
    }

    pub fn value<'a>(&self, text: &'a [u8]) -> &'a [u8] {
        &text[self.value.clone()]
    }
}

/// The text of a JSON string's inside that has escapes, if it is valid.
fn unescape(raw: &[u8]) -> Option<String> {
    let quoted = [b"\"", raw, b"\""].concat();
    serde_json::from_slice(&quoted).ok()
}

/// The text of a JSON string, given with its quotes; `None` if it is no valid string.
pub fn string(value: &[u8]) -> Option<Cow<'_, str>> {
    let raw = value.strip_prefix(b"\"")?.strip_suffix(b"\"")?;
    if memchr(b'\\', raw).is_some() {
        return serde_json::from_slice::<String>(value).ok().map(Cow::Owned);
    }
    if raw.iter().any(|byte| *byte < 0x20 || *byte == b'"') {
        return None;
    }
    std::str::from_utf8(raw).ok().map(Cow::Borrowed)
}

/// A number that is a whole one and not negative; `25.0` is 25.
#[inline]
pub fn whole_number(value: &[u8]) -> Option<u64> {
    if !value.first()?.is_ascii_digit() {
        return None;
    }
    if value.len() <= PLAIN_DIGITS && value.iter().all(u8::is_ascii_digit) {
        return Some(value.iter().fold(0, |number, digit| number * 10 + u64::from(digit - b'0')));
    }
    unusual_number(value)
}

fn unusual_number(value: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(value).ok()?;
    text.parse().ok().or_else(|| {
        let number: f64 = text.parse().ok()?;
        let whole = number.fract() == 0.0 && (0.0..=9_007_199_254_740_992.0).contains(&number);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "whole and in range")]
        whole.then_some(number as u64)
    })
}

/// The members of the object that `text` is, in order. Duplicates are reported as often as they occur; the
/// last one is what servers go by.
///
/// # Errors
/// When `text` is not one JSON object with nothing but white space around it.
pub fn members(text: &[u8], mut visit: impl FnMut(Member)) -> Result<(), JsonError> {
    Walk { text, at: 0, watcher: () }.object(&mut visit)
}

/// The members of an object from the one whose key begins at `from` to the end of the text. That this is a
/// member of the outermost object shows at the end: if it is not, the text goes on behind its object.
///
/// # Errors
/// When no member of the outermost object begins there, as far as that can be told without a look at what
/// comes before.
pub fn last_members(text: &[u8], from: usize, visit: &mut Visit<'_>) -> Result<(), JsonError> {
    let before = text[..from].trim_ascii_end().last();
    if !matches!(before, Some(b',' | b'{')) {
        return Err(JsonError { at: from, what: "expected a key" });
    }
    let mut cursor = Cursor { text, at: from, watcher: () };
    cursor.visit_members(visit)?;
    cursor.end()
}

/// Reads nested objects in one walk, where [`members`] would skip a value before somebody walks it again.
pub type Cursor<'a> = Walk<'a, ()>;

/// Is given the name of a member, with the cursor at its value, and must move the cursor behind it.
pub type Visit<'v> = dyn FnMut(&mut Cursor<'_>, &[u8]) -> Result<(), JsonError> + 'v;

impl<'a> Walk<'a, ()> {
    /// At the beginning of a value.
    pub fn new(text: &'a [u8]) -> Self {
        Self { text, at: 0, watcher: () }
    }

    /// Visits the members of the object that begins here. Something else than an object has none.
    pub fn visit(&mut self, visit: &mut Visit<'_>) -> Result<(), JsonError> {
        if self.peek() != Some(b'{') {
            return self.value();
        }
        self.at += 1;
        self.space();
        if self.peek() == Some(b'}') {
            self.at += 1;
            return Ok(());
        }
        self.visit_members(visit)
    }

    fn visit_members(&mut self, visit: &mut Visit<'_>) -> Result<(), JsonError> {
        loop {
            let (key, is_escaped) = self.key()?;
            self.colon()?;
            if is_escaped {
                let member = Member { value: self.at..self.at, key, is_escaped };
                visit(self, &member.name(self.text))?;
            } else {
                visit(self, &self.text[key.start + 1..key.end - 1])?;
            }
            if self.is_last()? {
                return Ok(());
            }
        }
    }

    /// Skips the value that begins here, and returns it.
    pub fn skip(&mut self) -> Result<&'a [u8], JsonError> {
        let start = self.at;
        self.value()?;
        Ok(&self.text[start..self.at])
    }

    /// As [`whole_number`], of the value that begins here.
    pub fn whole_number(&mut self) -> Result<Option<u64>, JsonError> {
        let digits = self.text[self.at..].iter().take(PLAIN_DIGITS).take_while(|byte| byte.is_ascii_digit());
        let (number, length) = digits
            .fold((0, 0), |(number, length), digit| (number * 10 + u64::from(digit - b'0'), length + 1));
        // Nearly all are short and plain; the rest is for those who know more of numbers.
        if length > 0 && matches!(self.text.get(self.at + length), Some(b',' | b'}')) {
            let is_plain = length == 1 || self.text[self.at] != b'0';
            if is_plain {
                self.at += length;
                return Ok(Some(number));
            }
        }
        self.skip().map(whole_number)
    }

    pub fn is_at_object(&self) -> bool {
        self.peek() == Some(b'{')
    }
}

/// As [`members`], showing every string value and every string inside nested values to `watcher`.
pub fn members_watched(
    text: &[u8],
    watcher: &mut impl Watcher,
    mut visit: impl FnMut(Member),
) -> Result<(), JsonError> {
    Walk { text, at: 0, watcher }.object(&mut visit)
}

/// The value of the last member with that name.
pub fn member<'a>(text: &'a [u8], name: &str) -> Option<&'a [u8]> {
    let mut found = None;
    members(text, |member| {
        if *member.name(text) == *name.as_bytes() {
            found = Some(member.value.clone());
        }
    })
    .ok()?;
    found.map(|range| &text[range])
}

/// Whether an array or object has anything in it but white space.
pub fn value_has_items(value: &[u8]) -> bool {
    value.len() > 2 && !value[1..value.len() - 1].trim_ascii().is_empty()
}

/// End of the value that starts at the beginning of `text`; bytes after it are not looked at.
pub fn value_end(text: &[u8]) -> Option<usize> {
    let mut walk = Cursor::new(text);
    walk.value().ok()?;
    Some(walk.at)
}

/// Shows every string (key or value) of a value to `watcher`.
pub fn watch_strings(value: &[u8], watcher: &mut impl Watcher) -> Result<(), JsonError> {
    Walk { text: value, at: 0, watcher }.value()
}

/// Looks at the strings inside values as they are skipped.
pub trait Watcher {
    /// The value of this top-level member comes next.
    fn member(&mut self, _name: &[u8]) {}

    /// A string, without its quotes, as it is written; a key if it is one of a nested object.
    fn string(&mut self, raw: &[u8], is_key: bool);
}

impl Watcher for () {
    #[inline]
    fn string(&mut self, _raw: &[u8], _is_key: bool) {}
}

impl<W: Watcher> Watcher for &mut W {
    #[inline]
    fn member(&mut self, name: &[u8]) {
        (**self).member(name);
    }

    #[inline]
    fn string(&mut self, raw: &[u8], is_key: bool) {
        (**self).string(raw, is_key);
    }
}

/// A place in a text. What it passes over is shown to `watcher`.
#[derive(Debug)]
pub struct Walk<'a, W> {
    text: &'a [u8],
    at: usize,
    watcher: W,
}

impl<W: Watcher> Walk<'_, W> {
    fn object(&mut self, visit: &mut impl FnMut(Member)) -> Result<(), JsonError> {
        self.space();
        self.expect(b'{', "expected an object")?;
        self.space();
        if self.peek() == Some(b'}') {
            self.at += 1;
            return self.end();
        }
        loop {
            let (key, is_escaped) = self.key()?;
            self.colon()?;
            self.watcher.member(&self.text[key.start + 1..key.end - 1]);
            let start = self.at;
            self.value()?;
            visit(Member { key, value: start..self.at, is_escaped });
            if self.is_last()? {
                return self.end();
            }
        }
    }

    #[inline]
    fn colon(&mut self) -> Result<(), JsonError> {
        self.space();
        self.expect(b':', "expected `:`")?;
        self.space();
        Ok(())
    }

    /// Goes on behind a member's value: to the next key, or behind the object if there is none.
    #[inline]
    fn is_last(&mut self) -> Result<bool, JsonError> {
        self.space();
        let is_last = match self.peek() {
            Some(b',') => false,
            Some(b'}') => true,
            _ => return Err(self.error("expected `,` or `}`")),
        };
        self.at += 1;
        if !is_last {
            self.space();
        }
        Ok(is_last)
    }

    /// A key with its quotes, and whether it has escapes.
    fn key(&mut self) -> Result<(Range<usize>, bool), JsonError> {
        if self.peek() != Some(b'"') {
            return Err(self.error("expected a key"));
        }
        let start = self.at;
        if let Some(length) = plain_string(&self.text[start + 1..]) {
            self.at = start + length + 2;
            return Ok((start..self.at, false));
        }
        let raw = self.string()?;
        let key = start..raw.end + 1;
        match string(&self.text[key.clone()]) {
            Some(_) => Ok((key, memchr(b'\\', &self.text[raw]).is_some())),
            None => Err(JsonError { at: start, what: "invalid key" }),
        }
    }

    fn value(&mut self) -> Result<(), JsonError> {
        match self.peek() {
            Some(b'"') => {
                let raw = self.string()?;
                self.watcher.string(&self.text[raw], false);
                Ok(())
            }
            Some(b'{' | b'[') => self.nested(),
            Some(b't') => self.literal(b"true"),
            Some(b'f') => self.literal(b"false"),
            Some(b'n') => self.literal(b"null"),
            Some(b'-' | b'0'..=b'9') => self.number(),
            _ => Err(self.error("expected a value")),
        }
    }

    fn literal(&mut self, word: &'static [u8]) -> Result<(), JsonError> {
        if !self.text[self.at..].starts_with(word) {
            return Err(self.error("expected a value"));
        }
        self.at += word.len();
        Ok(())
    }

    fn number(&mut self) -> Result<(), JsonError> {
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        if self.peek() == Some(b'0') {
            self.at += 1;
        } else {
            self.digits()?;
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digits()?;
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            self.at += 1;
            if matches!(self.peek(), Some(b'+' | b'-')) {
                self.at += 1;
            }
            self.digits()?;
        }
        Ok(())
    }

    fn digits(&mut self) -> Result<(), JsonError> {
        let digits = self.text[self.at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        if digits == 0 {
            return Err(self.error("expected a digit"));
        }
        self.at += digits;
        Ok(())
    }

    /// Skips an object or array; brackets and strings are matched, what stands between them is not looked at.
    fn nested(&mut self) -> Result<(), JsonError> {
        let mut depth = 0_u32;
        let mut objects = 0_u128;
        let mut plain = 0_u32;
        loop {
            let Some(byte) = self.peek() else { return Err(self.error("unexpected end")) };
            match byte {
                b'"' => {
                    let raw = self.string()?;
                    self.space();
                    self.watcher.string(&self.text[raw], self.peek() == Some(b':'));
                    continue;
                }
                b'{' | b'[' => {
                    if depth < CHECKED_DEPTH {
                        objects = objects << 1 | u128::from(byte == b'{');
                    }
                    depth += 1;
                }
                b'}' | b']' => {
                    depth -= 1;
                    if depth < CHECKED_DEPTH {
                        if (objects & 1 == 1) != (byte == b'}') {
                            return Err(self.error("mismatched bracket"));
                        }
                        objects >>= 1;
                    }
                    if depth == 0 {
                        self.at += 1;
                        return Ok(());
                    }
                }
                _ => {
                    plain += 1;
                    if plain == LONG_PLAIN {
                        self.plain();
                        plain = 0;
                        continue;
                    }
                }
            }
            self.at += 1;
        }
    }

    /// Skips blocks of 16 bytes which have neither quote nor bracket: long arrays of numbers.
    fn plain(&mut self) {
        while let Some(block) = self.text[self.at..].first_chunk::<16>() {
            // `|0x26` maps the four brackets, and a few letters, to 0x7f.
            let stops = |byte: &u8| u8::from(*byte == b'"') | u8::from(*byte | 0x26 == 0x7f);
            if block.iter().fold(0, |stop, byte| stop | stops(byte)) != 0 {
                return;
            }
            self.at += 16;
        }
    }

    /// Crosses a string and returns its inside.
    #[inline]
    fn string(&mut self) -> Result<Range<usize>, JsonError> {
        let start = self.at + 1;
        let Some(length) = end_of_string(&self.text[start..]) else {
            return Err(self.error("unterminated string"));
        };
        self.at = start + length + 1;
        Ok(start..start + length)
    }

    #[inline]
    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    #[inline]
    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn expect(&mut self, byte: u8, what: &'static str) -> Result<(), JsonError> {
        if self.peek() != Some(byte) {
            return Err(self.error(what));
        }
        self.at += 1;
        Ok(())
    }

    fn end(&mut self) -> Result<(), JsonError> {
        self.space();
        if self.at == self.text.len() { Ok(()) } else { Err(self.error("unexpected text after the object")) }
    }

    fn error(&self, what: &'static str) -> JsonError {
        JsonError { at: self.at, what }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn names_and_values(text: &str) -> Result<Vec<(String, Value)>, JsonError> {
        let mut found = Vec::new();
        members(text.as_bytes(), |member| {
            let name = String::from_utf8(member.name(text.as_bytes()).into_owned()).unwrap();
            found.push((name, serde_json::from_slice(member.value(text.as_bytes())).unwrap()));
        })?;
        Ok(found)
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<i32>().prop_map(|number| Value::from(f64::from(number) / 8.0)),
            r#"[a"\\\[\]{}:,\u{0}\n é漢🎉]{0,12}"#.prop_map(Value::from),
        ];
        leaf.prop_recursive(5, 64, 6, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                proptest::collection::btree_map(r#"[a"\\{}é]{0,6}"#, inner, 0..6)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn every_valid_object_is_walked_as_serde_reads_it(
            value in proptest::collection::btree_map(r#"[a"\\{}é]{0,6}"#, any_json(), 0..8),
            pretty in any::<bool>(),
        ) {
            let text = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) };
            let walked = names_and_values(&text.unwrap()).unwrap();
            prop_assert_eq!(walked, value.into_iter().collect::<Vec<_>>());
        }

        #[test]
        fn what_serde_refuses_at_top_level_is_refused(text in r#"[\[\]{}",:a1 .\-tn]{0,16}"#) {
            let theirs = serde_json::from_str::<std::collections::BTreeMap<String, &serde_json::value::RawValue>>(&text);
            let ours = members(text.as_bytes(), |_| {});
            if theirs.is_ok() {
                prop_assert!(ours.is_ok(), "{}", text);
            }
            if ours.is_ok() && !text.contains(['[']) && text.matches('{').count() == 1 {
                prop_assert!(theirs.is_ok(), "{}", text);
            }
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ignored = members(&bytes, |_| {});
            let _ignored = value_end(&bytes);
        }
    }

    #[test]
    fn nesting_deeper_than_kinds_are_checked_is_still_walked() {
        let text = format!("{{\"a\":{}{},\"b\":1}}", "[".repeat(1000), "]".repeat(1000));
        assert_eq!(member(text.as_bytes(), "b"), Some(&b"1"[..]));
    }

    #[test]
    fn the_last_of_duplicates_counts_and_escaped_keys_are_the_same_key() {
        assert_eq!(member(br#"{"model":"a","mod\u0065l":"b"}"#, "model"), Some(&br#""b""#[..]));
    }

    #[test]
    fn what_is_not_one_object_is_refused() {
        for text in [
            "",
            " ",
            "[]",
            "{",
            "{}x",
            "{\"a\"}",
            "{\"a\":}",
            "{\"a\":1,}",
            "{a:1}",
            "{\"a\":01}",
            "{\"a\":1 \"b\":2}",
            "{\"a\":[}",
            "{\"a\":[}]}",
            "{\"a\":nul}",
            "{\"a\":\"x}",
            "\"a\"",
            "{\"a\":-}",
            "{\"a\":1.}",
            "{\"a\":1e}",
            "{\"\\x\":1}",
        ] {
            assert!(members(text.as_bytes(), |_| {}).is_err(), "{text}");
        }
    }

    #[test]
    fn whole_numbers_are_read_however_they_are_written() {
        for (text, number) in [
            ("25", Some(25)),
            ("25.0", Some(25)),
            ("2e3", Some(2000)),
            ("-1", None),
            ("2.5", None),
            ("\"3\"", None),
        ] {
            assert_eq!(whole_number(text.as_bytes()), number, "{text}");
        }
    }
}
