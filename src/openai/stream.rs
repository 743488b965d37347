//! A stream as it passes: what it used, what it produced, and the chunk that must not reach the client.
//!
//! Bytes go through as they came. The one exception: when we, not the client, asked for the usage chunk, that
//! event is cut out, even when it arrives in pieces. Only the bytes of an incomplete event that may yet prove
//! to be it are held back, and at most [`MAX_HELD_BYTES`] of them; no client could have used them before the
//! rest came.
//!
//! An event that differs from one before in nothing but its text costs two comparisons and the way to the end of the
//! text ([`Pattern`]); another one three searches and a walk over its `choices`: no parse, no allocation. Text that is
//! produced is kept as it is escaped, up to [`MAX_TEXT_BYTES`], so that it can be counted by a tokenizer off
//! this path if usage never arrives ([`StreamReader::produced_text`]).

mod pattern;

use std::sync::LazyLock;

use bytes::{Bytes, BytesMut};
use memchr::memmem::{self, Finder};

use super::Endpoint;
use super::json::{self, Watcher};
use super::sse::{self, Scanner};
use super::usage::{Counts, Sighting, after_colon};
use crate::economics::{Tier, Usage};
use pattern::{Pattern, Place};

/// Held back of an incomplete event that may be the usage chunk: it is a few hundred bytes long.
pub const MAX_HELD_BYTES: usize = 16 << 10;
/// Kept of an incomplete event; of a longer one its beginning and its end.
const MAX_PARTIAL_BYTES: usize = 4 << 20;
const PARTIAL_HEAD_BYTES: usize = 4 << 10;
const PARTIAL_TAIL_BYTES: usize = 64 << 10;
/// Kept of the text that was produced.
pub const MAX_TEXT_BYTES: usize = 64 << 10;

static CHOICES: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("\"choices\""));
static USAGE: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("\"usage\""));
static DELTA: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("\"delta\""));

/// What a stream has shown so far.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[expect(clippy::struct_excessive_bools, reason = "independent sightings")]
pub struct Report {
    /// The last usage seen: servers repeat it, growing. Only those that report each choice by itself mean the sum.
    pub usage: Option<Usage>,
    /// The tier that is served, once a chunk has named one.
    pub tier: Option<Tier>,
    pub model: Option<String>,
    pub id: Option<String>,
    pub is_background: bool,
    /// `[DONE]`, which is no proof of success: vLLM sends it after an error, too.
    pub saw_done: bool,
    pub saw_error: bool,
    /// The event that ends a Responses or Messages stream.
    pub saw_end: bool,
    /// At least one event with data has come: the end of the wait for the first token.
    pub first_data_event: bool,
    /// Events with text, reasoning or tool arguments in them. Most servers send a token in each.
    pub output_events: u64,
    /// Bytes of text, reasoning and tool arguments, as escaped in JSON.
    pub output_text_bytes: u64,
    pub saw_finish_reason: bool,
}

/// Watches one stream. Give it every piece, pass on what it returns.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts about where the stream stands")]
pub struct StreamReader {
    endpoint: Endpoint,
    strip_usage: bool,
    /// Each choice has a usage chunk of its own.
    sums_choices: bool,
    scanner: Scanner,
    /// The event at hand, as far as it came in earlier pieces.
    partial: Vec<u8>,
    /// None of `partial` has been passed on.
    is_held: bool,
    /// The event before was cut out.
    was_cut: bool,
    /// The first event with data has been read for what it says of the response.
    has_read_first: bool,
    counts: Option<Counts>,
    report: Report,
    text: Vec<u8>,
    pattern: Pattern,
}

impl StreamReader {
    /// `strip_usage`: the usage chunk was asked for by us and must not reach the client.
    pub fn new(endpoint: Endpoint, strip_usage: bool) -> Self {
        Self {
            endpoint,
            strip_usage,
            sums_choices: false,
            scanner: Scanner::default(),
            partial: Vec::new(),
            is_held: false,
            was_cut: false,
            has_read_first: false,
            counts: None,
            report: Report::default(),
            text: Vec::new(),
            pattern: Pattern::default(),
        }
    }

