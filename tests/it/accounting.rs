//! Accounting against what others measured: prices by a second implementation, tokens by tiktoken, usage and
//! streams as real servers sent them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use breakeven::economics::{Tier, Usage};
use breakeven::openai::stream::{MAX_HELD_BYTES, Report};
use breakeven::openai::tokenizer::{FileTokenizer, count_call, count_text};
use breakeven::openai::{BodyReader, Endpoint, StreamReader};
use breakeven::prices;
use bytes::Bytes;
use serde_json::Value;
use serde_json::value::RawValue;

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(path)
}

fn text(path: &str) -> String {
    std::fs::read_to_string(data(path)).unwrap()
}

mod reference {
    //! A second implementation of prices: decimal texts to exact fractions of 10^-18 USD, and the rules of the
    //! price list applied key by key. It shares nothing with the program but its inputs.

    use super::*;

    pub(super) type Entry = BTreeMap<String, Box<RawValue>>;

    /// Units of 10^-18 USD in a decimal such as `1.25e-07`.
    fn atto(decimal: &str) -> u128 {
        let (mantissa, exponent) = decimal.split_once('e').unwrap_or((decimal, "0"));
        let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
        let digits: u128 = format!("{whole}{fraction}").parse().unwrap();
        let shift = 18 + exponent.parse::<i32>().unwrap() - i32::try_from(fraction.len()).unwrap();
        if shift >= 0 {
            return digits * 10_u128.pow(shift.unsigned_abs());
        }
        let divisor = 10_u128.pow(shift.unsigned_abs());
        assert_eq!(digits % divisor, 0, "{decimal} is finer than 10^-18");
        digits / divisor
    }

    fn suffix(tier: Tier) -> &'static str {
        match tier {
            Tier::Standard => "",
            Tier::Batch => "_batches",
            Tier::Flex => "_flex",
            Tier::Priority => "_priority",
            Tier::Ultrafast => "_ultrafast",
        }
    }

    fn price(entry: &Entry, base: &str, long: bool, tier: Tier) -> Option<u128> {
        let key = format!("{base}{}{}", if long { "_above_272k_tokens" } else { "" }, suffix(tier));
        entry.get(&key).map(|raw| atto(raw.get()))
    }

    /// Nano-dollars, rounded half to even from the exact sum.
    pub(super) fn nanos(entry: &Entry, usage: &Usage, tier: Tier) -> i64 {
        let has_long = price(entry, "input_cost_per_token", true, Tier::Standard).is_some();
        let long = has_long && usage.input_tokens > 272_000;
        let has_line = price(entry, "input_cost_per_token", long, tier).is_some()
            && price(entry, "output_cost_per_token", long, tier).is_some();
        let tier = if has_line { tier } else { Tier::Standard };
        let input = price(entry, "input_cost_per_token", long, tier).unwrap();
        let output = price(entry, "output_cost_per_token", long, tier).unwrap();
        let cached = price(entry, "cache_read_input_token_cost", long, tier).unwrap_or(input);
        let written = price(entry, "cache_creation_input_token_cost", long, tier).unwrap_or(input);
        let fresh = usage.input_tokens - usage.cached_input_tokens - usage.cache_write_tokens;
        let sum = u128::from(fresh) * input
            + u128::from(usage.cached_input_tokens) * cached
            + u128::from(usage.cache_write_tokens) * written
            + u128::from(usage.output_tokens) * output;
        let unit = 1_000_000_000;
        let (quotient, twice_rest) = (sum / unit, sum % unit * 2);
        let is_up = twice_rest > unit || (twice_rest == unit && quotient % 2 == 1);
        i64::try_from(quotient + u128::from(is_up)).unwrap()
    }

    /// USD per million tokens of a decimal, in 10^-18 USD per token.
    pub(super) fn atto_per_token(usd_per_million: &str) -> u128 {
        let atto = atto(usd_per_million);
        assert_eq!(atto % 1_000_000, 0);
        atto / 1_000_000
    }
}

