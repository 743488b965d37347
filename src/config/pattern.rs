//! Text that differs from replica to replica, as `http://127.0.0.1:{8000+replica}/v1`.

/// Replaces `{replica}` by the replica's number and `{8000+replica}` by the sum.
pub fn expand(pattern: &str, replica: u32) -> String {
    let mut expanded = String::with_capacity(pattern.len());
    let mut rest = pattern;
    while let Some((before, after)) = rest.split_once('{') {
        expanded.push_str(before);
        let filled =
            after.split_once('}').and_then(|(inside, after)| Some((number(inside, replica)?, after)));
        let (text, after) =
            filled.map_or(("{".to_owned(), after), |(number, after)| (number.to_string(), after));
        expanded.push_str(&text);
        rest = after;
    }
    expanded.push_str(rest);
    expanded
}

/// Whether each replica has an address of its own by a pattern.
pub fn is_pattern(url: &str) -> bool {
    expand(url, 0) != expand(url, 1)
}

fn number(inside: &str, replica: u32) -> Option<u64> {
    let base = match inside.strip_suffix("replica")? {
        "" => 0,
        sum => sum.strip_suffix('+')?.trim().parse().ok()?,
    };
    u64::from(replica).checked_add(base)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_gives_each_replica_its_address() {
        assert_eq!(expand("http://127.0.0.1:{8000+replica}/v1", 3), "http://127.0.0.1:8003/v1");
        assert_eq!(expand("http://vllm-{replica}.vllm:8000/v1", 2), "http://vllm-2.vllm:8000/v1");
        assert_eq!(
            expand("{\"a\": {replica}, \"b\": \"{x+replica}\"}", 1),
            "{\"a\": 1, \"b\": \"{x+replica}\"}"
        );
        assert!(is_pattern("http://h{replica}") && !is_pattern("http://h"));
    }
}
