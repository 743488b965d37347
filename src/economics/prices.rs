//! What tokens cost at a backend that is paid per token.

use super::{NanoUsd, TokenPrice, Usage};

/// Prices of one tier of one model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Prices {
    pub input: TokenPrice,
    pub cached_input: TokenPrice,
    pub cache_write: TokenPrice,
    pub audio_input: TokenPrice,
    pub image_input: TokenPrice,
    pub output: TokenPrice,
    pub audio_output: TokenPrice,
    pub image_output: TokenPrice,
}

impl Prices {
    /// Prices with every finer kind of token at the price of its total.
    pub fn flat(input: TokenPrice, output: TokenPrice) -> Self {
        Self {
            input,
            cached_input: input,
            cache_write: input,
            audio_input: input,
            image_input: input,
            output,
            audio_output: output,
            image_output: output,
        }
    }

    /// The cost of a usage, rounded once. Reasoning tokens are output tokens and cost the same.
    pub fn cost(&self, usage: &Usage) -> NanoUsd {
        let usage = usage.normalised();
        let text_input = usage.input_tokens
            - usage.cached_input_tokens
            - usage.cache_write_tokens
            - usage.audio_input_tokens
            - usage.image_input_tokens;
        let text_output = usage.output_tokens - usage.audio_output_tokens - usage.image_output_tokens;
        NanoUsd::from_pico(
            self.input.times(text_input)
                + self.cached_input.times(usage.cached_input_tokens)
                + self.cache_write.times(usage.cache_write_tokens)
                + self.audio_input.times(usage.audio_input_tokens)
                + self.image_input.times(usage.image_input_tokens)
                + self.output.times(text_output)
                + self.audio_output.times(usage.audio_output_tokens)
                + self.image_output.times(usage.image_output_tokens),
        )
    }
}

/// The service tier that was *served*, as the response names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Tier {
    #[default]
    Standard,
    Batch,
    Flex,
    Priority,
}

/// Everything the price book knows of one model.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PriceCard {
    pub standard: Prices,
    pub batch: Option<Prices>,
    pub flex: Option<Prices>,
    pub priority: Option<Prices>,
    /// Dearer prices for the whole call when its input exceeds a number of tokens.
    pub long_context: Option<LongContext>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LongContext {
    pub above_input_tokens: u64,
    pub prices: Prices,
}

impl PriceCard {
    pub fn flat(input: TokenPrice, output: TokenPrice) -> Self {
        Self { standard: Prices::flat(input, output), ..Self::default() }
    }

    /// The prices in force for a usage served at a tier. A tier without prices of its own is charged as standard.
    pub fn prices(&self, usage: &Usage, tier: Tier) -> &Prices {
        let tiered = match tier {
            Tier::Standard => None,
            Tier::Batch => self.batch.as_ref(),
            Tier::Flex => self.flex.as_ref(),
            Tier::Priority => self.priority.as_ref(),
        };
        let long = self.long_context.as_ref().filter(|long| usage.input_tokens > long.above_input_tokens);
        tiered.or(long.map(|long| &long.prices)).unwrap_or(&self.standard)
    }

    pub fn cost(&self, usage: &Usage, tier: Tier) -> NanoUsd {
        self.prices(usage, tier).cost(usage)
    }
}
