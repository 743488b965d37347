//! One ramp: calls of one kind, twice as many at a time with every step.

use std::time::Duration;

use anyhow::{Context as _, bail};
use rustls::pki_types::CertificateDer;
use serde_json::json;
use tokio::task::JoinSet;

use crate::clock::Stopwatch;
use crate::config::Secret;
use crate::health::probe;
use crate::openai::{Endpoint, StreamReader};

/// Words of a long prompt: some two thousand tokens.
const LONG_PROMPT_WORDS: usize = 1500;
const SHORT_PROMPT_WORDS: usize = 8;
/// Tokens of a long answer: long enough that its pace outweighs its beginning.
const LONG_ANSWER_TOKENS: u32 = 128;
/// Calls of a step, for each that is under way at a time.
const ROUNDS: u32 = 2;
/// A step that gains less than this over the one before is the last.
const WORTHWHILE_GAIN: f64 = 1.05;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const CALL_TIMEOUT: Duration = Duration::from_mins(2);

/// What is measured.
#[derive(Debug, Clone)]
pub(super) struct Target {
    pub(super) url: String,
    pub(super) model: String,
    pub(super) key: Option<Secret>,
    /// What its certificate is verified against, besides the system's authorities.
    pub(super) authorities: Vec<CertificateDer<'static>>,
    /// A number of this run, so that its prompts are new to a server's prompt cache.
    pub(super) run: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Long prompts, one token of answer.
    Input,
    /// Short prompts, long answers.
    Output,
}

/// Objectives and bounds.
#[derive(Debug, Clone)]
pub(super) struct Limits {
    pub(super) first_token: Duration,
    pub(super) per_token: Duration,
    pub(super) max_concurrency: u32,
    pub(super) longest: Duration,
    pub(super) shows_progress: bool,
}

/// The best step within the objectives.
#[derive(Debug, Clone, Copy)]
pub(super) struct Found {
    pub(super) concurrency: u32,
    pub(super) tokens_per_second: u64,
    /// 95% came within this time.
    pub(super) first_token: Duration,
    pub(super) per_token: Duration,
    /// Calls that were made in all.
    pub(super) calls: u32,
}

/// One answer.
#[derive(Debug, Clone, Copy)]
struct Sample {
    first_token: Duration,
    took: Duration,
    input_tokens: u64,
    output_tokens: u64,
}

/// Doubles the calls under way until the objectives break, nothing is gained, or a bound is reached.
pub(super) async fn climb(target: &Target, kind: Kind, limits: &Limits) -> anyhow::Result<Found> {
    let tls = target.url.starts_with("https://");
    let client = probe::client(CONNECT_TIMEOUT, tls, &target.authorities)?;
    // The first call may load and compile what later ones find ready.
    call(&client, target, kind, 0).await.context("the first call failed")?;
    let watch = Stopwatch::start();
    let mut best: Option<Found> = None;
    let (mut concurrency, mut calls) = (1, 0);
    loop {
        let mut step = match (step(&client, target, kind, concurrency, calls).await, best) {
            (Ok(step), _) => step,
            // It held until here: what it cannot take any more does not take that back.
            (Err(error), Some(best)) => {
                tracing::info!(%error, concurrency, "the ramp ends: {error:#}");
                return Ok(Found { calls: calls + concurrency * ROUNDS, ..best });
            }
            (Err(error), None) => return Err(error),
        };
        calls += concurrency * ROUNDS;
        step.calls = calls;
        let holds = step.first_token <= limits.first_token
            && (kind == Kind::Input || step.per_token <= limits.per_token);
        if limits.shows_progress {
            let verdict = if holds { "" } else { ": beyond the objectives" };
            eprintln!(
                "{kind:?}: {concurrency} at a time, {} tokens/s, first token {:.0?}, {:.1?} a token{verdict}",
                step.tokens_per_second, step.first_token, step.per_token
            );
        }
        if !holds {
            return best.with_context(|| format!("one call at a time already takes {:?} to the first token and {:?} a token; give it more with `--slo-ttft` and `--slo-tpot`", step.first_token, step.per_token));
        }
        let is_gain = best.is_none_or(|best| gains(best.tokens_per_second, step.tokens_per_second));
        if is_gain {
            best = Some(step);
        }
        let is_last = !is_gain || concurrency >= limits.max_concurrency || watch.elapsed() >= limits.longest;
        if is_last {
            return best.map(|best| Found { calls, ..best }).context("nothing was measured");
        }
        concurrency = (concurrency * 2).min(limits.max_concurrency);
    }
}

