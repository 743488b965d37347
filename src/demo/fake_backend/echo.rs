//! What was asked, as the answer: for every path that the fake does not know, so that a client's requests can be
//! compared with and without a proxy between.

use serde_json::{Value, json};

use super::SeenRequest;
use super::answer::Answer;

/// A request header that asks for an echo. Its value is the answer's `id`.
pub(super) const ECHO: &str = "x-fake-echo";

/// Members beside the request are those without which an SDK does not read on: nothing is left to wait for, and
/// lists are empty.
pub(super) fn echo(seen: &SeenRequest) -> Answer {
    let content_type = seen.header("content-type");
    let boundary = content_type.split_once("boundary=").map(|(_, boundary)| boundary);
    // A boundary is drawn anew for every request.
    let constant = |text: &str| boundary.map_or_else(|| text.to_owned(), |one| text.replace(one, "boundary"));
    let body = match std::str::from_utf8(&seen.body) {
        Ok(text) => constant(text),
        Err(_) => constant(&seen.body.escape_ascii().to_string()),
    };
    let header = |name: &str| (name.to_owned(), Value::from(seen.header(name)));
    let headers = ["accept", "openai-beta", "x-stainless-lang", "openai-organization"].map(header);
    Answer::json(&json!({
        "id": seen.header(ECHO), "object": "echo", "status": "completed", "data": [], "choices": [], "output": [],
        "request": {
            "method": seen.method.as_str(), "path": seen.uri.path(), "query": seen.uri.query(), "body": body,
            "content_type": constant(content_type), "headers": Value::Object(headers.into_iter().collect()),
        },
    }))
}
