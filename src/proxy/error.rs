//! The ways in which the proxy itself refuses or fails a call, as an `OpenAI` SDK expects them.

use std::time::Duration;

use http::{HeaderValue, Response, StatusCode, header};

use super::admit::tell_limits;
use super::body::Body;
use crate::keys::Unknown;
use crate::keys::admission::Limits;
use crate::openai::ApiError;

#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    #[error("{}", .0.message)]
    Request(ApiError),
    #[error("the request body exceeds {limit} bytes; raise `limits.max_body_bytes` to allow it")]
    BodyTooLarge { limit: usize },
    #[error("the upload exceeds {limit} bytes; raise `limits.max_upload_bytes` to allow it")]
    UploadTooLarge { limit: u64 },
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
    Unavailable {
        model: String,
        /// Until a backend may be asked again, as far as that is known.
        retry_after: Option<Duration>,
    },
    #[error("backend `{backend}` did not answer: {why}")]
    Upstream { backend: String, why: &'static str },
    #[error("backend `{backend}` did not answer in time")]
    UpstreamTimeout { backend: String },
    #[error("the proxy is at its limit of {limit} calls in flight")]
    Overloaded { limit: usize },
    #[error(
        "this caller has its share of the proxy's {limit} places for calls; try again when some of its calls have ended"
    )]
    BeyondShare { limit: usize },
    #[error(
        "the proxy holds {limit} bytes of request bodies, and `limits.max_buffered_bytes` allows no more"
    )]
    BuffersFull { limit: usize },
    #[error("the proxy is shutting down")]
    Draining,
    #[error("the proxy refuses calls while it cannot record them: {why}")]
    LedgerUnavailable { why: String },
    #[error("no backend offers the model `{model}`")]
    UnknownModel { model: String },
    #[error("{}", unknown_key(*.0))]
    InvalidKey(Unknown),
    #[error("the model `{model}` does not exist or this key may not use it")]
    ModelNotAllowed { model: String },
    #[error("this key may not use {what}")]
    NotAllowed { what: &'static str },
    #[error("this key's rate limit for {what} is reached; try again in {} ms", wait.as_millis())]
    RateLimited { what: &'static str, wait: Duration, limits: Limits },
    #[error("the budget `{budget}` is spent")]
    BudgetSpent {
        budget: String,
        /// Until its period ends; none: it never does.
        retry_after_seconds: Option<u64>,
    },
    #[error("this proxy's part of the budget `{budget}` is spent; others hold the rest, try again")]
    BudgetElsewhere { budget: String },
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
            Self::BodyTooLarge { .. } | Self::UploadTooLarge { .. } => {
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
            Self::Overloaded { .. } | Self::BuffersFull { .. } => {
                (StatusCode::SERVICE_UNAVAILABLE, "server_error", "overloaded")
            }
            Self::BeyondShare { .. } => (StatusCode::TOO_MANY_REQUESTS, "requests", "rate_limit_exceeded"),
            Self::Draining => (StatusCode::SERVICE_UNAVAILABLE, "server_error", "draining"),
            Self::LedgerUnavailable { .. } => {
                (StatusCode::SERVICE_UNAVAILABLE, "server_error", "ledger_unavailable")
            }
            Self::InvalidKey(_) => (StatusCode::UNAUTHORIZED, "invalid_request_error", "invalid_api_key"),
            Self::ModelNotAllowed { .. } => {
                (StatusCode::NOT_FOUND, "invalid_request_error", "model_not_found")
            }
            Self::NotAllowed { .. } => (StatusCode::FORBIDDEN, "invalid_request_error", "not_allowed"),
            Self::RateLimited { what, .. } => (StatusCode::TOO_MANY_REQUESTS, *what, "rate_limit_exceeded"),
            Self::BudgetSpent { .. } | Self::BudgetElsewhere { .. } => {
                (StatusCode::TOO_MANY_REQUESTS, "insufficient_quota", "insufficient_quota")
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
        match self {
            Self::InvalidKey(_) => "authentication",
            Self::ModelNotAllowed { .. } => "not_allowed",
            Self::RateLimited { .. } => "rate_limit",
            Self::BudgetSpent { .. } | Self::BudgetElsewhere { .. } => "budget",
            Self::BeyondShare { .. } => "share",
            _ => self.shape().code,
        }
    }

    /// Whether the call was refused before any backend was tried.
    pub fn is_refusal(&self) -> bool {
        !matches!(self, Self::Upstream { .. } | Self::UpstreamTimeout { .. })
    }

    fn retry_after_seconds(&self) -> Option<u64> {
        match self {
            Self::Unavailable { retry_after, .. } => Some(whole_seconds(retry_after.unwrap_or_default())),
            Self::Overloaded { .. }
            | Self::BuffersFull { .. }
            | Self::BeyondShare { .. }
            | Self::BudgetElsewhere { .. }
            | Self::Draining => Some(1),
            Self::LedgerUnavailable { .. } => Some(5),
            Self::RateLimited { wait, .. } => Some(whole_seconds(*wait)),
            Self::BudgetSpent { retry_after_seconds, .. } => *retry_after_seconds,
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
        match &self {
            Self::RateLimited { limits, .. } => tell_limits(headers, limits),
            // OpenAI's SDKs obey it: a new attempt can only be refused again.
            Self::BudgetSpent { .. } => {
                headers.insert("x-should-retry", HeaderValue::from_static("false"));
            }
            _ => {}
        }
        response
    }
}

/// As `Retry-After` has it: at least one, and not less than the wait.
fn whole_seconds(wait: Duration) -> u64 {
    wait.as_millis().div_ceil(1000).max(1).try_into().unwrap_or(u64::MAX)
}

const fn unknown_key(why: Unknown) -> &'static str {
    match why {
        Unknown::Missing => "no API key was provided; send a virtual key as `Authorization: Bearer sk-be-..`",
        Unknown::Invalid => "incorrect API key provided",
        Unknown::Expired => "this API key has expired",
        Unknown::Revoked => "this API key was revoked",
    }
}
