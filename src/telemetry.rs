//! Logs: readable alone, queryable by field, never a body, a prompt or a key; and spans, if they are built in.

pub mod spans;

use std::io::IsTerminal as _;
use std::sync::OnceLock;

use tracing_subscriber::fmt::format::FmtSpan;
use tracing_subscriber::{EnvFilter, reload};

use crate::config::{LogFormat, LogSettings};

/// Puts another filter in force.
type Refilter = Box<dyn Fn(EnvFilter) -> Result<(), reload::Error> + Send + Sync>;

/// Of the subscriber that is installed: there is one for the process.
static REFILTER: OnceLock<Refilter> = OnceLock::new();

/// Installs the subscriber, on stderr. A second call changes nothing.
pub fn install(settings: &LogSettings) {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter(settings))
        .with_span_events(FmtSpan::NONE)
        .with_ansi(std::io::stderr().is_terminal())
        // They would go to stderr as well, where `eprintln!` panics when it cannot write: a log on a full disk, or
        // whose reader is gone, would end the process.
        .log_internal_errors(false)
        .with_writer(std::io::stderr);
    // The filter is the outermost layer, so that its level is the process's: what it leaves out costs one comparison.
    let (installed, refilter): (_, Refilter) = match settings.format {
        LogFormat::Text => {
            let builder = builder.with_target(false).with_filter_reloading();
            let handle = builder.reload_handle();
            (builder.try_init(), Box::new(move |filter| handle.reload(filter)))
        }
        LogFormat::Json => {
            let builder = builder.json().flatten_event(true).with_filter_reloading();
            let handle = builder.reload_handle();
            (builder.try_init(), Box::new(move |filter| handle.reload(filter)))
        }
    };
    if installed.is_err() || REFILTER.set(refilter).is_err() {
        tracing::debug!("a log subscriber is installed already");
    }
}

/// Filters as a reloaded configuration says. What is left out is left out before anything looks at it:
///
/// ```
/// use breakeven::{config::{LogFormat, LogSettings}, telemetry};
/// use tracing::level_filters::LevelFilter;
///
/// let settings = |filter: &str| LogSettings { filter: filter.to_owned(), format: LogFormat::Text };
/// telemetry::install(&settings("info"));
/// assert_eq!(LevelFilter::current(), LevelFilter::INFO);
/// telemetry::follow(&settings("info,breakeven=debug"));
/// assert_eq!(LevelFilter::current(), LevelFilter::DEBUG);
/// telemetry::follow(&settings("error"));
/// assert_eq!(LevelFilter::current(), LevelFilter::ERROR);
/// ```
pub fn follow(settings: &LogSettings) {
    if let Some(Err(error)) = REFILTER.get().map(|refilter| refilter(filter(settings))) {
        tracing::warn!(%error, "the log's filter stays as it was: {error}");
    }
}

/// The environment's, else the configuration's.
fn filter(settings: &LogSettings) -> EnvFilter {
    EnvFilter::try_from_env("BREAKEVEN_LOG")
        .or_else(|_| EnvFilter::try_new(&settings.filter))
        .unwrap_or_else(|_| EnvFilter::new("info"))
}

/// Makes panics a log line that names the place and not the values: a message may quote a client's data.
pub fn install_panic_hook() {
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map_or_else(|| "an unknown place".to_owned(), ToString::to_string);
        tracing::error!(place, "a bug made a task panic at {place}");
    }));
}
