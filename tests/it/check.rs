//! `breakeven check` and `breakeven schema`, as they are run: output and exit status.

use std::fs;
use std::path::Path;
use std::process::Command;

use breakeven::demo::{FakeBackend, Personality, Settings};

/// What a run printed, and how it ended.
struct Run {
    status: i32,
    out: String,
    errors: String,
}

fn breakeven(folder: &Path, arguments: &[&str]) -> Run {
    let output = Command::new(env!("CARGO_BIN_EXE_breakeven"))
        .args(arguments)
        .current_dir(folder)
        .env_clear()
        .env("OPENAI_API_KEY", "sk-canary")
        .output()
        .unwrap();
    Run {
        status: output.status.code().unwrap(),
        out: String::from_utf8(output.stdout).unwrap(),
        errors: String::from_utf8(output.stderr).unwrap(),
    }
}

fn folder_with(text: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("breakeven.toml"), text).unwrap();
    folder
}

/// A self-hosted server at `url`, and OpenAI's place taken by another.
fn config_for(api: &str, own: &str) -> String {
    include_str!("config/example.toml")
        .replace("https://api.openai.com/v1", api)
        .replace("http://127.0.0.1:8000/v1", own)
}

#[test]
fn a_bad_config_has_status_2_and_every_problem_on_stderr() {
    let run = breakeven(folder_with(include_str!("config/bad.toml")).path(), &["check"]);
    assert_eq!((run.status, run.out.as_str()), (2, ""));
    insta::assert_snapshot!("check_of_a_bad_config", run.errors);
}

#[test]
fn a_good_config_has_status_0_and_one_line() {
    let run = breakeven(folder_with(include_str!("config/example.toml")).path(), &["check"]);
    assert_eq!((run.status, run.errors.as_str()), (0, ""));
    assert_eq!(run.out, "breakeven.toml: fine, with 2 backends, 1 route and 1 model\n");
}

#[test]
fn a_config_that_nobody_wrote_has_status_2_and_says_where_it_was_looked_for() {
    let folder = tempfile::tempdir().unwrap();
    let run = breakeven(folder.path(), &["check", "--config", "no.toml"]);
    assert_eq!(run.status, 2);
    assert!(run.errors.contains("no.toml: cannot read it"), "{}", run.errors);
}

#[test]
fn a_warning_is_shown_and_changes_nothing() {
    let text = include_str!("config/example.toml").replace("\"gpt-4o-mini\"", "\"my-own-tune\"");
    let run = breakeven(folder_with(&text).path(), &["check"]);
    assert_eq!(run.status, 0);
    assert!(run.errors.contains("warning: breakeven.toml:"), "{}", run.errors);
    assert!(run.errors.contains("no price is known for `my-own-tune`"), "{}", run.errors);
}

#[test]
fn serve_refuses_the_same_config_with_the_same_words() {
    let folder = folder_with(include_str!("config/bad.toml"));
    let (serve, check) = (breakeven(folder.path(), &["serve"]), breakeven(folder.path(), &["check"]));
    assert_eq!(serve.status, 2);
    for problem in check.errors.lines().filter(|line| line.starts_with("breakeven.toml:")) {
        assert!(serve.errors.contains(problem), "{problem}\nis not in\n{}", serve.errors);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn online_says_what_each_backend_lists() {
    let settings = |model: &str| Settings { models: vec![model.into()], ..Settings::default() };
    let api = FakeBackend::start(Personality::OpenAi, settings("gpt-4o-mini")).await.unwrap();
    let own = FakeBackend::start(Personality::Vllm, settings("some-other-model")).await.unwrap();
    let folder = folder_with(&config_for(&api.url(), &own.url()));
    let run = breakeven(folder.path(), &["check", "--online"]);
    assert_eq!(run.status, 0, "{}", run.errors);
    assert!(run.out.contains(&format!("openai: {}: 1 model: gpt-4o-mini\n", api.url())), "{}", run.out);
    assert!(run.out.contains(&format!("gpu: {}: 1 model: some-other-model\n", own.url())), "{}", run.out);
    assert!(
        run.errors.contains("does not list `meta-llama/Llama-3.1-8B-Instruct`"),
        "a wrong name is found: {}",
        run.errors
    );
    assert_eq!(api.requests()[0].headers["authorization"], "Bearer sk-canary");
    assert!(!own.requests()[0].headers.contains_key("authorization"), "the key goes to its backend only");
}

#[tokio::test(flavor = "multi_thread")]
async fn online_has_status_1_when_a_backend_does_not_answer() {
    let settings = Settings { models: vec!["gpt-4o-mini".into()], ..Settings::default() };
    let api = FakeBackend::start(Personality::OpenAi, settings).await.unwrap();
    // A port that was free a moment ago, on loopback.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let text = config_for(&api.url(), &format!("http://{closed}/v1"));
    let started_by_us = breakeven(folder_with(&text).path(), &["check", "--online"]);
    assert_eq!(started_by_us.status, 0, "{}", started_by_us.errors);
    assert!(started_by_us.out.contains("it is started when it pays"), "{}", started_by_us.out);

    let by_others: String =
        text.lines().filter(|line| !line.starts_with("control")).flat_map(|l| [l, "\n"]).collect();
    let run = breakeven(folder_with(&by_others).path(), &["check", "--online"]);
    assert_eq!(run.status, 1);
    assert!(run.errors.contains(&format!("gpu: http://{closed}/v1: does not answer: ")), "{}", run.errors);
    assert!(!run.errors.contains("canary"), "{}", run.errors);
    assert!(run.out.contains("openai: "), "the others are asked all the same: {}", run.out);
}

#[test]
fn the_schema_is_json() {
    let folder = tempfile::tempdir().unwrap();
    let run = breakeven(folder.path(), &["schema"]);
    let schema: serde_json::Value = serde_json::from_str(&run.out).unwrap();
    assert_eq!((run.status, schema["title"].as_str()), (0, Some("breakeven.toml")));
}
