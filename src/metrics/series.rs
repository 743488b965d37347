//! What is counted for one backend, model and team. A caller resolves a [`Series`] once and keeps it; from
//! then on a call costs a few additions to atomics.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::time::Duration;

use super::catalogue::{DURATION_BOUNDS, FIRST_TOKEN_BOUNDS, PER_OUTPUT_TOKEN_BOUNDS, RATIO_BOUNDS};
use super::instruments::{Counter, Histogram, Money, Named};
use crate::economics::{NanoUsd, Usage};
use crate::ledger::Outcome;

/// Kinds of tokens that never overlap, so that their sum is what was used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TokenType {
    Input,
    InputCached,
    InputCacheWrite,
    InputAudio,
    InputImage,
    Output,
    OutputReasoning,
    OutputAudio,
    OutputImage,
}

impl TokenType {
    pub(crate) const ALL: [Self; 9] = [
        Self::Input,
        Self::InputCached,
        Self::InputCacheWrite,
        Self::InputAudio,
        Self::InputImage,
        Self::Output,
        Self::OutputReasoning,
        Self::OutputAudio,
        Self::OutputImage,
    ];

    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Input => "input",
            Self::InputCached => "input_cached",
            Self::InputCacheWrite => "input_cache_write",
            Self::InputAudio => "input_audio",
            Self::InputImage => "input_image",
            Self::Output => "output",
            Self::OutputReasoning => "output_reasoning",
            Self::OutputAudio => "output_audio",
            Self::OutputImage => "output_image",
        }
    }

    /// The type it is counted as where it has no price of its own.
    pub(crate) const fn plain(self) -> Self {
        match self {
            Self::InputCacheWrite | Self::InputAudio | Self::InputImage => Self::Input,
            Self::OutputAudio | Self::OutputImage => Self::Output,
            other => other,
        }
    }
}

/// A set of token types that a series shows. The plain four are always in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TokenTypes(u16);

impl TokenTypes {
    pub(crate) const PLAIN: Self = Self(0)
        .with(TokenType::Input)
        .with(TokenType::InputCached)
        .with(TokenType::Output)
        .with(TokenType::OutputReasoning);

    pub(crate) const fn with(self, kind: TokenType) -> Self {
        Self(self.0 | 1 << kind as u16)
    }

    pub(crate) const fn contains(self, kind: TokenType) -> bool {
        self.0 & (1 << kind as u16) != 0
    }

    pub(crate) const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub(crate) const fn len(self) -> usize {
        self.0.count_ones() as usize
    }
}

/// One backend, model and team.
#[derive(Debug)]
pub struct Series {
    pub(crate) outcomes: [Counter; Outcome::ALL.len()],
    tokens: [Counter; TokenType::ALL.len()],
    /// Output tokens that streams showed beyond what they were settled at; later calls pay them back.
    output_owed: AtomicU64,
    types: AtomicU16,
    pub(crate) cost: Money,
    comparison: Arc<Comparison>,
    counts: Arc<CountsCompared>,
    model: Arc<ModelSeries>,
}

/// Our own token counts of one model against the upstream's.
#[derive(Debug)]
pub(crate) struct CountsCompared {
    pub(crate) error: Histogram,
    pub(crate) own: Counter,
    pub(crate) upstream: Counter,
}

impl Default for CountsCompared {
    fn default() -> Self {
        Self { error: Histogram::new(RATIO_BOUNDS), own: Counter::default(), upstream: Counter::default() }
    }
}

/// What the calls of one model and team would have cost on the API, wherever they were served.
#[derive(Debug, Default)]
pub(crate) struct Comparison {
    pub(crate) all_api: Money,
}

/// One backend and model.
#[derive(Debug)]
pub(crate) struct ModelSeries {
    pub(crate) duration: Histogram,
    pub(crate) first_token: Histogram,
    pub(crate) per_output_token: Histogram,
    pub(crate) unpriced: Counter,
}

/// A model's own series, and those of its teams.
#[derive(Debug)]
pub(crate) struct ModelTeams {
    pub(crate) model: Arc<ModelSeries>,
    pub(crate) teams: Named<Series>,
}

