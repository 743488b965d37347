//! What a call used, in tokens.

use std::ops::{Add, AddAssign};

use serde::{Deserialize, Serialize};

/// Tokens of a call in one normal form, whatever the endpoint called them.
///
/// `input_tokens` and `output_tokens` are totals; every other field is a part of one of them and is never
/// added to it again: `cached_input`, `cache_write`, `audio_input` and `image_input` of the input, `reasoning`,
/// `audio_output` and `image_output` of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Usage {
    pub input_tokens: u64,
    pub cached_input_tokens: u64,
    pub cache_write_tokens: u64,
    pub audio_input_tokens: u64,
    pub image_input_tokens: u64,
    pub output_tokens: u64,
    pub reasoning_tokens: u64,
    pub audio_output_tokens: u64,
    pub image_output_tokens: u64,
}

impl Usage {
    pub fn new(input_tokens: u64, output_tokens: u64) -> Self {
        Self { input_tokens, output_tokens, ..Self::default() }
    }

    #[must_use]
    pub fn with_cached(self, cached_input_tokens: u64) -> Self {
        Self { cached_input_tokens, ..self }
    }

    /// Input that has to be computed: what the prompt cache does not cover.
    pub fn fresh_input_tokens(&self) -> u64 {
        self.input_tokens.saturating_sub(self.cached_input_tokens)
    }

    pub fn total_tokens(&self) -> u64 {
        self.input_tokens + self.output_tokens
    }

    /// The same usage with every part cut to its total, so that a server's slip never prices below zero.
    #[must_use]
    pub fn normalised(mut self) -> Self {
        self.cached_input_tokens = self.cached_input_tokens.min(self.input_tokens);
        self.cache_write_tokens = self.cache_write_tokens.min(self.input_tokens - self.cached_input_tokens);
        let fresh = self.input_tokens - self.cached_input_tokens - self.cache_write_tokens;
        self.audio_input_tokens = self.audio_input_tokens.min(fresh);
        self.image_input_tokens = self.image_input_tokens.min(fresh - self.audio_input_tokens);
        self.reasoning_tokens = self.reasoning_tokens.min(self.output_tokens);
        self.audio_output_tokens = self.audio_output_tokens.min(self.output_tokens);
        self.image_output_tokens =
            self.image_output_tokens.min(self.output_tokens - self.audio_output_tokens);
        self
    }
}

impl Add for Usage {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            input_tokens: self.input_tokens + other.input_tokens,
            cached_input_tokens: self.cached_input_tokens + other.cached_input_tokens,
            cache_write_tokens: self.cache_write_tokens + other.cache_write_tokens,
            audio_input_tokens: self.audio_input_tokens + other.audio_input_tokens,
            image_input_tokens: self.image_input_tokens + other.image_input_tokens,
            output_tokens: self.output_tokens + other.output_tokens,
            reasoning_tokens: self.reasoning_tokens + other.reasoning_tokens,
            audio_output_tokens: self.audio_output_tokens + other.audio_output_tokens,
            image_output_tokens: self.image_output_tokens + other.image_output_tokens,
        }
    }
}

impl AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}
