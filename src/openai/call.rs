//! A request body, as far as routing and accounting must know it.
//!
//! One borrowed walk ([`super::json`]) finds the top-level members; no tree is built and nested values are
//! skipped, not parsed. What was found stays as positions, so that [`Call::rewrite`] changes single members
//! and keeps every other byte.

use bytes::Bytes;

use super::json::{self, JsonError, Member, Watcher};
use super::{ApiError, Endpoint};
use crate::economics::Tier;

/// Strings longer than this are taken for media when they look like it: data URLs, base64 audio.
const MEDIA_BYTES: usize = 512;

/// What an answer needs from the server that gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts about a request")]
pub struct Needs {
    pub tools: bool,
    pub json_schema: bool,
    pub vision: bool,
    pub audio: bool,
    pub logprobs: bool,
    /// Only OpenAI can serve it: it refers to what OpenAI keeps (`previous_response_id`, `conversation`, a
    /// stored prompt, a file, background mode) or to tools that OpenAI runs (web search, code interpreter).
    pub hosted: bool,
}

/// A request for one of the endpoints that are understood. Made by [`Call::read`].
#[derive(Debug, Clone, PartialEq)]
pub struct Call {
    pub endpoint: Endpoint,
    /// As the client wrote it; empty when the body has none.
    pub model: String,
    pub stream: bool,
    /// The answer comes before the response is there, which is read later.
    pub background: bool,
    /// The client itself asked for `stream_options.include_usage`.
    pub wants_usage: bool,
    /// `max_completion_tokens`, `max_tokens` or `max_output_tokens`, whichever the endpoint goes by.
    pub max_output_tokens: Option<u64>,
    /// Choices asked for: `n`, or a larger `best_of`. At least 1.
    pub choices: u32,
    pub needs: Needs,
    /// Bytes of prompt, messages, instructions and tools as written, without media: the base of estimates.
    pub input_bytes: usize,
    /// Images and audio clips in the input.
    pub media_parts: u32,
    /// The tier that was asked for; `auto` asks for none.
    pub service_tier: Option<Tier>,
    pub(super) members: Vec<Member>,
    /// Where the first string `user` is in the body, within the quotes: the role of the first question.
    pub(super) first_user: Option<usize>,
    /// Positions in `members`.
    pub(super) model_member: Option<usize>,
    pub(super) stream_options_member: Option<usize>,
}

impl Call {
    /// Reads a JSON body. Of duplicated members the last counts, as it does for servers. A member whose type
    /// is wrong counts as absent: the server answers for that.
    ///
    /// # Errors
    /// 400 in OpenAI's shape when the body is not one JSON object.
    pub fn read(endpoint: Endpoint, body: &Bytes) -> Result<Self, ApiError> {
        let mut content = Content::default();
        let mut members = Vec::with_capacity(16);
        json::members_watched(body, &mut content, |member| members.push(member)).map_err(not_json)?;
        let mut call = Self::of_content(endpoint, &content);
        let mut limits = Limits::default();
        for (index, member) in members.iter().enumerate() {
            call.note(index, &member.name(body), member.value(body), &mut limits);
        }
        call.input_bytes = call.input_bytes.saturating_sub(content.media_bytes);
        call.max_output_tokens = limits.of(endpoint);
        call.members = members;
        call.first_user = content.first_user.map(|address| address - body.as_ptr().addr());
        Ok(call)
    }

    fn of_content(endpoint: Endpoint, content: &Content) -> Self {
        let needs = Needs {
            vision: content.images > 0,
            audio: content.clips > 0,
            logprobs: content.includes_logprobs,
            hosted: content.is_hosted,
            ..Needs::default()
        };
        Self {
            endpoint,
            model: String::new(),
            stream: false,
            background: false,
            wants_usage: false,
            max_output_tokens: None,
            choices: 1,
            needs,
            input_bytes: 0,
            media_parts: content.images + content.clips,
            service_tier: None,
            members: Vec::new(),
            first_user: None,
            model_member: None,
            stream_options_member: None,
        }
    }

