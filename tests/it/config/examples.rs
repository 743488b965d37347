//! The examples and the schema that owners begin with are true.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use breakeven::config::{self, AuthMode, BackendKind, Control, RoutePolicy};
use breakeven::economics::{Billing, NanoUsd};

use super::{EXAMPLE, SECRET, SMALL, good, metrics_of, quoted, says, small_with};

const SHARED: &str = "\n[shared]\nredis = { env = \"REDIS_URL\" }\n";
const COMMENTED: &str = include_str!("../../../config/breakeven.toml");
const PRICES: &str = include_str!("../../../config/prices.toml");
const MANUAL: &str = include_str!("../../../docs/configuration.md");

#[test]
fn the_example_of_the_interface_loads() {
    let config = good(EXAMPLE);
    let gpu = &config.backends[1];
    let pool = gpu.pool().unwrap();
    assert_eq!(pool.hourly, "2.99".parse::<NanoUsd>().unwrap());
    assert_eq!((pool.billing, pool.max_replicas), (Billing::WhileRunning, 4));
    assert_eq!((pool.startup, pool.minimum), (Duration::from_mins(5), Duration::from_mins(1)));
    let BackendKind::SelfHosted(own) = &gpu.kind else { panic!("it is self-hosted") };
    let words = |last: &str| vec!["./gpu".to_owned(), last.to_owned()];
    assert_eq!(own.control, Control::Command { start: words("up"), stop: words("down") });
    assert_eq!(config.backends[0].api_key.as_ref().unwrap().expose(), SECRET);
    assert_eq!(config.routes[0].policy, RoutePolicy::Cheapest);
    assert_eq!(config.routes[0].offers[1].model.as_deref(), Some("meta-llama/Llama-3.1-8B-Instruct"));
    assert_eq!((config.policy.window, config.policy.margin), (Duration::from_mins(10), 0.10));
    assert_eq!((config.auth.mode, config.server.listen.port()), (AuthMode::PassThrough, 4000));
}

#[test]
fn the_copy_in_postgres_is_a_secret_that_is_understood_before_it_is_used() {
    let parse = |more: &str, url: &str| {
        let text = format!("[ledger]\npostgres = {{ {more} }}\n{SMALL}");
        let env = |name: &str| (name == "DATABASE_URL").then(|| url.to_owned());
        config::parse(&text, "breakeven.toml", &env).map(|config| config.ledger.postgres.unwrap())
    };
    let url = "url = { env = \"DATABASE_URL\" }";
    let settings = parse(url, "postgres://u:canary@db.example.com/ledger").unwrap();
    assert_eq!(
        (settings.server.to_string(), settings.server.is_encrypted),
        ("db.example.com/ledger".into(), true)
    );
    assert_eq!((settings.batch_rows, settings.connect_timeout), (2000, Duration::from_secs(10)));
    for (more, value, what) in [
        (url, "mysql://u:canary@db/x", "ledger.postgres.url: what it refers to is not a URL of Postgres"),
        (url, "postgres://u:canary@db/x?sslmode=prefer", "leaves it to the server"),
        (url, "", "environment variable `DATABASE_URL` is empty"),
        ("batch_rows = 5", "", "ledger.postgres: has no `url`"),
        (&format!("{url}, batch_rows = 20001"), "postgres://u@db/x", "must be at most 20000"),
        (&format!("{url}, connect_timeout = \"0s\""), "postgres://u@db/x", "must be longer than zero"),
        (&format!("{url}, ca_file = \"no.pem\""), "postgres://u@db/x", "cannot read `no.pem`"),
    ] {
        let said = parse(more, value).unwrap_err().to_string();
        assert!(said.contains(what) && !said.contains("canary"), "{said}");
    }
}

#[test]
fn with_virtual_keys_every_api_needs_a_key_of_its_own() {
    let keys = format!("[auth]\nmode = \"keys\"\n{SMALL}");
    says(&keys, &["backend `openai` has no `api_key`, and with `auth.mode = \"keys\"` clients bring none"]);
}

#[test]
fn a_budget_is_for_one_thing_that_exists() {
    let budget = |lines: &str| format!("{SMALL}\n[budgets.b]\n{lines}\n");
    says(&budget("route = \"chatt\"\nusd = 1"), &["there is no route `chatt`"]);
    says(&budget("team = \"a\"\nroute = \"chat\"\nusd = 1"), &["is for more than one thing"]);
    says(&budget("usd = -1"), &["budgets.b.usd: must not be negative"]);
    says(&budget("key = \"key_1\"\nusd = 1"), &["there are no virtual keys"]);
    says(&budget("team = \"a\""), &["budgets.b: has no `usd`"]);
    assert_eq!(good(&budget("usd = \"0.5\"")).budgets[0].limit.as_nanos(), 500_000_000);
}

