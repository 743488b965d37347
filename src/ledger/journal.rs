//! The journal: segment files that every worker appends to, and that the importer empties.
//!
//! An append takes its place from a counter and is one `write` there: no lock of ours, and its rows are in the
//! kernel's hands when it returns, so a killed process loses none of them. Only the importer changes which segment is
//! the current one; a segment it has retired is **sealed** once the last appender that still held it is gone, which
//! the reference count of its `Arc` says (`ArcSwap` pays out all borrowed references on a swap).
//!
//! Segments are **laid out**: written with zeros and synced before they are appended to. An append and a sync then
//! change nothing in the file system but the bytes, so that no append waits for the file system's own log, as one that
//! makes a file longer would while a slow disk syncs. Where that is not possible a segment grows as any file does.
//!
//! A write that fails puts its rows on a bounded backlog in memory, to be retried, and makes the journal
//! unavailable until the backlog is empty again.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use tracing::{error, info, warn};

use super::{LedgerError, sync_name};

/// Rows that wait in memory while the journal cannot be written; more are counted as unrecorded.
pub(super) const BACKLOG_ROWS: usize = 65_536;

/// Segments that may wait for import (8 MiB each, so 4 GiB): beyond it the journal takes no more.
pub(super) const MAX_SEGMENTS: usize = 512;

/// Segments that may begin after a place for a spare one was named.
const SPARE_NUMBERS: u64 = 100;

/// Size of the first segment that is laid out; each one after it has four times that, up to [`SEGMENT_BYTES`].
const FIRST_LAID_OUT: u64 = 256 * 1024;

/// A segment is laid out only where there is room for so many of its size: on a disk that is nearly full, rows need it.
const ROOM_FOR: u64 = 4;

/// Size at which a segment is followed by the next.
pub(super) const SEGMENT_BYTES: u64 = 8 * 1024 * 1024;

/// One segment, shared by those who append, sync and import.
#[derive(Debug)]
pub(super) struct SegmentFile {
    pub(super) number: u64,
    path: PathBuf,
    file: File,
    /// Bytes that were written in advance.
    laid_out: u64,
    /// Where the next append begins.
    end: AtomicU64,
    /// Bytes whose write has returned.
    written: AtomicU64,
    synced: AtomicU64,
    /// Whether its name survives a power cut.
    is_named: AtomicBool,
}

impl SegmentFile {
    fn new(number: u64, path: PathBuf, file: File, laid_out: u64, end: u64) -> Self {
        Self {
            number,
            path,
            file,
            laid_out,
            end: AtomicU64::new(end),
            written: AtomicU64::new(end),
            synced: AtomicU64::new(0),
            is_named: AtomicBool::new(false),
        }
    }

    /// Makes a segment that is to be appended to, with so many bytes laid out. Its name survives a power cut if any are,
    /// else when it is first synced: who makes one that is needed at once does not wait for the disk.
    fn create(directory: &Path, number: u64, header: &str, laid_out: u64) -> io::Result<Self> {
        let path = segment_path(directory, number);
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
        let segment = Self::new(number, path, file, laid_out, header.len() as u64);
        let made = segment.file.write_all_at(header.as_bytes(), 0).and_then(|()| {
            if laid_out == 0 {
                return Ok(());
            }
            lay_out(&segment.file, header.len() as u64, laid_out)?;
            segment.sync_name()
        });
        // Left behind half made, it would stand in the way of the next try.
        made.inspect_err(|_| remove_file(&segment)).map(|()| segment)
    }

    /// A segment that an earlier process left.
    pub(super) fn reopen(path: PathBuf, number: u64) -> io::Result<Self> {
        let file = File::open(&path)?;
        let length = file.metadata()?.len();
        Ok(Self::new(number, path, file, 0, length))
    }

    /// Takes a place of so many bytes, and returns where it begins.
    pub(super) fn reserve(&self, length: u64) -> u64 {
        self.end.fetch_add(length, Ordering::AcqRel)
    }

