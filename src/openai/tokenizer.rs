//! Token counts of our own, for when no usage was reported.
//!
//! Texts are counted exactly as OpenAI's tokenizers count them; special tokens that stand in a text are text.
//! Chats follow OpenAI's published recipe ("How to count tokens with tiktoken", OpenAI Cookbook): 3 tokens a
//! message, 1 a name, 3 for the reply; functions by its constants. What the recipe leaves open (nested
//! schemas, images, audio) is approximated as said at the functions here. None of this belongs on the request
//! path: loading a vocabulary takes tens of milliseconds, and a long prompt milliseconds. There, use [`Ratio`].
//! A self-hosted model is counted with its own `tokenizer.json` ([`FileTokenizer`]) if there is one; how its chat
//! template frames messages is then an estimate, by the recipe.

mod file;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bpe_openai::Tokenizer;
use serde_json::Value;

pub use self::file::{FileTokenizer, TokenizerError};
use super::Endpoint;

/// The vocabulary of a family of models.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// gpt-4o and everything later.
    O200kBase,
    /// gpt-oss: `o200k_base` with more special tokens, which frame its chats and are text in a text.
    O200kHarmony,
    /// gpt-3.5, gpt-4, text-embedding-3 and ada-002.
    Cl100kBase,
}

impl Encoding {
    /// The encoding of a model, by its name; `None` for models that are not OpenAI's. Understands fine-tuned
    /// names (`ft:gpt-4o-mini:org::id`) and a vendor's prefix (`openai/gpt-oss-20b`).
    pub fn of(model: &str) -> Option<Self> {
        const CL100K: [&str; 5] =
            ["gpt-4", "gpt-3.5", "gpt-35", "text-embedding-3-", "text-embedding-ada-002"];
        const O200K: [&str; 10] =
            ["gpt-4o", "gpt-4.1", "gpt-4.5", "gpt-5", "gpt-6", "chatgpt-4o", "codex-", "o1", "o3", "o4"];
        let name = model.rsplit('/').next().unwrap_or(model);
        let name = name.strip_prefix("ft:").unwrap_or(name);
        if name.starts_with("gpt-oss") {
            return Some(Self::O200kHarmony);
        }
        if O200K.iter().any(|prefix| name.starts_with(prefix)) {
            return Some(Self::O200kBase);
        }
        CL100K.iter().any(|prefix| name.starts_with(prefix)).then_some(Self::Cl100kBase)
    }

    /// Tokens of a text. The vocabulary is loaded at the first use.
    pub fn count(self, text: &str) -> u64 {
        self.tokenizer().count(text) as u64
    }

    /// Whether the vocabulary is in memory, where it takes some eighty megabytes.
    pub fn is_loaded(self) -> bool {
        self.loaded().load(Ordering::Relaxed)
    }

    fn loaded(self) -> &'static AtomicBool {
        static O200K: AtomicBool = AtomicBool::new(false);
        static CL100K: AtomicBool = AtomicBool::new(false);
        match self {
            Self::O200kBase | Self::O200kHarmony => &O200K,
            Self::Cl100kBase => &CL100K,
        }
    }

    fn tokenizer(self) -> &'static Tokenizer {
        self.loaded().store(true, Ordering::Relaxed);
        match self {
            Self::O200kBase | Self::O200kHarmony => bpe_openai::o200k_base(),
            Self::Cl100kBase => bpe_openai::cl100k_base(),
        }
    }
}

/// What counts: a vocabulary inside the program, or one that came with a model.
#[derive(Debug, Clone, Copy)]
pub enum Vocabulary<'a> {
    OpenAi(Encoding),
    File(&'a FileTokenizer),
}

impl Vocabulary<'_> {
    /// That of a model by its name. One that is not OpenAI's is counted with `o200k_base`: an estimate.
    pub fn of(model: &str) -> Self {
        Self::OpenAi(Encoding::of(model).unwrap_or(Encoding::O200kBase))
    }

    /// Tokens of a text.
    pub fn count(self, text: &str) -> u64 {
        match self {
            Self::OpenAi(encoding) => encoding.count(text),
            Self::File(tokenizer) => tokenizer.count(text),
        }
    }

    fn is_harmony(self) -> bool {
        matches!(self, Self::OpenAi(Encoding::O200kHarmony))
    }
}

/// Tokens of a text.
pub fn count_text(model: &str, text: &str) -> u64 {
    Vocabulary::of(model).count(text)
}

