//! One row as one record of the journal: small, and made without a search, because every call pays for it.
//!
//! ```text
//! magic 2 | length of the body 2 | checksum 4 | body
//! body = kind 1, then numbers (8 bytes, little-endian) and texts (length 2, UTF-8) in a fixed order
//! ```
//! Most numbers of a call are zero or not there: two masks of four bytes say which, and only the others follow.
//!
//! When a write is cut short, the record after it is found again at the next magic whose checksum holds. The magic
//! is not valid UTF-8, so that no text of a client can contain it, let alone a record; where numbers happen to
//! look like it, the checksum does not hold.
//!
//! The numbers of a call stand in the order of [`CALL_NUMBERS`] and its names in that of [`LABELS`], which are
//! also the columns of the tables, so the importer binds them without knowing what they mean.

use super::{Entry, Event, RentEntry};
use crate::economics::{NanoUsd, Timestamp, Work};

const MAGIC: [u8; 2] = [0x1E, 0xB5];

/// Magic, length and checksum.
const HEAD: usize = 8;

/// Longest record: its length has 16 bits.
pub(super) const MAX_RECORD: usize = HEAD + u16::MAX as usize;

/// Longest text of a record, in bytes; a longer one is cut. A call has eleven, so a record stays below 8 KiB.
pub(super) const MAX_TEXT: usize = 640;

/// Stands for a number that is not there. An amount as low as that is one higher.
pub(super) const ABSENT: i64 = i64::MIN;

const ID_BYTES: usize = 16;
const MASK_BYTES: usize = 4;

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

/// Place of `closed_at` among the numbers.
const CLOSED_AT: usize = 1;

/// The numbers of a call, in the order of [`CALL_NUMBERS`].
pub(super) type Numbers = [i64; CALL_NUMBERS.len()];

const _: () = assert!(CALL_NUMBERS.len() <= u32::BITS as usize, "a mask has a bit for each number");

/// A call as it stands in the journal. `labels` are the raw bytes of all names together, which is what the
/// importer looks up.
#[derive(Debug, PartialEq)]
pub(super) struct CallRecord<'a> {
    pub(super) id: &'a [u8; ID_BYTES],
    pub(super) numbers: Numbers,
    pub(super) tags: &'a str,
    pub(super) labels: &'a [u8],
}

impl CallRecord<'_> {
    /// When the call ended, in milliseconds since the Unix epoch.
    pub(super) const fn closed_at(&self) -> i64 {
        self.numbers[CLOSED_AT]
    }
}

#[derive(Debug, PartialEq)]
pub(super) enum Record<'a> {
    Call(CallRecord<'a>),
    Rent(RentEntry),
    Event(Event),
}

pub(super) fn write_call(record: &mut Vec<u8>, entry: &Entry<'_>) {
    let start = open(record, b'c');
    record.extend_from_slice(entry.id.as_bytes());
    let usage = &entry.usage;
    let numbers: Numbers = [
        unsigned(entry.opened_at.as_millis()),
        unsigned(entry.closed_at.as_millis()),
        entry.first_token_at.map_or(ABSENT, |at| unsigned(at.as_millis())),
        entry.attempts.into(),
        entry.status.into(),
        entry.outcome as i64,
        entry.stream.into(),
        entry.usage_source as i64,
        unsigned(usage.input_tokens),
        unsigned(usage.cached_input_tokens),
        unsigned(usage.cache_write_tokens),
        unsigned(usage.audio_input_tokens),
        unsigned(usage.image_input_tokens),
        unsigned(usage.output_tokens),
        unsigned(usage.reasoning_tokens),
        unsigned(usage.audio_output_tokens),
        unsigned(usage.image_output_tokens),
        amount(entry.cost),
        entry.api_cost.map_or(ABSENT, amount),
        entry.self_hosted_cost.map_or(ABSENT, amount),
        unsigned(entry.work.0),
        amount(entry.attempts_cost),
        entry.unpriced.into(),
    ];
    write_numbers(record, &numbers);
    text(record, &entry.tags);
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
        text(record, label);
    }
    close(record, start);
}

