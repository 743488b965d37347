//! Measures the proxy on one machine, over loopback: against nginx, against a pass-through that does nothing,
//! and against calling the upstream directly.
//!
//! The mock upstream and the load generator are written on epoll, so that both together cost less CPU per call
//! than any proxy under test.

mod growth;
mod http;
mod instructions;
mod load;
mod mock;
mod passthrough;
mod poll;
mod process;
mod prose;
mod rounds;
mod samples;

use clap::{Parser, Subcommand};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Parser)]
#[command(about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measure all targets in interleaved rounds and print the table.
    Rounds(rounds::Arguments),
    /// Print the table of results measured earlier.
    Table(rounds::TableArguments),
    /// Count the proxy's instructions per call under valgrind, and compare with what is recorded.
    Instructions(instructions::Arguments),
    /// Count instructions per call with few and with many keys and models.
    Growth(growth::Arguments),
    /// Be an OpenAI-compatible upstream.
    Mock(mock::Arguments),
    /// Load one server and print what it did as JSON.
    Load(load::Arguments),
    /// Be a reverse proxy that does nothing but pass on.
    Passthrough(passthrough::Arguments),
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().command {
        Command::Rounds(arguments) => rounds::run(&arguments),
        Command::Table(arguments) => rounds::print_table(&arguments),
        Command::Instructions(arguments) => instructions::run(&arguments),
        Command::Growth(arguments) => growth::run(&arguments),
        Command::Mock(arguments) => mock::run(&arguments),
        Command::Load(arguments) => load::run(&arguments),
        Command::Passthrough(arguments) => passthrough::run(&arguments),
    }
}
