//! Which endpoint answers a path, and the small endpoints: models, health, metrics.

use bytes::Bytes;
use serde_json::{Value, json};

use super::answer::{Answer, Ask};
use super::errors::{self, Failure};
use super::{Personality, Server, chat, media, responses};

/// Whether the script's faults apply to it: calls do, probes do not.
pub(super) fn is_call(path: &str) -> bool {
    path.strip_prefix("/v1/").is_some_and(|rest| !rest.starts_with("models"))
}

/// What the fake made, for those who call it from another process.
const TOTALS: &str = "/fake/totals";

/// Whether a server with a key serves the path to anyone.
pub(super) fn is_open(personality: Personality, path: &str) -> bool {
    match personality {
        _ if path == TOTALS => true,
        Personality::OpenAi => false,
        Personality::Vllm => matches!(path, "/health" | "/metrics" | "/version" | "/ping"),
        Personality::LlamaCpp => matches!(path, "/health" | "/v1/models"),
    }
}

/// Paths outside `/v1`; none when the path is not one of them.
pub(super) fn own(server: &Server, path: &str, query: &str) -> Option<Result<Answer, Failure>> {
    let settings = server.settings();
    let personality = server.personality;
    if path == TOTALS {
        return Some(Ok(Answer::json(&totals(server))));
    }
    if path == "/health" && !settings.healthy {
        return Some(Err(errors::loading(personality)));
    }
    Some(Ok(match (personality, path) {
        (Personality::OpenAi, _) => return None,
        (Personality::Vllm, "/health" | "/ping") => Answer::whole("text/plain", Bytes::new()),
        (Personality::LlamaCpp, "/health") => Answer::json(&json!({"status": "ok"})),
        (Personality::Vllm, "/version") => Answer::json(&json!({"version": "0.32.0"})),
        (_, "/metrics") => Answer::whole("text/plain; version=0.0.4; charset=utf-8", metrics(server).into()),
        (Personality::LlamaCpp, "/slots") => {
            let running = server.slots.running();
            if query.contains("fail_on_no_slot=1") && running >= settings.slots {
                return Some(Err(errors::no_slot()));
            }
            let slot = |id: usize| json!({"id": id, "n_ctx": settings.context_window, "is_processing": id < running});
            Answer::json(&(0..settings.slots.min(1024)).map(slot).collect::<Value>())
        }
        _ => return None,
    }))
}

fn totals(server: &Server) -> Value {
    let totals = server.log.totals();
    json!({"requests": totals.requests, "refused": totals.refused, "aborted": totals.aborted,
        "usage": totals.usage, "running": server.slots.running(), "waiting": server.slots.waiting(),
        "most_running": server.slots.most_running()})
}

fn metrics(server: &Server) -> String {
    let (running, waiting) = (server.slots.running(), server.slots.waiting());
    let usage = server.log.totals().usage;
    let settings = server.settings();
    let rows: Vec<(&str, &str, String)> = match server.personality {
        Personality::LlamaCpp => vec![
            ("llamacpp:prompt_tokens_total", "counter", usage.input_tokens.to_string()),
            ("llamacpp:tokens_predicted_total", "counter", usage.output_tokens.to_string()),
            ("llamacpp:requests_processing", "gauge", running.to_string()),
            ("llamacpp:requests_deferred", "gauge", waiting.to_string()),
        ],
        Personality::OpenAi | Personality::Vllm => {
            let share = f64::from(u32::try_from(running).unwrap_or(u32::MAX))
                / f64::from(u32::try_from(settings.slots).unwrap_or(u32::MAX).max(1));
            vec![
                ("vllm:num_requests_running", "gauge", format!("{running}.0")),
                ("vllm:num_requests_waiting", "gauge", format!("{waiting}.0")),
                ("vllm:kv_cache_usage_perc", "gauge", format!("{:?}", share.min(1.0))),
                ("vllm:prompt_tokens_total", "counter", format!("{}.0", usage.input_tokens)),
                ("vllm:generation_tokens_total", "counter", format!("{}.0", usage.output_tokens)),
            ]
        }
    };
    let model = settings.models.first().map(String::as_str).unwrap_or_default();
    let labels = match server.personality {
        Personality::LlamaCpp => String::new(),
        Personality::OpenAi | Personality::Vllm => format!("{{engine=\"0\",model_name=\"{model}\"}}"),
    };
    let row =
        |(name, kind, value): (&str, &str, String)| format!("# TYPE {name} {kind}\n{name}{labels} {value}\n");
    rows.into_iter().map(row).collect()
}

/// Paths below `/v1`.
pub(super) fn v1(server: &Server, ask: &Ask<'_>) -> Result<Answer, Failure> {
    if let Some(answer) = only_openai(ask).and_then(|()| server.store.answer(ask)) {
        return answer;
    }
    let openai = ask.personality == Personality::OpenAi;
    match (ask.method, ask.path) {
        ("GET", "/models") => Ok(models(ask)),
        ("GET", path) if openai && path.starts_with("/models/") => one_model(ask, &path["/models/".len()..]),
        ("POST", "/chat/completions") => with_json(ask).and_then(|()| chat::chat(ask)),
        ("POST", "/completions") => with_json(ask).and_then(|()| chat::completions(ask)),
        ("POST", "/responses") => with_json(ask).and_then(|()| responses::responses(ask)),
        ("POST", "/embeddings") => with_json(ask).and_then(|()| media::embeddings(ask)),
        ("POST", "/audio/transcriptions" | "/audio/translations") if openai => media::transcription(ask),
        ("POST", "/audio/speech") if openai => with_json(ask).and_then(|()| media::speech(ask)),
        ("POST", "/images/generations" | "/images/edits") if openai => Ok(media::image(ask)),
        ("POST", "/moderations") if openai => with_json(ask).map(|()| media::moderation(ask)),
        ("GET", "/chat/completions" | "/completions" | "/responses")
            if ask.personality == Personality::Vllm =>
        {
            Err(Failure::new(405, json!({"detail": "Method Not Allowed"})))
        }
        _ => Err(errors::not_found(ask.personality, ask.method, &format!("/v1{}", ask.path))),
    }
}

fn only_openai(ask: &Ask<'_>) -> Option<()> {
    (ask.personality == Personality::OpenAi).then_some(())
}

fn with_json(ask: &Ask<'_>) -> Result<(), Failure> {
    if ask.json.is_object() { Ok(()) } else { Err(errors::bad_json(ask.personality, ask.body.is_empty())) }
}

fn models(ask: &Ask<'_>) -> Answer {
    let data: Vec<Value> = ask.settings.models.iter().map(|name| model(ask, name)).collect();
    Answer::json(&json!({"object": "list", "data": data}))
}

fn one_model(ask: &Ask<'_>, name: &str) -> Result<Answer, Failure> {
    if ask.settings.models.iter().any(|known| known == name) {
        return Ok(Answer::json(&model(ask, name)));
    }
    Err(errors::unknown_model(ask.personality, name, &ask.settings.models))
}

fn model(ask: &Ask<'_>, name: &str) -> Value {
    let window = ask.settings.context_window;
    match ask.personality {
        Personality::OpenAi => {
            json!({"id": name, "object": "model", "created": 1_721_172_741, "owned_by": "system"})
        }
        Personality::Vllm => {
            json!({"id": name, "object": "model", "created": ask.created, "owned_by": "vllm",
            "root": name, "parent": null, "max_model_len": window})
        }
        Personality::LlamaCpp => json!({"id": name, "object": "model", "created": ask.created,
            "owned_by": "llamacpp", "meta": {"n_ctx": window}}),
    }
}