/// Input tokens of a request body; 0 if it is not JSON.
pub fn count_call(model: &str, endpoint: Endpoint, body: &[u8]) -> u64 {
    count_call_in(Vocabulary::of(model), endpoint, body)
}

/// Input tokens of a request body in a vocabulary; 0 if it is not JSON.
pub fn count_call_in(vocabulary: Vocabulary<'_>, endpoint: Endpoint, body: &[u8]) -> u64 {
    let Ok(body) = serde_json::from_slice::<Value>(body) else { return 0 };
    let tools = tools(vocabulary, &body["tools"]) + tools(vocabulary, &body["functions"]);
    match endpoint {
        Endpoint::Completions => prompts(vocabulary, &body["prompt"]),
        Endpoint::Embeddings | Endpoint::Moderations => prompts(vocabulary, &body["input"]),
        Endpoint::Responses => responses(vocabulary, &body) + tools,
        _ => chat(vocabulary, &body) + tools,
    }
}

const PER_MESSAGE: u64 = 3;
const PER_NAME: u64 = 1;
const PER_REPLY: u64 = 3;
/// An image whose size we do not know: four tiles of 170 and the base of 85; at low detail the base alone.
const PER_IMAGE: u64 = 765;
const PER_IMAGE_LOW: u64 = 85;
/// A clip of audio: ten tokens a second, taken as half a minute.
const PER_CLIP: u64 = 300;

fn chat(vocabulary: Vocabulary<'_>, body: &Value) -> u64 {
    let messages = body["messages"].as_array().map(Vec::as_slice).unwrap_or_default();
    let harmony = if vocabulary.is_harmony() { preamble(vocabulary, messages) } else { 0 };
    let system = match &body["system"] {
        Value::Null => 0,
        system => PER_MESSAGE + vocabulary.count("system") + content(vocabulary, system),
    };
    harmony + system + messages.iter().map(|sent| message(vocabulary, sent)).sum::<u64>() + PER_REPLY
}

/// What gpt-oss's chat template puts before a chat: its own system message, and a heading over the client's. (Of the
/// reply it writes `<|start|>assistant` alone, a token less than the recipe.)
fn preamble(vocabulary: Vocabulary<'_>, messages: &[Value]) -> u64 {
    const SYSTEM: &str = "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n\
        Current date: 2026-01-01\n\nReasoning: medium\n\n# Valid channels: analysis, commentary, final. Channel must \
        be included for every message.";
    const HEADING: &str = "# Instructions\n\n";
    let is_instruction = |message: &&Value| matches!(message["role"].as_str(), Some("system" | "developer"));
    let headings = messages.iter().filter(is_instruction).count() as u64 * vocabulary.count(HEADING);
    (PER_MESSAGE + vocabulary.count("system") + vocabulary.count(SYSTEM) + headings).saturating_sub(1)
}

fn responses(vocabulary: Vocabulary<'_>, body: &Value) -> u64 {
    let text = |role: &str, text: &str| PER_MESSAGE + vocabulary.count(role) + vocabulary.count(text);
    let instructions = body["instructions"].as_str().map_or(0, |instructions| text("system", instructions));
    let input = match &body["input"] {
        Value::String(input) => text("user", input),
        Value::Array(items) => items.iter().map(|item| message(vocabulary, item)).sum(),
        _ => 0,
    };
    instructions + input + PER_REPLY
}

/// One message: its role, content, name and tool calls, each encoded.
fn message(vocabulary: Vocabulary<'_>, message: &Value) -> u64 {
    let Some(members) = message.as_object() else { return 0 };
    let parts = members.iter().map(|(name, value)| match (name.as_str(), value) {
        ("name", Value::String(name)) => vocabulary.count(name) + PER_NAME,
        ("tool_calls", Value::Array(calls)) => calls.iter().map(|call| function_call(vocabulary, call)).sum(),
        ("function_call", call) => function_call(vocabulary, call),
        ("type" | "id" | "status", _) => 0,
        (_, value) => content(vocabulary, value),
    });
    PER_MESSAGE + parts.sum::<u64>()
}

/// A call that the model made earlier: name and arguments, with the framing of a message.
fn function_call(vocabulary: Vocabulary<'_>, call: &Value) -> u64 {
    let function = if call["function"].is_object() { &call["function"] } else { call };
    let text = |value: &Value| value.as_str().map_or(0, |text| vocabulary.count(text));
    PER_MESSAGE + text(&function["name"]) + text(&function["arguments"])
}

fn content(vocabulary: Vocabulary<'_>, content: &Value) -> u64 {
    match content {
        Value::String(text) => vocabulary.count(text),
        Value::Array(parts) => parts.iter().map(|part| content_part(vocabulary, part)).sum(),
        _ => 0,
    }
}

