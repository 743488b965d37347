//! One ledger of many proxies, in a real Postgres: nothing lost, nothing twice, and the same sums as in SQLite.

use std::path::{Path, PathBuf};
use std::time::Duration;

use breakeven::clock::Clock;
use breakeven::config::PostgresSettings;
use breakeven::economics::{NanoUsd, Timestamp};
use breakeven::ledger::postgres::{Shipper, Shipping};
use breakeven::ledger::query::{self, Key, Row};
use breakeven::ledger::{Entry, Event, Ledger, RentEntry, once};
use tempfile::TempDir;
use uuid::Uuid;

use crate::ledger::{api_call, gpu_call, open, rent, report};
use crate::support::needs;
use crate::support::postgres::{Certificate, Postgres};

/// 2027-01-31T23:59:00Z and a minute later, by the seconds that the ledger's builders count from.
const LAST_MINUTE: u64 = 16 * 86_400 + 43_200 - 60;

const EVERY_KEY: [&str; 9] = [
    "day",
    "hour",
    "backend",
    "model,served_model",
    "route,key,team",
    "tag:feature,tag:user",
    "endpoint,outcome",
    "day,reason,tier",
    "hour,backend,outcome",
];

fn settings(postgres: &Postgres, database: &str) -> PostgresSettings {
    let settings = PostgresSettings::of(postgres.url(database).parse().unwrap());
    PostgresSettings { batch_rows: 7, ..settings }
}

fn ship(settings: PostgresSettings, path: &Path) -> Shipper {
    Shipper::start(settings, path, Clock::manual(Timestamp::from_secs(1_800_014_400))).unwrap()
}

async fn until(shipping: &Shipping, what: &str, is_so: impl Fn(&Shipping) -> bool) {
    let mut look = tokio::time::interval(Duration::from_millis(5));
    let so = async {
        while !is_so(shipping) {
            look.tick().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), so)
        .await
        .unwrap_or_else(|_| panic!("{what}: {shipping:?}"));
}

async fn shipped(shipping: &Shipping) {
    until(shipping, "all is shipped", |shipping| shipping.shipped_at().is_some() && shipping.waiting() == 0)
        .await;
}

/// Two months of two backends, three teams and every kind of tags, different for each `seed`.
async fn sample(path: &Path, seed: u64) -> Ledger {
    let ledger = open(path);
    for n in 0..60 {
        let second = n * LAST_MINUTE / 29;
        let id = seed * 1000 + n;
        let mut call =
            if n % 3 == 0 { gpu_call(id, second, 333_333 + id.cast_signed()) } else { api_call(id, second) };
        call.team = ["search", "chat", ""][usize::try_from(n % 3).unwrap()].into();
        call.tags = ["feature=rank,user=7", "", "user= 8 ,odd", "feature=\ttab"]
            [usize::try_from(n % 4).unwrap()]
        .into();
        call.api_cost = (n % 5 != 0).then_some(NanoUsd::from_nanos(180_001 + id.cast_signed()));
        call.attempts_cost = NanoUsd::from_nanos(i64::from(n % 7 == 0) * 11);
        call.config_digest = format!("digest of {seed}").into();
        let _batch = ledger.append(&call);
    }
    for n in 0..20_i32 {
        let amount = 49_833_333 + n;
        ledger.append_rent(&rent(
            u64::try_from(n).unwrap() * 86_400,
            i64::from(amount),
            i64::from(n) * 1000 + 1,
        ));
    }
    let event = Event {
        at: Timestamp::from_secs(1_800_014_400),
        kind: "reload".into(),
        subject: "s".into(),
        detail: "d".into(),
    };
    ledger.append_event(&event);
    assert!(ledger.flush().await);
    ledger
}

fn new_path() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("breakeven.db");
    (directory, path)
}

fn totals(path: &Path, by: &str) -> Vec<Row> {
    let keys: Vec<Key> = by.split(',').map(|key| key.parse().unwrap()).collect();
    query::totals(path, None, None, &keys).unwrap()
}

