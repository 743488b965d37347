//! `breakeven schema`: the JSON Schema of the configuration, for editors.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;

use crate::config;

/// Prints the JSON Schema of `breakeven.toml`.
#[derive(Debug, Clone, Default, Args)]
pub struct SchemaArgs {}

/// Prints the schema on standard output.
pub fn run(_: &SchemaArgs) -> anyhow::Result<ExitCode> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, &config::schema()).context("cannot write the schema")?;
    writeln!(out).context("cannot write the schema")?;
    Ok(ExitCode::SUCCESS)
}
