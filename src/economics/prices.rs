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
    Ultrafast,
}

impl Tier {
    pub const ALL: [Self; 5] = [Self::Standard, Self::Batch, Self::Flex, Self::Priority, Self::Ultrafast];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Standard => "standard",
            Self::Batch => "batch",
            Self::Flex => "flex",
            Self::Priority => "priority",
            Self::Ultrafast => "ultrafast",
        }
    }

    /// The tier that a `service_tier` names, none for `auto`: it is what a request or a response says while
    /// the tier is not known. `default` is standard; so is `scale`, whose tokens are bought in advance.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "standard" | "default" | "scale" | "standard_only" => Some(Self::Standard),
            "batch" => Some(Self::Batch),
            "flex" => Some(Self::Flex),
            "priority" => Some(Self::Priority),
            "ultrafast" => Some(Self::Ultrafast),
            _ => None,
        }
    }
}

/// Everything the price book knows of one model.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PriceCard {
    pub standard: Prices,
    pub batch: Option<Prices>,
    pub flex: Option<Prices>,
    pub priority: Option<Prices>,
    pub ultrafast: Option<Prices>,
    /// Dearer prices for the whole call when its input exceeds a number of tokens.
    pub long_context: Option<LongContext>,
}

/// The second table of a model: tier by tier, for calls with a long input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LongContext {
    pub above_input_tokens: u64,
    pub prices: Prices,
    pub batch: Option<Prices>,
    pub flex: Option<Prices>,
    pub priority: Option<Prices>,
    pub ultrafast: Option<Prices>,
}

impl PriceCard {
    pub fn flat(input: TokenPrice, output: TokenPrice) -> Self {
        Self { standard: Prices::flat(input, output), ..Self::default() }
    }

    /// The prices in force for a usage served at a tier. The length of the input chooses the table, the tier
    /// the line in it; a tier without a line there is charged as the table's standard.
    pub fn prices(&self, usage: &Usage, tier: Tier) -> &Prices {
        match self.long_context.as_ref().filter(|long| usage.input_tokens > long.above_input_tokens) {
            Some(long) => long.tier(tier).unwrap_or(&long.prices),
            None => self.tier(tier).unwrap_or(&self.standard),
        }
    }

    pub fn cost(&self, usage: &Usage, tier: Tier) -> NanoUsd {
        self.prices(usage, tier).cost(usage)
    }

    fn tier(&self, tier: Tier) -> Option<&Prices> {
        match tier {
            Tier::Standard => None,
            Tier::Batch => self.batch.as_ref(),
            Tier::Flex => self.flex.as_ref(),
            Tier::Priority => self.priority.as_ref(),
            Tier::Ultrafast => self.ultrafast.as_ref(),
        }
    }
}

impl LongContext {
    fn tier(&self, tier: Tier) -> Option<&Prices> {
        match tier {
            Tier::Standard => None,
            Tier::Batch => self.batch.as_ref(),
            Tier::Flex => self.flex.as_ref(),
            Tier::Priority => self.priority.as_ref(),
            Tier::Ultrafast => self.ultrafast.as_ref(),
        }
    }
}
