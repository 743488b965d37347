//! Values of the configuration: durations, sizes, money, references to secrets.

use std::borrow::Cow;
use std::path::PathBuf;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use toml::de::DeValue;

use super::problem::{Findings, Place};
use super::read::{At, FromToml, wrong_type};
use crate::economics::money::ParseMoneyError;
use crate::economics::{NanoUsd, TokenPrice};

/// Implements [`JsonSchema`] for a value that is written in place.
macro_rules! schema_of {
    ($type:ty, $($schema:tt)+) => {
        impl JsonSchema for $type {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> Cow<'static, str> {
                stringify!($type).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!($($schema)+)
            }
        }
    };
}

impl FromToml for String {
    fn read(value: &DeValue<'_>, place: &Place, findings: &mut Findings) -> Option<Self> {
        if value.as_str().is_none() {
            wrong_type("a string", value, place, findings);
        }
        value.as_str().map(str::to_owned)
    }
}

impl FromToml for bool {
    fn read(value: &DeValue<'_>, place: &Place, findings: &mut Findings) -> Option<Self> {
        if value.as_bool().is_none() {
            wrong_type("true or false", value, place, findings);
        }
        value.as_bool()
    }
}

/// A whole number that is not negative.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Count(pub(super) u64);

schema_of!(Count, { "type": "integer", "minimum": 0 });

impl FromToml for Count {
    fn read(value: &DeValue<'_>, place: &Place, findings: &mut Findings) -> Option<Self> {
        let Some(integer) = value.as_integer() else {
            wrong_type("a whole number", value, place, findings);
            return None;
        };
        let parsed = i128::from_str_radix(integer.as_str(), integer.radix()).ok();
        match parsed.map(u64::try_from) {
            Some(Ok(count)) => return Some(Self(count)),
            Some(Err(_)) if parsed < Some(0) => {
                findings.problem(place, "must not be negative", "write a whole number from 0");
            }
            _ => findings.problem(place, "is too large", "write a smaller whole number"),
        }
        None
    }
}

/// A number that may have a fraction: shares and volumes, never money.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Number(pub(super) f64);

schema_of!(Number, { "type": "number" });

impl FromToml for Number {
    fn read(value: &DeValue<'_>, place: &Place, findings: &mut Findings) -> Option<Self> {
        let Some(text) = number_text(value) else {
            wrong_type("a number", value, place, findings);
            return None;
        };
        let number = text.parse().ok().filter(|number: &f64| number.is_finite());
        if number.is_none() {
            findings.problem(place, "is not a finite number", "write a decimal number");
        }
        number.map(Self)
    }
}

/// The decimal text of a number as it was written, so that money never becomes a float.
fn number_text(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::Float(float) => Some(float.as_str().to_owned()),
        DeValue::Integer(integer) if integer.radix() == 10 => Some(integer.as_str().to_owned()),
        DeValue::Integer(integer) => {
            i128::from_str_radix(integer.as_str(), integer.radix()).ok().map(|value| value.to_string())
        }
        _ => None,
    }
}

/// The decimal text of an amount: a number, or a string that is one.
fn money_text(value: &DeValue<'_>, place: &Place, findings: &mut Findings) -> Option<String> {
    let text = number_text(value).or_else(|| value.as_str().map(str::to_owned));
    if text.is_none() {
        wrong_type("a number of dollars", value, place, findings);
    }
    text
}

/// Dollars, exact to the nano-dollar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Usd(pub(super) NanoUsd);

schema_of!(Usd, { "type": ["number", "string"], "minimum": 0, "pattern": "^[0-9._eE+-]+$" });

impl FromToml for Usd {
    fn read(value: &DeValue<'_>, place: &Place, findings: &mut Findings) -> Option<Self> {
        let text = money_text(value, place, findings)?;
        match text.parse() {
            Ok(amount) => return Some(Self(amount)),
            Err(ParseMoneyError::TooFine(_)) => {
                findings.problem(
                    place,
                    "is finer than a nano-dollar",
                    "write an amount in USD with at most nine decimals",
                );
            }
            Err(ParseMoneyError::TooLarge(_)) => {
                findings.problem(place, "is too large", "write an amount in USD below nine billion");
            }
            Err(ParseMoneyError::NotDecimal(_)) => {
                findings.problem(place, "is not an amount", "write a decimal number of USD, as `2.99`");
            }
        }
        None
    }
}

