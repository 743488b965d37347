//! Money in integers: pico-dollars a token, nano-dollars an amount.
//!
//! A list price of $0.15 a million tokens is exactly 150,000 pico-dollars a token, so no list price with up
//! to six decimals is ever rounded. An amount is rounded once, half to even, when a sum of pico-dollars
//! becomes nano-dollars ([`NanoUsd::from_pico`]).

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Neg, Sub, SubAssign};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

const NANOS_PER_USD: u64 = 1_000_000_000;

/// An amount in nano-dollars (10⁻⁹ USD), up to ±$9.2 billion. Overflow is a bug and panics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct NanoUsd(i64);

impl NanoUsd {
    pub const ZERO: Self = Self(0);

    pub const fn from_nanos(nanos: i64) -> Self {
        Self(nanos)
    }

    pub const fn as_nanos(self) -> i64 {
        self.0
    }

    /// Rounds pico-dollars to nano-dollars, half to even: the only place where an amount is rounded.
    pub fn from_pico(pico: i128) -> Self {
        let quotient = pico.div_euclid(1000);
        let remainder = pico.rem_euclid(1000);
        let up = remainder > 500 || (remainder == 500 && quotient % 2 != 0);
        Self(i64::try_from(quotient + i128::from(up)).expect("an amount is below nine billion dollars"))
    }

    /// `self × numerator ÷ denominator`, rounded down. Cumulative floors telescope: charges of adjacent
    /// intervals add up to the charge of the whole.
    ///
    /// # Panics
    /// When `denominator` is zero.
    #[must_use]
    pub fn mul_div_floor(self, numerator: u64, denominator: u64) -> Self {
        let product = i128::from(self.0) * i128::from(numerator);
        Self(
            i64::try_from(product.div_euclid(i128::from(denominator)))
                .expect("an amount is below nine billion dollars"),
        )
    }

    /// Dollars as a float, for gauges and pictures only.
    #[expect(clippy::cast_precision_loss, reason = "a gauge, not an amount")]
    pub fn to_usd_f64(self) -> f64 {
        self.0 as f64 / 1e9
    }

    /// The nearest amount to a float of dollars, for estimates only.
    #[expect(clippy::cast_possible_truncation, reason = "`as` saturates, and an estimate has no exact value")]
    pub fn from_usd_f64_estimate(usd: f64) -> Self {
        Self((usd * 1e9).round() as i64)
    }

    #[must_use]
    pub fn saturating_sub_at_zero(self, other: Self) -> Self {
        Self((self.0 - other.0).max(0))
    }
}

impl Add for NanoUsd {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self(self.0.checked_add(other.0).expect("an amount is below nine billion dollars"))
    }
}

impl Sub for NanoUsd {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self(self.0.checked_sub(other.0).expect("an amount is above minus nine billion dollars"))
    }
}

impl Neg for NanoUsd {
    type Output = Self;

    fn neg(self) -> Self {
        Self(-self.0)
    }
}

impl AddAssign for NanoUsd {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl SubAssign for NanoUsd {
    fn sub_assign(&mut self, other: Self) {
        *self = *self - other;
    }
}

impl Sum for NanoUsd {
    fn sum<I: Iterator<Item = Self>>(amounts: I) -> Self {
        amounts.fold(Self::ZERO, Add::add)
    }
}

/// The exact decimal of dollars: at least two decimals, at most nine, no trailing zeros beyond the second.
/// A precision (`{:.2}`) rounds half away from zero, for tables.
impl fmt::Display for NanoUsd {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if out.precision().is_none() && out.width().is_none() {
            return out.write_str(self.exact(&mut [0; EXACT_LENGTH]));
        }
        let decimals = out.precision();
        let mut nanos = self.0.unsigned_abs();
        if let Some(decimals) = decimals.filter(|decimals| *decimals < 9) {
            let unit = 10_u64.pow(u32::try_from(9 - decimals).expect("at most nine"));
            nanos = (nanos + unit / 2) / unit * unit;
        }
        let (whole, fraction) = (nanos / NANOS_PER_USD, nanos % NANOS_PER_USD);
        let digits = format!("{fraction:09}");
        let kept =
            decimals.map_or_else(|| digits.trim_end_matches('0').len().max(2), |decimals| decimals.min(9));
        let sign = if self.0 < 0 && nanos > 0 { "-" } else { "" };
        let text =
            if kept == 0 { format!("{sign}{whole}") } else { format!("{sign}{whole}.{}", &digits[..kept]) };
        match out.width() {
            Some(width) => write!(out, "{text:>width$}"),
            None => out.write_str(&text),
        }
    }
}

