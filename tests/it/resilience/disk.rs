//! The ledger's disk goes away under load, with an API that fails in every way beside it, and comes back.

use std::collections::HashMap;
use std::time::Duration;

use breakeven::demo::{Chaos, FakeBackend, Personality, Settings};
use breakeven::ledger::query;
use http::StatusCode;
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::chaos::{MODEL, SHARE, faults, unreliable};
use super::{LEDGER, Served, metric, scale};
use crate::durability::SmallDisk;
use crate::ledger;
use crate::support::{Events, Http, chat, data, read, with};

const CLIENTS: usize = 12;
const LONG: Duration = Duration::from_secs(30);

/// How the disk is taken away.
enum Disk {
    /// No file may grow: works without privileges.
    NoGrowth,
    /// A disk of one megabyte that is full: as root.
    Full(SmallDisk),
}

impl Disk {
    fn take(&self, served: &Served) {
        match self {
            Self::NoGrowth => limit_files(served, Some(0)),
            Self::Full(disk) => disk.fill(),
        }
    }

    fn give_back(&self, served: &Served) {
        match self {
            Self::NoGrowth => limit_files(served, None),
            Self::Full(disk) => disk.make_room(),
        }
    }

    /// Of the reason, as the operating system words it.
    fn words(&self) -> &'static str {
        match self {
            Self::NoGrowth => "File too large",
            Self::Full(_) => "space",
        }
    }
}

fn limit_files(served: &Served, bytes: Option<u64>) {
    let id = Pid::from_raw(i32::try_from(served.process()).unwrap());
    prlimit(id, Resource::Fsize, Rlimit { current: bytes, maximum: None }).unwrap();
}

/// What a client saw.
enum Seen {
    /// The end of an answer, or an error event, of this call.
    End(String),
    /// 503, with this body.
    Refused(Value),
}

/// What all clients saw.
struct Book {
    seen: mpsc::UnboundedReceiver<Seen>,
    ends: Vec<String>,
    refusals: usize,
    words: &'static str,
}

impl Book {
    /// False when all clients have stopped.
    async fn note_next(&mut self) -> bool {
        match tokio::time::timeout(LONG, self.seen.recv()).await.expect("calls go on") {
            None => return false,
            Some(Seen::End(id)) => self.ends.push(id),
            Some(Seen::Refused(body)) => {
                assert_eq!(body["error"]["code"], "ledger_unavailable");
                assert!(body["error"]["message"].as_str().unwrap().contains(self.words), "{body}");
                self.refusals += 1;
            }
        }
        true
    }

    async fn until_ends(&mut self, more: usize) {
        let wanted = self.ends.len() + more;
        while self.ends.len() < wanted {
            assert!(self.note_next().await, "clients go on");
        }
    }

    async fn until_refusals(&mut self, wanted: usize) {
        while self.refusals < wanted {
            assert!(self.note_next().await, "clients go on");
        }
    }
}

/// Calls until told to stop. Whatever the API does, nobody sees an error of it before the first byte.
async fn call_on(
    url: String,
    streams: bool,
    seen: mpsc::UnboundedSender<Seen>,
    stopped: watch::Receiver<bool>,
) {
    let http = Http::new(&url);
    let body = with(chat(MODEL), json!({"stream": streams}));
    while !*stopped.borrow() {
        let answer = http.open("/chat/completions", &body).await;
        if answer.status() == StatusCode::SERVICE_UNAVAILABLE {
            assert_eq!(answer.headers()["retry-after"], "5");
            seen.send(Seen::Refused(read(answer).await.json())).unwrap();
            // A client that obeys `Retry-After` would make the test as slow.
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        }
        assert_eq!(answer.status(), StatusCode::OK);
        let id = answer.headers()["x-breakeven-request-id"].to_str().unwrap().to_owned();
        if streams {
            let (events, _) = Events::of(answer).rest().await;
            let is_done = events.last().is_some_and(|event| event == "data: [DONE]");
            let last = data(&events).pop().unwrap_or_default();
            assert!(is_done || last["error"].is_object(), "a stream ends in silence: {events:?}");
        } else {
            read(answer).await;
        }
        seen.send(Seen::End(id)).unwrap();
    }
}

