//! Import of LiteLLM's `model_prices_and_context_window.json`, which gives USD per token.

use std::collections::BTreeMap;

use serde_json::value::RawValue;

use super::{KEYS, Line, ModelPrices, PriceFile, PriceProblems, PriceTable, TIERS};
use crate::config::undated;
use crate::economics::{Tier, TokenPrice};

/// LiteLLM's names, in the order of our lines.
const NAMES: [&str; 8] = [
    "input_cost_per_token",
    "cache_read_input_token_cost",
    "cache_creation_input_token_cost",
    "input_cost_per_audio_token",
    "input_cost_per_image_token",
    "output_cost_per_token",
    "output_cost_per_audio_token",
    "output_cost_per_image_token",
];

/// What to take from the map.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    /// `litellm_provider` of the models, e.g. `openai`.
    pub provider: String,
    /// Only these models, if any are named.
    pub models: Vec<String>,
}

/// One model's facts, as they are written: a price's decimal is not to pass through a float.
type Entry<'a> = BTreeMap<String, &'a RawValue>;

/// Reads the map. Returns the file and a note for each model that was left out although it was wanted.
///
/// # Errors
/// When it is not a JSON object.
pub fn import(
    json: &str,
    selection: &Selection,
    date: &str,
) -> Result<(PriceFile, Vec<String>), PriceProblems> {
    let map: BTreeMap<String, Entry<'_>> = serde_json::from_str(json)
        .map_err(|error| PriceProblems(vec![format!("not a JSON object of models: {error}")]))?;
    let mut notes = Vec::new();
    let mut models = BTreeMap::new();
    for (name, entry) in map.iter().filter(|(name, entry)| selection.takes(name, entry)) {
        match model(entry) {
            Ok(Some(model)) => {
                models.insert(name.clone(), model);
            }
            Ok(None) => notes.push(format!("`{name}` has no price per token")),
            Err(what) => notes.push(format!("`{name}`: {what}")),
        }
    }
    if selection.models.is_empty() {
        drop_snapshots(&mut models);
    }
    notes.extend(
        selection
            .models
            .iter()
            .filter(|name| !map.contains_key(*name))
            .map(|name| format!("`{name}` is not in the map")),
    );
    let source = "LiteLLM model_prices_and_context_window.json (MIT)".to_owned();
    Ok((PriceFile { source, effective_from: date.to_owned(), confirmed_at: date.to_owned(), models }, notes))
}

impl Selection {
    fn takes(&self, name: &str, entry: &Entry<'_>) -> bool {
        if !self.models.is_empty() {
            return self.models.iter().any(|wanted| wanted == name);
        }
        // A name with a slash is another host's offer, or an image's size.
        let provider =
            entry.get("litellm_provider").and_then(|raw| serde_json::from_str::<String>(raw.get()).ok());
        provider.as_deref() == Some(self.provider.as_str()) && !name.contains('/')
    }
}

/// Leaves out dated snapshots that cost what their undated name costs: a lookup finds that name, and the map
/// knows more of its tiers.
fn drop_snapshots(models: &mut BTreeMap<String, ModelPrices>) {
    let costs_the_same = |name: &str, model: &ModelPrices| {
        let undated = undated(name).and_then(|name| models.get(name));
        undated.is_some_and(|undated| undated.card().standard == model.card().standard)
    };
    let same: Vec<String> = models
        .iter()
        .filter(|(name, model)| costs_the_same(name, model))
        .map(|(name, _)| name.clone())
        .collect();
    models.retain(|name, _| !same.contains(name));
}

/// The prices of one entry; `None` when it has none per token.
fn model(entry: &Entry<'_>) -> Result<Option<ModelPrices>, String> {
    let mut short = Lines::default();
    let mut long: Option<(u64, Lines)> = None;
    for (key, value) in entry {
        let Some(found) = Key::parse(key) else { continue };
        let Some(price) = per_million(value.get()).map_err(|what| format!("{key}: {what}"))? else {
            continue;
        };
        let lines = match found.above {
            None => &mut short,
            Some(above) => {
                let (threshold, lines) = long.get_or_insert_with(|| (above, Lines::default()));
                if above != *threshold {
                    return Err(format!(
                        "has several tables for long contexts ({threshold} and {above} tokens)"
                    ));
                }
                lines
            }
        };
        lines.put(&found, price);
    }
    let Some(table) = short.table() else { return Ok(None) };
    let long_context = long.and_then(|(above, lines)| Some((above, lines.table()?)));
    Ok(Some(ModelPrices { effective_from: None, table, long_context }))
}

/// Prices of a table as they come, by tier and kind.
#[derive(Debug, Default)]
struct Lines {
    standard: Line,
    tiers: [Line; 4],
}

impl Lines {
    fn put(&mut self, key: &Key, price: TokenPrice) {
        let line = match TIERS.iter().position(|tier| *tier == key.tier) {
            Some(index) => &mut self.tiers[index],
            None => &mut self.standard,
        };
        line.0[key.kind] = Some(price);
    }

