//! `breakeven check`: every problem of a configuration at once, and whether its backends answer.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Args;

use crate::config::pattern::{expand, is_pattern};
use crate::config::{self, Backend, BackendKind, Config, Control, Problems};
use crate::health::probe;
use crate::tls;

/// The configuration is wrong, or there is none.
const WRONG: u8 = 2;
/// The configuration is fine, and a backend is not.
const NOT_ANSWERING: u8 = 1;

/// Longest wait for one backend's list of models; a cold server takes seconds.
const ONLINE_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest list of models that is read: thousands of names.
const LONGEST_LIST_BYTES: usize = 4 << 20;
/// Names that are shown of a list of models.
const SHOWN_MODELS: usize = 5;

/// Reports every problem of the configuration, each with file, line, path and remedy.
#[derive(Debug, Clone, Default, Args)]
pub struct CheckArgs {
    /// Configuration file.
    #[arg(long, value_name = "FILE", env = config::CONFIG_VARIABLE)]
    pub config: Option<PathBuf>,
    /// Also ask each backend for its models.
    #[arg(long)]
    pub online: bool,
}

/// Checks the configuration: status 2 when it is wrong, 1 when a backend does not answer.
pub fn run(arguments: &CheckArgs) -> anyhow::Result<ExitCode> {
    let (mut out, mut errors) = (std::io::stdout().lock(), std::io::stderr().lock());
    let loaded = load(arguments.config.as_deref());
    let status = report(&loaded, &mut out, &mut errors).context("cannot write the report")?;
    match loaded {
        Ok((_, config)) if arguments.online => check_online(&config, &mut out, &mut errors),
        _ => Ok(ExitCode::from(status)),
    }
}

fn load(explicit: Option<&Path>) -> Result<(PathBuf, Config), Problems> {
    let path = config::find(explicit).ok_or_else(|| {
        let searched = config::SEARCH_PATHS.join(", ");
        Problems::one(
            "breakeven.toml",
            format!("there is no configuration ({searched})"),
            "name one with `--config`, or begin with config/breakeven.toml of the repository",
        )
    })?;
    Config::load(&path).map(|config| (path, config))
}

/// Says what is wrong, or what the configuration amounts to; the exit status.
fn report(
    loaded: &Result<(PathBuf, Config), Problems>,
    out: &mut impl Write,
    errors: &mut impl Write,
) -> std::io::Result<u8> {
    match loaded {
        Err(problems) => {
            writeln!(errors, "{problems}")?;
            let count = problems.problems.len();
            writeln!(errors, "{count} problem{}", if count == 1 { "" } else { "s" })?;
            Ok(WRONG)
        }
        Ok((path, config)) => {
            let warnings = Problems { origin: path.display().to_string(), problems: config.warnings.clone() };
            for warning in warnings.to_string().lines() {
                writeln!(errors, "warning: {warning}")?;
            }
            writeln!(
                out,
                "{}: fine, with {}, {} and {}",
                path.display(),
                counted(config.backends.len(), "backend"),
                counted(config.routes.len(), "route"),
                counted(config.models.len(), "model"),
            )?;
            Ok(0)
        }
    }
}

fn counted(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

/// Asks every base URL for its models, and says what came back.
fn check_online(config: &Config, out: &mut impl Write, errors: &mut impl Write) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let mut all_answer = true;
    for (index, backend) in config.backends.iter().enumerate() {
        let client = client(backend)?;
        for base_url in &base_urls(backend) {
            match runtime.block_on(list_models(&client, backend, base_url)) {
                Ok(listed) => {
                    writeln!(out, "{}: {base_url}: {}", backend.name, summary(&listed))?;
                    for missing in missing_models(config, index, &listed) {
                        writeln!(
                            errors,
                            "warning: {}: {base_url} does not list `{missing}`; is that its name there?",
                            backend.name
                        )?;
                    }
                }
                Err(Fault::NoKey(status)) => writeln!(
                    out,
                    "{}: {base_url}: answers {status} without a key; clients bring their own",
                    backend.name
                )?,
                Err(fault @ Fault::Unreachable(_)) if is_started_by_us(backend) => {
                    writeln!(out, "{}: {base_url}: {fault}; it is started when it pays", backend.name)?;
                }
                Err(fault) => {
                    all_answer = false;
                    writeln!(errors, "{}: {base_url}: {fault}", backend.name)?;
                }
            }
        }
    }
    Ok(ExitCode::from(if all_answer { 0 } else { NOT_ANSWERING }))
}

