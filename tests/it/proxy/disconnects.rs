//! A thousand clients that go away in mid-stream.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use breakeven::demo::{Produced, State};
use breakeven::ledger::Outcome;
use serde_json::json;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::{API_MODEL, Between, between};
use crate::support::Events;

const CLIENTS: u64 = 1000;
const AT_ONCE: usize = 200;
/// Tokens of an answer, one every [`PER_TOKEN`].
const LONGEST: u64 = 40;
/// Events that a client takes at most before it hangs up.
const STAYS: u64 = 30;
const PER_TOKEN: Duration = Duration::from_millis(200);
/// An upstream's answer must be given up so soon after its client went away, in 99 of 100 cases, apart from what
/// the machine is late with anything ([`lateness`]).
const PROMPT: Duration = Duration::from_millis(100);
/// From the client's socket to the proxy, from there to the upstream's, and to who notes it.
const HAND_OVERS: u32 = 3;

/// Reads some events and hangs up. Returns when. The client's number is the length of its prompt.
async fn client(between: Arc<Between>, number: u64, events: u64) -> (u64, Duration) {
    let prompt = " time".repeat(usize::try_from(number).unwrap());
    let body = json!({"model": API_MODEL, "stream": true, "messages": [{"role": "user", "content": prompt}]});
    let mut stream = Events::of(between.http.open("/chat/completions", &body).await);
    for _ in 0..events {
        stream.next().await.unwrap();
    }
    let left_at = between.api.elapsed();
    drop(stream);
    (number, left_at)
}

/// How late a timer is in 99 of 100 cases, until `stop` is dropped: the work of others shows in it as well.
async fn lateness(mut stop: oneshot::Receiver<()>) -> Duration {
    const PAUSE: Duration = Duration::from_millis(10);
    let mut late = Vec::new();
    loop {
        let began = tokio::time::Instant::now();
        tokio::select! {
            _ = &mut stop => return p99(&mut late),
            () = tokio::time::sleep(PAUSE) => late.push(began.elapsed().saturating_sub(PAUSE)),
        }
    }
}

fn p99(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[times.len() * 99 / 100]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_clients_that_hang_up_leave_a_thousand_rows_and_pay_for_what_was_produced() {
    let between = Arc::new(between().await);
    between.api.set(|settings| {
        settings.output_tokens = LONGEST;
        settings.time_per_output_token = PER_TOKEN;
    });
    let (stop, stopped) = oneshot::channel();
    let machine = tokio::spawn(lateness(stopped));
    let seed = 20_261_127;
    let mut random = fastrand::Rng::with_seed(seed);
    let mut clients = JoinSet::new();
    let mut left = HashMap::new();
    for number in 1..=CLIENTS {
        if clients.len() >= AT_ONCE {
            left.extend(clients.join_next().await.unwrap());
        }
        clients.spawn(client(between.clone(), number, random.u64(1..=STAYS)));
    }
    left.extend(clients.join_all().await);
    assert!(between.api.until(|fake| fake.in_flight() == 0).await);

    let entries = between.proxy.entries().await;
    let produced = between.api.produced();
    assert_eq!((entries.len() as u64, produced.len() as u64), (CLIENTS, CLIENTS), "seed {seed}");
    let cancelled = entries.iter().filter(|entry| entry.outcome == Outcome::Cancelled).count();
    assert!(cancelled > 900, "{cancelled}");
    let made: u64 = produced.iter().map(|one| one.usage.output_tokens).sum();
    let booked: u64 = entries.iter().map(|entry| entry.usage.output_tokens).sum();
    let read: u64 = produced.iter().map(|one| one.usage.input_tokens).sum();
    assert_eq!(entries.iter().map(|entry| entry.usage.input_tokens).sum::<u64>(), read);

    let framing = produced.iter().map(|one| one.usage.input_tokens).min().unwrap() - 1;
    let late = |one: &Produced| match one.state {
        State::Aborted { noticed_at } => {
            Some(noticed_at.saturating_sub(left[&(one.usage.input_tokens - framing)]))
        }
        _ => None,
    };
    let mut late: Vec<Duration> = produced.iter().filter_map(late).collect();
    drop(stop);
    let (p99, machine) = (p99(&mut late), machine.await.unwrap());
    // What is made while the machine is late is made after the client has gone, and seen by nobody.
    let unseen = u64::try_from((HAND_OVERS * machine).as_millis()).unwrap() * CLIENTS
        / u64::try_from(PER_TOKEN.as_millis()).unwrap();
    let said =
        format!("{} aborts, p99 {p99:?}, a timer's {machine:?}; {booked} booked, {made} made", late.len());
    println!("{said}, median {:?}", late[late.len() / 2]);
    assert!(booked.abs_diff(made) <= made * 3 / 100 + unseen, "{said}, seed {seed}");
    assert!(late.len() > 900 && p99 <= PROMPT + HAND_OVERS * machine, "{said}, seed {seed}");
}