    /// A tier needs both prices to be a line; an embedding's output, which has none, costs nothing.
    fn table(mut self) -> Option<PriceTable> {
        self.standard.0[super::INPUT]?;
        self.standard.0[super::OUTPUT].get_or_insert(TokenPrice::ZERO);
        Some(PriceTable {
            standard: self.standard,
            tiers: self.tiers.map(|line| line.is_priced().then_some(line)),
        })
    }
}

/// `cache_read_input_token_cost_above_272k_tokens_flex`, taken apart.
#[derive(Debug, PartialEq, Eq)]
struct Key {
    kind: usize,
    above: Option<u64>,
    tier: Tier,
}

impl Key {
    fn parse(key: &str) -> Option<Self> {
        debug_assert_eq!(NAMES.len(), KEYS.len());
        let (kind, rest) =
            NAMES.iter().enumerate().find_map(|(kind, name)| Some((kind, key.strip_prefix(name)?)))?;
        let (above, rest) = match rest.strip_prefix("_above_") {
            None => (None, rest),
            Some(rest) => {
                let (thousands, rest) = rest.split_once("k_tokens")?;
                (Some(thousands.parse::<u64>().ok()? * 1000), rest)
            }
        };
        let tier = match rest {
            "" => Tier::Standard,
            "_batches" => Tier::Batch,
            "_flex" => Tier::Flex,
            "_priority" => Tier::Priority,
            "_ultrafast" => Tier::Ultrafast,
            _ => return None,
        };
        Some(Self { kind, above, tier })
    }
}

/// USD per token, as a JSON number, to USD per million: the same digits with the point moved.
fn per_million(number: &str) -> Result<Option<TokenPrice>, String> {
    if number == "null" {
        return Ok(None);
    }
    let (digits, exponent) = number.split_once(['e', 'E']).unwrap_or((number, "0"));
    let exponent: i32 = exponent.parse().map_err(|_| "not a number".to_owned())?;
    let price = TokenPrice::from_usd_per_million(&format!("{digits}e{}", exponent.saturating_add(6)));
    price.map(Some).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prices::write::decimal;

    #[test]
    fn a_key_is_taken_apart() {
        let key = |text| Key::parse(text).map(|key| (KEYS[key.kind], key.above, key.tier));
        assert_eq!(key("input_cost_per_token"), Some(("input", None, Tier::Standard)));
        assert_eq!(
            key("cache_read_input_token_cost_above_272k_tokens_flex"),
            Some(("cached_input", Some(272_000), Tier::Flex))
        );
        assert_eq!(key("output_cost_per_token_batches"), Some(("output", None, Tier::Batch)));
        assert_eq!(key("cache_creation_input_token_cost_above_12hr"), None);
        assert_eq!(key("input_cost_per_second"), None);
    }

    #[test]
    fn a_price_per_token_becomes_one_per_million_exactly() {
        for (text, printed) in [
            ("1.5e-07", "0.15"),
            ("1.375e-07", "0.1375"),
            ("0.00012", "120.0"),
            ("0.0", "0.0"),
            ("3e-05", "30.0"),
        ] {
            assert_eq!(per_million(text).unwrap().map(decimal).unwrap(), printed);
        }
        assert!(per_million("\"1\"").is_err());
        assert!(per_million("1e-14").is_err());
    }

    #[test]
    fn a_map_becomes_a_price_file() {
        let json = r#"{
            "sample_spec": {"litellm_provider": "one of ..", "input_cost_per_token": 0.0},
            "a": {"litellm_provider": "openai", "input_cost_per_token": 2e-06, "output_cost_per_token": 8e-06,
                  "cache_read_input_token_cost": 5e-07, "input_cost_per_token_batches": 1e-06, "output_cost_per_token_batches": 4e-06,
                  "cache_read_input_token_cost_flex": 1e-07,
                  "input_cost_per_token_above_272k_tokens": 4e-06, "output_cost_per_token_above_272k_tokens": 1.2e-05},
            "tts": {"litellm_provider": "openai", "input_cost_per_character": 1.5e-05},
            "claude": {"litellm_provider": "anthropic", "input_cost_per_token": 3e-06, "output_cost_per_token": 1.5e-05}
        }"#;
        let selection = Selection { provider: "openai".to_owned(), models: Vec::new() };
        let (file, notes) = import(json, &selection, "2026-11-24").unwrap();
        assert_eq!(notes, ["`tts` has no price per token"]);
        assert_eq!(file.models.keys().collect::<Vec<_>>(), ["a"]);
        let text = file.to_string();
        assert!(text.contains("batch = { input = 1.0, output = 4.0 }"), "{text}");
        assert!(text.contains("above_input_tokens = 272000"), "{text}");
        assert!(!text.contains("flex"), "a line without its own prices is no line: {text}");
        assert_eq!(super::super::read(&text).unwrap(), file);
    }
}
