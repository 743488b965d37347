//! `usage` objects, whatever the endpoint calls their members, in one normal form.
//!
//! | endpoint | input | output | parts |
//! |---|---|---|---|
//! | chat, completions, embeddings | `prompt_tokens` | `completion_tokens` | `*_tokens_details` |
//! | responses, images, speech, transcription | `input_tokens` | `output_tokens` | `*_tokens_details`, `input_token_details` |
//! | realtime (`response.done`) | `input_tokens` | `output_tokens` | `*_token_details` |
//! | Anthropic messages | `input_tokens` + `cache_*_input_tokens` | `output_tokens` | cache counts stand outside |
//!
//! Cached, written and media tokens are parts of the input, reasoning and media tokens parts of the output. A
//! server whose total exceeds input and output by its reasoning tokens counts them outside; they are taken in.

use std::sync::LazyLock;

use memchr::memmem::Finder;

use super::Endpoint;
use super::json::{self, Cursor, JsonError};
use crate::economics::{Tier, Usage};

/// An answer's `usage` is looked for in so many bytes at its end, before all of it is read.
const END_BYTES: usize = 512;

static USAGE: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("\"usage\""));
static SERVICE_TIER: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("\"service_tier\""));

/// What a body or an event says it used.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reported {
    pub usage: Usage,
    /// The tier that was served; standard when the answer names none, or one we do not know.
    pub tier: Tier,
    /// The model that answered. Not looked for where the end of the answer says the rest: a call that was
    /// routed is priced by the model that it asked for.
    pub model: Option<String>,
    /// The response's id: the same id twice is the same use, not twice as much. Looked for like `model`.
    pub id: Option<String>,
    /// It was made in the background: who asked for it was answered before.
    pub is_background: bool,
}

/// Reads the usage of a complete answer: one JSON object, a realtime event, or a line of a batch's output.
/// `None` when it reports none. A free endpoint (moderations) used nothing, and says so.
pub fn from_body(endpoint: Endpoint, body: &[u8]) -> Option<Reported> {
    from_end(endpoint, body).or_else(|| from_whole(endpoint, body))
}

/// As [`from_body`], and with the model and the id of any answer.
pub fn from_whole(endpoint: Endpoint, body: &[u8]) -> Option<Reported> {
    let sighting = Sighting::read(endpoint, body)?;
    match sighting.reported(endpoint) {
        None if endpoint == Endpoint::Moderations => {
            Some(Reported { model: sighting.model, id: sighting.id, ..Reported::default() })
        }
        reported => reported,
    }
}

/// Reads usage and tier of a routed endpoint's answer from its end, where nearly all servers put them: a third
/// of the work of reading it all. `None` when they are not all there; then the whole has to be read.
///
/// Of valid JSON it is exact. A quote inside a string is escaped, so `"usage"` followed by a colon is a key; the
/// last one is what counts; and from there to the end of the answer only members of its outermost object may
/// come, so it is a member of that. The same holds for `"service_tier"`, wherever it stands. An answer of these
/// endpoints is no envelope of another.
fn from_end(endpoint: Endpoint, body: &[u8]) -> Option<Reported> {
    // A response to a stored prompt is priced by the model that answers, which stands at its beginning.
    if !endpoint.is_routed() || endpoint == Endpoint::Responses {
        return None;
    }
    let end = body.len().saturating_sub(END_BYTES);
    let usage = end + USAGE.find_iter(&body[end..]).last()?;
    let from = SERVICE_TIER.find_iter(&body[..usage]).last().unwrap_or(usage);
    let (mut counts, mut tier) = (None, None);
    json::last_members(body, from, &mut |value, name| {
        match name {
            b"usage" if value.is_at_object() => {
                let mut found = Counts::default();
                found.read_members(value)?;
                counts = Some(found);
            }
            b"service_tier" => tier = served_tier(value.skip()?),
            _ => drop(value.skip()?),
        }
        Ok(())
    })
    .ok()?;
    let usage = counts?.usage(endpoint)?;
    Some(Reported { usage, tier: tier.unwrap_or_default(), ..Reported::default() })
}

/// The usages of a batch's output file, a response a line; lines of failed requests have none.
pub fn from_batch_output(body: &[u8]) -> impl Iterator<Item = Reported> {
    body.split(|byte| *byte == b'\n').filter_map(|line| from_body(Endpoint::Batches, line))
}

