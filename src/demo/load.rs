//! The applications of the demo: made-up chats, sent to the proxy at the day's rate whether or not earlier ones
//! are answered.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE};
use http::{Method, Request};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::json;
use tokio::task::JoinSet;

use super::day::Day;
use super::fake_backend::words;
use super::stage::TEAMS;
use crate::clock::{Clock, Stopwatch};
use crate::economics::Timestamp;

/// Chats that differ; each call is one of them.
const CHATS: u64 = 64;
/// One chat in so many is streamed.
const STREAMED: u64 = 8;
/// So many chats of ten are the first team's.
const FIRST_TEAM_IN_TEN: usize = 6;
/// Calls that are open at once; beyond it a call is skipped and counted.
const MAX_OPEN: usize = 512;
/// With so many open the machine is behind, and a clock that we move stands still until it has caught up.
const MAX_OPEN_IN_TIME: usize = 64;
/// A clock that we move goes on by so much real time in one step, however long the machine was stalled.
const LONGEST_STEP: Duration = Duration::from_millis(20);
/// How often it looks whether calls are due.
const TICK: Duration = Duration::from_millis(5);
/// A call that takes longer has failed.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// What became of the calls.
#[derive(Debug, Default)]
pub struct Sent {
    pub succeeded: AtomicU64,
    pub failed: AtomicU64,
    /// Not sent, because too many were open.
    pub skipped: AtomicU64,
}

/// Sends a day's calls until `end` or until it is dropped.
#[derive(Debug)]
pub struct Load {
    client: Client<HttpConnector, Full<Bytes>>,
    url: String,
    clock: Clock,
    midnight: Timestamp,
    day: Day,
    bodies: Vec<Bytes>,
    pub sent: Arc<Sent>,
}

impl Load {
    /// `base_url` ends in `/v1`; `midnight` is when the day began on `clock`.
    pub fn new(base_url: &str, model: &str, clock: Clock, midnight: Timestamp, day: Day) -> Self {
        let bodies = (0..CHATS).map(|number| chat(model, day, number)).collect();
        Self {
            client: Client::builder(TokioExecutor::new()).build_http(),
            url: format!("{base_url}/chat/completions"),
            clock,
            midnight,
            day,
            bodies,
            sent: Arc::default(),
        }
    }

    /// Moves the clock if it is one that is moved: a day on a slow machine takes longer, and is the same day.
    pub async fn run(&self, end: Timestamp) {
        let mut open = JoinSet::new();
        let mut random = fastrand::Rng::with_seed(1);
        let mut ticks = tokio::time::interval(TICK);
        let mut last = self.clock.now();
        let mut owed = 0.0;
        let mut step = Stopwatch::start();
        while last < end {
            ticks.tick().await;
            let passed = step.elapsed().min(LONGEST_STEP);
            step = Stopwatch::start();
            if open.len() < MAX_OPEN_IN_TIME {
                self.clock.advance(self.clock.scaled(passed));
            }
            let now = self.clock.now();
            owed +=
                self.day.calls_per_hour(now.since(self.midnight)) * now.since(last).as_secs_f64() / 3600.0;
            last = now;
            while open.try_join_next().is_some() {}
            while owed >= 1.0 {
                owed -= 1.0;
                if open.len() < MAX_OPEN {
                    open.spawn(self.call(random.usize(..self.bodies.len())));
                } else {
                    self.sent.skipped.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        while open.join_next().await.is_some() {}
    }

    fn call(&self, number: usize) -> impl Future<Output = ()> + Send + 'static {
        let request = Request::builder()
            .method(Method::POST)
            .uri(&self.url)
            .header(CONTENT_TYPE, "application/json")
            .header(AUTHORIZATION, "Bearer sk-demo")
            .header("x-breakeven-tags", format!("team={}", team(number)))
            .body(Full::new(self.bodies[number].clone()));
        let (client, sent) = (self.client.clone(), Arc::clone(&self.sent));
        async move {
            let answered = async {
                let response = client.request(request.ok()?).await.ok()?;
                let succeeded = response.status().is_success();
                response.into_body().collect().await.ok()?;
                succeeded.then_some(())
            };
            let succeeded = matches!(tokio::time::timeout(CALL_TIMEOUT, answered).await, Ok(Some(())));
            let counter = if succeeded { &sent.succeeded } else { &sent.failed };
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Whose application sends a chat.
fn team(number: usize) -> &'static str {
    TEAMS[usize::from(number % 10 >= FIRST_TEAM_IN_TEN)]
}

/// A chat of about the tokens that the day wants of it.
#[expect(clippy::cast_precision_loss, reason = "a number below 64")]
fn chat(model: &str, day: Day, number: u64) -> Bytes {
    let (input, output) = day.call_size(number as f64 / (CHATS - 1) as f64);
    let text: String = words(number, input.saturating_sub(8).max(1)).collect();
    let mut body =
        json!({"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": output});
    if number.is_multiple_of(STREAMED) {
        body["stream"] = true.into();
    }
    Bytes::from(body.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::day::SPEED_OF_A_MINUTE;
    use crate::demo::{FakeBackend, Personality, Settings};

    #[tokio::test]
    async fn ten_minutes_of_noon_are_sent_in_size_and_number() {
        let fake = FakeBackend::start(
            Personality::OpenAi,
            Settings { output_tokens: 10_000, ..Settings::default() },
        )
        .await
        .unwrap();
        let day = Day::at_speed(SPEED_OF_A_MINUTE);
        let midnight = Timestamp::from_millis(0);
        let clock = Clock::accelerated(midnight + Duration::from_hours(12), SPEED_OF_A_MINUTE);
        let end = clock.now() + Duration::from_mins(10);
        let load = Load::new(&fake.url(), "gpt-4o", clock, midnight, day);
        load.run(end).await;

        let totals = fake.totals();
        let expected = day.calls_per_hour(Duration::from_hours(12)) / 6.0;
        let calls = f64::from(u32::try_from(totals.requests).unwrap());
        assert!((calls / expected - 1.0).abs() < 0.25, "{calls} calls, {expected} expected");
        assert_eq!(load.sent.succeeded.load(Ordering::Relaxed), totals.requests);
        let input = totals.usage.input_tokens / totals.requests;
        assert!((2_000..3_000).contains(&input), "{input} input tokens a call");
    }
}