#[test]
fn a_hundred_thousand_usages_cost_what_a_second_implementation_says() {
    let list: BTreeMap<String, reference::Entry> =
        serde_json::from_str(&text("prices/litellm.json")).unwrap();
    assert_eq!(list.len(), 40);
    let entries: Vec<_> = list.iter().collect();
    let book = prices::built_in();
    let seed = 20_261_124;
    let mut random = fastrand::Rng::with_seed(seed);
    for round in 0..100_000 {
        let (model, entry) = entries[round % entries.len()];
        // Most calls are small, some cross the border to a long context, and some lie just beside it.
        let input = match random.u8(0..10) {
            0..=5 => random.u64(0..20_000),
            6..=7 => random.u64(0..1_000_000),
            8 => random.u64(271_990..272_010),
            _ => random.u64(0..20),
        };
        let cached = random.u64(0..=input);
        let written = random.u64(0..=input - cached);
        let output = random.u64(0..100_000);
        let usage = Usage {
            cache_write_tokens: if random.bool() { written } else { 0 },
            reasoning_tokens: random.u64(0..=output),
            ..Usage::new(input, output).with_cached(if random.bool() { cached } else { 0 })
        };
        let tier = Tier::ALL[random.usize(..Tier::ALL.len())];
        let ours = book.card(model).unwrap().cost(&usage, tier).as_nanos();
        let theirs = reference::nanos(entry, &usage, tier);
        assert_eq!(ours, theirs, "{model} {tier:?} {usage:?}, seed {seed}, round {round}");
    }
}

#[test]
fn the_shipped_prices_are_those_of_the_list() {
    #[derive(serde::Deserialize)]
    struct List<'a> {
        #[serde(borrow)]
        models: BTreeMap<String, BTreeMap<String, &'a RawValue>>,
    }
    let json = text("prices/openai.json");
    let list: List<'_> = serde_json::from_str(&json).unwrap();
    let book = prices::built_in();
    let mut compared = 0;
    for (model, listed) in &list.models {
        let card = &book.cards[model];
        let mut check = |key: &str, price: breakeven::economics::TokenPrice| {
            if let Some(raw) = listed.get(key).filter(|raw| raw.get() != "null") {
                let ours = u128::from(price.as_pico_per_token()) * 1_000_000;
                assert_eq!(ours, reference::atto_per_token(raw.get()), "{model} {key}");
                compared += 1;
            }
        };
        check("input", card.standard.input);
        check("cached_input", card.standard.cached_input);
        check("output", card.standard.output);
        for (tier, prices) in [("batch", card.batch), ("flex", card.flex)] {
            if let Some(prices) = prices {
                check(&format!("{tier}_input"), prices.input);
                check(&format!("{tier}_output"), prices.output);
            } else {
                assert_eq!(listed[&format!("{tier}_input")].get(), "null", "{model}");
            }
        }
        if listed["cached_input"].get() == "null" {
            assert_eq!(card.standard.cached_input, card.standard.input, "{model}");
        }
    }
    assert!(compared > 200, "{compared}");
}

#[test]
fn cache_writes_cost_a_quarter_more_where_they_are_billed() {
    let book = prices::built_in();
    for (model, card) in &book.cards {
        let is_billed = ["gpt-5.6", "gpt-6-", "gpt-6.1"].iter().any(|family| model.starts_with(family));
        if is_billed && card.standard.cache_write != card.standard.input {
            let (input, written) =
                (card.standard.input.as_pico_per_token(), card.standard.cache_write.as_pico_per_token());
            assert_eq!(written * 4, input * 5, "{model}");
        }
    }
    for model in ["gpt-5.6", "gpt-5.6-luna", "gpt-6-sol", "gpt-6.1-terra"] {
        assert_ne!(book.cards[model].standard.cache_write, book.cards[model].standard.input, "{model}");
    }
}