    /// For a server that reports the usage of each choice in a chunk of its own: what the last one says is not all.
    #[must_use]
    pub fn summing_choices(self) -> Self {
        Self { sums_choices: true, ..self }
    }

    /// Takes note of a piece of the stream and returns what passes to the client: the same `Bytes` unless the
    /// usage chunk is in it.
    pub fn push(&mut self, chunk: Bytes) -> Bytes {
        let mut passing = Passing::default();
        let mut from = 0;
        if self.partial.is_empty() && self.scanner.awaits_newline() && chunk.first() == Some(&b'\n') {
            // The second half of the newline that ended the event before: it shares that event's fate.
            self.scanner.event_end(&chunk[..1]);
            from = 1;
            passing.skip_to(usize::from(self.was_cut));
        }
        loop {
            from += self.note_alike(&chunk[from..]);
            let Some(length) = self.scanner.event_end(&chunk[from..]) else { break };
            let end = from + length;
            let is_cut = self.note_piece(&chunk[from..end]);
            let held = std::mem::take(&mut self.is_held);
            self.was_cut = is_cut;
            if is_cut {
                passing.cut(&chunk, from, end);
            } else if held {
                passing.release(&self.partial);
            }
            self.partial.clear();
            from = end;
        }
        if from < chunk.len() {
            self.keep_rest(&chunk, from, &mut passing);
        }
        passing.finish(chunk)
    }

    /// Notes the events at the beginning that differ from one before in nothing but their text. Returns their length.
    #[inline]
    fn note_alike(&mut self, bytes: &[u8]) -> usize {
        let mut from = 0;
        if !self.partial.is_empty() || self.scanner.awaits_newline() {
            return from;
        }
        while let Some((text, length)) = self.pattern.read(&bytes[from..]) {
            keep(&mut self.text, text);
            self.count_output(text.len());
            self.was_cut = false;
            from += length;
        }
        from
    }

    /// Notes an event of which `piece` is the end, and the whole if nothing of it came before.
    fn note_piece(&mut self, piece: &[u8]) -> bool {
        if self.partial.is_empty() {
            return self.note(piece);
        }
        let before = self.partial.len();
        let mut event = std::mem::take(&mut self.partial);
        event.extend_from_slice(piece);
        let is_cut = self.note(&event) && self.is_held;
        event.truncate(before);
        self.partial = event;
        is_cut
    }

    /// Keeps the beginning of an incomplete event, and holds it back if it may be the usage chunk.
    fn keep_rest(&mut self, chunk: &Bytes, from: usize, passing: &mut Passing) {
        let rest = &chunk[from..];
        let (held_before, before) = (self.is_held, self.partial.len());
        self.partial.extend_from_slice(rest);
        self.is_held = self.strip_usage && (before == 0 || held_before) && may_be_usage(&self.partial);
        match (held_before, self.is_held) {
            (_, true) => passing.end_at(from),
            (true, false) => passing.release(&self.partial[..before]),
            (false, false) => {}
        }
        if self.partial.len() > MAX_PARTIAL_BYTES {
            self.partial.drain(PARTIAL_HEAD_BYTES..self.partial.len() - PARTIAL_TAIL_BYTES);
        }
    }

    /// The stream is over, or was given up: returns what was held back and still belongs to the client.
    pub fn finish(&mut self) -> Bytes {
        let event = std::mem::take(&mut self.partial);
        let is_cut = !event.is_empty() && self.note(&event);
        let held = std::mem::take(&mut self.is_held);
        if held && !is_cut { Bytes::from(event) } else { Bytes::new() }
    }

    pub fn report(&self) -> &Report {
        &self.report
    }

    /// Whether the stream came to its proper end, without an error on the way. One that was cut off did not.
    pub fn is_complete(&self) -> bool {
        let ended = match self.endpoint {
            Endpoint::ChatCompletions | Endpoint::Completions => self.report.saw_done,
            Endpoint::Responses | Endpoint::Messages => self.report.saw_end,
            _ => true,
        };
        ended && !self.report.saw_error
    }

