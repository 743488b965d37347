//! The price book: list prices of the API's models, from a signed-off file that ships with the program.
//!
//! Prices are decimals in USD per million tokens, and the file says so (`unit`). They are read from their
//! decimal form into integers; nothing is computed with floats. Nothing is fetched when the program starts.
//!
//! What a line leaves out: `cached_input`, `cache_write`, `audio_input` and `image_input` cost what `input`
//! costs on that line, `audio_output` and `image_output` what `output` costs. A tier (`batch`, `flex`,
//! `priority`, `ultrafast`) has a line of its own or is charged as standard; so it is in the table for long
//! contexts, which holds for the whole call when its input exceeds `above_input_tokens`.

use std::collections::BTreeMap;

use toml::{Table, Value};

use crate::config::PriceBook;
use crate::economics::prices::LongContext;
use crate::economics::{PriceCard, Prices, Tier, TokenPrice};

pub mod doubts;
pub mod litellm;
pub mod write;

/// The unit that a price file must name.
pub const UNIT: &str = "usd_per_million_tokens";

const BUILT_IN: &str = include_str!("../config/prices.toml");

/// The names of prices, in the order of [`Line`].
const KEYS: [&str; 8] = [
    "input",
    "cached_input",
    "cache_write",
    "audio_input",
    "image_input",
    "output",
    "audio_output",
    "image_output",
];
const INPUT: usize = 0;
const OUTPUT: usize = 5;
/// Tiers that may have lines of their own.
const TIERS: [Tier; 4] = [Tier::Batch, Tier::Flex, Tier::Priority, Tier::Ultrafast];

/// A price file as it is written: every price that it states, and none that it does not.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PriceFile {
    pub source: String,
    /// `YYYY-MM-DD`: since when these prices hold, and when that was last confirmed.
    pub effective_from: String,
    pub confirmed_at: String,
    pub models: BTreeMap<String, ModelPrices>,
}

/// The prices of one model.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ModelPrices {
    /// Where it differs from the file's.
    pub effective_from: Option<String>,
    pub table: PriceTable,
    pub long_context: Option<(u64, PriceTable)>,
}

/// One line a tier.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PriceTable {
    pub standard: Line,
    /// In the order of the tiers that may have lines of their own.
    pub tiers: [Option<Line>; 4],
}

/// Prices by kind of token; an absent one follows from the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Line([Option<TokenPrice>; 8]);

/// Everything that is wrong with a price file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct PriceProblems(pub Vec<String>);

/// The prices that this program ships with.
pub fn built_in() -> PriceBook {
    built_in_file().book().expect("a test reads the shipped prices")
}

/// The shipped prices, as they are written.
pub fn built_in_file() -> PriceFile {
    read(BUILT_IN).expect("a test reads the shipped prices")
}

/// Parses a price file into a book.
///
/// # Errors
/// Every problem in the file, each with its path.
pub fn parse(text: &str) -> Result<PriceBook, PriceProblems> {
    read(text)?.book()
}

/// The cards of both books; where both have a model, the card of `overrides`.
#[must_use]
pub fn merge(mut base: PriceBook, overrides: PriceBook) -> PriceBook {
    base.cards.extend(overrides.cards);
    base.confirmed_at_seconds = base.confirmed_at_seconds.max(overrides.confirmed_at_seconds);
    base
}

/// Reads a price file.
///
/// # Errors
/// Every problem in the file, each with its path.
pub fn read(text: &str) -> Result<PriceFile, PriceProblems> {
    let table: Table = toml::from_str(text).map_err(|error| PriceProblems(vec![error.to_string()]))?;
    let mut reader = Reader::default();
    let file = reader.file(&table);
    if reader.problems.is_empty() { Ok(file) } else { Err(PriceProblems(reader.problems)) }
}

impl PriceFile {
    /// The book that lookups use.
    ///
    /// # Errors
    /// When `confirmed_at` is no date.
    pub fn book(&self) -> Result<PriceBook, PriceProblems> {
        let date: jiff::civil::Date = self.confirmed_at.parse().map_err(|_| {
            PriceProblems(vec![format!("`confirmed_at`: `{}` is not a date", self.confirmed_at)])
        })?;
        let days = date.since(jiff::civil::date(1970, 1, 1)).map_or(0, |span| span.get_days());
        let seconds = u64::try_from(days).unwrap_or(0) * 86_400;
        let cards = self.models.iter().map(|(name, model)| (name.clone(), model.card())).collect();
        Ok(PriceBook { cards, confirmed_at_seconds: seconds })
    }
}

impl ModelPrices {
    pub fn card(&self) -> PriceCard {
        let [batch, flex, priority, ultrafast] = self.table.tiers.map(|line| line.map(Line::prices));
        let long_context = self.long_context.as_ref().map(|(above_input_tokens, table)| {
            let [batch, flex, priority, ultrafast] = table.tiers.map(|line| line.map(Line::prices));
            LongContext {
                above_input_tokens: *above_input_tokens,
                prices: table.standard.prices(),
                batch,
                flex,
                priority,
                ultrafast,
            }
        });
        PriceCard { standard: self.table.standard.prices(), batch, flex, priority, ultrafast, long_context }
    }
}

