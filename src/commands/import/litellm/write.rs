//! The breakeven.toml of a plan, with comments for the one who reads it.

use serde_json::Value;

use super::super::toml_text::{Text, bare, plain, quoted, unique};
use super::{Backend, Converted, Kind, Offer, Plan, Route, number};

/// Settings outside of `model_list` that are carried over, or said elsewhere.
const UNDERSTOOD: [&str; 12] = [
    "router_settings.model_group_alias",
    "router_settings.fallbacks",
    "litellm_settings.fallbacks",
    "router_settings.num_retries",
    "litellm_settings.num_retries",
    "router_settings.allowed_fails",
    "router_settings.cooldown_time",
    "router_settings.timeout",
    "litellm_settings.request_timeout",
    "general_settings.master_key",
    "litellm_settings.max_budget",
    "litellm_settings.budget_duration",
];

const SECTIONS: [&str; 3] = ["router_settings", "litellm_settings", "general_settings"];

/// Most attempts that a configuration may ask for.
const MOST_ATTEMPTS: u64 = 10;
/// Most failures in a row that may open a circuit.
const MOST_FAILURES: u64 = 1_000_000;

pub(super) fn write(plan: &Plan, root: &Value) -> Converted {
    let mut out = Text::default();
    out.comment(
        "Converted from LiteLLM's config.yaml by `breakeven import litellm`. Lines with EDIT need you;",
    );
    out.comment("`breakeven check` says what is missing. Every key is explained in config/breakeven.toml.");
    out.table("server");
    out.line("listen = \"127.0.0.1:4000\"   # LiteLLM's port; it listens on all addresses by default");
    if root.pointer("/general_settings/master_key").is_some() {
        out.comment(
            "LiteLLM's keys are not known here and not checked: keep this port to those who may use it,",
        );
        out.comment("or make new ones with `breakeven keys create` and write `mode = \"keys\"` in [auth].");
    }
    write_retry(&mut out, root);
    write_budget(&mut out, root);
    for backend in &plan.backends {
        write_backend(&mut out, backend, root);
    }
    let routes = write_routes(&mut out, plan);
    write_lost(&mut out, plan, root);
    let (edits, lost) = (out.edits, out.lost);
    Converted { text: out.finish(), routes, edits, lost }
}

fn write_retry(out: &mut Text, root: &Value) {
    let places = ["/router_settings/num_retries", "/litellm_settings/num_retries"];
    if let Some(retries) = places.iter().find_map(|place| root.pointer(place)?.as_u64()) {
        out.table("retry");
        let attempts = retries.saturating_add(1).min(MOST_ATTEMPTS);
        out.line(format!("max_attempts = {attempts}   # the first and `num_retries`"));
    }
}

/// What everybody may spend together.
fn write_budget(out: &mut Text, root: &Value) {
    let budget = root.pointer("/litellm_settings/max_budget").and_then(number).filter(|usd| *usd > 0.0);
    let Some(usd) = budget else { return };
    let written = root.pointer("/litellm_settings/budget_duration").and_then(Value::as_str);
    let (period, remark) = match written {
        None => ("lifetime", String::new()),
        Some("1d" | "24h") => ("day", String::new()),
        Some("1mo" | "28d" | "30d" | "31d") => ("month", "   # the calendar's, in UTC".to_owned()),
        Some(other) => {
            ("month", format!("   # it was {}: `day`, `month` and `lifetime` are possible", plain(other)))
        }
    };
    out.table("budgets.all");
    out.line(format!("usd = {usd}"));
    out.line(format!("period = {}{remark}", quoted(period)));
}

