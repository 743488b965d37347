//! Answers of real servers, replayed: they pass byte for byte, and are billed by what they say.

use breakeven::demo::Verbatim;
use breakeven::economics::Usage;
use breakeven::ledger::{Outcome, UsageSource};
use bytes::Bytes;
use serde_json::{Value, json};

use super::{OWN_MODEL, between};
use crate::support::{chat, read, with};

/// Answers of calls that succeeded.
const ANSWERS: [&str; 14] = [
    "chat",
    "chat_json_object",
    "chat_logprobs",
    "chat_n2",
    "chat_parts",
    "chat_stop",
    "chat_stream_contusage",
    "chat_stream_usage",
    "chat_tools_required",
    "completions",
    "completions_stream",
    "responses",
    "responses_stream",
    "chat_tools_auto",
];

struct Capture {
    name: &'static str,
    is_stream: bool,
    body: Bytes,
}

fn captures(folder: &str) -> Vec<Capture> {
    let folder = format!("{}/tests/data/captures/{folder}", env!("CARGO_MANIFEST_DIR"));
    let read = |name: &&'static str| {
        let whole = std::fs::read(format!("{folder}/{name}.http")).unwrap();
        let head = whole.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
        Capture { name, is_stream: name.contains("stream"), body: Bytes::from(whole).slice(head + 4..) }
    };
    ANSWERS.iter().map(read).collect()
}

impl Capture {
    fn path(&self) -> &'static str {
        match self.name.split('_').next().unwrap() {
            "completions" => "/completions",
            "responses" => "/responses",
            _ => "/chat/completions",
        }
    }

    fn request(&self) -> Value {
        let body = match self.path() {
            "/completions" => json!({"model": OWN_MODEL, "prompt": "Once upon"}),
            "/responses" => json!({"model": OWN_MODEL, "input": "Hello there"}),
            _ => chat(OWN_MODEL),
        };
        match (self.is_stream, self.path()) {
            (false, _) => body,
            (true, "/responses") => with(body, json!({"stream": true})),
            (true, _) => with(body, json!({"stream": true, "stream_options": {"include_usage": true}})),
        }
    }

    /// The last usage that it reports.
    fn usage(&self) -> Option<Usage> {
        let text = std::str::from_utf8(&self.body).unwrap();
        let lines = text.lines().map(|line| line.strip_prefix("data: ").unwrap_or(line));
        let objects: Vec<Value> = lines.filter_map(|line| serde_json::from_str(line).ok()).collect();
        let usage = |object: &Value| {
            let usage = object.get("usage").or_else(|| object.pointer("/response/usage"))?;
            let number = |name: &str| usage.get(name).and_then(Value::as_u64);
            let details = ["/prompt_tokens_details/cached_tokens", "/input_tokens_details/cached_tokens"];
            let cached = details.iter().find_map(|path| usage.pointer(path)?.as_u64()).unwrap_or(0);
            let input = number("prompt_tokens").or_else(|| number("input_tokens"))?;
            let output = number("completion_tokens").or_else(|| number("output_tokens"))?;
            Some(Usage::new(input, output).with_cached(cached))
        };
        objects.iter().rev().find_map(usage)
    }
}

#[tokio::test]
async fn answers_of_real_servers_pass_byte_for_byte_and_are_billed_by_what_they_say() {
    for folder in ["vllm", "llamacpp"] {
        for capture in captures(folder) {
            let between = between().await;
            between.own.set(|settings| {
                let content_type =
                    if capture.is_stream { "text/event-stream; charset=utf-8" } else { "application/json" };
                settings.verbatim = Some(Verbatim { content_type, body: capture.body.clone() });
            });
            let reply = read(between.http.open(capture.path(), &capture.request()).await).await;
            assert_eq!(reply.body, capture.body, "{folder}/{}", capture.name);
            let entry = between.proxy.entries().await.remove(0);
            assert_eq!(entry.outcome, Outcome::Success, "{folder}/{}", capture.name);
            assert_eq!(Some(entry.usage), capture.usage(), "{folder}/{}", capture.name);
            assert_eq!(entry.usage_source, UsageSource::UpstreamUsage, "{folder}/{}", capture.name);
        }
    }
}
