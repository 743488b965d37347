//! The shape of the source: who may use whom, and what no file may hold.
//!
//! The table of layers is that of ARCHITECTURE.md. A module uses lower layers, and of its own layer only the
//! friends that are listed. Every fault is named with file and line.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

/// Modules from the pure core to the program.
const LAYERS: [&[&str]; 7] = [
    &["economics"],
    &["openai", "prices", "simulator"],
    &["config", "clock", "telemetry", "tls"],
    &["metrics", "ledger", "health", "fleet", "shared", "keys", "upstream"],
    &["gateway", "planner", "proxy"],
    &["server", "admin"],
    &["cli", "commands", "demo", "lib", "main"],
];

/// Who may use whom within a layer; the program's modules may all use each other.
const FRIENDS: [(&str, &[&str]); 8] = [
    ("keys", &["ledger", "metrics", "shared"]),
    ("fleet", &["health"]),
    ("metrics", &["ledger"]),
    ("upstream", &["fleet", "health", "ledger", "metrics"]),
    ("planner", &["gateway"]),
    ("proxy", &["gateway"]),
    ("telemetry", &["config"]),
    ("admin", &["server"]),
];

/// Uses of a higher layer, each with its reason. One that is not needed any more must go.
const EXCEPTIONS: [(&str, &str, &str); 9] = [
    ("openai", "crate::config::ParameterRule", "what a server cannot take is a setting"),
    ("prices", "crate::config::PriceBook", "a price file becomes a part of the configuration"),
    ("prices", "crate::config::undated", "one rule for the names of dated models"),
    ("upstream", "crate::proxy::error", "an attempt fails as the call does"),
    ("upstream", "crate::proxy::exchange", "attempts are noted in the call's record"),
    ("upstream", "crate::proxy::headers", "the head that is sent is the client's"),
    ("gateway", "crate::proxy::count", "the shared state holds the counters"),
    ("gateway", "crate::proxy::vocabularies", "the shared state holds what they count with"),
    ("admin", "crate::commands", "the page reports and reloads as the commands do"),
];

/// What the pure core must not touch: what is not a value comes from outside.
const IMPURE: [&str; 16] = [
    "std::time::Instant",
    "std::time::SystemTime",
    "std::net",
    "std::fs",
    "std::thread",
    "std::env",
    "std::process",
    "std::io",
    "std::sync",
    "tokio",
    "tracing",
    "fastrand",
    "hyper::",
    "reqwest",
    "rusqlite",
    "toml::",
];

/// Longest file, its unit tests excluded.
const LONGEST_FILE_LINES: usize = 600;

/// Longer ones, with the lines they may have: to become shorter, never longer.
const LONGER_FILES: [(&str, usize); 0] = [];

/// Text that no source may hold, and why.
const FORBIDDEN: [(&str, &str); 10] = [
    ("todo!(", "finish it, or leave it out"),
    ("unimplemented!(", "finish it, or leave it out"),
    ("dbg!(", "it is for the desk"),
    ("#[ignore", "a test that is not run proves nothing"),
    ("use crate::{", "write one line for each module, so that the layers can be read"),
    ("#[allow(", "write `#[expect(.., reason = \"..\")]`"),
    ("process::exit(", "return an exit code, so that what is open is closed"),
    ("TODO", "do it"),
    ("FIXME", "fix it"),
    ("XXX", "say what it is"),
];

struct Source {
    path: PathBuf,
    /// `proxy` for `src/proxy.rs` and `src/proxy/body.rs`.
    module: String,
    text: String,
}

impl Source {
    /// Lines with their numbers, without comments.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let lines = self.text.lines().enumerate().map(|(index, line)| (index + 1, line));
        lines.filter(|(_, line)| !line.trim_start().starts_with("//"))
    }

    /// Lines with their numbers before the unit tests.
    fn production_code(&self) -> impl Iterator<Item = (usize, &str)> {
        let end = self.production_lines();
        self.code().take_while(move |(number, _)| *number <= end)
    }

    fn production_lines(&self) -> usize {
        let is_test_file = self.path.file_stem().is_some_and(|stem| stem == "tests");
        if is_test_file { 0 } else { self.text.lines().take_while(|line| *line != "#[cfg(test)]").count() }
    }
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&root, &mut files);
    files.sort();
    assert!(files.len() > 30, "{} holds few sources", root.display());
    let source = |path: PathBuf| {
        let below = path.strip_prefix(&root).unwrap();
        let first = below.components().next().unwrap().as_os_str().to_str().unwrap();
        let module = first.strip_suffix(".rs").unwrap_or(first).to_owned();
        Source { module, text: fs::read_to_string(&path).unwrap(), path }
    };
    files.into_iter().map(source).collect()
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// Paths into the crate that a line names: `crate::config::Secret`.
fn crate_paths(line: &str) -> impl Iterator<Item = &str> {
    line.match_indices("crate::").map(|(at, _)| {
        let path = &line[at..];
        let end = path.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'));
        &path[..end.unwrap_or(path.len())]
    })
}

fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|modules| modules.contains(&module))
}

fn exception<'a>(user: &str, path: &str) -> Option<&'a (&'static str, &'static str, &'static str)> {
    EXCEPTIONS.iter().find(|(module, allowed, _)| *module == user && path.starts_with(allowed))
}

/// Why a module may not use a path; none when it may.
fn layer_fault(user: &str, path: &str) -> Option<String> {
    let used = path.split("::").nth(1).unwrap_or_default();
    // An item of the crate's root, or a macro's own path.
    let (Some(own), Some(other)) = (layer(user), layer(used)) else {
        return layer(user).is_none().then(|| format!("`{user}` is in no layer; add it to the table"));
    };
    let program = LAYERS.len() - 1;
    let is_friend = FRIENDS.iter().any(|(module, friends)| *module == user && friends.contains(&used));
    let may = user == used || other < own || own == program || is_friend || exception(user, path).is_some();
    (!may).then(|| format!("`{user}` (layer {own}) uses `{path}` (layer {other})"))
}