    /// Writes a batch, as far as the disk takes it at once. Returns how many of its records are whole in the file and,
    /// unless these are all, what was wrong.
    fn write(&self, batch: &Batch) -> (usize, Option<io::Error>) {
        let length = batch.bytes.len() as u64;
        let at = self.reserve(length);
        let result = loop {
            match self.file.write_at(&batch.bytes, at) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => break result,
            }
        };
        let count = *result.as_ref().unwrap_or(&0);
        self.written.fetch_add(count as u64, Ordering::Release);
        if count == batch.bytes.len() {
            return (batch.rows(), None);
        }
        let whole = batch.whole_within(count);
        let end = at + batch.ends[..whole].last().map_or(0, |end| *end as u64);
        // The place of the others is given back. Where somebody has taken the one behind it there is a gap, which the
        // importer passes over when nobody appends any more.
        self.end.compare_exchange(at + length, end, Ordering::AcqRel, Ordering::Relaxed).ok();
        (whole, Some(result.err().unwrap_or_else(|| io::ErrorKind::StorageFull.into())))
    }

    fn written(&self) -> u64 {
        self.written.load(Ordering::Acquire)
    }

    /// Where its last append ends, which may be under way; of a segment that an earlier process left, where the file
    /// does.
    pub(super) fn end(&self) -> u64 {
        self.end.load(Ordering::Acquire)
    }

    /// Whether the next one should be laid out by now. One to which nothing is appended has no successor.
    fn wants_successor(&self, header: &str) -> bool {
        self.end() >= self.laid_out / 2 && self.end() > header.len() as u64
    }

    /// Whether one that is laid out should follow it.
    pub(super) fn is_used_up(&self) -> bool {
        self.end() >= self.laid_out / 4 * 3
    }

    pub(super) fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.file.read_at(&mut buffer[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(filled)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Notes that its rows are safe elsewhere, so that it need not be synced.
    pub(super) fn forget(&self) {
        self.synced.fetch_max(u64::MAX, Ordering::Release);
    }

    fn is_forgotten(&self) -> bool {
        self.synced.load(Ordering::Acquire) == u64::MAX
    }

    fn sync(&self) -> io::Result<()> {
        let written = self.written();
        if self.synced.load(Ordering::Acquire) < written {
            self.file.sync_data()?;
            self.sync_name()?;
            self.synced.fetch_max(written, Ordering::Release);
        }
        Ok(())
    }

    fn sync_name(&self) -> io::Result<()> {
        if !self.is_named.load(Ordering::Acquire) {
            sync_name(&self.path)?;
            self.is_named.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// The first line: which ledger the segment belongs to.
    pub(super) fn belongs_to(&self, header: &str) -> bool {
        let mut first = vec![0; header.len()];
        let count = self.read_at(&mut first, 0).unwrap_or(0);
        // A header that was cut by a power failure has no rows after it.
        header.as_bytes().starts_with(&first[..count])
    }
}

/// Fills a file with zeros from `start` to `end`, and makes them survive a power cut.
fn lay_out(file: &File, start: u64, end: u64) -> io::Result<()> {
    const ZEROS: &[u8] = &[0; 64 * 1024];
    let mut at = start;
    while at < end {
        let count = usize::try_from(end - at).unwrap_or(usize::MAX).min(ZEROS.len());
        file.write_all_at(&ZEROS[..count], at)?;
        at += count as u64;
    }
    file.sync_all()
}

/// Bytes that the disk of a directory can take.
fn room(directory: &Path) -> io::Result<u64> {
    let disk = rustix::fs::statvfs(directory)?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}

fn segment_path(directory: &Path, number: u64) -> PathBuf {
    directory.join(format!("{number:08}.log"))
}

/// Held by appenders for the length of a write; see the module's documentation.
#[derive(Debug)]
pub(super) struct Segment(pub(super) Arc<SegmentFile>);

#[derive(Debug)]
pub(super) struct Journal {
    directory: PathBuf,
    header: String,
    current: ArcSwap<Segment>,
    /// Segments that may hold unsynced bytes.
    unsynced: Mutex<Vec<Arc<SegmentFile>>>,
    appended: AtomicU64,
    unrecorded: AtomicU64,
    available: AtomicBool,
    stalled: AtomicBool,
    trouble: Mutex<Trouble>,
    /// Keeps other processes out as long as it is open.
    _lock: Lock,
}

/// Records one behind the other, which one `write` appends.
#[derive(Debug, Default)]
pub(super) struct Batch {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Batch {
    pub(super) const fn new() -> Self {
        Self { bytes: Vec::new(), ends: Vec::new() }
    }

    /// Adds a record, which `write` puts behind what is there.
    pub(super) fn add(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        write(&mut self.bytes);
        self.ends.push(self.bytes.len());
    }

    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.ends.clear();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Number of its records.
    pub(super) fn rows(&self) -> usize {
        self.ends.len()
    }

    /// Bytes of all of them.
    pub(super) fn bytes(&self) -> usize {
        self.bytes.len()
    }

    fn records(&self) -> impl Iterator<Item = &[u8]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, end)| &self.bytes[start..*end])
    }

    /// Records of which the first `count` bytes hold all.
    fn whole_within(&self, count: usize) -> usize {
        self.ends.partition_point(|end| *end <= count)
    }
}

#[derive(Debug, Default)]
struct Trouble {
    backlog: VecDeque<Box<[u8]>>,
    write: Option<String>,
    sync: Option<String>,
    stall: Option<String>,
}

impl Trouble {
    fn is_over(&self) -> bool {
        self.backlog.is_empty() && self.reason().is_none()
    }

    fn reason(&self) -> Option<&String> {
        self.write.as_ref().or(self.sync.as_ref()).or(self.stall.as_ref())
    }
}

/// Keeps other processes from a ledger. Given back explicitly: a child that was forked and has not called
/// `exec` yet still shares the file, and would keep the lock otherwise.
#[derive(Debug)]
pub(super) struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        if let Err(error) = self.0.unlock() {
            warn!(%error, "cannot give back the lock of the ledger");
        }
    }
}

