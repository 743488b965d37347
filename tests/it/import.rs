//! Configurations of LiteLLM's proxy, converted.

use breakeven::commands::import::litellm::{Converted, convert};
use breakeven::config;

const TYPICAL: &str = include_str!("import/typical.yaml");

fn converted(yaml: &str) -> Converted {
    convert(yaml).unwrap_or_else(|error| panic!("{error:#}"))
}

/// One deployment at OpenAI, with something changed.
fn small(more: &str) -> String {
    format!("model_list:\n  - model_name: m\n    litellm_params:\n      model: gpt-4o\n{more}")
}

/// The lines marked EDIT made active, as an owner who agrees with the examples would.
fn completed(text: &str) -> String {
    text.lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(rest) if line.contains("# EDIT: ") => format!("{rest}\n"),
            _ => format!("{line}\n"),
        })
        .collect()
}

/// What `check` says, with every secret there.
fn problems(text: &str) -> Vec<String> {
    match config::parse(text, "breakeven.toml", &|_| Some("secret".to_owned())) {
        Ok(_) => Vec::new(),
        Err(problems) => problems.to_string().lines().map(str::to_owned).collect(),
    }
}

#[test]
fn a_typical_configuration_is_converted() {
    let converted = converted(TYPICAL);
    insta::assert_snapshot!("import_of_a_typical_configuration", converted.text);
    assert_eq!((converted.routes, converted.edits), (4, 4));
}

#[test]
fn only_what_is_marked_is_missing() {
    let text = converted(TYPICAL).text;
    let missing = problems(&text);
    assert_eq!(missing.len(), 4, "{missing:#?}");
    for backend in ["vllm", "gpu"] {
        for key in ["hourly_usd", "capacity"] {
            assert!(missing.iter().any(|line| line.contains(backend) && line.contains(key)), "{missing:#?}");
        }
    }
    assert_eq!(problems(&completed(&text)), [""; 0]);
}

#[test]
fn a_secret_in_plain_text_is_not_repeated() {
    let text = converted(TYPICAL).text;
    assert!(!text.contains("canary"), "{text}");
    let broken = convert("model_list: [\n  sk-canary: {").unwrap_err();
    assert!(!format!("{broken:#}").contains("canary"), "{broken:#}");
}

#[test]
fn what_it_says_of_a_setting_without_counterpart_is_a_comment() {
    let text = converted(&small("      weight: 3\n\"evil\\n[server]\": 1\n")).text;
    assert!(text.contains("# Not carried over: model_list[1] `m`: `weight`: cost decides"), "{text}");
    assert!(text.contains("# Not carried over: `evil [server]`"), "{text}");
    assert_eq!(problems(&text), [""; 0]);
}

#[test]
fn a_key_that_stood_in_the_file_is_not_confused_with_another_of_that_name() {
    let yaml = "model_list:
  - {model_name: a, litellm_params: {model: gpt-4o, api_key: os.environ/OPENAI_API_KEY}}
  - {model_name: b, litellm_params: {model: openai/m, api_base: os.environ/BASE, api_key: sk-of-another}}
";
    let text = converted(yaml).text;
    assert!(text.contains("api_key = { env = \"OPENAI_API_KEY\" }\n"), "{text}");
    assert!(
        text.contains("api_key = { env = \"OPENAI_2_API_KEY\" }   # it was in config.yaml itself"),
        "{text}"
    );
}

#[test]
fn azure_wildcards_budgets_and_costs_are_carried_over_or_named() {
    let yaml = "model_list:
  - {model_name: gpt-4o, litellm_params: {model: azure/mine, api_base: \"https://a.openai.azure.com/\", api_key: os.environ/AZURE_API_KEY, api_version: '2024-10-21'}}
  - {model_name: llama, litellm_params: {model: hosted_vllm/l, api_base: \"http://10.0.0.1:8000/v1\", input_cost_per_token: 1.0e-7}}
  - {model_name: 'vllm/*', litellm_params: {model: 'hosted_vllm/*', api_base: \"http://vllm:8000/v1\"}}
  - {litellm_params: {model: gpt-4o}}
litellm_settings: {max_budget: 100, budget_duration: 30d}
general_settings: {master_key: sk-canary}
";
    let text = converted(yaml).text;
    for line in [
        "base_url = \"https://a.openai.azure.com/openai/v1\"",
        "  { backend = \"azure\", model = \"mine\" },",
        "[budgets.all]\nusd = 100\nperiod = \"month\"",
        "model_list[2] `llama`: `input_cost_per_token`, `output_cost_per_token`: a self-hosted server costs its rent",
        "model_list[3] `vllm/*`: a self-hosted server serves the models of routes",
        "model_list[4]: it has no `model_name`",
    ] {
        assert!(text.contains(line), "`{line}` is not in\n{text}");
    }
    assert!(!text.contains("http://vllm:8000"), "a backend that no route offers is no backend\n{text}");
    assert_eq!(problems(&completed(&text)), [""; 0]);
}

#[test]
fn names_that_toml_would_read_otherwise_are_quoted() {
    let yaml = "model_list:\n  - model_name: \"a\\\"b\\\\ \\u007f\"\n    litellm_params: {model: gpt-4o}\n";
    assert_eq!(problems(&converted(yaml).text), [""; 0]);
}

#[test]
fn groups_with_one_name_once_cleaned_get_routes_of_their_own() {
    let yaml = "model_list:
  - {model_name: a/b, litellm_params: {model: gpt-4o}}
  - {model_name: a.b, litellm_params: {model: gpt-4o-mini}}\n";
    let text = converted(yaml).text;
    assert!(text.contains("[routes.a-b]") && text.contains("[routes.a-b-2]"), "{text}");
    assert_eq!(problems(&text), [""; 0]);
}

#[test]
fn an_address_in_a_variable_is_asked_for() {
    let text = converted(&small("      api_base: os.environ/BASE\n")).text;
    assert!(
        text.contains(
            "# base_url = \"https://..\"   # EDIT: where it answers; that was in the variable BASE"
        )
    );
    assert!(problems(&text).iter().any(|line| line.contains("base_url")), "{text}");
}

#[test]
fn times_and_retries_are_carried_over() {
    let text = converted(&small("      timeout: 2.5\nrouter_settings: {num_retries: 1}\n")).text;
    assert!(text.contains("timeouts = { first_byte = \"2500ms\", total = \"2500ms\" }"), "{text}");
    assert!(text.contains("max_attempts = 2 "), "{text}");
    assert_eq!(problems(&text), [""; 0]);
}

#[test]
fn what_is_no_configuration_of_litellm_is_refused() {
    for (yaml, expected) in [
        ("", "has no `model_list`"),
        ("a: 1", "has no `model_list`"),
        ("model_list: []", "has no `model_list`"),
        ("a: [", "is not the YAML that LiteLLM reads"),
    ] {
        let error = convert(yaml).expect_err(yaml).to_string();
        assert!(error.contains(expected), "{yaml}: {error}");
    }
}

#[test]
fn deployments_that_say_nothing_are_named() {
    let yaml = "model_list:\n  - {}\n  - 7\n  - {model_name: m, litellm_params: {model: gpt-4o}}\n";
    let converted = converted(yaml);
    assert_eq!((converted.routes, converted.lost), (1, 2), "{}", converted.text);
}
