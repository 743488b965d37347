//! The configuration as an owner meets it: what loads, what does not, and what is said then.

mod examples;
mod reload;

use std::fs;
use std::path::Path;

use breakeven::config::dialect::Server;
use breakeven::config::{
    self, Backend, BackendKind, Config, Control, ParameterRule, Problems, QuickStart, RoutePolicy,
};

const SECRET: &str = "sk-canary-5f0c";

/// The example of the public interface, to the letter, without the part that this build has not.
const EXAMPLE: &str = include_str!("config/example.toml");

/// The least that is a configuration with two backends and a route.
const SMALL: &str = r#"
[backends.openai]
kind = "api"
base_url = "https://api.openai.com/v1"
[backends.gpu]
kind = "self_hosted"
base_url = "http://127.0.0.1:8000/v1"
hourly_usd = 2.50
capacity = { input_tokens_per_second = 15000, output_tokens_per_second = 10000, max_in_flight = 64 }
[routes.chat]
models = ["gpt-4o-mini"]
offers = [{ backend = "openai" }, { backend = "gpu", model = "llama" }]
"#;

fn env(name: &str) -> Option<String> {
    (name == "OPENAI_API_KEY").then(|| SECRET.to_owned())
}

fn parse(text: &str) -> Result<Config, Problems> {
    config::parse(text, "breakeven.toml", &env)
}

fn good(text: &str) -> Config {
    parse(text).unwrap_or_else(|problems| panic!("{problems}"))
}

/// What is said of a text that must not load.
fn problems(text: &str) -> String {
    parse(text).expect_err("it must not load").to_string()
}

/// `SMALL` with one piece replaced.
fn small_with(old: &str, new: &str) -> String {
    assert!(SMALL.contains(old), "{old}");
    SMALL.replacen(old, new, 1)
}

fn metrics_of(backend: &Backend) -> Option<&str> {
    let BackendKind::SelfHosted(own) = &backend.kind else { return None };
    own.metrics_url.as_deref()
}

#[track_caller]
fn says(text: &str, expected: &[&str]) {
    let said = problems(text);
    for part in expected {
        assert!(said.contains(part), "`{part}` is not in:\n{said}");
    }
}

#[track_caller]
fn says_only(text: &str, expected: &str) {
    assert_eq!(problems(text), expected);
}