/// Takes the lock of a journal's directory, which is made if it is not there.
pub(super) fn lock(directory: &Path, ledger: &Path) -> Result<Lock, LedgerError> {
    let io = |source| LedgerError::Io { path: directory.to_owned(), source };
    fs::create_dir_all(directory).map_err(io)?;
    let lock = OpenOptions::new()
        .create(true)
        .append(true)
        .open(directory.join("lock"))
        .map_err(|source| LedgerError::Io { path: directory.join("lock"), source })?;
    match lock.try_lock() {
        Ok(()) => Ok(Lock(lock)),
        Err(fs::TryLockError::WouldBlock) => Err(LedgerError::InUse { path: ledger.to_owned() }),
        Err(fs::TryLockError::Error(source)) => Err(io(source)),
    }
}

/// The segments in a directory, oldest first.
pub(super) fn segments(directory: &Path) -> io::Result<Vec<SegmentFile>> {
    let mut found = Vec::new();
    for file in fs::read_dir(directory)? {
        let path = file?.path();
        let is_segment = path.extension().is_some_and(|extension| extension == "log");
        let number = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok());
        if let (true, Some(number)) = (is_segment, number) {
            found.push(SegmentFile::reopen(path, number)?);
        }
    }
    found.sort_by_key(|segment| segment.number);
    Ok(found)
}

impl Journal {
    /// Opens a fresh segment `number` to append to.
    pub(super) fn start(
        directory: PathBuf,
        lock: Lock,
        header: String,
        number: u64,
    ) -> Result<Self, LedgerError> {
        let segment = SegmentFile::create(&directory, number, &header, 0)
            .map_err(|source| LedgerError::Io { path: directory.clone(), source })?;
        let segment = Arc::new(segment);
        Ok(Self {
            directory,
            header,
            unsynced: Mutex::new(vec![Arc::clone(&segment)]),
            current: ArcSwap::from_pointee(Segment(segment)),
            appended: AtomicU64::new(0),
            unrecorded: AtomicU64::new(0),
            available: AtomicBool::new(true),
            stalled: AtomicBool::new(false),
            trouble: Mutex::default(),
            _lock: lock,
        })
    }

    /// Appends a batch and returns how many records were appended so far. Those that cannot be written now wait in
    /// memory; nothing is returned then.
    pub(super) fn append(&self, batch: &Batch) -> Option<u64> {
        if self.stalled.load(Ordering::Relaxed) {
            self.set_back(batch.records(), None);
            return None;
        }
        let (whole, appended, failure) = self.write(batch);
        let Some(error) = failure else { return Some(appended) };
        self.set_back(batch.records().skip(whole), Some(&error));
        None
    }