impl PriceTable {
    /// Every line with the tier that it is for.
    pub fn lines(&self) -> impl Iterator<Item = (Tier, &Line)> {
        let tiers =
            TIERS.into_iter().zip(&self.tiers).filter_map(|(tier, line)| Some((tier, line.as_ref()?)));
        std::iter::once((Tier::Standard, &self.standard)).chain(tiers)
    }
}

impl Line {
    /// Every stated price with its name.
    pub fn stated(&self) -> impl Iterator<Item = (&'static str, TokenPrice)> {
        KEYS.into_iter().zip(self.0).filter_map(|(key, price)| Some((key, price?)))
    }

    pub fn get(&self, key: &str) -> Option<TokenPrice> {
        self.0[KEYS.iter().position(|known| *known == key)?]
    }

    fn is_priced(&self) -> bool {
        self.0[INPUT].is_some() && self.0[OUTPUT].is_some()
    }

    fn prices(self) -> Prices {
        let [input, cached_input, cache_write, audio_input, image_input, output, audio_output, image_output] =
            self.0;
        let (input, output) = (input.unwrap_or_default(), output.unwrap_or_default());
        Prices {
            input,
            cached_input: cached_input.unwrap_or(input),
            cache_write: cache_write.unwrap_or(input),
            audio_input: audio_input.unwrap_or(input),
            image_input: image_input.unwrap_or(input),
            output,
            audio_output: audio_output.unwrap_or(output),
            image_output: image_output.unwrap_or(output),
        }
    }
}

/// Reads tables, and goes on after a problem, so that all of them are told at once.
#[derive(Debug, Default)]
struct Reader {
    problems: Vec<String>,
}

impl Reader {
    fn problem(&mut self, path: &str, what: impl std::fmt::Display) {
        self.problems.push(format!("`{path}`: {what}"));
    }

    fn file(&mut self, table: &Table) -> PriceFile {
        self.only(table, "", &["unit", "source", "effective_from", "confirmed_at", "models"]);
        match table.get("unit").and_then(Value::as_str) {
            Some(UNIT) => {}
            Some(other) => {
                self.problem("unit", format!("`{other}` is not understood, give prices in `{UNIT}`"));
            }
            None => self.problem("unit", format!("say `unit = \"{UNIT}\"`, and give prices in it")),
        }
        let source = table.get("source").and_then(Value::as_str).unwrap_or_default().to_owned();
        if source.is_empty() {
            self.problem("source", "say where the prices are from");
        }
        let confirmed_at = self.date(table, "", "confirmed_at").unwrap_or_default();
        let effective_from = self.date(table, "", "effective_from").unwrap_or_default();
        let mut models = BTreeMap::new();
        match table.get("models") {
            Some(Value::Table(tables)) => {
                for (name, model) in tables {
                    models.insert(name.clone(), self.model(&format!("models.\"{name}\""), model));
                }
            }
            _ => self.problem("models", "there are no models"),
        }
        PriceFile { source, effective_from, confirmed_at, models }
    }

    fn model(&mut self, path: &str, value: &Value) -> ModelPrices {
        let Some(table) = self.table(path, value) else { return ModelPrices::default() };
        let effective_from =
            table.contains_key("effective_from").then(|| self.date(table, path, "effective_from")).flatten();
        let long_context =
            table.get("long_context").map(|value| self.long_context(&format!("{path}.long_context"), value));
        ModelPrices {
            effective_from,
            table: self.lines(path, table, &["effective_from", "long_context"]),
            long_context,
        }
    }

    fn long_context(&mut self, path: &str, value: &Value) -> (u64, PriceTable) {
        let Some(table) = self.table(path, value) else { return Default::default() };
        let above = table
            .get("above_input_tokens")
            .and_then(Value::as_integer)
            .and_then(|above| u64::try_from(above).ok());
        if above.is_none() {
            self.problem(path, "`above_input_tokens` must be a number of tokens");
        }
        (above.unwrap_or(0), self.lines(path, table, &["above_input_tokens"]))
    }

    /// A table with a standard line, lines of tiers, and `besides`.
    fn lines(&mut self, path: &str, table: &Table, besides: &[&str]) -> PriceTable {
        let known: Vec<&str> =
            KEYS.into_iter().chain(TIERS.map(Tier::as_str)).chain(besides.iter().copied()).collect();
        self.only(table, path, &known);
        let tiers = TIERS.map(|tier| {
            let path = format!("{path}.{}", tier.as_str());
            let line = self.table(&path, table.get(tier.as_str())?)?;
            self.only(line, &path, &KEYS);
            Some(self.line(&path, line))
        });
        PriceTable { standard: self.line(path, table), tiers }
    }

    fn line(&mut self, path: &str, table: &Table) -> Line {
        let line = Line(KEYS.map(|key| {
            let value = table.get(key)?;
            match price(value) {
                Ok(price) => Some(price),
                Err(what) => {
                    self.problem(&format!("{path}.{key}"), what);
                    None
                }
            }
        }));
        if !line.is_priced() && ["input", "output"].iter().any(|key| !table.contains_key(*key)) {
            self.problem(path, "needs both `input` and `output`; a price of 0 must be written");
        }
        line
    }