#[test]
fn texts_and_chats_count_as_tiktoken_counts_them() {
    let mut counted = 0;
    for line in
        [text("tokens/sample.jsonl"), text("tokens/generated.jsonl")].iter().flat_map(|file| file.lines())
    {
        let row: Value = serde_json::from_str(line).unwrap();
        for (model, encoding) in [("gpt-4o", "o200k_base"), ("gpt-4", "cl100k_base")] {
            let ours = match row["text"].as_str() {
                Some(text) => count_text(model, text),
                None => count_call(model, Endpoint::ChatCompletions, line.as_bytes()),
            };
            assert_eq!(Some(ours), row[encoding].as_u64(), "{} in {encoding}", row["id"]);
            counted += 1;
        }
    }
    assert_eq!(counted, 2 * (216 + 660));
}

#[test]
fn texts_count_as_the_library_of_a_tokenizer_file_counts_them() {
    let tokenizer = FileTokenizer::read(text("tokens/tiny/tokenizer.json").as_bytes()).unwrap();
    let counts = text("tokens/tiny/counts.jsonl");
    for line in counts.lines() {
        let row: Value = serde_json::from_str(line).unwrap();
        assert_eq!(Some(tokenizer.count(row["text"].as_str().unwrap())), row["tokens"].as_u64(), "{row}");
    }
    assert!(counts.lines().count() > 50);
    assert!(FileTokenizer::read(b"{}").is_err());
}

/// A captured answer.
struct Capture {
    name: String,
    endpoint: Endpoint,
    is_ok: bool,
    is_stream: bool,
    body: Bytes,
}

fn captures() -> Vec<Capture> {
    let mut captures = Vec::new();
    for server in ["vllm", "llamacpp"] {
        for file in std::fs::read_dir(data("captures").join(server)).unwrap() {
            let path = file.unwrap().path();
            let bytes = std::fs::read(&path).unwrap();
            let head =
                memchr::memmem::find(&bytes, b"\r\n\r\n").or(memchr::memmem::find(&bytes, b"\n\n")).unwrap();
            let start = if bytes[head..].starts_with(b"\r\n\r\n") { head + 4 } else { head + 2 };
            let head = String::from_utf8_lossy(&bytes[..start]).to_lowercase();
            let stem = path.file_stem().unwrap().to_string_lossy();
            let endpoint = match stem.split('_').next().unwrap() {
                "responses" => Endpoint::Responses,
                "completions" => Endpoint::Completions,
                "embeddings" => Endpoint::Embeddings,
                "messages" => Endpoint::Messages,
                "models" | "head" => Endpoint::Models,
                _ => Endpoint::ChatCompletions,
            };
            captures.push(Capture {
                name: format!("{server}/{stem}"),
                endpoint,
                is_ok: head.split_whitespace().nth(1) == Some("200"),
                is_stream: head.contains("text/event-stream"),
                body: Bytes::from(bytes[start..].to_vec()),
            });
        }
    }
    captures.sort_by(|a, b| a.name.cmp(&b.name));
    assert!(captures.len() > 100);
    captures
}

/// The last usage in a captured body, read by serde and by nothing of ours.
fn usage_in(capture: &Capture) -> Option<(u64, u64)> {
    let body = String::from_utf8_lossy(&capture.body);
    let texts: Vec<&str> = if capture.is_stream {
        body.lines().filter_map(|line| line.strip_prefix("data: ")).collect()
    } else {
        vec![&body]
    };
    let last = texts.iter().rev().find_map(|text| {
        let value: Value = serde_json::from_str(text).ok()?;
        let usage = [&value["usage"], &value["response"]["usage"]]
            .into_iter()
            .find(|usage| usage.is_object())?
            .clone();
        Some(usage)
    })?;
    let count = |names: &[&str]| names.iter().filter_map(|name| last[*name].as_u64()).sum::<u64>();
    let input = count(&["prompt_tokens", "input_tokens", "cache_read_input_tokens"]);
    Some((input, count(&["completion_tokens", "output_tokens"])))
}