    /// Records of the batch that were written, those that were appended so far, and what was wrong.
    fn write(&self, batch: &Batch) -> (usize, u64, Option<io::Error>) {
        let (whole, failure) = self.current.load().0.write(batch);
        let appended = self.appended.fetch_add(whole as u64, Ordering::AcqRel) + whole as u64;
        (whole, appended, failure)
    }

    fn trouble(&self) -> MutexGuard<'_, Trouble> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_back<'a>(&self, records: impl Iterator<Item = &'a [u8]>, failure: Option<&io::Error>) {
        let mut trouble = self.trouble();
        if let Some(failure) = failure.filter(|_| trouble.write.is_none()) {
            let directory = self.directory.display();
            error!(%failure, "cannot write the journal `{directory}`: free or repair its disk, rows wait in memory");
            trouble.write = Some(format!("cannot write the ledger's journal: {failure}"));
        }
        self.available.store(false, Ordering::SeqCst);
        for record in records {
            if trouble.backlog.len() < BACKLOG_ROWS {
                trouble.backlog.push_back(record.into());
            } else if self.unrecorded.fetch_add(1, Ordering::Relaxed) == 0 {
                error!("{BACKLOG_ROWS} rows wait for the journal: further ones are lost, and counted");
            }
        }
    }

    /// Writes what waits in memory, as far as it goes.
    pub(super) fn retry(&self) {
        if self.is_available() || self.stalled.load(Ordering::Relaxed) {
            return;
        }
        let mut trouble = self.trouble();
        let mut batch = Batch::new();
        while let Some(record) = trouble.backlog.front() {
            batch.clear();
            batch.add(|bytes| bytes.extend_from_slice(record));
            if let (_, _, Some(_)) = self.write(&batch) {
                return;
            }
            trouble.backlog.pop_front();
        }
        if trouble.write.take().is_some() {
            info!("the journal can be written again, and nothing waits in memory");
        }
        self.available.store(trouble.is_over(), Ordering::SeqCst);
    }

    /// Takes what waits in memory, which is never written then, and counts it as unrecorded.
    pub(super) fn abandon(&self) -> Vec<Box<[u8]>> {
        let lines = Vec::from(std::mem::take(&mut self.trouble().backlog));
        self.unrecorded.fetch_add(lines.len() as u64, Ordering::Relaxed);
        lines
    }

    /// The first line of every segment.
    pub(super) fn header(&self) -> &str {
        &self.header
    }

    /// A place for one more segment, which comes after all that this process makes.
    pub(super) fn spare_segment(&self) -> PathBuf {
        segment_path(&self.directory, self.current().number + SPARE_NUMBERS)
    }

    /// Makes everything appended so far survive a power cut, and returns how much that was. While that fails
    /// the journal is unavailable: a disk that cannot be synced is not to be trusted with more.
    pub(super) fn sync(&self) -> Option<u64> {
        let appended = self.appended.load(Ordering::Acquire);
        let segments = {
            let mut segments = self.unsynced.lock().unwrap_or_else(PoisonError::into_inner);
            segments.retain(|segment| !segment.is_forgotten());
            segments.clone()
        };
        let synced = segments.iter().try_for_each(|segment| segment.sync());
        self.note_sync(synced.as_ref().err());
        synced.is_ok().then_some(appended)
    }

    fn note_sync(&self, failure: Option<&io::Error>) {
        if failure.is_none() && self.is_available() {
            return;
        }
        let mut trouble = self.trouble();
        if failure.is_some() == trouble.sync.is_some() {
            return;
        }
        trouble.sync = failure.map(|failure| {
            let directory = self.directory.display();
            error!(%failure, "cannot sync the journal `{directory}`: rows survive a crash, not a power cut");
            format!("cannot sync the ledger's journal: {failure}")
        });
        self.available.store(trouble.is_over(), Ordering::SeqCst);
    }

    /// Lays out the segment that is to follow the current one, when it is time for that.
    pub(super) fn lay_out_next(&self) -> Option<io::Result<SegmentFile>> {
        let current = self.current();
        let size = (current.laid_out * 4).clamp(FIRST_LAID_OUT, SEGMENT_BYTES);
        let create = || match room(&self.directory)? {
            room if room < size * ROOM_FOR => Err(io::ErrorKind::StorageFull.into()),
            _ => SegmentFile::create(&self.directory, current.number + 1, &self.header, size),
        };
        current.wants_successor(&self.header).then(create)
    }

