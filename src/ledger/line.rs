//! One row as one line of the journal, written by hand because every call pays for it.
//!
//! A line is `RS kind field TAB field .. TAB checksum LF`. The record separator (0x1E) opens a line and occurs
//! nowhere else, as in JSON text sequences (RFC 7464, section 2): when a write is cut short, what follows it on
//! the same line is found again at the next separator. The checksum catches everything else.
//!
//! The numbers of a call stand in the order of [`CALL_NUMBERS`] and its names in that of [`LABELS`], which are
//! also the columns of the tables, so the importer binds them without knowing what they mean.

use std::borrow::Cow;

use super::{Entry, Event, RentEntry};
use crate::economics::{NanoUsd, Timestamp, Work};

const SEPARATOR: u8 = 0x1E;

/// Longest text field of a line, in bytes; a longer one is cut. A call has eleven, so a line stays below 16 KiB
/// even when every byte is escaped.
pub(super) const MAX_TEXT: usize = 640;

/// Columns of `calls` that hold numbers, in the order of the line. Amounts are nano-dollars, times are
/// milliseconds since the Unix epoch.
pub(super) const CALL_NUMBERS: [&str; 23] = [
    "opened_at",
    "closed_at",
    "first_token_at",
    "attempts",
    "status",
    "outcome",
    "stream",
    "usage_source",
    "input_tokens",
    "cached_input_tokens",
    "cache_write_tokens",
    "audio_input_tokens",
    "image_input_tokens",
    "output_tokens",
    "reasoning_tokens",
    "audio_output_tokens",
    "image_output_tokens",
    "cost",
    "api_cost",
    "self_hosted_cost",
    "work",
    "attempts_cost",
    "unpriced",
];

/// Columns of `labels`: the names that many calls share.
pub(super) const LABELS: [&str; 10] = [
    "key",
    "team",
    "endpoint",
    "route",
    "requested_model",
    "served_model",
    "backend",
    "reason",
    "tier",
    "config_digest",
];

/// A call as it stands in the journal. `labels` are the raw bytes of all names together, which is what the
/// importer looks up.
#[derive(Debug, PartialEq)]
pub(super) struct CallLine<'a> {
    pub(super) id: [u8; 16],
    pub(super) numbers: [Option<i64>; CALL_NUMBERS.len()],
    pub(super) tags: Cow<'a, str>,
    pub(super) labels: &'a [u8],
}

#[derive(Debug, PartialEq)]
#[expect(
    clippy::large_enum_variant,
    reason = "nearly all are calls, and a box would cost each an allocation"
)]
pub(super) enum Record<'a> {
    Call(CallLine<'a>),
    Rent(RentEntry),
    Event(Event),
}

pub(super) fn write_call(line: &mut Vec<u8>, entry: &Entry) {
    let start = open(line, b'c');
    let mut id = [0; uuid::fmt::Simple::LENGTH];
    line.extend_from_slice(entry.id.as_simple().encode_lower(&mut id).as_bytes());
    let usage = &entry.usage;
    unsigned(line, entry.opened_at.as_millis());
    unsigned(line, entry.closed_at.as_millis());
    optional(line, entry.first_token_at.map(Timestamp::as_millis), unsigned);
    unsigned(line, entry.attempts.into());
    unsigned(line, entry.status.into());
    unsigned(line, entry.outcome as u64);
    unsigned(line, entry.stream.into());
    unsigned(line, entry.usage_source as u64);
    unsigned(line, usage.input_tokens);
    unsigned(line, usage.cached_input_tokens);
    unsigned(line, usage.cache_write_tokens);
    unsigned(line, usage.audio_input_tokens);
    unsigned(line, usage.image_input_tokens);
    unsigned(line, usage.output_tokens);
    unsigned(line, usage.reasoning_tokens);
    unsigned(line, usage.audio_output_tokens);
    unsigned(line, usage.image_output_tokens);
    amount(line, entry.cost);
    optional(line, entry.api_cost, amount);
    optional(line, entry.self_hosted_cost, amount);
    unsigned(line, entry.work.0);
    amount(line, entry.attempts_cost);
    unsigned(line, entry.unpriced.into());
    text(line, &entry.tags);
    for label in [
        &entry.key,
        &entry.team,
        &entry.endpoint,
        &entry.route,
        &entry.requested_model,
        &entry.served_model,
        &entry.backend,
        &entry.reason,
        &entry.tier,
        &entry.config_digest,
    ] {
        text(line, label);
    }
    close(line, start);
}

