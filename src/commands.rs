//! One module a command: arguments, and what is done with them.

pub mod calibrate;
pub mod check;
pub mod demo;
pub mod economy;
pub mod export;
pub mod figures;
pub mod healthcheck;
pub mod import;
pub mod keys;
pub mod plan;
pub mod prices;
pub mod report;
pub mod schema;
pub mod serve;
pub mod simulate;

use std::io::{self, stdout};
use std::process::ExitCode;

use clap::CommandFactory as _;

use crate::cli::{Cli, Command};

/// The command or the configuration is wrong.
pub const WRONG: u8 = 2;

/// Runs a command; an error goes to stderr, with its causes.
pub fn run(cli: Cli) -> ExitCode {
    let result = match cli.command {
        Command::Serve(arguments) => serve::run(&arguments),
        Command::Demo(arguments) => demo::run(&arguments, &mut stdout().lock()),
        Command::Check(arguments) => check::run(&arguments),
        Command::Plan(arguments) => plan::run(&arguments, &mut stdout().lock()),
        Command::Simulate(arguments) => simulate::run(&arguments, &mut stdout().lock()),
        Command::Calibrate(arguments) => calibrate::run(&arguments, &mut stdout().lock()),
        Command::Report(arguments) => report::run(&arguments, &mut stdout().lock()),
        Command::Export(arguments) => export::run(&arguments, &mut stdout().lock()),
        Command::Keys(arguments) => keys::run(&arguments, &mut stdout().lock()),
        Command::Prices(arguments) => prices::run(&arguments),
        Command::Import(arguments) => import::run(&arguments, &mut stdout().lock()),
        Command::Healthcheck(arguments) => healthcheck::run(&arguments),
        Command::Schema(arguments) => schema::run(&arguments),
        Command::Completions(arguments) => {
            clap_complete::generate(arguments.shell, &mut Cli::command(), "breakeven", &mut stdout());
            Ok(ExitCode::SUCCESS)
        }
        Command::FakeBackend(arguments) => run_fake_backend(arguments),
    };
    result.unwrap_or_else(|error| {
        if is_broken_pipe(&error) {
            return ExitCode::SUCCESS;
        }
        eprintln!("breakeven: {error:#}");
        ExitCode::from(WRONG)
    })
}

/// Whether the reader of our output went away, as `| head` does: it has seen what it wanted.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let mut causes = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>());
    causes.any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

fn run_fake_backend(arguments: crate::demo::process::FakeBackendArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(crate::demo::process::run(arguments))?;
    Ok(ExitCode::SUCCESS)
}