/// Where a backend's replicas answer, or would.
fn base_urls(backend: &Backend) -> Vec<String> {
    let replicas = backend.pool().map_or(1, |pool| pool.max_replicas);
    match backend.base_urls.as_slice() {
        [one] if is_pattern(one) => (0..replicas).map(|replica| expand(one, replica)).collect(),
        listed => listed.to_vec(),
    }
}

fn is_started_by_us(backend: &Backend) -> bool {
    matches!(&backend.kind, BackendKind::SelfHosted(own) if own.control != Control::None)
}

/// As the proxy calls: no redirects, no proxy of the environment, no key anywhere but at its backend.
fn client(backend: &Backend) -> anyhow::Result<reqwest::Client> {
    tls::install();
    let builder = reqwest::Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .timeout(ONLINE_TIMEOUT);
    probe::trusting(builder, &backend.authorities)
        .and_then(reqwest::ClientBuilder::build)
        .context("cannot build the HTTP client")
}

/// Why a backend's list of models could not be had.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error("answers {0} without a key")]
    NoKey(reqwest::StatusCode),
    #[error("answers {0}; check `api_key`")]
    KeyRefused(reqwest::StatusCode),
    #[error("answers {0} to `GET /models`; does `base_url` end in `/v1`?")]
    Status(reqwest::StatusCode),
    #[error("does not answer: {0}")]
    Unreachable(String),
    #[error("the answer is no list of models; is it an OpenAI-compatible server?")]
    NotAList,
}

/// Names of the models that a backend lists.
async fn list_models(
    client: &reqwest::Client,
    backend: &Backend,
    base_url: &str,
) -> Result<Vec<String>, Fault> {
    let mut request = client.get(format!("{base_url}/models"));
    if let Some(key) = &backend.api_key {
        request = request.bearer_auth(key.expose());
    }
    for (name, value) in &backend.headers {
        request = request.header(name, value.expose());
    }
    let mut response = request.send().await.map_err(unreachable)?;
    match response.status() {
        status if status.is_success() => {}
        status @ (reqwest::StatusCode::UNAUTHORIZED | reqwest::StatusCode::FORBIDDEN) => {
            let is_api = matches!(backend.kind, BackendKind::Api);
            let brings_own = is_api && backend.api_key.is_none();
            return Err(if brings_own { Fault::NoKey(status) } else { Fault::KeyRefused(status) });
        }
        status => return Err(Fault::Status(status)),
    }
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(unreachable)? {
        body.extend_from_slice(&chunk);
        if body.len() > LONGEST_LIST_BYTES {
            return Err(Fault::NotAList);
        }
    }
    let list: ModelList = serde_json::from_slice(&body).map_err(|_| Fault::NotAList)?;
    Ok(list.data.into_iter().map(|model| model.id).collect())
}

/// The causes of a failure in one line, without the URL, which the line begins with.
fn unreachable(error: reqwest::Error) -> Fault {
    let error = error.without_url();
    let mut causes = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        causes = format!("{causes}: {cause}");
        source = cause.source();
    }
    Fault::Unreachable(causes)
}

#[derive(serde::Deserialize)]
struct ModelList {
    data: Vec<Model>,
}

#[derive(serde::Deserialize)]
struct Model {
    id: String,
}

fn summary(listed: &[String]) -> String {
    let shown = listed.iter().take(SHOWN_MODELS).map(String::as_str).collect::<Vec<_>>().join(", ");
    let more = if listed.len() > SHOWN_MODELS { ", .." } else { "" };
    let colon = if listed.is_empty() { "" } else { ": " };
    format!("{}{colon}{shown}{more}", counted(listed.len(), "model"))
}

/// Names under which routes would ask this backend, and which it does not list.
fn missing_models<'a>(config: &'a Config, backend: usize, listed: &[String]) -> Vec<&'a str> {
    let offers = config.routes.iter().flat_map(|route| {
        let offers = route.offers.iter().filter(move |offer| usize::from(offer.backend.0) == backend);
        offers.flat_map(|offer| match &offer.model {
            Some(model) => std::slice::from_ref(model),
            None => route.models.as_slice(),
        })
    });
    offers.filter(|model| !listed.contains(model)).map(String::as_str).collect()
}
