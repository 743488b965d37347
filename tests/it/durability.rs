//! What survives: a killed process, a full disk, torn writes.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use breakeven::economics::Timestamp;
use breakeven::ledger::{Ledger, catch_up, query};

use crate::ledger::{api_call, open};

/// Set for the child that [`appender`] becomes.
const CHILD: &str = "BREAKEVEN_TEST_APPEND_TO";

fn ids(path: &Path) -> Vec<u64> {
    let mut ids: Vec<_> =
        query::recent(path, usize::MAX).unwrap().iter().map(|entry| entry.id.as_u64_pair().1).collect();
    ids.sort_unstable();
    ids
}

fn journal(path: &Path) -> PathBuf {
    PathBuf::from(format!("{}.journal", path.display()))
}

/// The journal's segments, the first of which has rows.
fn segments(path: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(journal(path)).unwrap();
    let mut segments: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    segments.retain(|path| path.extension().is_some_and(|extension| extension == "log"));
    segments.sort();
    segments
}

/// Gives a ledger that is not there yet the journal of another.
fn copy_journal(of: &Path, to: &Path) {
    fs::create_dir(journal(to)).unwrap();
    for segment in segments(of) {
        fs::copy(&segment, journal(to).join(segment.file_name().unwrap())).unwrap();
    }
}

/// Not a test of its own: run as a child, it appends and says so until it is killed.
#[test]
fn appender() {
    let Ok(path) = std::env::var(CHILD) else { return };
    let first: u64 = std::env::var("BREAKEVEN_TEST_FIRST_ID").unwrap().parse().unwrap();
    let ledger = open(Path::new(&path));
    let mut acknowledge = std::io::stderr().lock();
    for id in first.. {
        let _batch = ledger.append(&api_call(id, id % 1000));
        writeln!(acknowledge, "{id}").unwrap();
    }
}

/// Runs the appender until it has acknowledged `count` rows, kills it, and returns the last id acknowledged.
fn append_and_kill(path: &Path, first: u64, count: u64) -> u64 {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "durability::appender", "--nocapture"])
        .env(CHILD, path)
        .env("BREAKEVEN_TEST_FIRST_ID", first.to_string())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut acknowledged = first.wrapping_sub(1);
    let mut has_been_killed = false;
    for line in BufReader::new(child.stderr.take().unwrap()).lines() {
        // The last line may be cut; what is not a number of ours is chatter of the test harness.
        let Ok(id) = line.unwrap().parse::<u64>() else { continue };
        if id != acknowledged.wrapping_add(1) {
            break;
        }
        acknowledged = id;
        if !has_been_killed && id + 1 >= first + count {
            child.kill().unwrap();
            has_been_killed = true;
        }
    }
    child.wait().unwrap();
    assert!(has_been_killed, "the child ended by itself");
    acknowledged
}

#[test]
fn every_acknowledged_row_of_a_killed_process_is_there_exactly_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("breakeven.db");
    let seed = fastrand::u64(..);
    let mut random = fastrand::Rng::with_seed(seed);
    let mut last_acknowledged = Vec::new();
    let mut first = 0;
    for _ in 0..50 {
        let count = random.u64(1..4000);
        let acknowledged = append_and_kill(&path, first, count);
        last_acknowledged.push((first, acknowledged));
        first = acknowledged + 1_000_000;
    }
    catch_up(&path, Timestamp::from_secs(1)).unwrap();
    let ids = ids(&path);
    assert!(ids.is_sorted_by(|one, other| one < other), "no row is there twice (seed {seed})");
    for (first, acknowledged) in last_acknowledged {
        let there = ids.iter().filter(|id| (first..=acknowledged).contains(id)).count() as u64;
        assert_eq!(there, acknowledged - first + 1, "rows from {first} on (seed {seed})");
    }
}

#[tokio::test]
async fn a_torn_row_is_skipped_and_counted_and_its_neighbours_survive() {
    let directory = tempfile::tempdir().unwrap();
    // A kill may cut the row that is being written, where that crosses a page. Here the cuts are the test's own.
    let undamaged = (0..20).find_map(|attempt| {
        let [path, whole] =
            ["left", "whole"].map(|name| directory.path().join(format!("{name}{attempt}.db")));
        append_and_kill(&path, 1, 200);
        copy_journal(&path, &whole);
        let ledger = open(&whole);
        (ledger.stats().torn == 0).then_some((path, whole, ledger))
    });
    let (path, whole, whole_ledger) = undamaged.expect("hardly any kill cuts a row");
    let torn = directory.path().join("torn.db");
    copy_journal(&path, &torn);
    let segment = segments(&torn).remove(0);
    let mut bytes = fs::read(&segment).unwrap();
    let end = bytes.iter().rposition(|byte| *byte != 0).unwrap();
    bytes[end / 2] ^= 0x55;
    let cut = b"cut at the very end";
    // The numbers and names at the end of a row may be zeros.
    let start = end + 64;
    bytes.resize(bytes.len().max(start + cut.len()), 0);
    bytes[start..start + cut.len()].copy_from_slice(cut);
    fs::write(&segment, bytes).unwrap();
    let torn_ledger = open(&torn);
    assert_eq!(torn_ledger.stats().torn, 2);
    assert!(whole_ledger.close().await && torn_ledger.close().await);
    let (all, left) = (ids(&whole), ids(&torn));
    assert!(left.iter().all(|id| all.binary_search(id).is_ok()));
    assert_eq!(left.len(), all.len() - 1);
    assert!(open(&torn).close().await);
    assert_eq!(ids(&torn), left, "nothing is imported twice");
}