/// Reads the last `usage` object in a piece of JSON that lacks its beginning: the end of an answer too long
/// to keep. What stands in strings is not taken for it: there, quotes are escaped.
pub fn from_tail(endpoint: Endpoint, tail: &[u8]) -> Option<Usage> {
    memchr::memmem::rfind_iter(tail, b"\"usage\"").find_map(|at| {
        let value = after_colon(&tail[at + b"\"usage\"".len()..])?;
        let end = json::value_end(value)?;
        Counts::read(&value[..end]).usage(endpoint)
    })
}

/// The text after the colon of a key that ends where `rest` begins.
pub(super) fn after_colon(rest: &[u8]) -> Option<&[u8]> {
    Some(rest.trim_ascii_start().strip_prefix(b":")?.trim_ascii_start())
}

/// What one JSON object shows of a response: an answer, or an event that carries one.
#[derive(Debug, Clone, Default)]
pub(super) struct Sighting {
    pub(super) counts: Option<Counts>,
    pub(super) tier: Option<Tier>,
    pub(super) model: Option<String>,
    pub(super) id: Option<String>,
    pub(super) has_error: bool,
    pub(super) is_background: bool,
    is_batch: bool,
}

impl Sighting {
    pub(super) fn read(endpoint: Endpoint, text: &[u8]) -> Option<Self> {
        let mut seen = Self::default();
        let mut inner = None;
        json::members(text, |member| {
            let value = member.value(text);
            match &*member.name(text) {
                b"usage" if value.starts_with(b"{") => seen.counts = Some(Counts::read(value)),
                b"service_tier" => seen.tier = served_tier(value),
                b"model" => seen.model = owned(value),
                b"id" => seen.id = owned(value),
                b"error" => seen.has_error = value != b"null",
                b"background" => seen.is_background = value == b"true",
                b"object" => seen.is_batch = value == b"\"batch\"",
                b"response" | b"message" | b"body" if value.starts_with(b"{") => {
                    inner = Some(member.value.clone());
                }
                _ => {}
            }
        })
        .ok()?;
        if let Some(inner) = inner.and_then(|range| Self::read(endpoint, &text[range])) {
            seen.take_in(inner);
        }
        if matches!(endpoint, Endpoint::Batches | Endpoint::Files) {
            seen.tier = Some(Tier::Batch);
        }
        Some(seen)
    }

    /// A response inside an event or a batch's line says more of itself than its envelope does.
    fn take_in(&mut self, inner: Self) {
        self.counts = inner.counts.or(self.counts);
        self.tier = inner.tier.or(self.tier);
        self.model = inner.model.or(self.model.take());
        self.id = inner.id.or(self.id.take());
        self.has_error |= inner.has_error;
        self.is_background |= inner.is_background;
    }

    pub(super) fn reported(&self, endpoint: Endpoint) -> Option<Reported> {
        // A batch object sums up what its output file says line by line.
        if self.is_batch {
            return None;
        }
        Some(Reported {
            usage: self.counts?.usage(endpoint)?,
            tier: self.tier.unwrap_or_default(),
            model: self.model.clone(),
            id: self.id.clone(),
            is_background: self.is_background,
        })
    }
}

fn served_tier(value: &[u8]) -> Option<Tier> {
    json::string(value).and_then(|tier| Tier::named(&tier))
}

fn owned(value: &[u8]) -> Option<String> {
    json::string(value).filter(|text| !text.is_empty()).map(std::borrow::Cow::into_owned)
}

/// The members of a `usage` object, as far as they are present.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counts {
    input: Option<u64>,
    output: Option<u64>,
    total: Option<u64>,
    cached: Option<u64>,
    cache_write: Option<u64>,
    audio_input: Option<u64>,
    image_input: Option<u64>,
    cached_audio: Option<u64>,
    cached_image: Option<u64>,
    reasoning: Option<u64>,
    audio_output: Option<u64>,
    image_output: Option<u64>,
    text_output: Option<u64>,
    /// Anthropic's, which are not part of `input`.
    cache_read_beside: Option<u64>,
    cache_write_beside: Option<u64>,
}

