//! The queue inside the model server, read from its own metrics: vLLM's and llama.cpp's.
//!
//! Neither server refuses calls when it is full, it lets them wait; who wants to overflow early has to look.

use std::time::Duration;

/// Longest metrics page that is read.
pub const MAX_PAGE_BYTES: usize = 4 << 20;

/// What a server says of its queue.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Queue {
    pub running: u32,
    pub waiting: u32,
    /// Share of the KV cache in use, 0 to 1; llama.cpp does not say.
    pub cache_usage: Option<f64>,
}

/// Reads a page in Prometheus' text format; engines of one server (data parallel) are added up, and of their
/// caches the fullest counts. None when neither server's queue is on it.
pub fn parse(page: &str) -> Option<Queue> {
    let mut queue = Queue::default();
    let mut found = false;
    for (name, value) in page.lines().filter_map(sample) {
        match name {
            "vllm:num_requests_running" | "llamacpp:requests_processing" => queue.running += count(value),
            "vllm:num_requests_waiting" | "llamacpp:requests_deferred" => {
                queue.waiting = queue.waiting.saturating_add(count(value));
                found = true;
            }
            "vllm:kv_cache_usage_perc" => {
                queue.cache_usage = Some(queue.cache_usage.unwrap_or(0.0).max(value.clamp(0.0, 1.0)));
            }
            _ => {}
        }
    }
    found.then_some(queue)
}

/// `name{labels} value [timestamp]` → name and value.
fn sample(line: &str) -> Option<(&str, f64)> {
    if line.starts_with('#') {
        return None;
    }
    let (name, rest) = match line.split_once('{') {
        // A label's value may hold a brace, the value after the last one may not.
        Some((name, rest)) => (name, rest.rsplit_once('}')?.1),
        None => line.split_once(' ')?,
    };
    let value = rest.split_ascii_whitespace().next()?.parse::<f64>().ok()?;
    value.is_finite().then_some((name, value))
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to the range of u32")]
fn count(value: f64) -> u32 {
    value.clamp(0.0, f64::from(u32::MAX)) as u32
}

/// Fetches and reads the page; none when it cannot be had, which is not worth more than a stale reading.
pub(super) async fn fetch(client: &reqwest::Client, url: &str, timeout: Duration) -> Option<Queue> {
    let answer = client.get(url).timeout(timeout).send().await.ok()?;
    if !answer.status().is_success() {
        return None;
    }
    let page = http_body_util::Limited::new(reqwest::Body::from(answer), MAX_PAGE_BYTES);
    let page = http_body_util::BodyExt::collect(page).await.ok()?.to_bytes();
    parse(std::str::from_utf8(&page).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const VLLM: &str = include_str!("../../tests/data/server_metrics/vllm.txt");
    const LLAMA_CPP: &str = include_str!("../../tests/data/server_metrics/llamacpp.txt");

    #[test]
    fn an_idle_vllm_is_read() {
        assert_eq!(parse(VLLM), Some(Queue { running: 0, waiting: 0, cache_usage: Some(0.0) }));
    }

    #[test]
    fn an_idle_llama_cpp_is_read() {
        assert_eq!(parse(LLAMA_CPP), Some(Queue { running: 0, waiting: 0, cache_usage: None }));
    }

    #[test]
    fn a_busy_vllm_is_read_and_the_breakdown_by_reason_is_not_added_again() {
        let busy = VLLM
            .replace(
                "num_requests_waiting{engine=\"0\",model_name=\"tiny-llama\"} 0.0",
                "num_requests_waiting{engine=\"0\",model_name=\"tiny-llama\"} 7.0",
            )
            .replace("reason=\"capacity\"} 0.0", "reason=\"capacity\"} 7.0")
            .replace(
                "kv_cache_usage_perc{engine=\"0\",model_name=\"tiny-llama\"} 0.0",
                "kv_cache_usage_perc{engine=\"0\",model_name=\"tiny-llama\"} 0.93",
            );
        assert_eq!(parse(&busy), Some(Queue { running: 0, waiting: 7, cache_usage: Some(0.93) }));
    }

    #[test]
    fn several_engines_are_added_up() {
        let page = "vllm:num_requests_running{engine=\"0\"} 3\nvllm:num_requests_running{engine=\"1\"} 4\n\
                    vllm:num_requests_waiting{engine=\"0\"} 1\nvllm:num_requests_waiting{engine=\"1\"} 2\n";
        assert_eq!(parse(page), Some(Queue { running: 7, waiting: 3, cache_usage: None }));
    }

    #[test]
    fn a_page_of_another_program_or_with_odd_values_has_no_queue() {
        for page in
            ["", "up 1\n", "vllm:num_requests_waiting NaN\n", "vllm:num_requests_waiting\n", "{} {} 1"]
        {
            assert_eq!(parse(page), None, "{page:?}");
        }
    }
}