    fn note(&mut self, index: usize, name: &[u8], value: &[u8], limits: &mut Limits) {
        let is_null = value == b"null";
        match name {
            b"model" => {
                self.model = json::string(value).unwrap_or_default().into_owned();
                self.model_member = Some(index);
            }
            b"stream" => self.stream = value == b"true",
            b"stream_options" => {
                self.wants_usage = json::member(value, "include_usage") == Some(b"true");
                self.stream_options_member = Some(index);
            }
            b"max_tokens" => limits.tokens = json::whole_number(value),
            b"max_completion_tokens" => limits.completion_tokens = json::whole_number(value),
            b"max_output_tokens" => limits.output_tokens = json::whole_number(value),
            b"n" | b"best_of" => {
                let choices = json::whole_number(value).and_then(|number| u32::try_from(number).ok());
                self.choices = self.choices.max(choices.unwrap_or(1));
            }
            b"prompt" if self.endpoint == Endpoint::Responses => self.needs.hosted |= !is_null,
            b"messages" | b"input" | b"prompt" | b"instructions" | b"system" => {
                self.input_bytes += value.len();
            }
            b"tools" | b"functions" => {
                self.input_bytes += value.len();
                self.needs.tools |= !is_null && json::value_has_items(value);
            }
            b"response_format" => self.needs.json_schema = wants_schema(Some(value)),
            b"text" => self.needs.json_schema = wants_schema(json::member(value, "format")),
            b"modalities" => self.needs.audio |= memchr::memmem::find(value, b"\"audio\"").is_some(),
            b"logprobs" => self.needs.logprobs |= !is_null && value != b"false",
            b"top_logprobs" => self.needs.logprobs |= json::whole_number(value).is_some_and(|top| top > 0),
            b"previous_response_id" | b"conversation" | b"web_search_options" => {
                self.needs.hosted |= !is_null;
            }
            b"background" => {
                self.background = self.endpoint == Endpoint::Responses && value == b"true";
                self.needs.hosted |= value == b"true";
            }
            b"service_tier" => {
                self.service_tier = json::string(value).and_then(|tier| Tier::named(&tier));
            }
            _ => {}
        }
    }
}

fn not_json(error: JsonError) -> ApiError {
    ApiError::invalid_request(format!(
        "we could not parse the JSON body of your request ({error}); the API expects a JSON object"
    ))
}

fn wants_schema(format: Option<&[u8]>) -> bool {
    let kind = format.and_then(|format| json::member(format, "type"));
    kind.and_then(json::string).is_some_and(|kind| kind == "json_schema")
}

/// The three names of the limit on output.
#[derive(Debug, Default)]
struct Limits {
    tokens: Option<u64>,
    completion_tokens: Option<u64>,
    output_tokens: Option<u64>,
}

impl Limits {
    fn of(self, endpoint: Endpoint) -> Option<u64> {
        match endpoint {
            Endpoint::Responses => self.output_tokens,
            Endpoint::Completions => self.tokens,
            _ => self.completion_tokens.or(self.tokens),
        }
    }
}

/// What the strings of a request say about it, seen one after the other as they are skipped.
#[derive(Debug, Default)]
struct Content {
    part: Part,
    key: Key,
    images: u32,
    clips: u32,
    media_bytes: usize,
    is_hosted: bool,
    includes_logprobs: bool,
    /// Address of the first string `user` of the input.
    first_user: Option<usize>,
}

/// The top-level member that the walk is in.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
enum Part {
    Input,
    Tools,
    Include,
    #[default]
    Elsewhere,
}

/// The key of the string at hand, where it matters.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
enum Key {
    Type,
    Data,
    #[default]
    Other,
}

impl Watcher for Content {
    #[inline]
    fn member(&mut self, name: &[u8]) {
        self.part = match name {
            b"messages" | b"input" => Part::Input,
            b"tools" => Part::Tools,
            b"include" => Part::Include,
            _ => Part::Elsewhere,
        };
    }

    #[inline]
    fn string(&mut self, raw: &[u8], is_key: bool) {
        if self.part == Part::Elsewhere {
            return;
        }
        if is_key {
            self.key = match raw {
                b"type" => Key::Type,
                b"data" => Key::Data,
                _ => Key::Other,
            };
            self.is_hosted |= self.part == Part::Input && raw == b"file_id";
            return;
        }
        match self.part {
            Part::Input => self.input_string(raw),
            Part::Tools => self.is_hosted |= self.key == Key::Type && is_hosted_tool(raw),
            Part::Include => self.includes_logprobs |= raw == b"message.output_text.logprobs",
            Part::Elsewhere => {}
        }
    }
}

impl Content {
    #[inline]
    fn input_string(&mut self, raw: &[u8]) {
        if raw.len() > MEDIA_BYTES {
            if self.key == Key::Data || raw.starts_with(b"data:") {
                self.media_bytes += raw.len();
            }
            return;
        }
        if self.key != Key::Type {
            if raw == b"user" && self.first_user.is_none() {
                self.first_user = Some(raw.as_ptr().addr());
            }
            return;
        }
        match raw {
            b"image_url" | b"input_image" | b"image" | b"video_url" => self.images += 1,
            b"input_audio" | b"audio_url" => self.clips += 1,
            b"file" | b"input_file" | b"item_reference" => self.is_hosted = true,
            _ => {}
        }
    }
}

