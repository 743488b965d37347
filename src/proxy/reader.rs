//! What looks at an upstream's answer as it passes.

use bytes::Bytes;

use super::encoded::EncodedEvents;
use super::exchange::Produced;
use crate::ledger::Outcome;
use crate::openai::body::BodyReader;
use crate::openai::encoding::Encoding;
use crate::openai::stream::{Report, StreamReader};
use crate::openai::usage::Reported;
use crate::openai::{ApiError, Endpoint};

/// Reads an answer by its content type.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "nearly all that are made are of the largest")]
pub enum Reader {
    /// An event stream.
    Events(StreamReader),
    /// An event stream that is compressed.
    Encoded(Box<EncodedEvents>),
    /// A document whose usage is found when it is complete.
    Document(Option<BodyReader>),
    /// Bytes that say nothing of usage.
    Opaque,
}

impl Reader {
    /// Chooses by the answer's headers. `strip_usage`: the usage chunk of a stream was asked for by us.
    /// `sums_choices`: each choice has one of its own.
    pub fn of(
        endpoint: Endpoint,
        content_type: &str,
        encoding: Option<&str>,
        strip_usage: bool,
        sums_choices: bool,
    ) -> Self {
        if content_type.starts_with("text/event-stream") {
            let events = |strips| {
                let reader = StreamReader::new(endpoint, strips);
                if sums_choices { reader.summing_choices() } else { reader }
            };
            return match Encoding::of(encoding) {
                Encoding::Identity => Self::Events(events(strip_usage)),
                Encoding::Coded(coding) => {
                    let strips = strip_usage && coding.is_prompt();
                    Self::Encoded(Box::new(EncodedEvents::new(coding, events(strips), strips)))
                }
                Encoding::Unknown => Self::Opaque,
            };
        }
        // The output of a batch comes as an `application/octet-stream`.
        if content_type.contains("json") || endpoint == Endpoint::Files {
            return Self::Document(Some(BodyReader::new(endpoint, encoding)));
        }
        Self::Opaque
    }

    /// What is read of an event stream.
    fn events(&self) -> Option<&StreamReader> {
        match self {
            Self::Events(reader) => Some(reader),
            Self::Encoded(encoded) => Some(encoded.reader()),
            Self::Document(_) | Self::Opaque => None,
        }
    }

    /// The bytes that pass to the client: all of them but an event that the client did not ask for.
    pub fn push(&mut self, chunk: Bytes) -> Bytes {
        match self {
            Self::Events(reader) => reader.push(chunk),
            Self::Encoded(encoded) => encoded.push(chunk),
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
            Self::Encoded(encoded) => encoded.finish(),
            Self::Document(_) | Self::Opaque => Bytes::new(),
        }
    }

    /// Whether the stream itself has said that it is complete.
    pub fn is_finished(&self) -> bool {
        self.report().is_some_and(|report| report.saw_done || report.saw_end)
    }

    pub fn saw_error(&self) -> bool {
        self.report().is_some_and(|report| report.saw_error)
    }

    /// Whether what comes cannot be read, so that there is nothing to pass.
    pub fn is_broken(&self) -> bool {
        matches!(self, Self::Encoded(encoded) if encoded.is_broken())
    }

    /// How the call ended, now that the upstream's body has.
    pub fn outcome(&self) -> Outcome {
        let is_complete = match self {
            Self::Events(reader) => reader.is_complete(),
            Self::Encoded(encoded) => encoded.is_complete(),
            Self::Document(_) | Self::Opaque => true,
        };
        if is_complete { Outcome::Success } else { Outcome::UpstreamError }
    }

    /// Whether the client may get fewer bytes than the upstream sends, or others.
    pub fn may_change_length(&self) -> bool {
        matches!(self, Self::Events(_)) || self.unpacks()
    }

    /// Whether the client gets without its coding what came with one.
    pub fn unpacks(&self) -> bool {
        matches!(self, Self::Encoded(encoded) if encoded.unpacks())
    }

    /// The event that tells a client that its stream is incomplete; none where no event can be added.
    pub fn error_event(&self, endpoint: Endpoint, why: &str) -> Option<Bytes> {
        if !matches!(self, Self::Events(_)) && !self.unpacks() {
            return None;
        }
        let error = ApiError::new(http::StatusCode::BAD_GATEWAY, "server_error", why).with_code("upstream");
        Some(error.to_event(endpoint))
    }

    /// What is known of a stream so far.
    pub fn report(&self) -> Option<&Report> {
        self.events().map(StreamReader::report)
    }

    /// The usage that the upstream reported.
    pub fn reported(&mut self) -> Option<Reported> {
        if let Self::Document(reader) = self {
            return reader.take()?.finish();
        }
        let report = self.report()?;
        report.usage.map(|usage| Reported {
            usage,
            tier: report.tier.unwrap_or_default(),
            model: report.model.clone(),
            id: report.id.clone(),
            is_background: report.is_background,
        })
    }

    /// What was produced so far.
    pub fn produced(&self) -> Produced {
        self.events().map_or_else(Produced::default, |reader| Produced {
            text: reader.produced_text(),
            bytes: reader.report().output_text_bytes,
            kept_share: reader.kept_share(),
        })
    }
}
