//! `breakeven calibrate` against a server whose speed is known.

use std::time::Duration;

use breakeven::demo::{FakeBackend, Personality, Settings};
use serde_json::Value;
use tokio::process::Command;

async fn calibrate(server: &FakeBackend, arguments: &[&str]) -> std::process::Output {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("breakeven.toml");
    let text = format!(
        r#"
        [backends.openai]
        kind = "api"
        base_url = "http://127.0.0.1:1/v1"
        [backends.gpu]
        kind = "self_hosted"
        base_url = "{}"
        hourly_usd = 2.99
        [routes.chat]
        models = ["m"]
        policy = "cheapest"
        offers = [{{ backend = "openai", price = {{ input = 1, output = 1 }} }}, {{ backend = "gpu", model = "there" }}]
        "#,
        server.url()
    );
    std::fs::write(&path, text).unwrap();
    Command::new(env!("CARGO_BIN_EXE_breakeven"))
        .args(["calibrate", "--config", path.to_str().unwrap()])
        .args(arguments)
        .output()
        .await
        .unwrap()
}

/// Four slots, 30 ms to a first token and 5 ms for each that follows: one call takes 30 + 127 × 5 = 665 ms for
/// its 128 tokens, so four at a time make 770 tokens a second, and eight make no more.
#[tokio::test]
async fn the_rate_and_the_slots_of_a_known_server_are_found() {
    let settings = Settings {
        slots: 4,
        output_tokens: 1000,
        time_to_first_token: Duration::from_millis(30),
        time_per_output_token: Duration::from_millis(5),
        ..Settings::default()
    };
    let server = FakeBackend::start(Personality::Vllm, settings).await.unwrap();
    // Whoever waits in line has a first token after 665 ms at the soonest, however noisy the rates are.
    let objectives = ["--slo-tpot", "100ms", "--slo-ttft", "600ms"];
    let output =
        calibrate(&server, &[&["--backend", "gpu", "--format", "json"], &objectives[..]].concat()).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let capacity = &found["capacity"];
    assert_eq!(capacity["max_in_flight"], 4, "{found}");
    let rate = capacity["output_tokens_per_second"].as_u64().unwrap();
    // A loaded machine is slower, never faster, than the server's own timers.
    assert!((385..=800).contains(&rate), "{found}");
    assert!(capacity["input_tokens_per_second"].as_u64().unwrap() > 10_000, "{found}");
}

#[tokio::test]
async fn an_api_and_an_unknown_name_are_refused_and_a_dead_server_is_said() {
    let server = FakeBackend::start(Personality::Vllm, Settings::default()).await.unwrap();
    for (name, status) in [("openai", 2), ("absent", 2)] {
        let output = calibrate(&server, &["--backend", name]).await;
        assert_eq!(output.status.code(), Some(status), "{name}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(name));
    }
    server.set(|settings| settings.loading = true);
    let output = calibrate(&server, &["--backend", "gpu"]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("503"),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
