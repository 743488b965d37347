//! What an endpoint answers, before anything is sent: a whole body or the events of a stream.

use bytes::Bytes;
use memchr::memmem;
use serde_json::{Value, json};

use super::errors::{self, Failure};
use super::script::{Behaviour, UsageStyle};
use super::text;
use super::{Personality, Settings, Verbatim};
use crate::economics::Usage;

/// A request, as the endpoints see it.
#[derive(Debug)]
pub(super) struct Ask<'a> {
    pub(super) personality: Personality,
    pub(super) settings: &'a Settings,
    pub(super) behaviour: &'a Behaviour,
    pub(super) method: &'a str,
    /// Below `/v1`, without the query.
    pub(super) path: &'a str,
    pub(super) content_type: &'a str,
    pub(super) body: &'a Bytes,
    pub(super) json: Value,
    /// Number of the request; ids are made from it.
    pub(super) number: u64,
    /// Seconds since the Unix epoch.
    pub(super) created: u64,
}

#[derive(Debug)]
pub(super) struct Answer {
    pub(super) content_type: &'static str,
    pub(super) payload: Payload,
    /// What the whole answer takes.
    pub(super) usage: Usage,
    /// Whether it takes a slot and time per token.
    pub(super) generates: bool,
}

#[derive(Debug)]
pub(super) enum Payload {
    Whole(Bytes),
    Events(Vec<Event>),
}

/// One event of a stream.
#[derive(Debug, Clone)]
pub(super) struct Event {
    /// As it is on the wire, to its empty line.
    pub(super) text: Bytes,
    pub(super) output_tokens: u64,
    pub(super) reasoning_tokens: u64,
}

impl Event {
    /// `data: {..}` with how many tokens it brings.
    pub(super) fn data(value: &Value, output_tokens: u64) -> Self {
        Self { text: format!("data: {value}\n\n").into(), output_tokens, reasoning_tokens: 0 }
    }

    /// `event: NAME` and `data: {..}`.
    pub(super) fn named(name: &str, value: &Value, output_tokens: u64) -> Self {
        Self { text: format!("event: {name}\ndata: {value}\n\n").into(), output_tokens, reasoning_tokens: 0 }
    }

    pub(super) fn done() -> Self {
        Self { text: Bytes::from_static(b"data: [DONE]\n\n"), output_tokens: 0, reasoning_tokens: 0 }
    }
}

impl Answer {
    /// JSON at once, without generation.
    pub(super) fn json(value: &Value) -> Self {
        Self::whole("application/json", Bytes::from(value.to_string()))
    }

    pub(super) fn whole(content_type: &'static str, body: Bytes) -> Self {
        Self { content_type, payload: Payload::Whole(body), usage: Usage::default(), generates: false }
    }

    pub(super) fn events(events: Vec<Event>) -> Self {
        let content_type = "text/event-stream; charset=utf-8";
        Self { content_type, payload: Payload::Events(events), usage: Usage::default(), generates: true }
    }

    /// Bytes as they are, event by event if they are a stream. What they claim to have used is not counted.
    pub(super) fn verbatim(verbatim: &Verbatim) -> Self {
        let Verbatim { content_type, body } = verbatim;
        if !content_type.starts_with("text/event-stream") {
            return Self::whole(content_type, body.clone()).generating(Usage::default());
        }
        let ends = memmem::find_iter(body, "\n\n").map(|end| end + 2).chain([body.len()]);
        let event = |start: &mut usize, end| {
            let text = body.slice(std::mem::replace(start, end)..end);
            Some(Event { text, output_tokens: 0, reasoning_tokens: 0 })
        };
        Self { content_type, ..Self::events(ends.scan(0, event).collect()) }
    }

    pub(super) fn generating(self, usage: Usage) -> Self {
        Self { usage, generates: true, ..self }
    }
}

/// The reply of a model, decided before it is dressed for an endpoint.
#[derive(Debug, Clone)]
pub(super) struct Reply {
    pub(super) content: Content,
    pub(super) usage: Usage,
    /// Whether the limit of the request cut it.
    pub(super) cut: bool,
    pub(super) choices: u64,
}

#[derive(Debug, Clone)]
pub(super) enum Content {
    /// Pieces and what each is worth in tokens.
    Text(Vec<(String, u64)>),
    Call {
        name: String,
        arguments: String,
        tokens: u64,
    },
}

impl Content {
    pub(super) fn text(&self) -> String {
        match self {
            Self::Text(pieces) => pieces.iter().map(|(piece, _)| piece.as_str()).collect(),
            Self::Call { .. } => String::new(),
        }
    }
}

