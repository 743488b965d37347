//! OpenAI's error envelope: `{"error":{"message","type","param","code"}}`.

use bytes::Bytes;
use http::StatusCode;
use serde_json::json;

/// An error for the client, in the shape that its SDK expects.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    pub status: StatusCode,
    pub message: String,
    /// `error.type`: `invalid_request_error`, `server_error`, ..
    pub kind: &'static str,
    pub param: Option<String>,
    pub code: Option<&'static str>,
}

impl ApiError {
    pub fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), kind, param: None, code: None }
    }

    /// 400: the request cannot be served as it is.
    pub fn invalid_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    #[must_use]
    pub fn with_param(self, param: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..self }
    }

    #[must_use]
    pub fn with_code(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    /// 400: there is no `model` in the body.
    pub fn missing_model() -> Self {
        Self::invalid_request("you must provide a model parameter").with_param("model")
    }

    /// The envelope.
    pub fn to_bytes(&self) -> Bytes {
        Bytes::from(self.envelope().to_string())
    }

    /// The event that tells the reader of a stream that it ends here. No `[DONE]` follows it.
    pub fn to_event(&self, endpoint: super::Endpoint) -> Bytes {
        let event = match endpoint {
            super::Endpoint::Responses => {
                let data =
                    json!({"type": "error", "code": self.code, "message": self.message, "param": self.param});
                format!("event: error\ndata: {data}\n\n")
            }
            super::Endpoint::Messages => {
                let data = json!({"type": "error", "error": {"type": self.kind, "message": self.message}});
                format!("event: error\ndata: {data}\n\n")
            }
            _ => format!("data: {}\n\n", self.envelope()),
        };
        Bytes::from(event)
    }

    fn envelope(&self) -> serde_json::Value {
        json!({"error": {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }})
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openai::Endpoint;

    #[test]
    fn the_envelope_has_all_four_members() {
        let error = ApiError::missing_model().with_code("missing");
        let value: serde_json::Value = serde_json::from_slice(&error.to_bytes()).unwrap();
        assert_eq!(
            value,
            json!({"error": {"message": "you must provide a model parameter", "type": "invalid_request_error",
                   "param": "model", "code": "missing"}})
        );
    }

    #[test]
    fn a_stream_learns_of_an_error_in_its_own_dialect() {
        let error = ApiError::new(StatusCode::BAD_GATEWAY, "server_error", "cut\noff");
        let chat = error.to_event(Endpoint::ChatCompletions);
        assert!(chat.starts_with(b"data: {\"error\":") && chat.ends_with(b"}\n\n"));
        assert!(error.to_event(Endpoint::Responses).starts_with(b"event: error\ndata: {"));
        assert_eq!(memchr::memchr_iter(b'\n', &chat).count(), 2);
    }
}