fn content_part(vocabulary: Vocabulary<'_>, part: &Value) -> u64 {
    match part["type"].as_str() {
        Some("image_url" | "input_image" | "image") => {
            let detail = part["image_url"]["detail"].as_str().or(part["detail"].as_str());
            if detail == Some("low") { PER_IMAGE_LOW } else { PER_IMAGE }
        }
        Some("input_audio" | "audio_url") => PER_CLIP,
        _ => {
            let text = part["text"].as_str().or(part["refusal"].as_str()).or(part.as_str());
            text.map_or_else(|| content(vocabulary, &part["content"]), |text| vocabulary.count(text))
        }
    }
}

/// A text, several, or tokens that are already encoded.
fn prompts(vocabulary: Vocabulary<'_>, prompt: &Value) -> u64 {
    match prompt {
        Value::String(text) => vocabulary.count(text),
        Value::Number(_) => 1,
        Value::Array(prompts) => prompts.iter().map(|prompt| prompts_of_batch(vocabulary, prompt)).sum(),
        _ => 0,
    }
}

fn prompts_of_batch(vocabulary: Vocabulary<'_>, prompt: &Value) -> u64 {
    match prompt {
        Value::Array(tokens) => tokens.len() as u64,
        prompt => prompts(vocabulary, prompt),
    }
}

/// Function definitions, by the recipe's constants. A property that is itself an object or an array, which the
/// recipe does not treat, counts the text of its schema besides.
fn tools(vocabulary: Vocabulary<'_>, tools: &Value) -> u64 {
    const END: u64 = 12;
    let Some(tools) = tools.as_array().filter(|tools| !tools.is_empty()) else { return 0 };
    tools.iter().map(|tool| function(vocabulary, tool)).sum::<u64>() + END
}

fn function(vocabulary: Vocabulary<'_>, tool: &Value) -> u64 {
    const PROPERTIES: u64 = 3;
    let start = match vocabulary {
        Vocabulary::OpenAi(Encoding::Cl100kBase) => 10,
        _ => 7,
    };
    let function = if tool["function"].is_object() { &tool["function"] } else { tool };
    let line = format!("{}:{}", text(&function["name"]), description(function));
    let properties =
        function["parameters"]["properties"].as_object().filter(|properties| !properties.is_empty());
    let listed = properties.map_or(0, |properties| {
        PROPERTIES + properties.iter().map(|(name, schema)| property(vocabulary, name, schema)).sum::<u64>()
    });
    start + vocabulary.count(&line) + listed
}