fn write_backend(out: &mut Text, backend: &Backend, root: &Value) {
    out.table(&format!("backends.{}", backend.name));
    match backend.kind {
        Kind::Api => out.line("kind = \"api\""),
        Kind::SelfHosted(server) => {
            out.line("kind = \"self_hosted\"");
            out.line(format!("server = {}", quoted(server.word())));
        }
    }
    match (&backend.address_variable, backend.base_urls.as_slice()) {
        (Some(variable), _) => {
            let why = format!("where it answers; that was in the variable {}", plain(variable));
            out.edit("base_url = \"https://..\"", &why);
        }
        (None, [one]) => out.line(format!("base_url = {}", quoted(one))),
        (None, several) => {
            let urls: Vec<String> = several.iter().map(|url| quoted(url)).collect();
            out.line(format!("base_url = [{}]   # replicas of one another", urls.join(", ")));
        }
    }
    if let Some(key) = &backend.key {
        let remark = if key.was_written_out { "   # it was in config.yaml itself: export it" } else { "" };
        out.line(format!("api_key = {{ env = {} }}{remark}", quoted(&key.variable)));
    }
    if let Some(organization) = &backend.organization {
        let value = match organization.strip_prefix("os.environ/") {
            Some(variable) => format!("{{ env = {} }}", quoted(variable)),
            None => quoted(organization),
        };
        out.line(format!("headers = {{ OpenAI-Organization = {value} }}"));
    }
    if matches!(backend.kind, Kind::SelfHosted(_)) {
        out.edit("hourly_usd = 2.99", "rent of one replica for one hour, in USD");
        out.line("billing = \"while_running\"   # or \"committed\": paid anyway");
        let in_flight = backend.max_in_flight.unwrap_or(64);
        let speeds = "input_tokens_per_second = 15000, output_tokens_per_second = 10000";
        let capacity = format!("capacity = {{ {speeds}, max_in_flight = {in_flight} }}");
        out.edit(&capacity, "what one replica sustains");
    }
    write_patience(out, backend, root);
}

/// Time limits and circuit, where LiteLLM's file sets them.
fn write_patience(out: &mut Text, backend: &Backend, root: &Value) {
    let everywhere = ["/router_settings/timeout", "/litellm_settings/request_timeout"];
    let everywhere = || everywhere.iter().find_map(|place| number(root.pointer(place)?));
    if let Some(time) = backend.timeout_seconds.or_else(everywhere).and_then(duration) {
        out.line(format!("timeouts = {{ first_byte = \"{time}\", total = \"{time}\" }}"));
    }
    let router = |name: &str| root.get("router_settings")?.get(name);
    let failures = router("allowed_fails").and_then(Value::as_u64).filter(|failures| *failures > 0);
    let failures = failures.map(|failures| format!("failures = {}", failures.min(MOST_FAILURES)));
    let pause = router("cooldown_time").and_then(number).and_then(duration);
    let pause = pause.map(|pause| format!("open_for = \"{pause}\""));
    let parts: Vec<String> = failures.into_iter().chain(pause).collect();
    if !parts.is_empty() {
        out.line(format!("circuit = {{ {} }}", parts.join(", ")));
    }
}

/// `90s` of seconds; none of what is no time above zero.
fn duration(seconds: f64) -> Option<String> {
    let duration =
        std::time::Duration::try_from_secs_f64(seconds).ok().filter(|time| time.as_millis() > 0)?;
    let is_whole = duration.subsec_millis() == 0;
    Some(if is_whole { format!("{}s", duration.as_secs()) } else { format!("{}ms", duration.as_millis()) })
}

/// Groups that keep their names at the same backends share a route. Returns the number of routes.
fn write_routes(out: &mut Text, plan: &Plan) -> usize {
    let mut names: Vec<String> = Vec::new();
    let mut done: Vec<&str> = Vec::new();
    for route in &plan.routes {
        if done.contains(&route.group.as_str()) {
            continue;
        }
        let is_like = |other: &&Route| {
            other.group == route.group
                || (keeps_names(route) && keeps_names(other) && same_backends(route, other))
        };
        let together: Vec<&Route> = plan.routes.iter().filter(is_like).collect();
        done.extend(together.iter().map(|route| route.group.as_str()));
        let name = unique(&bare(&route.group), |name| names.iter().any(|there| there == name));
        write_route(out, plan, &name, &together);
        names.push(name);
    }
    names.len()
}

/// Whether every offer has the group's own name for the model, and nothing more to say.
fn keeps_names(route: &Route) -> bool {
    route.aliases.is_empty()
        && route.offers.iter().all(|offer| offer.model == route.group && offer.facts.is_empty())
}

