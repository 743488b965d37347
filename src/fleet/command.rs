//! Control by commands: programs that start and stop a replica, or that are the replica.
//!
//! Each runs in a process group of its own, so that Ctrl-C at our terminal does not reach it and a signal
//! from us reaches what a script has started. What it prints goes to our standard error.

use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::process::{Child, Command};

use super::reins::{Process, Reins};
use crate::config::pattern;

/// Time between SIGTERM and SIGKILL.
pub(super) const STOP_GRACE: Duration = Duration::from_secs(20);
/// A stop command which takes longer is broken off and has failed.
pub(super) const STOP_COMMAND_LIMIT: Duration = Duration::from_mins(5);

/// What a command is told in its environment.
#[derive(Debug, Clone)]
pub(super) struct Subject {
    pub(super) backend: String,
    pub(super) replica: u32,
    pub(super) base_url: String,
    /// Of the planner's lease, where several proxies share one.
    pub(super) token: Option<u64>,
}

/// Runs a start command to its end; `None` when it was stopped by [`stop`].
pub(super) async fn start(
    argv: &[String],
    subject: &Subject,
    mut reins: Reins,
) -> Option<Result<(), String>> {
    let outcome = match spawn(argv, subject) {
        Err(reason) => Some(Err(reason)),
        Ok(mut child) => tokio::select! {
            status = child.wait() => Some(verdict(argv, status)),
            () = reins.asked_to_stop() => {
                terminate(&mut child).await;
                None
            }
        },
    };
    reins.report_end();
    outcome
}

/// Stops a replica: the stop command first if it has served, then SIGTERM to a start command that still runs.
/// A start that is broken off is ended before the stop command runs, so that the two do not work against
/// each other.
pub(super) async fn stop(
    argv: &[String],
    subject: &Subject,
    process: Option<&Process>,
    was_ready: bool,
) -> Result<(), String> {
    if argv.is_empty() && process.is_none() {
        return Err("it was not started by this process and there is no `stop` command".to_owned());
    }
    if let Some(process) = process.filter(|_| !was_ready) {
        process.end().await;
    }
    if !argv.is_empty() {
        run_to_end(argv, subject, STOP_COMMAND_LIMIT).await?;
    }
    if let Some(process) = process {
        process.end().await;
    }
    Ok(())
}

async fn run_to_end(argv: &[String], subject: &Subject, limit: Duration) -> Result<(), String> {
    let mut child = spawn(argv, subject)?;
    if let Ok(status) = tokio::time::timeout(limit, child.wait()).await {
        return verdict(argv, status);
    }
    terminate(&mut child).await;
    Err(format!("`{}` took longer than {} s", argv[0], limit.as_secs()))
}

fn spawn(argv: &[String], subject: &Subject) -> Result<Child, String> {
    let (program, arguments) = argv.split_first().ok_or("the command is empty")?;
    Command::new(program)
        .args(arguments.iter().map(|argument| pattern::expand(argument, subject.replica)))
        .env("BREAKEVEN_BACKEND", &subject.backend)
        .env("BREAKEVEN_REPLICA", subject.replica.to_string())
        .env("BREAKEVEN_BASE_URL", &subject.base_url)
        .envs(subject.token.map(|token| ("BREAKEVEN_LEASE_TOKEN", token.to_string())))
        .stdin(Stdio::null())
        .stdout(Stdio::from(std::io::stderr()))
        .stderr(Stdio::inherit())
        .process_group(0)
        .spawn()
        .map_err(|error| format!("`{program}` cannot be run: {error}"))
}

fn verdict(argv: &[String], status: std::io::Result<ExitStatus>) -> Result<(), String> {
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("`{}` ended with {status}", argv[0])),
        Err(error) => Err(format!("`{}` cannot be waited for: {error}", argv[0])),
    }
}

/// SIGTERM to the group, SIGKILL after [`STOP_GRACE`]. The child is not waited for before it has been sent the
/// signal, so its number cannot belong to another process.
async fn terminate(child: &mut Child) {
    signal(child, Signal::TERM);
    if tokio::time::timeout(STOP_GRACE, child.wait()).await.is_err() {
        signal(child, Signal::KILL);
        drop(child.wait().await);
    }
}

fn signal(child: &Child, signal: Signal) {
    let pid = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    if let Some(pid) = pid {
        // It fails when the group has just ended by itself, which is what is wanted.
        kill_process_group(pid, signal).ok();
    }
}