impl Counts {
    pub(super) fn read(usage: &[u8]) -> Self {
        let mut counts = Self::default();
        // What is malformed behind a count does not take it back.
        let _read_so_far = counts.read_members(&mut Cursor::new(usage));
        counts
    }

    fn read_members(&mut self, usage: &mut Cursor<'_>) -> Result<(), JsonError> {
        usage.visit(&mut |value, name| {
            match name {
                b"prompt_tokens" | b"input_tokens" => self.input = value.whole_number()?.or(self.input),
                b"completion_tokens" | b"output_tokens" => {
                    self.output = value.whole_number()?.or(self.output);
                }
                b"total_tokens" => self.total = value.whole_number()?,
                b"prompt_cache_hit_tokens" => self.cached = self.cached.or(value.whole_number()?),
                b"cache_read_input_tokens" => self.cache_read_beside = value.whole_number()?,
                b"cache_creation_input_tokens" => self.cache_write_beside = value.whole_number()?,
                b"prompt_tokens_details" | b"input_tokens_details" | b"input_token_details" => {
                    self.read_input_details(value)?;
                }
                b"completion_tokens_details" | b"output_tokens_details" | b"output_token_details" => {
                    self.read_output_details(value)?;
                }
                _ => drop(value.skip()?),
            }
            Ok(())
        })
    }

    fn read_input_details(&mut self, details: &mut Cursor<'_>) -> Result<(), JsonError> {
        details.visit(&mut |value, name| {
            match name {
                b"cached_tokens" => self.cached = value.whole_number()?.or(self.cached),
                b"cache_write_tokens" | b"cache_creation_tokens" => {
                    self.cache_write = value.whole_number()?.or(self.cache_write);
                }
                b"audio_tokens" => self.audio_input = value.whole_number()?,
                b"image_tokens" => self.image_input = value.whole_number()?,
                b"cached_tokens_details" => {
                    let cached = value.skip()?;
                    self.cached_audio = json::member(cached, "audio_tokens").and_then(json::whole_number);
                    self.cached_image = json::member(cached, "image_tokens").and_then(json::whole_number);
                }
                _ => drop(value.skip()?),
            }
            Ok(())
        })
    }

    fn read_output_details(&mut self, details: &mut Cursor<'_>) -> Result<(), JsonError> {
        details.visit(&mut |value, name| {
            match name {
                b"reasoning_tokens" => self.reasoning = value.whole_number()?,
                b"audio_tokens" => self.audio_output = value.whole_number()?,
                b"image_tokens" => self.image_output = value.whole_number()?,
                b"text_tokens" => self.text_output = value.whole_number()?,
                _ => drop(value.skip()?),
            }
            Ok(())
        })
    }

    /// These counts, and of earlier ones what these do not say. Anthropic tells the input when a message
    /// starts and the output as it grows.
    pub(super) fn over(self, earlier: Self) -> Self {
        Self {
            input: self.input.or(earlier.input),
            output: self.output.or(earlier.output),
            cache_read_beside: self.cache_read_beside.or(earlier.cache_read_beside),
            cache_write_beside: self.cache_write_beside.or(earlier.cache_write_beside),
            ..self
        }
    }

    /// These counts and the output of another choice, which was made from the same input.
    pub(super) fn with_choice(self, other: Self) -> Self {
        let sum = |mine: Option<u64>, others: Option<u64>| match (mine, others) {
            (Some(mine), Some(others)) => Some(mine.saturating_add(others)),
            (mine, others) => mine.or(others),
        };
        let total = sum(self.total, other.output);
        Self {
            output: sum(self.output, other.output),
            reasoning: sum(self.reasoning, other.reasoning),
            total: total.filter(|_| other.output.is_some()),
            ..self
        }
    }

