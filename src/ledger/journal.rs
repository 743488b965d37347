//! The journal: segment files that every worker appends to, and that the importer empties.
//!
//! An append is one `write` on a file opened with `O_APPEND`: no lock of ours, and the row is in the kernel's
//! hands when it returns, so a killed process loses nothing. Only the importer changes which segment is the
//! current one; a segment it has retired is **sealed** once the last appender that still held it is gone, which
//! the reference count of its `Arc` says (`ArcSwap` pays out all borrowed references on a swap).
//!
//! A write that fails puts its line on a bounded backlog in memory, to be retried, and makes the journal
//! unavailable until the backlog is empty again.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use tracing::{error, info, warn};

use super::LedgerError;

/// Rows that wait in memory while the journal cannot be written; more are counted as unrecorded.
pub(super) const BACKLOG_ROWS: usize = 65_536;

/// Segments that may wait for import (8 MiB each, so 4 GiB): beyond it the journal takes no more.
pub(super) const MAX_SEGMENTS: usize = 512;

/// Segments that may begin after a place for a spare one was named.
const SPARE_NUMBERS: u64 = 100;

/// One segment, shared by those who append, sync and import.
#[derive(Debug)]
pub(super) struct SegmentFile {
    pub(super) number: u64,
    path: PathBuf,
    file: File,
    /// Bytes whose write has returned. It trails the file's length by the writes under way.
    written: AtomicU64,
    synced: AtomicU64,
}

impl SegmentFile {
    fn create(directory: &Path, number: u64, header: &str) -> io::Result<Self> {
        let path = segment_path(directory, number);
        let file = OpenOptions::new().read(true).append(true).create_new(true).open(&path)?;
        let segment = Self { number, path, file, written: AtomicU64::new(0), synced: AtomicU64::new(0) };
        // Left behind half made, it would stand in the way of the next try.
        let made = segment.write(header.as_bytes()).and_then(|()| File::open(directory)?.sync_all());
        made.inspect_err(|_| remove_file(&segment)).map(|()| segment)
    }

    /// A segment that an earlier process left.
    pub(super) fn reopen(path: PathBuf, number: u64) -> io::Result<Self> {
        let file = File::open(&path)?;
        let length = file.metadata()?.len();
        Ok(Self { number, path, file, written: AtomicU64::new(length), synced: AtomicU64::new(length) })
    }

    fn write(&self, line: &[u8]) -> io::Result<()> {
        let count = loop {
            match (&self.file).write(line) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => break result?,
            }
        };
        self.written.fetch_add(count as u64, Ordering::Release);
        if count == line.len() { Ok(()) } else { Err(io::ErrorKind::StorageFull.into()) }
    }

    pub(super) fn written(&self) -> u64 {
        self.written.load(Ordering::Acquire)
    }

    /// Bytes in the file, counted or not.
    pub(super) fn length(&self) -> u64 {
        self.file.metadata().map_or(self.written(), |metadata| metadata.len())
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
            self.synced.fetch_max(written, Ordering::Release);
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
        let segment = SegmentFile::create(&directory, number, &header)
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

    /// Appends one line and returns how many were appended so far, or nothing when it could not be written now.
    pub(super) fn append(&self, line: &[u8]) -> Option<u64> {
        if self.stalled.load(Ordering::Relaxed) {
            self.set_back(line, None);
            return None;
        }
        match self.write(line) {
            Ok(count) => Some(count),
            Err(error) => {
                self.set_back(line, Some(&error));
                None
            }
        }
    }

    fn write(&self, line: &[u8]) -> io::Result<u64> {
        self.current.load().0.write(line)?;
        Ok(self.appended.fetch_add(1, Ordering::AcqRel) + 1)
    }

    fn trouble(&self) -> MutexGuard<'_, Trouble> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_back(&self, line: &[u8], failure: Option<&io::Error>) {
        let mut trouble = self.trouble();
        if let Some(failure) = failure.filter(|_| trouble.write.is_none()) {
            let directory = self.directory.display();
            error!(%failure, "cannot write the journal `{directory}`: free or repair its disk, rows wait in memory");
            trouble.write = Some(format!("cannot write the ledger's journal: {failure}"));
        }
        self.available.store(false, Ordering::SeqCst);
        if trouble.backlog.len() < BACKLOG_ROWS {
            trouble.backlog.push_back(line.into());
        } else if self.unrecorded.fetch_add(1, Ordering::Relaxed) == 0 {
            error!("{BACKLOG_ROWS} rows wait for the journal: further ones are lost, and counted");
        }
    }

    /// Writes what waits in memory, as far as it goes.
    pub(super) fn retry(&self) {
        if self.is_available() || self.stalled.load(Ordering::Relaxed) {
            return;
        }
        let mut trouble = self.trouble();
        while let Some(line) = trouble.backlog.front() {
            if self.write(line).is_err() {
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

    /// Makes a new segment the current one and returns the one before, which appenders may hold yet.
    pub(super) fn rotate(&self) -> io::Result<Arc<Segment>> {
        let number = self.current.load().0.number + 1;
        fs::create_dir_all(&self.directory)?;
        let next = Arc::new(SegmentFile::create(&self.directory, number, &self.header)?);
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
        let file = OpenOptions::new().append(true).open(&path).unwrap();
        let (written, synced) = (AtomicU64::new(0), AtomicU64::new(0));
        journal.current.swap(Arc::new(Segment(Arc::new(SegmentFile {
            number: 9,
            path,
            file,
            written,
            synced,
        }))))
    }

    fn contents(segment: &SegmentFile) -> String {
        fs::read_to_string(segment.path()).unwrap()
    }

    #[test]
    fn lines_that_cannot_be_written_wait_and_follow_when_they_can() {
        let (_directory, journal) = journal();
        assert_eq!(journal.append(b"one\n"), Some(1));
        let good = fill(&journal);
        assert_eq!(journal.append(b"two\n"), None);
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
    fn what_does_not_fit_the_backlog_is_counted_as_unrecorded() {
        let (_directory, journal) = journal();
        fill(&journal);
        for _ in 0..BACKLOG_ROWS + 3 {
            assert_eq!(journal.append(b"x\n"), None);
        }
        assert_eq!((journal.backlog(), journal.unrecorded()), (BACKLOG_ROWS as u64, 3));
    }

    #[test]
    fn a_stalled_journal_takes_nothing_until_the_stall_is_over() {
        let (_directory, journal) = journal();
        journal.set_stalled(Some("too much waits".to_owned()));
        assert_eq!(journal.append(b"one\n"), None);
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
        let mut retired = journal.rotate().unwrap();
        assert!(Arc::get_mut(&mut retired).is_none());
        appender.0.write(b"late\n").unwrap();
        drop(appender);
        assert!(Arc::get_mut(&mut retired).is_some());
        assert_eq!(contents(&retired.0), "header\nlate\n");
        assert_eq!(contents(&journal.current()), HEADER);
    }
}
