//! Rate limits as `OpenAI` announces them, so that traffic moves away before it is refused.
//!
//! The headers are `x-ratelimit-{limit,remaining,reset}-{requests,tokens}`; `reset` is the time until the
//! allowance is full again (`1s`, `6m0s`, `8.64s`, `20ms`), and it refills evenly meanwhile. When less than
//! [`LOW_PERCENT`] is left we wait until [`REFILLED_PERCENT`] is there again.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http::{HeaderMap, HeaderName};

use crate::economics::Timestamp;

/// Below this share of the allowance a backend counts as throttled.
pub const LOW_PERCENT: u64 = 1;
/// It counts as throttled until this share is there again.
pub const REFILLED_PERCENT: u64 = 5;
/// A longer reset is cut to this.
pub const MAX_THROTTLE: Duration = Duration::from_mins(10);

/// What a backend's answers say about its rate limits.
#[derive(Debug, Default)]
pub struct Throttle {
    until: AtomicU64,
}

impl Throttle {
    /// Reads the headers of an answer. `now` is asked when one of them says that an allowance is nearly used up.
    pub fn observe(&self, now: impl FnOnce() -> Timestamp, headers: &HeaderMap) {
        let wait =
            [&REQUESTS, &TOKENS].into_iter().filter_map(|names| allowance(headers, names)?.wait()).max();
        if let Some(wait) = wait {
            self.until.fetch_max((now() + wait.min(MAX_THROTTLE)).as_millis(), Ordering::Relaxed);
        }
    }

    /// Until when calls should rather go elsewhere; none if there is allowance.
    pub fn throttled_until(&self, now: Timestamp) -> Option<Timestamp> {
        let until = Timestamp::from_millis(self.until.load(Ordering::Relaxed));
        (until > now).then_some(until)
    }
}

/// One allowance as announced in an answer.
#[derive(Debug, PartialEq, Eq)]
struct Allowance {
    limit: Option<u64>,
    remaining: u64,
    reset: Duration,
}

impl Allowance {
    /// How long to wait; none when enough is left.
    fn wait(&self) -> Option<Duration> {
        let Some(limit) = self.limit.filter(|limit| *limit > self.remaining) else {
            return (self.remaining == 0).then_some(self.reset);
        };
        if self.remaining > 0 && self.remaining.saturating_mul(100) >= limit.saturating_mul(LOW_PERCENT) {
            return None;
        }
        let refilled = (limit.saturating_mul(REFILLED_PERCENT) / 100).max(1);
        let missing = u128::from(refilled.saturating_sub(self.remaining));
        let millis =
            self.reset.as_millis().saturating_mul(missing).div_ceil(u128::from(limit - self.remaining));
        Some(Duration::from_millis(u64::try_from(millis).unwrap_or(u64::MAX)))
    }
}

/// The headers of one allowance, named once: every answer is looked at.
struct Names {
    limit: HeaderName,
    remaining: HeaderName,
    reset: HeaderName,
}

static REQUESTS: Names = Names {
    limit: HeaderName::from_static("x-ratelimit-limit-requests"),
    remaining: HeaderName::from_static("x-ratelimit-remaining-requests"),
    reset: HeaderName::from_static("x-ratelimit-reset-requests"),
};

static TOKENS: Names = Names {
    limit: HeaderName::from_static("x-ratelimit-limit-tokens"),
    remaining: HeaderName::from_static("x-ratelimit-remaining-tokens"),
    reset: HeaderName::from_static("x-ratelimit-reset-tokens"),
};

fn allowance(headers: &HeaderMap, names: &Names) -> Option<Allowance> {
    let text = |name: &HeaderName| headers.get(name)?.to_str().ok();
    let remaining = text(&names.remaining)?;
    Some(Allowance {
        limit: text(&names.limit).and_then(|limit| limit.trim().parse().ok()),
        remaining: remaining.trim().parse().ok()?,
        reset: duration(text(&names.reset)?)?,
    })
}

/// `1h2m3.5s`, `20ms`, or plain seconds. None when it is neither, or beyond a year.
fn duration(text: &str) -> Option<Duration> {
    const YEAR_SECONDS: f64 = 366.0 * 86_400.0;
    let mut rest = text.trim();
    let mut seconds = 0.0;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits =
            rest.find(|letter: char| !letter.is_ascii_digit() && letter != '.').unwrap_or(rest.len());
        let (number, tail) = rest.split_at(digits);
        let letters = tail.find(|letter: char| letter.is_ascii_digit()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(letters);
        let scale = match unit {
            "ms" => 0.001,
            "" | "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            "d" => 86_400.0,
            _ => return None,
        };
        seconds += number.parse::<f64>().ok()? * scale;
        rest = tail;
    }
    (seconds <= YEAR_SECONDS).then(|| Duration::from_secs_f64(seconds))
}

/// The wait that `retry-after-ms`, or `retry-after` in seconds or as an HTTP date (RFC 9110, 10.2.3), asks for.
pub fn retry_after(now: Timestamp, headers: &HeaderMap) -> Option<Duration> {
    let text = |name: &str| headers.get(name)?.to_str().ok();
    let millis = text("retry-after-ms").and_then(|text| duration(&format!("{}ms", text.trim())));
    millis.or_else(|| {
        let asked = text("retry-after")?;
        duration(asked).or_else(|| until_date(now, asked))
    })
}

