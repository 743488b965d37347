//! The command line.

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

use crate::commands::calibrate::CalibrateArgs;
use crate::commands::check::CheckArgs;
use crate::commands::demo::DemoArgs;
use crate::commands::export::ExportArgs;
use crate::commands::healthcheck::HealthcheckArgs;
use crate::commands::import::ImportArgs;
use crate::commands::keys::KeysArgs;
use crate::commands::plan::PlanArgs;
use crate::commands::prices::PricesArgs;
use crate::commands::report::ReportArgs;
use crate::commands::schema::SchemaArgs;
use crate::commands::serve::ServeArgs;
use crate::commands::simulate::SimulateArgs;
use crate::demo::process::FakeBackendArgs;

/// Routes each LLM call to the API or to your own GPU, whichever costs less at the current volume.
///
/// Begin with `breakeven demo`: it needs no key, no GPU and no configuration.
#[derive(Debug, Parser)]
#[command(name = "breakeven", version, propagate_version = true, max_term_width = 110)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub enum Command {
    Serve(Box<ServeArgs>),
    Demo(Box<DemoArgs>),
    Check(CheckArgs),
    Plan(PlanArgs),
    Simulate(Box<SimulateArgs>),
    Calibrate(CalibrateArgs),
    Report(ReportArgs),
    Export(ExportArgs),
    Keys(KeysArgs),
    Prices(PricesArgs),
    Import(ImportArgs),
    Healthcheck(HealthcheckArgs),
    Schema(SchemaArgs),
    Completions(CompletionsArgs),
    #[command(hide = true)]
    FakeBackend(FakeBackendArgs),
}

/// Prints a completion script, to be sourced by the shell.
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    pub shell: Shell,
}
