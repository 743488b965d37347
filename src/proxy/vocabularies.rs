//! Tokenizers of self-hosted models, loaded when they are first needed, on the thread that counts.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use dashmap::DashMap;
use tracing::error;

use crate::openai::tokenizer::FileTokenizer;

/// Largest `tokenizer.json` that is read; that of a vocabulary of 262,000 has 33 MB.
const MAX_FILE_BYTES: u64 = 128 << 20;

/// Tokenizers by their file. A file is read once: another version needs another name, or a restart.
#[derive(Debug, Default)]
pub struct Vocabularies(DashMap<PathBuf, Arc<OnceLock<Option<FileTokenizer>>>>);

/// A tokenizer, or the place of one that could not be read.
#[derive(Debug)]
pub struct Loaded(Arc<OnceLock<Option<FileTokenizer>>>);

impl Loaded {
    pub fn tokenizer(&self) -> Option<&FileTokenizer> {
        self.0.get()?.as_ref()
    }
}

impl Vocabularies {
    /// Loads a tokenizer, or waits for who loads it. Not for the request path: it takes up to half a second.
    pub fn load(&self, path: &Path) -> Loaded {
        let place = self.0.entry(path.to_owned()).or_default().clone();
        place.get_or_init(|| match read(path) {
            Ok(tokenizer) => Some(tokenizer),
            Err(error) => {
                error!("cannot count tokens with `{}`, so they are estimated: {error}", path.display());
                None
            }
        });
        Loaded(place)
    }
}

fn read(path: &Path) -> anyhow::Result<FileTokenizer> {
    let length = std::fs::metadata(path)?.len();
    anyhow::ensure!(length <= MAX_FILE_BYTES, "it has {length} bytes, and at most {MAX_FILE_BYTES} are read");
    Ok(FileTokenizer::read(&std::fs::read(path)?)?)
}
