//! What looks at an upstream's answer as it passes.

use bytes::Bytes;

use super::exchange::Produced;
use crate::ledger::Outcome;
use crate::openai::body::BodyReader;
use crate::openai::stream::{Report, StreamReader};
use crate::openai::usage::Reported;
use crate::openai::{ApiError, Endpoint};

/// Reads an answer by its content type.
#[derive(Debug)]
pub enum Reader {
    /// An event stream.
    Events(StreamReader),
    /// A document whose usage is found when it is complete.
    Document(Option<BodyReader>),
    /// Bytes that say nothing of usage.
    Opaque,
}

impl Reader {
    /// The bytes that pass to the client: all of them but an event that the client did not ask for.
    pub fn push(&mut self, chunk: Bytes) -> Bytes {
        match self {
            Self::Events(reader) => reader.push(chunk),
            Self::Document(reader) => {
                if let Some(reader) = reader {
                    reader.push(&chunk);
                }
                chunk
            }
            Self::Opaque => chunk,
        }
    }

    /// The bytes that were held back.
    pub fn finish(&mut self) -> Bytes {
        match self {
            Self::Events(reader) => reader.finish(),
            Self::Document(_) | Self::Opaque => Bytes::new(),
        }
    }

    /// Whether the stream itself has said that it is complete.
    pub fn is_finished(&self) -> bool {
        matches!(self, Self::Events(reader) if reader.report().saw_done || reader.report().saw_end)
    }

    pub fn saw_error(&self) -> bool {
        matches!(self, Self::Events(reader) if reader.report().saw_error)
    }

    /// How the call ended, now that the upstream's body has.
    pub fn outcome(&self) -> Outcome {
        match self {
            Self::Events(reader) if !reader.is_complete() => Outcome::UpstreamError,
            Self::Events(_) | Self::Document(_) | Self::Opaque => Outcome::Success,
        }
    }

    /// Whether the client may get fewer bytes than the upstream sends.
    pub fn may_change_length(&self) -> bool {
        matches!(self, Self::Events(_))
    }

    /// The event that tells a client that its stream is incomplete; none where there are no events.
    pub fn error_event(&self, endpoint: Endpoint, why: &str) -> Option<Bytes> {
        let Self::Events(_) = self else { return None };
        let error = ApiError::new(http::StatusCode::BAD_GATEWAY, "server_error", why).with_code("upstream");
        Some(error.to_event(endpoint))
    }

    /// What is known of a stream so far.
    pub fn report(&self) -> Option<&Report> {
        match self {
            Self::Events(reader) => Some(reader.report()),
            Self::Document(_) | Self::Opaque => None,
        }
    }

    /// The usage that the upstream reported.
    pub fn reported(&mut self) -> Option<Reported> {
        match self {
            Self::Events(reader) => {
                let report = reader.report();
                report.usage.map(|usage| Reported {
                    usage,
                    tier: report.tier.unwrap_or_default(),
                    model: report.model.clone(),
                    id: report.id.clone(),
                })
            }
            Self::Document(reader) => reader.take()?.finish(),
            Self::Opaque => None,
        }
    }

    /// What was produced so far.
    pub fn produced(&self) -> Produced {
        match self {
            Self::Events(reader) => Produced {
                text: reader.produced_text(),
                bytes: reader.report().output_text_bytes,
                kept_share: reader.kept_share(),
            },
            Self::Document(_) | Self::Opaque => Produced::default(),
        }
    }
}
