//! `breakeven demo` as a user runs it.

use std::process::Stdio;
use std::time::Duration;

use http::StatusCode;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::support::{Http, chat, free_address};

fn demo(arguments: &[&str]) -> (Child, String, String) {
    let (listen, admin) = (free_address().to_string(), free_address().to_string());
    let child = Command::new(env!("CARGO_BIN_EXE_breakeven"))
        .arg("demo")
        .args(arguments)
        .args(["--listen", &listen, "--admin-listen", &admin])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    (child, listen, admin)
}

/// The amounts of the table: what it cost, the API alone, self-hosted alone.
fn amounts(table: &str) -> [f64; 3] {
    ["breakeven ", "API alone", "self-hosted alone"].map(|name| {
        let line = table
            .lines()
            .find(|line| line.trim_start().starts_with(name))
            .unwrap_or_else(|| panic!("{table}"));
        let amount = line.split_once('$').unwrap().1.trim_start();
        amount.split_whitespace().next().unwrap().parse().unwrap()
    })
}

#[tokio::test]
async fn a_short_demo_ends_with_a_bill_below_both_sides_alone() {
    let (child, _, _) = demo(&["--for", "20s", "--headless"]);
    let output =
        tokio::time::timeout(Duration::from_mins(2), child.wait_with_output()).await.unwrap().unwrap();
    let (table, errors) =
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8_lossy(&output.stderr).into_owned());
    assert!(output.status.success(), "{errors}");
    let [total, api, own] = amounts(&table);
    assert!(total > 0.0 && total < api && total < own, "{table}");
    assert!(table.contains("2 changes of side"), "{table}");
    assert_eq!(errors, "", "headless is silent but for the table");
}

#[tokio::test]
async fn a_running_demo_answers_curl_and_prometheus_and_ctrl_c_ends_it_with_the_table_so_far() {
    let (mut child, listen, admin) = demo(&["--for", "60s"]);
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut seen = String::new();
    while !seen.contains("curl") {
        let line = tokio::time::timeout(Duration::from_mins(1), lines.next_line()).await.unwrap().unwrap();
        seen += &line.expect("the demo says where to look");
        seen.push('\n');
    }
    assert!(
        seen.contains(&format!("http://{listen}/v1")) && seen.contains(&format!("http://{admin}")),
        "{seen}"
    );
    let reply = Http::new(&format!("http://{listen}/v1")).post("/chat/completions", &chat("gpt-4o")).await;
    assert_eq!(reply.status, StatusCode::OK);
    let metrics = Http::new(&format!("http://{admin}")).get("/metrics").await;
    assert!(metrics.text().contains("\nbreakeven_requests_total{"), "{}", metrics.text());

    let interrupt = format!("kill -INT {}", child.id().unwrap());
    assert!(Command::new("sh").args(["-c", &interrupt]).status().await.unwrap().success());
    let status = tokio::time::timeout(Duration::from_secs(30), child.wait()).await.unwrap().unwrap();
    let mut table = String::new();
    child.stdout.take().unwrap().read_to_string(&mut table).await.unwrap();
    assert!(status.success(), "{status}");
    assert!(amounts(&table)[2] >= 0.0, "{table}");
}