    /// The first [`MAX_TEXT_BYTES`] of what was produced, to be counted when usage never arrived. If
    /// `report().output_text_bytes` is more than was kept, scale the count by [`StreamReader::kept_share`].
    pub fn produced_text(&self) -> String {
        let quoted = [b"\"", &self.text[..], b"\""].concat();
        // A lone surrogate, or an escape cut at the limit, makes it no valid string: then count it raw.
        serde_json::from_slice(&quoted).unwrap_or_else(|_| String::from_utf8_lossy(&self.text).into_owned())
    }

    /// Bytes that were kept over bytes that were produced, 1 when all was kept.
    #[expect(clippy::cast_precision_loss, reason = "a ratio")]
    pub fn kept_share(&self) -> f64 {
        if self.report.output_text_bytes == 0 {
            return 1.0;
        }
        self.text.len() as f64 / self.report.output_text_bytes as f64
    }

    /// Takes note of a complete event. True if it is the usage chunk that is to be cut.
    #[inline]
    fn note(&mut self, bytes: &[u8]) -> bool {
        let event = sse::parse(bytes);
        let Some(data) = event.data else { return false };
        if data.is_empty() {
            return false;
        }
        self.report.first_data_event = true;
        if *data == *b"[DONE]" {
            self.report.saw_done = true;
            return false;
        }
        let Noted { has_no_choices, only_text } = self.note_data(event.name, &data);
        let may_report = has_object(&data, &USAGE);
        if let Some(text) = only_text.filter(|_| !may_report).and_then(|text| text.within(bytes)) {
            self.pattern.learn(bytes, text);
        }
        let reports =
            (may_report || !self.has_read_first) && self.note_response(&data, may_report, has_no_choices);
        self.has_read_first = true;
        self.strip_usage && reports && has_no_choices
    }

    /// Notes what the event brings.
    fn note_data(&mut self, name: &[u8], data: &[u8]) -> Noted {
        let Some(choices) = value_after(data, &CHOICES) else {
            self.note_typed(name, data);
            return Noted::default();
        };
        let has_no_choices =
            choices.strip_prefix(b"[").is_some_and(|rest| rest.trim_ascii_start().starts_with(b"]"));
        Noted { has_no_choices, only_text: self.note_choices(choices) }
    }

    /// The only text in the choices, if nothing else in them counts.
    fn note_choices(&mut self, choices: &[u8]) -> Option<Place> {
        let mut output = Output::new(&mut self.text);
        // What is malformed counts up to there; it passes, and the client sees for itself.
        let watched = json::watch_strings(choices, &mut output);
        let Output { bytes, finishes, texts, last_text, .. } = output;
        self.report.saw_finish_reason |= finishes;
        self.count_output(bytes);
        (watched.is_ok() && !finishes && texts == 1).then_some(last_text)
    }

    fn count_output(&mut self, bytes: usize) {
        if bytes > 0 {
            self.report.output_events += 1;
            self.report.output_text_bytes += bytes as u64;
        }
    }

    /// Events that say by their type what they are: Responses, Messages, speech, transcription, errors.
    fn note_typed(&mut self, name: &[u8], data: &[u8]) {
        let kind = if name.is_empty() {
            json::member(data, "type")
                .and_then(|kind| kind.strip_prefix(b"\"")?.strip_suffix(b"\""))
                .unwrap_or_default()
        } else {
            name
        };
        match kind {
            b"content_block_delta" | b"transcript.text.delta" => self.note_delta(data),
            b"response.completed" | b"response.incomplete" | b"message_stop" | b"response.done" => {
                self.report.saw_end = true;
            }
            b"response.failed" | b"error" => {
                self.report.saw_end = true;
                self.report.saw_error = true;
            }
            _ if kind.ends_with(b".delta") && kind.starts_with(b"response.") && !is_audio(kind) => {
                self.note_delta(data);
            }
            b"" => {
                let has_error = json::member(data, "error").is_some_and(|error| error != b"null");
                self.report.saw_error |= has_error || json::member(data, "object") == Some(b"\"error\"");
            }
            _ => {}
        }
    }

    fn note_delta(&mut self, data: &[u8]) {
        let Some(delta) = value_after(data, &DELTA) else { return };
        let mut output = Output::new(&mut self.text);
        output.is_text = true;
        let _watched_so_far = json::watch_strings(delta, &mut output);
        let bytes = output.bytes;
        self.count_output(bytes);
    }