    fn table<'t>(&mut self, path: &str, value: &'t Value) -> Option<&'t Table> {
        let table = value.as_table();
        if table.is_none() {
            self.problem(path, "must be a table of prices");
        }
        table
    }

    fn date(&mut self, table: &Table, path: &str, key: &str) -> Option<String> {
        let path = if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
        let text = match table.get(key) {
            Some(Value::Datetime(date)) => date.to_string(),
            Some(Value::String(date)) => date.clone(),
            _ => {
                self.problem(&path, "must be a date such as 2026-11-24");
                return None;
            }
        };
        if text.parse::<jiff::civil::Date>().is_err() {
            self.problem(&path, format!("`{text}` is not a date such as 2026-11-24"));
        }
        Some(text)
    }

    fn only(&mut self, table: &Table, path: &str, known: &[&str]) {
        for key in table.keys().filter(|key| !known.contains(&key.as_str())) {
            let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
            self.problem(&path, format!("is not known; known are {}", known.join(", ")));
        }
    }
}

/// A number or a string, by its shortest decimal form.
fn price(value: &Value) -> Result<TokenPrice, String> {
    let text = match value {
        Value::Float(number) => number.to_string(),
        Value::Integer(number) => number.to_string(),
        Value::String(text) => text.clone(),
        _ => return Err("must be a price in USD per million tokens".to_owned()),
    };
    TokenPrice::from_usd_per_million(&text).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::economics::Usage;

    const HEAD: &str = "unit = \"usd_per_million_tokens\"\nsource = \"a test\"\nconfirmed_at = 2026-11-24\neffective_from = 2026-11-01\n";

    fn card(prices: &str) -> PriceCard {
        parse(&format!("{HEAD}[models.m]\n{prices}")).unwrap().cards["m"].clone()
    }

    #[test]
    fn what_a_line_leaves_out_follows_from_what_it_states() {
        let card = card("input = 2.0\noutput = 8\nbatch = { input = 1, output = \"4\" }");
        let usage = Usage::new(1_000_000, 1_000_000).with_cached(500_000);
        assert_eq!(card.cost(&usage, Tier::Standard).to_string(), "10.00");
        assert_eq!(card.cost(&usage, Tier::Batch).to_string(), "5.00");
        assert_eq!(card.cost(&usage, Tier::Priority).to_string(), "10.00");
    }

    #[test]
    fn the_input_chooses_the_table_and_the_tier_the_line() {
        let card = card(
            "input = 1\noutput = 1\nflex = { input = 0.5, output = 0.5 }\n\
             long_context = { above_input_tokens = 10, input = 2, output = 2, flex = { input = 1.5, output = 1.5 } }",
        );
        let nanos = |input, tier| card.cost(&Usage::new(input, 0), tier).as_nanos();
        assert_eq!([nanos(10, Tier::Standard), nanos(11, Tier::Standard)], [10_000, 22_000]);
        assert_eq!([nanos(10, Tier::Flex), nanos(11, Tier::Flex)], [5_000, 16_500]);
        assert_eq!([nanos(10, Tier::Batch), nanos(11, Tier::Batch)], [10_000, 22_000]);
    }

    #[test]
    fn every_problem_is_told_at_once() {
        let text = "unit = \"usd_per_token\"\nconfirmed_at = \"soon\"\n[models.a]\ninput = -1\noutput = true\n\
                    [models.b]\ninput = 1\nbacth = { input = 1 }\n[models.c]\ninput = 1\noutput = 0.0000001\n";
        let PriceProblems(problems) = parse(text).unwrap_err();
        for part in [
            "`unit`",
            "`source`",
            "`confirmed_at`",
            "`effective_from`",
            "`models.\"a\".input`",
            "`models.\"a\".output`",
            "`models.\"b\".bacth`",
            "`models.\"b\"`: needs both",
            "`models.\"c\".output`",
        ] {
            assert!(problems.iter().any(|problem| problem.starts_with(part)), "{part} not in {problems:#?}");
        }
    }

    #[test]
    fn overrides_win_and_the_rest_stays() {
        let base =
            parse(&format!("{HEAD}[models.a]\ninput = 1\noutput = 1\n[models.b]\ninput = 1\noutput = 1\n"))
                .unwrap();
        let own = parse(&format!("{HEAD}[models.b]\ninput = 0\noutput = 0\n")).unwrap();
        let merged = merge(base, own);
        let cost = |model: &str| merged.cards[model].cost(&Usage::new(1000, 0), Tier::Standard).as_nanos();
        assert_eq!((cost("a"), cost("b")), (1_000_000, 0));
    }

    #[test]
    fn the_shipped_prices_are_sound() {
        let book = built_in();
        assert!(book.cards.len() >= 40);
        assert_eq!(book.confirmed_at_seconds % 86_400, 0);
        assert_eq!(doubts::of_file(&built_in_file(), None), Vec::<String>::new());
        assert!(book.card("gpt-4o-mini-2024-07-18").is_some());
    }
}