    /// The normal form; `None` when neither input nor output was counted (speech billed by the second).
    pub(super) fn usage(self, endpoint: Endpoint) -> Option<Usage> {
        if self.input.is_none() && self.output.is_none() {
            return None;
        }
        let mut usage = Usage {
            input_tokens: self.input.unwrap_or(0),
            cached_input_tokens: self.cached.unwrap_or(0),
            cache_write_tokens: self.cache_write.unwrap_or(0),
            audio_input_tokens: fresh(self.audio_input, self.cached_audio),
            image_input_tokens: fresh(self.image_input, self.cached_image),
            output_tokens: self.output.unwrap_or(0),
            reasoning_tokens: self.reasoning.unwrap_or(0),
            audio_output_tokens: self.audio_output.unwrap_or(0),
            image_output_tokens: self.image_output.unwrap_or(0),
        };
        if endpoint == Endpoint::Messages {
            usage.cached_input_tokens = self.cache_read_beside.unwrap_or(0);
            usage.cache_write_tokens = self.cache_write_beside.unwrap_or(0);
            usage.input_tokens = usage
                .input_tokens
                .saturating_add(usage.cached_input_tokens)
                .saturating_add(usage.cache_write_tokens);
        }
        self.take_in_reasoning(&mut usage);
        self.attribute_media(endpoint, &mut usage);
        Some(usage.normalised())
    }

    fn take_in_reasoning(self, usage: &mut Usage) {
        let beyond = self
            .total
            .and_then(|total| total.checked_sub(usage.input_tokens.checked_add(usage.output_tokens)?));
        if usage.reasoning_tokens > 0 && beyond == Some(usage.reasoning_tokens) {
            usage.output_tokens = usage.output_tokens.saturating_add(usage.reasoning_tokens);
        }
    }

    /// Endpoints whose output is one medium do not always say so.
    fn attribute_media(self, endpoint: Endpoint, usage: &mut Usage) {
        let says_nothing =
            self.audio_output.is_none() && self.image_output.is_none() && self.text_output.is_none();
        match endpoint {
            Endpoint::Images if says_nothing => usage.image_output_tokens = usage.output_tokens,
            Endpoint::AudioSpeech if says_nothing => usage.audio_output_tokens = usage.output_tokens,
            _ => {}
        }
    }
}

