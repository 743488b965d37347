//! Strings of JSON, eight bytes at a time: a vector search takes longer to begin than most of them are long.

/// Strings up to this length are crossed eight bytes at a time.
const SHORT_STRING: usize = 32;
/// Escapes at most so far behind one another are crossed in one go.
const CLOSE_ESCAPES: usize = 8;

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

/// Crosses escapes that are close together, as those of words in quotes or of JSON in a string are: a vector search
/// takes longer to begin than the way to the next of them. Where the string ends, or how far it was crossed.
#[inline]
pub(super) fn cross_escapes(text: &[u8]) -> Result<usize, usize> {
    let (mut at, mut end) = (0, CLOSE_ESCAPES);
    while at < end {
        let Some(word) = text.get(at..).and_then(<[u8]>::first_chunk::<8>) else { break };
        let word = u64::from_le_bytes(*word);
        let stops = quotes_in(word) | zeros_in(word ^ (EACH * 0x5c));
        if stops == 0 {
            at += 8;
            continue;
        }
        at += stops.trailing_zeros() as usize / 8;
        if text[at] == b'"' {
            return Ok(at);
        }
        at += 2;
        end = at + CLOSE_ESCAPES;
    }
    Err(at.min(text.len()))
}

/// Whether what follows `before` is escaped by the backslash at its end.
#[inline]
pub(super) fn is_escaped(before: &[u8]) -> bool {
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
