//! What a call's span says, from its ledger row.

use super::Exchange;
use crate::config::{BackendKind, dialect};
use crate::ledger::{Entry, Outcome};
use crate::openai::Endpoint;
use crate::telemetry::spans::Finished;
use crate::upstream::Backend;

impl Exchange {
    /// What the span of a call with this row says.
    pub(super) fn finished<'a>(&'a self, entry: &'a Entry) -> Finished<'a> {
        let backend = self.served.as_ref().map(|served| &served.backend);
        Finished {
            request_id: entry.id.to_string(),
            operation: operation(self.endpoint),
            provider: backend.map_or("", |backend| provider(backend)),
            request_model: &entry.requested_model,
            response_model: &entry.served_model,
            input_tokens: entry.usage.input_tokens,
            output_tokens: entry.usage.output_tokens,
            backend: &entry.backend,
            reason: &entry.reason,
            cost_usd: entry.cost.to_usd_f64(),
            attempts: entry.attempts,
            status: entry.status,
            time_to_first_token: self.first_token.map(|after| after.as_secs_f64()),
            error: (entry.outcome != Outcome::Success).then(|| entry.outcome.as_str()),
        }
    }
}

/// OpenTelemetry's name for what was asked for, where it has one.
pub(in crate::proxy) fn operation(endpoint: Endpoint) -> &'static str {
    match endpoint {
        Endpoint::ChatCompletions | Endpoint::Responses | Endpoint::Messages => "chat",
        Endpoint::Completions => "text_completion",
        Endpoint::Embeddings => "embeddings",
        other => other.as_str(),
    }
}

/// OpenTelemetry's name for who answers, where it has one.
fn provider(backend: &Backend) -> &'static str {
    match &backend.spec.kind {
        BackendKind::Api if backend.spec.base_urls.iter().any(|url| url.contains(".azure.com")) => {
            "azure.ai.openai"
        }
        BackendKind::Api => "openai",
        BackendKind::SelfHosted(own) => match own.server {
            dialect::Server::Vllm => "vllm",
            dialect::Server::Sglang => "sglang",
            dialect::Server::Tgi => "tgi",
            dialect::Server::LlamaCpp => "llama_cpp",
            dialect::Server::Ollama => "ollama",
            dialect::Server::Other => "self_hosted",
        },
    }
}
