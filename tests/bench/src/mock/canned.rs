//! The answers of the mock upstream, made once.

use memchr::memmem;

use crate::prose::{Xorshift, prose};

/// Precedes the time at which an event was written, in hexadecimal nanoseconds.
pub const STAMP: &str = "~T";
pub const STAMP_DIGITS: usize = 16;

pub struct Canned {
    pub unary: Vec<u8>,
    pub models: Vec<u8>,
    pub health: Vec<u8>,
    pub missing: Vec<u8>,
    /// Head and first (role) event of a stream.
    pub stream_start: Vec<u8>,
    pub event: Vec<u8>,
    /// Where an event's time goes.
    pub event_stamp: usize,
    pub end_with_usage: Vec<u8>,
    pub end_without_usage: Vec<u8>,
}

const USAGE_DETAILS: &str = r#""prompt_tokens_details":{"cached_tokens":0,"audio_tokens":0},"completion_tokens_details":{"reasoning_tokens":0,"audio_tokens":0,"accepted_prediction_tokens":0,"rejected_prediction_tokens":0}"#;

impl Canned {
    pub fn new() -> Self {
        let event =
            chunk(&frame(&choice(r#"{"content":"~T0000000000000000 the quick brown fox, so"}"#, "null"), ""));
        let role = frame(&choice(r#"{"role":"assistant","content":"","refusal":null}"#, "null"), "");
        let stop = chunk(&frame(&choice("{}", r#""stop""#), ""));
        let usage = chunk(&frame(
            "[]",
            &format!(
                r#","usage":{{"prompt_tokens":231,"completion_tokens":256,"total_tokens":487,{USAGE_DETAILS}}}"#
            ),
        ));
        let done = chunk("data: [DONE]\n\n");
        let last: &[u8] = b"0\r\n\r\n";
        Self {
            unary: response("200 OK", &completion()),
            models: response(
                "200 OK",
                r#"{"object":"list","data":[{"id":"gpt-4o-mini","object":"model","created":1721172741,"owned_by":"system"}]}"#,
            ),
            health: response("200 OK", r#"{"status":"ok"}"#),
            missing: response(
                "404 Not Found",
                r#"{"error":{"message":"no such route","type":"invalid_request_error","param":null,"code":null}}"#,
            ),
            stream_start: [stream_head().as_bytes(), &chunk(&role)].concat(),
            event_stamp: memmem::find(&event, STAMP.as_bytes()).expect("events have a stamp") + STAMP.len(),
            event,
            end_with_usage: [&stop, &usage, &done, last].concat(),
            end_without_usage: [&stop, &done, last].concat(),
        }
    }
}

/// A chat completion of about 1 KB.
fn completion() -> String {
    let content = prose(&mut Xorshift::new(99), 560);
    format!(
        r#"{{"id":"chatcmpl-BenchBenchBenchBenchBenchBench","object":"chat.completion","created":1732000000,"model":"gpt-4o-mini-2024-07-18","choices":[{{"index":0,"message":{{"role":"assistant","content":"{content}","refusal":null}},"logprobs":null,"finish_reason":"stop"}}],"usage":{{"prompt_tokens":231,"completion_tokens":128,"total_tokens":359,{USAGE_DETAILS}}},"service_tier":"default","system_fingerprint":"fp_0123456789"}}"#
    )
}

fn frame(choices: &str, usage: &str) -> String {
    format!(
        "data: {{\"id\":\"chatcmpl-BenchBenchBenchBenchBenchBench\",\"object\":\"chat.completion.chunk\",\
         \"created\":1732000000,\"model\":\"gpt-4o-mini-2024-07-18\",\"system_fingerprint\":\"fp_0123456789\",\
         \"choices\":{choices}{usage}}}\n\n"
    )
}

fn choice(delta: &str, finish_reason: &str) -> String {
    format!(r#"[{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{finish_reason}}}]"#)
}

fn chunk(data: &str) -> Vec<u8> {
    format!("{:x}\r\n{data}\r\n", data.len()).into_bytes()
}

fn stream_head() -> String {
    let fields = [
        "HTTP/1.1 200 OK",
        "content-type: text/event-stream; charset=utf-8",
        "cache-control: no-cache",
        "x-request-id: req_0123456789abcdef0123456789abcdef",
        "openai-processing-ms: 12",
        "transfer-encoding: chunked",
    ];
    format!("{}\r\n\r\n", fields.join("\r\n"))
}

/// An answer of known length.
pub fn response(status: &str, body: &str) -> Vec<u8> {
    format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\n\
         x-request-id: req_0123456789abcdef0123456789abcdef\r\nopenai-processing-ms: 12\r\n\
         openai-version: 2020-10-01\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}