    /// Reads what the event says of its response: in the first, and whenever it may report usage. True if it
    /// does. An event too long to be kept whole has its usage at the end.
    fn note_response(&mut self, data: &[u8], may_report: bool, has_no_choices: bool) -> bool {
        let Some(seen) = Sighting::read(self.endpoint, data) else {
            if may_report {
                self.report.usage = super::usage::from_tail(self.endpoint, data).or(self.report.usage);
            }
            return false;
        };
        let report = &mut self.report;
        report.tier = seen.tier.or(report.tier);
        report.model = seen.model.or(report.model.take());
        report.id = seen.id.or(report.id.take());
        report.is_background |= seen.is_background;
        let Some(counts) = seen.counts else { return false };
        let counts = match self.counts {
            Some(earlier) if self.endpoint == Endpoint::Messages => counts.over(earlier),
            Some(earlier) if self.sums_choices && has_no_choices => earlier.with_choice(counts),
            _ => counts,
        };
        self.counts = Some(counts);
        report.usage = counts.usage(self.endpoint).or(report.usage);
        true
    }
}

fn is_audio(kind: &[u8]) -> bool {
    kind == b"response.audio.delta" || kind == b"response.output_audio.delta"
}

/// The text after a key and its colon.
#[inline]
fn value_after<'a>(data: &'a [u8], key: &Finder<'_>) -> Option<&'a [u8]> {
    let at = key.find(data)?;
    after_colon(&data[at + key.needle().len()..])
}

/// Whether the key occurs with an object as its value; `"usage":null` is in every chunk of some servers.
#[inline]
fn has_object(data: &[u8], key: &Finder<'_>) -> bool {
    key.find_iter(data)
        .any(|at| after_colon(&data[at + key.needle().len()..]).is_some_and(|value| value.starts_with(b"{")))
}

/// Whether an incomplete event may prove to be the usage chunk: its choices are empty, or not there yet.
fn may_be_usage(partial: &[u8]) -> bool {
    if partial.len() > MAX_HELD_BYTES {
        return false;
    }
    let Some(at) = memmem::find(partial, b"\"choices\"") else { return true };
    let after = partial[at + b"\"choices\"".len()..].trim_ascii_start();
    let Some(value) = after.strip_prefix(b":").map(<[u8]>::trim_ascii_start) else { return after.is_empty() };
    let Some(inside) = value.strip_prefix(b"[").map(<[u8]>::trim_ascii_start) else {
        return value.is_empty();
    };
    inside.is_empty() || inside.starts_with(b"]")
}

/// What of a chunk passes to the client. The common case, all of it, copies nothing.
#[derive(Debug, Default)]
struct Passing {
    /// What passes before `from`, once it is not simply the chunk's own beginning.
    before: BytesMut,
    /// The chunk's bytes from here on are still to be passed.
    from: usize,
    /// Where the chunk's held-back end begins.
    end: Option<usize>,
}

impl Passing {
    fn skip_to(&mut self, to: usize) {
        self.from = to;
    }

    fn cut(&mut self, chunk: &Bytes, start: usize, end: usize) {
        if start > self.from {
            self.before.extend_from_slice(&chunk[self.from..start]);
        }
        self.from = end;
    }

    /// Held bytes go first: they came before this chunk.
    fn release(&mut self, held: &[u8]) {
        debug_assert!(self.before.is_empty(), "only the first event of a chunk can have begun before it");
        self.before.extend_from_slice(held);
    }

    fn end_at(&mut self, end: usize) {
        self.end = Some(end);
    }

    fn finish(mut self, chunk: Bytes) -> Bytes {
        let end = self.end.unwrap_or(chunk.len());
        if self.before.is_empty() {
            return if self.from == 0 && end == chunk.len() { chunk } else { chunk.slice(self.from..end) };
        }
        self.before.extend_from_slice(&chunk[self.from..end]);
        self.before.freeze()
    }
}

/// What an event brings beside what it produced.
#[derive(Debug, Default)]
struct Noted {
    /// It has choices, and there are none in them.
    has_no_choices: bool,
    /// The only text in its choices, if nothing else in them counts.
    only_text: Option<Place>,
}

