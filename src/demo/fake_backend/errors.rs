//! Errors in the shape of each server.

use std::time::Duration;

use http::StatusCode;
use serde_json::{Value, json};

use super::Personality;
use super::script::Refusal;

/// An answer that is an error.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Failure {
    pub(super) status: StatusCode,
    pub(super) body: Value,
    pub(super) retry_after: Option<Duration>,
    /// Where a 307 points to.
    pub(super) location: Option<String>,
}

impl Failure {
    pub(super) fn new(status: u16, body: Value) -> Self {
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Self { status, body, retry_after: None, location: None }
    }
}

/// OpenAI's envelope.
fn envelope(status: u16, kind: &str, code: Option<&str>, param: Option<&str>, message: &str) -> Failure {
    Failure::new(status, json!({"error": {"message": message, "type": kind, "param": param, "code": code}}))
}

fn vllm(status: u16, kind: &str, param: Option<&str>, message: &str) -> Failure {
    Failure::new(status, json!({"error": {"message": message, "type": kind, "param": param, "code": status}}))
}

fn llama(status: u16, kind: &str, message: &str) -> Failure {
    Failure::new(status, json!({"error": {"code": status, "message": message, "type": kind}}))
}

/// A wrong key, or none.
pub(super) fn unauthorized(personality: Personality, given: Option<&str>) -> Failure {
    match (personality, given) {
        (Personality::OpenAi, Some(key)) => {
            let message = format!(
                "Incorrect API key provided: {}. You can find your API key at \
                 https://platform.openai.com/account/api-keys.",
                masked(key)
            );
            envelope(401, "invalid_request_error", Some("invalid_api_key"), None, &message)
        }
        (Personality::OpenAi, None) => {
            let message = "You didn't provide an API key. You need to provide your API key in an \
                           Authorization header using Bearer auth (i.e. Authorization: Bearer YOUR_KEY).";
            envelope(401, "invalid_request_error", None, None, message)
        }
        (Personality::Vllm, _) => Failure::new(401, json!({"error": "Unauthorized"})),
        (Personality::LlamaCpp, _) => llama(401, "authentication_error", "Invalid API Key"),
    }
}

/// The first and last four letters of a key.
fn masked(key: &str) -> String {
    let letters: Vec<char> = key.chars().collect();
    if letters.len() <= 8 {
        return "*".repeat(letters.len());
    }
    let (head, tail) = (&letters[..4], &letters[letters.len() - 4..]);
    let stars = "*".repeat(letters.len() - 8);
    head.iter().copied().chain(stars.chars()).chain(tail.iter().copied()).collect()
}

pub(super) fn unknown_model(personality: Personality, model: &str, models: &[String]) -> Failure {
    match personality {
        Personality::OpenAi => {
            let message = format!("The model `{model}` does not exist or you do not have access to it.");
            envelope(404, "invalid_request_error", Some("model_not_found"), None, &message)
        }
        Personality::Vllm | Personality::LlamaCpp => {
            let aliases = models.join(", ");
            let message = format!("The model `{model}` does not exist. Valid aliases: {aliases}.");
            vllm(404, "NotFoundError", Some("model"), &message)
        }
    }
}

pub(super) fn context_too_long(personality: Personality, tokens: u64, window: u64) -> Failure {
    match personality {
        Personality::OpenAi => {
            let message = format!(
                "This model's maximum context length is {window} tokens. However, your messages resulted in \
                 {tokens} tokens. Please reduce the length of the messages."
            );
            let code = Some("context_length_exceeded");
            envelope(400, "invalid_request_error", code, Some("messages"), &message)
        }
        Personality::Vllm => {
            let message = format!(
                "This model's maximum context length is {window} tokens. However, your prompt contains at least \
                 {tokens} input tokens, which exceeds this limit even without any output tokens. Please reduce \
                 the length of the input prompt. (parameter=input_tokens, value={tokens})"
            );
            vllm(400, "BadRequestError", Some("input_tokens"), &message)
        }
        Personality::LlamaCpp => {
            let message = format!(
                "request ({tokens} tokens) exceeds the available context size ({window} tokens), try increasing it"
            );
            let error = json!({"code": 400, "message": message, "type": "exceed_context_size_error",
                "n_prompt_tokens": tokens, "n_ctx": window});
            Failure::new(400, json!({"error": error}))
        }
    }
}

/// A body that is no JSON.
pub(super) fn bad_json(personality: Personality, body_is_empty: bool) -> Failure {
    match (personality, body_is_empty) {
        (Personality::OpenAi, _) => {
            let message = "We could not parse the JSON body of your request. (HINT: This likely means you aren't \
                           using your HTTP library correctly.)";
            envelope(400, "invalid_request_error", None, None, message)
        }
        (Personality::Vllm, true) => {
            let message = "1 validation error:\n  {'type': 'missing', 'loc': 'body', 'msg': 'Field required', \
                           'input': 'None'}";
            vllm(400, "Bad Request", Some("body"), message)
        }
        (Personality::Vllm, false) => {
            let message = "1 validation error:\n  {'type': 'json_invalid', 'loc': 'body.0', 'msg': 'JSON decode \
                           error', 'input': '<dict of 0 items>', 'ctx': {'error': 'Expecting value'}}";
            vllm(400, "Bad Request", Some("body.0"), message)
        }
        (Personality::LlamaCpp, _) => {
            let message = "[json.exception.parse_error.101] parse error at line 1, column 1: syntax error while \
                           parsing value";
            llama(500, "server_error", message)
        }
    }
}

