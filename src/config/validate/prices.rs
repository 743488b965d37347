//! The price book: what ships with the program, then the owner's file, then the owner's own lines.

use super::super::raw::{RawLongContext, RawPriceCard, RawPriceTier, RawPrices};
use super::super::read::At;
use super::super::scalar::PerMillion;
use super::super::{Place, PriceBook};
use super::Checker;
use crate::economics::prices::LongContext;
use crate::economics::{PriceCard, Prices, TokenPrice};
use crate::prices::{self, PriceProblems};

impl Checker<'_> {
    pub(super) fn price_book(&mut self, raw: Option<&At<RawPrices>>) -> PriceBook {
        let mut book = prices::built_in();
        let Some(raw) = raw else { return book };
        if let Some(own) = raw.value.file.as_ref().and_then(|file| self.price_file(file)) {
            book = prices::merge(book, own);
        }
        for (model, at) in raw.value.models.as_ref().map_or(&[][..], |named| &named.0) {
            if let Some(card) = self.price_card(&at.value, &at.place) {
                book.cards.insert(model.clone(), card);
            }
        }
        book
    }

    /// The owner's own price file.
    fn price_file(&mut self, file: &At<String>) -> Option<PriceBook> {
        let path = self.surroundings.folder.join(&file.value);
        let text = (self.surroundings.read)(&path)
            .map_err(|error| {
                let what = format!("cannot read `{}`: {error}", path.display());
                self.findings.problem(
                    &file.place,
                    what,
                    "name a price file, as `breakeven prices import` writes it",
                );
            })
            .ok()?;
        prices::parse(&text)
            .map_err(|PriceProblems(problems)| {
                for problem in problems {
                    let what = format!("`{}`: {problem}", path.display());
                    self.findings.problem(
                        &file.place,
                        what,
                        "mend the price file; `breakeven prices check` reads it",
                    );
                }
            })
            .ok()
    }

    /// A card from its table; `input` and `output` must be there.
    pub(super) fn price_card(&mut self, raw: &RawPriceCard, place: &Place) -> Option<PriceCard> {
        let input = self.price(raw.input.as_ref(), "input", place);
        // An embedding has no output, so its price may be left out.
        let output = raw.output.as_ref().map_or(TokenPrice::ZERO, |at| at.value.0);
        let flat = Prices::flat(input?, output);
        let or = |written: &Option<At<PerMillion>>, other| written.as_ref().map_or(other, |at| at.value.0);
        let standard = Prices {
            cached_input: or(&raw.cached_input, flat.input),
            cache_write: or(&raw.cache_write, flat.input),
            audio_input: or(&raw.audio_input, flat.input),
            image_input: or(&raw.image_input, flat.input),
            audio_output: or(&raw.audio_output, flat.output),
            image_output: or(&raw.image_output, flat.output),
            ..flat
        };
        if let Some(cached) = &raw.cached_input
            && standard.cached_input > standard.input
        {
            self.findings.problem(
                &cached.place,
                "cached input is dearer than fresh input",
                "write what reading from the cache costs; writing to it is `cache_write`",
            );
        }
        let tier =
            |tier: &Option<At<RawPriceTier>>| tier.as_ref().map(|at| tier_prices(&at.value, &standard));
        Some(PriceCard {
            standard,
            batch: tier(&raw.batch),
            flex: tier(&raw.flex),
            priority: tier(&raw.priority),
            ultrafast: tier(&raw.ultrafast),
            long_context: raw.long_context.as_ref().and_then(|at| self.long_context(at, &standard)),
        })
    }

    fn price(&mut self, written: Option<&At<PerMillion>>, key: &str, place: &Place) -> Option<TokenPrice> {
        if written.is_none() {
            self.findings.missing(place, key, format!("write `{key} = 0.15`, in USD per million tokens"));
        }
        written.map(|at| at.value.0)
    }

    fn long_context(&mut self, at: &At<RawLongContext>, standard: &Prices) -> Option<LongContext> {
        let raw = &at.value;
        let Some(above) = &raw.above_input_tokens else {
            self.findings.missing(
                &at.place,
                "above_input_tokens",
                "write the input tokens above which these prices hold, as 272000",
            );
            return None;
        };
        let tier = RawPriceTier {
            input: raw.input.clone(),
            cached_input: raw.cached_input.clone(),
            output: raw.output.clone(),
        };
        Some(LongContext {
            above_input_tokens: above.value.0,
            prices: tier_prices(&tier, standard),
            ..LongContext::default()
        })
    }
}

/// A tier's prices. As in the price file, finer kinds of tokens cost what `input` and `output` cost there; a
/// discount for cached input is not taken over from the standard tier.
fn tier_prices(raw: &RawPriceTier, standard: &Prices) -> Prices {
    let or = |written: &Option<At<PerMillion>>, other| written.as_ref().map_or(other, |at| at.value.0);
    let flat = Prices::flat(or(&raw.input, standard.input), or(&raw.output, standard.output));
    Prices { cached_input: or(&raw.cached_input, flat.input), ..flat }
}
