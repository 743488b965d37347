//! `chat/completions` and `completions`, whole and streamed, in the shape of each server.

use bytes::Bytes;
use serde_json::{Map, Value, json};

use super::Personality;
use super::answer::{Answer, Ask, Content, Event, Reply};
use super::errors::{self, Failure};
use super::script::UsageStyle;
use super::text;
use crate::economics::Usage;

/// Which of the two endpoints is dressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    Chat,
    Text,
}

pub(super) fn chat(ask: &Ask<'_>) -> Result<Answer, Failure> {
    let model = ask.model()?;
    let Some(messages) = ask.member("messages").and_then(Value::as_array) else {
        return Err(errors::missing(ask.personality, "messages"));
    };
    check_stream_options(ask)?;
    let tools = ask.member("tools").map_or(0, |tools| text::count(&tools.to_string()));
    let limit = ask.number("max_completion_tokens").or_else(|| ask.number("max_tokens"));
    let reply = ask.reply(text::count_messages(messages) + tools, limit)?;
    Ok(dress(ask, Shape::Chat, &model, &reply))
}

pub(super) fn completions(ask: &Ask<'_>) -> Result<Answer, Failure> {
    let model = ask.model()?;
    let Some(prompt) = ask.member("prompt") else { return Err(errors::missing(ask.personality, "prompt")) };
    check_stream_options(ask)?;
    let reply = ask.reply(text::count_content(prompt), ask.number("max_tokens").or(Some(16)))?;
    Ok(dress(ask, Shape::Text, &model, &reply))
}

/// A server older than `stream_options` refuses it; vLLM and OpenAI refuse it without `stream`.
fn check_stream_options(ask: &Ask<'_>) -> Result<(), Failure> {
    if ask.member("stream_options").is_none() {
        return Ok(());
    }
    let member = "stream_options";
    if ask.behaviour.reject_stream_options {
        let message = "Unrecognized request argument supplied: stream_options";
        return Err(errors::not_allowed(ask.personality, member, message));
    }
    if !ask.flag("stream") && ask.personality != Personality::LlamaCpp {
        let message = "Stream options can only be defined when `stream=True`.";
        return Err(errors::not_allowed(ask.personality, member, message));
    }
    Ok(())
}

fn dress(ask: &Ask<'_>, shape: Shape, model: &str, reply: &Reply) -> Answer {
    let dresser = Dresser { ask, shape, model: ask.served_name(model), reply };
    let answer = if ask.flag("stream") {
        Answer::events(dresser.events())
    } else {
        Answer::whole("application/json", Bytes::from(dresser.whole().to_string()))
    };
    answer.generating(reply.usage)
}

struct Dresser<'a> {
    ask: &'a Ask<'a>,
    shape: Shape,
    model: String,
    reply: &'a Reply,
}