impl ModelTeams {
    pub(crate) fn new() -> Self {
        let model = ModelSeries {
            duration: Histogram::new(DURATION_BOUNDS),
            first_token: Histogram::new(FIRST_TOKEN_BOUNDS),
            per_output_token: Histogram::new(PER_OUTPUT_TOKEN_BOUNDS),
            unpriced: Counter::default(),
        };
        Self { model: Arc::new(model), teams: Named::default() }
    }
}

impl Series {
    pub(crate) fn new(
        types: TokenTypes,
        comparison: Arc<Comparison>,
        counts: Arc<CountsCompared>,
        model: Arc<ModelSeries>,
    ) -> Self {
        Self {
            outcomes: Default::default(),
            tokens: Default::default(),
            output_owed: AtomicU64::new(0),
            types: AtomicU16::new(types.0),
            cost: Money::default(),
            comparison,
            counts,
            model,
        }
    }

    /// A client's call has ended.
    pub fn finished(&self, outcome: Outcome) {
        self.outcomes[outcome as usize].add(1);
    }

    /// Output tokens that a running stream has shown, as far as they can be told; an estimate is fine. Give
    /// the sum of all of them to [`Self::tokens`] at the end.
    pub fn tokens_streamed(&self, output_tokens: u64) {
        self.add_output(output_tokens);
    }

    /// The tokens of a call that has ended, of which `streamed` output tokens were counted while it ran.
    ///
    /// When a stream had shown more than it was settled at, the difference is taken from the next calls of
    /// the series: the counter never falls, and is exact again after them.
    pub fn tokens(&self, usage: &Usage, streamed: u64) {
        let usage = usage.normalised();
        let output_media = usage.audio_output_tokens + usage.image_output_tokens;
        let reasoning = usage.reasoning_tokens.min(usage.output_tokens - output_media);
        self.add(TokenType::InputCached, usage.cached_input_tokens);
        self.add(TokenType::InputCacheWrite, usage.cache_write_tokens);
        self.add(TokenType::InputAudio, usage.audio_input_tokens);
        self.add(TokenType::InputImage, usage.image_input_tokens);
        self.add(
            TokenType::Input,
            usage.input_tokens
                - usage.cached_input_tokens
                - usage.cache_write_tokens
                - usage.audio_input_tokens
                - usage.image_input_tokens,
        );
        self.add(TokenType::OutputReasoning, reasoning);
        self.add(TokenType::OutputAudio, usage.audio_output_tokens);
        self.add(TokenType::OutputImage, usage.image_output_tokens);
        let text = usage.output_tokens - output_media - reasoning;
        if streamed <= text {
            self.add_output(text - streamed);
        } else {
            self.output_owed.fetch_add(streamed - text, Ordering::Relaxed);
        }
    }

    /// What the call cost: token charges on an API, its share of rent on a self-hosted backend.
    pub fn cost(&self, cost: NanoUsd) {
        self.cost.add(cost);
    }

    /// What the same usage costs on the API.
    pub fn all_api_cost(&self, cost: NanoUsd) {
        self.comparison.all_api.add(cost);
    }

    /// The call had no price and was counted as zero dollars. True for the first of this backend and model.
    pub fn unpriced(&self) -> bool {
        self.model.unpriced.add(1) == 0
    }

    /// From the request's arrival to the last byte of its answer.
    pub fn duration(&self, duration: Duration) {
        self.model.duration.observe(duration);
    }

    /// From the request's arrival to the first token of a stream.
    pub fn first_token(&self, duration: Duration) {
        self.model.first_token.observe(duration);
    }

    /// Time from the first to the last token of a stream, for `output_tokens` in all; one token has no pace.
    pub fn decoding(&self, duration: Duration, output_tokens: u64) {
        if let Some(after_first) = output_tokens.checked_sub(1).filter(|tokens| *tokens > 0) {
            let nanos = duration.as_nanos() / u128::from(after_first);
            self.model.per_output_token.observe_billionths(u64::try_from(nanos).unwrap_or(u64::MAX));
        }
    }

    /// A call was counted both by our tokenizer and by the upstream.
    pub fn counts_compared(&self, own: u64, upstream: u64) {
        self.counts.own.add(own);
        self.counts.upstream.add(upstream);
        if let Some(ratio) = (u128::from(own.abs_diff(upstream)) * 1_000_000_000).checked_div(upstream.into())
        {
            self.counts.error.observe_billionths(u64::try_from(ratio).unwrap_or(u64::MAX));
        }
    }