/// A required member that is absent.
pub(super) fn missing(personality: Personality, member: &str) -> Failure {
    match personality {
        Personality::OpenAi => {
            let message = format!("Missing required parameter: '{member}'.");
            let code = Some("missing_required_parameter");
            envelope(400, "invalid_request_error", code, Some(member), &message)
        }
        Personality::Vllm => {
            let message = format!(
                "1 validation error:\n  {{'type': 'missing', 'loc': 'body.{member}', 'msg': 'Field required'}}"
            );
            vllm(400, "Bad Request", Some(&format!("body.{member}")), &message)
        }
        Personality::LlamaCpp => llama(400, "invalid_request_error", &format!("'{member}' is required")),
    }
}

/// A member that is there and may not be.
pub(super) fn not_allowed(personality: Personality, member: &str, message: &str) -> Failure {
    match personality {
        Personality::OpenAi => envelope(400, "invalid_request_error", None, Some(member), message),
        Personality::Vllm => {
            vllm(400, "BadRequestError", Some(member), &format!("{message} (parameter={member})"))
        }
        Personality::LlamaCpp => llama(400, "invalid_request_error", message),
    }
}

/// A path that is not served.
pub(super) fn not_found(personality: Personality, method: &str, path: &str) -> Failure {
    match personality {
        Personality::OpenAi => {
            let message = format!("Invalid URL ({method} {path})");
            envelope(404, "invalid_request_error", None, None, &message)
        }
        Personality::Vllm => Failure::new(404, json!({"detail": "Not Found"})),
        Personality::LlamaCpp => Failure::new(
            404,
            json!({"error": {"message": "File Not Found", "type": "not_found_error", "code": 404}}),
        ),
    }
}

/// An object that OpenAI does not know: a file, a batch, a response.
pub(super) fn no_such_object(kind: &str, id: &str) -> Failure {
    let message = format!("No such {kind} object: {id}");
    envelope(404, "invalid_request_error", None, Some("id"), &message)
}

/// Embeddings asked of a server that runs a chat model.
pub(super) fn no_embeddings(personality: Personality, path: &str) -> Failure {
    match personality {
        Personality::LlamaCpp => {
            let message = "This server does not support embeddings. Start it with `--embeddings`";
            llama(501, "not_supported_error", message)
        }
        Personality::OpenAi | Personality::Vllm => not_found(personality, "POST", path),
    }
}

/// A model that is still being loaded.
pub(super) fn loading(personality: Personality) -> Failure {
    match personality {
        Personality::LlamaCpp => llama(503, "unavailable_error", "Loading model"),
        Personality::OpenAi | Personality::Vllm => Failure::new(503, Value::Null),
    }
}

/// A refusal that the script ordered.
pub(super) fn ordered(personality: Personality, refusal: Refusal) -> Failure {
    let Refusal { status, retry_after } = refusal;
    let failure = match (personality, status) {
        (_, 401) => unauthorized(personality, Some("sk-refused-by-script")),
        (Personality::OpenAi, 429) => {
            let message = "Rate limit reached for requests. Limit: 500 / min. Please try again in 120ms.";
            envelope(429, "requests", Some("rate_limit_exceeded"), None, message)
        }
        (Personality::OpenAi, 500..) => {
            let message = "The server had an error while processing your request. Sorry about that!";
            envelope(status, "server_error", None, None, message)
        }
        (Personality::OpenAi, _) => {
            envelope(status, "invalid_request_error", None, None, "Refused by the script.")
        }
        (Personality::Vllm, _) => vllm(status, "InternalServerError", None, DEAD_ENGINE),
        (Personality::LlamaCpp, _) => llama(status, "server_error", "Compute error."),
    };
    Failure { retry_after, ..failure }
}

const DEAD_ENGINE: &str = "EngineCore encountered an issue. See stack trace (above) for the root cause.";

/// What a server puts into a stream when it fails after it has begun.
pub(super) fn in_stream(personality: Personality) -> Value {
    ordered(personality, Refusal { status: 500, retry_after: None }).body
}

/// llama.cpp's `/slots?fail_on_no_slot=1` while all are busy.
pub(super) fn no_slot() -> Failure {
    llama(503, "unavailable_error", "no slot available")
}

/// A compressed request body: neither self-hosted server takes one.
pub(super) fn compressed_body(personality: Personality) -> Failure {
    match personality {
        Personality::LlamaCpp => Failure::new(415, Value::Null),
        Personality::OpenAi | Personality::Vllm => bad_json(personality, false),
    }
}
