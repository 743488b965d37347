//! Mixed traffic for as long as one likes: memory and open files do not grow.
//!
//! `scripts/soak` does the like to the released program, at half of what that can take, for half an hour.

use std::time::Duration;

use breakeven::clock::Stopwatch;
use breakeven::demo::{FakeBackend, Personality, Settings};
use http::StatusCode;
use serde_json::json;
use tokio::task::JoinSet;

use super::{Served, metric, resident, scale};
use crate::support::{Events, Http, chat, read, with};

const MODEL: &str = "gpt-4o-mini";
const EVERY: Duration = Duration::from_millis(500);
/// From so many seconds on, the slope of memory says something.
const TELLING_SECONDS: usize = 1_000;

/// Open files follow the calls in flight; their median stays the same but for so many.
const FILES_SLACK: usize = 4;

/// What was measured at one moment.
#[derive(Debug, Clone, Copy)]
struct Sample {
    seconds: f64,
    resident_mib: f64,
    files: usize,
}

fn sample(served: &Served, watch: &Stopwatch) -> Sample {
    let files = std::fs::read_dir(format!("/proc/{}/fd", served.process())).map_or(0, Iterator::count);
    #[expect(clippy::cast_precision_loss, reason = "some thousand KiB")]
    let resident_mib = resident(served) as f64 / 1024.0;
    Sample { seconds: watch.elapsed().as_secs_f64(), resident_mib, files }
}

/// Slope of the line with the least squares through all samples, in MiB an hour.
fn slope(samples: &[Sample]) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "some thousand samples")]
    let count = samples.len() as f64;
    let mean = |of: fn(&Sample) -> f64| samples.iter().map(of).sum::<f64>() / count;
    let (time, memory) = (mean(|sample| sample.seconds), mean(|sample| sample.resident_mib));
    let across: f64 =
        samples.iter().map(|sample| (sample.seconds - time) * (sample.resident_mib - memory)).sum();
    let along: f64 = samples.iter().map(|sample| (sample.seconds - time).powi(2)).sum();
    across / along * 3600.0
}

/// The median of open files.
fn typical_files(samples: &[Sample]) -> usize {
    let mut files: Vec<_> = samples.iter().map(|sample| sample.files).collect();
    files.sort_unstable();
    files[files.len() / 2]
}

/// Of ten calls four are unary, four are streams that are read to their end, one is hung up on, and one has a model
/// and a team that nobody has heard of.
async fn call(http: Http, number: u64) {
    let streamed = with(chat(MODEL), json!({"stream": true}));
    match number % 10 {
        0..4 => {
            let reply = http.post("/chat/completions", &chat(MODEL)).await;
            assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
        }
        4..8 => {
            let (events, _) = Events::of(http.open("/chat/completions", &streamed).await).rest().await;
            assert_eq!(events.last().unwrap(), "data: [DONE]");
        }
        8 => {
            let mut events = Events::of(http.open("/chat/completions", &streamed).await);
            for _ in 0..3 {
                events.next().await.unwrap();
            }
        }
        _ => {
            let request = http
                .request(http::Method::POST, "/chat/completions")
                .header("x-breakeven-tags", format!("team=team-{number},run={number}"));
            let answer =
                http.start(request, chat(&format!("model-{number}")).to_string().into()).await.unwrap();
            assert_eq!(read(answer).await.status, StatusCode::OK);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_mixed_traffic_memory_and_open_files_stay_flat() {
    let seconds = scale("BREAKEVEN_SOAK_SECONDS", 6);
    let rate = u32::try_from(scale("BREAKEVEN_SOAK_RATE", 40)).unwrap();
    let settings = Settings { time_per_output_token: Duration::from_millis(5), ..Settings::default() };
    let api = FakeBackend::start(Personality::OpenAi, settings).await.unwrap();
    let config = format!(
        "[backends.openai]\nkind = \"api\"\nbase_url = \"{}\"\n\
         [routes.chat]\nmodels = [\"{MODEL}\"]\npolicy = \"api\"\noffers = [{{ backend = \"openai\" }}]\n",
        api.url()
    );
    let served = Served::start("", &config, &[]).await;
    served.load_vocabulary(MODEL).await;
    let http = Http::new(&served.url());
    let mut due = tokio::time::interval(Duration::from_secs(1) / rate);
    due.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Burst);
    let mut look = tokio::time::interval(EVERY);
    let watch = Stopwatch::start();
    let (mut calls, mut number, mut samples) = (JoinSet::new(), 0_u64, Vec::new());
    while watch.elapsed() < Duration::from_secs(seconds as u64) {
        tokio::select! {
            _ = due.tick() => {
                calls.spawn(call(http.clone(), number));
                number += 1;
            }
            _ = look.tick() => {
                samples.push(sample(&served, &watch));
                while let Some(ended) = calls.try_join_next() {
                    ended.unwrap();
                }
            }
        }
    }
    while let Some(ended) = calls.join_next().await {
        ended.unwrap();
    }
    // The first third warms up: caches, pools and the allocator's pages.
    let warm = &samples[samples.len() / 3..];
    let (early, late) = warm.split_at(warm.len() / 2);
    let most_files = |samples: &[Sample]| samples.iter().map(|sample| sample.files).max().unwrap();
    let (typical_early, typical_late) = (typical_files(early), typical_files(late));
    let (first, last) = (warm.first().unwrap(), warm.last().unwrap());
    eprintln!(
        "{number} calls in {:.0} s: {:.1} MiB at the start, {:.1} after warm-up, {:.1} at the end; {:+.2} MiB an hour; \
         {typical_early} files in the middle and {} at most in the first half after warm-up, {typical_late} and {} in the \
         second",
        watch.elapsed().as_secs_f64(),
        samples[0].resident_mib,
        first.resident_mib,
        last.resident_mib,
        slope(warm),
        most_files(early),
        most_files(late)
    );
    let in_flight = most_files(early).max(64);
    assert!(most_files(late) <= in_flight * 2, "files: {} and then {}", most_files(early), most_files(late));
    assert!(last.resident_mib < first.resident_mib + 16.0, "{first:?}, {last:?}");
    if seconds >= TELLING_SECONDS {
        assert!(slope(warm) < 1.0, "{} MiB an hour", slope(warm));
        assert!(typical_late <= typical_early + FILES_SLACK, "files: {typical_early}, then {typical_late}");
    }
    assert_eq!(metric(&served.admin_url(), "breakeven_panics_total").await, 0);
}