#[expect(clippy::cast_precision_loss, reason = "a ratio of rates")]
fn gains(before: u64, now: u64) -> bool {
    now as f64 >= before as f64 * WORTHWHILE_GAIN
}

/// So many calls at a time, each place used [`ROUNDS`] times.
async fn step(
    client: &reqwest::Client,
    target: &Target,
    kind: Kind,
    concurrency: u32,
    from: u32,
) -> anyhow::Result<Found> {
    let watch = Stopwatch::start();
    let mut places = JoinSet::new();
    for place in 0..concurrency {
        let (client, target) = (client.clone(), target.clone());
        places.spawn(async move {
            let mut samples = Vec::new();
            for round in 0..ROUNDS {
                samples.push(call(&client, &target, kind, from + place * ROUNDS + round + 1).await?);
            }
            Ok::<_, anyhow::Error>(samples)
        });
    }
    let mut samples = Vec::new();
    while let Some(place) = places.join_next().await {
        samples.extend(place.context("a task ended early")??);
    }
    Ok(found(kind, concurrency, &samples, watch.elapsed()))
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "measured rates"
)]
fn found(kind: Kind, concurrency: u32, samples: &[Sample], took: Duration) -> Found {
    let tokens: u64 = samples
        .iter()
        .map(|sample| if kind == Kind::Input { sample.input_tokens } else { sample.output_tokens })
        .sum();
    let mut firsts: Vec<Duration> = samples.iter().map(|sample| sample.first_token).collect();
    firsts.sort_unstable();
    let first_token =
        firsts.get((firsts.len() * 95).div_ceil(100).saturating_sub(1)).copied().unwrap_or_default();
    let decoding: Duration =
        samples.iter().map(|sample| sample.took.saturating_sub(sample.first_token)).sum();
    let after_first: u64 = samples.iter().map(|sample| sample.output_tokens.saturating_sub(1)).sum();
    let per_token = decoding.checked_div(u32::try_from(after_first).unwrap_or(u32::MAX)).unwrap_or_default();
    let rate = tokens as f64 / took.as_secs_f64().max(f64::MIN_POSITIVE);
    Found { concurrency, tokens_per_second: rate as u64, first_token, per_token, calls: 0 }
}

async fn call(client: &reqwest::Client, target: &Target, kind: Kind, number: u32) -> anyhow::Result<Sample> {
    let (words, answer_tokens) = match kind {
        Kind::Input => (LONG_PROMPT_WORDS, 1),
        Kind::Output => (SHORT_PROMPT_WORDS, LONG_ANSWER_TOKENS),
    };
    let body = json!({
        "model": target.model,
        "messages": [{"role": "user", "content": prompt(target.run, number, words)}],
        "max_tokens": answer_tokens,
        "stream": true,
        "stream_options": {"include_usage": true},
    });
    let mut request = client
        .post(&target.url)
        .header("content-type", "application/json")
        .timeout(CALL_TIMEOUT)
        .body(body.to_string());
    if let Some(key) = &target.key {
        request = request.bearer_auth(key.expose());
    }
    let watch = Stopwatch::start();
    let mut answer = request
        .send()
        .await
        .map_err(|error| anyhow::anyhow!("it does not answer: {}", probe::root_cause(&error)))?;
    if !answer.status().is_success() {
        bail!("it answers {} to a chat completion of `{}`", answer.status(), target.model);
    }
    let mut reader = StreamReader::new(Endpoint::ChatCompletions, false);
    let mut first_token = None;
    while let Some(piece) = answer.chunk().await.context("its answer broke off")? {
        reader.push(piece);
        if first_token.is_none() && reader.report().first_data_event {
            first_token = Some(watch.elapsed());
        }
    }
    let took = watch.elapsed();
    let report = reader.report();
    let usage = report.usage.context("it reports no usage on streams, so its tokens cannot be counted")?;
    Ok(Sample {
        first_token: first_token.unwrap_or(took),
        took,
        input_tokens: usage.input_tokens,
        output_tokens: usage.output_tokens,
    })
}

/// Words that no prompt cache has seen: a number of this run comes first.
fn prompt(run: u32, number: u32, words: usize) -> String {
    const WORDS: [&str; 8] = ["river", "stone", "winter", "market", "light", "garden", "paper", "engine"];
    let word = |index: usize| WORDS[(index * 7 + number as usize) % WORDS.len()];
    (0..words)
        .fold(format!("Number {run}-{number}: continue the list."), |text, index| text + " " + word(index))
}
