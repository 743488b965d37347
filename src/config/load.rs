//! From a file, a text or the command line to a [`Config`].

use std::io;
use std::path::{Path, PathBuf};

use super::validate::{self, Secrets, Surroundings};
use super::{Config, LedgerSettings, Place, Problem, Problems, defaults};

/// Names the configuration file when `--config` does not.
pub const CONFIG_VARIABLE: &str = "BREAKEVEN_CONFIG";

/// Where a configuration is looked for, in this order, when nobody names one.
pub const SEARCH_PATHS: [&str; 3] =
    ["breakeven.toml", "config/breakeven.toml", "/etc/breakeven/breakeven.toml"];

/// The configuration file to use: the one that was named, by option or environment, whether or not it exists;
/// else the first of [`SEARCH_PATHS`] that does.
pub fn find(explicit: Option<&Path>) -> Option<PathBuf> {
    let named = explicit.map(Path::to_owned).or_else(|| std::env::var_os(CONFIG_VARIABLE).map(PathBuf::from));
    named.or_else(|| SEARCH_PATHS.iter().map(PathBuf::from).find(|path| path.is_file()))
}

impl Config {
    /// The configuration in a file, with the secrets and files that it refers to.
    pub fn load(path: &Path) -> Result<Self, Problems> {
        load_reading(path, &|path| std::fs::read_to_string(path))
    }

    /// As [`Config::load`], to measure what backends sustain: they need not say it.
    pub fn load_to_calibrate(path: &Path) -> Result<Self, Problems> {
        load_with(path, &|path| std::fs::read_to_string(path), Secrets::Needed, false)
    }

    /// As [`Config::load`], for commands that call nobody: secrets are left out, and need not be there.
    pub fn load_without_secrets(path: &Path) -> Result<Self, Problems> {
        load_with(path, &|path| std::fs::read_to_string(path), Secrets::NotNeeded, true)
    }
}

/// The ledger's part of the configuration in a file. Problems of other parts, and their secrets, do not matter.
pub fn ledger_settings(path: &Path) -> Result<LedgerSettings, Problems> {
    let read = |path: &Path| std::fs::read_to_string(path);
    let (origin, text) = read_text(path, &read)?;
    let folder = path.parent().unwrap_or(Path::new(""));
    validate::ledger_settings(
        &text,
        &origin,
        &Surroundings { env: &variable, read: &read, folder, secrets: Secrets::Needed, needs_capacity: true },
    )
}

fn read_text(path: &Path, read: &dyn Fn(&Path) -> io::Result<String>) -> Result<(String, String), Problems> {
    let origin = path.display().to_string();
    let text = read(path).map_err(|error| {
        Problems::one(&origin, format!("cannot read it: {error}"), "name another file with `--config`")
    })?;
    Ok((origin, text))
}

/// As [`Config::load`], through the caller's way to read files.
pub(super) fn load_reading(
    path: &Path,
    read: &dyn Fn(&Path) -> io::Result<String>,
) -> Result<Config, Problems> {
    load_with(path, read, Secrets::Needed, true)
}

fn load_with(
    path: &Path,
    read: &dyn Fn(&Path) -> io::Result<String>,
    secrets: Secrets,
    needs_capacity: bool,
) -> Result<Config, Problems> {
    let (origin, text) = read_text(path, read)?;
    let folder = path.parent().unwrap_or(Path::new(""));
    validate::parse(&text, &origin, &Surroundings { env: &variable, read, folder, secrets, needs_capacity })
}

/// The configuration that a text describes. Files that it refers to are found from the working directory.
///
/// `origin` is how problems name the text; `env` looks an environment variable up.
pub fn parse(text: &str, origin: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<Config, Problems> {
    let read = |path: &Path| std::fs::read_to_string(path);
    let surroundings = Surroundings {
        env,
        read: &read,
        folder: Path::new(""),
        secrets: Secrets::Needed,
        needs_capacity: true,
    };
    validate::parse(text, origin, &surroundings)
}

/// The process's environment, as `env` of [`parse`]. A variable that is not UTF-8 is not set.
pub fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// A first run without a file: what `serve --openai --self-hosted URL --hourly-usd X --model NAME` says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct QuickStart {
    /// Whether OpenAI's API is a backend. Its key is `OPENAI_API_KEY`, or the client's own without one.
    pub openai: bool,
    /// Base URL of a self-hosted backend.
    pub self_hosted: Option<String>,
    /// Rent of one replica for one hour, a decimal of USD.
    pub hourly_usd: Option<String>,
    /// `NAME`, or `NAME=NAME_AT_THE_SELF_HOSTED_BACKEND`.
    pub models: Vec<String>,
}