#[test]
fn a_server_in_the_foreground_needs_no_stop_command_and_its_address_may_be_a_pattern() {
    let pattern = "http://127.0.0.1:{8000+replica}/v1";
    let own = r#"control = { kind = "command", start = ["vllm", "serve"] }
max_replicas = 3
base_url = "http://127.0.0.1:{8000+replica}/v1""#;
    let config = good(&small_with(r#"base_url = "http://127.0.0.1:8000/v1""#, own));
    assert_eq!(config.backends[1].base_urls, [pattern]);
    let BackendKind::SelfHosted(own) = &config.backends[1].kind else { panic!("it is rented") };
    assert_eq!(own.control, Control::Command { start: vec!["vllm".into(), "serve".into()], stop: vec![] });
    says(&small_with("http://127.0.0.1:8000/v1", "http://127.0.0.1:{port}/v1"), &["is not a URL"]);
}

fn quoted(path: &Path) -> String {
    format!("{:?}", path.display().to_string())
}

#[test]
fn a_tokenizer_is_a_file_that_is_there_and_counts_for_self_hosted_models() {
    let offer = |more: &str| small_with("model = \"llama\"", &format!("model = \"llama\", {more}"));
    let loaded = good(&offer("tokenizer = \"tests/data/tokens/tiny/tokenizer.json\""));
    assert!(loaded.routes[0].offers[1].tokenizer.is_some());
    assert!(problems(&offer("tokenizer = \"nowhere.json\"")).contains("there is no file `nowhere.json`"));
    let api = small_with("backend = \"openai\"", "backend = \"openai\", tokenizer = \"Cargo.toml\"");
    assert!(problems(&api).contains("belongs to offers of self-hosted backends"));
}

#[test]
fn every_problem_is_reported_at_once() {
    insta::assert_snapshot!("problems_of_a_bad_config", problems(include_str!("config/bad.toml")));
}

#[test]
fn a_secret_in_plain_text_is_an_error_that_does_not_echo_it() {
    for text in [
        small_with("kind = \"api\"", &format!("kind = \"api\"\napi_key = \"{SECRET}\"")),
        small_with("kind = \"api\"", &format!("kind = \"api\"\nheaders = {{ X-Api-Key = \"{SECRET}\" }}")),
        small_with("kind = \"api\"", &format!("kind = \"api\"\nkind2 = \"{SECRET}\"")),
        small_with("kind = \"api\"", &format!("kind = \"{SECRET}\"")),
        small_with("kind = \"api\"", &format!("kind = \"api\"\napi_key = {{ env = [\"{SECRET}\"] }}")),
        small_with("kind = \"api\"", &format!("kind = \"api\"\napi_key = {SECRET}")),
        small_with("kind = \"api\"", &format!("kind = \"api\"\napi_key = \"{SECRET}")),
        small_with("https://api", &format!("https://user:{SECRET}@api")),
        format!("[server]\nadmin_token = \"{SECRET}\"\n{SMALL}"),
    ] {
        let said = problems(&text);
        assert!(!said.contains("canary"), "{said}");
    }
    let in_plain = small_with("kind = \"api\"", &format!("kind = \"api\"\napi_key = \"{SECRET}\""));
    says(&in_plain, &["breakeven.toml:4: backends.openai.api_key: is a secret in plain text", "{ env = "]);
}

#[test]
fn a_loaded_secret_is_not_printed() {
    let printed = format!("{:?}", good(EXAMPLE));
    assert!(printed.contains("Secret(***)") && !printed.contains("canary"), "{printed}");
}

#[test]
fn a_missing_secret_says_which_variable_or_file_it_is() {
    let reference =
        |reference: &str| small_with("kind = \"api\"", &format!("kind = \"api\"\napi_key = {reference}"));
    says_only(
        &reference("{ env = \"NO_SUCH_KEY\" }"),
        "breakeven.toml:4: backends.openai.api_key: environment variable `NO_SUCH_KEY` is not set; \
         export `NO_SUCH_KEY` where breakeven runs",
    );
    says(&reference("{ file = \"/no/such/file\" }"), &["cannot read `/no/such/file`"]);
    says(&reference("{ env = \"A\", file = \"b\" }"), &["does not say where the secret is"]);
    says(&reference("{}"), &["does not say where the secret is"]);
}

#[test]
fn a_secret_in_a_file_is_found_beside_the_config_without_its_line_break() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("key"), "from-a-file\n").unwrap();
    let text = small_with("kind = \"api\"", "kind = \"api\"\napi_key = { file = \"key\" }");
    let path = folder.path().join("breakeven.toml");
    fs::write(&path, text).unwrap();
    let config = Config::load(&path).unwrap();
    assert_eq!(config.backends[0].api_key.as_ref().unwrap().expose(), "from-a-file");
}

#[test]
fn money_is_exact_as_a_number_and_as_a_string() {
    for written in ["0.15", "\"0.15\"", "1.5e-1", "0.150"] {
        let price = format!("{{ backend = \"openai\", price = {{ input = {written}, output = 0.6 }} }}");
        let config = good(&small_with("{ backend = \"openai\" }", &price));
        let card = config.routes[0].offers[0].price.clone().unwrap();
        assert_eq!(card.standard.input.as_pico_per_token(), 150_000, "{written}");
        assert_eq!(card.standard.cached_input, card.standard.input);
        let hourly = good(&small_with("2.50", written)).backends[1].hourly();
        assert_eq!(hourly.as_nanos(), 150_000_000, "{written}");
    }
}

#[test]
fn a_price_in_the_wrong_unit_is_noticed() {
    let priced = |price: &str| {
        let offer = format!("{{ backend = \"openai\", price = {{ input = {price}, output = 1 }} }}");
        small_with("{ backend = \"openai\" }", &offer)
    };
    says(&priced("0.00000015"), &["looks like a price per token", "USD per million tokens"]);
    says(&priced("1e-5"), &["looks like a price per token"]);
    says(&priced("150000"), &["looks like a price in another unit"]);
    says(&priced("-1"), &["must not be negative"]);
    assert_eq!(good(&priced("0")).routes[0].offers[0].price.clone().unwrap().standard.input.times(1), 0);
}

#[test]
fn a_threshold_is_a_band_or_one_number() {
    let band = |threshold: &str| {
        let rule = format!("policy = \"threshold\"\nthreshold = {threshold}\nmodels");
        let RoutePolicy::Threshold(threshold) = good(&small_with("models", &rule)).routes[0].policy.clone()
        else {
            panic!("it is a threshold")
        };
        threshold
    };
    let requests = band("{ requests_per_day = 250000 }").requests_per_day.unwrap();
    assert_eq!((requests.up, requests.down), (250_000.0, 200_000.0));
    let tokens = band("{ tokens_per_day = { up = 5e8, down = 1 } }").tokens_per_day.unwrap();
    assert_eq!((tokens.up, tokens.down), (5e8, 1.0));
    let usd = band("{ usd_per_day = { up = 100 } }").usd_per_day.unwrap();
    assert_eq!((usd.up, usd.down), (100.0, 80.0));
}

