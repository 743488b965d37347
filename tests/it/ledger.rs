//! The ledger as a whole: what is appended can be read, whatever is in the way.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use breakeven::clock::Clock;
use breakeven::commands::report::{self, ReportArgs};
use breakeven::config::{Fsync, LedgerSettings, WhenUnavailable};
use breakeven::economics::{NanoUsd, Timestamp, Usage, Work};
use breakeven::ledger::query::{self, Key, Row};
use breakeven::ledger::{Entry, Event, Ledger, LedgerError, Outcome, RentEntry, UsageSource, once};
use clap::Parser as _;
use tempfile::TempDir;
use uuid::Uuid;

const NOON: u64 = 1_800_014_400;

pub(crate) fn settings(path: &Path, fsync: Fsync) -> LedgerSettings {
    LedgerSettings { path: path.to_owned(), fsync, when_unavailable: WhenUnavailable::Refuse, postgres: None }
}

pub(crate) fn open(path: &Path) -> Ledger {
    Ledger::open(&settings(path, Fsync::Batch), Clock::manual(Timestamp::from_secs(NOON))).unwrap()
}

fn at(second: u64) -> Timestamp {
    Timestamp::from_secs(NOON + second)
}

fn nanos(nanos: i64) -> NanoUsd {
    NanoUsd::from_nanos(nanos)
}

/// A call on the API that closed `second` seconds after noon.
pub(crate) fn api_call(id: u64, second: u64) -> Entry<'static> {
    Entry {
        id: Uuid::from_u64_pair(1, id),
        opened_at: Timestamp::from_millis(at(second).as_millis() - 900),
        closed_at: at(second),
        first_token_at: Some(Timestamp::from_millis(at(second).as_millis() - 500)),
        key: "".into(),
        team: "search".into(),
        tags: "feature=rank,user=7".into(),
        endpoint: "chat_completions".into(),
        route: "chat".into(),
        requested_model: "gpt-4o-mini".into(),
        served_model: "gpt-4o-mini".into(),
        backend: "openai".into(),
        reason: "cheapest".into(),
        attempts: 1,
        status: 200,
        outcome: Outcome::Success,
        stream: true,
        usage: Usage::new(1000, 100).with_cached(400),
        usage_source: UsageSource::UpstreamUsage,
        tier: "standard".into(),
        cost: nanos(180_000),
        api_cost: Some(nanos(180_000)),
        self_hosted_cost: Some(nanos(60_000)),
        work: Work(50_000),
        attempts_cost: NanoUsd::ZERO,
        unpriced: false,
        config_digest: "d1".into(),
    }
}

pub(crate) fn gpu_call(id: u64, second: u64, cost: i64) -> Entry<'static> {
    Entry {
        backend: "gpu".into(),
        served_model: "llama".into(),
        team: "chat".into(),
        tags: "".into(),
        cost: nanos(cost),
        self_hosted_cost: Some(nanos(cost)),
        usage_source: UsageSource::OwnTokenizer,
        ..api_call(id, second)
    }
}

pub(crate) fn rent(second: u64, rent: i64, attributed: i64) -> RentEntry {
    RentEntry {
        backend: "gpu".into(),
        from: at(second),
        to: at(second + 60),
        replica_millis: 60_000,
        busy: Work(100_000),
        rent: nanos(rent),
        attributed: nanos(attributed),
        idle: nanos(rent - attributed),
    }
}

fn new_path() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("breakeven.db");
    (directory, path)
}

fn journal(path: &Path) -> PathBuf {
    PathBuf::from(format!("{}.journal", path.display()))
}

fn segments(path: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(journal(path)).unwrap().map(|file| file.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|extension| extension == "log")).collect()
}

fn ids(path: &Path) -> Vec<u64> {
    query::recent(path, usize::MAX).unwrap().iter().map(|entry| entry.id.as_u64_pair().1).collect()
}

fn by(path: &Path, keys: &str) -> Vec<Row> {
    let keys: Vec<Key> =
        keys.split(',').filter(|key| !key.is_empty()).map(|key| key.parse().unwrap()).collect();
    query::totals(path, None, None, &keys).unwrap()
}