fn same_backends(one: &Route, other: &Route) -> bool {
    let key = |offer: &Offer| (offer.backend.clone(), offer.is_fallback);
    one.offers.iter().map(key).eq(other.offers.iter().map(key))
}

fn write_route(out: &mut Text, plan: &Plan, name: &str, together: &[&Route]) {
    let route = together[0];
    out.table(&format!("routes.{name}"));
    let models = together.iter().flat_map(|route| std::iter::once(&route.group).chain(&route.aliases));
    let models: Vec<String> = models.map(|model| quoted(model)).collect();
    out.line(format!("models = [{}]", models.join(", ")));
    if let Some(policy) = policy(plan, route) {
        out.line(policy);
    }
    out.line("offers = [");
    for offer in &route.offers {
        write_offer(out, route, offer);
    }
    out.line("]");
}

/// LiteLLM shuffles a group and keeps fallbacks for failures; what it shuffled, cost decides here.
fn policy(plan: &Plan, route: &Route) -> Option<&'static str> {
    let is_api = |offer: &Offer| {
        plan.backends.iter().any(|backend| backend.name == offer.backend && backend.kind == Kind::Api)
    };
    let has_api = route.offers.iter().any(is_api);
    let has_own = route.offers.iter().any(|offer| !is_api(offer));
    if !(has_api && has_own) {
        return None;
    }
    let main = |api: bool| route.offers.iter().any(|offer| !offer.is_fallback && is_api(offer) == api);
    Some(match (main(true), main(false)) {
        (true, false) => {
            "policy = \"api\"   # the other one for failures, as before; \"cheapest\" compares them"
        }
        (false, true) => {
            "policy = \"self_hosted\"   # the other one for failures, as before; \"cheapest\" compares them"
        }
        _ => "policy = \"cheapest\"",
    })
}

fn write_offer(out: &mut Text, route: &Route, offer: &Offer) {
    let mut parts = vec![format!("backend = {}", quoted(&offer.backend))];
    if offer.model != route.group || !route.aliases.is_empty() {
        parts.push(format!("model = {}", quoted(&offer.model)));
    }
    parts.extend(offer.facts.iter().cloned());
    let remark = if offer.is_fallback { "   # a fallback" } else { "" };
    out.line(format!("  {{ {} }},{remark}", parts.join(", ")));
}

fn write_lost(out: &mut Text, plan: &Plan, root: &Value) {
    let mut lost = plan.lost.clone();
    for (section, value) in root.as_object().into_iter().flatten() {
        if !SECTIONS.contains(&section.as_str()) {
            if section != "model_list" {
                lost.push((format!("`{}`", plain(section)), "there is no such section".to_owned()));
            }
            continue;
        }
        for name in value.as_object().into_iter().flat_map(|members| members.keys()) {
            let path = format!("{section}.{}", plain(name));
            if !UNDERSTOOD.contains(&path.as_str()) {
                lost.push((format!("`{path}`"), why_lost(name).to_owned()));
            }
        }
    }
    if !lost.is_empty() {
        out.remark("What has no counterpart:");
    }
    for (what, why) in lost {
        out.lost(&what, &why);
    }
}

fn why_lost(name: &str) -> &'static str {
    match name {
        "routing_strategy" => "cost decides, see `policy` of each route",
        "redis_host" | "redis_port" | "redis_password" | "redis_url" => {
            "see [shared], by which proxies meet in Redis"
        }
        "database_url" => "every call is in a SQLite ledger, see [ledger] and its `postgres`",
        "drop_params" => "what a server cannot take is known by `server`; see `parameters` of the backend",
        "callbacks" | "success_callback" | "failure_callback" => "metrics and the ledger are always on",
        "cache" | "cache_params" => "answers are not cached",
        "context_window_fallbacks" => "give the offer a `context_window`: longer calls go to the API",
        "default_fallbacks" => "add an offer to each route",
        "default_team_settings" | "default_internal_user_params" => "see [budgets] for teams and keys",
        _ => "there is no such setting",
    }
}