/// Waits until `/readyz` says that it can or cannot record, and returns all that it says.
async fn until_records(served: &Served, wanted: bool) -> (StatusCode, String) {
    let admin = Http::new(&served.admin_url());
    let mut look = tokio::time::interval(Duration::from_millis(5));
    let ready = async {
        loop {
            let reply = admin.get("/readyz").await;
            if (reply.text() == "ok") == wanted {
                return (reply.status, reply.text().to_owned());
            }
            look.tick().await;
        }
    };
    tokio::time::timeout(LONG, ready).await.unwrap_or_else(|_| panic!("never {wanted}: {}", served.log()))
}

async fn serve_before_chaos(
    api: &FakeBackend,
    own: &FakeBackend,
    folder: tempfile::TempDir,
    when: &str,
) -> Served {
    let config = format!("when_unavailable = \"{when}\"\n{}", unreliable(api, own));
    let served = Served::start_in(folder, "", &config, &[]).await;
    let admin = Http::new(&served.admin_url());
    let serves = async {
        loop {
            let status = admin.get("/api/status").await.json();
            let backends = status["backends"].as_array().unwrap();
            if backends.iter().all(|backend| backend["healthy"] == true) {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LONG, serves).await.expect("the other backend serves");
    served
}

/// Runs clients with the disk, without it, and with it again.
async fn goes_and_comes_back(disk: Disk, folder: tempfile::TempDir, when: &str) {
    let calls = match disk {
        Disk::NoGrowth => scale("BREAKEVEN_CHAOS_CALLS", 600) / 3,
        // A megabyte holds the rows of no more.
        Disk::Full(_) => 200,
    };
    let refuses = when == "refuse";
    let api = FakeBackend::start(Personality::OpenAi, Settings::default()).await.unwrap();
    let own = FakeBackend::start(Personality::Vllm, Settings::default()).await.unwrap();
    let mut served = serve_before_chaos(&api, &own, folder, when).await;
    let seed = fastrand::u64(..);
    api.set(|settings| settings.chaos = Some(Chaos { seed, probability: SHARE, faults: faults() }));

    let (stop, stopped) = watch::channel(false);
    let (sender, seen) = mpsc::unbounded_channel();
    let mut clients = JoinSet::new();
    for client in 0..CLIENTS {
        clients.spawn(call_on(served.url(), client % 2 == 0, sender.clone(), stopped.clone()));
    }
    drop(sender);
    let mut book = Book { seen, ends: Vec::new(), refusals: 0, words: disk.words() };
    book.until_ends(calls).await;
    disk.take(&served);
    let (status, why) = until_records(&served, false).await;
    assert_eq!(status == StatusCode::SERVICE_UNAVAILABLE, refuses, "{why}");
    assert!(why.contains(disk.words()), "{why}");
    if refuses {
        book.until_refusals(20).await;
    } else {
        book.until_ends(calls).await;
    }
    disk.give_back(&served);
    until_records(&served, true).await;
    book.until_ends(calls).await;
    stop.send_replace(true);
    while book.note_next().await {}
    while let Some(client) = clients.join_next().await {
        client.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    }
    let Book { ends, refusals, .. } = book;
    let status = Http::new(&served.admin_url()).get("/api/status").await.json();
    assert_eq!(status["ledger"]["unrecorded"], 0, "{status}");
    assert_eq!(metric(&served.admin_url(), "breakeven_panics_total").await, 0);
    served.signal("-TERM");
    assert!(
        tokio::time::timeout(LONG, served.child.wait()).await.unwrap().unwrap().success(),
        "{}",
        served.log()
    );

    let mut rows = HashMap::new();
    for row in query::recent(&served.ledger(), usize::MAX).unwrap() {
        *rows.entry(row.id.hyphenated().to_string()).or_insert(0) += 1;
    }
    let wrong: Vec<_> = ends.iter().filter(|id| rows.get(*id) != Some(&1)).collect();
    eprintln!(
        "{when}, {}: {} calls seen to their end, {refusals} refused, {} rows (seed {seed})",
        disk.words(),
        ends.len(),
        rows.len()
    );
    assert!(wrong.is_empty(), "{} of {} calls have not one row (seed {seed})", wrong.len(), ends.len());
    assert!(rows.values().all(|count| *count == 1), "a row is there twice (seed {seed})");
    assert!(refuses || refusals == 0, "{refusals} calls were refused");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_its_disk_it_refuses_with_the_reason_and_loses_and_doubles_no_row() {
    goes_and_comes_back(Disk::NoGrowth, tempfile::tempdir().unwrap(), "refuse").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_its_disk_it_goes_on_if_told_to_and_records_what_waits_when_there_is_room() {
    goes_and_comes_back(Disk::NoGrowth, tempfile::tempdir().unwrap(), "continue").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_full_disk_it_refuses_with_the_reason_until_there_is_room() {
    let folder = tempfile::tempdir().unwrap();
    let ledger = folder.path().join(LEDGER).parent().unwrap().to_owned();
    std::fs::create_dir(&ledger).unwrap();
    let Some(disk) = SmallDisk::mount_at(&ledger) else { return };
    goes_and_comes_back(Disk::Full(disk), folder, "refuse").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_on_a_full_disk_says_how_many_rows_are_not_in_the_ledger_and_where_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let ledger = folder.path().join(LEDGER).parent().unwrap().to_owned();
    std::fs::create_dir(&ledger).unwrap();
    let Some(disk) = SmallDisk::mount_at(&ledger) else { return };
    let api = FakeBackend::start(Personality::OpenAi, Settings::default()).await.unwrap();
    let own = FakeBackend::start(Personality::Vllm, Settings::default()).await.unwrap();
    let config = format!("when_unavailable = \"continue\"\n{}", unreliable(&api, &own));
    let elsewhere = folder.path().to_string_lossy().into_owned();
    let mut served = Served::start_in(folder, "", &config, &[("TMPDIR", &elsewhere)]).await;
    let http = Http::new(&served.url());
    disk.fill();
    let body = with(chat(MODEL), json!({"stream": false}));
    let mut calls = 0;
    while Http::new(&served.admin_url()).get("/readyz").await.text() == "ok" {
        read(http.open("/chat/completions", &body).await).await;
        calls += 1;
        assert!(calls < 20_000, "the disk never fills");
    }
    served.signal("-TERM");
    assert!(tokio::time::timeout(LONG, served.child.wait()).await.unwrap().unwrap().success());
    let log = served.log();
    assert!(log.contains("not in the ledger, whose disk takes none"), "{log}");
    assert!(!log.contains("the next start will"), "{log}");
    let files = std::fs::read_dir(served.folder.path()).unwrap().map(|file| file.unwrap().file_name());
    let names: Vec<_> = files.filter_map(|name| name.into_string().ok()).collect();
    let spilled = names.iter().find(|name| name.starts_with("breakeven-rows-")).expect("they are in a file");
    assert!(log.contains(spilled), "{log}");
}

#[tokio::test]
async fn a_ledger_that_is_damaged_where_only_readers_look_is_set_aside_with_the_cause_and_budgets_begin_anew()
{
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(LEDGER);
    std::fs::create_dir(path.parent().unwrap()).unwrap();
    let ledger = ledger::open(&path);
    let _batch = ledger.append(&ledger::api_call(1, 0));
    assert!(ledger.close().await);
    ledger::damage_labels(&path);
    let api = FakeBackend::start(Personality::OpenAi, Settings::default()).await.unwrap();
    let own = FakeBackend::start(Personality::Vllm, Settings::default()).await.unwrap();
    let config = format!("{}\n[budgets.all]\nusd = 1\nperiod = \"month\"\n", unreliable(&api, &own));
    let served = Served::start_in(folder, "", &config, &[]).await;
    assert!(served.log().contains("is damaged (*** in database main *** Tree"), "{}", served.log());
    assert_eq!(query::recent(&served.ledger(), 1).unwrap(), []);
}
