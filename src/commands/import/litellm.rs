//! The configuration of LiteLLM's proxy, read.
//!
//! A *deployment* there is one entry of `model_list`; deployments of one `model_name` are a *group*, which is a route
//! here. Deployments at one address under one key are a backend. Self-hosted addresses that serve the same models
//! are the replicas of one backend.

mod provider;
mod write;

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use self::provider::Server;
use super::toml_text::{bare, plain, unique};

/// What came of a conversion.
#[derive(Debug)]
pub struct Converted {
    /// The breakeven.toml.
    pub text: String,
    pub routes: usize,
    /// Lines that the owner must complete.
    pub edits: usize,
    /// Settings that could not be carried over.
    pub lost: usize,
}

/// Converts the text of a `config.yaml`.
///
/// # Errors
/// When it is not YAML, or has no `model_list`.
pub fn convert(yaml: &str) -> anyhow::Result<Converted> {
    let root: Value = serde_saphyr::from_str(yaml).map_err(|error| {
        anyhow::anyhow!("is not the YAML that LiteLLM reads: {}", first_line(&error.to_string()))
    })?;
    let list = root.get("model_list").and_then(Value::as_array).filter(|list| !list.is_empty());
    let Some(list) = list else {
        anyhow::bail!("has no `model_list`; is it the config.yaml of LiteLLM's proxy?");
    };
    let mut plan = Plan::default();
    for (index, entry) in list.iter().enumerate() {
        plan.add(index, entry);
    }
    plan.part_keys();
    plan.put_wildcard_first();
    plan.read_aliases(&root);
    plan.add_fallbacks(&root);
    Ok(write::write(&plan, &root))
}

/// A parser's message may go on with an excerpt, which may hold a key.
fn first_line(message: &str) -> &str {
    message.lines().next().unwrap_or_default()
}

/// Backends, routes, and what was left out.
#[derive(Debug, Default)]
struct Plan {
    backends: Vec<Backend>,
    routes: Vec<Route>,
    /// What was not carried over, and why.
    lost: Vec<(String, String)>,
    /// The backend that a wildcard stands for.
    wildcard: Option<String>,
}

#[derive(Debug)]
struct Backend {
    name: String,
    kind: Kind,
    /// Addresses; none when they come from the environment.
    base_urls: Vec<String>,
    /// Where an address came from, if not from the file.
    address_variable: Option<String>,
    key: Option<Key>,
    organization: Option<String>,
    timeout_seconds: Option<f64>,
    max_in_flight: Option<u64>,
    /// What it serves: the group, and the model's name there. Equal sets are replicas of one another.
    serves: BTreeSet<(String, String)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Api,
    SelfHosted(Server),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Key {
    variable: String,
    /// It stood in the file in plain text, and is not repeated.
    was_written_out: bool,
}

#[derive(Debug)]
struct Route {
    group: String,
    /// Other names of the group.
    aliases: Vec<String>,
    offers: Vec<Offer>,
}

#[derive(Debug, Clone, PartialEq)]
struct Offer {
    backend: String,
    model: String,
    /// Lines of its table, such as `tools = true`.
    facts: Vec<String>,
    /// It is there for failures only.
    is_fallback: bool,
}

/// Members of `litellm_params` that are carried over, or mean nothing here.
const UNDERSTOOD: [&str; 13] = [
    "model",
    "api_base",
    "base_url",
    "api_key",
    "organization",
    "timeout",
    "max_parallel_requests",
    "input_cost_per_token",
    "output_cost_per_token",
    "cache_read_input_token_cost",
    "custom_llm_provider",
    "use_in_pass_through",
    "mock_response",
];

impl Plan {
    fn add(&mut self, index: usize, entry: &Value) {
        let empty = Map::new();
        let group = text(entry, "model_name").unwrap_or_default();
        let params = entry.get("litellm_params").and_then(Value::as_object).unwrap_or(&empty);
        let place = match group.as_str() {
            "" => format!("model_list[{}]", index + 1),
            group => format!("model_list[{}] `{}`", index + 1, plain(group)),
        };
        let Some(model) = params.get("model").and_then(Value::as_str).filter(|_| !group.is_empty()) else {
            self.lost.push((place, "it has no `model_name`, or no `litellm_params.model`".to_owned()));
            return;
        };
        let custom = params.get("custom_llm_provider").and_then(Value::as_str);
        let base = params.get("api_base").or_else(|| params.get("base_url")).and_then(Value::as_str);
        let target = match provider::target(model, custom, base) {
            Ok(target) => target,
            Err(why) => {
                self.lost.push((place, why));
                return;
            }
        };
        for name in params.keys().filter(|name| !UNDERSTOOD.contains(&name.as_str())) {
            self.lost.push((format!("{place}: `{}`", plain(name)), provider::why_lost(name).to_owned()));
        }
        let key = key(params.get("api_key"), &target);
        let is_wildcard = group.contains('*') || target.model.contains('*');
        if is_wildcard && target.kind != Kind::Api {
            let why = "a self-hosted server serves the models of routes: write one with the names that are asked for";
            self.lost.push((place, why.to_owned()));
            return;
        }
        if target.kind != Kind::Api && params.keys().any(|name| name.ends_with("_cost_per_token")) {
            let why = "a self-hosted server costs its rent: see `hourly_usd`";
            self.lost
                .push((format!("{place}: `input_cost_per_token`, `output_cost_per_token`"), why.to_owned()));
        }
        let backend = self.backend(&target, key, params, (group.clone(), target.model.clone()));
        if is_wildcard {
            self.lost
                .push((place, "models on no route go to the first `api` backend as they are".to_owned()));
            self.wildcard.get_or_insert(backend);
            return;
        }
        let facts = facts(params, entry.get("model_info"), target.kind);
        let offer = Offer { backend, model: target.model, facts, is_fallback: false };
        self.offer(&group, offer, &place);
    }

