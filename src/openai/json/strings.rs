//! Where strings of JSON end: short ones are crossed eight bytes at a time, longer ones in blocks, because a vector search
//! takes longer to begin than most of them are long.

use memchr::memchr;
use wide::u8x16;

/// Strings up to this length are crossed eight bytes at a time.
const SHORT_STRING: usize = 32;
/// Bytes that are looked at together in longer strings.
const BLOCK: usize = 64;
/// Bytes before a block that say whether its quotes are escaped.
const PRECEDING: usize = 2;
/// After so many blocks without a quote a vector search is worth its beginning.
const BLOCKS_WITHOUT_QUOTES: u32 = 16;

/// Where the string ends of which `text` is the inside and what follows: at a quote that no odd number of backslashes
/// precedes. `None` if it does not end.
#[inline]
pub fn end_of_string(text: &[u8]) -> Option<usize> {
    plain_string(text).or_else(|| end_of_long_string(text))
}

fn end_of_long_string(text: &[u8]) -> Option<usize> {
    let mut from = 0;
    loop {
        match cross_blocks(text, from) {
            Ok(length) => return Some(length),
            Err(crossed) => from = crossed,
        }
        let quote = from + memchr(b'"', &text[from..])?;
        if !is_escaped(&text[..quote]) {
            return Some(quote);
        }
        from = quote + 1;
    }
}

/// Where the quote is that ends a short string, if there is nothing but plain ASCII before it.
#[inline]
pub(super) fn plain_string(text: &[u8]) -> Option<usize> {
    let mut at = 0;
    while at < SHORT_STRING {
        let Some(word) = text.get(at..).and_then(<[u8]>::first_chunk::<8>) else { break };
        let word = u64::from_le_bytes(*word);
        let below_space = word.wrapping_sub(EACH * 0x20) & !word & HIGH;
        let stops = quotes_in(word) | zeros_in(word ^ (EACH * 0x5c)) | below_space | (word & HIGH);
        if stops != 0 {
            at += stops.trailing_zeros() as usize / 8;
            return (text[at] == b'"').then_some(at);
        }
        at += 8;
    }
    let rest = text.get(at..)?.iter().take(SHORT_STRING.saturating_sub(at));
    let stop = at + rest.take_while(|byte| matches!(byte, b' '..=b'!' | b'#'..=b'[' | b']'..=b'~')).count();
    (text.get(stop) == Some(&b'"')).then_some(stop)
}

/// Looks for the end of the string in blocks from `from` on, whose beginning is that of `text`, and goes on while there
/// are quotes: a vector search would have to begin anew behind each that is escaped. Where the string ends, or how far
/// it was crossed.
#[inline]
fn cross_blocks(text: &[u8], from: usize) -> Result<usize, usize> {
    let (mut at, mut without_quotes) = (from, 0);
    // A block is looked at with what precedes it.
    while at < PRECEDING {
        match text.get(at) {
            Some(b'"') if !is_escaped(&text[..at]) => return Ok(at),
            Some(_) => at += 1,
            None => return Err(at),
        }
    }
    while without_quotes < BLOCKS_WITHOUT_QUOTES {
        let Some(window) = text.get(at - PRECEDING..).and_then(<[u8]>::first_chunk) else { break };
        let Block { has_quotes, mut ends } = look_at_block(window);
        while ends != 0 {
            let quote = at + ends.trailing_zeros() as usize;
            if !is_escaped(&text[..quote]) {
                return Ok(quote);
            }
            ends &= ends - 1;
        }
        without_quotes = if has_quotes { 0 } else { without_quotes + 1 };
        at += BLOCK;
    }
    Err(at)
}

/// What a block of a string has.
struct Block {
    has_quotes: bool,
    /// The bit of every quote that may end the string: all but those behind exactly one backslash.
    ends: u64,
}

/// Looks at the block behind the first [`PRECEDING`] bytes. No branch depends on where there are quotes, unless one may
/// be the end: in prose a processor cannot foretell it.
#[inline]
fn look_at_block(window: &[u8; PRECEDING + BLOCK]) -> Block {
    let (quote, backslash) = (u8x16::splat(b'"'), u8x16::splat(b'\\'));
    let vectors =
        |from: usize| window[from..][..BLOCK].as_chunks::<16>().0.iter().map(|vector| u8x16::new(*vector));
    let (mut any_quote, mut any_end) = (u8x16::ZERO, u8x16::ZERO);
    let mut ends = [u8x16::ZERO; BLOCK / 16];
    for (ends, ((byte, before), second_before)) in
        ends.iter_mut().zip(vectors(2).zip(vectors(1)).zip(vectors(0)))
    {
        let quotes = byte.simd_eq(quote);
        let lone_backslash = before.simd_eq(backslash) & !second_before.simd_eq(backslash);
        *ends = quotes & !lone_backslash;
        any_quote |= quotes;
        any_end |= *ends;
    }
    let bits =
        |ends: &[u8x16]| ends.iter().rev().fold(0, |bits, ends| bits << 16 | u64::from(ends.to_bitmask()));
    Block { has_quotes: any_quote.any(), ends: if any_end.any() { bits(&ends) } else { 0 } }
}

/// Whether what follows `before` is escaped by the backslash at its end.
#[inline]
fn is_escaped(before: &[u8]) -> bool {
    match before {
        [.., b'\\', b'\\'] => before.iter().rev().take_while(|byte| **byte == b'\\').count() % 2 == 1,
        [.., b'\\'] => true,
        _ => false,
    }
}

/// The high bit of every byte that is a quote; above the lowest of them there may be more bits than quotes.
#[inline]
const fn quotes_in(word: u64) -> u64 {
    zeros_in(word ^ (EACH * 0x22))
}

/// The high bit of every byte that is zero; above the lowest of them there may be more bits than zeros.
#[inline]
const fn zeros_in(word: u64) -> u64 {
    word.wrapping_sub(EACH) & !word & HIGH
}

/// A byte times this is that byte in each of eight.
const EACH: u64 = u64::MAX / 255;

/// The high bit of each of eight bytes.
const HIGH: u64 = EACH << 7;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Byte by byte: where the string ends that begins the text.
    fn end(text: &[u8]) -> Option<usize> {
        let mut at = 0;
        while text.get(at)? != &b'"' {
            at += if text[at] == b'\\' { 2 } else { 1 };
        }
        Some(at)
    }

    proptest! {
        #[test]
        fn a_string_ends_where_its_bytes_say(
            inside in r#"(\\"|\\\\|\\n|é|[a-z ]{1,80}){0,60}"#,
            gap in 0_usize..1200,
        ) {
            let text = format!("{inside}{}\", \"after\": \"it\"", "x".repeat(gap));
            let text = text.as_bytes();
            let end = end(text).unwrap();
            match cross_blocks(text, 0) {
                Ok(found) => prop_assert_eq!(found, end),
                Err(crossed) => {
                    prop_assert!(crossed <= end);
                    let looked_at = &text[crossed.saturating_sub(BLOCK * BLOCKS_WITHOUT_QUOTES as usize)..crossed];
                    prop_assert!(text.len() - crossed < BLOCK || !looked_at.contains(&b'"'));
                }
            }
            prop_assert_eq!(end_of_string(text), Some(end));
            prop_assert_eq!(end_of_string(&text[..end]), None);
        }
    }
}
