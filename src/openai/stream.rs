//! A stream as it passes: what it used, what it produced, and the chunk that must not reach the client.
//!
//! Bytes go through as they came. The one exception: when we, not the client, asked for the usage chunk, that
//! event is cut out, even when it arrives in pieces. Only the bytes of an incomplete event that may yet prove
//! to be it are held back, and at most [`MAX_HELD_BYTES`] of them; no client could have used them before the
//! rest came.
//!
//! An ordinary event costs one search and a walk over its `choices`: no parse, no allocation. Text that is
//! produced is kept as it is escaped, up to [`MAX_TEXT_BYTES`], so that it can be counted by a tokenizer off
//! this path if usage never arrives ([`StreamReader::produced_text`]).

use std::sync::LazyLock;

use bytes::{Bytes, BytesMut};
use memchr::memmem::{self, Finder};

use super::Endpoint;
use super::json::{self, Watcher};
use super::sse::{self, Scanner};
use super::usage::{Counts, Sighting, after_colon};
use crate::economics::{Tier, Usage};

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
    /// The last usage seen: servers repeat it, growing, and never mean the sum.
    pub usage: Option<Usage>,
    /// The tier that is served, once a chunk has named one.
    pub tier: Option<Tier>,
    pub model: Option<String>,
    pub id: Option<String>,
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
}

impl StreamReader {
    /// `strip_usage`: the usage chunk was asked for by us and must not reach the client.
    pub fn new(endpoint: Endpoint, strip_usage: bool) -> Self {
        Self {
            endpoint,
            strip_usage,
            scanner: Scanner::default(),
            partial: Vec::new(),
            is_held: false,
            was_cut: false,
            has_read_first: false,
            counts: None,
            report: Report::default(),
            text: Vec::new(),
        }
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
        while let Some(end) = self.scanner.event_end(&chunk[from..]).map(|length| from + length) {
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
    fn note(&mut self, event: &[u8]) -> bool {
        let event = sse::parse(event);
        let Some(data) = event.data else { return false };
        if data.is_empty() {
            return false;
        }
        self.report.first_data_event = true;
        if *data == *b"[DONE]" {
            self.report.saw_done = true;
            return false;
        }
        let has_no_choices = self.note_data(event.name, &data);
        let has_usage = has_object(&data, &USAGE);
        if has_usage || !std::mem::replace(&mut self.has_read_first, true) {
            self.note_response(&data, has_usage);
        }
        self.strip_usage && has_usage && has_no_choices
    }

    /// Notes what the event brings. True if it has choices, and there are none in them.
    fn note_data(&mut self, name: &[u8], data: &[u8]) -> bool {
        if let Some(choices) = value_after(data, &CHOICES) {
            self.note_choices(choices);
            return choices.strip_prefix(b"[").is_some_and(|rest| rest.trim_ascii_start().starts_with(b"]"));
        }
        self.note_typed(name, data);
        false
    }

    fn note_choices(&mut self, choices: &[u8]) {
        let mut output = Output::new(&mut self.text);
        // What is malformed counts up to there; it passes, and the client sees for itself.
        let _watched_so_far = json::watch_strings(choices, &mut output);
        self.report.saw_finish_reason |= output.finishes;
        let bytes = output.bytes;
        self.count_output(bytes);
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

    /// Reads what the event says of its response. Once for the first, and whenever there is usage in it.
    fn note_response(&mut self, data: &[u8], has_usage: bool) {
        let Some(seen) = Sighting::read(self.endpoint, data) else {
            if has_usage {
                self.report.usage = super::usage::from_tail(self.endpoint, data).or(self.report.usage);
            }
            return;
        };
        let report = &mut self.report;
        report.tier = seen.tier.or(report.tier);
        report.model = seen.model.or(report.model.take());
        report.id = seen.id.or(report.id.take());
        let Some(counts) = seen.counts else { return };
        let counts = match self.counts {
            Some(earlier) if self.endpoint == Endpoint::Messages => counts.over(earlier),
            _ => counts,
        };
        self.counts = Some(counts);
        report.usage = counts.usage(self.endpoint).or(report.usage);
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

/// Collects what a model produced from the strings of a chunk's choices, or of a delta.
struct Output<'t> {
    text: &'t mut Vec<u8>,
    bytes: usize,
    finishes: bool,
    /// The string at hand is produced text.
    is_text: bool,
    is_finish: bool,
}

impl<'t> Output<'t> {
    fn new(text: &'t mut Vec<u8>) -> Self {
        Self { text, bytes: 0, finishes: false, is_text: false, is_finish: false }
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
            if self.text.len() + raw.len() <= MAX_TEXT_BYTES {
                self.text.extend_from_slice(raw);
            }
        }
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
