//! `breakeven import`: another gateway's configuration as one of ours.

pub mod litellm;
mod toml_text;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Args, Subcommand};

/// The longest configuration that is read.
const MAX_BYTES: u64 = 4 << 20;

/// Converts another gateway's configuration.
#[derive(Debug, Clone, Args)]
pub struct ImportArgs {
    #[command(subcommand)]
    source: Source,
}

#[derive(Debug, Clone, Subcommand)]
enum Source {
    /// Convert the config.yaml of LiteLLM's proxy to a breakeven.toml
    ///
    /// What cannot be carried over is said in comments. Lines marked EDIT need you: what a GPU costs by the hour
    /// and sustains is not in LiteLLM's file. `breakeven check` reports those that are left.
    Litellm {
        file: PathBuf,
        /// Where to write it; without this, to standard output
        #[arg(long, short, value_name = "FILE")]
        output: Option<PathBuf>,
    },
}

/// Runs the command: the configuration on stdout or in a file, what is left to do on stderr.
///
/// # Errors
/// When a file cannot be read or written, or is no configuration of that gateway.
pub fn run(arguments: &ImportArgs, out: &mut impl Write) -> anyhow::Result<ExitCode> {
    let Source::Litellm { file, output } = &arguments.source;
    let text = read(file)?;
    let converted = litellm::convert(&text).with_context(|| format!("`{}`", file.display()))?;
    match output {
        None => out.write_all(converted.text.as_bytes()).context("cannot write the configuration")?,
        Some(path) => write_new(path, &converted.text)?,
    }
    eprintln!(
        "{}, {} to edit, {} not carried over: see the comments",
        counted(converted.routes, "route"),
        counted(converted.edits, "line"),
        counted(converted.lost, "setting"),
    );
    if let Some(path) = output {
        eprintln!("next: breakeven check --config {}", path.display());
    }
    Ok(ExitCode::SUCCESS)
}

fn counted(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

fn read(path: &Path) -> anyhow::Result<String> {
    let length = std::fs::metadata(path).with_context(|| format!("cannot read `{}`", path.display()))?.len();
    anyhow::ensure!(length <= MAX_BYTES, "`{}` has {length} bytes, more than {MAX_BYTES}", path.display());
    std::fs::read_to_string(path).with_context(|| format!("cannot read `{}`", path.display()))
}

/// Writes a file that is not there yet: somebody's edits are not lost.
fn write_new(path: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::File::create_new(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("cannot write `{}`; it must not exist", path.display()))
}