/// The time until an HTTP date; none at all if it has passed.
fn until_date(now: Timestamp, date: &str) -> Option<Duration> {
    let at = jiff::fmt::rfc2822::parse(date.trim()).ok()?.timestamp();
    let at = u64::try_from(at.as_millisecond()).ok()?;
    Some(Duration::from_millis(at.saturating_sub(now.as_millis())))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| ((*name).parse().unwrap(), HeaderValue::from_static(value)))
            .collect()
    }

    fn wait(pairs: &[(&'static str, &'static str)]) -> Option<u64> {
        let now = Timestamp::from_secs(1_000);
        let throttle = Throttle::default();
        throttle.observe(|| now, &headers(pairs));
        Some(u64::try_from(throttle.throttled_until(now)?.since(now).as_millis()).unwrap())
    }

    #[test]
    fn durations_are_read_as_openai_writes_them() {
        let millis = |text| duration(text).map(|duration| duration.as_millis());
        assert_eq!(millis("1s"), Some(1_000));
        assert_eq!(millis("6m0s"), Some(360_000));
        assert_eq!(millis("8.64s"), Some(8_640));
        assert_eq!(millis("20ms"), Some(20));
        assert_eq!(millis("1h2m3s"), Some(3_723_000));
        assert_eq!(millis("7"), Some(7_000));
        for odd in
            ["", "s", "1y", "soon", "-1s", "1.2.3s", "999999999999999d", "Wed, 21 Oct 2026 07:28:00 GMT"]
        {
            assert_eq!(millis(odd), None, "{odd}");
        }
    }

    #[test]
    fn an_empty_allowance_waits_until_five_percent_is_refilled() {
        let wait = wait(&[
            ("x-ratelimit-limit-requests", "100"),
            ("x-ratelimit-remaining-requests", "0"),
            ("x-ratelimit-reset-requests", "60s"),
        ]);
        assert_eq!(wait, Some(3_000));
    }

    #[test]
    fn a_nearly_empty_token_allowance_counts_although_requests_are_left() {
        let wait = wait(&[
            ("x-ratelimit-limit-requests", "100"),
            ("x-ratelimit-remaining-requests", "99"),
            ("x-ratelimit-reset-requests", "600ms"),
            ("x-ratelimit-limit-tokens", "1000"),
            ("x-ratelimit-remaining-tokens", "9"),
            ("x-ratelimit-reset-tokens", "59.46s"),
        ]);
        assert_eq!(wait, Some(2_460));
    }

    #[test]
    fn enough_allowance_and_unreadable_headers_throttle_nothing() {
        assert_eq!(wait(&[("x-ratelimit-remaining-tokens", "12"), ("x-ratelimit-reset-tokens", "9s")]), None);
        assert_eq!(
            wait(&[("x-ratelimit-remaining-tokens", "none"), ("x-ratelimit-reset-tokens", "9s")]),
            None
        );
        assert_eq!(wait(&[("x-ratelimit-remaining-tokens", "0")]), None);
    }

    #[test]
    fn without_a_limit_only_nothing_left_counts_and_waits_for_the_whole_reset() {
        assert_eq!(
            wait(&[("x-ratelimit-remaining-tokens", "0"), ("x-ratelimit-reset-tokens", "9s")]),
            Some(9_000)
        );
    }

    #[test]
    fn retry_after_is_read_in_seconds_and_in_milliseconds() {
        let wait = |pairs| retry_after(Timestamp::from_secs(1_000), &headers(pairs));
        assert_eq!(wait(&[("retry-after", "3")]), Some(Duration::from_secs(3)));
        let both = [("retry-after", "3"), ("retry-after-ms", "2500")];
        assert_eq!(wait(&both), Some(Duration::from_millis(2500)));
        assert_eq!(wait(&[("retry-after", "soon")]), None);
    }

    #[test]
    fn retry_after_may_be_a_date() {
        let date = headers(&[("retry-after", "Wed, 21 Oct 2026 07:28:00 GMT")]);
        let at = 1_792_567_680;
        assert_eq!(retry_after(Timestamp::from_secs(at - 90), &date), Some(Duration::from_secs(90)));
        assert_eq!(retry_after(Timestamp::from_secs(at + 90), &date), Some(Duration::ZERO));
    }

    proptest! {
        #[test]
        fn any_header_text_is_read_without_panic_and_within_the_bound(text in "[ -~]{0,24}", left in 0_u64..2) {
            let mut given = HeaderMap::new();
            given.insert("x-ratelimit-remaining-tokens", left.into());
            given.insert("x-ratelimit-reset-tokens", HeaderValue::from_str(&text).unwrap());
            given.insert("x-ratelimit-limit-tokens", HeaderValue::from_static("1000"));
            let now = Timestamp::from_secs(1_000);
            let throttle = Throttle::default();
            throttle.observe(|| now, &given);
            let wait = throttle.throttled_until(now).map_or(Duration::ZERO, |until| until.since(now));
            prop_assert!(wait <= MAX_THROTTLE);
        }
    }
}
