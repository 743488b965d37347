//! The fake server as a process of its own: something that a `start` command can start and a `stop` can end.

use std::io::Write;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::{FakeBackend, Personality, Settings};

/// Runs a scriptable server that speaks OpenAI's API.
#[derive(Debug, Clone, Args)]
pub struct FakeBackendArgs {
    #[arg(long, default_value = "127.0.0.1:8000")]
    pub listen: SocketAddr,
    #[arg(long, value_enum, default_value = "vllm")]
    pub personality: Personality,
    /// Models it has; none: any.
    #[arg(long = "model")]
    pub models: Vec<String>,
    /// The only key that it accepts.
    #[arg(long)]
    pub api_key: Option<String>,
    /// Time to first token, in milliseconds.
    #[arg(long, default_value_t = 20)]
    pub ttft_ms: u64,
    /// Time per output token, in milliseconds.
    #[arg(long, default_value_t = 2)]
    pub tpot_ms: u64,
    /// Requests that generate at once; more of them wait.
    #[arg(long, default_value_t = 64)]
    pub slots: usize,
    /// Tokens of a reply that no limit cuts.
    #[arg(long, default_value_t = 64)]
    pub output_tokens: u64,
    /// Time that it loads its model, in milliseconds. vLLM listens only afterwards; llama.cpp answers 503.
    #[arg(long, default_value_t = 0)]
    pub startup_ms: u64,
}

/// Serves until SIGTERM or Ctrl-C. Prints its URL when it is ready.
pub async fn run(args: FakeBackendArgs) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let startup = Duration::from_millis(args.startup_ms);
    let loads_while_listening = args.personality == Personality::LlamaCpp && !startup.is_zero();
    let settings = Settings {
        models: args.models,
        api_key: args.api_key,
        time_to_first_token: Duration::from_millis(args.ttft_ms),
        time_per_output_token: Duration::from_millis(args.tpot_ms),
        slots: args.slots,
        output_tokens: args.output_tokens,
        loading: loads_while_listening,
        ..Settings::default()
    };
    let serve = async {
        if !loads_while_listening {
            tokio::time::sleep(startup).await;
        }
        let fake = FakeBackend::start_on(args.listen, args.personality, settings)
            .await
            .with_context(|| format!("cannot listen on {}", args.listen))?;
        if loads_while_listening {
            tokio::time::sleep(startup).await;
            fake.set(|settings| settings.loading = false);
        }
        writeln!(std::io::stdout(), "{}", fake.url()).context("cannot print the URL")?;
        std::future::pending::<Result<()>>().await
    };
    tokio::select! {
        result = serve => result,
        _ = terminate.recv() => Ok(()),
        _ = tokio::signal::ctrl_c() => Ok(()),
    }
}