fn property(vocabulary: Vocabulary<'_>, name: &str, schema: &Value) -> u64 {
    const KEY: u64 = 3;
    const ENUM_ITEM: u64 = 3;
    // The recipe's own -3 for a list of values cancels its first item.
    let values = schema["enum"].as_array().map_or(0, |values| {
        let items: u64 = values.iter().map(|value| ENUM_ITEM + vocabulary.count(text(value))).sum();
        items.saturating_sub(3)
    });
    let line = format!("{name}:{}:{}", text(&schema["type"]), description(schema));
    let nested = ["properties", "items", "anyOf"].iter().filter_map(|key| schema.get(key));
    let nested: u64 = nested.map(|schema| vocabulary.count(&schema.to_string())).sum();
    KEY + values + vocabulary.count(&line) + nested
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// The recipe leaves out a full stop at the end.
fn description(of: &Value) -> &str {
    let description = text(&of["description"]);
    description.strip_suffix('.').unwrap_or(description)
}

/// Tokens a byte of one model's requests, learnt from what was reported. For models without a tokenizer, and
/// for quick estimates before a call is routed. Lock-free: an estimate may miss the latest observation.
#[derive(Debug)]
pub struct Ratio {
    /// The ratio and the weight of what it was learnt from, as two `f32`.
    state: AtomicU64,
}

impl Ratio {
    /// English text and code: about four bytes a token, a little less with JSON around it.
    const PRIOR: f32 = 0.27;
    /// Observations that the prior is worth.
    const PRIOR_WEIGHT: f32 = 1.0;
    /// Observations after which an old one has lost most of its weight.
    const MEMORY: f32 = 50.0;

    pub fn new() -> Self {
        Self { state: AtomicU64::new(pack(Self::PRIOR, Self::PRIOR_WEIGHT)) }
    }

    /// Learns from a call whose tokens were reported. Calls that cannot be true (no bytes, no tokens, more
    /// than two tokens a byte) teach nothing.
    #[expect(clippy::cast_precision_loss, reason = "a ratio, not an amount")]
    pub fn observe(&self, bytes: usize, tokens: u64) {
        if bytes == 0 || tokens == 0 || tokens > 2 * bytes as u64 + 64 {
            return;
        }
        let sample = tokens as f32 / bytes as f32;
        // An update that loses a race is lost: the next call brings another.
        let old = self.state.load(Ordering::Relaxed);
        let (ratio, weight) = unpack(old);
        let weight = (weight + 1.0).min(Self::MEMORY);
        let updated = pack(ratio + (sample - ratio) / weight, weight);
        let _is_raced = self.state.compare_exchange(old, updated, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Tokens of so many bytes, at least 1 if there are any.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an estimate, not an amount"
    )]
    pub fn estimate(&self, bytes: usize) -> u64 {
        (bytes as f64 * f64::from(self.tokens_per_byte())).ceil() as u64
    }

    pub fn tokens_per_byte(&self) -> f32 {
        unpack(self.state.load(Ordering::Relaxed)).0
    }
}

impl Default for Ratio {
    fn default() -> Self {
        Self::new()
    }
}

fn pack(ratio: f32, weight: f32) -> u64 {
    u64::from(ratio.to_bits()) << 32 | u64::from(weight.to_bits())
}

#[expect(clippy::cast_possible_truncation, reason = "two halves of 32 bits")]
fn unpack(state: u64) -> (f32, f32) {
    (f32::from_bits((state >> 32) as u32), f32::from_bits(state as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_has_its_familys_encoding() {
        for (model, encoding) in [
            ("gpt-4o-mini-2024-07-18", Some(Encoding::O200kBase)),
            ("gpt-4.1", Some(Encoding::O200kBase)),
            ("gpt-5.6-luna", Some(Encoding::O200kBase)),
            ("o3-mini", Some(Encoding::O200kBase)),
            ("openai/gpt-oss-20b", Some(Encoding::O200kHarmony)),
            ("ft:gpt-3.5-turbo:acme::x", Some(Encoding::Cl100kBase)),
            ("gpt-4-turbo", Some(Encoding::Cl100kBase)),
            ("gpt-4", Some(Encoding::Cl100kBase)),
            ("text-embedding-3-small", Some(Encoding::Cl100kBase)),
            ("meta-llama/Llama-3.1-8B-Instruct", None),
        ] {
            assert_eq!(Encoding::of(model), encoding, "{model}");
        }
    }

    #[test]
    fn every_endpoint_counts_its_own_input() {
        let count = |endpoint, body: &str| count_call("gpt-4o", endpoint, body.as_bytes());
        let hello = count_text("gpt-4o", "hello world");
        assert_eq!(count(Endpoint::Completions, r#"{"prompt":"hello world"}"#), hello);
        assert_eq!(count(Endpoint::Embeddings, r#"{"input":["hello world","hello world"]}"#), 2 * hello);
        assert_eq!(count(Endpoint::Embeddings, r#"{"input":[1,2,3]}"#), 3);
        assert_eq!(count(Endpoint::Embeddings, r#"{"input":[[1,2,3],[4]]}"#), 4);
        let chat =
            count(Endpoint::ChatCompletions, r#"{"messages":[{"role":"user","content":"hello world"}]}"#);
        let parts = r#"{"messages":[{"role":"user","content":[{"type":"text","text":"hello world"}]}]}"#;
        assert_eq!(chat, 3 + 1 + hello + 3);
        assert_eq!(count(Endpoint::ChatCompletions, parts), chat);
        assert_eq!(count(Endpoint::Responses, r#"{"input":"hello world"}"#), chat);
        assert_eq!(count(Endpoint::ChatCompletions, "no json"), 0);
    }

    #[test]
    fn a_ratio_learns_and_forgets() {
        let ratio = Ratio::new();
        assert_eq!(ratio.estimate(0), 0);
        assert!((250..300).contains(&ratio.estimate(1000)));
        (0..300).for_each(|_| ratio.observe(1000, 500));
        assert!((490..=501).contains(&ratio.estimate(1000)), "{}", ratio.estimate(1000));
        (0..300).for_each(|_| ratio.observe(1000, 100));
        assert!((100..=110).contains(&ratio.estimate(1000)), "{}", ratio.estimate(1000));
        ratio.observe(0, 5);
        ratio.observe(10, 0);
        ratio.observe(1, 1_000_000);
        assert!(ratio.estimate(1000) <= 110);
    }
}
