//! Moves rows from the journal into the tables, exactly once.
//!
//! Segments are read in order. Each transaction holds the rows of one piece of a segment and the place where it
//! ends; a segment is deleted after a commit that a power cut cannot undo has moved the cursor past it.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tracing::{debug, warn};
use uuid::Uuid;

use super::LedgerError;
use super::database::{Cursor, Database, is_damage, with_suffix};
use super::journal::{self, Journal, Lock, Segment, SegmentFile};
use super::record::{MAX_RECORD, Records};
use crate::economics::Timestamp;

/// Bytes that one transaction takes from the journal: some six hundred rows.
const PIECE_BYTES: usize = 256 * 1024;
const _: () = assert!(PIECE_BYTES > MAX_RECORD, "a piece holds at least one record");

/// The first words of a segment, before the ledger's id.
const FORMAT: &str = "breakeven journal 3 ";
/// Rows as text, and rows with all their numbers, as they were written before.
const EARLIER_FORMATS: [&str; 2] = ["breakeven journal 1 ", "breakeven journal 2 "];

/// What the importer has done since the ledger was opened.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// Rows committed to the tables, those of earlier processes included.
    pub(super) committed: AtomicU64,
    /// Of these, rows that an earlier process left in the journal.
    pub(super) recovered: AtomicU64,
    /// Value of `committed` when it was last looked at.
    pub(super) noted: AtomicU64,
    /// Places in the journal where something stands that is not a whole row.
    pub(super) torn: AtomicU64,
}

#[derive(Debug)]
enum Source {
    /// Nobody appends to it any more.
    Sealed(Arc<SegmentFile>),
    /// Appenders may hold it yet.
    Retired(Arc<Segment>),
    Current(Arc<SegmentFile>),
}

impl Source {
    fn file(&self) -> &Arc<SegmentFile> {
        match self {
            Self::Sealed(file) | Self::Current(file) => file,
            Self::Retired(segment) => &segment.0,
        }
    }

    /// Whether all that will ever be in it is in it.
    fn is_sealed(&mut self) -> bool {
        match self {
            Self::Sealed(_) => true,
            Self::Retired(segment) => Arc::get_mut(segment).is_some(),
            Self::Current(_) => false,
        }
    }
}

#[derive(Debug)]
pub(super) struct Importer {
    database: Database,
    ledger_id: Uuid,
    header: String,
    queue: VecDeque<Source>,
    /// Place in the first source of the queue.
    offset: u64,
    /// Whether nothing but zeros stands before that place.
    ends_in_zeros: bool,
    /// Where the last pass through the current segment ended, if that was before an append that is under way.
    waits_at: Option<u64>,
    /// Two passes have ended at the same place: whatever stands there, it is hardly under way.
    is_stuck: bool,
    piece: Vec<u8>,
    /// What is to follow the current segment, laid out.
    next: Option<SegmentFile>,
    /// Number of the last segment that was to be laid out.
    next_tried: u64,
    counters: Arc<Counters>,
}

/// A ledger whose journal is locked, and empty because all of it has been imported.
#[derive(Debug)]
pub(super) struct Recovered {
    pub(super) importer: Importer,
    pub(super) directory: PathBuf,
    pub(super) lock: Lock,
    pub(super) header: String,
    pub(super) next_segment: u64,
}

pub(super) fn directory(ledger: &Path) -> PathBuf {
    with_suffix(ledger, ".journal")
}