#[tokio::test]
async fn a_lost_database_takes_on_what_is_left_in_the_journal() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("breakeven.db");
    append_and_kill(&path, 1, 200);
    for suffix in ["", "-wal", "-shm"] {
        fs::remove_file(format!("{}{suffix}", path.display())).unwrap();
    }
    let ledger = open(&path);
    assert!(ledger.stats().committed >= 200);
    drop(ledger);
    assert_eq!(ids(&path)[..200], (1..=200).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_segment_of_another_ledger_is_kept_and_not_imported() {
    let directory = tempfile::tempdir().unwrap();
    let (path, other) = (directory.path().join("breakeven.db"), directory.path().join("other.db"));
    assert!(open(&path).close().await);
    append_and_kill(&other, 1, 10);
    fs::copy(segments(&other).remove(0), journal(&path).join("00000099.log")).unwrap();
    assert!(open(&path).close().await);
    assert_eq!(ids(&path), Vec::<u64>::new());
    assert!(journal(&path).join("00000099.log.foreign").exists());
}

/// A file system of one megabyte, or nothing where none can be mounted.
pub(crate) struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounting wants root: without it, the limit on the size of files (`resilience::disk`) shows the same.
    pub(crate) fn mount_at(folder: &Path) -> Option<Self> {
        let options = ["-t", "tmpfs", "-o", "size=1m", "tmpfs"];
        let mounted = Command::new("mount").args(options).arg(folder).output();
        let refused = match mounted {
            Ok(output) if output.status.success() => return Some(Self(folder.to_owned())),
            Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
            Err(error) => error.to_string(),
        };
        eprintln!(
            "no small disk can be mounted here, so only a limit on the size of files is tested: {refused}"
        );
        None
    }

    fn ballast(&self) -> PathBuf {
        self.0.join("ballast")
    }

    /// Takes all the room there is.
    pub(crate) fn fill(&self) {
        let mut file = fs::File::create(self.ballast()).unwrap();
        while file.write(&[0; 4096]).is_ok_and(|written| written > 0) {}
    }

    pub(crate) fn make_room(&self) {
        fs::remove_file(self.ballast()).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _status = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Fills the disk, and appends rows from number `count` on until the ledger says that it cannot take them; the next number.
fn fill(disk: &SmallDisk, ledger: &Ledger, mut count: u64) -> u64 {
    disk.fill();
    while ledger.is_available() {
        let _batch = ledger.append(&api_call(count, count % 1000));
        count += 1;
        assert!(count < 100_000, "the disk never fills");
    }
    count
}

#[tokio::test]
async fn a_full_disk_makes_the_ledger_unavailable_and_room_makes_it_available_again() {
    let directory = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::mount_at(directory.path()) else { return };
    let path = directory.path().join("breakeven.db");
    let ledger = open(&path);
    let _batch = ledger.append(&api_call(0, 0));
    assert!(ledger.flush().await && ledger.is_available());

    let count = fill(&disk, &ledger, 1);
    assert!(ledger.unavailable_reason().unwrap().contains("journal"));
    assert!(ledger.stats().pending > 0);
    assert_eq!(ledger.stats().unrecorded, 0);

    disk.make_room();
    assert!(ledger.flush().await, "a flush tries again");
    assert!(ledger.is_available());
    assert_eq!(ledger.unavailable_reason(), None);
    drop(ledger);
    assert_eq!(ids(&path), (0..count).collect::<Vec<_>>());
}

#[tokio::test]
async fn rows_that_a_full_disk_does_not_take_until_the_end_are_put_elsewhere_and_can_be_put_back() {
    let directory = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::mount_at(directory.path()) else { return };
    let path = directory.path().join("breakeven.db");
    let ledger = open(&path);
    let mut count = fill(&disk, &ledger, 0);
    for _ in 0..5 {
        let _batch = ledger.append(&api_call(count, count % 1000));
        count += 1;
    }
    assert!(!ledger.flush().await, "not all of it is in the journal");
    let missing = elsewhere.path().join("missing");
    let abandoned = ledger.abandon(elsewhere.path()).unwrap();
    assert!(abandoned.rows > 0 && ledger.stats().unrecorded == abandoned.rows, "{abandoned:?}");
    assert!(abandoned.to_string().contains("rows are not in the ledger"), "{abandoned}");
    assert!(ledger.abandon(&missing).is_none(), "nothing waits any more");
    let _batch = ledger.append(&api_call(count, 1));
    let lost = ledger.abandon(&missing).unwrap();
    assert!(lost.to_string().starts_with("1 row is lost"), "{lost}");
    drop(ledger);

    disk.make_room();
    fs::copy(abandoned.file.unwrap(), abandoned.segment).unwrap();
    assert!(open(&path).close().await);
    assert_eq!(ids(&path), (0..count).collect::<Vec<_>>(), "each row once");
}

#[tokio::test]
async fn a_flush_waits_for_rows_in_memory_until_the_disk_takes_them() {
    let directory = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::mount_at(directory.path()) else { return };
    let path = directory.path().join("breakeven.db");
    let ledger = open(&path);
    let count = fill(&disk, &ledger, 0);
    let (is_flushed, ()) = tokio::join!(ledger.flush(), async { disk.make_room() });
    assert!(is_flushed && ledger.abandon(directory.path()).is_none());
    assert_eq!(ids(&path), (0..count).collect::<Vec<_>>());
}
