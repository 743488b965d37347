//! Spans of calls, with OpenTelemetry's names for generative AI, to an OTLP endpoint.
//!
//! A span is opened when a call has been let in and closed when its row is written, with what the row says. Its
//! parent is the client's `traceparent`, whose sampled flag is honoured, and the backend gets a `traceparent` that
//! names our span as its parent. Closing puts the span into a bounded queue, which a thread of its own sends off in
//! batches; when the queue is full, spans are dropped and calls do not wait.
//!
//! All of it is in builds with the feature `otel` alone. Without it the types here are empty: nothing is opened,
//! and a `traceparent` passes through untouched.

#[cfg(not(feature = "otel"))]
mod none;
#[cfg(feature = "otel")]
mod otlp;

#[cfg(not(feature = "otel"))]
pub use none::{CallSpan, Spans};
#[cfg(feature = "otel")]
pub use otlp::{CallSpan, Spans};

/// What a finished call has shown.
#[derive(Debug)]
pub struct Finished<'a> {
    /// The id of the ledger's row and of the response's header.
    pub request_id: String,
    /// `chat`, `text_completion`, `embeddings`, or what else was asked for.
    pub operation: &'static str,
    /// Who made the answer, by OpenTelemetry's names where there is one: `openai`, `azure.ai.openai`, `vllm`.
    pub provider: &'a str,
    pub request_model: &'a str,
    /// As it was asked for at the backend; what the answer names comes first.
    pub response_model: &'a str,
    pub input_tokens: u64,
    pub output_tokens: u64,
    pub backend: &'a str,
    pub reason: &'a str,
    pub cost_usd: f64,
    pub attempts: u32,
    pub status: u16,
    /// Seconds from the request to its first token, of a stream.
    pub time_to_first_token: Option<f64>,
    /// Why the call was no success.
    pub error: Option<&'static str>,
}

/// The exporter could not be set up.
#[derive(Debug, thiserror::Error)]
#[error("spans cannot be sent: {0}")]
pub struct SpansError(pub String);
