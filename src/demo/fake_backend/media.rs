//! Embeddings, audio, images and moderations.

use bytes::Bytes;
use serde_json::{Value, json};

use super::Personality;
use super::answer::{Answer, Ask, Event};
use super::errors::{self, Failure};
use super::text;
use crate::economics::Usage;

/// A spoken token lasts so long, and is so many bytes of the binary that is called MP3.
const BYTES_PER_AUDIO_TOKEN: usize = 400;

pub(super) fn embeddings(ask: &Ask<'_>) -> Result<Answer, Failure> {
    if ask.personality != Personality::OpenAi && !ask.settings.serves_embeddings {
        return Err(errors::no_embeddings(ask.personality, ask.path));
    }
    let model = ask.model()?;
    let Some(input) = ask.member("input") else { return Err(errors::missing(ask.personality, "input")) };
    let inputs = match input {
        Value::Array(inputs) if inputs.iter().all(Value::is_number) => std::slice::from_ref(input),
        Value::Array(inputs) => inputs.as_slice(),
        one => std::slice::from_ref(one),
    };
    let dimensions = ask.number("dimensions").unwrap_or(1536).clamp(1, 4096);
    let encoded = ask.text("encoding_format") == Some("base64");
    let vector = |(index, input): (usize, &Value)| {
        let numbers = vector(input, dimensions);
        let embedding = if encoded {
            let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
            Value::from(text::base64(&bytes))
        } else {
            Value::from(numbers)
        };
        json!({"object": "embedding", "index": index, "embedding": embedding})
    };
    let data: Vec<Value> = inputs.iter().enumerate().map(vector).collect();
    let tokens = text::count_content(&Value::Array(inputs.to_vec()));
    let body = json!({"object": "list", "data": data, "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens}});
    Ok(Answer::json(&body).generating(Usage::new(tokens, 0)))
}

/// A vector of numbers that are exact in 32 bits, the same for the same input.
fn vector(input: &Value, dimensions: u64) -> Vec<f32> {
    let mut random = fastrand::Rng::with_seed(text::seed(input.to_string().as_bytes()));
    (0..dimensions).map(|_| f32::from(random.i16(-1024..=1024)) / 16_384.0).collect()
}

/// `audio/transcriptions` and `audio/translations`: a multipart body with a file and a model.
pub(super) fn transcription(ask: &Ask<'_>) -> Result<Answer, Failure> {
    let form = Form::read(ask).ok_or_else(|| errors::missing(ask.personality, "file"))?;
    let file = form.field("file").ok_or_else(|| errors::missing(ask.personality, "file"))?;
    let model = form.text("model").ok_or_else(|| errors::missing(ask.personality, "model"))?;
    let audio = (file.len() / BYTES_PER_AUDIO_TOKEN).max(1) as u64;
    let words: Vec<&str> = text::words(text::seed(file), ask.settings.output_tokens.min(64)).collect();
    let spoken = words.concat();
    let output = words.len() as u64;
    let usage = Usage { audio_input_tokens: audio, ..Usage::new(audio, output) };
    let report = json!({"type": "tokens", "input_tokens": audio, "output_tokens": output,
        "total_tokens": audio + output, "input_token_details": {"text_tokens": 0, "audio_tokens": audio}});
    let format = form.text("response_format");
    if form.text("stream").as_deref() == Some("true") {
        let mut events: Vec<Event> = words
            .iter()
            .map(|word| Event::data(&json!({"type": "transcript.text.delta", "delta": word}), 1))
            .collect();
        let done = json!({"type": "transcript.text.done", "text": spoken, "usage": report});
        events.push(Event::data(&done, 0));
        events.push(Event::done());
        return Ok(Answer::events(events).generating(usage));
    }
    let answer = match format.as_deref() {
        Some("text") => Answer::whole("text/plain; charset=utf-8", Bytes::from(format!("{spoken}\n"))),
        _ if model.starts_with("whisper") => {
            let seconds = audio.div_ceil(10);
            Answer::json(&json!({"text": spoken, "usage": {"type": "duration", "seconds": seconds}}))
        }
        _ => Answer::json(&json!({"text": spoken, "usage": report})),
    };
    Ok(answer.generating(usage))
}

/// `audio/speech`: bytes that stand for MP3, or events that end with usage.
pub(super) fn speech(ask: &Ask<'_>) -> Result<Answer, Failure> {
    let model = ask.model().or_else(|failure| ask.text("model").map(str::to_owned).ok_or(failure))?;
    let Some(input) = ask.text("input") else { return Err(errors::missing(ask.personality, "input")) };
    let tokens = text::count(input);
    let usage = Usage { audio_output_tokens: tokens * 4, ..Usage::new(tokens, tokens * 4) };
    let sound = |count: usize| {
        let mut random = fastrand::Rng::with_seed(text::seed(model.as_bytes()));
        std::iter::repeat_with(move || random.u8(..)).take(count).collect::<Vec<u8>>()
    };
    if ask.text("stream_format") == Some("sse") {
        let audio = text::base64(&sound(BYTES_PER_AUDIO_TOKEN));
        let delta = json!({"type": "speech.audio.delta", "audio": audio});
        let mut events: Vec<Event> = (0..tokens).map(|_| Event::data(&delta, 4)).collect();
        let report = json!({"input_tokens": tokens, "output_tokens": tokens * 4, "total_tokens": tokens * 5});
        events.push(Event::data(&json!({"type": "speech.audio.done", "usage": report}), 0));
        return Ok(Answer::events(events).generating(usage));
    }
    let length = usize::try_from(tokens).unwrap_or(0).saturating_mul(4 * BYTES_PER_AUDIO_TOKEN);
    Ok(Answer::whole("audio/mpeg", Bytes::from(sound(length))).generating(usage))
}

/// `images/generations` and `images/edits`.
pub(super) fn image(ask: &Ask<'_>) -> Answer {
    let form = Form::read(ask);
    let prompt = ask.text("prompt").map(str::to_owned).or_else(|| form?.text("prompt")).unwrap_or_default();
    let count = ask.number("n").unwrap_or(1).clamp(1, 10);
    let tokens = text::count(&prompt);
    let drawn = 272 * count;
    let usage = Usage { image_output_tokens: drawn, ..Usage::new(tokens, drawn) };
    let picture = json!({"b64_json": text::base64(b"\x89PNG\r\n\x1a\n: a picture in name only")});
    let data: Vec<Value> = (0..count).map(|_| picture.clone()).collect();
    let report = json!({"input_tokens": tokens, "output_tokens": drawn, "total_tokens": tokens + drawn,
        "input_tokens_details": {"text_tokens": tokens, "image_tokens": 0}});
    Answer::json(&json!({"created": ask.created, "data": data, "usage": report})).generating(usage)
}

pub(super) fn moderation(ask: &Ask<'_>) -> Answer {
    let result =
        json!({"flagged": false, "categories": {"violence": false}, "category_scores": {"violence": 0.01}});
    let count = ask.member("input").and_then(Value::as_array).map_or(1, Vec::len);
    let model = ask.text("model").unwrap_or("omni-moderation-latest");
    let results: Vec<Value> = (0..count).map(|_| result.clone()).collect();
    Answer::json(&json!({"id": ask.id("modr-"), "model": model, "results": results}))
}

/// The fields of a `multipart/form-data` body.
pub(super) struct Form {
    fields: Vec<(String, Bytes)>,
}

impl Form {
    pub(super) fn read(ask: &Ask<'_>) -> Option<Self> {
        let boundary =
            ask.content_type.split_once("boundary=")?.1.split(';').next()?.trim().trim_matches('"');
        let delimiter = format!("--{boundary}");
        let mut fields = Vec::new();
        let mut starts = memchr::memmem::find_iter(ask.body, delimiter.as_bytes()).peekable();
        while let Some(start) = starts.next() {
            let Some(end) = starts.peek() else { break };
            let part = ask.body.slice(start + delimiter.len()..*end);
            fields.extend(part_of(&part));
        }
        Some(Self { fields })
    }

    pub(super) fn field(&self, name: &str) -> Option<&Bytes> {
        self.fields.iter().find(|(field, _)| field == name).map(|(_, value)| value)
    }

    pub(super) fn text(&self, name: &str) -> Option<String> {
        self.field(name).map(|value| String::from_utf8_lossy(value).into_owned())
    }
}

/// Name and value of one part, which begins and ends with a line break.
fn part_of(part: &Bytes) -> Option<(String, Bytes)> {
    let head_end = memchr::memmem::find(part, b"\r\n\r\n")?;
    let head = std::str::from_utf8(&part[..head_end]).ok()?;
    let name = head.split_once(" name=\"")?.1.split('"').next()?.to_owned();
    let value = part.slice(head_end + 4..part.len().checked_sub(2)?.max(head_end + 4));
    Some((name, value))
}