/// Media tokens that the cache did not cover.
fn fresh(all: Option<u64>, cached: Option<u64>) -> u64 {
    all.unwrap_or(0).saturating_sub(cached.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn usage(endpoint: Endpoint, body: &str) -> Usage {
        from_body(endpoint, body.as_bytes()).unwrap().usage
    }

    #[test]
    fn chat_usage_has_parts_of_totals() {
        let reported = from_body(
            Endpoint::ChatCompletions,
            br#"{"id":"chatcmpl-1","model":"gpt-4o-2024-08-06","service_tier":"priority","choices":[{"message":{"content":"\"usage\":{\"prompt_tokens\":9}"}}],
            "usage":{"prompt_tokens":100,"completion_tokens":50,"total_tokens":150,
            "prompt_tokens_details":{"cached_tokens":40,"audio_tokens":5,"cache_write_tokens":10},
            "completion_tokens_details":{"reasoning_tokens":20,"audio_tokens":3}}}"#,
        )
        .unwrap();
        let expected = Usage {
            input_tokens: 100,
            cached_input_tokens: 40,
            cache_write_tokens: 10,
            audio_input_tokens: 5,
            output_tokens: 50,
            reasoning_tokens: 20,
            audio_output_tokens: 3,
            ..Usage::default()
        };
        assert_eq!((reported.usage, reported.tier), (expected, Tier::Priority));
    }

    #[test]
    fn usage_that_is_not_at_the_end_is_found_with_all_else() {
        for body in [
            format!(
                r#"{{"id":"c","usage":{{"prompt_tokens":8}},"model":"m","x":"{}"}}"#,
                "x".repeat(END_BYTES)
            ),
            r#"{"id":"c","us\u0061ge":{"prompt_tokens":8},"model":"m"}"#.to_owned(),
            r#"{"id":"c","usage":{"prompt_tokens":8},"model":"m","x":{"usage":{"prompt_tokens":9}}}"#
                .to_owned(),
            r#"{"id":"c","usage":{"prompt_tokens":8},"model":"m","usage":null}"#.to_owned(),
            r#"{"id":"c","usage":{"prompt_tokens":8},"model":"m","x":["usage"]}"#.to_owned(),
        ] {
            let reported = from_body(Endpoint::ChatCompletions, body.as_bytes()).unwrap();
            assert_eq!(reported.usage, Usage::new(8, 0), "{body}");
            assert_eq!((reported.id.as_deref(), reported.model.as_deref()), (Some("c"), Some("m")));
        }
    }

    #[test]
    fn what_only_looks_like_usage_at_the_end_is_not_taken_for_it() {
        for body in [
            r#"{"x":"\"usage\":{\"prompt_tokens\":8}"}"#,
            r#"{"x":"a,\"usage":{"prompt_tokens":8}}"#,
            r#"{"x":{"usage":{"prompt_tokens":8}}}"#,
            r#"{"x":[{"usage":{"prompt_tokens":8}}]}"#,
            r#"{"usage":{"prompt_tokens":8"#,
            r#"{"usage":{"prompt_tokens":8}} trailing"#,
        ] {
            assert_eq!(from_body(Endpoint::ChatCompletions, body.as_bytes()), None, "{body}");
        }
    }

    fn any_answer() -> impl Strategy<Value = String> {
        let text = r#"[a"\\,{}:é]{0,6}|usage|service_tier"#;
        let leaf = prop_oneof![
            Just(serde_json::json!({"prompt_tokens": 3, "completion_tokens": 4})),
            Just(Value::Null),
            text.prop_map(Value::from),
        ];
        let value = leaf.prop_recursive(3, 16, 4, move |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::btree_map(text, inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        });
        let name = prop_oneof![Just("usage".to_owned()), Just("service_tier".to_owned()), text];
        let tier = Just(Value::from("flex"));
        let members = proptest::collection::vec((name, prop_oneof![value, tier]), 0..8);
        members.prop_map(|members| {
            let member = |(name, value)| format!("{}:{value}", Value::String(name));
            format!("{{{}}}", members.into_iter().map(member).collect::<Vec<_>>().join(", "))
        })
    }

    proptest! {
        #[test]
        fn the_end_says_what_the_whole_says(body in any_answer()) {
            let endpoint = Endpoint::ChatCompletions;
            if let Some(end) = from_end(endpoint, body.as_bytes()) {
                let whole = Sighting::read(endpoint, body.as_bytes()).unwrap().reported(endpoint).unwrap();
                prop_assert_eq!((end.usage, end.tier), (whole.usage, whole.tier));
            }
        }
    }

    #[test]
    fn nulls_and_absent_details_count_nothing() {
        let body = r#"{"usage":{"prompt_tokens":25,"total_tokens":33,"completion_tokens":8,"prompt_tokens_details":null}}"#;
        assert_eq!(usage(Endpoint::ChatCompletions, body), Usage::new(25, 8));
        assert_eq!(
            usage(
                Endpoint::Embeddings,
                r#"{"data":[[0.1,0.2]],"usage":{"prompt_tokens":8,"total_tokens":8}}"#
            ),
            Usage::new(8, 0)
        );
        assert_eq!(from_body(Endpoint::ChatCompletions, br#"{"usage":null}"#), None);
        assert_eq!(
            from_body(
                Endpoint::AudioTranscriptions,
                br#"{"text":"x","usage":{"type":"duration","seconds":3}}"#
            ),
            None
        );
        assert_eq!(from_body(Endpoint::ChatCompletions, b"not json"), None);
    }

    #[test]
    fn anthropic_counts_its_cache_outside_its_input() {
        let body = r#"{"type":"message","usage":{"cache_read_input_tokens":18,"cache_creation_input_tokens":3,"input_tokens":9,"output_tokens":8}}"#;
        let expected = Usage { cache_write_tokens: 3, ..Usage::new(30, 8).with_cached(18) };
        assert_eq!(usage(Endpoint::Messages, body), expected);
    }

    #[test]
    fn reasoning_that_stands_outside_the_output_is_taken_in() {
        let outside = r#"{"usage":{"prompt_tokens":10,"completion_tokens":5,"total_tokens":45,"completion_tokens_details":{"reasoning_tokens":30}}}"#;
        assert_eq!(usage(Endpoint::ChatCompletions, outside).output_tokens, 35);
        let inside = r#"{"usage":{"prompt_tokens":10,"completion_tokens":35,"total_tokens":45,"completion_tokens_details":{"reasoning_tokens":30}}}"#;
        assert_eq!(usage(Endpoint::ChatCompletions, inside).output_tokens, 35);
    }

    #[test]
    fn realtime_usage_is_split_by_medium_and_cache() {
        let body = r#"{"type":"response.done","response":{"id":"resp_1","usage":{"total_tokens":253,"input_tokens":132,"output_tokens":121,
            "input_token_details":{"text_tokens":32,"audio_tokens":100,"cached_tokens":64,"cached_tokens_details":{"text_tokens":0,"audio_tokens":64}},
            "output_token_details":{"text_tokens":30,"audio_tokens":91}}}}"#;
        let expected =
            Usage { audio_input_tokens: 36, audio_output_tokens: 91, ..Usage::new(132, 121).with_cached(64) };
        assert_eq!(usage(Endpoint::Realtime, body), expected);
    }

    #[test]
    fn an_image_is_image_output_and_speech_is_audio_output() {
        let body = r#"{"usage":{"total_tokens":100,"input_tokens":50,"output_tokens":50,"input_tokens_details":{"text_tokens":10,"image_tokens":40}}}"#;
        let expected = Usage { image_input_tokens: 40, image_output_tokens: 50, ..Usage::new(50, 50) };
        assert_eq!(usage(Endpoint::Images, body), expected);
        let body = r#"{"type":"speech.audio.done","usage":{"input_tokens":14,"output_tokens":101,"total_tokens":115}}"#;
        assert_eq!(usage(Endpoint::AudioSpeech, body).audio_output_tokens, 101);
    }

    #[test]
    fn a_batch_is_billed_by_the_lines_of_its_output() {
        let lines = concat!(
            r#"{"id":"batch_req_1","custom_id":"a","response":{"status_code":200,"body":{"id":"c1","model":"gpt-4o","usage":{"prompt_tokens":7,"completion_tokens":2}}},"error":null}"#,
            "\n",
            r#"{"id":"batch_req_2","custom_id":"b","response":{"status_code":400,"body":{"error":{}}},"error":null}"#,
            "\n",
            r#"{"id":"batch_req_3","custom_id":"c","response":{"status_code":200,"body":{"id":"c3","model":"gpt-4o","usage":{"prompt_tokens":1,"completion_tokens":1}}}}"#,
            "\n",
        );
        let found: Vec<Reported> = from_batch_output(lines.as_bytes()).collect();
        assert_eq!(
            found.iter().map(|line| (line.id.as_deref(), line.tier)).collect::<Vec<_>>(),
            [(Some("c1"), Tier::Batch), (Some("c3"), Tier::Batch)]
        );
        assert_eq!(found.iter().map(|line| line.usage.total_tokens()).sum::<u64>(), 11);
        assert_eq!(
            from_body(
                Endpoint::Batches,
                br#"{"object":"batch","usage":{"input_tokens":8,"output_tokens":3}}"#
            ),
            None
        );
    }

    #[test]
    fn moderations_are_free_and_say_so() {
        let reported =
            from_body(Endpoint::Moderations, br#"{"id":"m","model":"omni-moderation-latest","results":[]}"#)
                .unwrap();
        assert_eq!(reported.usage, Usage::default());
    }

    #[test]
    fn a_tail_shows_the_last_usage_object() {
        let tail = br#"345,0.1],"index":1}],"model":"m","usage":{"prompt_tokens":8,"total_tokens":8}}"#;
        assert_eq!(from_tail(Endpoint::Embeddings, tail), Some(Usage::new(8, 0)));
        assert_eq!(from_tail(Endpoint::ChatCompletions, br#"\"usage\":{\"prompt_tokens\":8}"}"#), None);
    }

    #[test]
    fn parts_never_exceed_their_totals() {
        let body = r#"{"usage":{"prompt_tokens":5,"completion_tokens":5,"prompt_tokens_details":{"cached_tokens":50},"completion_tokens_details":{"reasoning_tokens":9}}}"#;
        let usage = usage(Endpoint::ChatCompletions, body);
        assert_eq!((usage.cached_input_tokens, usage.reasoning_tokens), (5, 5));
    }

    #[test]
    fn a_served_tier_is_the_responses_own() {
        let tier = |name: &str| {
            let body = format!(r#"{{"service_tier":{name},"usage":{{"prompt_tokens":1}}}}"#);
            from_body(Endpoint::ChatCompletions, body.as_bytes()).unwrap().tier
        };
        assert_eq!(
            [tier("\"default\""), tier("\"flex\""), tier("null"), tier("\"ultrafast\"")],
            [Tier::Standard, Tier::Flex, Tier::Standard, Tier::Ultrafast]
        );
    }
}