#[test]
fn many_proxies_are_a_matter_of_one_line() {
    let with_redis = |text: &str, url: &'static str| {
        config::parse(text, "breakeven.toml", &move |name: &str| match name {
            "REDIS_URL" => Some(url.to_owned()),
            _ => Some(SECRET.to_owned()),
        })
    };
    let shared = |text: &str| with_redis(text, "rediss://:hunter2@redis:6379/0").unwrap().shared.unwrap();
    let defaults = shared(&format!("{EXAMPLE}{SHARED}"));
    assert_eq!((defaults.refresh, defaults.lease), (Duration::from_millis(500), Duration::from_secs(6)));
    assert_eq!(defaults.prefix, "breakeven:");
    assert!(!format!("{defaults:?}").contains("hunter2"));
    let short = shared(&format!("{SMALL}[policy]\nslot = \"1s\"\n{SHARED}"));
    assert_eq!(short.refresh, Duration::from_millis(250), "a quarter of a slot");
    let said = |lines: &str, url| {
        with_redis(&format!("{SMALL}{SHARED}{lines}"), url).expect_err("it must not load").to_string()
    };
    let url = "redis://redis:6379";
    assert!(said("", "http://hunter2").contains("shared.redis: is not the URL of a Redis server; set it to"));
    assert!(!said("", "http://hunter2").contains("hunter2"));
    assert!(said("refresh = \"20s\"", url).contains("shared.refresh: must be between 50 ms and a quarter"));
    assert!(said("lease = \"1s\"", url).contains("shared.lease: must be between 3000 ms and 5m"));
    assert!(said("prefix = \"\"", url).contains("shared.prefix: is empty"));
    assert!(said("ca = \"nowhere.pem\"", url).contains("shared.ca: cannot read"));
    says(&format!("{SMALL}{SHARED}"), &["shared.redis: environment variable `REDIS_URL` is not set"]);
    says(&format!("{SMALL}[shared]\n"), &["shared: has no `redis`; write `redis = { env = \"REDIS_URL\" }`"]);
}

#[test]
fn a_server_that_only_its_starter_can_stop_is_worth_a_warning_beside_others() {
    let own = small_with("hourly_usd", "control = { kind = \"command\", start = [\"vllm\"] }\nhourly_usd");
    let alone = good(&own);
    let env = |_: &str| Some("redis://redis".to_owned());
    let shared = config::parse(&format!("{own}{SHARED}"), "breakeven.toml", &env).unwrap();
    assert_eq!(shared.warnings.len(), alone.warnings.len() + 1);
    assert!(shared.warnings.iter().any(|warning| warning.what.contains("only the proxy that started")));
}

#[test]
fn the_commented_example_loads_and_states_the_defaults() {
    let text = COMMENTED;
    let (commented, bare) = (good(text), good(SMALL));
    assert_eq!(commented.server, bare.server);
    assert_eq!(commented.limits, bare.limits);
    assert_eq!(commented.auth, bare.auth);
    assert_eq!(commented.ledger, bare.ledger);
    assert_eq!(commented.policy, bare.policy);
    assert_eq!(commented.retry, bare.retry);
    assert_eq!(commented.metrics, bare.metrics);
    assert_eq!(commented.log, bare.log);
    assert_eq!(commented.unknown_price, bare.unknown_price);
    for (commented, bare) in commented.backends.iter().zip(&bare.backends) {
        assert_eq!(commented.timeouts, bare.timeouts, "{}", bare.name);
        assert_eq!(commented.health, bare.health, "{}", bare.name);
        assert_eq!(commented.circuit, bare.circuit, "{}", bare.name);
        assert_eq!(commented.dialect, bare.dialect, "{}", bare.name);
        assert_eq!(metrics_of(commented), metrics_of(bare), "{}", bare.name);
    }
    let (commented_pool, bare_pool) =
        (commented.backends[1].pool().unwrap(), bare.backends[1].pool().unwrap());
    assert_eq!(commented_pool.billing, bare_pool.billing);
    assert_eq!(commented_pool.request_fee, bare_pool.request_fee);
    assert_eq!(commented_pool.startup, bare_pool.startup);
    assert_eq!(commented_pool.minimum, bare_pool.minimum);
    assert_eq!(commented_pool.max_replicas, bare_pool.max_replicas);
    assert_eq!(commented.routes[0].policy, bare.routes[0].policy);
    assert_eq!(commented.routes[0].offers[1].features, bare.routes[0].offers[1].features);
}

