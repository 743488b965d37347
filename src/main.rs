//! The program: parses arguments, runs, turns an error into an exit status.

use std::process::ExitCode;

use clap::Parser as _;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    breakeven::commands::run(breakeven::cli::Cli::parse())
}
