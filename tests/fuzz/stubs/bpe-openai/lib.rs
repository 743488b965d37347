//! Stands in for the library: nothing is counted while fuzzing.

#[derive(Debug)]
pub struct Tokenizer;

static NONE: Tokenizer = Tokenizer;

impl Tokenizer {
    pub fn count(&self, _text: &str) -> usize {
        0
    }
}

pub fn o200k_base() -> &'static Tokenizer {
    &NONE
}

pub fn cl100k_base() -> &'static Tokenizer {
    &NONE
}