#[test]
fn the_lines_that_are_commented_out_load_as_well() {
    let text = COMMENTED;
    // A line that begins with `# key =` or `# [table]` is a setting; one that sets a key again replaces it.
    let settings = text.lines().filter(|line| {
        let rest = line.strip_prefix("# ").unwrap_or_default();
        rest.starts_with('[') || rest.split_once(" = ").is_some_and(|(key, _)| !key.contains(' '))
    });
    let folder = tempfile::tempdir().unwrap();
    let authority = rcgen::generate_simple_self_signed(["api".to_owned()]).unwrap().cert.pem();
    let files = [
        ("api-ca.pem", authority.as_str()),
        ("cert.pem", "-----BEGIN .."),
        ("key.pem", "-----BEGIN .."),
        ("prices.toml", PRICES),
        ("ca.pem", "-----BEGIN .."),
    ];
    for (file, text) in files {
        fs::write(folder.path().join(file), text).unwrap();
    }
    let env = |name: &str| match name {
        "DATABASE_URL" => Some("postgres://user:password@db/ledger".to_owned()),
        _ => Some(format!("value-of-{name}")),
    };
    let blocks = ["# [prices.models", "# [shared]", "# [telemetry]"];
    let is_of_a_block = |line: &&str| blocks.iter().any(|block| is_line_of(block, line));
    for setting in settings.filter(|line| !is_of_a_block(line)) {
        let uncommented = text.replacen(setting, &setting[2..], 1);
        let key = setting[2..].split(" = ").next().unwrap();
        let without_the_other = drop_other_line(&uncommented, &setting[2..], key);
        let in_folder = files.iter().fold(without_the_other, |text, (file, _)| {
            text.replace(&format!("\"{file}\""), &quoted(&folder.path().join(file)))
        });
        config::parse(&in_folder, "uncommented", &env)
            .unwrap_or_else(|problems| panic!("{setting}\n{problems}"));
    }
    let all_prices: String = text
        .lines()
        .map(|line| if is_line_of("# [prices.models", line) { &line[2..] } else { line })
        .flat_map(|line| [line, "\n"])
        .collect();
    assert_eq!(
        good(&all_prices).prices.cards["ft:gpt-4o-mini:acme"].standard.input.as_pico_per_token(),
        300_000
    );
}

#[test]
fn the_lines_about_other_proxies_load_together_and_state_the_defaults() {
    let uncommented: String = COMMENTED
        .lines()
        .map(|line| if is_line_of("# [shared]", line) { &line[2..] } else { line })
        .filter(|line| !line.starts_with("ca = "))
        .flat_map(|line| [line, "\n"])
        .collect();
    let env = |_: &str| Some("redis://redis:6379/0".to_owned());
    let shared = |text: &str| config::parse(text, "uncommented", &env).unwrap().shared.unwrap();
    assert_eq!(shared(&uncommented), shared(&format!("{SMALL}{SHARED}")));
}

#[test]
fn the_lines_about_spans_load_together_in_a_build_that_has_them() {
    let uncommented: String = COMMENTED
        .lines()
        .map(|line| if is_line_of("# [telemetry]", line) { &line[2..] } else { line })
        .flat_map(|line| [line, "\n"])
        .collect();
    if cfg!(feature = "otel") {
        assert_eq!(good(&uncommented).telemetry.otlp_endpoint.as_deref(), Some("http://127.0.0.1:4318"));
    } else {
        says(&uncommented, &["feature `otel`"]);
    }
}

/// Whether it is a line of the block that begins with `start` and ends with a blank line.
fn is_line_of(start: &str, line: &str) -> bool {
    let text = COMMENTED;
    let block = &text[text.find(start).unwrap()..];
    block.split("\n\n").next().unwrap().lines().any(|of_block| of_block == line)
}

/// The text without the other line of the same section that sets `key`.
fn drop_other_line(text: &str, kept: &str, key: &str) -> String {
    let at = text.find(kept).unwrap();
    let from = text[..at].rfind("\n[").map_or(0, |start| start + 1);
    let to = text[at..].find("\n[").map_or(text.len(), |end| at + end);
    let section: Vec<&str> = text[from..to]
        .lines()
        .filter(|line| *line == kept || !line.starts_with(&format!("{key} = ")))
        .collect();
    format!("{}{}{}", &text[..from], section.join("\n"), &text[to..])
}

