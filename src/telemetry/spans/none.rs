//! No spans: this build has none.

use http::{HeaderMap, HeaderValue};

use super::{Finished, SpansError};

/// Where spans would go.
#[derive(Debug, Default)]
pub struct Spans(());

/// The span that a call does not have.
#[derive(Debug, Default)]
pub struct CallSpan(());

impl Spans {
    /// # Errors
    /// None: what asks for spans was refused when the configuration was read.
    pub fn start(
        &self,
        _endpoint: Option<&str>,
        _client: impl FnOnce() -> reqwest::Client,
    ) -> Result<(), SpansError> {
        if std::env::var_os("OTEL_EXPORTER_OTLP_ENDPOINT").is_some() {
            tracing::warn!(
                "OTEL_EXPORTER_OTLP_ENDPOINT is set, and this build has no spans (feature `otel`)"
            );
        }
        Ok(())
    }

    #[inline]
    pub fn open(&self, _headers: &HeaderMap, _operation: &'static str) -> CallSpan {
        CallSpan::default()
    }

    #[expect(clippy::unused_async, reason = "the interface is that of builds with spans")]
    pub async fn shut_down(&self) {}
}

impl CallSpan {
    #[inline]
    pub fn traceparent(&self) -> Option<HeaderValue> {
        None
    }

    #[inline]
    pub fn is_recording(&self) -> bool {
        false
    }

    #[inline]
    pub fn answered_by(&mut self, _model: Option<&str>) {}

    #[inline]
    pub fn close<'a>(&mut self, _finished: impl FnOnce() -> Finished<'a>) {}
}
