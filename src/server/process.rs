//! What the operating system allows this process, and what it may leave behind.

use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::{debug, warn};

use crate::config::Limits;

/// Files beside connections: the ledger, its journal, listeners, libraries.
const OTHER_FILES: u64 = 64;

/// Raises the number of files that may be open as far as it goes, and says so when the configured limits need
/// more: without files, connections to backends fail, and backends look broken.
pub fn allow_open_files(limits: &Limits) {
    let allowed = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: allowed.maximum, maximum: allowed.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        debug!(%error, "the limit of open files stays as it is: {error}");
    }
    let needed = limits.max_connections as u64 + limits.max_in_flight as u64 + OTHER_FILES;
    if let Some(open) = getrlimit(Resource::Nofile).current.filter(|open| *open < needed) {
        warn!(
            open,
            needed,
            "only {open} files may be open, and `limits.max_connections` and `limits.max_in_flight` need {needed}: \
             raise the hard limit (`LimitNOFILE`, `ulimit -Hn`) or lower these"
        );
    }
}

/// A crash leaves no memory on disk: it holds keys and prompts. Debuggers of other users than root are kept
/// out as well.
pub fn forbid_core_dumps() {
    let forbidden = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })
        .and_then(|()| set_dumpable_behavior(DumpableBehavior::NotDumpable));
    if let Err(error) = forbidden {
        warn!(%error, "a crash may leave a core dump with keys and prompts: {error}");
    }
}

/// Makes a file that may not grow (`ulimit -f`) an error of the write, as a full disk is, instead of the end of
/// the process.
pub fn survive_file_size_limit() -> std::io::Result<Signal> {
    signal(SignalKind::from_raw(rustix::process::Signal::XFSZ.as_raw()))
}