pub(super) fn write_rent(line: &mut Vec<u8>, rent: &RentEntry) {
    let start = open(line, b'r');
    text(line, &rent.backend);
    unsigned(line, rent.from.as_millis());
    unsigned(line, rent.to.as_millis());
    unsigned(line, rent.replica_millis);
    unsigned(line, rent.busy.0);
    amount(line, rent.rent);
    amount(line, rent.attributed);
    amount(line, rent.idle);
    close(line, start);
}

pub(super) fn write_event(line: &mut Vec<u8>, event: &Event) {
    let start = open(line, b'e');
    unsigned(line, event.at.as_millis());
    text(line, &event.kind);
    text(line, &event.subject);
    text(line, &event.detail);
    close(line, start);
}

fn open(line: &mut Vec<u8>, kind: u8) -> usize {
    line.extend_from_slice(&[SEPARATOR, kind]);
    line.len() - 1
}

fn close(line: &mut Vec<u8>, start: usize) {
    let sum = checksum(&line[start..]);
    unsigned(line, sum.into());
    line.push(b'\n');
}

/// SQLite keeps signed 64-bit integers, so a count beyond that is cut here.
fn unsigned(line: &mut Vec<u8>, value: u64) {
    line.push(b'\t');
    digits(line, value.min(i64::MAX.unsigned_abs()));
}

fn amount(line: &mut Vec<u8>, amount: NanoUsd) {
    line.push(b'\t');
    if amount < NanoUsd::ZERO {
        line.push(b'-');
    }
    digits(line, amount.as_nanos().unsigned_abs());
}

/// An absent value is an empty field.
fn optional<T>(line: &mut Vec<u8>, value: Option<T>, write: fn(&mut Vec<u8>, T)) {
    match value {
        Some(value) => write(line, value),
        None => line.push(b'\t'),
    }
}

fn digits(line: &mut Vec<u8>, mut value: u64) {
    let mut text = [b'0'; 20];
    let mut at = text.len() - 1;
    while value > 9 {
        text[at] += u8::try_from(value % 10).expect("a digit is below ten");
        value /= 10;
        at -= 1;
    }
    text[at] += u8::try_from(value).expect("a digit is below ten");
    line.extend_from_slice(&text[at..]);
}

fn text(line: &mut Vec<u8>, value: &str) {
    line.push(b'\t');
    let value = &value[..value.floor_char_boundary(MAX_TEXT)];
    // Counts instead of stopping at the first, so that it compiles to vector instructions.
    let special = |byte: u8| usize::from(byte < b' ') + usize::from(byte == b'\\');
    if value.bytes().map(special).sum::<usize>() == 0 {
        line.extend_from_slice(value.as_bytes());
    } else {
        escape(line, value);
    }
}

fn escape(line: &mut Vec<u8>, value: &str) {
    for byte in value.bytes() {
        match byte {
            b'\t' => line.extend_from_slice(b"\\t"),
            b'\n' => line.extend_from_slice(b"\\n"),
            SEPARATOR => line.extend_from_slice(b"\\e"),
            b'\\' => line.extend_from_slice(b"\\\\"),
            other => line.push(other),
        }
    }
}

/// Multiply and fold over eight bytes at a time: enough to notice an accident, not an attacker.
fn checksum(bytes: &[u8]) -> u32 {
    const ODD: u64 = 0x9E37_79B9_7F4A_7C15;
    let mix = |sum: u64, word: u64| {
        let product = (sum ^ word).wrapping_mul(ODD);
        product ^ (product >> 32)
    };
    let (words, rest) = bytes.as_chunks::<8>();
    let mut sum = words.iter().fold(bytes.len() as u64, |sum, word| mix(sum, u64::from_le_bytes(*word)));
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    sum = mix(sum, u64::from_le_bytes(last));
    u32::try_from(mix(sum, 0) >> 32).expect("half of 64 bits")
}

/// What came out of a piece of the journal between two line feeds.
#[derive(Debug, PartialEq)]
pub(super) struct Parsed<'a> {
    pub(super) record: Option<Record<'a>>,
    /// Something stood there that is not a whole record.
    pub(super) torn: bool,
}

/// Reads one line, without its line feed. What stands before its last separator is what a cut write left.
pub(super) fn parse(line: &[u8]) -> Parsed<'_> {
    let Some(at) = memchr::memrchr(SEPARATOR, line) else {
        return Parsed { record: None, torn: !line.is_empty() };
    };
    let record = parse_body(&line[at + 1..]);
    Parsed { torn: at > 0 || record.is_none(), record }
}