/// Locks the ledger, opens its tables and imports what earlier processes left in the journal.
pub(super) fn recover(
    ledger: &Path,
    now: Timestamp,
    counters: Arc<Counters>,
) -> Result<Recovered, LedgerError> {
    let directory = directory(ledger);
    let lock = journal::lock(&directory, ledger)?;
    let segments = journal::segments(&directory)
        .map_err(|source| LedgerError::Io { path: directory.clone(), source })?;
    let last_segment = segments.last().map_or(0, |segment| segment.number);
    // A new file takes on the journal that is there: it is what a lost or damaged one left.
    let id = segments.iter().find_map(ledger_id_of).unwrap_or_else(Uuid::now_v7);
    let database = Database::open(ledger, now, id)?;
    let (ledger_id, cursor) = (database.ledger_id()?, database.cursor()?);
    let header = header(ledger_id);
    let mut importer = Importer {
        database,
        ledger_id,
        header: header.clone(),
        queue: VecDeque::new(),
        offset: 0,
        ends_in_zeros: false,
        waits_at: None,
        is_stuck: false,
        piece: vec![0; PIECE_BYTES],
        next: None,
        next_tried: 0,
        counters,
    };
    importer.take_up(segments, cursor)?;
    importer.pass()?;
    let counters = &importer.counters;
    counters.recovered.store(counters.committed.load(Ordering::Relaxed), Ordering::Relaxed);
    let next_segment = cursor.segment.max(last_segment) + 1;
    Ok(Recovered { importer, directory, lock, header, next_segment })
}

fn header(ledger_id: Uuid) -> String {
    format!("{FORMAT}{ledger_id}\n")
}

fn ledger_id_of(segment: &SegmentFile) -> Option<Uuid> {
    let mut first = vec![0; header(Uuid::nil()).len()];
    let count = segment.read_at(&mut first, 0).ok()?;
    let line = std::str::from_utf8(&first[..count]).ok()?.strip_suffix('\n')?;
    Uuid::parse_str(line.strip_prefix(FORMAT)?).ok()
}

impl Importer {
    fn take_up(&mut self, segments: Vec<SegmentFile>, cursor: Cursor) -> Result<(), LedgerError> {
        let earlier_headers = EARLIER_FORMATS.map(|format| format!("{format}{}\n", self.ledger_id));
        for segment in segments {
            let is_earlier = earlier_headers.iter().any(|header| segment.belongs_to(header));
            if !segment.belongs_to(&self.header) && !is_earlier {
                journal::disown(&segment);
            } else if segment.number < cursor.segment || segment.end() <= self.header.len() as u64 {
                journal::remove_file(&segment);
            } else if is_earlier {
                return Err(LedgerError::EarlierJournal { path: segment.path().to_owned() });
            } else {
                self.queue.push_back(Source::Sealed(Arc::new(segment)));
            }
        }
        let is_first = self.queue.front().is_some_and(|source| source.file().number == cursor.segment);
        self.offset = if is_first { cursor.offset } else { 0 };
        Ok(())
    }

    /// Follows the segment that a journal has begun to append to.
    pub(super) fn follow(&mut self, journal: &Journal) {
        self.queue.push_back(Source::Current(journal.current()));
    }

    /// Begins a new current segment when the present one is long enough, or cannot be read on before nobody appends.
    pub(super) fn rotate(&mut self, journal: &Journal, segment_bytes: u64) -> std::io::Result<()> {
        let current = journal.current();
        let must = current.end() >= segment_bytes || self.is_stuck;
        if must || (current.is_used_up() && self.next.is_some()) {
            self.retire(journal)?;
        }
        Ok(())
    }

    fn retire(&mut self, journal: &Journal) -> std::io::Result<()> {
        let retired = journal.rotate(self.next.take())?;
        (self.waits_at, self.is_stuck) = (None, false);
        self.queue.pop_back();
        self.queue.push_back(Source::Retired(retired));
        self.follow(journal);
        Ok(())
    }

    /// Lays out the segment that is to follow, when it is time for that. Where there is no room for one it is not tried
    /// again: the next will grow as it is written.
    pub(super) fn lay_out_next(&mut self, journal: &Journal) {
        let number = journal.current().number + 1;
        if self.next_tried == number {
            return;
        }
        if let Some(next) = journal.lay_out_next() {
            self.next_tried = number;
            self.next =
                next.inspect_err(|error| debug!(%error, "cannot lay out a journal segment: {error}")).ok();
        }
    }

    /// Segments that are not wholly imported, or not deleted yet.
    pub(super) fn segments(&self) -> usize {
        self.queue.len()
    }