/// Collects what a model produced from the strings of a chunk's choices, or of a delta.
struct Output<'t> {
    text: &'t mut Vec<u8>,
    bytes: usize,
    texts: u32,
    last_text: Place,
    finishes: bool,
    /// The string at hand is produced text.
    is_text: bool,
    is_finish: bool,
}

impl<'t> Output<'t> {
    fn new(text: &'t mut Vec<u8>) -> Self {
        Self {
            text,
            bytes: 0,
            texts: 0,
            last_text: Place::default(),
            finishes: false,
            is_text: false,
            is_finish: false,
        }
    }
}

impl Watcher for Output<'_> {
    #[inline]
    fn string(&mut self, raw: &[u8], is_key: bool) {
        if is_key {
            self.is_text = is_text_key(raw);
            self.is_finish = raw == b"finish_reason";
            return;
        }
        self.finishes |= self.is_finish;
        if self.is_text {
            self.bytes += raw.len();
            self.texts += 1;
            self.last_text = Place::of(raw);
            keep(self.text, raw);
        }
    }
}

/// Keeps a piece of text that was produced, if there is room.
#[inline]
fn keep(text: &mut Vec<u8>, piece: &[u8]) {
    if text.len() + piece.len() <= MAX_TEXT_BYTES {
        text.extend_from_slice(piece);
    }
}