#[test]
fn usage_is_read_from_every_captured_answer_that_has_one() {
    let mut found = 0;
    for capture in captures() {
        let usage = if capture.is_stream {
            let mut reader = StreamReader::new(capture.endpoint, false);
            reader.push(capture.body.clone());
            reader.finish();
            reader.report().usage
        } else {
            let mut reader = BodyReader::new(capture.endpoint, None);
            reader.push(&capture.body);
            reader.finish().map(|reported| reported.usage)
        };
        let expected = usage_in(&capture);
        assert_eq!(
            usage.map(|usage| (usage.input_tokens, usage.output_tokens)),
            expected,
            "{}",
            capture.name
        );
        found += usize::from(expected.is_some());
    }
    assert!(found > 60, "{found}");
}

#[test]
fn the_choices_of_a_captured_stream_that_report_their_own_usage_are_summed() {
    let capture = captures().into_iter().find(|capture| capture.name == "llamacpp/chat_n2_stream").unwrap();
    let mut reader = StreamReader::new(capture.endpoint, false).summing_choices();
    reader.push(capture.body);
    // 25 tokens in, 24 of them from the cache, and twice 4 out.
    assert_eq!(reader.report().usage, Some(Usage::new(25, 8).with_cached(24)));
}

/// What a client gets of a stream cut at `cuts`, and what we learn from it.
fn streamed(
    endpoint: Endpoint,
    strip: bool,
    body: &Bytes,
    cuts: &[usize],
) -> (Vec<u8>, Report, StreamReader) {
    let mut reader = StreamReader::new(endpoint, strip);
    let mut passed = Vec::new();
    let mut from = 0;
    for cut in cuts.iter().copied().chain([body.len()]) {
        passed.extend_from_slice(&reader.push(body.slice(from..cut)));
        from = cut;
    }
    passed.extend_from_slice(&reader.finish());
    (passed, reader.report().clone(), reader)
}

/// The stream without the events that only report usage, by lines and by serde.
fn without_usage(body: &Bytes) -> Vec<u8> {
    let text = String::from_utf8(body.to_vec()).unwrap();
    let is_usage = |event: &str| {
        let value =
            event.strip_prefix("data: ").and_then(|data| serde_json::from_str::<Value>(data.trim_end()).ok());
        value.is_some_and(|value| {
            value["usage"].is_object() && value["choices"].as_array().is_some_and(Vec::is_empty)
        })
    };
    text.split_inclusive("\n\n").filter(|event| !is_usage(event)).collect::<String>().into_bytes()
}

/// Every position of a stream; of a long one those near its ends, between which it repeats itself.
fn cuts(length: usize) -> impl Iterator<Item = usize> {
    const LONG: usize = 6_000;
    (0..=length).filter(move |cut| length <= LONG || *cut < 1_000 || length - cut < 2_000)
}

#[test]
fn captured_streams_pass_the_same_and_report_the_same_however_they_are_cut() {
    let streams: Vec<Capture> =
        captures().into_iter().filter(|capture| capture.is_stream && capture.is_ok).collect();
    assert!(streams.len() >= 14, "{}", streams.len());
    for stream in &streams {
        let stripped = without_usage(&stream.body);
        let (_, report, _) = streamed(stream.endpoint, false, &stream.body, &[]);
        for cut in cuts(stream.body.len()) {
            for (strip, expected) in [(false, &stream.body[..]), (true, &stripped[..])] {
                let (passed, cut_report, _) = streamed(stream.endpoint, strip, &stream.body, &[cut]);
                assert!(passed == expected, "{} cut at {cut}, strip {strip}", stream.name);
                assert_eq!(cut_report, report, "{} cut at {cut}", stream.name);
            }
        }
        let everywhere: Vec<usize> = (0..stream.body.len()).collect();
        let (passed, cut_report, _) = streamed(stream.endpoint, true, &stream.body, &everywhere);
        assert!(passed == stripped, "{} byte by byte", stream.name);
        assert_eq!(cut_report, report, "{} byte by byte", stream.name);
    }
}