    pub(crate) fn show(&self, types: TokenTypes) {
        self.types.fetch_or(types.0, Ordering::Relaxed);
    }

    /// The tokens of each type that this series shows.
    pub(crate) fn tokens_by_type(&self) -> impl Iterator<Item = (TokenType, u64)> + '_ {
        let types = TokenTypes(self.types.load(Ordering::Relaxed));
        TokenType::ALL
            .into_iter()
            .filter(move |kind| types.contains(*kind))
            .map(|kind| (kind, self.tokens[kind as usize].get()))
    }

    fn add(&self, kind: TokenType, tokens: u64) {
        if tokens == 0 {
            return;
        }
        let shown = TokenTypes(self.types.load(Ordering::Relaxed)).contains(kind);
        self.tokens[if shown { kind } else { kind.plain() } as usize].add(tokens);
    }

    fn add_output(&self, tokens: u64) {
        let owed = self.output_owed.load(Ordering::Relaxed);
        let repaid = if owed == 0 || tokens == 0 { 0 } else { self.repay(tokens) };
        self.add(TokenType::Output, tokens - repaid);
    }

    /// Takes at most `tokens` from what is owed, and says how many.
    fn repay(&self, tokens: u64) -> u64 {
        let take = |owed: u64| Some(owed - owed.min(tokens));
        match self.output_owed.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take) {
            Ok(owed) | Err(owed) => owed.min(tokens),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(types: TokenTypes) -> Series {
        Series::new(types, Arc::default(), Arc::default(), ModelTeams::new().model)
    }

    fn tokens(series: &Series) -> Vec<(&'static str, u64)> {
        series.tokens_by_type().filter(|(_, n)| *n > 0).map(|(kind, n)| (kind.as_str(), n)).collect()
    }

    #[test]
    fn the_types_of_a_usage_add_up_to_its_tokens() {
        let all = TokenType::ALL.into_iter().fold(TokenTypes::PLAIN, TokenTypes::with);
        let usage = Usage {
            input_tokens: 100,
            cached_input_tokens: 40,
            cache_write_tokens: 10,
            audio_input_tokens: 5,
            image_input_tokens: 15,
            output_tokens: 50,
            reasoning_tokens: 45,
            audio_output_tokens: 10,
            image_output_tokens: 2,
        };
        for types in [TokenTypes::PLAIN, all] {
            let series = series(types);
            series.tokens(&usage, 0);
            assert_eq!(series.tokens_by_type().map(|(_, n)| n).sum::<u64>(), 150);
        }
    }

    #[test]
    fn a_type_without_a_price_of_its_own_counts_as_the_plain_one() {
        let series = series(TokenTypes::PLAIN.with(TokenType::InputAudio));
        let usage = Usage { audio_input_tokens: 3, image_input_tokens: 4, ..Usage::new(10, 0) };
        series.tokens(&usage, 0);
        assert_eq!(tokens(&series), [("input", 7), ("input_audio", 3)]);
    }

    #[test]
    fn streamed_tokens_show_at_once_and_are_not_counted_again() {
        let series = series(TokenTypes::PLAIN);
        series.tokens_streamed(30);
        assert_eq!(tokens(&series), [("output", 30)]);
        series.tokens(&Usage::new(7, 42), 30);
        assert_eq!(tokens(&series), [("input", 7), ("output", 42)]);
    }

    #[test]
    fn a_stream_that_showed_too_much_never_makes_the_counter_fall_and_is_paid_back() {
        let series = series(TokenTypes::PLAIN);
        series.tokens_streamed(30);
        series.tokens(&Usage::new(0, 20), 30);
        assert_eq!(tokens(&series), [("output", 30)]);
        series.tokens(&Usage::new(0, 4), 0);
        assert_eq!(tokens(&series), [("output", 30)]);
        series.tokens(&Usage::new(0, 16), 0);
        assert_eq!(tokens(&series), [("output", 40)]);
    }

    #[test]
    fn a_single_output_token_has_no_pace() {
        let series = series(TokenTypes::PLAIN);
        series.decoding(Duration::from_secs(1), 1);
        series.decoding(Duration::from_secs(1), 0);
        assert_eq!(series.model.per_output_token.read().count, 0);
        series.decoding(Duration::from_secs(1), 11);
        assert!((series.model.per_output_token.read().sum - 0.1).abs() < 1e-9);
    }
}
