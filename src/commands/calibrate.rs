//! `breakeven calibrate`: what one replica sustains, measured under bounded load.
//!
//! Two ramps of concurrency, each doubled until the server slows beyond the objectives, gains nothing more, or
//! the bound is reached: long prompts with one token of answer give the input rate, short prompts with long
//! answers the output rate. The last step within the objectives counts.

mod ramp;

use std::io::{IsTerminal as _, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use clap::{Args, ValueEnum};
use serde_json::json;

use super::WRONG;
use crate::config::pattern::expand;
use crate::config::{self, Backend, BackendKind, Config};
use ramp::{Found, Kind, Limits, Target};

/// The server did not answer, or not as it should.
const NOT_ANSWERING: u8 = 1;

/// Measures what one replica of a self-hosted backend sustains, and prints the `capacity` line for the
/// configuration, which need not have one yet.
///
/// It sends made-up prompts straight to the backend's first replica, more and more at a time, and stops when
/// the first token or the pace of tokens is slower than the objectives. Nothing else should use the replica
/// meanwhile.
#[derive(Debug, Clone, Args)]
pub struct CalibrateArgs {
    /// Name of the self-hosted backend in the configuration.
    #[arg(long, value_name = "NAME")]
    pub backend: String,
    /// Configuration file.
    #[arg(long, value_name = "FILE", env = config::CONFIG_VARIABLE)]
    pub config: Option<PathBuf>,
    /// The model's name there; without it, the one that the first route offers.
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// Objective: 95% of first tokens come within this time.
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = duration)]
    pub slo_ttft: Duration,
    /// Objective: the mean time of each token after the first.
    #[arg(long, value_name = "DURATION", default_value = "50ms", value_parser = duration)]
    pub slo_tpot: Duration,
    /// Most calls at a time.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub max_concurrency: u32,
    /// Longest time of each of the two ramps.
    #[arg(long = "for", value_name = "DURATION", default_value = "5m", value_parser = duration)]
    pub longest: Duration,
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Format {
    /// The line for the configuration.
    #[default]
    Toml,
    Json,
}

fn duration(text: &str) -> Result<Duration, String> {
    config::parse_duration(text).ok_or_else(|| format!("`{text}` is not a duration: write 2s, 50ms or 5m"))
}

/// Measures, and prints the line.
pub fn run(arguments: &CalibrateArgs, out: &mut impl Write) -> anyhow::Result<ExitCode> {
    let path = config::find(arguments.config.as_deref())
        .context("there is no configuration: name one with `--config`")?;
    let config = match Config::load_to_calibrate(&path) {
        Ok(config) => config,
        Err(problems) => {
            eprintln!("{problems}");
            return Ok(ExitCode::from(WRONG));
        }
    };
    let target = target(&config, arguments)?;
    let limits = Limits {
        first_token: arguments.slo_ttft,
        per_token: arguments.slo_tpot,
        max_concurrency: arguments.max_concurrency,
        longest: arguments.longest,
        shows_progress: std::io::stderr().is_terminal(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let measured = runtime.block_on(async {
        let input = ramp::climb(&target, Kind::Input, &limits).await?;
        let output = ramp::climb(&target, Kind::Output, &limits).await?;
        Ok::<_, anyhow::Error>((input, output))
    });
    match measured {
        Ok((input, output)) => {
            write(&arguments.backend, &input, &output, arguments.format, out)?;
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => {
            eprintln!("breakeven: `{}` could not be measured: {error:#}", arguments.backend);
            Ok(ExitCode::from(NOT_ANSWERING))
        }
    }
}

fn target(config: &Config, arguments: &CalibrateArgs) -> anyhow::Result<Target> {
    let name = &arguments.backend;
    let id = config
        .backend_named(name)
        .ok_or_else(|| anyhow!("there is no backend `{name}` in the configuration"))?;
    let backend = config.backend(id);
    if !matches!(backend.kind, BackendKind::SelfHosted(_)) {
        bail!("`{name}` is an API: it has no capacity of ours to measure");
    }
    let mut offers =
        config.routes.iter().flat_map(|route| route.offers.iter().map(move |offer| (route, offer)));
    let offered = offers
        .find(|(_, offer)| offer.backend == id)
        .and_then(|(route, offer)| offer.model.clone().or_else(|| route.models.first().cloned()));
    let model = arguments
        .model
        .clone()
        .or(offered)
        .context("no route offers a model there: name one with `--model`")?;
    Ok(Target {
        url: format!("{}/chat/completions", first_base(backend)?),
        model,
        key: backend.api_key.clone(),
        authorities: backend.authorities.clone(),
        run: fastrand::u32(..),
    })
}

fn first_base(backend: &Backend) -> anyhow::Result<String> {
    let first = backend.base_urls.first().with_context(|| format!("`{}` has no `base_url`", backend.name))?;
    Ok(expand(first, 0))
}

fn write(
    backend: &str,
    input: &Found,
    output: &Found,
    format: Format,
    out: &mut impl Write,
) -> std::io::Result<()> {
    let (input_rate, output_rate, in_flight) =
        (input.tokens_per_second, output.tokens_per_second, output.concurrency);
    match format {
        Format::Toml => {
            writeln!(
                out,
                "# [backends.{backend}], measured: first tokens within {:?} (95%), {:?} a token, {} calls at a time",
                output.first_token, output.per_token, in_flight
            )?;
            writeln!(
                out,
                "capacity = {{ input_tokens_per_second = {input_rate}, output_tokens_per_second = {output_rate}, max_in_flight = {in_flight} }}"
            )
        }
        Format::Json => {
            let json = json!({
                "backend": backend,
                "capacity": {
                    "input_tokens_per_second": input_rate,
                    "output_tokens_per_second": output_rate,
                    "max_in_flight": in_flight,
                },
                "first_token_p95_seconds": output.first_token.as_secs_f64(),
                "time_per_output_token_seconds": output.per_token.as_secs_f64(),
                "calls": input.calls + output.calls,
            });
            writeln!(out, "{json:#}")
        }
    }
}
