//! Spans by OpenTelemetry's SDK.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::OnceLock;
use std::time::Duration;

use http::{HeaderMap, HeaderValue};
use opentelemetry::propagation::{Extractor, TextMapPropagator as _};
use opentelemetry::trace::{Span as _, SpanBuilder, SpanKind, Status, Tracer as _, TracerProvider as _};
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::{SpanExporter as OtlpExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{
    SdkTracer, SdkTracerProvider, Span, SpanData, SpanExporter, TracerProviderBuilder,
};
use tokio::runtime::Handle;
use tracing::warn;

use super::{Finished, SpansError};

/// Where the endpoint takes spans.
const TRACES_PATH: &str = "/v1/traces";
/// Bound on the sending of one batch.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);
/// Bound on sending off what is queued, at our end.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(5);
/// Either asks for spans, as every OpenTelemetry SDK has it.
const ENDPOINT_VARIABLES: [&str; 2] = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"];

/// Where spans go; nowhere until it is started.
#[derive(Debug, Default)]
pub struct Spans(OnceLock<Started>);

#[derive(Debug)]
struct Started {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

/// The span of one call. Dropped before it is closed, it says that the call was refused or given up.
#[derive(Debug, Default)]
pub struct CallSpan {
    span: Option<Span>,
    /// The model as the answer names it.
    answered_by: Option<String>,
}

impl Spans {
    /// Sends spans from now on, to `endpoint` or to the one that the environment names, if either does. Must be
    /// called inside a tokio runtime, which does the sending.
    ///
    /// # Errors
    /// When the exporter cannot be set up.
    pub fn start(
        &self,
        endpoint: Option<&str>,
        client: impl FnOnce() -> reqwest::Client,
    ) -> Result<(), SpansError> {
        let is_asked = ENDPOINT_VARIABLES.iter().any(|name| std::env::var_os(name).is_some());
        if endpoint.is_none() && !is_asked {
            return Ok(());
        }
        let builder =
            OtlpExporter::builder().with_http().with_http_client(client()).with_timeout(EXPORT_TIMEOUT);
        let builder = match endpoint {
            Some(endpoint) => {
                builder.with_endpoint(format!("{}{TRACES_PATH}", endpoint.trim_end_matches('/')))
            }
            None => builder,
        };
        let exporter = builder.build().map_err(|error| SpansError(error.to_string()))?;
        let exporter = OnRuntime { exporter, runtime: Handle::current() };
        let provider = provider().with_batch_exporter(exporter).build();
        let tracer = provider.tracer("breakeven");
        // A second start changes nothing.
        drop(self.0.set(Started { provider, tracer }));
        Ok(())
    }

    /// Opens the span of a call with these headers.
    pub fn open(&self, headers: &HeaderMap, operation: &'static str) -> CallSpan {
        let Some(Started { tracer, .. }) = self.0.get() else { return CallSpan::default() };
        let parent = TraceContextPropagator::new().extract_with_context(&Context::new(), &Fields(headers));
        let builder = SpanBuilder::from_name(operation).with_kind(SpanKind::Client);
        CallSpan { span: Some(tracer.build_with_context(builder, &parent)), answered_by: None }
    }

    /// Sends off what is queued.
    pub async fn shut_down(&self) {
        let Some(Started { provider, .. }) = self.0.get() else { return };
        let provider = provider.clone();
        let ending = tokio::task::spawn_blocking(move || provider.shutdown_with_timeout(SHUTDOWN_PATIENCE));
        if let Ok(Err(error)) = ending.await {
            warn!(%error, "the last spans were not sent: {error}");
        }
    }
}

/// By default every call has a span, unless its parent is not sampled; `OTEL_TRACES_SAMPLER` says otherwise.
fn provider() -> TracerProviderBuilder {
    let resource = Resource::builder();
    let resource = match std::env::var_os("OTEL_SERVICE_NAME") {
        Some(_) => resource,
        None => resource.with_service_name("breakeven"),
    };
    let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    SdkTracerProvider::builder().with_resource(resource.with_attribute(version).build())
}

impl CallSpan {
    /// The value of `traceparent` for the backend: it names our span as the parent of what follows.
    pub fn traceparent(&self) -> Option<HeaderValue> {
        let context = self.span.as_ref()?.span_context();
        let flags = u8::from(context.is_sampled());
        let value = format!("00-{}-{}-{flags:02x}", context.trace_id(), context.span_id());
        HeaderValue::from_str(&value).ok()
    }

    /// Whether what the call shows is wanted.
    pub fn is_recording(&self) -> bool {
        self.span.as_ref().is_some_and(Span::is_recording)
    }

    /// Notes the model that the answer names.
    pub fn answered_by(&mut self, model: Option<&str>) {
        if self.is_recording() {
            self.answered_by = model.map(str::to_owned);
        }
    }

    /// Ends the span with what the call has shown, once.
    pub fn close<'a>(&mut self, finished: impl FnOnce() -> Finished<'a>) {
        let Some(mut span) = self.span.take() else { return };
        if !span.is_recording() {
            return;
        }
        let call = finished();
        let tokens = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        span.update_name(format!("{} {}", call.operation, call.request_model));
        span.set_attributes([
            KeyValue::new("gen_ai.operation.name", call.operation),
            KeyValue::new("gen_ai.provider.name", call.provider.to_owned()),
            KeyValue::new("gen_ai.request.model", call.request_model.to_owned()),
            KeyValue::new(
                "gen_ai.response.model",
                self.answered_by.take().unwrap_or_else(|| call.response_model.to_owned()),
            ),
            KeyValue::new("gen_ai.usage.input_tokens", tokens(call.input_tokens)),
            KeyValue::new("gen_ai.usage.output_tokens", tokens(call.output_tokens)),
            KeyValue::new("http.response.status_code", i64::from(call.status)),
            KeyValue::new("breakeven.request_id", call.request_id),
            KeyValue::new("breakeven.backend", call.backend.to_owned()),
            KeyValue::new("breakeven.reason", call.reason.to_owned()),
            KeyValue::new("breakeven.cost_usd", call.cost_usd),
            KeyValue::new("breakeven.attempts", i64::from(call.attempts)),
        ]);
        if let Some(seconds) = call.time_to_first_token {
            span.set_attribute(KeyValue::new("gen_ai.response.time_to_first_chunk", seconds));
        }
        if let Some(error) = call.error {
            span.set_attribute(KeyValue::new("error.type", error));
            span.set_status(Status::error(error));
        }
        span.end();
    }
}

impl Drop for CallSpan {
    fn drop(&mut self) {
        if let Some(mut span) = self.span.take() {
            span.set_attribute(KeyValue::new("error.type", "not_forwarded"));
            span.set_status(Status::error("it was refused or given up before a backend was asked"));
            span.end();
        }
    }
}

/// Headers as the propagator reads them.
struct Fields<'a>(&'a HeaderMap);

impl Extractor for Fields<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(http::HeaderName::as_str).collect()
    }
}

/// An exporter whose client needs a tokio runtime: the SDK's thread, which has none, enters ours to poll it.
#[derive(Debug)]
struct OnRuntime<E> {
    exporter: E,
    runtime: Handle,
}

impl<E: SpanExporter> SpanExporter for OnRuntime<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let exporting = {
            let _entered = self.runtime.enter();
            tokio::time::timeout(EXPORT_TIMEOUT, self.exporter.export(batch))
        };
        let mut exporting = pin!(exporting);
        let exported = poll_fn(|context| {
            let _entered = self.runtime.enter();
            exporting.as_mut().poll(context)
        });
        exported.await.unwrap_or(Err(OTelSdkError::Timeout(EXPORT_TIMEOUT)))
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}