    /// Makes `next`, or a new segment that is not laid out, the current one. Returns the one before, which appenders may
    /// hold yet.
    pub(super) fn rotate(&self, next: Option<SegmentFile>) -> io::Result<Arc<Segment>> {
        let create = || {
            fs::create_dir_all(&self.directory)?;
            SegmentFile::create(&self.directory, self.current().number + 1, &self.header, 0)
        };
        let next = Arc::new(next.map_or_else(create, Ok)?);
        self.unsynced.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&next));
        Ok(self.current.swap(Arc::new(Segment(next))))
    }

    pub(super) fn current(&self) -> Arc<SegmentFile> {
        Arc::clone(&self.current.load().0)
    }

    /// Says whether so much waits for import that nothing more may be appended.
    pub(super) fn set_stalled(&self, reason: Option<String>) {
        let stalled = reason.is_some();
        if self.stalled.load(Ordering::Relaxed) == stalled {
            return;
        }
        if let Some(reason) = &reason {
            error!("the journal takes no more rows: {reason}");
        }
        let mut trouble = self.trouble();
        trouble.stall = reason;
        self.stalled.store(stalled, Ordering::SeqCst);
        self.available.store(trouble.is_over(), Ordering::SeqCst);
    }

    pub(super) fn is_available(&self) -> bool {
        self.available.load(Ordering::Relaxed)
    }

    pub(super) fn unavailable_reason(&self) -> Option<String> {
        self.trouble().reason().cloned()
    }

    pub(super) fn appended(&self) -> u64 {
        self.appended.load(Ordering::Acquire)
    }

    pub(super) fn unrecorded(&self) -> u64 {
        self.unrecorded.load(Ordering::Relaxed)
    }

    pub(super) fn backlog(&self) -> u64 {
        self.trouble().backlog.len() as u64
    }
}

pub(super) fn remove_file(segment: &SegmentFile) {
    if let Err(error) = fs::remove_file(&segment.path) {
        warn!(%error, "cannot delete the imported journal segment `{}`", segment.path.display());
    }
}

