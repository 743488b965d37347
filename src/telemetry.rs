//! Logs: readable alone, queryable by field, never a body, a prompt or a key; and spans, if they are built in.

pub mod spans;

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;

use crate::config::{LogFormat, LogSettings};

/// Installs the subscriber, on stderr. A second call changes nothing.
pub fn install(settings: &LogSettings) {
    let filter = EnvFilter::try_from_env("BREAKEVEN_LOG")
        .or_else(|_| EnvFilter::try_new(&settings.filter))
        .unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_span_events(FmtSpan::NONE)
        .with_ansi(std::io::stderr().is_terminal())
        // They would go to stderr as well, where `eprintln!` panics when it cannot write: a log on a full disk, or
        // whose reader is gone, would end the process.
        .log_internal_errors(false)
        .with_writer(std::io::stderr);
    let installed = match settings.format {
        LogFormat::Text => builder.with_target(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    if installed.is_err() {
        tracing::debug!("a log subscriber is installed already");
    }
}

/// Makes panics a log line that names the place and not the values: a message may quote a client's data.
pub fn install_panic_hook() {
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map_or_else(|| "an unknown place".to_owned(), ToString::to_string);
        tracing::error!(place, "a bug made a task panic at {place}");
    }));
}