fn write_numbers(record: &mut Vec<u8>, numbers: &Numbers) {
    let (mut present, mut absent) = (0_u32, 0_u32);
    let masks = record.len();
    record.extend_from_slice(&[0; 2 * MASK_BYTES]);
    for (index, number) in numbers.iter().enumerate() {
        match *number {
            0 => {}
            ABSENT => absent |= 1 << index,
            number => {
                present |= 1 << index;
                record.extend_from_slice(&number.to_le_bytes());
            }
        }
    }
    record[masks..masks + MASK_BYTES].copy_from_slice(&present.to_le_bytes());
    record[masks + MASK_BYTES..masks + 2 * MASK_BYTES].copy_from_slice(&absent.to_le_bytes());
}

pub(super) fn write_rent(record: &mut Vec<u8>, rent: &RentEntry) {
    let start = open(record, b'r');
    text(record, &rent.backend);
    for number in [
        unsigned(rent.from.as_millis()),
        unsigned(rent.to.as_millis()),
        unsigned(rent.replica_millis),
        unsigned(rent.busy.0),
        rent.rent.as_nanos(),
        rent.attributed.as_nanos(),
        rent.idle.as_nanos(),
    ] {
        record.extend_from_slice(&number.to_le_bytes());
    }
    close(record, start);
}

pub(super) fn write_event(record: &mut Vec<u8>, event: &Event) {
    let start = open(record, b'e');
    record.extend_from_slice(&unsigned(event.at.as_millis()).to_le_bytes());
    text(record, &event.kind);
    text(record, &event.subject);
    text(record, &event.detail);
    close(record, start);
}

/// Begins a record whose length and checksum are not known yet; where its body begins.
fn open(record: &mut Vec<u8>, kind: u8) -> usize {
    record.extend_from_slice(&MAGIC);
    record.extend_from_slice(&[0; HEAD - MAGIC.len()]);
    record.push(kind);
    record.len() - 1
}

fn close(record: &mut [u8], start: usize) {
    let (head, body) = record.split_at_mut(start);
    let length = u16::try_from(body.len()).expect("texts are cut, so that a record is short");
    let (length, sum) = (length.to_le_bytes(), checksum(body).to_le_bytes());
    let at = start - HEAD + MAGIC.len();
    head[at..at + length.len()].copy_from_slice(&length);
    head[at + length.len()..].copy_from_slice(&sum);
}

/// SQLite keeps signed 64-bit integers, so a count beyond that is cut here.
fn unsigned(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn amount(amount: NanoUsd) -> i64 {
    amount.as_nanos().max(ABSENT + 1)
}

fn text(record: &mut Vec<u8>, value: &str) {
    let value = if value.len() > MAX_TEXT { &value[..value.floor_char_boundary(MAX_TEXT)] } else { value };
    let length = u16::try_from(value.len()).expect("the text was cut");
    record.extend_from_slice(&length.to_le_bytes());
    record.extend_from_slice(value.as_bytes());
}

/// Multiply and fold over eight bytes at a time: enough to notice an accident, not an attacker.
fn checksum(bytes: &[u8]) -> u32 {
    const ODD: u64 = 0x9E37_79B9_7F4A_7C15;
    let mix = |sum: u64, word: u64| {
        let product = (sum ^ word).wrapping_mul(ODD);
        product ^ (product >> 32)
    };
    let (words, rest) = bytes.as_chunks::<8>();
    // Not zero for nothing, which is what a power cut leaves.
    let seed = ODD ^ bytes.len() as u64;
    let mut sum = words.iter().fold(seed, |sum, word| mix(sum, u64::from_le_bytes(*word)));
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    sum = mix(sum, u64::from_le_bytes(last));
    u32::try_from(mix(sum, 0) >> 32).expect("half of 64 bits")
}

/// The records of a piece of the journal, in order. What is not a record is passed over and counted; a piece
/// that ends within a record ends before it.
#[derive(Debug)]
pub(super) struct Records<'a> {
    piece: &'a [u8],
    at: usize,
    torn: u64,
    /// Whether the first place without a record is the end.
    ends_at_gap: bool,
    ends_in_zeros: bool,
}