impl Dresser<'_> {
    fn whole(&self) -> Value {
        let choices: Vec<Value> = (0..self.reply.choices).map(|index| self.choice(index)).collect();
        let mut body = self.head("chat.completion", "text_completion");
        body.insert("choices".into(), choices.into());
        if self.ask.behaviour.usage != UsageStyle::Never {
            // llama.cpp reports the usage of one choice, however many there are.
            let is_of_one = self.ask.personality == Personality::LlamaCpp;
            body.insert(
                "usage".into(),
                self.usage(&self.usage_of(if is_of_one { 1 } else { self.reply.choices })),
            );
        }
        if self.ask.personality == Personality::Vllm {
            body.insert("kv_transfer_params".into(), Value::Null);
            body.insert("prompt_logprobs".into(), Value::Null);
        }
        Value::Object(body)
    }

    fn choice(&self, index: u64) -> Value {
        let finish = self.finish_reason();
        let logprobs = self.logprobs(&self.reply.content.text());
        let mut choice = match (self.shape, &self.reply.content) {
            (Shape::Text, content) => json!({"text": content.text()}),
            (Shape::Chat, Content::Text(_)) => json!({"message": self.message()}),
            (Shape::Chat, Content::Call { name, arguments, .. }) => {
                let call = json!({"id": self.ask.id("call_"), "type": "function",
                    "function": {"name": name, "arguments": arguments}});
                json!({"message": {"role": "assistant", "content": null, "refusal": null, "annotations": [],
                    "tool_calls": [call]}})
            }
        };
        choice["index"] = index.into();
        choice["finish_reason"] = finish.into();
        choice["logprobs"] = logprobs;
        choice
    }

    fn message(&self) -> Value {
        let content = self.reply.content.text();
        let reasoning = self.reasoning_words().concat();
        match self.ask.personality {
            Personality::OpenAi => {
                json!({"role": "assistant", "content": content, "refusal": null, "annotations": []})
            }
            Personality::Vllm => json!({"role": "assistant", "content": content, "refusal": null,
                "function_call": null, "audio": null,
                "reasoning": if reasoning.is_empty() { Value::Null } else { reasoning.into() }}),
            Personality::LlamaCpp if reasoning.is_empty() => json!({"role": "assistant", "content": content}),
            Personality::LlamaCpp => {
                json!({"role": "assistant", "content": content, "reasoning_content": reasoning})
            }
        }
    }

    fn events(&self) -> Vec<Event> {
        let mut events = Vec::new();
        let each_alone = self.ask.personality == Personality::LlamaCpp;
        if each_alone {
            for index in 0..self.reply.choices {
                events.extend(self.choice_events(index));
                events.extend(self.last_usage(1));
            }
        } else {
            let tracks: Vec<Vec<Event>> =
                (0..self.reply.choices).map(|index| self.choice_events(index)).collect();
            events.extend(interleaved(&tracks));
            events.extend(self.last_usage(self.reply.choices));
        }
        self.misplace_usage(&mut events);
        events.push(Event::done());
        events
    }

    /// The events of one choice: its role, its pieces, its end.
    fn choice_events(&self, index: u64) -> Vec<Event> {
        let mut events = Vec::new();
        if self.shape == Shape::Chat {
            events.push(self.event(index, &self.opening(), None, 0));
        }
        events.extend(self.reasoning_events(index));
        match &self.reply.content {
            Content::Text(pieces) => {
                let spoken = |(piece, tokens): &(String, u64)| {
                    self.event(index, &json!({"content": piece}), None, *tokens)
                };
                events.extend(pieces.iter().map(spoken));
            }
            Content::Call { name, arguments, tokens } => {
                let opening = json!({"tool_calls": [{"index": 0, "id": self.ask.id("call_"), "type": "function",
                    "function": {"name": name, "arguments": ""}}]});
                events.push(self.event(index, &opening, None, text::count(name).min(*tokens)));
                let mut left = tokens.saturating_sub(text::count(name));
                for (piece, worth) in text::pieces(arguments) {
                    let delta = json!({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]});
                    events.push(self.event(index, &delta, None, worth.min(left)));
                    left -= worth.min(left);
                }
            }
        }
        events.push(self.event(index, &json!({}), Some(self.finish_reason()), 0));
        events
    }

    fn opening(&self) -> Value {
        match self.ask.personality {
            Personality::OpenAi => json!({"role": "assistant", "content": "", "refusal": null}),
            Personality::Vllm => json!({"role": "assistant", "content": ""}),
            Personality::LlamaCpp => json!({"role": "assistant", "content": null}),
        }
    }

    /// OpenAI thinks in silence, the others stream what they think.
    fn reasoning_events(&self, index: u64) -> Vec<Event> {
        let words = self.reasoning_words();
        let key = match self.ask.personality {
            Personality::OpenAi => {
                let silent = Event {
                    text: Bytes::new(),
                    output_tokens: words.len() as u64,
                    reasoning_tokens: words.len() as u64,
                };
                return if words.is_empty() { Vec::new() } else { vec![silent] };
            }
            Personality::Vllm => "reasoning",
            Personality::LlamaCpp => "reasoning_content",
        };
        let event =
            |word: &&str| Event { reasoning_tokens: 1, ..self.event(index, &json!({ key: word }), None, 1) };
        words.iter().map(event).collect()
    }

    fn reasoning_words(&self) -> Vec<&'static str> {
        text::words(7, self.reply.usage.reasoning_tokens / self.reply.choices).collect()
    }

    fn event(&self, index: u64, delta: &Value, finish: Option<&str>, tokens: u64) -> Event {
        let mut choice = match self.shape {
            Shape::Chat => json!({"delta": delta}),
            Shape::Text => json!({"text": delta.get("content").and_then(Value::as_str).unwrap_or_default()}),
        };
        choice["index"] = index.into();
        choice["finish_reason"] = finish.map_or(Value::Null, Value::from);
        let piece = delta.get("content").and_then(Value::as_str).unwrap_or_default();
        choice["logprobs"] = self.logprobs(piece);
        let mut body = self.head("chat.completion.chunk", "text_completion");
        body.insert("choices".into(), json!([choice]));
        if self.ask.personality == Personality::OpenAi && self.ask.asks_usage() {
            body.insert("usage".into(), Value::Null);
        }
        Event::data(&Value::Object(body), tokens)
    }

    /// The extra chunk without choices; llama.cpp's completions carry their usage unasked.
    fn last_usage(&self, choices: u64) -> Option<Event> {
        let unasked = self.ask.personality == Personality::LlamaCpp
            && self.shape == Shape::Text
            && self.ask.behaviour.usage == UsageStyle::AsAsked;
        (self.ask.asks_usage() || unasked).then(|| self.usage_chunk(json!([]), choices))
    }

    fn usage_chunk(&self, choices: Value, of_choices: u64) -> Event {
        let mut body = self.head("chat.completion.chunk", "text_completion");
        body.insert("choices".into(), choices);
        body.insert("usage".into(), self.usage(&self.usage_of(of_choices)));
        Event::data(&Value::Object(body), 0)
    }

    /// The usage of so many of the choices.
    fn usage_of(&self, choices: u64) -> Usage {
        let all = &self.reply.usage;
        let part = |tokens: u64| tokens / self.reply.choices * choices;
        Usage { output_tokens: part(all.output_tokens), reasoning_tokens: part(all.reasoning_tokens), ..*all }
    }

    /// Usage where the script wants it instead of at the end.
    fn misplace_usage(&self, events: &mut Vec<Event>) {
        match self.ask.behaviour.usage {
            UsageStyle::MidStream => {
                let middle = events.len() / 2;
                events.insert(middle, self.usage_chunk(json!([]), self.reply.choices));
            }
            UsageStyle::WithChoices => {
                events.pop();
                let mut choice = json!({"index": 0, "finish_reason": self.finish_reason()});
                let (key, nothing) =
                    if self.shape == Shape::Chat { ("delta", json!({})) } else { ("text", json!("")) };
                choice[key] = nothing;
                events.push(self.usage_chunk(json!([choice]), self.reply.choices));
            }
            UsageStyle::AsAsked | UsageStyle::Never => {}
        }
    }

    fn head(&self, chat: &str, text: &str) -> Map<String, Value> {
        let (object, prefix) = match self.shape {
            Shape::Chat => (chat, "chatcmpl-"),
            Shape::Text => {
                (text, if self.ask.personality == Personality::LlamaCpp { "chatcmpl-" } else { "cmpl-" })
            }
        };
        let fingerprint = match self.ask.personality {
            Personality::OpenAi => "fp_fa4e000000",
            Personality::Vllm => "vllm-0.32.0-6e75874a",
            Personality::LlamaCpp => "b1-7e4c0a9",
        };
        let mut head = Map::new();
        head.insert("id".into(), self.ask.id(prefix).into());
        head.insert("object".into(), object.into());
        head.insert("created".into(), self.ask.created.into());
        head.insert("model".into(), self.model.clone().into());
        head.insert("system_fingerprint".into(), fingerprint.into());
        if self.ask.personality == Personality::OpenAi {
            let tier = self.ask.text("service_tier").filter(|tier| *tier != "auto").unwrap_or("default");
            head.insert("service_tier".into(), tier.into());
        }
        head
    }

    fn usage(&self, usage: &Usage) -> Value {
        let mut report = json!({"prompt_tokens": usage.input_tokens, "completion_tokens": usage.output_tokens,
            "total_tokens": usage.total_tokens()});
        match self.ask.personality {
            Personality::OpenAi => {
                report["prompt_tokens_details"] =
                    json!({"cached_tokens": usage.cached_input_tokens, "audio_tokens": 0});
                report["completion_tokens_details"] = json!({"reasoning_tokens": usage.reasoning_tokens,
                    "audio_tokens": 0, "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0});
            }
            Personality::Vllm if usage.cached_input_tokens > 0 => {
                report["prompt_tokens_details"] = json!({"cached_tokens": usage.cached_input_tokens});
            }
            Personality::Vllm => report["prompt_tokens_details"] = Value::Null,
            Personality::LlamaCpp => {
                report["prompt_tokens_details"] = json!({"cached_tokens": usage.cached_input_tokens});
            }
        }
        report
    }

    fn finish_reason(&self) -> &'static str {
        match (&self.reply.content, self.reply.cut) {
            (Content::Call { .. }, _) => "tool_calls",
            (Content::Text(_), true) => "length",
            (Content::Text(_), false) => "stop",
        }
    }

    fn logprobs(&self, piece: &str) -> Value {
        if piece.is_empty() || !self.ask.flag("logprobs") || self.shape == Shape::Text {
            return Value::Null;
        }
        let token = json!({"token": piece, "logprob": -0.25, "bytes": piece.as_bytes(), "top_logprobs": []});
        json!({"content": [token], "refusal": null})
    }
}

/// One event of each choice in turn.
fn interleaved(tracks: &[Vec<Event>]) -> Vec<Event> {
    let longest = tracks.iter().map(Vec::len).max().unwrap_or(0);
    let at = |position: usize| tracks.iter().filter_map(move |track| track.get(position).cloned());
    (0..longest).flat_map(at).collect()
}