/// Longest exact decimal: a sign, ten digits, the point, nine decimals.
const EXACT_LENGTH: usize = 21;

impl NanoUsd {
    /// The exact decimal, written by hand because every answer carries one.
    fn exact(self, buffer: &mut [u8; EXACT_LENGTH]) -> &str {
        let nanos = self.0.unsigned_abs();
        let (mut whole, mut fraction, mut decimals) = (nanos / NANOS_PER_USD, nanos % NANOS_PER_USD, 9);
        while decimals > 2 && fraction % 10 == 0 {
            fraction /= 10;
            decimals -= 1;
        }
        let mut at = buffer.len();
        let mut put = |byte: u8| {
            at -= 1;
            buffer[at] = byte;
        };
        for _ in 0..decimals {
            put(last_digit(fraction));
            fraction /= 10;
        }
        put(b'.');
        put(last_digit(whole));
        while whole > 9 {
            whole /= 10;
            put(last_digit(whole));
        }
        if self.0 < 0 {
            put(b'-');
        }
        std::str::from_utf8(&buffer[at..]).expect("digits, a point and a sign are ASCII")
    }
}

fn last_digit(number: u64) -> u8 {
    b'0' + u8::try_from(number % 10).expect("a digit is below ten")
}

/// What is wrong with a decimal that was to be an amount or a price.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseMoneyError {
    #[error("`{0}` is not a decimal number of dollars")]
    NotDecimal(String),
    #[error("`{0}` has more decimals than can be kept exactly")]
    TooFine(String),
    #[error("`{0}` is too large")]
    TooLarge(String),
}

/// Parses a decimal into `value × 10^scale` exactly; an exponent (`1.5e-7`) is understood.
fn parse_scaled(text: &str, scale: i32) -> Result<i128, ParseMoneyError> {
    let not_decimal = || ParseMoneyError::NotDecimal(text.to_owned());
    let trimmed = text.trim().replace('_', "");
    let (mantissa, exponent) = match trimmed.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent.parse::<i32>().map_err(|_| not_decimal())?),
        None => (trimmed.as_str(), 0),
    };
    let (negative, digits) = match mantissa.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, mantissa.strip_prefix('+').unwrap_or(mantissa)),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    if whole.is_empty() && fraction.is_empty()
        || !whole.bytes().chain(fraction.bytes()).all(|b| b.is_ascii_digit())
    {
        return Err(not_decimal());
    }
    let fraction = fraction.trim_end_matches('0');
    let too_large = || ParseMoneyError::TooLarge(text.to_owned());
    let value: i128 = format!("0{whole}{fraction}").parse().map_err(|_| too_large())?;
    if value == 0 {
        return Ok(0);
    }
    let shift =
        scale + exponent.clamp(-1000, 1000) - i32::try_from(fraction.len()).map_err(|_| too_large())?;
    let value = if shift >= 0 {
        let factor = 10_i128.checked_pow(shift.unsigned_abs()).ok_or_else(too_large)?;
        value.checked_mul(factor).ok_or_else(too_large)?
    } else {
        let divisor = 10_i128
            .checked_pow(shift.unsigned_abs())
            .ok_or_else(|| ParseMoneyError::TooFine(text.to_owned()))?;
        if value % divisor != 0 {
            return Err(ParseMoneyError::TooFine(text.to_owned()));
        }
        value / divisor
    };
    Ok(if negative { -value } else { value })
}