/// A price in USD per million tokens, exact to the pico-dollar a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PerMillion(pub(super) TokenPrice);

schema_of!(PerMillion, { "type": ["number", "string"], "minimum": 0, "pattern": "^[0-9._eE+-]+$" });

/// Prices outside this range are taken for a mistake in the unit. The dearest list price known is 600 USD
/// per million (o1-pro output), the cheapest 0.02 (small embeddings); zero is a price too.
const PLAUSIBLE_PICO_PER_TOKEN: std::ops::RangeInclusive<u64> = 500..=10_000_000_000;

impl FromToml for PerMillion {
    fn read(value: &DeValue<'_>, place: &Place, findings: &mut Findings) -> Option<Self> {
        const UNIT: &str = "write USD per million tokens, as `0.15`";
        let text = money_text(value, place, findings)?;
        if text.trim_start().starts_with('-') {
            findings.problem(place, "must not be negative", UNIT);
            return None;
        }
        let price = match TokenPrice::from_usd_per_million(&text) {
            Ok(price) => price,
            Err(ParseMoneyError::TooFine(_)) => {
                findings.problem(place, "looks like a price per token", UNIT);
                return None;
            }
            Err(_) => {
                findings.problem(place, "is not a price", UNIT);
                return None;
            }
        };
        let pico = price.as_pico_per_token();
        if pico == 0 || PLAUSIBLE_PICO_PER_TOKEN.contains(&pico) {
            return Some(Self(price));
        }
        let looks = if pico < *PLAUSIBLE_PICO_PER_TOKEN.start() { "per token" } else { "in another unit" };
        findings.problem(place, format!("looks like a price {looks}"), UNIT);
        None
    }
}

/// A duration with its unit: `90s`, `5m`, `14d`, `1h30m`, `250ms`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Time(pub(super) Duration);

schema_of!(Time, { "type": "string", "pattern": "^([0-9]+(ms|s|m|h|d))+$" });

impl FromToml for Time {
    fn read(value: &DeValue<'_>, place: &Place, findings: &mut Findings) -> Option<Self> {
        let duration = value.as_str().and_then(parse_duration);
        if duration.is_none() {
            findings.problem(
                place,
                "is not a duration",
                "write a number and its unit, as `90s`, `5m` or `14d`",
            );
        }
        duration.map(Self)
    }
}

/// Ten years: longer is a slip of the pen, and sums of durations must not overflow.
const LONGEST: Duration = Duration::from_hours(3650 * 24);

/// Parses `90s`, `5m`, `1h30m`, `250ms`, `14d`; none if it is anything else or longer than ten years.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let mut rest = text.trim();
    let mut sum = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let amount: u64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let letters = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let unit_millis = match &rest[..letters] {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return None,
        };
        sum = sum.checked_add(Duration::from_millis(amount.checked_mul(unit_millis)?))?;
        rest = &rest[letters..];
    }
    (!text.trim().is_empty() && sum <= LONGEST).then_some(sum)
}

/// A number of bytes: `33554432`, `"32MiB"`, `"64KiB"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size(pub(super) u64);

schema_of!(Size, { "type": ["integer", "string"], "minimum": 0, "pattern": "^[0-9]+ ?(B|KiB|MiB|GiB)$" });

impl FromToml for Size {
    fn read(value: &DeValue<'_>, place: &Place, findings: &mut Findings) -> Option<Self> {
        if value.is_integer() {
            return Count::read(value, place, findings).map(|Count(bytes)| Self(bytes));
        }
        let bytes = value.as_str().and_then(parse_size);
        if bytes.is_none() {
            findings.problem(place, "is not a size", "write bytes, or a number and its unit, as `32MiB`");
        }
        bytes.map(Self)
    }
}