fn parse_body(body: &[u8]) -> Option<Record<'_>> {
    let end = memchr::memrchr(b'\t', body)?;
    if integer(&body[end + 1..])? != i64::from(checksum(&body[..end])) {
        return None;
    }
    let (kind, fields) = body[..end].split_first()?;
    match kind {
        b'c' => parse_call(fields).map(Record::Call),
        b'r' => parse_rent(&mut Fields(fields)).map(Record::Rent),
        b'e' => parse_event(&mut Fields(fields)).map(Record::Event),
        _ => None,
    }
}

fn parse_call(fields: &[u8]) -> Option<CallLine<'_>> {
    let (id, rest) = fields.split_at_checked(uuid::fmt::Simple::LENGTH)?;
    let id = uuid::Uuid::try_parse_ascii(id).ok()?.into_bytes();
    let mut fields = Fields(rest);
    let mut numbers = [None; CALL_NUMBERS.len()];
    for number in &mut numbers {
        *number = match fields.next()? {
            b"" => None,
            digits => Some(integer(digits)?),
        };
    }
    let tags = unescape(fields.next()?)?;
    Some(CallLine { id, numbers, tags, labels: fields.0 })
}

fn parse_rent(fields: &mut Fields<'_>) -> Option<RentEntry> {
    Some(RentEntry {
        backend: fields.text()?,
        from: fields.time()?,
        to: fields.time()?,
        replica_millis: fields.count()?,
        busy: Work(fields.count()?),
        rent: fields.amount()?,
        attributed: fields.amount()?,
        idle: fields.amount()?,
    })
}

fn parse_event(fields: &mut Fields<'_>) -> Option<Event> {
    Some(Event { at: fields.time()?, kind: fields.text()?, subject: fields.text()?, detail: fields.text()? })
}

/// The names of a call, from its raw bytes.
pub(super) fn parse_labels(raw: &[u8]) -> Option<[Cow<'_, str>; LABELS.len()]> {
    let mut fields = Fields(raw);
    let mut labels = [const { Cow::Borrowed("") }; LABELS.len()];
    for label in &mut labels {
        *label = unescape(fields.next()?)?;
    }
    Some(labels)
}

/// What is left of a line; every field is preceded by a tab.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn next(&mut self) -> Option<&'a [u8]> {
        let rest = self.0.strip_prefix(b"\t")?;
        let end = memchr::memchr(b'\t', rest).unwrap_or(rest.len());
        self.0 = &rest[end..];
        Some(&rest[..end])
    }

    fn text(&mut self) -> Option<String> {
        unescape(self.next()?).map(Cow::into_owned)
    }

    fn count(&mut self) -> Option<u64> {
        integer(self.next()?)?.try_into().ok()
    }

    fn time(&mut self) -> Option<Timestamp> {
        self.count().map(Timestamp::from_millis)
    }

    fn amount(&mut self) -> Option<NanoUsd> {
        integer(self.next()?).map(NanoUsd::from_nanos)
    }
}

fn integer(digits: &[u8]) -> Option<i64> {
    let (negative, digits) = match digits {
        [b'-', rest @ ..] => (true, rest),
        _ => (false, digits),
    };
    if digits.is_empty() {
        return None;
    }
    // Counts down, because the least integer has no positive counterpart.
    let value = digits.iter().try_fold(0_i64, |value, byte| {
        let digit = byte.wrapping_sub(b'0');
        (digit < 10).then(|| value.checked_mul(10)?.checked_sub(digit.into())).flatten()
    })?;
    if negative { Some(value) } else { value.checked_neg() }
}