impl FromStr for NanoUsd {
    type Err = ParseMoneyError;

    fn from_str(text: &str) -> Result<Self, ParseMoneyError> {
        let nanos = parse_scaled(text, 9)?;
        i64::try_from(nanos).map(Self).map_err(|_| ParseMoneyError::TooLarge(text.to_owned()))
    }
}

impl Serialize for NanoUsd {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for NanoUsd {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// Pico-dollars (10⁻¹² USD) a token, which is the same number as millionths of a dollar per million tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct TokenPrice(u64);

impl TokenPrice {
    pub const ZERO: Self = Self(0);

    pub const fn from_pico_per_token(pico: u64) -> Self {
        Self(pico)
    }

    pub const fn as_pico_per_token(self) -> u64 {
        self.0
    }

    /// Parses a price in USD per million tokens, the unit of every price list: `"0.15"`.
    pub fn from_usd_per_million(text: &str) -> Result<Self, ParseMoneyError> {
        let pico = parse_scaled(text, 6)?;
        if pico < 0 {
            return Err(ParseMoneyError::NotDecimal(text.to_owned()));
        }
        u64::try_from(pico).map(Self).map_err(|_| ParseMoneyError::TooLarge(text.to_owned()))
    }

    /// USD per million tokens as a float, for gauges and tables only.
    #[expect(clippy::cast_precision_loss, reason = "a gauge, not an amount")]
    pub fn to_usd_per_million_f64(self) -> f64 {
        self.0 as f64 / 1e6
    }

    /// Pico-dollars for that many tokens.
    pub fn times(self, tokens: u64) -> i128 {
        i128::from(self.0) * i128::from(tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nanos(text: &str) -> Result<i64, ParseMoneyError> {
        text.parse::<NanoUsd>().map(NanoUsd::as_nanos)
    }

    #[test]
    fn an_amount_prints_what_was_parsed() {
        for (text, printed) in [
            ("2.99", "2.99"),
            ("0", "0.00"),
            ("-0.5", "-0.50"),
            ("0.000000001", "0.000000001"),
            ("1e-3", "0.001"),
        ] {
            assert_eq!(text.parse::<NanoUsd>().unwrap().to_string(), printed);
        }
    }

    #[test]
    fn a_precision_rounds_half_away_from_zero() {
        let amount: NanoUsd = "0.125".parse().unwrap();
        assert_eq!(format!("{amount:.2} {:.0} {:>8.2}", -amount, amount), "0.13 0     0.13");
    }

    #[test]
    fn what_cannot_be_kept_exactly_is_refused() {
        assert!(matches!(nanos("0.0000000001"), Err(ParseMoneyError::TooFine(_))));
        assert!(matches!(nanos("1e99"), Err(ParseMoneyError::TooLarge(_))));
        assert!(matches!(nanos("1e-99"), Err(ParseMoneyError::TooFine(_))));
        for text in ["", ".", "-", "1.2.3", "0x1", "inf", "NaN", "1e", "--1"] {
            assert!(matches!(nanos(text), Err(ParseMoneyError::NotDecimal(_))), "{text}");
        }
    }

    #[test]
    fn a_list_price_is_exact() {
        assert_eq!(TokenPrice::from_usd_per_million("0.15").unwrap().as_pico_per_token(), 150_000);
        assert_eq!(TokenPrice::from_usd_per_million("0.0375").unwrap().times(3), 112_500);
        assert!(TokenPrice::from_usd_per_million("-1").is_err());
    }

    #[test]
    fn rounding_is_half_to_even() {
        for (pico, nanos) in [(1499, 1), (1500, 2), (2500, 2), (2501, 3), (-1500, -2), (-500, 0)] {
            assert_eq!(NanoUsd::from_pico(pico).as_nanos(), nanos, "{pico}");
        }
    }
}
