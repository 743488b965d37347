//! SIGKILL under load: who saw the end of an answer has a row, and nobody has two.

use std::collections::HashSet;
use std::time::Duration;

use breakeven::clock::Stopwatch;
use breakeven::demo::{FakeBackend, Personality, Settings};
use breakeven::ledger::query;
use serde_json::json;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::{Served, scale};
use crate::ledger;
use crate::support::{Events, Http, chat, with};

const MODEL: &str = "gpt-4o-mini";
const CLIENTS: usize = 16;
/// A shared machine has pauses of its own.
const ROOM: Duration = Duration::from_secs(2);

/// Calls until the proxy is gone; tells the id of each whose end was seen.
pub(super) async fn call_on(url: String, streams: bool, ended: mpsc::UnboundedSender<String>) {
    let http = Http::new(&url);
    let body = with(chat(MODEL), json!({"stream": streams}));
    loop {
        let request = http.request(http::Method::POST, "/chat/completions");
        let request = request.header("content-type", "application/json");
        let Ok(answer) = http.start(request, body.to_string().into()).await else { return };
        assert_eq!(answer.status(), 200);
        let id = answer.headers()["x-breakeven-request-id"].to_str().unwrap().to_owned();
        let is_whole = if streams {
            let (events, _) = Events::of(answer).rest().await;
            events.iter().any(|event| event == "data: [DONE]")
        } else {
            http_body_util::BodyExt::collect(answer.into_body()).await.is_ok()
        };
        if !is_whole {
            return;
        }
        if ended.send(id).is_err() {
            return;
        }
    }
}

#[tokio::test]
async fn a_large_ledger_does_not_hold_up_the_start() {
    let rows = scale("BREAKEVEN_LEDGER_ROWS", 20_000) as u64;
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("ledger")).unwrap();
    let ledger = ledger::open(&folder.path().join(super::LEDGER));
    for id in 0..rows {
        let _batch = ledger.append(&ledger::api_call(id, id % 86_400));
    }
    assert!(ledger.close().await);
    let config = "[backends.openai]\nkind = \"api\"\nbase_url = \"http://127.0.0.1:9/v1\"\n";
    let mut served = Served::start_in(folder, "", config, &[]).await;
    served.child.kill().await.unwrap();
    let watch = Stopwatch::start();
    served.restart().await;
    let took = watch.elapsed();
    eprintln!("ready {took:?} after the start, with {rows} rows");
    assert!(took < Duration::from_secs(1) + ROOM, "{took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_proxy_has_a_row_of_every_call_whose_end_was_seen_and_none_twice() {
    let rounds = scale("BREAKEVEN_KILL_ROUNDS", 4);
    let settings = Settings { time_per_output_token: Duration::from_millis(1), ..Settings::default() };
    let api = FakeBackend::start(Personality::OpenAi, settings).await.unwrap();
    let config = format!(
        "[backends.openai]\nkind = \"api\"\nbase_url = \"{}\"\n\
         [routes.chat]\nmodels = [\"{MODEL}\"]\npolicy = \"api\"\noffers = [{{ backend = \"openai\" }}]\n",
        api.url()
    );
    let mut served = Served::start("", &config, &[]).await;
    let mut seen = Vec::new();
    for _ in 0..rounds {
        let (ended, mut ends) = mpsc::unbounded_channel();
        let mut clients = JoinSet::new();
        for client in 0..CLIENTS {
            clients.spawn(call_on(served.url(), client % 2 == 0, ended.clone()));
        }
        drop(ended);
        for _ in 0..fastrand::usize(20..200) {
            seen.push(ends.recv().await.expect("calls go on"));
        }
        served.child.kill().await.unwrap();
        while let Some(id) = ends.recv().await {
            seen.push(id);
        }
        while let Some(client) = clients.join_next().await {
            client.unwrap();
        }
        served.restart().await;
    }
    served.signal("-TERM");
    served.child.wait().await.unwrap();
    let rows = query::recent(&served.ledger(), usize::MAX).unwrap();
    let ids: HashSet<String> = rows.iter().map(|row| row.id.hyphenated().to_string()).collect();
    assert_eq!(ids.len(), rows.len(), "no row is there twice");
    let lost: Vec<_> = seen.iter().filter(|id| !ids.contains(*id)).collect();
    assert!(lost.is_empty(), "{} of {} rows are lost: {lost:?}", lost.len(), seen.len());
    eprintln!(
        "{rounds} kills: {} calls seen to their end, {} rows, none lost or doubled",
        seen.len(),
        rows.len()
    );
}
