//! The Responses API: one object, or typed events that end with the object.

use bytes::Bytes;
use serde_json::{Value, json};

use super::Personality;
use super::answer::{Answer, Ask, Content, Event, Reply};
use super::errors::{self, Failure};
use super::script::UsageStyle;
use super::text;

pub(super) fn responses(ask: &Ask<'_>) -> Result<Answer, Failure> {
    let (model, reply) = replied(ask)?;
    let answer = if ask.flag("stream") {
        Answer::events(events(ask, &model, &reply))
    } else {
        Answer::json(&object(ask, &model, &reply, true))
    };
    Ok(answer.generating(reply.usage))
}

/// A response in the background: what is answered at once, and what is read later.
pub(super) fn background(ask: &Ask<'_>) -> Result<(Answer, Value), Failure> {
    let (model, reply) = replied(ask)?;
    let done = object(ask, &model, &reply, true);
    let answer = if ask.flag("stream") {
        Answer::events(events(ask, &model, &reply))
    } else {
        Answer::json(&unfinished(&done, "queued"))
    };
    Ok((answer.generating(reply.usage), done))
}

/// What is read of a response that is not there yet.
pub(super) fn unfinished(done: &Value, status: &str) -> Value {
    let mut object = done.clone();
    object["status"] = status.into();
    object["output"] = json!([]);
    object["usage"] = Value::Null;
    object
}

/// The model that replies, and what.
fn replied(ask: &Ask<'_>) -> Result<(String, Reply), Failure> {
    let model = ask.model()?;
    let Some(input) = ask.member("input") else { return Err(errors::missing(ask.personality, "input")) };
    let instructions = ask.text("instructions").map_or(0, |text| 3 + text::count(text));
    let tools = ask.member("tools").map_or(0, |tools| text::count(&tools.to_string()));
    let prompt = match input {
        Value::String(text) => 7 + text::count(text),
        Value::Array(turns) => text::count_messages(turns),
        _ => 0,
    };
    let reply = ask.reply(prompt + instructions + tools, ask.number("max_output_tokens"))?;
    Ok((ask.served_name(&model), reply))
}

/// The response object, as it is at the start or at the end.
fn object(ask: &Ask<'_>, model: &str, reply: &Reply, at_end: bool) -> Value {
    if ask.personality == Personality::LlamaCpp && !at_end {
        return json!({"id": ask.id("resp_"), "object": "response", "status": "in_progress"});
    }
    let incomplete = at_end && reply.cut && ask.personality != Personality::LlamaCpp;
    let status = match (at_end, incomplete) {
        (false, _) => "in_progress",
        (true, true) => "incomplete",
        (true, false) => "completed",
    };
    let output = if at_end { vec![item(ask, reply, true)] } else { Vec::new() };
    let details = if incomplete { json!({"reason": "max_output_tokens"}) } else { Value::Null };
    let reported = at_end && ask.behaviour.usage != UsageStyle::Never;
    json!({"id": ask.id("resp_"), "object": "response", "created_at": ask.created, "status": status,
        "background": ask.flag("background"),
        "model": model, "output": output, "error": null, "incomplete_details": details,
        "instructions": ask.member("instructions"), "metadata": {}, "parallel_tool_calls": true,
        "temperature": 1.0, "top_p": 1.0, "tool_choice": ask.member("tool_choice").cloned().unwrap_or("auto".into()),
        "tools": ask.member("tools").cloned().unwrap_or_else(|| json!([])),
        "max_output_tokens": ask.member("max_output_tokens"), "previous_response_id": null,
        "service_tier": if ask.personality == Personality::OpenAi { "default" } else { "auto" },
        "truncation": "disabled", "usage": if reported { usage(reply) } else { Value::Null }})
}

fn usage(reply: &Reply) -> Value {
    let usage = &reply.usage;
    json!({"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens,
        "total_tokens": usage.total_tokens(),
        "input_tokens_details": {"cached_tokens": usage.cached_input_tokens},
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens}})
}

