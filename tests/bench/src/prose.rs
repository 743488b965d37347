//! Request bodies of English-like prose, the same in every run.
//!
//! Members come in the order of OpenAI's Python client (messages first), with the escapes and the non-ASCII of
//! real prompts. Each message starts with a serial number of fixed width, so that no two requests need be equal.

use std::fmt::Write;

/// Where a serial number goes.
const SERIAL: &str = "[#000000000000] ";
pub const SERIAL_DIGITS: usize = 12;

/// Small, seeded, good enough for filler text.
pub struct Xorshift(u64);

impl Xorshift {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// A number below `bound`.
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let drawn = self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) % bound as u64;
        usize::try_from(drawn).expect("the bound is a usize")
    }
}

/// About `length` bytes, escaped for JSON.
pub fn prose(random: &mut Xorshift, length: usize) -> String {
    let words: Vec<&str> = include_str!("words.txt").lines().collect();
    let mut text = String::with_capacity(length + 32);
    while text.len() < length {
        text.push_str(words[random.below(words.len())]);
        text.push_str(match random.below(40) {
            0 | 1 => ". ",
            2..=4 => ", ",
            5 => ".\\n\\n",
            6 => " \\\"quoted\\\" ",
            7 => " — ",
            _ => " ",
        });
    }
    text
}

/// A chat completion request.
pub struct ChatBody {
    pub bytes: Vec<u8>,
    /// Where each message's serial digits start; the newest message's is the last.
    pub serials: Vec<usize>,
}

impl ChatBody {
    /// A body of about `length` bytes. Long ones are conversations of turns of 2 KB.
    pub fn new(model: &str, length: usize, stream: bool, seed: u64) -> Self {
        let mut random = Xorshift::new(seed);
        let mut body = Self { bytes: Vec::with_capacity(length + 256), serials: Vec::new() };
        let tail = tail(model, stream);
        let instructions = prose(&mut random, (length / 8).min(1024));
        body.message("system", &format!("You are a helpful assistant. {instructions}"));
        let left = |body: &Self| length.saturating_sub(body.bytes.len() + tail.len() + 56);
        while left(&body) > 6000 {
            body.message("user", &prose(&mut random, 2000));
            body.message("assistant", &prose(&mut random, 2000));
        }
        let last = prose(&mut random, left(&body));
        body.message("user", &last);
        body.bytes.extend_from_slice(tail.as_bytes());
        body
    }

    fn message(&mut self, role: &str, text: &str) {
        let opening: &[u8] = if self.serials.is_empty() { b"{\"messages\":[" } else { b"," };
        self.bytes.extend_from_slice(opening);
        self.bytes.extend_from_slice(format!("{{\"role\":\"{role}\",\"content\":\"").as_bytes());
        self.serials.push(self.bytes.len() + 2);
        self.bytes.extend_from_slice(format!("{SERIAL}{text}\"}}").as_bytes());
    }
}

fn tail(model: &str, stream: bool) -> String {
    let mut tail = format!("],\"model\":\"{model}\",\"max_tokens\":256,\"temperature\":0.7");
    if stream {
        tail.push_str(",\"stream\":true,\"stream_options\":{\"include_usage\":true}");
    }
    tail.push('}');
    tail
}

/// Writes a serial number over the digits at the start of `place`.
pub fn write_serial(place: &mut [u8], serial: u64) {
    let mut digits = String::with_capacity(SERIAL_DIGITS);
    write!(digits, "{serial:0SERIAL_DIGITS$}").expect("a string takes everything");
    place[..SERIAL_DIGITS].copy_from_slice(digits.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_have_about_the_size_asked_for_and_are_json() {
        for length in [1024, 16 * 1024, 200 * 1024] {
            let body = ChatBody::new("gpt-4o-mini", length, true, 7);
            assert!(body.bytes.len().abs_diff(length) < length / 10 + 64, "{length}: {}", body.bytes.len());
            let json: serde_json::Value = serde_json::from_slice(&body.bytes).unwrap();
            assert_eq!(json["messages"].as_array().unwrap().len(), body.serials.len());
        }
    }

    #[test]
    fn a_serial_number_takes_the_place_of_the_zeros() {
        let mut body = ChatBody::new("m", 1024, false, 1);
        let at = body.serials[0];
        assert_eq!(&body.bytes[at..at + SERIAL_DIGITS], b"000000000000");
        write_serial(&mut body.bytes[at..], 1234);
        assert_eq!(&body.bytes[at..at + SERIAL_DIGITS], b"000000001234");
    }
}