/// The configuration of a first run, checked as a file would be.
pub fn quick_start(start: &QuickStart, env: &dyn Fn(&str) -> Option<String>) -> Result<Config, Problems> {
    const ORIGIN: &str = "command line";
    let lacking = what_lacks(start);
    if !lacking.is_empty() {
        let problem = |(what, remedy): &(&str, &str)| Problem {
            place: Place::default(),
            what: (*what).to_owned(),
            remedy: (*remedy).to_owned(),
        };
        return Err(Problems { origin: ORIGIN.to_owned(), problems: lacking.iter().map(problem).collect() });
    }
    let text = quick_start_text(start, env("OPENAI_API_KEY").is_some_and(|key| !key.is_empty()));
    parse(&text, ORIGIN, env).map_err(|mut problems| {
        // There is no file whose lines could be shown.
        for problem in &mut problems.problems {
            problem.place.line = None;
        }
        problems
    })
}

/// What a first run cannot do without, in the words of the command line.
fn what_lacks(start: &QuickStart) -> Vec<(&'static str, &'static str)> {
    let own = start.self_hosted.is_some();
    let needs = [
        (
            !own && !start.openai,
            "there is no backend",
            "add `--openai`, `--self-hosted http://127.0.0.1:8000/v1`, or both",
        ),
        (
            own && start.hourly_usd.is_none(),
            "nobody knows what the self-hosted backend costs",
            "add `--hourly-usd` with the rent of one replica for an hour",
        ),
        (
            own && start.models.is_empty(),
            "no model goes to the self-hosted backend",
            "add `--model NAME`, or `--model NAME=NAME_THERE`",
        ),
        (!own && start.hourly_usd.is_some(), "nothing costs `--hourly-usd`", "add `--self-hosted URL`"),
    ];
    needs.into_iter().filter(|(lacks, ..)| *lacks).map(|(_, what, remedy)| (what, remedy)).collect()
}

fn quick_start_text(start: &QuickStart, has_key: bool) -> String {
    let mut backends = toml::Table::new();
    if start.openai {
        let mut openai = toml::toml! { kind = "api" base_url = "https://api.openai.com/v1" };
        if has_key {
            openai.insert("api_key".to_owned(), toml::toml! { env = "OPENAI_API_KEY" }.into());
        }
        backends.insert("openai".to_owned(), openai.into());
    }
    if let Some(url) = &start.self_hosted {
        let mut own = toml::Table::new();
        own.insert("kind".to_owned(), "self_hosted".into());
        own.insert("base_url".to_owned(), url.as_str().into());
        if let Some(hourly) = &start.hourly_usd {
            own.insert("hourly_usd".to_owned(), hourly.as_str().into());
        }
        let integer = |count: u64| toml::Value::from(i64::try_from(count).unwrap_or(i64::MAX));
        let mut capacity = toml::Table::new();
        for (key, count) in [
            ("input_tokens_per_second", defaults::QUICK_START_INPUT_TOKENS_PER_SECOND),
            ("output_tokens_per_second", defaults::QUICK_START_OUTPUT_TOKENS_PER_SECOND),
            ("max_in_flight", defaults::QUICK_START_MAX_IN_FLIGHT),
        ] {
            capacity.insert(key.to_owned(), integer(count));
        }
        own.insert("capacity".to_owned(), capacity.into());
        backends.insert("self_hosted".to_owned(), own.into());
    }
    let mut routes = toml::Table::new();
    for model in &start.models {
        let (name, own_name) = model.split_once('=').unwrap_or((model, model));
        let mut offers = Vec::new();
        if start.openai {
            offers.push(toml::Value::from(toml::toml! { backend = "openai" }));
        }
        if start.self_hosted.is_some() {
            let mut offer = toml::toml! { backend = "self_hosted" };
            offer.insert("model".to_owned(), own_name.into());
            offers.push(offer.into());
        }
        let mut route = toml::Table::new();
        route.insert("models".to_owned(), vec![toml::Value::from(name)].into());
        route.insert("offers".to_owned(), offers.into());
        routes.insert(name.to_owned(), route.into());
    }
    let mut root = toml::Table::new();
    root.insert("backends".to_owned(), backends.into());
    root.insert("routes".to_owned(), routes.into());
    root.to_string()
}