fn is_hosted_tool(kind: &[u8]) -> bool {
    const HOSTED: [&[u8]; 6] =
        [b"web_search", b"file_search", b"code_interpreter", b"image_generation", b"computer", b"mcp"];
    HOSTED.iter().any(|name| kind.starts_with(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(endpoint: Endpoint, body: &str) -> Call {
        Call::read(endpoint, &Bytes::from(body.to_owned())).unwrap()
    }

    fn chat(body: &str) -> Call {
        call(Endpoint::ChatCompletions, body)
    }

    #[test]
    fn the_members_that_matter_are_read() {
        let call = chat(
            r#"{"model":"gpt-4o-mini","messages":[{"role":"user","content":"hi"}],"stream":true,
               "stream_options":{"include_usage":true},"max_tokens":9,"max_completion_tokens":5,"n":2,
               "service_tier":"flex"}"#,
        );
        assert_eq!((call.model.as_str(), call.stream, call.wants_usage), ("gpt-4o-mini", true, true));
        assert_eq!((call.max_output_tokens, call.choices, call.service_tier), (Some(5), 2, Some(Tier::Flex)));
        assert_eq!(call.input_bytes, r#"[{"role":"user","content":"hi"}]"#.len());
        assert_eq!(call.needs, Needs::default());
    }

    #[test]
    fn a_model_is_the_same_however_it_is_escaped() {
        assert_eq!(chat(r#"{"model":"meta-llama\/Llama-3.1-8B"}"#).model, "meta-llama/Llama-3.1-8B");
        assert_eq!(chat(r#"{"mod\u0065l":"\u0067pt"}"#).model, "gpt");
    }

    #[test]
    fn the_last_of_duplicates_counts() {
        let call = chat(r#"{"model":"a","stream":true,"model":"b","stream":false}"#);
        assert_eq!((call.model.as_str(), call.stream), ("b", false));
    }

    #[test]
    fn what_is_absent_or_of_a_wrong_type_has_its_default() {
        for body in
            ["{}", r#"{"model":7,"stream":"yes","n":-1,"max_tokens":null,"stream_options":3,"tools":null}"#]
        {
            let call = chat(body);
            assert_eq!((call.model.as_str(), call.stream, call.choices), ("", false, 1));
            assert_eq!((call.max_output_tokens, call.wants_usage, call.needs.tools), (None, false, false));
        }
    }

    #[test]
    fn what_an_answer_needs_is_seen() {
        let image = r#"{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"http://x"}}]}]}"#;
        assert!(chat(image).needs.vision);
        assert!(
            chat(r#"{"messages":[{"content":[{"type":"input_audio","input_audio":{"data":"x"}}]}]}"#)
                .needs
                .audio
        );
        assert!(chat(r#"{"modalities":["text","audio"]}"#).needs.audio);
        assert!(chat(r#"{"tools":[{"type":"function"}]}"#).needs.tools);
        assert!(!chat(r#"{"tools":[ ]}"#).needs.tools);
        assert!(chat(r#"{"response_format":{"type":"json_schema"}}"#).needs.json_schema);
        assert!(!chat(r#"{"response_format":{"type":"json_object"}}"#).needs.json_schema);
        assert!(chat(r#"{"logprobs":true}"#).needs.logprobs && !chat(r#"{"logprobs":false}"#).needs.logprobs);
        let responses = |body| call(Endpoint::Responses, body).needs;
        assert!(responses(r#"{"text":{"format":{"type":"json_schema"}}}"#).json_schema);
        assert!(responses(r#"{"previous_response_id":"resp_1"}"#).hosted);
        assert!(responses(r#"{"tools":[{"type":"web_search_preview"}]}"#).hosted);
        assert!(!responses(r#"{"tools":[{"type":"function","name":"web_search"}]}"#).hosted);
        assert!(responses(r#"{"include":["message.output_text.logprobs"]}"#).logprobs);
        assert!(responses(r#"{"input":[{"content":[{"type":"input_file","file_id":"f"}]}]}"#).hosted);
    }

    #[test]
    fn words_in_text_are_not_needs() {
        let quoted = r#"{"messages":[{"role":"user","content":"{\"type\":\"image_url\"} \"type\": \"input_audio\""}]}"#;
        assert_eq!(chat(quoted).needs, Needs::default());
        assert_eq!(chat(r#"{"messages":[{"type":"text","text":"image_url"}]}"#).needs, Needs::default());
    }

    #[test]
    fn media_is_not_counted_as_text() {
        let data = "A".repeat(10_000);
        let body = format!(
            r#"{{"messages":[{{"content":[{{"type":"image_url","image_url":{{"url":"data:image/png;base64,{data}"}}}},
               {{"type":"input_audio","input_audio":{{"data":"{data}","format":"wav"}}}}]}}]}}"#
        );
        let call = chat(&body);
        assert_eq!(call.media_parts, 2);
        assert!(call.input_bytes < 300, "{}", call.input_bytes);
    }

    #[test]
    fn each_endpoint_has_its_own_limit() {
        let body = r#"{"max_tokens":1,"max_completion_tokens":2,"max_output_tokens":3}"#;
        assert_eq!(call(Endpoint::Completions, body).max_output_tokens, Some(1));
        assert_eq!(call(Endpoint::ChatCompletions, body).max_output_tokens, Some(2));
        assert_eq!(call(Endpoint::Responses, body).max_output_tokens, Some(3));
        assert_eq!(chat(r#"{"max_tokens":-1}"#).max_output_tokens, None);
    }

    #[test]
    fn a_body_that_is_no_object_is_the_clients_mistake() {
        for body in ["", "[]", "{\"model\":", "nonsense"] {
            let error = Call::read(Endpoint::ChatCompletions, &Bytes::from(body)).unwrap_err();
            assert_eq!((error.status.as_u16(), error.kind), (400, "invalid_request_error"), "{body}");
        }
    }
}
