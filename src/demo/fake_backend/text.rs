//! Words and token counts: every reply is made of words that are one token each, so the fake knows exactly
//! what it produced.

use serde_json::Value;

/// Longest path of `$ref`s and nested objects that is followed in a schema.
const MAX_SCHEMA_DEPTH: usize = 16;

/// Each is a single token with a space before it; a reply of n tokens is n of them.
const WORDS: [&str; 32] = [
    " the", " and", " of", " to", " in", " that", " with", " for", " on", " this", " from", " you", " are",
    " not", " can", " one", " all", " time", " people", " water", " work", " right", " house", " world",
    " under", " name", " line", " small", " large", " because", " before", " after",
];

/// Tokens of a text in the vocabulary of the gpt-4o family.
pub(super) fn count(text: &str) -> u64 {
    bpe_openai::o200k_base().count(text) as u64
}

/// Tokens of a chat's messages by OpenAI's published recipe: 3 a message, 1 a name, 3 for the reply.
pub(super) fn count_messages(messages: &[Value]) -> u64 {
    let message = |message: &Value| {
        let text = |key: &str| message.get(key).map_or(0, count_content);
        let named = u64::from(message.get("name").is_some());
        let calls = message.get("tool_calls").map_or(0, |calls| count(&calls.to_string()));
        3 + text("role") + text("content") + text("name") + named + calls
    };
    3 + messages.iter().map(message).sum::<u64>()
}

/// Tokens of a message's content: a string, or parts of which text is counted and an image is 85 tokens.
pub(super) fn count_content(content: &Value) -> u64 {
    match content {
        Value::String(text) => count(text),
        Value::Array(parts) => parts.iter().map(count_part).sum(),
        _ => 0,
    }
}

fn count_part(part: &Value) -> u64 {
    match part {
        Value::String(text) => count(text),
        Value::Number(_) => 1,
        Value::Array(ids) => ids.len() as u64,
        _ => match (part.get("text"), part.get("content")) {
            (Some(Value::String(text)), _) => count(text),
            (_, Some(content)) => count_content(content),
            _ => 85,
        },
    }
}

/// The words of a reply of `tokens` tokens; the same seed says the same.
pub fn words(seed: u64, tokens: u64) -> impl Iterator<Item = &'static str> {
    (0..tokens).map(move |position| {
        let mixed = (seed ^ position).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 59;
        WORDS[usize::try_from(mixed).unwrap_or(0) % WORDS.len()]
    })
}

/// A text cut into the pieces in which a server streams it: whole words, with how many tokens each is worth.
/// The pieces' tokens add up to the text's.
pub(super) fn pieces(text: &str) -> Vec<(String, u64)> {
    let mut pieces = Vec::new();
    let mut start = 0;
    let mut counted = 0;
    for (end, _) in text.char_indices().filter(|(_, letter)| matches!(letter, ' ' | ',' | '{')).skip(1) {
        if end > start {
            let upto = count(&text[..end]);
            pieces.push((text[start..end].to_owned(), upto.saturating_sub(counted)));
            counted = counted.max(upto);
            start = end;
        }
    }
    pieces.push((text[start..].to_owned(), count(text).saturating_sub(counted)));
    pieces
}

/// A seed from a request, so that equal requests get equal replies.
pub(super) fn seed(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// A value that satisfies a JSON schema of the kind that structured outputs allow.
pub(super) fn instance(schema: &Value) -> Value {
    instance_of(schema, schema, 0)
}

fn instance_of(root: &Value, schema: &Value, depth: usize) -> Value {
    if depth > MAX_SCHEMA_DEPTH {
        return Value::Null;
    }
    let inner = |schema: &Value| instance_of(root, schema, depth + 1);
    if let Some(target) = schema.get("$ref").and_then(Value::as_str) {
        return root.pointer(target.trim_start_matches('#')).map_or(Value::Null, inner);
    }
    if let Some(constant) = schema.get("const") {
        return constant.clone();
    }
    if let Some(first) =
        ["enum", "anyOf", "oneOf"].iter().find_map(|key| schema.get(*key)?.as_array()?.first())
    {
        return if schema.get("enum").is_some() { first.clone() } else { inner(first) };
    }
    let number = |key: &str| schema.get(key).and_then(Value::as_f64);
    match type_of(schema) {
        "object" => {
            let properties = schema.get("properties").and_then(Value::as_object);
            let members =
                properties.into_iter().flatten().map(|(name, schema)| (name.clone(), inner(schema)));
            Value::Object(members.collect())
        }
        "array" => {
            let length = schema.get("minItems").and_then(Value::as_u64).unwrap_or(1).min(64);
            Value::Array((0..length).map(|_| schema.get("items").map_or(Value::Null, inner)).collect())
        }
        "integer" => {
            let least = schema.get("minimum").and_then(Value::as_i64);
            Value::from(least.or(schema.get("maximum").and_then(Value::as_i64)).unwrap_or(7))
        }
        "number" => Value::from(number("minimum").or(number("maximum")).unwrap_or(1.5)),
        "boolean" => Value::from(true),
        "null" => Value::Null,
        _ => Value::from(match schema.get("format").and_then(Value::as_str) {
            Some("date") => "2026-11-25",
            Some("date-time") => "2026-11-25T12:00:00Z",
            Some("email") => "someone@example.com",
            _ => "the right time",
        }),
    }
}

fn type_of(schema: &Value) -> &str {
    match schema.get("type") {
        Some(Value::String(name)) => name,
        Some(Value::Array(names)) => names.first().and_then(Value::as_str).unwrap_or("string"),
        _ if schema.get("properties").is_some() => "object",
        _ => "string",
    }
}

/// Base64 with padding, the form in which embeddings and audio travel.
pub(super) fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut encoded = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let byte = |index: usize| u32::from(group.get(index).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for position in 0..4 {
            let sextet = (bits >> (18 - 6 * position)) & 63;
            let letter = char::from(ALPHABET[sextet as usize]);
            encoded.push(if position <= group.len() { letter } else { '=' });
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_reply_of_n_tokens_counts_n_tokens() {
        for (seed, tokens) in [(1, 1), (2, 2), (3, 17), (4, 300)] {
            let text: String = words(seed, tokens).collect();
            assert_eq!(count(&text), tokens, "{text}");
        }
    }

    #[test]
    fn pieces_add_up_to_the_text_and_to_its_tokens() {
        let text = r#"{"city":"the right time","days":[7, 8],"warm":true}"#;
        let pieces = pieces(text);
        assert_eq!(pieces.iter().map(|(piece, _)| piece.as_str()).collect::<String>(), text);
        assert_eq!(pieces.iter().map(|(_, tokens)| tokens).sum::<u64>(), count(text));
    }

    #[test]
    fn a_schema_is_met_with_references_enums_and_nesting() {
        let schema = json!({"type":"object","properties":{
            "unit":{"enum":["c","f"]}, "days":{"type":"array","minItems":2,"items":{"$ref":"#/$defs/day"}},
            "note":{"type":["string","null"]}, "ratio":{"type":"number","minimum":0}},
            "$defs":{"day":{"type":"object","properties":{"high":{"type":"integer"}}}}});
        let expected = json!({"unit":"c","days":[{"high":7},{"high":7}],"note":"the right time","ratio":0.0});
        assert_eq!(instance(&schema), expected);
    }

    #[test]
    fn base64_pads_as_rfc_4648_shows() {
        for (bytes, encoded) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg==")]
        {
            assert_eq!(base64(bytes.as_bytes()), encoded);
        }
    }
}
