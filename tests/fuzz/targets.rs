//! What must hold for any bytes. The fuzzer calls these with what it makes up, `cargo test` with the corpus.

use breakeven::config;
use breakeven::economics::{NanoUsd, TokenPrice};
use breakeven::openai::encoding::{Coding, Decoder};
use breakeven::openai::{BodyReader, Call, Change, Endpoint, StreamReader};
use breakeven::prices;
use bytes::Bytes;
use serde_json::Value;

/// Longest pieces into which a stream is cut.
const LONGEST_PIECE: usize = 64;

/// Bodies of up to so many bytes are decoded however they expand.
const EXPANDS_BYTES: usize = 1 << 20;

const STREAMS: [Endpoint; 6] = [
    Endpoint::ChatCompletions,
    Endpoint::Completions,
    Endpoint::Responses,
    Endpoint::Messages,
    Endpoint::AudioTranscriptions,
    Endpoint::Images,
];

/// The first byte and the rest: what to do, and with what.
fn split(data: &[u8]) -> (usize, &[u8]) {
    data.split_first().map_or((0, data), |(first, rest)| (usize::from(*first), rest))
}

/// Lengths of pieces that add up to `bytes`, other ones for other bytes.
fn pieces(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut left = bytes;
    let mut state = bytes.len();
    std::iter::from_fn(move || {
        let first = usize::from(*left.first()?);
        state = state.wrapping_mul(31).wrapping_add(first);
        let (piece, rest) = left.split_at((state % LONGEST_PIECE + 1).min(left.len()));
        left = rest;
        Some(piece)
    })
}

/// A stream says and passes the same however it is cut, and all of it passes when nothing is to be cut out.
pub fn sse(data: &[u8]) {
    let (choice, stream) = split(data);
    let endpoint = STREAMS[choice % STREAMS.len()];
    for strips in [false, true] {
        let mut whole = StreamReader::new(endpoint, strips);
        let mut passed = whole.push(Bytes::copy_from_slice(stream)).to_vec();
        passed.extend_from_slice(&whole.finish());
        assert!(strips || passed == stream, "a stream must pass as it came");
        let mut cut = StreamReader::new(endpoint, strips);
        let mut passed_in_pieces = Vec::new();
        for piece in pieces(stream) {
            passed_in_pieces.extend_from_slice(&cut.push(Bytes::copy_from_slice(piece)));
        }
        passed_in_pieces.extend_from_slice(&cut.finish());
        assert_eq!(passed, passed_in_pieces);
        assert_eq!(whole.report(), cut.report());
        assert_eq!(whole.produced_text(), cut.produced_text());
        assert_eq!(whole.is_complete(), cut.is_complete());
    }
}

/// What serde reads as an object is read here as well, to the same model; and a rewrite changes what it says and
/// nothing else.
pub fn request(data: &[u8]) {
    const ENDPOINTS: [Endpoint; 4] =
        [Endpoint::ChatCompletions, Endpoint::Completions, Endpoint::Responses, Endpoint::Embeddings];
    let (choice, body) = split(data);
    let endpoint = ENDPOINTS[choice % ENDPOINTS.len()];
    let body = Bytes::copy_from_slice(body);
    let tree = serde_json::from_slice::<Value>(&body).ok().filter(Value::is_object);
    let Ok(call) = Call::read(endpoint, &body) else {
        assert!(tree.is_none(), "an object was not read");
        return;
    };
    let unchanged = call.rewrite(&body, &Change::default()).expect("there are no rules");
    assert!(call.model.is_empty() || unchanged == body, "nothing was to be changed");
    let change = Change { model: Some("other/\"model\""), include_usage: true, ..Change::default() };
    let changed = call.rewrite(&body, &change).expect("there are no rules");
    let Some(tree) = tree else { return };
    assert_eq!(tree["model"].as_str().unwrap_or_default(), call.model);
    let mut after: Value = serde_json::from_slice(&changed).expect("an object stays an object");
    assert_eq!(after["model"], "other/\"model\"");
    let asks = call.stream && endpoint.takes_stream_options();
    let options = after["stream_options"].clone();
    assert!(!asks || !options.is_object() || options["include_usage"] == true);
    let mut before = tree;
    for value in [&mut before, &mut after] {
        let members = value.as_object_mut().expect("both are objects");
        members.remove("model");
        members.remove("stream_options");
    }
    assert_eq!(before, after);
}

/// Usage is read the same however an answer is cut, and no coding's bytes do harm.
pub fn answer(data: &[u8]) {
    const CODINGS: [(&str, Coding); 4] = [
        ("gzip", Coding::Gzip),
        ("deflate", Coding::Deflate),
        ("br", Coding::Brotli),
        ("zstd", Coding::Zstd),
    ];
    const ENDPOINTS: [Endpoint; 5] = [
        Endpoint::ChatCompletions,
        Endpoint::Responses,
        Endpoint::Messages,
        Endpoint::Images,
        Endpoint::Files,
    ];
    let (choice, body) = split(data);
    let endpoint = ENDPOINTS[choice % ENDPOINTS.len()];
    let (name, coding) = CODINGS[choice / ENDPOINTS.len() % CODINGS.len()];
    for encoding in [None, Some(name)] {
        let mut whole = BodyReader::new(endpoint, encoding);
        whole.push(body);
        let mut cut = BodyReader::new(endpoint, encoding);
        pieces(body).for_each(|piece| cut.push(piece));
        let (whole, cut) = (whole.finish(), cut.finish());
        // A body that expands very far may be given up early when it comes in pieces.
        assert!(whole == cut || (encoding.is_some() && cut.is_none()), "{encoding:?} {whole:?} {cut:?}");
    }
    let mut decoder = Decoder::new(coding, Vec::new());
    let is_whole = decoder.push(body).and_then(|()| decoder.finish()).is_ok();
    let mut cut = Decoder::new(coding, Vec::new());
    let was_read = pieces(body).all(|piece| cut.push(piece).is_ok()) && cut.finish().is_ok();
    assert!(!was_read || (is_whole && decoder.sink() == cut.sink()));
    assert!(was_read || !is_whole || decoder.sink().len() > EXPANDS_BYTES);
}

/// A config is taken, or every problem of it can be told.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let parsed = config::parse(text, "breakeven.toml", &|name| Some(format!("value of {name}")));
    if let Err(problems) = parsed {
        assert!(!problems.to_string().is_empty());
    }
}

/// What is read as money is written as the same money; and rounding is by less than one.
pub fn money(data: &[u8]) {
    if let Some((pico, _)) = data.split_first_chunk::<8>() {
        let pico = i128::from(i64::from_le_bytes(*pico));
        let off = i128::from(NanoUsd::from_pico(pico).as_nanos()) * 1000 - pico;
        assert!(off.abs() <= 500, "{pico} is {off} off");
    }
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(amount) = text.parse::<NanoUsd>() {
        assert_eq!(amount.to_string().parse::<NanoUsd>(), Ok(amount), "{text}");
    }
    if let Ok(price) = TokenPrice::from_usd_per_million(text) {
        let again = NanoUsd::from_pico(price.times(1_000_000_000).min(i128::from(u32::MAX)));
        assert!(again >= NanoUsd::ZERO);
    }
    if let Err(problems) = prices::parse(text) {
        assert!(!problems.to_string().is_empty());
    }
}