#[test]
fn a_threshold_without_numbers_or_upside_down_is_refused() {
    let route = |lines: &str| small_with("models", &format!("{lines}\nmodels"));
    says(&route("policy = \"threshold\""), &["routes.chat.policy: there is no `threshold` to go by"]);
    says(&route("threshold = {}"), &["routes.chat.threshold: has no numbers"]);
    says(
        &route("threshold = { requests_per_day = { up = 1, down = 2 } }"),
        &["routes.chat.threshold.requests_per_day: the band is upside down"],
    );
    says(&route("threshold = { usd_per_day = -3 }"), &["must be above zero"]);
    says(&route("threshold = { usd_per_day = { down = 3 } }"), &["has no `up`"]);
}

#[test]
fn a_policy_needs_the_offers_that_it_chooses_between() {
    let only_api = |policy: &str| {
        let route = format!(
            "[backends.openai]\nkind = \"api\"\nbase_url = \"https://api.openai.com/v1\"\n[routes.chat]\n\
             models = [\"m\"]\npolicy = \"{policy}\"\noffers = [{{ backend = \"openai\" }}]"
        );
        parse(&route)
    };
    for policy in ["cheapest", "adaptive", "self_hosted", "split", "threshold"] {
        let said = only_api(policy).unwrap_err().to_string();
        assert!(said.contains("this policy needs an offer of a `self_hosted` backend"), "{said}");
    }
    assert_eq!(only_api("api").unwrap().routes[0].policy, RoutePolicy::Api);
}

#[test]
fn a_route_with_one_kind_of_offer_needs_no_policy() {
    let own = small_with("{ backend = \"openai\" }, ", "");
    assert_eq!(good(&own).routes[0].policy, RoutePolicy::SelfHosted);
    assert_eq!(good(SMALL).routes[0].policy, RoutePolicy::Cheapest);
}

#[test]
fn the_first_api_of_the_file_is_the_default_and_may_be_on_no_route() {
    let other = "[backends.zebra]\nkind = \"api\"\nbase_url = \"https://zebra.example/v1\"\n";
    let config = good(&format!("{other}{SMALL}"));
    assert_eq!(config.backend(config.default_backend().unwrap()).name, "zebra");
    says(&format!("{SMALL}{other}"), &["backends.zebra: nobody uses this backend"]);
}

#[test]
fn replicas_may_be_listed_and_are_the_default_of_their_number() {
    let urls = "[\"http://a:8000/v1/\", \"http://b:8000/v1\"]";
    let config = good(&small_with("\"http://127.0.0.1:8000/v1\"", urls));
    let gpu = &config.backends[1];
    assert_eq!(gpu.base_urls, ["http://a:8000/v1", "http://b:8000/v1"]);
    assert_eq!(gpu.pool().unwrap().max_replicas, 2);
    let fewer = small_with("\"http://127.0.0.1:8000/v1\"", &format!("{urls}\nmax_replicas = 1"));
    says(&fewer, &["max_replicas: is less than the 2 base URLs"]);
}

#[test]
fn replicas_may_be_numbered_by_a_pattern() {
    let pattern = "\"http://127.0.0.1:{8000+replica}/v1\"";
    let text = small_with("\"http://127.0.0.1:8000/v1\"", &format!("{pattern}\nmax_replicas = 3"));
    let config = good(&text);
    assert_eq!(config.backends[1].base_urls, ["http://127.0.0.1:{8000+replica}/v1"]);
    assert!(config.warnings.is_empty(), "{:?}", config.warnings);
    let fault = "has no replicas to number here";
    says(&small_with("\"https://api.openai.com/v1\"", pattern), &[fault]);
    says(&small_with("\"http://127.0.0.1:8000/v1\"", &format!("[{pattern}, \"http://b/v1\"]")), &[fault]);
    says(&small_with("8000/v1", "{x+replica}/v1"), &["is not a URL"]);
}