    /// The name of the backend of a deployment: one that is there, one more replica of it, or a new one.
    fn backend(
        &mut self,
        target: &provider::Target,
        key: Option<Key>,
        params: &Map<String, Value>,
        serves: (String, String),
    ) -> String {
        let organization = params.get("organization").and_then(Value::as_str).map(str::to_owned);
        let timeout_seconds = params.get("timeout").and_then(number);
        let max_in_flight = params.get("max_parallel_requests").and_then(Value::as_u64);
        let is_same = |backend: &&mut Backend| {
            backend.kind == target.kind && backend.key == key && backend.organization == organization
        };
        let same = self.backends.iter_mut().filter(is_same).find(|backend| match &target.base_url {
            Some(url) => backend.base_urls.contains(url),
            None => backend.address_variable == target.address_variable,
        });
        if let Some(backend) = same {
            backend.serves.insert(serves);
            backend.max_in_flight = backend.max_in_flight.max(max_in_flight);
            return backend.name.clone();
        }
        // A self-hosted server that serves what another one serves is a replica of it.
        if let (Kind::SelfHosted(_), Some(url)) = (target.kind, &target.base_url) {
            let twin = self.backends.iter_mut().filter(is_same).find(|backend| {
                backend.address_variable.is_none() && backend.serves == BTreeSet::from([serves.clone()])
            });
            if let Some(backend) = twin {
                backend.base_urls.push(url.clone());
                return backend.name.clone();
            }
        }
        let name =
            unique(&bare(&target.name), |name| self.backends.iter().any(|backend| backend.name == name));
        self.backends.push(Backend {
            name: name.clone(),
            kind: target.kind,
            base_urls: target.base_url.clone().into_iter().collect(),
            address_variable: target.address_variable.clone(),
            key,
            organization,
            timeout_seconds,
            max_in_flight,
            serves: BTreeSet::from([serves]),
        });
        name
    }

    fn offer(&mut self, group: &str, offer: Offer, place: &str) {
        let index = self.routes.iter().position(|route| route.group == group).unwrap_or_else(|| {
            self.routes.push(Route { group: group.to_owned(), aliases: Vec::new(), offers: Vec::new() });
            self.routes.len() - 1
        });
        let offers = &mut self.routes[index].offers;
        match offers.iter().find(|there| there.backend == offer.backend) {
            None => offers.push(offer),
            // One more replica, or the same once more.
            Some(there) if there.model == offer.model => {}
            Some(there) => {
                let why = format!(
                    "`{}` has another model on this route already: `{}`",
                    there.backend,
                    plain(&there.model)
                );
                self.lost.push((place.to_owned(), why));
            }
        }
    }

    /// A key that stood in the file may be another than the one in the variable of that name, and is not to be
    /// confused with it: one server's key would go to another.
    fn part_keys(&mut self) {
        let mut taken: Vec<String> = self
            .backends
            .iter()
            .filter_map(|backend| backend.key.as_ref().filter(|key| !key.was_written_out))
            .map(|key| key.variable.clone())
            .collect();
        for backend in &mut self.backends {
            let Some(key) = backend.key.as_mut().filter(|key| key.was_written_out) else { continue };
            let stem = key.variable.trim_end_matches("_API_KEY").to_owned();
            let mut number = 1;
            while taken.contains(&key.variable) {
                number += 1;
                key.variable = format!("{stem}_{number}_API_KEY");
            }
            taken.push(key.variable.clone());
        }
    }

    /// The first `api` backend serves what no route names.
    fn put_wildcard_first(&mut self) {
        let wildcard = self.wildcard.as_deref();
        if let Some(index) = self.backends.iter().position(|backend| wildcard == Some(backend.name.as_str()))
        {
            let backend = self.backends.remove(index);
            self.backends.insert(0, backend);
        }
    }