    /// Imports every row that is complete by now.
    pub(super) fn pass(&mut self) -> Result<(), LedgerError> {
        while let Some(source) = self.queue.front_mut() {
            // Asked first: what is sealed now is complete when it has been read below.
            let sealed = source.is_sealed();
            let end = source.file().end();
            while self.import_piece(end, sealed)? {}
            if !sealed {
                self.note_progress(end);
                break;
            }
            self.finish_first(end)?;
        }
        Ok(())
    }

    fn note_progress(&mut self, end: u64) {
        let is_current = self.queue.len() == 1;
        let waits_at = Some(self.offset).filter(|offset| is_current && *offset < end);
        self.is_stuck = waits_at.is_some() && waits_at == self.waits_at;
        self.waits_at = waits_at;
    }

    /// Ends the current segment as well. Nobody may append any more.
    pub(super) fn close(&mut self) -> Result<(), LedgerError> {
        if let Some(next) = self.next.take() {
            journal::remove_file(&next);
        }
        self.pass()?;
        if let Some(source) = self.queue.back_mut() {
            *source = Source::Sealed(Arc::clone(source.file()));
        }
        self.pass()
    }

    /// Sets a damaged file aside and begins a new one, with all that the journal still has.
    pub(super) fn replace_if_damaged(&mut self, error: &LedgerError, now: Timestamp) {
        let LedgerError::Sqlite { path, source } = error else { return };
        if !is_damage(source) {
            return;
        }
        match self.database.replace(path, now, source, self.ledger_id) {
            Ok(()) => self.offset = 0,
            Err(error) => warn!(%error, "cannot set the damaged ledger aside; trying again"),
        }
    }

    /// The same where somebody else has come upon damage, who may have read a file that was set aside since.
    pub(super) fn replace_if_unsound(&mut self, now: Timestamp) {
        if let Some(error) = self.database.unsoundness() {
            self.replace_if_damaged(&error, now);
        }
    }

    /// One transaction's worth before `end`; false when no whole row is left there. What is no row is passed over when
    /// the segment is sealed; before, it is an append that is under way.
    fn import_piece(&mut self, end: u64, is_sealed: bool) -> Result<bool, LedgerError> {
        let Some(source) = self.queue.front() else { return Ok(false) };
        let file = source.file();
        self.offset = self.offset.max(self.header.len() as u64);
        let wanted = usize::try_from(end.saturating_sub(self.offset)).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
        if wanted == 0 {
            return Ok(false);
        }
        let count = file
            .read_at(&mut self.piece[..wanted], self.offset)
            .map_err(|source| LedgerError::Io { path: file.path().to_owned(), source })?;
        let piece = &self.piece[..count];
        if is_sealed && count > 0 && piece.iter().all(|byte| *byte == 0) {
            // Most of a segment that was laid out and hardly used.
            (self.offset, self.ends_in_zeros) = (self.offset + count as u64, true);
            return Ok(true);
        }
        let mut records = Records::new(piece);
        if !is_sealed {
            records = records.up_to_a_gap();
        }
        let from = Cursor { segment: file.number, offset: self.offset };
        let (rows, cursor) = self.database.insert(&mut records, from)?;
        // Zeros are what was laid out and not used; with rows behind them they are a write that a power cut undid.
        let had_zeros = std::mem::replace(&mut self.ends_in_zeros, records.ends_in_zeros());
        let torn = records.torn() + u64::from(had_zeros && (rows > 0 || records.torn() > 0));
        self.offset = cursor.offset;
        self.counters.committed.fetch_add(rows, Ordering::Relaxed);
        self.count_torn(torn);
        Ok(cursor != from)
    }

    fn finish_first(&mut self, end: u64) -> Result<(), LedgerError> {
        let Some(source) = self.queue.front() else { return Ok(()) };
        let file = Arc::clone(source.file());
        self.database.pass(Cursor { segment: file.number + 1, offset: 0 })?;
        self.count_torn(u64::from(self.offset < end));
        self.queue.pop_front();
        (self.offset, self.ends_in_zeros) = (0, false);
        file.forget();
        journal::remove_file(&file);
        Ok(())
    }

