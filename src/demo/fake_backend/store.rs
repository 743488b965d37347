//! Files, batches and responses in the background: what OpenAI keeps for its clients, kept in memory.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use serde_json::{Value, json};

use super::answer::{Answer, Ask, Payload};
use super::chat;
use super::errors::{self, Failure};
use super::media::Form;
use super::responses;

/// Files and batches beyond it are refused.
const MAX_OBJECTS: usize = 1_000;

#[derive(Debug, Default)]
pub(super) struct Store {
    objects: Mutex<Objects>,
}

#[derive(Debug, Default)]
struct Objects {
    files: HashMap<String, (Value, Bytes)>,
    batches: HashMap<String, Value>,
    responses: HashMap<String, Response>,
}

/// A response that was asked for in the background. Who reads it first is too early.
#[derive(Debug)]
struct Response {
    done: Value,
    was_read: bool,
}

impl Store {
    /// Answers below `/files`, `/batches` and, in the background, `/responses`; none when the path is another.
    pub(super) fn answer(&self, ask: &Ask<'_>) -> Option<Result<Answer, Failure>> {
        let segments: Vec<&str> = ask.path.trim_start_matches('/').split('/').collect();
        Some(match (ask.method, segments.as_slice()) {
            ("POST", ["files"]) => self.upload(ask),
            ("GET", ["files"]) => Ok(self.list()),
            ("GET", ["files", id]) => self.file(id).map(|(object, _)| Answer::json(&object)),
            ("GET", ["files", id, "content"]) => {
                self.file(id).map(|(_, content)| Answer::whole("application/octet-stream", content))
            }
            ("DELETE", ["files", id]) => {
                self.objects().files.remove(*id);
                Ok(Answer::json(&json!({"id": id, "object": "file", "deleted": true})))
            }
            ("POST", ["batches"]) => self.run_batch(ask),
            ("GET", ["batches", id]) => {
                let batch = self.objects().batches.get(*id).cloned();
                batch.map(|batch| Answer::json(&batch)).ok_or_else(|| errors::no_such_object("Batch", id))
            }
            ("POST", ["responses"]) if ask.flag("background") => self.begin(ask),
            ("GET", ["responses", id]) => self.response(id),
            _ => return None,
        })
    }

    fn objects(&self) -> MutexGuard<'_, Objects> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn file(&self, id: &str) -> Result<(Value, Bytes), Failure> {
        self.objects().files.get(id).cloned().ok_or_else(|| errors::no_such_object("File", id))
    }

    fn list(&self) -> Answer {
        let data: Vec<Value> = self.objects().files.values().map(|(object, _)| object.clone()).collect();
        Answer::json(&json!({"object": "list", "data": data, "has_more": false}))
    }

    fn upload(&self, ask: &Ask<'_>) -> Result<Answer, Failure> {
        let missing = || errors::missing(ask.personality, "file");
        let form = Form::read(ask).ok_or_else(missing)?;
        let content = form.field("file").cloned().ok_or_else(missing)?;
        let purpose = form.text("purpose").unwrap_or_default();
        Ok(Answer::json(&self.keep(ask, &ask.id("file-"), &purpose, content)))
    }

    fn keep(&self, ask: &Ask<'_>, id: &str, purpose: &str, content: Bytes) -> Value {
        let object = json!({"id": id, "object": "file", "bytes": content.len(), "created_at": ask.created,
            "filename": "upload", "purpose": purpose, "status": "processed"});
        let mut objects = self.objects();
        if objects.files.len() < MAX_OBJECTS {
            objects.files.insert(id.to_owned(), (object.clone(), content));
        }
        object
    }

    fn begin(&self, ask: &Ask<'_>) -> Result<Answer, Failure> {
        let (answer, done) = responses::background(ask)?;
        let mut objects = self.objects();
        if objects.responses.len() < MAX_OBJECTS {
            objects.responses.insert(ask.id("resp_"), Response { done, was_read: false });
        }
        Ok(answer)
    }

    fn response(&self, id: &str) -> Result<Answer, Failure> {
        let mut objects = self.objects();
        let response = objects.responses.get_mut(id).ok_or_else(|| errors::no_such_object("Response", id))?;
        if std::mem::replace(&mut response.was_read, true) {
            Ok(Answer::json(&response.done))
        } else {
            Ok(Answer::json(&responses::unfinished(&response.done, "in_progress")))
        }
    }

    /// Runs a batch at once: every line of the input file gets its answer in the output file.
    fn run_batch(&self, ask: &Ask<'_>) -> Result<Answer, Failure> {
        let input_id =
            ask.text("input_file_id").ok_or_else(|| errors::missing(ask.personality, "input_file_id"))?;
        let (_, input) = self.file(input_id)?;
        let lines: Vec<Value> =
            input.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect();
        let outputs: Vec<String> = lines.iter().map(|line| answer_line(ask, line).to_string()).collect();
        let output_id = ask.id("file-out-");
        self.keep(ask, &output_id, "batch_output", Bytes::from(outputs.join("\n") + "\n"));
        let counts = json!({"total": lines.len(), "completed": lines.len(), "failed": 0});
        let batch = json!({"id": ask.id("batch_"), "object": "batch", "endpoint": ask.member("endpoint"),
            "input_file_id": input_id, "output_file_id": output_id, "error_file_id": null,
            "completion_window": "24h", "status": "completed", "created_at": ask.created,
            "completed_at": ask.created, "request_counts": counts});
        let mut objects = self.objects();
        if objects.batches.len() < MAX_OBJECTS {
            objects.batches.insert(ask.id("batch_"), batch.clone());
        }
        Ok(Answer::json(&batch))
    }
}

/// One line of a batch's output, with the usage of its call inside.
fn answer_line(ask: &Ask<'_>, line: &Value) -> Value {
    let inner = Ask { json: line.get("body").cloned().unwrap_or_default(), ..copy_of(ask) };
    let answer = match line.get("url").and_then(Value::as_str) {
        Some("/v1/responses") => responses::responses(&inner),
        Some("/v1/completions") => chat::completions(&inner),
        _ => chat::chat(&inner),
    };
    let (status, body) = match answer.map(|answer| answer.payload) {
        Ok(Payload::Whole(body)) => (200, serde_json::from_slice(&body).unwrap_or_default()),
        Ok(Payload::Events(_)) => (400, Value::Null),
        Err(failure) => (failure.status.as_u16(), failure.body),
    };
    let response = json!({"status_code": status, "request_id": ask.id("req_"), "body": body});
    json!({"id": ask.id("batch_req_"), "custom_id": line.get("custom_id"), "response": response, "error": null})
}

fn copy_of<'a>(ask: &Ask<'a>) -> Ask<'a> {
    Ask { json: Value::Null, ..*ask }
}