fn parse_size(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let factor = match text[digits..].trim_start() {
        "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    text[..digits].parse::<u64>().ok()?.checked_mul(factor)
}

/// Where a secret is kept. The secret itself is never in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum SecretReference {
    Env(String),
    File(PathBuf),
}

schema_of!(SecretReference, {
    "oneOf": [
        { "type": "object", "additionalProperties": false, "required": ["env"],
          "properties": { "env": { "type": "string", "description": "Name of an environment variable." } } },
        { "type": "object", "additionalProperties": false, "required": ["file"],
          "properties": { "file": { "type": "string", "description": "Path of a file; its last line break is cut." } } }
    ]
});

super::read::tables! {
    /// The two ways to refer to a secret.
    SecretTable {
        env: String,
        file: String,
    }
}

impl FromToml for SecretReference {
    fn read(value: &DeValue<'_>, place: &Place, findings: &mut Findings) -> Option<Self> {
        const REMEDY: &str = "write `{ env = \"NAME\" }` or `{ file = \"/path\" }`";
        if value.is_str() {
            let what = "is a secret in plain text, which this file must not hold";
            findings.problem(
                place,
                what,
                format!("{REMEDY}, and replace the secret if others saw this file"),
            );
            return None;
        }
        let problems = findings.problems.len();
        let table = SecretTable::read(value, place, findings)?;
        match (table.env, table.file) {
            (Some(name), None) => Some(Self::Env(name)),
            (None, Some(path)) => Some(Self::File(path.into())),
            _ if findings.problems.len() > problems => None,
            _ => {
                findings.problem(place, "does not say where the secret is", REMEDY);
                None
            }
        }
    }
}

/// A header of every request to a backend: a plain value, or a reference to a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum HeaderValue {
    Plain(String),
    Secret(SecretReference),
}

impl JsonSchema for HeaderValue {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "HeaderValue".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let reference = SecretReference::json_schema(generator);
        json_schema!({ "anyOf": [{ "type": "string" }, reference] })
    }
}

impl FromToml for HeaderValue {
    fn read(value: &DeValue<'_>, place: &Place, findings: &mut Findings) -> Option<Self> {
        match value.as_str() {
            Some(text) => Some(Self::Plain(text.to_owned())),
            None => SecretReference::read(value, place, findings).map(Self::Secret),
        }
    }
}

/// One string, or several in an array.
#[derive(Debug, Clone)]
pub(super) struct OneOrMore(pub(super) Vec<At<String>>);

schema_of!(OneOrMore, {
    "anyOf": [{ "type": "string" }, { "type": "array", "items": { "type": "string" }, "minItems": 1 }]
});

impl FromToml for OneOrMore {
    fn read(value: &DeValue<'_>, place: &Place, findings: &mut Findings) -> Option<Self> {
        if value.is_str() {
            return At::read(value, place, findings).map(|one| Self(vec![one]));
        }
        Vec::read(value, place, findings).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_a_number_with_a_unit() {
        for (text, millis) in [
            ("90s", 90_000),
            ("5m", 300_000),
            ("14d", 1_209_600_000),
            ("1h30m", 5_400_000),
            ("250ms", 250),
            ("0s", 0),
        ] {
            assert_eq!(parse_duration(text), Some(Duration::from_millis(millis)), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_duration_is_none() {
        for text in
            ["", " ", "90", "s", "1.5h", "-1s", "5 m", "1y", "99999999999999999999s", "4000d", "1d ½h"]
        {
            assert_eq!(parse_duration(text), None, "{text}");
        }
    }

    #[test]
    fn a_size_is_a_number_with_a_binary_unit() {
        assert_eq!(parse_size("32MiB"), Some(32 << 20));
        assert_eq!(parse_size("64 KiB"), Some(64 << 10));
        for text in ["", "32", "MiB", "32MB", "99999999999999GiB"] {
            assert_eq!(parse_size(text), None, "{text}");
        }
    }
}