/// What stands at a place of the journal.
enum Found<'a> {
    Body(&'a [u8]),
    /// So far it could be the beginning of a record.
    Beginning,
    Nothing,
}

impl<'a> Records<'a> {
    pub(super) const fn new(piece: &'a [u8]) -> Self {
        Self { piece, at: 0, torn: 0, ends_at_gap: false, ends_in_zeros: false }
    }

    /// The same, up to the first place where no record stands: nothing is passed over.
    pub(super) const fn up_to_a_gap(self) -> Self {
        Self { ends_at_gap: true, ..self }
    }

    /// Bytes that were read, up to the end of a record or of what is none.
    pub(super) const fn consumed(&self) -> usize {
        self.at
    }

    /// Places so far where something stands that is not a whole record.
    pub(super) const fn torn(&self) -> u64 {
        self.torn
    }

    /// Whether the piece ends in zeros behind its last record, which were read and not counted as torn.
    pub(super) const fn ends_in_zeros(&self) -> bool {
        self.ends_in_zeros
    }

    /// Where the next whole record is from `start` on, and its body.
    fn search(&self, start: usize) -> Option<(usize, &'a [u8])> {
        memchr::memmem::find_iter(&self.piece[start..], &MAGIC).map(|at| start + at).find_map(
            |at| match find(&self.piece[at..]) {
                Found::Body(body) => Some((at, body)),
                Found::Beginning | Found::Nothing => None,
            },
        )
    }

    /// The next body, past whatever stands before it.
    fn body(&mut self) -> Option<&'a [u8]> {
        let found = find(&self.piece[self.at..]);
        if let Found::Body(body) = found {
            self.at += HEAD + body.len();
            return Some(body);
        }
        if self.ends_at_gap {
            return None;
        }
        if self.piece[self.at..].iter().all(|byte| *byte == 0) {
            (self.at, self.ends_in_zeros) = (self.piece.len(), true);
            return None;
        }
        if let Some((at, body)) = self.search(self.at + 1) {
            self.torn += 1;
            self.at = at + HEAD + body.len();
            return Some(body);
        }
        if matches!(found, Found::Nothing) {
            self.torn += 1;
            self.at = self.first_beginning(self.at + 1);
        }
        None
    }

    /// The first place from `start` on where a record may begin that ends after the piece.
    fn first_beginning(&self, start: usize) -> usize {
        (start..self.piece.len())
            .find(|at| matches!(find(&self.piece[*at..]), Found::Beginning))
            .unwrap_or(self.piece.len())
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = Record<'a>;

    fn next(&mut self) -> Option<Record<'a>> {
        while self.at < self.piece.len() {
            match parse_body(self.body()?) {
                Some(record) => return Some(record),
                None => self.torn += 1,
            }
        }
        None
    }
}

fn find(bytes: &[u8]) -> Found<'_> {
    let Some((head, rest)) = bytes.split_first_chunk::<HEAD>() else {
        return if bytes.starts_with(&MAGIC[..bytes.len().min(MAGIC.len())]) {
            Found::Beginning
        } else {
            Found::Nothing
        };
    };
    let [first, second, low, high, sum @ ..] = *head;
    if [first, second] != MAGIC {
        return Found::Nothing;
    }
    match rest.split_at_checked(u16::from_le_bytes([low, high]).into()) {
        None => Found::Beginning,
        Some((body, _)) if checksum(body) == u32::from_le_bytes(sum) => Found::Body(body),
        Some(_) => Found::Nothing,
    }
}

fn parse_body(body: &[u8]) -> Option<Record<'_>> {
    let (kind, fields) = body.split_first()?;
    match kind {
        b'c' => parse_call(fields).map(Record::Call),
        b'r' => parse_rent(&mut Fields(fields)).map(Record::Rent),
        b'e' => parse_event(&mut Fields(fields)).map(Record::Event),
        _ => None,
    }
}