    fn count_torn(&self, torn: u64) {
        if torn > 0 {
            warn!("skipped {torn} torn rows of the journal: a write was cut there");
            self.counters.torn.fetch_add(torn, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use rusqlite::ffi;

    use super::*;
    use crate::ledger::journal::Batch;
    use crate::ledger::testing::entry;
    use crate::ledger::{Entry, query, record};

    const NOW: Timestamp = Timestamp::from_secs(5);

    fn append_one(journal: &Journal, entry: &Entry<'_>) {
        let mut batch = Batch::new();
        batch.add(|record| record::write_call(record, entry));
        journal.append(&batch).unwrap();
    }

    fn append(journal: &Journal, ids: std::ops::Range<u64>) {
        for id in ids {
            append_one(journal, &entry(id));
        }
    }

    fn start(ledger: &Path) -> (Importer, Journal) {
        let Recovered { mut importer, directory, lock, header, next_segment } =
            recover(ledger, NOW, Arc::default()).unwrap();
        let journal = Journal::start(directory, lock, header, next_segment).unwrap();
        importer.follow(&journal);
        (importer, journal)
    }

    fn ids(ledger: &Path) -> Vec<u64> {
        let mut entries = query::recent(ledger, 1000).unwrap();
        entries.reverse();
        entries.iter().map(|entry| entry.id.as_u64_pair().0).collect()
    }

    #[test]
    fn an_import_that_stops_anywhere_goes_on_where_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let ledger = directory.path().join("breakeven.db");
        for round in 0..3 {
            let (mut importer, journal) = start(&ledger);
            let first = round * 30 + 1;
            append(&journal, first..first + 10);
            importer.pass().unwrap();
            importer.rotate(&journal, 1).unwrap();
            append(&journal, first + 10..first + 20);
            importer.pass().unwrap();
            append(&journal, first + 20..first + 30);
        }
        drop(start(&ledger));
        assert_eq!(ids(&ledger), (1..91).collect::<Vec<_>>());
    }

    #[test]
    fn rows_that_are_inserted_together_keep_what_is_their_own() {
        let directory = tempfile::tempdir().unwrap();
        let ledger = directory.path().join("breakeven.db");
        let (mut importer, journal) = start(&ledger);
        let entries = |count: u64| {
            (1..=count).map(|id| {
                let mut entry = entry(id);
                if id % 3 == 0 {
                    (entry.tags, entry.first_token_at) = (format!("n={id}").into(), None);
                }
                if id % 5 == 0 {
                    (entry.tags, entry.team, entry.api_cost) = ("".into(), format!("team {id}").into(), None);
                }
                entry
            })
        };
        for entry in entries(45) {
            append_one(&journal, &entry);
            if entry.id.as_u64_pair().0.is_multiple_of(20) {
                importer.pass().unwrap();
            }
        }
        importer.pass().unwrap();
        let mut found = query::recent(&ledger, 100).unwrap();
        found.reverse();
        assert_eq!(found, entries(45).collect::<Vec<_>>());
    }

    #[test]
    fn a_file_that_is_damaged_while_in_use_is_replaced_from_the_journal() {
        let directory = tempfile::tempdir().unwrap();
        let ledger = directory.path().join("breakeven.db");
        let (mut importer, journal) = start(&ledger);
        append(&journal, 1..11);
        importer.pass().unwrap();
        let source = rusqlite::Error::SqliteFailure(ffi::Error::new(ffi::SQLITE_CORRUPT), None);
        importer.replace_if_damaged(&LedgerError::Sqlite { path: ledger.clone(), source }, NOW);
        append(&journal, 11..21);
        importer.pass().unwrap();
        assert_eq!(ids(&ledger), (1..21).collect::<Vec<_>>());
        assert_eq!(ids(&directory.path().join("breakeven.db.damaged-5000")), (1..11).collect::<Vec<_>>());
    }

    #[test]
    fn other_failures_leave_the_file_where_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let ledger = directory.path().join("breakeven.db");
        let (mut importer, _journal) = start(&ledger);
        let source = rusqlite::Error::SqliteFailure(ffi::Error::new(ffi::SQLITE_FULL), None);
        importer.replace_if_damaged(&LedgerError::Sqlite { path: ledger.clone(), source }, NOW);
        assert!(!directory.path().join("breakeven.db.damaged-5000").exists());
    }

    #[test]
    fn blocks_that_a_power_cut_left_empty_are_skipped_and_counted() {
        let directory = tempfile::tempdir().unwrap();
        let ledger = directory.path().join("breakeven.db");
        let (mut importer, journal) = start(&ledger);
        append(&journal, 1..2);
        let mut empty = Batch::new();
        empty.add(|record| record.resize(PIECE_BYTES * 2, 0));
        journal.append(&empty).unwrap();
        append(&journal, 2..3);
        importer.pass().unwrap();
        assert_eq!(ids(&ledger), [1], "what follows may be on its way");
        importer.close().unwrap();
        assert_eq!(ids(&ledger), [1, 2]);
        assert!(importer.counters.torn.load(Ordering::Relaxed) > 0);
    }

    #[test]
    fn what_stands_behind_a_place_that_is_never_written_is_imported_all_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let ledger = directory.path().join("breakeven.db");
        let (mut importer, journal) = start(&ledger);
        append(&journal, 1..3);
        journal.current().reserve(100);
        append(&journal, 3..5);
        for _ in 0..2 {
            importer.rotate(&journal, u64::MAX).unwrap();
            importer.pass().unwrap();
            assert_eq!((ids(&ledger).as_slice(), journal.current().number), (&[1, 2][..], 1));
        }
        importer.rotate(&journal, u64::MAX).unwrap();
        append(&journal, 5..7);
        importer.rotate(&journal, u64::MAX).unwrap();
        importer.pass().unwrap();
        assert_eq!((ids(&ledger).as_slice(), journal.current().number), (&[1, 2, 3, 4, 5, 6][..], 2));
        assert_eq!(importer.counters.torn.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_segment_that_is_laid_out_follows_when_its_time_has_come_and_its_unused_end_is_no_loss() {
        let directory = tempfile::tempdir().unwrap();
        let ledger = directory.path().join("breakeven.db");
        let (mut importer, journal) = start(&ledger);
        let size = |number: u64| {
            let path = super::directory(&ledger).join(format!("{number:08}.log"));
            std::fs::metadata(path).map(|metadata| metadata.len()).ok()
        };
        importer.lay_out_next(&journal);
        assert_eq!(size(2), None, "nothing has been appended");
        append(&journal, 1..11);
        importer.lay_out_next(&journal);
        assert_eq!(size(2), Some(256 * 1024));
        importer.rotate(&journal, u64::MAX).unwrap();
        assert_eq!(journal.current().number, 2, "the first one was not laid out");
        append(&journal, 11..761);
        importer.pass().unwrap();
        assert_eq!(size(1), None, "it is imported");
        importer.lay_out_next(&journal);
        assert_eq!(size(3), Some(1024 * 1024), "half of the second is used");
        importer.rotate(&journal, u64::MAX).unwrap();
        assert_eq!(journal.current().number, 3, "three quarters are");
        append(&journal, 761..771);
        // As a process that is killed leaves it.
        drop((importer, journal));
        let (mut importer, journal) = start(&ledger);
        assert_eq!(ids(&ledger), (1..771).collect::<Vec<_>>());
        assert_eq!(importer.counters.torn.load(Ordering::Relaxed), 0);
        append(&journal, 771..781);
        importer.lay_out_next(&journal);
        importer.close().unwrap();
        assert_eq!(ids(&ledger), (1..781).collect::<Vec<_>>());
        assert_eq!(importer.counters.torn.load(Ordering::Relaxed), 0);
        assert!(journal::segments(&super::directory(&ledger)).unwrap().is_empty());
    }
}