/// The output item, empty at its start and complete at its end.
fn item(ask: &Ask<'_>, reply: &Reply, at_end: bool) -> Value {
    let status = if at_end { "completed" } else { "in_progress" };
    match &reply.content {
        Content::Text(_) => {
            let content = if at_end { json!([part(&reply.content.text())]) } else { json!([]) };
            json!({"id": ask.id("msg_"), "type": "message", "role": "assistant", "status": status,
                "content": content})
        }
        Content::Call { name, arguments, .. } => {
            json!({"id": ask.id("fc_"), "type": "function_call", "status": status, "name": name,
                "call_id": ask.id("call_"), "arguments": if at_end { arguments.as_str() } else { "" }})
        }
    }
}

fn part(text: &str) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []})
}

fn events(ask: &Ask<'_>, model: &str, reply: &Reply) -> Vec<Event> {
    let mut stream = Stream { events: Vec::new() };
    let begun = object(ask, model, reply, false);
    stream.push("response.created", json!({"response": begun}), 0);
    stream.push("response.in_progress", json!({"response": begun}), 0);
    if reply.usage.reasoning_tokens > 0 {
        let tokens = reply.usage.reasoning_tokens;
        stream.events.push(Event { text: Bytes::new(), output_tokens: tokens, reasoning_tokens: tokens });
    }
    let added = json!({"output_index": 0, "item": item(ask, reply, false)});
    stream.push("response.output_item.added", added, 0);
    match &reply.content {
        Content::Text(pieces) => stream.text(&ask.id("msg_"), pieces),
        Content::Call { arguments, tokens, .. } => stream.arguments(&ask.id("fc_"), arguments, *tokens),
    }
    let done = json!({"output_index": 0, "item": item(ask, reply, true)});
    stream.push("response.output_item.done", done, 0);
    let whole = object(ask, model, reply, true);
    let last = match (ask.personality, whole["status"].as_str()) {
        (Personality::OpenAi, Some("incomplete")) => "response.incomplete",
        _ => "response.completed",
    };
    stream.push(last, json!({"response": whole}), 0);
    stream.events
}

struct Stream {
    events: Vec<Event>,
}

impl Stream {
    fn push(&mut self, name: &str, mut body: Value, tokens: u64) {
        body["type"] = name.into();
        body["sequence_number"] = self.events.len().into();
        self.events.push(Event::named(name, &body, tokens));
    }

    fn text(&mut self, item_id: &str, pieces: &[(String, u64)]) {
        let place = json!({"item_id": item_id, "output_index": 0, "content_index": 0});
        let with = |key: &str, value: Value| {
            let mut body = place.clone();
            body[key] = value;
            body
        };
        self.push("response.content_part.added", with("part", part("")), 0);
        for (piece, tokens) in pieces {
            let mut delta = with("delta", piece.as_str().into());
            delta["logprobs"] = json!([]);
            self.push("response.output_text.delta", delta, *tokens);
        }
        let text: String = pieces.iter().map(|(piece, _)| piece.as_str()).collect();
        let mut done = with("text", text.as_str().into());
        done["logprobs"] = json!([]);
        self.push("response.output_text.done", done, 0);
        self.push("response.content_part.done", with("part", part(&text)), 0);
    }

    fn arguments(&mut self, item_id: &str, arguments: &str, tokens: u64) {
        let place = json!({"item_id": item_id, "output_index": 0});
        let mut left = tokens;
        let pieces = text::pieces(arguments);
        let last = pieces.len();
        for (position, (piece, worth)) in pieces.into_iter().enumerate() {
            let worth = if position + 1 == last { left } else { worth.min(left) };
            left -= worth;
            let mut delta = place.clone();
            delta["delta"] = piece.into();
            self.push("response.function_call_arguments.delta", delta, worth);
        }
        let mut done = place;
        done["arguments"] = arguments.into();
        self.push("response.function_call_arguments.done", done, 0);
    }
}