#[track_caller]
fn none(faults: &[String]) {
    let mut list = String::new();
    for fault in faults {
        writeln!(list, "{fault}").unwrap();
    }
    assert!(faults.is_empty(), "\n{list}");
}

fn fault(source: &Source, line: usize, what: &str) -> String {
    format!("{}:{line}: {what}", source.path.display())
}

#[test]
fn a_module_uses_only_the_layers_below_it_and_its_friends() {
    let mut faults = Vec::new();
    for source in sources() {
        for (number, line) in source.production_code() {
            let wrong = crate_paths(line).filter_map(|path| layer_fault(&source.module, path));
            faults.extend(wrong.map(|what| fault(&source, number, &what)));
        }
    }
    none(&faults);
}

#[test]
fn the_pure_core_touches_nothing_but_values() {
    let mut faults = Vec::new();
    for source in sources().iter().filter(|source| source.module == "economics") {
        for (number, line) in source.production_code() {
            let touched = IMPURE.iter().filter(|path| line.contains(*path));
            faults.extend(touched.map(|path| fault(source, number, &format!("`{path}` in the pure core"))));
        }
    }
    none(&faults);
}

#[test]
fn every_exception_is_needed() {
    let sources = sources();
    let used: BTreeSet<&str> = sources
        .iter()
        .flat_map(|source| source.production_code().map(|(_, line)| (source.module.as_str(), line)))
        .flat_map(|(module, line)| crate_paths(line).filter_map(move |path| exception(module, path)))
        .map(|(_, _, reason)| *reason)
        .collect();
    let idle = EXCEPTIONS.iter().filter(|(_, _, reason)| !used.contains(reason));
    none(&idle.map(|(module, path, _)| format!("`{module}` does not use `{path}`")).collect::<Vec<_>>());
}

#[test]
fn every_module_is_in_a_layer_and_every_layer_is_real() {
    let real: BTreeSet<String> = sources().into_iter().map(|source| source.module).collect();
    let listed: BTreeSet<String> =
        LAYERS.iter().flat_map(|modules| modules.iter().map(ToString::to_string)).collect();
    assert_eq!(listed, real);
}

#[test]
fn every_file_opens_with_a_sentence_about_itself_and_stays_within_its_length() {
    let mut faults = Vec::new();
    for source in sources() {
        let lines = source.production_lines();
        let known = LONGER_FILES.iter().find(|(file, _)| source.path.ends_with(file));
        let enough = known.map_or(LONGEST_FILE_LINES, |(_, enough)| *enough);
        if lines > enough {
            faults.push(fault(&source, lines, &format!("{lines} lines; {enough} are enough")));
        } else if known.is_some() && lines <= LONGEST_FILE_LINES {
            faults.push(fault(&source, lines, "is short enough now; take it off the list of longer files"));
        }
        if !source.text.starts_with("//! ") {
            faults.push(fault(&source, 1, "begin with a sentence: `//! ..`"));
        }
        if source.path.ends_with("mod.rs") {
            faults.push(fault(&source, 1, "name it `foo.rs`, beside `foo/`"));
        }
    }
    none(&faults);
}

#[test]
fn no_source_holds_what_is_unfinished_or_hidden() {
    let mut faults = Vec::new();
    for source in sources() {
        for (number, line) in source.text.lines().enumerate() {
            let held = FORBIDDEN.iter().filter(|(text, _)| line.contains(text));
            faults.extend(held.map(|(text, why)| fault(&source, number + 1, &format!("`{text}`: {why}"))));
        }
        for (number, line) in source.production_code() {
            if line.contains(".unwrap()") {
                faults.push(fault(&source, number, "`unwrap`: write `expect` with why it cannot fail"));
            }
            let is_use = line.trim_start().starts_with("use ") || line.trim_start().starts_with("pub use ");
            // plotters' prelude is made for it.
            if is_use && line.contains("::*") && !line.contains("prelude::*") {
                faults.push(fault(&source, number, "a glob import hides where names come from"));
            }
        }
    }
    none(&faults);
}

mod rules {
    use super::{crate_paths, layer_fault};

    #[test]
    fn upward_and_sideways_uses_are_faults() {
        for (user, path) in [
            ("economics", "crate::config::Config"),
            ("ledger", "crate::upstream"),
            ("config", "crate::ledger::Entry"),
            ("health", "crate::fleet"),
            ("server", "crate::admin"),
            ("proxy", "crate::commands::serve"),
            ("nobody", "crate::economics"),
        ] {
            assert!(layer_fault(user, path).is_some(), "{user} {path}");
        }
    }

    #[test]
    fn downward_friendly_and_excepted_uses_are_not() {
        for (user, path) in [
            ("proxy", "crate::economics::NanoUsd"),
            ("upstream", "crate::health"),
            ("upstream", "crate::proxy::exchange::Exchange"),
            ("config", "crate::config::Secret"),
            ("commands", "crate::demo"),
        ] {
            assert_eq!(layer_fault(user, path), None, "{user} {path}");
        }
    }

    #[test]
    fn a_path_ends_where_its_names_end() {
        let line = "use crate::config::{Config, Secret}; let x = crate::clock::Clock::system();";
        let paths: Vec<&str> = crate_paths(line).collect();
        assert_eq!(paths, ["crate::config::", "crate::clock::Clock::system"]);
    }
}