async fn report_of(ledger: &str, arguments: &[&str]) -> String {
    let all: Vec<String> =
        ["--ledger", ledger].iter().chain(arguments).map(|argument| (*argument).to_owned()).collect();
    // A command has a runtime of its own.
    let written = tokio::task::spawn_blocking(move || {
        report(&all.iter().map(String::as_str).collect::<Vec<_>>()).unwrap()
    });
    written.await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_report_is_the_same_from_either_and_months_have_their_own_tables() {
    needs!(Postgres);
    let postgres = Postgres::start().await;
    let (_directory, path) = new_path();
    let _ledger = sample(&path, 1).await;
    let shipper = ship(settings(&postgres, "postgres"), &path);
    shipped(&shipper.shipping()).await;
    assert_eq!(shipper.shipping().rows(), 81);
    shipper.finish().await;

    let (file, url) = (path.to_str().unwrap(), postgres.url("postgres"));
    for by in EVERY_KEY {
        for format in ["table", "json", "csv"] {
            let arguments = ["--by", by, "--format", format];
            assert_eq!(report_of(&url, &arguments).await, report_of(file, &arguments).await, "{arguments:?}");
        }
    }
    let focus = ["--format", "focus"];
    assert_eq!(report_of(&url, &focus).await, report_of(file, &focus).await);
    let range =
        ["--since", "2027-01-20T00:00:00.5Z", "--until", "2027-02-01", "--by", "day", "--format", "json"];
    let ranged = report_of(&url, &range).await;
    assert!(ranged.contains("2027-01-31") && !ranged.contains("2027-02-01"), "{ranged}");
    assert_eq!(ranged, report_of(file, &range).await);

    let months = postgres
        .rows(
            "postgres",
            "SELECT tableoid::regclass::text, count(*) FROM breakeven.calls GROUP BY 1 ORDER BY 1",
        )
        .await;
    let months: Vec<(String, i64)> = months.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(
        months,
        [("breakeven.calls_2027_01".into(), 30), ("breakeven.calls_2027_02".into(), 30)],
        "the thirtieth closes in the last minute of January"
    );
    let ahead = "SELECT count(*) FROM pg_inherits WHERE inhparent = 'breakeven.rent'::regclass";
    assert_eq!(postgres.number("postgres", ahead).await, 3, "January to March, two of them ahead");

    let view = "SELECT instance, outcome, cost_usd::text, api_cost_usd::text FROM breakeven.calls_readable
                WHERE closed_at = '2027-01-15 12:00:00+00'";
    let rows = postgres.rows("postgres", view).await;
    let shown: (String, String, String, Option<String>) =
        (rows[0].get(0), rows[0].get(1), rows[0].get(2), rows[0].get(3));
    assert!(!shown.0.is_empty());
    assert_eq!((shown.1.as_str(), shown.2.as_str(), shown.3), ("success", "0.000334333", None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn proxies_that_start_together_make_one_ledger_whose_sums_are_those_of_all() {
    needs!(Postgres);
    let postgres = Postgres::start().await;
    let mut proxies = Vec::new();
    for seed in 1..=4 {
        let (directory, path) = new_path();
        let ledger = sample(&path, seed).await;
        proxies.push((directory, path, ledger));
    }
    let shippers: Vec<Shipper> =
        proxies.iter().map(|(_, path, _)| ship(settings(&postgres, "postgres"), path)).collect();
    for shipper in &shippers {
        shipped(&shipper.shipping()).await;
    }
    assert_eq!(postgres.number("postgres", "SELECT count(*) FROM breakeven.ledgers").await, 4);
    for by in EVERY_KEY {
        let mut sums = std::collections::BTreeMap::<Vec<String>, Row>::new();
        for (_, path, _) in &proxies {
            for row in totals(path, by) {
                let keys = row.keys.clone();
                sums.entry(keys.clone()).or_insert_with(|| Row { keys, ..Row::default() }).add(&row);
            }
        }
        let keys: Vec<Key> = by.split(',').map(|key| key.parse().unwrap()).collect();
        let one =
            breakeven::ledger::postgres::totals(&settings(&postgres, "postgres"), None, None, &keys).await;
        assert_eq!(one.unwrap(), sums.into_values().collect::<Vec<_>>(), "{by}");
    }

    // What was shipped is shipped again: a cursor that was lost, in a file that was restored, say.
    let (_, path, ledger) = &proxies[0];
    let count = "SELECT (SELECT count(*) FROM breakeven.calls) + (SELECT count(*) FROM breakeven.rent)
                 + (SELECT count(*) FROM breakeven.events)";
    assert_eq!(postgres.number("postgres", count).await, 4 * 81);
    rusqlite::Connection::open(path).unwrap().execute("DELETE FROM meta WHERE key = 'shipped'", []).unwrap();
    let _batch = ledger.append(&api_call(9999, 1));
    assert!(ledger.flush().await);
    until(&shippers[0].shipping(), "all of it again, and one row more", |shipping| {
        shipping.rows() == 2 * 81 + 1
    })
    .await;
    assert_eq!(postgres.number("postgres", count).await, 4 * 81 + 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_two_proxies_have_read_of_one_batch_is_there_once_and_shipped_again_it_stays() {
    needs!(Postgres);
    let postgres = Postgres::start().await;
    let mut proxies = Vec::new();
    for seed in 1..=2 {
        let (directory, path) = new_path();
        let ledger = open(&path);
        let shared = once::derived_id("openai", "/v1/files/file-1/content");
        let own = once::derived_id("openai", &format!("/v1/files/own-{seed}/content"));
        for id in [shared, own] {
            let _batch = ledger.append(&Entry { id, ..api_call(seed, seed) });
        }
        assert!(ledger.flush().await);
        let shipper = ship(settings(&postgres, "postgres"), &path);
        shipped(&shipper.shipping()).await;
        shipper.finish().await;
        proxies.push((directory, path, ledger));
    }
    let count = "SELECT count(*) FROM breakeven.calls";
    assert_eq!(postgres.number("postgres", count).await, 3);
    assert_eq!(postgres.number("postgres", "SELECT count(*) FROM breakeven.once").await, 3);

    // As after a restore that took the calls back and nothing else.
    postgres.run("postgres", "DELETE FROM breakeven.calls; UPDATE breakeven.ledgers SET calls = 0").await;
    for (_, path, _) in &proxies {
        let shipper = ship(settings(&postgres, "postgres"), path);
        until(&shipper.shipping(), "all of it again", |shipping| shipping.rows() == 2).await;
        shipper.finish().await;
    }
    assert_eq!(postgres.number("postgres", count).await, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_of_an_earlier_version_are_brought_up_to_date_and_those_of_a_newer_one_left_alone() {
    const FIRST: &str = include_str!("../../src/ledger/postgres/1.sql");
    needs!(Postgres);
    let postgres = Postgres::start().await;
    for database in ["earlier", "newer", "compatible", "latin"] {
        let encoding = if database == "latin" { "LATIN1" } else { "UTF8" };
        let create = format!("CREATE DATABASE {database} TEMPLATE template0 ENCODING '{encoding}'");
        postgres.run("postgres", &create).await;
    }
    for database in ["earlier", "newer", "compatible"] {
        postgres.run(database, &format!("CREATE SCHEMA breakeven; {FIRST}")).await;
    }
    let row = "INSERT INTO breakeven.ledgers (id, instance) VALUES ('00000000-0000-0000-0000-000000000001', 'a');
               INSERT INTO breakeven.labels (digest, key, team, endpoint, route, requested_model, served_model,
                   backend, reason, tier, config_digest) VALUES ('x', '', '', '', '', 'old', '', 'b', '', '', '');
               CREATE TABLE breakeven.calls_2026_12 PARTITION OF breakeven.calls
                   FOR VALUES FROM ('2026-12-01 00:00:00+00') TO ('2027-01-01 00:00:00+00');
               INSERT INTO breakeven.calls (closed_at, opened_at, input_tokens, output_tokens, cost, ledger, label, id,
                   attempts, status, outcome, usage_source, stream, unpriced) VALUES
                   ('2026-12-05', '2026-12-05', 1, 1, 5, 1, 1, gen_random_uuid(), 1, 200, 0, 0, true, false);";
    postgres.run("earlier", row).await;
    let newer = "UPDATE breakeven.meta SET value = '99' WHERE key IN ('schema_version', 'oldest_writer')";
    postgres.run("newer", newer).await;
    let compatible = "UPDATE breakeven.meta SET value = '99' WHERE key = 'schema_version'";
    postgres.run("compatible", compatible).await;

    let (_directory, path) = new_path();
    let _ledger = sample(&path, 1).await;
    let shipper = ship(settings(&postgres, "earlier"), &path);
    shipped(&shipper.shipping()).await;
    drop(shipper);
    let version = "SELECT value::bigint FROM breakeven.meta WHERE key = 'schema_version'";
    assert_eq!(postgres.number("earlier", version).await, 3);
    assert_eq!(postgres.number("earlier", "SELECT count(*) FROM breakeven.calls_readable").await, 61);

    let shipper = ship(settings(&postgres, "newer"), &path);
    until(&shipper.shipping(), "it is refused", |shipping| shipping.failures() > 0).await;
    drop(shipper);
    assert_eq!(postgres.number("newer", "SELECT count(*) FROM breakeven.ledgers").await, 0);

    // The cursor says that all is shipped; another database has none of it.
    let shipper = ship(settings(&postgres, "compatible"), &path);
    shipped(&shipper.shipping()).await;
    drop(shipper);
    assert_eq!(postgres.number("compatible", "SELECT count(*) FROM breakeven.calls").await, 60);
    assert_eq!(postgres.number("compatible", version).await, 99);

    let shipper = ship(settings(&postgres, "latin"), &path);
    until(&shipper.shipping(), "an encoding without all characters", |shipping| shipping.failures() > 0)
        .await;
    let error = breakeven::ledger::postgres::totals(&settings(&postgres, "latin"), None, None, &[]).await;
    assert!(error.unwrap_err().to_string().contains("no ledger"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hostile_row_does_not_hold_up_those_behind_it() {
    needs!(Postgres);
    let postgres = Postgres::start().await;
    let (_directory, path) = new_path();
    let ledger = open(&path);
    let hostile = Entry {
        id: Uuid::nil(),
        requested_model: "nul\0 and \u{10FFFF}".into(),
        team: "x".repeat(10_000).into(),
        attempts: u32::MAX,
        status: u16::MAX,
        opened_at: Timestamp::ZERO,
        closed_at: Timestamp::from_millis(u64::MAX),
        cost: NanoUsd::from_nanos(-i64::MAX),
        ..api_call(1, 1)
    };
    let _batch = ledger.append(&hostile);
    let broken_clock = RentEntry { backend: "gpu\0".into(), from: Timestamp::ZERO, ..rent(0, 1, 1) };
    ledger.append_rent(&broken_clock);
    for id in 2..5 {
        let _batch = ledger.append(&api_call(id, id));
    }
    assert!(ledger.flush().await);
    let shipper = ship(settings(&postgres, "postgres"), &path);
    shipped(&shipper.shipping()).await;
    let rows = postgres
        .rows(
            "postgres",
            "SELECT requested_model, cost_usd::text FROM breakeven.calls_readable ORDER BY calls_readable.id",
        )
        .await;
    assert_eq!(rows.len(), 4);
    assert_eq!(rows[0].get::<_, String>(0), "nul\u{FFFD} and \u{10FFFF}");
    assert_eq!(rows[0].get::<_, String>(1), "-9223372036.854775807");
    assert_eq!(postgres.number("postgres", "SELECT count(*) FROM breakeven.rent_1970_01").await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_is_believed_only_with_a_certificate_of_its_name() {
    needs!(Postgres);
    let authority = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let stranger = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let key = authority.signing_key.serialize_pem();
    let certificate = Certificate { chain: &authority.cert.pem(), key: &key };
    let postgres = Postgres::start_with(Some(certificate)).await;
    let (directory, path) = new_path();
    let _ledger = sample(&path, 1).await;
    let file = |name: &str, text: String| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let (known, other) = (file("known.pem", authority.cert.pem()), file("other.pem", stranger.cert.pem()));
    let settings = |host: &str, ca_file: Option<&Path>| {
        let url = format!("postgres://proxy@{host}:{}/postgres?sslmode=verify-full", postgres.port());
        PostgresSettings {
            ca_file: ca_file.map(Path::to_owned),
            ..PostgresSettings::of(url.parse().unwrap())
        }
    };
    for (refused, why) in [
        (settings("localhost", None), "no public authority signed it"),
        (settings("localhost", Some(&other)), "another authority"),
        (settings("127.0.0.1", Some(&known)), "another name"),
        (settings("localhost", Some(&path)), "no certificates"),
    ] {
        let shipper = ship(refused, &path);
        until(&shipper.shipping(), why, |shipping| shipping.failures() > 0).await;
        assert_eq!(shipper.shipping().rows(), 0, "{why}");
    }
    let shipper = ship(settings("localhost", Some(&known)), &path);
    shipped(&shipper.shipping()).await;
    let encrypted = "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)
                     WHERE ssl AND application_name = 'breakeven'";
    assert_eq!(postgres.number("postgres", encrypted).await, 1);
    assert_eq!(postgres.number("postgres", "SELECT count(*) FROM breakeven.calls").await, 60);
}