/// Puts a segment of another ledger out of the way without touching what is in it.
pub(super) fn disown(segment: &SegmentFile) {
    let to = segment.path.with_extension("log.foreign");
    warn!(
        "the journal segment `{}` belongs to another ledger: kept as `{}`, not imported",
        segment.path.display(),
        to.display()
    );
    if let Err(error) = fs::rename(&segment.path, &to) {
        warn!(%error, "cannot rename `{}`", segment.path.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = "header\n";

    fn journal() -> (tempfile::TempDir, Journal) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("breakeven.db.journal");
        let lock = lock(&path, Path::new("breakeven.db")).unwrap();
        let journal = Journal::start(path, lock, HEADER.to_owned(), 1).unwrap();
        (directory, journal)
    }

    /// Replaces the current segment by one that is as full as a device can be.
    fn fill(journal: &Journal) -> Arc<Segment> {
        let path = PathBuf::from("/dev/full");
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        journal.current.swap(Arc::new(Segment(Arc::new(SegmentFile::new(9, path, file, 0, 0)))))
    }

    fn batch(records: &[&str]) -> Batch {
        let mut batch = Batch::new();
        for record in records {
            batch.add(|bytes| bytes.extend_from_slice(record.as_bytes()));
        }
        batch
    }

    fn contents(segment: &SegmentFile) -> String {
        fs::read_to_string(segment.path()).unwrap()
    }

    #[test]
    fn lines_that_cannot_be_written_wait_and_follow_when_they_can() {
        let (_directory, journal) = journal();
        assert_eq!(journal.append(&batch(&["one\n"])), Some(1));
        let good = fill(&journal);
        assert_eq!(journal.append(&batch(&["two\n"])), None);
        assert!(!journal.is_available());
        assert!(journal.unavailable_reason().unwrap().contains("cannot write"));
        journal.retry();
        assert_eq!((journal.is_available(), journal.backlog(), journal.unrecorded()), (false, 1, 0));
        journal.current.store(good);
        journal.retry();
        assert_eq!((journal.is_available(), journal.backlog(), journal.appended()), (true, 0, 2));
        assert_eq!(journal.unavailable_reason(), None);
        assert_eq!(contents(&journal.current()), "header\none\ntwo\n");
    }

    #[test]
    fn of_a_batch_that_was_cut_only_what_is_not_whole_is_written_again() {
        let batch = batch(&["one\n", "three\n", "two\n"]);
        assert_eq!((batch.rows(), batch.bytes()), (3, 14));
        let whole = [0, 3, 4, 9, 10, 13, 14].map(|count| batch.whole_within(count));
        assert_eq!(whole, [0, 0, 1, 1, 2, 2, 3]);
        assert_eq!(batch.records().skip(1).collect::<Vec<_>>(), [&b"three\n"[..], b"two\n"]);
        let (_directory, journal) = journal();
        let good = fill(&journal);
        assert_eq!(journal.append(&batch), None);
        assert_eq!((journal.backlog(), journal.appended()), (3, 0));
        journal.current.store(good);
        journal.retry();
        assert_eq!((journal.backlog(), journal.appended()), (0, 3));
        assert_eq!(contents(&journal.current()), "header\none\nthree\ntwo\n");
    }

    #[test]
    fn a_place_that_the_disk_did_not_take_is_given_back() {
        let (_directory, journal) = journal();
        fill(&journal);
        for _ in 0..3 {
            assert_eq!(journal.append(&batch(&["one\n", "two\n"])), None);
            assert_eq!(journal.current().end(), 0);
        }
    }

    #[test]
    fn what_does_not_fit_the_backlog_is_counted_as_unrecorded() {
        let (_directory, journal) = journal();
        fill(&journal);
        for _ in 0..BACKLOG_ROWS + 3 {
            assert_eq!(journal.append(&batch(&["x\n"])), None);
        }
        assert_eq!((journal.backlog(), journal.unrecorded()), (BACKLOG_ROWS as u64, 3));
    }

    #[test]
    fn a_stalled_journal_takes_nothing_until_the_stall_is_over() {
        let (_directory, journal) = journal();
        journal.set_stalled(Some("too much waits".to_owned()));
        assert_eq!(journal.append(&batch(&["one\n"])), None);
        journal.retry();
        assert_eq!((journal.is_available(), journal.backlog()), (false, 1));
        assert_eq!(journal.unavailable_reason().as_deref(), Some("too much waits"));
        journal.set_stalled(None);
        assert!(!journal.is_available(), "a row waits yet");
        journal.retry();
        assert!(journal.is_available());
        assert_eq!(contents(&journal.current()), "header\none\n");
    }

    #[test]
    fn a_failed_sync_makes_the_journal_unavailable_until_one_succeeds() {
        let (_directory, journal) = journal();
        journal.note_sync(Some(&io::Error::other("the cable is out")));
        assert!(!journal.is_available());
        assert!(journal.unavailable_reason().unwrap().contains("the cable is out"));
        assert_eq!(journal.sync(), Some(0));
        assert!(journal.is_available());
    }

    #[test]
    fn a_segment_is_not_sealed_while_an_appender_holds_it() {
        let (_directory, journal) = journal();
        let appender = journal.current.load();
        let mut retired = journal.rotate(None).unwrap();
        assert!(Arc::get_mut(&mut retired).is_none());
        assert!(appender.0.write(&batch(&["late\n"])).1.is_none());
        drop(appender);
        assert!(Arc::get_mut(&mut retired).is_some());
        assert_eq!(contents(&retired.0), "header\nlate\n");
        assert_eq!(contents(&journal.current()), HEADER);
    }

    #[test]
    fn a_segment_that_is_needed_at_once_is_synced_into_its_directory_with_its_first_rows() {
        let directory = tempfile::tempdir().unwrap();
        let needed = SegmentFile::create(directory.path(), 1, HEADER, 0).unwrap();
        assert!(!needed.is_named.load(Ordering::Acquire));
        needed.sync().unwrap();
        assert!(needed.is_named.load(Ordering::Acquire));
        let laid_out = SegmentFile::create(directory.path(), 2, HEADER, FIRST_LAID_OUT).unwrap();
        assert!(laid_out.is_named.load(Ordering::Acquire));
        // Where the name cannot be synced, what is in the file is not said to be.
        let lost = SegmentFile::create(directory.path(), 3, HEADER, 0).unwrap();
        drop(directory);
        lost.sync().unwrap_err();
        assert_eq!(lost.synced.load(Ordering::Acquire), 0);
    }
}