#[test]
fn a_base_url_is_http_without_user_query_or_fragment() {
    for (url, fault) in [
        ("ftp://h/v1", "neither http nor https"),
        ("h:8000/v1", "is not a URL"),
        ("8000", "is not a URL"),
        ("/v1", "is not a URL with a scheme and a host"),
        ("http://u:p@h/v1", "must not hold a user"),
        ("http://h/v1?k=v", "must not have a query"),
        ("http://h/v1#f", "must not have a query or a fragment"),
        ("", "is not a URL"),
    ] {
        says(&small_with("http://127.0.0.1:8000/v1", url), &[fault]);
    }
    let control = "control = { kind = \"webhook\", url = \"https://u:p@h/gpu\" }\nhourly_usd";
    says(&small_with("hourly_usd", control), &["are not sent: `secret` signs orders instead"]);
    assert!(good(&small_with("8000/v1", "8000")).warnings[0].to_string().contains("did you mean"));
}

#[test]
fn each_server_has_its_dialect_and_the_owner_has_the_last_word() {
    let server =
        |lines: &str| good(&small_with("hourly_usd", &format!("{lines}\nhourly_usd"))).backends[1].clone();
    let ollama = server("server = \"ollama\"");
    assert_eq!(ollama.health.path.as_deref(), Some("/api/version"));
    assert_eq!(metrics_of(&ollama), None);
    assert_eq!(ollama.dialect.parameters["logit_bias"], ParameterRule::Refuse);
    assert_eq!(
        ollama.dialect.parameters["max_completion_tokens"],
        ParameterRule::Rename("max_tokens".to_owned())
    );
    let other = server("server = \"other\"");
    assert_eq!(other.health.path.as_deref(), Some("/v1/models"));
    let own = server(
        "server = \"tgi\"\nparameters = { logit_bias = \"pass\", user = \"drop\" }\nstream_options = false",
    );
    assert_eq!(own.dialect.parameters.get("logit_bias"), None);
    assert_eq!(own.dialect.parameters["user"], ParameterRule::Drop);
    assert!(own.dialect.no_stream_options);
    let BackendKind::SelfHosted(own) = own.kind else { panic!("it is self-hosted") };
    assert_eq!(own.server, Server::Tgi);
}

#[test]
fn nothing_may_be_zero_that_is_divided_by_or_waited_for() {
    for (old, new, path) in [
        ("max_in_flight = 64", "max_in_flight = 0", "backends.gpu.capacity.max_in_flight"),
        ("= 15000", "= 0", "backends.gpu.capacity.input_tokens_per_second"),
        ("hourly_usd", "max_replicas = 0\nhourly_usd", "backends.gpu.max_replicas"),
        ("hourly_usd", "timeouts = { connect = \"0s\" }\nhourly_usd", "backends.gpu.timeouts.connect"),
        ("hourly_usd", "circuit = { failures = 0 }\nhourly_usd", "backends.gpu.circuit.failures"),
        ("[backends.openai]", "[policy]\nwindow = \"0s\"\n[backends.openai]", "policy.window"),
        ("[backends.openai]", "[policy]\nslot = \"0s\"\n[backends.openai]", "policy.slot"),
        ("[backends.openai]", "[retry]\nmax_attempts = 0\n[backends.openai]", "retry.max_attempts"),
        ("[backends.openai]", "[limits]\nmax_in_flight = 0\n[backends.openai]", "limits.max_in_flight"),
    ] {
        says(&small_with(old, new), &[path]);
    }
}

#[test]
fn times_that_cannot_be_meant_are_refused() {
    says(&small_with("hourly_usd", "startup = \"7h\"\nhourly_usd"), &["startup: is longer than 6 hours"]);
    says(&small_with("hourly_usd", "minimum = \"32d\"\nhourly_usd"), &["minimum: is longer than"]);
    says(&small_with("hourly_usd", "startup = 300\nhourly_usd"), &["startup: is not a duration"]);
    says(
        &small_with("hourly_usd", "timeouts = { total = \"1s\" }\nhourly_usd"),
        &["the total time is shorter than the time to the first byte"],
    );
}

#[test]
fn listeners_must_differ_and_an_open_admin_side_needs_a_token() {
    let server = |lines: &str| format!("[server]\n{lines}\n{SMALL}");
    says(&server("admin_listen = \"127.0.0.1:4000\""), &["both listeners are on 127.0.0.1:4000"]);
    says(&server("listen = \"0.0.0.0:4001\""), &["both listeners are on"]);
    says(&server("admin_listen = \"0.0.0.0:4001\""), &["open to a network without a token"]);
    says(&server("listen = \"localhost:4000\""), &["`localhost:4000` is not an address"]);
    good(&server("listen = \"127.0.0.1:0\"\nadmin_listen = \"127.0.0.1:0\""));
    good(&server("admin_listen = \"0.0.0.0:4001\"\nadmin_token = { env = \"OPENAI_API_KEY\" }"));
}

