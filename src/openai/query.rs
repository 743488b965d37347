//! Query strings.

/// A value of a query string, with its percent-escapes decoded.
pub fn query_value(query: &str, name: &str) -> Option<String> {
    let value = query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))?;
    Some(decode(value)).filter(|value| !value.is_empty())
}

fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        let escaped = (*first == b'%').then(|| std::str::from_utf8(after.get(..2)?).ok()).flatten();
        match (first, escaped.and_then(|digits| u8::from_str_radix(digits, 16).ok())) {
            (_, Some(byte)) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            (b'+', None) => {
                bytes.push(b' ');
                rest = after;
            }
            (byte, None) => {
                bytes.push(*byte);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_value_is_found_and_decoded() {
        let query = "since=2026-11-25T00%3A00%3A00Z&by=day,tag%3Ax&empty=&plus=a+b";
        assert_eq!(query_value(query, "since").unwrap(), "2026-11-25T00:00:00Z");
        assert_eq!(query_value(query, "by").unwrap(), "day,tag:x");
        assert_eq!(query_value(query, "plus").unwrap(), "a b");
        assert_eq!(query_value(query, "empty"), None);
        assert_eq!(query_value(query, "absent"), None);
    }
}
