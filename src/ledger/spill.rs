//! The last resort of rows in memory: when the journal's disk takes nothing until the end of the process, they go into
//! a file elsewhere, which is a segment of the journal in all but its place.

use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use super::journal::Journal;
use crate::economics::Timestamp;

/// What became of rows that never reached the journal.
#[derive(Debug)]
pub struct Abandoned {
    pub rows: u64,
    /// Where they are, if anywhere.
    pub file: Result<PathBuf, io::Error>,
    /// Where the next start would find them.
    pub segment: PathBuf,
}

impl fmt::Display for Abandoned {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows_are = if self.rows == 1 { "row is" } else { "rows are" };
        match &self.file {
            Ok(file) => write!(
                out,
                "{} {rows_are} not in the ledger, whose disk takes none, but in `{}`: make room and move that file to \
                 `{}` before the next start",
                self.rows,
                file.display(),
                self.segment.display()
            ),
            Err(error) => write!(
                out,
                "{} {rows_are} lost: the ledger's disk takes none, and the temporary folder does not either: {error}",
                self.rows
            ),
        }
    }
}

/// Takes what waits in memory out of the journal and writes it into `folder`. None when nothing waits.
pub(super) fn spill(journal: &Journal, folder: &Path, now: Timestamp) -> Option<Abandoned> {
    let lines = journal.abandon();
    if lines.is_empty() {
        return None;
    }
    let name = format!("breakeven-rows-{}-{}.log", std::process::id(), now.as_millis());
    let path = folder.join(name);
    let file = write(&path, journal.header(), &lines).map(|()| path);
    Some(Abandoned { rows: lines.len() as u64, file, segment: journal.spare_segment() })
}

/// Never through a link or into a file that somebody else has put there: the folder is everybody's.
fn write(path: &Path, header: &str, lines: &[Box<[u8]>]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    let pieces = std::iter::once(header.as_bytes()).chain(lines.iter().map(AsRef::as_ref));
    file.write_all(&pieces.collect::<Vec<_>>().concat())?;
    file.sync_all()
}