    fn read_aliases(&mut self, root: &Value) {
        let aliases = root.pointer("/router_settings/model_group_alias").and_then(Value::as_object);
        for (alias, target) in aliases.into_iter().flatten() {
            let group = target.as_str().or_else(|| target.get("model").and_then(Value::as_str));
            match self.routes.iter_mut().find(|route| Some(route.group.as_str()) == group) {
                Some(route) => route.aliases.push(alias.clone()),
                None => self.lost.push((
                    format!("model_group_alias `{}`", plain(alias)),
                    "its group is on no route".to_owned(),
                )),
            }
        }
    }

    /// The offers of a group's fallbacks become offers of its route, for failures.
    fn add_fallbacks(&mut self, root: &Value) {
        for settings in ["router_settings", "litellm_settings"] {
            let lists = root.pointer(&format!("/{settings}/fallbacks")).and_then(Value::as_array);
            let pairs = lists.into_iter().flatten().filter_map(Value::as_object).flatten();
            for (group, others) in pairs {
                for other in others.as_array().into_iter().flatten().filter_map(Value::as_str) {
                    self.add_fallback(group, other);
                }
            }
        }
    }

    fn add_fallback(&mut self, group: &str, other: &str) {
        let place = format!("fallback of `{}` to `{}`", plain(group), plain(other));
        let offers = self.routes.iter().find(|route| route.group == other).map(|route| {
            // Not what that group itself has for failures.
            route.offers.iter().filter(|offer| !offer.is_fallback).cloned().collect::<Vec<_>>()
        });
        let Some(offers) = offers.filter(|_| self.routes.iter().any(|route| route.group == group)) else {
            self.lost.push((place, "one of the two is on no route".to_owned()));
            return;
        };
        for offer in offers {
            self.offer(group, Offer { is_fallback: true, ..offer }, &place);
        }
    }
}

fn text(value: &Value, name: &str) -> Option<String> {
    value.get(name).and_then(Value::as_str).map(str::to_owned)
}

/// A number, also where YAML 1.1 and 1.2 disagree: `1e-6` is a text to one of them.
fn number(value: &Value) -> Option<f64> {
    value.as_f64().or_else(|| value.as_str()?.trim().parse().ok()).filter(|number| number.is_finite())
}

/// Words that people write where a server wants a key and ignores it.
const NO_KEYS: [&str; 9] =
    ["none", "empty", "fake", "dummy", "fake-key", "dummy-key", "no-key", "not-needed", "sk-no-key-required"];

/// A reference to the key: never the key itself.
fn key(written: Option<&Value>, target: &provider::Target) -> Option<Key> {
    let is_api = target.kind == Kind::Api;
    match written.and_then(Value::as_str).map(str::trim).filter(|key| !key.is_empty()) {
        Some(reference) if reference.starts_with("os.environ/") => {
            let variable = reference.trim_start_matches("os.environ/").to_owned();
            Some(Key { variable, was_written_out: false })
        }
        Some(word) if !is_api && NO_KEYS.contains(&word.to_ascii_lowercase().as_str()) => None,
        Some(_) => Some(Key { variable: target.key_variable.clone(), was_written_out: true }),
        None => is_api.then(|| Key { variable: target.key_variable.clone(), was_written_out: false }),
    }
}

/// What is known of an offer: prices at an API, abilities of a server.
fn facts(params: &Map<String, Value>, info: Option<&Value>, kind: Kind) -> Vec<String> {
    let fact = |name: &str| params.get(name).or_else(|| info?.get(name));
    let mut facts = Vec::new();
    if kind == Kind::Api {
        let price = |name: &str| fact(name).and_then(number).and_then(provider::usd_per_million);
        if let (Some(input), Some(output)) = (price("input_cost_per_token"), price("output_cost_per_token")) {
            let cached = price("cache_read_input_token_cost")
                .map_or_else(String::new, |cached| format!(", cached_input = {cached}"));
            facts.push(format!("price = {{ input = {input}{cached}, output = {output} }}"));
        }
        return facts;
    }
    if let Some(tokens) = fact("max_input_tokens").and_then(Value::as_u64).filter(|tokens| *tokens > 0) {
        facts.push(format!("context_window = {tokens}"));
    }
    for (theirs, ours) in [
        ("supports_function_calling", "tools"),
        ("supports_response_schema", "json_schema"),
        ("supports_vision", "vision"),
    ] {
        if let Some(able) = fact(theirs).and_then(Value::as_bool) {
            facts.push(format!("{ours} = {able}"));
        }
    }
    if fact("mode").and_then(Value::as_str) == Some("embedding") {
        facts.push("embeddings = true".to_owned());
    }
    facts
}
