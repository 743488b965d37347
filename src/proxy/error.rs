//! The ways in which the proxy itself refuses or fails a call, as an `OpenAI` SDK expects them.

use http::{HeaderValue, Response, StatusCode, header};

use super::body::Body;
use crate::openai::ApiError;

#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    #[error("{}", .0.message)]
    Request(ApiError),
    #[error("the request body exceeds {limit} bytes; raise `limits.max_body_bytes` to allow it")]
    BodyTooLarge { limit: usize },
    #[error("the request body did not arrive in time")]
    BodyTimeout,
    #[error("the request body ended early")]
    BodyBroken,
    #[error("no API backend is configured for this path")]
    NoBackend,
    #[error("no backend that offers `{model}` can serve this call: {why}")]
    NotEligible { model: String, why: &'static str },
    #[error("no price is known for `{model}`; add it under `[prices.models]`")]
    Unpriced { model: String },
    #[error("backend `{backend}` is not one of those that may serve this call")]
    UnknownBackend { backend: String },
    #[error("no backend that offers `{model}` is available now")]
    Unavailable { model: String, retry_after_seconds: u64 },
    #[error("backend `{backend}` did not answer: {why}")]
    Upstream { backend: String, why: &'static str },
    #[error("backend `{backend}` did not answer in time")]
    UpstreamTimeout { backend: String },
    #[error("the proxy is at its limit of {limit} calls in flight")]
    Overloaded { limit: usize },
    #[error("the proxy is shutting down")]
    Draining,
    #[error("the proxy cannot record calls now, so it refuses them; its log says why")]
    LedgerUnavailable,
    #[error("no backend offers the model `{model}`")]
    UnknownModel { model: String },
    #[error("a bug in the proxy ended this call; its log says where")]
    Internal,
}

/// `type`, `code` and status of an envelope, and the label of the metric.
struct Shape {
    status: StatusCode,
    kind: &'static str,
    code: &'static str,
}

impl ProxyError {
    fn shape(&self) -> Shape {
        let (status, kind, code) = match self {
            Self::Request(_) => (StatusCode::BAD_REQUEST, "invalid_request_error", "invalid_request"),
            Self::BodyTooLarge { .. } => {
                (StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", "body_too_large")
            }
            Self::BodyTimeout => (StatusCode::REQUEST_TIMEOUT, "invalid_request_error", "body_timeout"),
            Self::BodyBroken => (StatusCode::BAD_REQUEST, "invalid_request_error", "body_broken"),
            Self::NoBackend => (StatusCode::NOT_FOUND, "invalid_request_error", "no_backend"),
            Self::NotEligible { .. } => (StatusCode::BAD_REQUEST, "invalid_request_error", "not_eligible"),
            Self::Unpriced { .. } => (StatusCode::BAD_REQUEST, "invalid_request_error", "unpriced"),
            Self::UnknownBackend { .. } => {
                (StatusCode::BAD_REQUEST, "invalid_request_error", "unknown_backend")
            }
            Self::UnknownModel { .. } => (StatusCode::NOT_FOUND, "invalid_request_error", "model_not_found"),
            Self::Unavailable { .. } => (StatusCode::SERVICE_UNAVAILABLE, "server_error", "unavailable"),
            Self::Upstream { .. } => (StatusCode::BAD_GATEWAY, "server_error", "upstream"),
            Self::UpstreamTimeout { .. } => (StatusCode::GATEWAY_TIMEOUT, "server_error", "upstream_timeout"),
            Self::Overloaded { .. } => (StatusCode::SERVICE_UNAVAILABLE, "server_error", "overloaded"),
            Self::Draining => (StatusCode::SERVICE_UNAVAILABLE, "server_error", "draining"),
            Self::LedgerUnavailable => {
                (StatusCode::SERVICE_UNAVAILABLE, "server_error", "ledger_unavailable")
            }
            Self::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "server_error", "internal"),
        };
        Shape { status, kind, code }
    }

    pub fn status(&self) -> StatusCode {
        match self {
            Self::Request(error) => error.status,
            _ => self.shape().status,
        }
    }

    /// The metric label: one of a fixed set.
    pub fn label(&self) -> &'static str {
        self.shape().code
    }

    /// Whether the call was refused before any backend was tried.
    pub fn is_refusal(&self) -> bool {
        !matches!(self, Self::Upstream { .. } | Self::UpstreamTimeout { .. })
    }

    fn retry_after_seconds(&self) -> Option<u64> {
        match self {
            Self::Unavailable { retry_after_seconds, .. } => Some(*retry_after_seconds),
            Self::Overloaded { .. } | Self::Draining => Some(1),
            Self::LedgerUnavailable => Some(5),
            _ => None,
        }
    }

    /// The error as `OpenAI`'s envelope: `{"error":{"message","type","param","code"}}`.
    pub fn into_response(self) -> Response<Body> {
        let status = self.status();
        let retry_after = self.retry_after_seconds();
        let envelope = if let Self::Request(error) = &self {
            error.to_bytes()
        } else {
            let shape = self.shape();
            ApiError::new(shape.status, shape.kind, self.to_string()).with_code(shape.code).to_bytes()
        };
        let mut response = Response::new(Body::full(envelope));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