#[tokio::test]
async fn what_is_appended_can_be_read_field_for_field() {
    let (_directory, path) = new_path();
    let ledger = open(&path);
    let mut odd = gpu_call(2, 1, -5);
    odd.first_token_at = None;
    odd.api_cost = None;
    odd.outcome = Outcome::Cancelled;
    odd.stream = false;
    odd.tags = "weird=\ttab\nline\\back\u{1e}".into();
    odd.unpriced = true;
    odd.usage.reasoning_tokens = 9;
    let event = Event { at: at(3), kind: "pin".into(), subject: "gpu".into(), detail: "pinned".into() };
    for entry in [&api_call(1, 0), &odd] {
        let _batch = ledger.append(entry);
    }
    ledger.append_rent(&rent(0, 10, 4));
    ledger.append_event(&event);
    assert!(ledger.close().await);
    assert_eq!(query::recent(&path, 10).unwrap(), [odd, api_call(1, 0)]);
    assert_eq!(query::rent(&path, at(0)).unwrap(), [rent(0, 10, 4)]);
    assert_eq!(query::events(&path, at(0)).unwrap(), [event]);
}

#[tokio::test]
async fn a_closed_ledger_leaves_nothing_in_the_journal_and_opens_again() {
    let (_directory, path) = new_path();
    for round in 0..3 {
        let ledger = open(&path);
        let _batch = ledger.append(&api_call(round, round));
        assert!(ledger.close().await);
        assert_eq!(segments(&path), Vec::<PathBuf>::new());
    }
    assert_eq!(ids(&path), [2, 1, 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn concurrent_appends_lose_and_double_nothing_over_segment_changes() {
    let (_directory, path) = new_path();
    let ledger = open(&path);
    let (threads, each) = (4, 12_000);
    let workers = (0..threads).map(|thread| {
        let ledger = ledger.clone();
        std::thread::spawn(move || {
            for n in 0..each {
                let mut entry = api_call(thread * each + n, n);
                entry.tags = "x".repeat(400).into();
                let _batch = ledger.append(&entry);
            }
        })
    });
    workers.collect::<Vec<_>>().into_iter().for_each(|worker| worker.join().unwrap());
    // The first may find the segment grown too long, the second then has begun the next.
    assert!(ledger.flush().await && ledger.flush().await);
    let stats = ledger.stats();
    assert_eq!((stats.committed, stats.pending, stats.torn), (threads * each, 0, 0));
    let first_segment = journal(&path).join("00000001.log");
    assert!(!first_segment.exists(), "30 MB do not fit one segment, so the first was retired and deleted");
    assert_eq!(stats.last_commit, Some(at(0)));
    drop(ledger);
    let ids = ids(&path);
    assert_eq!(ids.len(), ids.iter().collect::<HashSet<_>>().len());
    assert_eq!(ids.len() as u64, threads * each);
}

#[tokio::test]
async fn always_waits_until_the_row_is_synced() {
    let (_directory, path) = new_path();
    let ledger =
        Ledger::open(&settings(&path, Fsync::Always), Clock::manual(Timestamp::from_secs(NOON))).unwrap();
    let tickets: Vec<_> = (0..20).map(|id| ledger.append(&api_call(id, id))).collect();
    for ticket in tickets {
        tokio::time::timeout(Duration::from_secs(4), ledger.durable(ticket)).await.unwrap();
    }
}

#[test]
fn a_second_process_is_told_that_the_ledger_is_in_use() {
    let (_directory, path) = new_path();
    let _first = open(&path);
    let second = Ledger::open(&settings(&path, Fsync::Batch), Clock::system());
    let error = second.unwrap_err();
    assert!(matches!(&error, LedgerError::InUse { .. }));
    assert!(error.to_string().contains("ledger.path"), "{error}");
}

#[tokio::test]
async fn a_damaged_file_is_set_aside_and_a_new_one_begins() {
    let (directory, path) = new_path();
    fs::write(&path, "this was a database once, before the disk lied about it\n".repeat(100)).unwrap();
    let ledger = open(&path);
    let _batch = ledger.append(&api_call(1, 0));
    assert!(ledger.close().await);
    assert_eq!(ids(&path), [1]);
    let aside = directory.path().join(format!("breakeven.db.damaged-{}", NOON * 1000));
    assert!(fs::read_to_string(aside).unwrap().starts_with("this was a database once"));
}

/// Makes nonsense of the page where the names of calls begin, which nobody reads who opens the file.
pub(crate) fn damage_labels(path: &Path) {
    let connection = rusqlite::Connection::open(path).unwrap();
    let number = |sql: &str| connection.query_row(sql, [], |row| row.get::<_, u32>(0)).unwrap();
    let page = number("SELECT rootpage FROM sqlite_schema WHERE name = 'labels'");
    let size = number("PRAGMA page_size");
    drop(connection);
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    let nonsense = vec![0xff; usize::try_from(size).unwrap()];
    file.write_all_at(&nonsense, u64::from(page - 1) * u64::from(size)).unwrap();
}

#[tokio::test]
async fn damage_that_a_reader_comes_upon_sets_the_file_aside_once() {
    let (directory, path) = new_path();
    let ledger = open(&path);
    let _batch = ledger.append(&api_call(1, 0));
    assert!(ledger.close().await);
    damage_labels(&path);
    let ledger = open(&path);
    let error = query::volume_since(&path, Timestamp::ZERO).unwrap_err();
    assert!(ledger.report(&error), "{error:?}");
    assert!(ledger.flush().await);
    assert_eq!(query::volume_since(&path, Timestamp::ZERO).unwrap(), []);
    let _batch = ledger.append(&api_call(2, 0));
    assert!(ledger.flush().await);
    // Somebody else had read the old file as well, and says so late.
    assert!(ledger.report(&error));
    assert!(ledger.flush().await);
    assert_eq!(ids(&path), [2]);
    let aside = |name: &str| name.contains(".damaged-") && !name.ends_with("-wal") && !name.ends_with("-shm");
    let files = fs::read_dir(directory.path()).unwrap().map(|file| file.unwrap().file_name());
    assert_eq!(files.filter(|name| aside(&name.to_string_lossy())).count(), 1);
    assert!(!ledger.report(&LedgerError::Missing { path }));
}

#[tokio::test]
async fn a_file_of_a_newer_schema_is_refused_and_left_alone() {
    let (_directory, path) = new_path();
    assert!(open(&path).close().await);
    let connection = rusqlite::Connection::open(&path).unwrap();
    connection.execute("UPDATE meta SET value = '99' WHERE key = 'schema_version'", []).unwrap();
    drop(connection);
    let error = Ledger::open(&settings(&path, Fsync::Batch), Clock::system()).unwrap_err();
    assert!(matches!(&error, LedgerError::Newer { found, .. } if found == "99"), "{error}");
    assert!(query::recent(&path, 1).is_err());
}

/// Makes of a file what it was in schema 1: an index of all times instead of spans.
fn downgrade(path: &Path) {
    let connection = rusqlite::Connection::open(path).unwrap();
    connection
        .execute_batch(
            "DROP TABLE spans; DROP TABLE once; CREATE INDEX calls_closed_at ON calls (closed_at);
             UPDATE meta SET value = '1' WHERE key = 'schema_version';",
        )
        .unwrap();
}

#[tokio::test]
async fn a_file_of_an_earlier_schema_is_read_as_it_is_and_brought_up_to_date_by_a_server() {
    let (_directory, path) = new_path();
    let ledger = open(&path);
    for id in 1..=3000 {
        let _batch = ledger.append(&api_call(id, id));
    }
    assert!(ledger.close().await);
    let since = Timestamp::from_secs(NOON + 2900);
    let spent = query::spend_by_key(&path, since).unwrap();
    downgrade(&path);
    assert_eq!(query::spend_by_key(&path, since).unwrap(), spent);
    let ledger = open(&path);
    let _batch = ledger.append(&api_call(3001, 10));
    assert!(ledger.close().await);
    assert_eq!(ids(&path).len(), 3001);
    assert_eq!(query::spend_by_key(&path, since).unwrap(), spent);
    let version = "SELECT value FROM meta WHERE key = 'schema_version'";
    let connection = rusqlite::Connection::open(&path).unwrap();
    assert_eq!(connection.query_row(version, [], |row| row.get::<_, String>(0)).unwrap(), "3");
    let spans = "SELECT count(*) FROM spans";
    assert_eq!(connection.query_row(spans, [], |row| row.get::<_, i64>(0)).unwrap(), 2);
}

#[tokio::test]
async fn a_row_that_may_come_again_is_there_once_whoever_appends_it() {
    let (_directory, path) = new_path();
    let (read_twice, read_once) = (once::derived_id("openai", "/a"), once::derived_id("openai", "/b"));
    for (round, ids) in [[read_twice, read_once], [read_twice, read_twice]].into_iter().enumerate() {
        let ledger = open(&path);
        for id in ids {
            let _batch = ledger.append(&Entry { id, ..api_call(1, 10) });
        }
        // The id of a usual row is never asked for.
        let _batch = ledger.append(&api_call(7, 10));
        assert!(ledger.flush().await);
        assert_eq!(ledger.stats().pending, 0);
        assert!(once::has(&path, read_twice).unwrap() && once::has(&path, read_once).unwrap());
        assert_eq!(query::recent(&path, 10).unwrap().len(), 3 + round);
        drop(ledger);
    }
    let connection = rusqlite::Connection::open(&path).unwrap();
    let second = "DROP TABLE once; UPDATE meta SET value = '2' WHERE key = 'schema_version'";
    connection.execute_batch(second).unwrap();
    drop(connection);
    let ledger = open(&path);
    let _batch = ledger.append(&Entry { id: read_once, ..api_call(1, 10) });
    assert!(ledger.close().await);
    assert_eq!(query::recent(&path, 10).unwrap().len(), 4, "rows of schema 2 are known");
}

#[tokio::test]
async fn rows_that_an_earlier_version_left_in_the_journal_are_not_passed_over() {
    let (_directory, path) = new_path();
    assert!(open(&path).close().await);
    let connection = rusqlite::Connection::open(&path).unwrap();
    let id = "SELECT value FROM meta WHERE key = 'ledger_id'";
    let id: String = connection.query_row(id, [], |row| row.get(0)).unwrap();
    let left = journal(&path).join("00000009.log");
    let text = format!("breakeven journal 1 {id}\n\u{1e}c0123\t1\t2\n");
    fs::write(&left, &text).unwrap();
    let error = Ledger::open(&settings(&path, Fsync::Batch), Clock::system()).unwrap_err();
    assert!(matches!(&error, LedgerError::EarlierJournal { path } if *path == left), "{error}");
    assert_eq!(fs::read_to_string(&left).unwrap(), text);
}

#[test]
fn a_database_of_something_else_is_refused_and_left_alone() {
    let (_directory, path) = new_path();
    let connection = rusqlite::Connection::open(&path).unwrap();
    connection.execute_batch("CREATE TABLE photos (name TEXT)").unwrap();
    let error = Ledger::open(&settings(&path, Fsync::Batch), Clock::system()).unwrap_err();
    assert!(matches!(error, LedgerError::NotALedger { .. }), "{error}");
    let photos: i64 = connection.query_row("SELECT count(*) FROM photos", [], |row| row.get(0)).unwrap();
    assert_eq!(photos, 0);
}

#[tokio::test]
async fn groups_add_up_to_the_total_with_idle_rent_in_a_row_of_its_own() {
    let (_directory, path) = new_path();
    let ledger = open(&path);
    let one_day = 86_400;
    let calls = [api_call(1, 0), api_call(2, one_day), gpu_call(3, 10, 700), gpu_call(4, 20, 300)];
    for call in &calls {
        let _batch = ledger.append(call);
    }
    ledger.append_rent(&rent(0, 5000, 1000));
    ledger.append_rent(&rent(one_day, 5000, 0));
    assert!(ledger.close().await);

    let total = by(&path, "");
    let [total] = total.as_slice() else { panic!("{total:?}") };
    assert_eq!((total.requests, total.input_tokens, total.cached_input_tokens), (4, 4000, 1600));
    assert_eq!((total.output_tokens, total.estimated_requests), (400, 2));
    assert_eq!((total.cost, total.rent, total.idle), (nanos(361_000), nanos(10_000), nanos(9000)));
    assert_eq!(total.all_api, nanos(720_000));
    assert_eq!(total.spend(), nanos(360_000 + 10_000));
    assert_eq!(total.net_savings(), nanos(720_000 - 370_000));

    for keys in ["day", "backend", "hour", "model", "team", "day,team", "backend,tag:feature", "outcome,key"]
    {
        let rows = by(&path, keys);
        let mut sum = Row::default();
        for row in &rows {
            sum.add(row);
        }
        assert_eq!(&sum, total, "{keys}");
    }
    let days = by(&path, "day");
    assert_eq!(days.iter().map(|row| row.keys[0].as_str()).collect::<Vec<_>>(), ["2027-01-15", "2027-01-16"]);
    assert_eq!((days[1].cost, days[1].rent, days[1].idle), (nanos(180_000), nanos(5000), nanos(5000)));
    let teams = by(&path, "team");
    let shown: Vec<_> = teams.iter().map(|row| (row.keys[0].as_str(), row.rent, row.idle)).collect();
    let expected = [
        (query::IDLE, nanos(9000), nanos(9000)),
        ("chat", nanos(1000), nanos(0)),
        ("search", nanos(0), nanos(0)),
    ];
    assert_eq!(shown, expected);
}

#[tokio::test]
async fn a_range_holds_its_start_and_not_its_end() {
    let (_directory, path) = new_path();
    let ledger = open(&path);
    for second in 0..10 {
        let _batch = ledger.append(&api_call(second, second));
    }
    assert!(ledger.close().await);
    let rows = query::totals(&path, Some(at(2)), Some(at(5)), &[]).unwrap();
    assert_eq!(rows[0].requests, 3);
    let mut opened = Vec::new();
    query::trace(&path, at(2), at(5), |row| opened.push(row.opened_at)).unwrap();
    assert_eq!(opened.len(), 3);
    assert!(opened.is_sorted() && opened[0] >= at(2) && opened[2] < at(5));
}

#[tokio::test]
async fn the_current_volume_comes_back_by_second_route_and_backend() {
    let (_directory, path) = new_path();
    let ledger = open(&path);
    for call in [api_call(1, 0), api_call(2, 5), api_call(3, 5), gpu_call(4, 5, 1)] {
        let _batch = ledger.append(&call);
    }
    assert!(ledger.close().await);
    let volume = query::volume_since(&path, at(1)).unwrap();
    let [gpu, openai] = volume.as_slice() else { panic!("{volume:?}") };
    assert_eq!((gpu.backend.as_str(), gpu.requests), ("gpu", 1));
    assert_eq!((openai.backend.as_str(), openai.requests, openai.at), ("openai", 2, at(5)));
    assert_eq!((openai.api_cost, openai.work), (nanos(360_000), Work(100_000)));
    assert_eq!(openai.usage, Usage::new(2000, 200).with_cached(800));
    assert_eq!(query::spend_by_key(&path, at(5)).unwrap(), [(String::new(), nanos(360_001))]);
}

#[tokio::test]
async fn the_readable_view_shows_names_times_and_exact_dollars() {
    let (_directory, path) = new_path();
    let ledger = open(&path);
    let mut call = api_call(1, 0);
    call.cost = nanos(-1_000_000_001);
    let _batch = ledger.append(&call);
    assert!(ledger.close().await);
    let connection = rusqlite::Connection::open(&path).unwrap();
    let sql =
        "SELECT backend, requested_model, opened_at, cost_usd, api_cost_usd, outcome FROM calls_readable";
    let shown: Vec<String> =
        connection.query_row(sql, [], |row| (0..6).map(|index| row.get(index)).collect()).unwrap();
    let expected =
        ["openai", "gpt-4o-mini", "2027-01-15T11:59:59.100Z", "-1.000000001", "0.000180000", "success"];
    assert_eq!(shown, expected);
}

pub(crate) fn report(arguments: &[&str]) -> anyhow::Result<String> {
    #[derive(clap::Parser)]
    struct Program {
        #[command(flatten)]
        report: ReportArgs,
    }
    let arguments = std::iter::once("report").chain(arguments.iter().copied());
    let mut out = Vec::new();
    report::report(&Program::try_parse_from(arguments)?.report, at(3600), &mut out)?;
    Ok(String::from_utf8(out)?)
}

/// A day of two backends, for what people read.
fn sample(path: &Path) {
    let ledger = open(path);
    for call in [api_call(1, 0), api_call(2, 60), gpu_call(3, 10, 700_000)] {
        let _batch = ledger.append(&call);
    }
    ledger.append_rent(&rent(0, 49_833_333, 700_000));
}

#[test]
fn a_report_in_json_keeps_its_promised_columns_and_exact_amounts() {
    let (_directory, path) = new_path();
    sample(&path);
    let text =
        report(&["--ledger", path.to_str().unwrap(), "--by", "day,backend", "--format", "json"]).unwrap();
    insta::assert_snapshot!(text, @r#"
    [
      {
        "day": "2027-01-15",
        "backend": "gpu",
        "requests": 1,
        "input_tokens": 1000,
        "cached_input_tokens": 400,
        "output_tokens": 100,
        "estimated_requests": 1,
        "cost_usd": "0.0007",
        "all_api_usd": "0.00018",
        "all_self_hosted_usd": "0.0007",
        "rent_usd": "0.049833333",
        "idle_usd": "0.049133333",
        "net_savings_usd": "-0.049653333"
      },
      {
        "day": "2027-01-15",
        "backend": "openai",
        "requests": 2,
        "input_tokens": 2000,
        "cached_input_tokens": 800,
        "output_tokens": 200,
        "estimated_requests": 0,
        "cost_usd": "0.00036",
        "all_api_usd": "0.00036",
        "all_self_hosted_usd": "0.00012",
        "rent_usd": "0.00",
        "idle_usd": "0.00",
        "net_savings_usd": "0.00"
      }
    ]
    "#);
}

#[test]
fn a_report_for_a_terminal_lines_up_and_ends_with_the_total() {
    let (_directory, path) = new_path();
    sample(&path);
    let text = report(&["--ledger", path.to_str().unwrap(), "--by", "model,team"]).unwrap();
    insta::assert_snapshot!(text, @r"
    model        team    requests  input  cached  output  estimated  cost $  API alone $  own at full use $  rent $  idle $  net saved $
    (idle)       (idle)         0      0       0       0          0  0.0000       0.0000             0.0000  0.0491  0.0491      -0.0491
    gpt-4o-mini  chat           1  1,000     400     100          1  0.0007       0.0002             0.0007  0.0007  0.0000      -0.0005
    gpt-4o-mini  search         2  2,000     800     200          0  0.0004       0.0004             0.0001  0.0000  0.0000       0.0000
    total                       3  3,000   1,200     300          1  0.0011       0.0005             0.0008  0.0498  0.0491      -0.0497
    ");
}

#[test]
fn a_report_in_csv_has_the_columns_of_the_json() {
    let (_directory, path) = new_path();
    sample(&path);
    let text = report(&["--ledger", path.to_str().unwrap(), "--format", "csv"]).unwrap();
    insta::assert_snapshot!(text, @r"
    backend,requests,input_tokens,cached_input_tokens,output_tokens,estimated_requests,cost_usd,all_api_usd,all_self_hosted_usd,rent_usd,idle_usd,net_savings_usd
    gpu,1,1000,400,100,1,0.0007,0.00018,0.0007,0.049833333,0.049133333,-0.049653333
    openai,2,2000,800,200,0,0.00036,0.00036,0.00012,0.00,0.00,0.00
    ");
}

#[test]
fn the_charges_of_a_focus_file_add_up_to_the_spend() {
    let (_directory, path) = new_path();
    sample(&path);
    let text = report(&["--ledger", path.to_str().unwrap(), "--format", "focus"]).unwrap();
    let mut csv = csv::Reader::from_reader(text.as_bytes());
    let billed: NanoUsd = csv.records().map(|record| record.unwrap()[0].parse::<NanoUsd>().unwrap()).sum();
    assert_eq!(billed, nanos(2 * 180_000 + 49_833_333));
    assert_eq!(billed, by(&path, "")[0].spend());
}

#[test]
fn a_report_of_an_empty_range_says_so_and_a_missing_ledger_names_the_remedy() {
    let (_directory, path) = new_path();
    let missing = report(&["--ledger", path.to_str().unwrap()]).unwrap_err().to_string();
    assert!(missing.contains("breakeven serve"), "{missing}");
    sample(&path);
    let ledger = path.to_str().unwrap();
    assert!(report(&["--ledger", ledger, "--since", "1m"]).unwrap().starts_with("no calls"));
    assert_eq!(report(&["--ledger", ledger, "--since", "1m", "--format", "json"]).unwrap(), "[]\n");
    assert!(report(&["--ledger", ledger, "--since", "1m", "--until", "2m"]).is_err());
}

#[test]
fn a_report_finds_the_ledger_that_the_configuration_names() {
    let (directory, path) = new_path();
    sample(&path);
    let config = directory.path().join("breakeven.toml");
    let secret = "[backends.openai]\nkind = \"api\"\napi_key = { env = \"NOT_SET_ANYWHERE\" }\n";
    fs::write(&config, format!("{secret}[ledger]\npath = {path:?}\n")).unwrap();
    assert!(report(&["--config", config.to_str().unwrap()]).unwrap().contains("openai"));
}