#[test]
fn every_pair_of_cuts_removes_the_usage_chunk_and_nothing_else() {
    let capture = captures().into_iter().find(|capture| capture.name == "vllm/chat_stream_usage").unwrap();
    let newlines = |newline: &str| String::from_utf8(capture.body.to_vec()).unwrap().replace('\n', newline);
    let stripped = String::from_utf8(without_usage(&capture.body)).unwrap();
    for newline in ["\n", "\r", "\r\n"] {
        let body = Bytes::from(newlines(newline));
        let expected = stripped.replace('\n', newline).into_bytes();
        let start = memchr::memmem::find(&body, b"\"choices\":[],").unwrap() - 200;
        let end = (start + 480).min(body.len());
        for first in start..end {
            for second in (first..end).step_by(3) {
                let (passed, report, _) = streamed(Endpoint::ChatCompletions, true, &body, &[first, second]);
                assert!(passed == expected, "{newline:?} cut at {first} and {second}");
                assert_eq!(report.usage, Some(Usage::new(25, 8)));
            }
        }
    }
}

#[test]
fn captured_streams_show_how_they_ended() {
    let complete = |name: &str| {
        let capture = captures().into_iter().find(|capture| capture.name == name).unwrap();
        let (_, report, reader) = streamed(capture.endpoint, false, &capture.body, &[]);
        (reader.is_complete(), report)
    };
    for name in [
        "vllm/chat_stream",
        "llamacpp/chat_n2_stream",
        "vllm/responses_stream",
        "llamacpp/completions_stream",
    ] {
        assert!(complete(name).0, "{name}");
    }
    let (is_complete, report) = complete("vllm/engine_death_stream");
    assert!(!is_complete && report.saw_error && report.saw_done, "[DONE] is no proof of success");
}

#[test]
fn produced_text_is_what_the_deltas_say() {
    for capture in captures().into_iter().filter(|capture| capture.is_stream && capture.is_ok) {
        let text = String::from_utf8(capture.body.to_vec()).unwrap();
        let mut expected = String::new();
        for data in text.lines().filter_map(|line| line.strip_prefix("data: ")) {
            let Ok(value) = serde_json::from_str::<Value>(data) else { continue };
            expected += value["delta"].as_str().unwrap_or_default();
            for choice in value["choices"].as_array().into_iter().flatten() {
                let call = &choice["delta"]["tool_calls"][0]["function"];
                for part in [&choice["text"], &choice["delta"]["content"], &call["name"], &call["arguments"]]
                {
                    expected += part.as_str().unwrap_or_default();
                }
            }
        }
        let (_, report, reader) = streamed(capture.endpoint, false, &capture.body, &[]);
        let mut ours: Vec<char> = reader.produced_text().chars().collect();
        let mut theirs: Vec<char> = expected.chars().collect();
        // Members of a delta may stand in any order.
        ours.sort_unstable();
        theirs.sort_unstable();
        assert_eq!(ours, theirs, "{}", capture.name);
        assert!(report.output_text_bytes >= expected.len() as u64, "{}", capture.name);
    }
}

#[test]
fn no_more_is_held_back_than_may_prove_to_be_the_usage_chunk() {
    let mut reader = StreamReader::new(Endpoint::ChatCompletions, true);
    let endless = Bytes::from(format!("data: {{\"id\":\"{}", "x".repeat(2 * MAX_HELD_BYTES)));
    let mut held_most = 0;
    let mut passed = 0;
    for (at, piece) in endless.chunks(1000).enumerate() {
        passed += reader.push(Bytes::copy_from_slice(piece)).len();
        held_most = held_most.max(((at + 1) * 1000).min(endless.len()) - passed);
    }
    assert!(held_most <= MAX_HELD_BYTES, "{held_most}");
    assert_eq!(passed, endless.len(), "what cannot be it is let go at once");
}