fn parse_call(fields: &[u8]) -> Option<CallRecord<'_>> {
    let (id, rest) = fields.split_first_chunk()?;
    let mut fields = Fields(rest);
    let numbers = fields.numbers()?;
    let tags = fields.text()?;
    Some(CallRecord { id, numbers, tags, labels: fields.0 })
}

fn parse_rent(fields: &mut Fields<'_>) -> Option<RentEntry> {
    Some(RentEntry {
        backend: fields.text()?.to_owned(),
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
    Some(Event {
        at: fields.time()?,
        kind: fields.text()?.to_owned(),
        subject: fields.text()?.to_owned(),
        detail: fields.text()?.to_owned(),
    })
}

/// The names of a call, from its raw bytes.
pub(super) fn parse_labels(raw: &[u8]) -> Option<[&str; LABELS.len()]> {
    let mut fields = Fields(raw);
    let mut labels = [""; LABELS.len()];
    for label in &mut labels {
        *label = fields.text()?;
    }
    Some(labels)
}

/// What is left of a body.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn text(&mut self) -> Option<&'a str> {
        let (length, rest) = self.0.split_first_chunk()?;
        let (text, rest) = rest.split_at_checked(u16::from_le_bytes(*length).into())?;
        self.0 = rest;
        std::str::from_utf8(text).ok()
    }

    fn numbers(&mut self) -> Option<Numbers> {
        let (present, absent) = (self.mask()?, self.mask()?);
        let mut numbers = [0; CALL_NUMBERS.len()];
        for (index, number) in numbers.iter_mut().enumerate() {
            if present & (1 << index) != 0 {
                *number = self.number()?;
            } else if absent & (1 << index) != 0 {
                *number = ABSENT;
            }
        }
        Some(numbers)
    }

    fn mask(&mut self) -> Option<u32> {
        let (mask, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_le_bytes(*mask))
    }

    fn number(&mut self) -> Option<i64> {
        let (number, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(i64::from_le_bytes(*number))
    }

    fn count(&mut self) -> Option<u64> {
        self.number()?.try_into().ok()
    }

    fn time(&mut self) -> Option<Timestamp> {
        self.count().map(Timestamp::from_millis)
    }

    fn amount(&mut self) -> Option<NanoUsd> {
        self.number().map(NanoUsd::from_nanos)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ledger::testing::entry;

    fn call(entry: &Entry<'_>) -> Vec<u8> {
        let mut record = Vec::new();
        write_call(&mut record, entry);
        record
    }

    /// The call that is alone in a piece.
    fn read(piece: &[u8]) -> CallRecord<'_> {
        let mut records = Records::new(piece);
        let Some(Record::Call(call)) = records.next() else { panic!("{records:?}") };
        assert_eq!((records.consumed(), records.torn()), (piece.len(), 0));
        call
    }

    /// Serial numbers of the calls in a piece, the places that are torn, and the bytes that are left.
    fn serials(piece: &[u8]) -> (Vec<u64>, u64, usize) {
        let mut records = Records::new(piece);
        let mut serials = Vec::new();
        for record in &mut records {
            let Record::Call(call) = record else { panic!("{record:?}") };
            serials.push(uuid::Uuid::from_bytes(*call.id).as_u64_pair().0);
        }
        (serials, records.torn(), piece.len() - records.consumed())
    }

    #[test]
    fn a_call_comes_back_with_every_number_and_name() {
        let written = entry(7);
        let record = call(&written);
        let back = read(&record);
        assert_eq!(back.id, written.id.as_bytes());
        let column = |name| {
            let index = CALL_NUMBERS.iter().position(|column| *column == name).unwrap();
            back.numbers[index]
        };
        assert_eq!(column("closed_at"), i64::try_from(written.closed_at.as_millis()).unwrap());
        assert_eq!(column("cost"), written.cost.as_nanos());
        assert_eq!((column("self_hosted_cost"), column("audio_input_tokens")), (ABSENT, 0));
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
        let mut piece = Vec::new();
        write_rent(&mut piece, &rent);
        write_event(&mut piece, &event);
        assert_eq!(Records::new(&piece).collect::<Vec<_>>(), [Record::Rent(rent), Record::Event(event)]);
    }

    #[test]
    fn the_beginning_of_a_record_waits_for_its_end() {
        let whole = [call(&entry(1)), call(&entry(2))].concat();
        let first = whole.len() / 2;
        for cut in 0..whole.len() {
            let complete = cut / first;
            let expected = (vec![1; complete], 0, cut - complete * first);
            assert_eq!(serials(&whole[..cut]), expected, "cut at {cut}");
        }
    }

    #[test]
    fn a_record_that_follows_a_torn_one_is_found() {
        let (torn, whole) = (call(&entry(1)), call(&entry(2)));
        for cut in 1..torn.len() {
            let together = [&torn[..cut], &whole[..]].concat();
            assert_eq!(serials(&together), (vec![2], 1, 0), "cut at {cut}");
        }
    }

    #[test]
    fn the_rest_of_a_torn_record_does_not_hide_the_beginning_of_the_next() {
        let (torn, whole) = (call(&entry(1)), call(&entry(2)));
        let together = [&torn[5..], &whole[..20]].concat();
        assert_eq!(serials(&together), (vec![], 1, 20));
    }

    #[test]
    fn a_flipped_bit_is_noticed() {
        let (first, second) = (call(&entry(1)), call(&entry(2)));
        for at in 0..first.len() {
            let mut damaged = first.clone();
            damaged[at] ^= 1;
            damaged.extend_from_slice(&second);
            assert_eq!(serials(&damaged), (vec![2], 1, 0), "byte {at}");
        }
    }

    #[test]
    fn numbers_that_look_like_the_magic_are_not_taken_for_it() {
        let mut strange = entry(3);
        strange.attempts_cost = NanoUsd::from_nanos(i64::from_le_bytes([0x1E, 0xB5, 1, 0, 0x1E, 0xB5, 0, 0]));
        let piece = [call(&strange), call(&entry(4))].concat();
        assert_eq!(serials(&piece), (vec![3, 4], 0, 0));
        assert_eq!(serials(&piece[3..]), (vec![4], 1, 0));
    }

    #[test]
    fn no_text_can_contain_the_magic() {
        let magic = MAGIC.to_vec();
        assert!(String::from_utf8(magic.clone()).is_err());
        assert_eq!(String::from_utf8_lossy(&magic[1..]), "\u{FFFD}", "a character cannot end so either");
    }

    #[test]
    fn a_long_name_is_cut_and_the_rest_survives() {
        let mut long = entry(1);
        long.requested_model = "é".repeat(5000).into();
        let record = call(&long);
        let labels = parse_labels(read(&record).labels).unwrap();
        assert_eq!(labels[4].len(), MAX_TEXT);
        assert_eq!(labels[6], long.backend);
    }

    proptest! {
        #[test]
        fn any_text_and_amount_survive(tags in ".{0,100}", model in any::<String>(), cost in any::<i64>()) {
            let mut written = entry(3);
            written.tags = tags.as_str().into();
            written.requested_model = model.as_str().into();
            written.cost = NanoUsd::from_nanos(cost);
            let record = call(&written);
            let back = read(&record);
            prop_assert_eq!(back.numbers[17], cost.max(ABSENT + 1));
            prop_assert_eq!(back.tags, &tags[..tags.floor_char_boundary(MAX_TEXT)]);
            let labels = parse_labels(back.labels).unwrap();
            prop_assert_eq!(labels[4], &model[..model.floor_char_boundary(MAX_TEXT)]);
        }

        #[test]
        fn whatever_stands_before_a_record_it_is_found(before in proptest::collection::vec(any::<u8>(), 0..64)) {
            let piece = [&before[..], &call(&entry(5)), &call(&entry(6))].concat();
            let (serials, torn, left) = serials(&piece);
            prop_assert_eq!((serials, left), (vec![5, 6], 0));
            prop_assert_eq!(torn, u64::from(!before.is_empty()));
        }
    }
}
