//! A model's own tokenizer, as Hugging Face writes it: `tokenizer.json`.

use tokenizers::Tokenizer;

/// A tokenizer that came with a model.
#[derive(Debug)]
pub struct FileTokenizer(Tokenizer);

/// Why a file is not a tokenizer.
#[derive(Debug, thiserror::Error)]
#[error("it is not a `tokenizer.json`: {0}")]
pub struct TokenizerError(String);

impl FileTokenizer {
    /// Reads the text of a `tokenizer.json`. Takes up to half a second for a vocabulary of 128,000.
    pub fn read(json: &[u8]) -> Result<Self, TokenizerError> {
        let mut tokenizer = Tokenizer::from_bytes(json).map_err(|error| TokenizerError(error.to_string()))?;
        // Special tokens that stand in a text are text.
        tokenizer.set_encode_special_tokens(true);
        Ok(Self(tokenizer))
    }

    /// Tokens of a text, without any that begin or end a sequence; 0 when it cannot be encoded.
    pub fn count(&self, text: &str) -> u64 {
        self.0.encode_fast(text, false).map_or(0, |encoding| encoding.len() as u64)
    }
}