fn unescape(field: &[u8]) -> Option<Cow<'_, str>> {
    let field = std::str::from_utf8(field).ok()?;
    if !field.contains('\\') {
        return Some(Cow::Borrowed(field));
    }
    let mut plain = String::with_capacity(field.len());
    let mut characters = field.chars();
    while let Some(character) = characters.next() {
        plain.push(match character {
            '\\' => match characters.next()? {
                't' => '\t',
                'n' => '\n',
                'e' => char::from(SEPARATOR),
                other => other,
            },
            other => other,
        });
    }
    Some(Cow::Owned(plain))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ledger::testing::entry;

    fn call(entry: &Entry) -> Vec<u8> {
        let mut line = Vec::new();
        write_call(&mut line, entry);
        line
    }

    fn read(line: &[u8]) -> CallLine<'_> {
        match parse(line.strip_suffix(b"\n").unwrap()) {
            Parsed { record: Some(Record::Call(call)), torn: false } => call,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_call_comes_back_with_every_number_and_name() {
        let written = entry(7);
        let line = call(&written);
        let back = read(&line);
        assert_eq!(back.id, written.id.into_bytes());
        let column = |name| back.numbers[CALL_NUMBERS.iter().position(|column| *column == name).unwrap()];
        assert_eq!(column("closed_at"), Some(written.closed_at.as_millis().try_into().unwrap()));
        assert_eq!(column("cost"), Some(written.cost.as_nanos()));
        assert_eq!(column("self_hosted_cost"), None);
        let labels = parse_labels(back.labels).unwrap();
        assert_eq!(labels[LABELS.iter().position(|label| *label == "backend").unwrap()], written.backend);
        assert_eq!(labels[LABELS.len() - 1], written.config_digest);
    }

    #[test]
    fn rent_and_events_come_back_as_they_were() {
        let rent = RentEntry {
            backend: "gpu\t1".into(),
            from: Timestamp::from_secs(60),
            to: Timestamp::from_secs(120),
            replica_millis: 60_000,
            busy: Work(5),
            rent: NanoUsd::from_nanos(i64::MAX),
            attributed: NanoUsd::from_nanos(3),
            idle: NanoUsd::from_nanos(i64::MIN),
        };
        let event = Event {
            at: Timestamp::from_secs(1),
            kind: "preference".into(),
            subject: "gpu".into(),
            detail: "two\nlines, \\ and \u{1e}".into(),
        };
        let (mut first, mut second) = (Vec::new(), Vec::new());
        write_rent(&mut first, &rent);
        write_event(&mut second, &event);
        assert_eq!(parse(&first[..first.len() - 1]).record, Some(Record::Rent(rent)));
        assert_eq!(parse(&second[..second.len() - 1]).record, Some(Record::Event(event)));
    }

    #[test]
    fn no_part_of_a_line_passes_for_a_whole_one() {
        let line = call(&entry(1));
        for cut in 0..line.len() - 1 {
            assert_eq!(parse(&line[..cut]).record, None, "cut at {cut}");
        }
    }

    #[test]
    fn a_line_that_follows_a_torn_one_is_found() {
        let (torn, whole) = (call(&entry(1)), call(&entry(2)));
        let mut together = torn[..torn.len() / 2].to_vec();
        together.extend_from_slice(&whole[..whole.len() - 1]);
        let parsed = parse(&together);
        assert!(parsed.torn);
        assert!(matches!(parsed.record, Some(Record::Call(call)) if call.id == entry(2).id.into_bytes()));
    }

    #[test]
    fn a_flipped_bit_is_noticed() {
        let line = call(&entry(1));
        for at in 0..line.len() - 1 {
            let mut damaged = line[..line.len() - 1].to_vec();
            damaged[at] ^= 1;
            let parsed = parse(&damaged);
            assert!(parsed.torn && parsed.record.is_none(), "byte {at}");
        }
    }

    #[test]
    fn a_long_name_is_cut_and_the_rest_survives() {
        let mut long = entry(1);
        long.requested_model = "é".repeat(5000);
        let line = call(&long);
        let labels = parse_labels(read(&line).labels).unwrap().map(Cow::into_owned);
        assert_eq!(labels[4].len(), MAX_TEXT);
        assert_eq!(labels[6], long.backend);
    }

    proptest! {
        #[test]
        fn any_text_and_amount_survive(tags in ".{0,100}", model in any::<String>(), cost in any::<i64>()) {
            let mut written = entry(3);
            written.tags.clone_from(&tags);
            written.requested_model.clone_from(&model);
            written.cost = NanoUsd::from_nanos(cost);
            let line = call(&written);
            prop_assert_eq!(memchr::memchr_iter(b'\n', &line).count(), 1);
            let back = read(&line);
            prop_assert_eq!(back.numbers[17], Some(cost));
            prop_assert_eq!(&back.tags, &tags[..tags.floor_char_boundary(MAX_TEXT)]);
            let labels = parse_labels(back.labels).unwrap();
            prop_assert_eq!(&labels[4], &model[..model.floor_char_boundary(MAX_TEXT)]);
        }
    }
}
