//! The ledger as files: whole days, once, and to the nano-dollar.

use std::fs::{self, File};
use std::path::Path;

use breakeven::commands::export::{self, ExportArgs};
use breakeven::economics::Timestamp;
use breakeven::ledger::{Outcome, query};
use clap::Parser as _;
use flate2::read::GzDecoder;

use crate::ledger::{api_call, gpu_call, open, rent};

const DAY: u64 = 86_400;

/// Noon of 2027-01-15, which the builders count from.
const NOON: u64 = 1_800_014_400;

fn run(ledger: &Path, out: &Path, more: &[&str], now: u64) -> String {
    #[derive(clap::Parser)]
    struct Program {
        #[command(flatten)]
        export: ExportArgs,
    }
    let fixed = ["export", "--ledger", ledger.to_str().unwrap(), "--out", out.to_str().unwrap()];
    let arguments = Program::try_parse_from(fixed.iter().chain(more)).unwrap().export;
    let mut text = Vec::new();
    export::export(&arguments, Timestamp::from_secs(now), &mut text).unwrap();
    String::from_utf8(text).unwrap().replace(out.to_str().unwrap(), "OUT")
}

fn names(folder: &Path) -> Vec<String> {
    let files = fs::read_dir(folder).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = files.collect();
    names.sort();
    names
}

fn rows(file: &Path) -> Vec<csv::StringRecord> {
    let mut csv = csv::Reader::from_reader(GzDecoder::new(File::open(file).unwrap()));
    let header = csv.headers().unwrap().clone();
    std::iter::once(header).chain(csv.records().map(Result::unwrap)).collect()
}

fn column(rows: &[csv::StringRecord], name: &str) -> Vec<String> {
    let index = rows[0].iter().position(|column| column == name).unwrap();
    rows[1..].iter().map(|row| row[index].to_owned()).collect()
}

#[tokio::test]
async fn each_day_that_is_over_is_written_once_and_the_sums_are_those_of_the_ledger() {
    let directory = tempfile::tempdir().unwrap();
    let (path, out) = (directory.path().join("breakeven.db"), directory.path().join("out"));
    let ledger = open(&path);
    let mut odd = gpu_call(2, DAY / 2 - 1, 700_001);
    odd.tags = "feature=\"a,b\"\nx".into();
    odd.outcome = Outcome::Cancelled;
    odd.api_cost = None;
    // The second ends in the last second of its day, the third in the first of the next.
    for call in [&api_call(1, 0), &odd, &api_call(3, DAY / 2), &api_call(4, 2 * DAY)] {
        let _batch = ledger.append(call);
    }
    ledger.append_rent(&rent(0, 49_833_333, 700_001));
    assert!(ledger.flush().await);

    let text = run(&path, &out, &[], NOON + 2 * DAY);
    insta::assert_snapshot!(text, @r"
    OUT/calls-2027-01-15.csv.gz: 2 rows
    OUT/rent-2027-01-15.csv.gz: 1 rows
    OUT/calls-2027-01-16.csv.gz: 1 rows
    OUT/rent-2027-01-16.csv.gz: 0 rows
    ");
    let first = rows(&out.join("calls-2027-01-15.csv.gz"));
    assert_eq!(column(&first, "closed_at"), ["2027-01-15 12:00:00.000", "2027-01-15 23:59:59.000"]);
    assert_eq!(column(&first, "tags")[1], "feature=\"a,b\"\nx");
    assert_eq!(column(&first, "outcome"), ["success", "cancelled"]);
    assert_eq!(column(&first, "api_cost"), ["180000", ""]);
    assert_eq!(column(&first, "backend"), ["openai", "gpu"]);
    let second = rows(&out.join("calls-2027-01-16.csv.gz"));
    let cost: i64 = [&first, &second]
        .iter()
        .flat_map(|rows| column(rows, "cost"))
        .map(|cost| cost.parse::<i64>().unwrap())
        .sum();
    let until = Timestamp::from_secs(NOON + DAY + DAY / 2);
    assert_eq!(cost, query::totals(&path, None, Some(until), &[]).unwrap()[0].cost.as_nanos());
    assert_eq!(column(&rows(&out.join("rent-2027-01-15.csv.gz")), "idle"), ["49133332"]);

    // Again a day later: what is there stays, what an interrupted export left does not count.
    let before = fs::read(out.join("calls-2027-01-15.csv.gz")).unwrap();
    fs::write(out.join("calls-2027-01-17.csv.gz.part"), "half of it").unwrap();
    let text = run(&path, &out, &["--since", "2027-01-16", "--until", "2027-01-18"], NOON + 3 * DAY);
    insta::assert_snapshot!(text, @r"
    OUT/calls-2027-01-16.csv.gz: is there already
    OUT/rent-2027-01-16.csv.gz: is there already
    OUT/calls-2027-01-17.csv.gz: 1 rows
    OUT/rent-2027-01-17.csv.gz: 0 rows
    ");
    assert_eq!(names(&out).len(), 6, "{:?}", names(&out));
    let text = run(&path, &out, &["--overwrite", "--until", "2027-01-16"], NOON + 3 * DAY);
    assert!(text.starts_with("OUT/calls-2027-01-15.csv.gz: 2 rows"), "{text}");
    assert_eq!(
        fs::read(out.join("calls-2027-01-15.csv.gz")).unwrap(),
        before,
        "the same rows make the same bytes"
    );
    drop(ledger);
}

#[tokio::test]
async fn a_day_is_not_written_before_its_last_rows_have_come() {
    let directory = tempfile::tempdir().unwrap();
    let (path, out) = (directory.path().join("breakeven.db"), directory.path().join("out"));
    let ledger = open(&path);
    let _batch = ledger.append(&api_call(1, 0));
    assert!(ledger.close().await);
    let midnight = NOON + DAY / 2;
    let text = run(&path, &out, &[], midnight + 119);
    assert!(text.starts_with("no day in the range is over yet") && names(&out).is_empty(), "{text}");
    assert!(run(&path, &out, &[], midnight + 120).starts_with("OUT/calls-2027-01-15.csv.gz: 1 rows"));
}