impl Ask<'_> {
    pub(super) fn member(&self, name: &str) -> Option<&Value> {
        self.json.get(name).filter(|value| !value.is_null())
    }

    pub(super) fn number(&self, name: &str) -> Option<u64> {
        self.member(name).and_then(Value::as_u64)
    }

    pub(super) fn flag(&self, name: &str) -> bool {
        self.member(name).and_then(Value::as_bool).unwrap_or(false)
    }

    pub(super) fn text(&self, name: &str) -> Option<&str> {
        self.member(name).and_then(Value::as_str)
    }

    pub(super) fn asks_usage(&self) -> bool {
        let asked =
            self.json.pointer("/stream_options/include_usage").and_then(Value::as_bool).unwrap_or(false);
        asked && self.behaviour.usage == UsageStyle::AsAsked
    }

    pub(super) fn id(&self, prefix: &str) -> String {
        let mixed = self.number.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        format!("{prefix}{mixed:016x}{:08x}", self.number)
    }

    /// The model asked for, if this server has it. llama.cpp serves any name, and both self-hosted servers
    /// take a request without one.
    pub(super) fn model(&self) -> Result<String, Failure> {
        let models = &self.settings.models;
        match (self.text("model"), self.personality) {
            (None, Personality::OpenAi) => Err(errors::missing(self.personality, "model")),
            (None, _) | (Some(_), Personality::LlamaCpp) => Ok(models.first().cloned().unwrap_or_default()),
            (Some(name), _) if models.is_empty() || models.iter().any(|known| known == name) => {
                Ok(name.to_owned())
            }
            (Some(name), _) => Err(errors::unknown_model(self.personality, name, models)),
        }
    }

    /// The name under which the model answers: OpenAI says which snapshot served.
    pub(super) fn served_name(&self, model: &str) -> String {
        let snapshot = match (self.personality, model) {
            (Personality::OpenAi, "gpt-4o-mini") => "-2024-07-18",
            (Personality::OpenAi, "gpt-4o") => "-2024-08-06",
            (Personality::OpenAi, "gpt-4.1" | "gpt-4.1-mini" | "gpt-4.1-nano") => "-2025-04-14",
            _ => "",
        };
        format!("{model}{snapshot}")
    }

    /// What is replied to a prompt of `prompt_tokens`, with `limit` output tokens allowed.
    pub(super) fn reply(&self, prompt_tokens: u64, limit: Option<u64>) -> Result<Reply, Failure> {
        let window = self.settings.context_window;
        if prompt_tokens > window {
            return Err(errors::context_too_long(self.personality, prompt_tokens, window));
        }
        let limit = limit.unwrap_or(u64::MAX).min(window - prompt_tokens).max(1);
        let reasoning = self.settings.reasoning_tokens.min(limit.saturating_sub(1));
        let choices = self.number("n").unwrap_or(1).clamp(1, 128);
        let (content, tokens, cut) = self.content(limit - reasoning);
        let usage = Usage {
            cached_input_tokens: self.settings.cached_input_tokens.min(prompt_tokens),
            reasoning_tokens: reasoning * choices,
            ..Usage::new(prompt_tokens, (tokens + reasoning) * choices)
        };
        Ok(Reply { content, usage, cut, choices })
    }

    fn content(&self, limit: u64) -> (Content, u64, bool) {
        if let Some((name, arguments)) = self.tool_call() {
            let tokens = text::count(&name) + text::count(&arguments);
            return (Content::Call { name, arguments, tokens }, tokens, false);
        }
        if let Some(text) = self.structured() {
            let pieces = text::pieces(&text);
            let tokens = pieces.iter().map(|(_, tokens)| tokens).sum();
            return (Content::Text(pieces), tokens, false);
        }
        let wanted = self.settings.output_tokens;
        let tokens = wanted.min(limit);
        let words = text::words(self.seed(), tokens).map(|word| (word.to_owned(), 1)).collect();
        (Content::Text(words), tokens, wanted > limit)
    }

    fn seed(&self) -> u64 {
        let prompt = ["messages", "prompt", "input"].iter().find_map(|name| self.member(name));
        text::seed(prompt.map(ToString::to_string).unwrap_or_default().as_bytes())
    }

    /// JSON for `response_format` (chat) or `text.format` (responses).
    fn structured(&self) -> Option<String> {
        let format = self.member("response_format").or_else(|| self.json.pointer("/text/format"))?;
        match format.get("type")?.as_str()? {
            "json_schema" => {
                let schema = format.pointer("/json_schema/schema").or_else(|| format.get("schema"))?;
                Some(text::instance(schema).to_string())
            }
            "json_object" => Some(json!({"answer": "the right time"}).to_string()),
            _ => None,
        }
    }

    /// A call of the first tool, or of the one that must be called, unless a tool has just answered.
    fn tool_call(&self) -> Option<(String, String)> {
        let tools = self.member("tools")?.as_array()?;
        let choice = self.member("tool_choice");
        if choice.and_then(Value::as_str) == Some("none") || self.tool_has_answered() {
            return None;
        }
        let name_of = |tool: &Value| {
            tool.pointer("/function/name")
                .or_else(|| tool.get("name"))
                .and_then(Value::as_str)
                .map(str::to_owned)
        };
        let wanted = choice.and_then(name_of);
        let functions =
            || tools.iter().filter(|tool| tool.get("type").and_then(Value::as_str) == Some("function"));
        let tool = functions().find(|tool| wanted.is_none() || name_of(tool) == wanted)?;
        let schema = tool.pointer("/function/parameters").or_else(|| tool.get("parameters"));
        let arguments = schema.map_or_else(|| json!({}), text::instance);
        Some((name_of(tool)?, arguments.to_string()))
    }

    fn tool_has_answered(&self) -> bool {
        let turns = self.member("messages").or_else(|| self.member("input"));
        let Some(last) = turns.and_then(Value::as_array).and_then(|turns| turns.last()) else { return false };
        last.get("role").and_then(Value::as_str) == Some("tool")
            || last.get("type").and_then(Value::as_str) == Some("function_call_output")
    }
}