#[test]
fn every_example_of_the_manual_loads() {
    let examples: Vec<&str> =
        MANUAL.split("```toml\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    assert!(examples.len() >= 5, "{}", examples.len());
    for example in examples {
        let whole =
            if example.contains("[backends.") { example.to_owned() } else { format!("{SMALL}{example}") };
        let config = good(&whole);
        assert!(config.warnings.is_empty(), "{example}\n{:?}", config.warnings);
    }
}

#[test]
fn every_key_of_the_schema_is_in_the_commented_example() {
    let text = COMMENTED;
    let words: BTreeSet<&str> =
        text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '-')).collect();
    let mut keys = BTreeSet::new();
    collect_keys(&config::schema(), &mut keys);
    assert!(keys.len() > 90, "the schema has few keys: {keys:?}");
    let missing: Vec<&String> = keys.iter().filter(|key| !words.contains(key.as_str())).collect();
    assert!(missing.is_empty(), "not in config/breakeven.toml: {missing:?}");
}

fn collect_keys(schema: &serde_json::Value, keys: &mut BTreeSet<String>) {
    match schema {
        serde_json::Value::Object(object) => {
            if let Some(serde_json::Value::Object(properties)) = object.get("properties") {
                keys.extend(properties.keys().cloned());
            }
            object.values().for_each(|value| collect_keys(value, keys));
        }
        serde_json::Value::Array(values) => values.iter().for_each(|value| collect_keys(value, keys)),
        _ => {}
    }
}

#[test]
fn the_schema_describes_every_key_and_has_no_null() {
    let schema = config::schema();
    assert!(!schema.to_string().contains("null"), "TOML has no null");
    let tables = schema["$defs"].as_object().unwrap();
    for (table, definition) in tables {
        for (key, property) in definition["properties"].as_object().unwrap() {
            assert!(property["description"].is_string(), "{table}.{key} has no description");
        }
        assert_eq!(definition["additionalProperties"], false, "{table}");
    }
    let table = serde_json::to_string_pretty(&schema["$defs"]["RawThreshold"]).unwrap();
    insta::assert_snapshot!("schema_of_one_table", table);
}

#[test]
fn the_key_to_the_invoice_belongs_to_an_api_and_its_projects_to_the_key() {
    let key = "costs_key = { env = \"OPENAI_API_KEY\" }";
    let api = |more: &str| small_with("kind = \"api\"", &format!("kind = \"api\"\n{more}"));
    let config = good(&api(&format!("{key}\ncosts_projects = [\"proj_a\"]")));
    let costs = config.backends[0].costs.as_ref().unwrap();
    assert_eq!((costs.key.expose(), costs.projects.as_slice()), (SECRET, &["proj_a".to_owned()][..]));
    assert!(good(SMALL).backends[0].costs.is_none());
    says(&api("costs_projects = [\"proj_a\"]"), &["backends.openai.costs_projects: there is no `costs_key`"]);
    says(&api(&format!("{key}\ncosts_projects = [\"\"]")), &["costs_projects[1]: is empty"]);
    let own = small_with("kind = \"self_hosted\"", &format!("kind = \"self_hosted\"\n{key}"));
    says(&own, &["breakeven.toml:7: backends.gpu.costs_key: belongs to `api` backends; remove it"]);
    let plain = api(key).replacen("https://api.openai.com", "http://api.openai.com", 1);
    assert!(good(&plain).warnings.iter().any(|it| it.to_string().contains("the key goes over the network")));
}

#[test]
fn certificates_of_a_backend_are_read_and_what_is_none_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let pem = rcgen::generate_simple_self_signed(["gpu".to_owned()]).unwrap().cert.pem();
    std::fs::write(folder.path().join("two.pem"), pem.repeat(2)).unwrap();
    std::fs::write(folder.path().join("none.pem"), "no certificate").unwrap();
    let api = |base_url: &str, file: &str| {
        let own = format!("kind = \"api\"\nca_file = \"{}/{file}\"", folder.path().display());
        small_with("kind = \"api\"", &own).replacen("https://api.openai.com", base_url, 1)
    };
    let config = good(&api("https://api.internal", "two.pem"));
    assert_eq!(config.backends[0].authorities.len(), 2);
    assert!(good(SMALL).backends[0].authorities.is_empty());
    says(&api("https://api.internal", "none.pem"), &["none.pem` is not one or more certificates in PEM"]);
    says(&api("https://api.internal", "missing.pem"), &["backends.openai.ca_file: cannot read"]);
    let unused = good(&api("http://127.0.0.1:9", "two.pem")).warnings;
    assert!(unused.iter().any(|it| it.to_string().contains("no base URL is `https://`")), "{unused:?}");
}