#[test]
fn an_open_relay_is_warned_of() {
    let open = format!("[server]\nlisten = \"0.0.0.0:4000\"\n{SMALL}");
    let warned = |text: &str| good(text).warnings.iter().any(|w| w.what.contains("spends the key"));
    assert!(!warned(&open));
    let with_key =
        open.replacen("kind = \"api\"", "kind = \"api\"\napi_key = { env = \"OPENAI_API_KEY\" }", 1);
    assert!(warned(&with_key));
    assert!(!warned(&with_key.replace("0.0.0.0", "127.0.0.1")));
}

#[test]
fn a_webhook_without_a_secret_is_warned_of_and_more_so_where_it_is_sent_in_the_clear() {
    let to = |url: &str, more: &str| {
        let control = format!("control = {{ kind = \"webhook\", url = \"{url}\"{more} }}\nhourly_usd");
        let config = good(&small_with("hourly_usd", &control));
        config.warnings.iter().map(ToString::to_string).collect::<String>()
    };
    let warned = to("https://ops.example/gpu", "");
    assert!(
        warned.contains("unsigned") && warned.contains("`secret") && !warned.contains("clear"),
        "{warned}"
    );
    let warned = to("http://ops.example/gpu", "");
    assert!(warned.contains("unsigned and in the clear") && warned.contains("https"), "{warned}");
    assert_eq!(to("https://ops.example/gpu", ", secret = { env = \"OPENAI_API_KEY\" }"), "");
    assert_eq!(to("http://127.0.0.1:9000/gpu", ""), "", "nobody else is there");
}

#[test]
fn a_first_run_needs_no_file() {
    let start = QuickStart {
        openai: true,
        self_hosted: Some("http://127.0.0.1:8000/v1".to_owned()),
        hourly_usd: Some("2.99".to_owned()),
        models: vec!["gpt-4o-mini=llama \"8B\"".to_owned(), "gpt-4o".to_owned()],
    };
    let config = config::quick_start(&start, &env).unwrap_or_else(|problems| panic!("{problems}"));
    assert_eq!(config.backends[0].api_key.as_ref().unwrap().expose(), SECRET);
    assert_eq!(config.backends[1].hourly(), "2.99".parse().unwrap());
    let route = config.route(config.models["gpt-4o-mini"]);
    assert_eq!(route.policy, RoutePolicy::Cheapest);
    assert_eq!(route.offers[1].model.as_deref(), Some("llama \"8B\""));
    let without_key = config::quick_start(&start, &|_| None).unwrap();
    assert!(without_key.backends[0].api_key.is_none());
}

#[test]
fn a_first_run_that_lacks_something_says_what() {
    let lacking = QuickStart { self_hosted: Some("8000".to_owned()), ..QuickStart::default() };
    insta::assert_snapshot!(
        "problems_of_a_first_run",
        config::quick_start(&lacking, &env).unwrap_err().to_string()
    );
    assert!(config::quick_start(&QuickStart::default(), &env).is_err());
}

mod properties {
    use proptest::prelude::*;

    use super::{EXAMPLE, SMALL, parse};

    /// The example with a piece cut out, doubled or replaced by something odd.
    fn mangled() -> impl Strategy<Value = String> {
        let odd = prop_oneof![
            Just(String::new()),
            Just("-1".to_owned()),
            Just("1e999".to_owned()),
            Just("nan".to_owned()),
            Just("[[a]]".to_owned()),
            Just("{ x = 0xFFFFFFFFFFFFFFFFFFFF }".to_owned()),
            Just("\"\\u0000é\"".to_owned()),
            "\\PC{0,12}",
        ];
        let text = prop_oneof![Just(EXAMPLE), Just(SMALL)];
        (text, any::<prop::sample::Index>(), 0..40_usize, odd).prop_map(|(text, at, length, odd)| {
            let boundary = |mut at: usize| {
                while !text.is_char_boundary(at) {
                    at += 1;
                }
                at
            };
            let from = boundary(at.index(text.len()));
            let to = boundary((from + length).min(text.len()));
            format!("{}{odd}{}", &text[..from], &text[to..])
        })
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "\\PC{0,200}") {
            let _loads_or_not = parse(&text);
        }

        #[test]
        fn no_mangled_config_makes_it_panic_and_every_problem_has_a_remedy(text in mangled()) {
            if let Err(problems) = parse(&text) {
                prop_assert!(!problems.problems.is_empty());
                for problem in &problems.problems {
                    prop_assert!(!problem.what.is_empty() && !problem.remedy.is_empty());
                }
            }
        }
    }
}