fn is_text_key(key: &[u8]) -> bool {
    matches!(
        key,
        b"content"
            | b"text"
            | b"reasoning"
            | b"reasoning_content"
            | b"refusal"
            | b"arguments"
            | b"name"
            | b"transcript"
            | b"thinking"
            | b"partial_json"
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const USAGE_CHUNK: &str = "data: {\"id\":\"c\",\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":2,\"total_tokens\":9}}\n\n";
    const WORD: &str = "data: {\"id\":\"c\",\"model\":\"m\",\"service_tier\":\"flex\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"hi \\\"you\\\"\"},\"finish_reason\":null}],\"usage\":null}\n\n";

    fn read(endpoint: Endpoint, text: &str) -> StreamReader {
        let mut reader = StreamReader::new(endpoint, false);
        assert_eq!(reader.push(Bytes::from(text.to_owned())), text.as_bytes());
        reader
    }

    fn stripped(pieces: &[&str]) -> Vec<String> {
        let mut reader = StreamReader::new(Endpoint::ChatCompletions, true);
        let mut passed: Vec<Bytes> =
            pieces.iter().map(|piece| reader.push(Bytes::from((*piece).to_owned()))).collect();
        passed.push(reader.finish());
        passed.iter().map(|bytes| String::from_utf8(bytes.to_vec()).unwrap()).collect()
    }

    #[test]
    fn ordinary_pieces_pass_as_the_same_bytes() {
        let mut reader = StreamReader::new(Endpoint::ChatCompletions, true);
        for text in [WORD, ": keep-alive\n\n", "data: [DONE]\n\n"] {
            let piece = Bytes::from(text);
            assert_eq!(reader.push(piece.clone()).as_ptr(), piece.as_ptr());
        }
        assert!(reader.is_complete());
    }

    #[test]
    fn only_the_usage_chunk_is_cut_out() {
        let all = format!("{WORD}{USAGE_CHUNK}data: [DONE]\n\n");
        assert_eq!(stripped(&[&all]), [format!("{WORD}data: [DONE]\n\n"), String::new()]);
        assert_eq!(stripped(&[WORD, USAGE_CHUNK, "data: [DONE]\n\n"]), [WORD, "", "data: [DONE]\n\n", ""]);
        let (head, tail) = USAGE_CHUNK.split_at(40);
        assert_eq!(stripped(&[&format!("{WORD}{head}"), tail, WORD]), [WORD, "", WORD, ""]);
        let unended = USAGE_CHUNK.trim_end();
        assert_eq!(stripped(&[unended]), ["", ""]);
    }

    #[test]
    fn an_event_that_is_not_the_usage_chunk_is_let_go_as_soon_as_that_is_known() {
        let (head, tail) = WORD.split_at(WORD.find("{\"index\"").unwrap() + 1);
        assert_eq!(stripped(&[head, tail]), [head, tail, ""]);
        assert_eq!(
            stripped(&["data: {\"id\":", "\"c\",\"choices\":[{", "}]}\n\n"]),
            ["", "data: {\"id\":\"c\",\"choices\":[{", "}]}\n\n", ""]
        );
        assert_eq!(stripped(&["data: [DO"]), ["", "data: [DO"]);
    }

    #[test]
    fn usage_beside_choices_is_counted_and_passes() {
        let event = "data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":1}}\n\n";
        assert_eq!(stripped(&[event]), [event, ""]);
        assert_eq!(read(Endpoint::ChatCompletions, event).report().usage, Some(Usage::new(3, 1)));
    }

    #[test]
    fn a_prompt_filter_of_azure_is_no_usage_chunk() {
        let event = "data: {\"choices\":[],\"id\":\"\",\"prompt_filter_results\":[{}],\"usage\":null}\n\n";
        assert_eq!(stripped(&[event]), [event, ""]);
        let reader = read(Endpoint::ChatCompletions, &format!("{event}{USAGE_CHUNK}"));
        assert_eq!(reader.report().id.as_deref(), Some("c"));
    }

    #[test]
    fn the_last_usage_counts_and_none_is_added() {
        let growing = |tokens: u32| {
            format!(
                "data: {{\"choices\":[{{}}],\"usage\":{{\"prompt_tokens\":5,\"completion_tokens\":{tokens}}}}}\n\n"
            )
        };
        let reader = read(Endpoint::ChatCompletions, &[growing(1), growing(2), growing(3)].concat());
        assert_eq!(reader.report().usage, Some(Usage::new(5, 3)));
    }

    #[test]
    fn what_is_produced_is_counted_and_kept() {
        let reader = read(Endpoint::ChatCompletions, &WORD.repeat(3));
        let report = reader.report();
        assert_eq!(reader.produced_text(), "hi \"you\"".repeat(3));
        assert_eq!((report.output_events, report.output_text_bytes, report.tier), (3, 30, Some(Tier::Flex)));
        assert!(report.first_data_event && !report.saw_finish_reason && !reader.is_complete());
        let many = read(Endpoint::ChatCompletions, &WORD.repeat(20_000));
        assert!(many.produced_text().len() <= MAX_TEXT_BYTES);
        assert!((many.kept_share() - 0.32768).abs() < 0.001, "{}", many.kept_share());
    }

    #[test]
    fn roles_and_ids_are_not_output() {
        let event = "data: {\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":null,\"tool_calls\":[{\"id\":\"call_1\",\"type\":\"function\",\"function\":{\"name\":\"f\",\"arguments\":\"{\\\"a\\\":1}\"}}]},\"finish_reason\":\"tool_calls\"}]}\n\n";
        let reader = read(Endpoint::ChatCompletions, event);
        assert_eq!(reader.produced_text(), "f{\"a\":1}");
        assert!(reader.report().saw_finish_reason);
    }

    #[test]
    fn a_message_tells_its_input_first_and_its_output_later() {
        let text = concat!(
            "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"id\":\"msg\",\"model\":\"claude\",\"usage\":{\"input_tokens\":9,\"cache_read_input_tokens\":18,\"output_tokens\":1}}}\n\n",
            "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"delta\":{\"type\":\"text_delta\",\"text\":\"hey\"}}\n\n",
            "event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\"},\"usage\":{\"output_tokens\":15}}\n\n",
            "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n",
        );
        let reader = read(Endpoint::Messages, text);
        assert_eq!(reader.report().usage, Some(Usage::new(27, 15).with_cached(18)));
        assert_eq!((reader.produced_text().as_str(), reader.is_complete()), ("hey", true));
    }

    #[test]
    fn a_response_ends_with_its_own_event_or_fails() {
        let done = "event: response.incomplete\ndata: {\"type\":\"response.incomplete\",\"response\":{\"id\":\"r\",\"service_tier\":\"priority\",\"usage\":{\"input_tokens\":4,\"output_tokens\":2}}}\n\n";
        let reader = read(Endpoint::Responses, done);
        assert_eq!(
            (reader.report().usage, reader.report().tier),
            (Some(Usage::new(4, 2)), Some(Tier::Priority))
        );
        assert!(reader.is_complete());
        let failed = read(Endpoint::Responses, "data: {\"type\":\"response.failed\",\"response\":{}}\n\n");
        assert!(failed.report().saw_error && !failed.is_complete());
        assert!(
            !read(Endpoint::Responses, "event: response.created\ndata: {\"response\":{\"id\":\"r\"}}\n\n")
                .is_complete()
        );
    }

    #[test]
    fn a_done_after_an_error_is_no_success() {
        let reader =
            read(Endpoint::ChatCompletions, "data: {\"error\": {\"message\": \"died\"}}\n\ndata: [DONE]\n\n");
        assert!(reader.report().saw_done && reader.report().saw_error && !reader.is_complete());
    }

    /// Events of one stream as servers write them, most of them alike.
    fn event() -> impl Strategy<Value = String> {
        let text = r#"([a-z ]{0,40}|é|\\\\|\\"|\\n){0,3}"#;
        let chunk = |delta: String, finish: &str, rest: &str| {
            format!(
                "data: {{\"id\":\"c\",\"model\":\"m\",\"choices\":[{{\"index\":0,\"delta\":{delta},\"finish_reason\":{finish}}}]{rest}}}\n\n"
            )
        };
        prop_oneof![
            8 => (text, "[a-z]{0,9}", 0..3).prop_map(move |(text, padding, kind)| {
                let delta = format!("{{\"content\":\"{text}\"}}");
                match kind {
                    0 => chunk(delta, "null", ""),
                    1 => chunk(delta, "null", ",\"usage\":null"),
                    _ => chunk(delta, "null", &format!(",\"usage\":null,\"obfuscation\":\"{padding}\"")),
                }
            }),
            1 => text.prop_map(move |text| chunk(format!("{{\"role\":\"{text}\",\"refusal\":\"{text}\"}}"), "null", "")),
            1 => Just(chunk("{}".to_owned(), "\"stop\"", "")),
            1 => Just(chunk("{\"content\":\"a\"}".to_owned(), "null", ",\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":2}")),
            1 => Just(USAGE_CHUNK.to_owned()),
            1 => Just(": keep-alive\n\n".to_owned()),
            1 => Just(WORD.replace('\n', "\r\n")),
        ]
    }

    proptest! {
        #[test]
        fn what_is_noted_does_not_depend_on_how_the_stream_is_cut(
            events in proptest::collection::vec(event(), 0..30),
            length in 1_usize..900,
            strip_usage: bool,
        ) {
            let text = events.concat();
            let read = |length: usize| {
                let mut reader = StreamReader::new(Endpoint::ChatCompletions, strip_usage);
                let mut passed = Vec::new();
                for piece in text.as_bytes().chunks(length) {
                    passed.extend_from_slice(&reader.push(Bytes::copy_from_slice(piece)));
                }
                passed.extend_from_slice(&reader.finish());
                (String::from_utf8(passed).unwrap(), reader.produced_text(), reader.report().clone())
            };
            // Byte by byte no event is whole when it is looked at, so each is read with care.
            let careful = read(1);
            prop_assert_eq!(&read(length), &careful);
            prop_assert_eq!(&read(text.len().max(1)), &careful);
        }
    }

    #[test]
    fn usage_is_found_at_the_end_of_an_event_too_long_to_keep() {
        let text = "x".repeat(2 * MAX_PARTIAL_BYTES);
        let event = format!(
            "event: response.completed\ndata: {{\"response\":{{\"output\":\"{text}\",\"usage\":{{\"input_tokens\":4,\"output_tokens\":2}}}}}}\n\n"
        );
        let mut reader = StreamReader::new(Endpoint::Responses, false);
        let passed: usize = event
            .as_bytes()
            .chunks(1 << 16)
            .map(|piece| reader.push(Bytes::copy_from_slice(piece)).len())
            .sum();
        assert_eq!((passed, reader.report().usage), (event.len(), Some(Usage::new(4, 2))));
        assert!(reader.is_complete());
    }
}
