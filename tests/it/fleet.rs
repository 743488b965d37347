//! Replicas started and stopped for real: by commands, by webhooks, and by others.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use breakeven::clock::Clock;
use breakeven::config::{
    Backend, BackendKind, Circuit, Control, Dialect, Health, Secret, SelfHosted, Timeouts,
};
use breakeven::economics::{Billing, Capacity, NanoUsd, PoolSpec, Timestamp};
use breakeven::fleet::{Availability, Fleet, FleetEvent, FleetEventKind, ReplicaState, webhook};
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::sync::watch;

use crate::support::free_ports;
use crate::support::stage::{DEADLINE, START, Stage};

fn backend(base_urls: Vec<String>, control: Control, max_replicas: u32) -> Backend {
    let pool = PoolSpec {
        hourly: "3.6".parse().unwrap(),
        billing: Billing::WhileRunning,
        request_fee: NanoUsd::ZERO,
        capacity: Capacity {
            input_tokens_per_second: 15_000,
            output_tokens_per_second: 10_000,
            max_in_flight: 8,
        },
        // A manual clock runs much faster than a process starts.
        startup: Duration::from_hours(240),
        minimum: Duration::from_mins(1),
        max_replicas,
    };
    Backend {
        name: "gpu".to_owned(),
        kind: BackendKind::SelfHosted(Box::new(SelfHosted {
            pool,
            control,
            server: breakeven::config::dialect::Server::Other,
            metrics_url: None,
        })),
        base_urls,
        addresses: breakeven::config::Addresses::Urls,
        api_key: None,
        authorities: Vec::new(),
        costs: None,
        headers: Vec::new(),
        timeouts: Timeouts {
            connect: Duration::from_secs(5),
            first_byte: Duration::from_mins(1),
            between_bytes: Duration::from_mins(1),
            total: Duration::from_mins(10),
            idle_connection: Duration::from_secs(4),
        },
        health: Health {
            path: Some("/".to_owned()),
            interval: Duration::from_secs(5),
            timeout: Duration::from_secs(10),
        },
        circuit: Circuit { failures: 3, open_for: Duration::from_secs(10) },
        dialect: Dialect::default(),
    }
}

fn pool_of(backend: &mut Backend) -> &mut PoolSpec {
    match &mut backend.kind {
        BackendKind::SelfHosted(own) => &mut own.pool,
        BackendKind::Api => unreachable!("these tests rent"),
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// A server that Python brings along, as a process in the foreground. It ends by itself, should a test fail.
fn http_server(directory: &Path, port: u16) -> Vec<String> {
    let directory = directory.to_str().unwrap();
    let port = format!("{{{port}+replica}}");
    let server = ["python3", "-m", "http.server", "--bind", "127.0.0.1", "--directory", directory, &port];
    words(&[&["timeout", "120"], &server[..]].concat())
}

fn answers(port: u16) -> bool {
    TcpStream::connect(("127.0.0.1", port)).is_ok()
}

#[tokio::test]
async fn a_server_in_the_foreground_is_started_used_and_stopped_and_its_rent_is_its_lifetime() {
    let directory = tempfile::tempdir().unwrap();
    let port = free_ports(2);
    let control = Control::Command { start: http_server(directory.path(), port), stop: Vec::new() };
    let url = format!("http://127.0.0.1:{{{port}+replica}}/v1");
    let stage = Stage::new(&backend(vec![url], control, 2));
    stage.fleet.set_target(2);
    stage.until(|fleet| fleet.counts().starting == 2).await;
    assert!(stage.fleet.acquire().is_none(), "traffic does not wait for a cold start");
    stage.until_count(ReplicaState::Ready, 2).await;
    assert!(answers(port) && answers(port + 1));
    let lease = stage.fleet.acquire().unwrap();
    assert_eq!(lease.base_url, format!("http://127.0.0.1:{port}/v1"));
    drop(lease);
    stage.clock.advance(Duration::from_mins(10));
    stage.fleet.set_target(0);
    stage.until_count(ReplicaState::Stopped, 2).await;
    assert!(!answers(port) && !answers(port + 1));
    let ordered = stage.when(|kind| *kind == FleetEventKind::StartOrdered);
    let stops: Duration = (stage.events.lock().unwrap().iter())
        .filter(|event| matches!(event.kind, FleetEventKind::Stopped { .. }))
        .map(|event| event.at.since(ordered))
        .sum();
    stage.clock.advance(Duration::from_hours(1));
    let rent = stage.fleet.accrue(stage.clock.now());
    assert_eq!(u128::from(rent.replica_millis), stops.as_millis());
    // 3.60 USD an hour are 1,000 nano-dollars a millisecond.
    assert_eq!(rent.rent, NanoUsd::from_nanos(i64::try_from(stops.as_millis()).unwrap() * 1_000));
}

#[tokio::test]
async fn a_command_that_orders_and_returns_is_told_of_its_replica_and_undone_by_the_stop_command() {
    let directory = tempfile::tempdir().unwrap();
    let port = free_ports(2);
    let script = directory.path().join("gpu");
    let python =
        format!("python3 -m http.server --bind 127.0.0.1 --directory . $(({port} + BREAKEVEN_REPLICA))");
    let text = format!(
        "cd '{}'\necho \"$1 $BREAKEVEN_BACKEND $BREAKEVEN_REPLICA $BREAKEVEN_BASE_URL\" >> log\n\
         case $1 in\nup) {python} >/dev/null 2>&1 & echo $! > pid$BREAKEVEN_REPLICA;;\n\
         down) kill $(cat pid$BREAKEVEN_REPLICA);;\nesac\n",
        directory.path().display()
    );
    fs::write(&script, text).unwrap();
    let script = script.to_str().unwrap();
    let control =
        Control::Command { start: words(&["sh", script, "up"]), stop: words(&["sh", script, "down"]) };
    let urls = vec![format!("http://127.0.0.1:{port}/v1"), format!("http://127.0.0.1:{}/v1", port + 1)];
    let stage = Stage::new(&backend(urls, control, 2));
    stage.fleet.set_target(1);
    stage.until_count(ReplicaState::Ready, 1).await;
    stage.clock.advance(Duration::from_mins(2));
    stage.fleet.set_target(0);
    stage.until_count(ReplicaState::Stopped, 2).await;
    let log = fs::read_to_string(directory.path().join("log")).unwrap();
    let url = format!("http://127.0.0.1:{port}/v1");
    assert_eq!(log, format!("up gpu 0 {url}\ndown gpu 0 {url}\n"));
}

#[tokio::test]
async fn a_stop_before_the_minimum_is_deferred_and_a_call_in_flight_keeps_its_replica() {
    let directory = tempfile::tempdir().unwrap();
    let port = free_ports(2);
    let control = Control::Command { start: http_server(directory.path(), port), stop: Vec::new() };
    let mut backend = backend(vec![format!("http://127.0.0.1:{port}/v1")], control, 1);
    pool_of(&mut backend).minimum = Duration::from_hours(20);
    let stage = Stage::new(&backend);
    stage.fleet.set_target(1);
    stage.until_count(ReplicaState::Ready, 1).await;
    stage.fleet.set_target(0);
    let early = stage.since_start();
    stage.until(|_| stage.since_start() >= early + Duration::from_secs(30)).await;
    let lease = stage.fleet.acquire().expect("it serves until its minimum is paid");
    stage.clock.advance(Duration::from_hours(20));
    stage.until_count(ReplicaState::Draining, 1).await;
    assert_eq!(stage.fleet.availability(), Availability::NoReplica);
    assert!(answers(port), "it is kept while a stream runs");
    drop(lease);
    stage.until_count(ReplicaState::Stopped, 1).await;
    assert!(!answers(port));
}

#[tokio::test]
async fn a_start_that_fails_is_reported_paid_and_tried_again_with_longer_and_longer_pauses() {
    let control = Control::Command { start: words(&["false"]), stop: words(&["true"]) };
    let stage = Stage::new(&backend(vec![format!("http://127.0.0.1:{}/v1", free_ports(2))], control, 1));
    stage.fleet.set_target(1);
    let failures = |events: &[FleetEvent]| -> Vec<FleetEvent> {
        let failed = |event: &&FleetEvent| matches!(event.kind, FleetEventKind::StartFailed { .. });
        events.iter().filter(failed).cloned().collect()
    };
    let events = Arc::clone(&stage.events);
    stage
        .until(|fleet| {
            let failed_often = failures(&events.lock().unwrap()).len() == 3;
            failed_often && fleet.count(ReplicaState::Failed) == 1
        })
        .await;
    let failures = failures(&stage.events.lock().unwrap());
    let pauses: Vec<_> = failures
        .iter()
        .map(|event| match &event.kind {
            FleetEventKind::StartFailed { reason, retry_in } => {
                assert_eq!(reason, "`false` ended with exit status: 1");
                retry_in.as_secs()
            }
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(pauses, [5, 10, 20]);
    assert!(failures.windows(2).all(|pair| pair[1].at.since(pair[0].at) >= Duration::from_secs(5)));
    let paid: Duration = (stage.events.lock().unwrap().iter())
        .filter_map(|event| match event.kind {
            FleetEventKind::Stopped { ran_for } => Some(ran_for.max(Duration::from_mins(1))),
            _ => None,
        })
        .sum();
    assert!(paid >= Duration::from_mins(3), "each failed start pays the minimum");
    assert_eq!(u128::from(stage.fleet.accrue(stage.clock.now()).replica_millis), paid.as_millis());
}

#[tokio::test]
async fn a_program_that_is_not_there_is_named() {
    let control = Control::Command { start: words(&["/nonexistent/gpu"]), stop: Vec::new() };
    let stage = Stage::new(&backend(vec![format!("http://127.0.0.1:{}/v1", free_ports(2))], control, 1));
    stage.fleet.set_target(1);
    stage.until_count(ReplicaState::Failed, 1).await;
    let sentences = stage.sentences().join("\n");
    assert!(sentences.contains("`/nonexistent/gpu` cannot be run: No such file"), "{sentences}");
}

#[tokio::test]
async fn at_our_exit_a_server_that_only_we_can_stop_is_stopped_and_another_is_left_and_found_again() {
    for stop in [Vec::new(), words(&["true"])] {
        let directory = tempfile::tempdir().unwrap();
        let port = free_ports(2);
        let is_ours_alone = stop.is_empty();
        let mut start = http_server(directory.path(), port);
        if !is_ours_alone {
            // It goes on without us, and ends by itself soon after the test.
            let line = format!("{} >/dev/null 2>&1 &", start.join(" "));
            start = words(&["sh", "-c", &line]);
        }
        let control = Control::Command { start, stop };
        let backend = backend(vec![format!("http://127.0.0.1:{port}/v1")], control, 1);
        let stage = Stage::new(&backend);
        stage.fleet.set_target(1);
        stage.until_count(ReplicaState::Ready, 1).await;
        tokio::time::timeout(DEADLINE, stage.fleet.release()).await.unwrap();
        assert_eq!(answers(port), !is_ours_alone);
        if !is_ours_alone {
            let next = Stage::new(&backend);
            next.until_count(ReplicaState::Ready, 1).await;
            next.when(|kind| *kind == FleetEventKind::Adopted);
        }
    }
}

/// What a server was asked: path, headers, body.
type Asked = Arc<Mutex<Vec<(String, HeaderMap, Bytes)>>>;

/// A server inside the test that answers as `respond` says, given how often it was asked before.
async fn serve<F>(respond: F) -> (SocketAddr, Asked)
where
    F: Fn(usize, &str) -> (u16, String) + Clone + Send + 'static,
{
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let asked = Asked::default();
    let heard = Arc::clone(&asked);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (heard, respond) = (Arc::clone(&heard), respond.clone());
            let answer = service_fn(move |request: Request<Incoming>| {
                let (heard, respond) = (Arc::clone(&heard), respond.clone());
                async move {
                    let (head, body) = request.into_parts();
                    let body = body.collect().await.unwrap().to_bytes();
                    let path = head.uri.path().to_owned();
                    let mut heard = heard.lock().unwrap();
                    let (status, text) = respond(heard.len(), &path);
                    heard.push((path, head.headers, body));
                    let response = Response::builder().status(status).body(Full::new(Bytes::from(text)));
                    Ok::<_, Infallible>(response.unwrap())
                }
            });
            tokio::spawn(async move {
                let connection = hyper::server::conn::http1::Builder::new();
                drop(connection.serve_connection(TokioIo::new(stream), answer).await);
            });
        }
    });
    (address, asked)
}

#[tokio::test]
async fn a_webhook_gets_signed_orders_and_a_repetition_has_the_same_idempotency_key() {
    // Refuses the first try, so that it is repeated.
    let (hook, orders) = serve(|before, _| (if before == 0 { 503 } else { 202 }, String::new())).await;
    let seen = Arc::clone(&orders);
    let is_up = move || seen.lock().unwrap().len() >= 2;
    let (server, _) = serve(move |_, _| (if is_up() { 200 } else { 503 }, String::new())).await;
    let secret = Secret::new("whsec_test".to_owned());
    let control = Control::Webhook { url: format!("http://{hook}/scale"), secret: Some(secret.clone()) };
    let mut backend = backend(vec![format!("http://{server}/v1")], control, 1);
    pool_of(&mut backend).minimum = Duration::ZERO;
    let stage = Stage::new(&backend);
    stage.fleet.set_target(1);
    stage.until_count(ReplicaState::Ready, 1).await;
    stage.fleet.order_under(Arc::new(AtomicU64::new(17)));
    stage.fleet.set_target(0);
    stage.until_count(ReplicaState::Stopped, 1).await;
    let orders = orders.lock().unwrap();
    let bodies: Vec<_> =
        orders.iter().map(|(_, _, body)| String::from_utf8(body.to_vec()).unwrap()).collect();
    let body = |action: &str, target: u32| {
        format!(
            r#"{{"backend":"gpu","action":"{action}","replica":0,"base_url":"http://{server}/v1","target":{target}}}"#
        )
    };
    let under_a_lease = body("stop", 0).replace('}', ",\"token\":17}");
    assert_eq!(bodies, [body("start", 1), body("start", 1), under_a_lease]);
    let keys: Vec<_> = orders.iter().map(|(_, headers, _)| headers["idempotency-key"].clone()).collect();
    assert_eq!(keys[0], keys[1]);
    assert_ne!(keys[1], keys[2]);
    for (path, headers, body) in orders.iter() {
        assert_eq!(path, "/scale");
        let header = headers[webhook::SIGNATURE_HEADER].to_str().unwrap();
        let seconds = header.strip_prefix("t=").unwrap().split(',').next().unwrap().parse().unwrap();
        assert_eq!(header, webhook::signature(&secret, Timestamp::from_secs(seconds), body));
        assert!(Timestamp::from_secs(seconds) >= START && Timestamp::from_secs(seconds) <= stage.clock.now());
    }
}

#[tokio::test]
async fn a_start_that_is_under_way_at_our_exit_is_found_by_the_next_process_and_stopped_if_it_is_not_wanted()
{
    let (hook, orders) = serve(|_, _| (200, String::new())).await;
    let is_up = Arc::new(AtomicBool::new(false));
    let machine = Arc::clone(&is_up);
    let (server, _) =
        serve(move |_, _| (if machine.load(Ordering::Relaxed) { 200 } else { 503 }, String::new())).await;
    let control = Control::Webhook { url: format!("http://{hook}/scale"), secret: None };
    let mut backend = backend(vec![format!("http://{server}/v1")], control, 1);
    pool_of(&mut backend).minimum = Duration::ZERO;
    let stage = Stage::new(&backend);
    stage.fleet.set_target(1);
    stage.until(|_| orders.lock().unwrap().len() == 1).await;
    tokio::time::timeout(DEADLINE, stage.fleet.release()).await.unwrap();
    let next = Stage::new(&backend);
    next.fleet.set_target(0);
    // It has looked and found nothing.
    next.until(|_| next.since_start() >= Duration::from_mins(1)).await;
    assert_eq!(next.fleet.count(ReplicaState::Stopped), 1);
    is_up.store(true, Ordering::Relaxed);
    next.until(|_| orders.lock().unwrap().len() == 2).await;
    next.until_count(ReplicaState::Stopped, 1).await;
    next.when(|kind| *kind == FleetEventKind::Adopted);
    let bodies: Vec<_> = (orders.lock().unwrap().iter())
        .map(|(_, _, body)| serde_json::from_slice::<serde_json::Value>(body).unwrap()["action"].clone())
        .collect();
    assert_eq!(bodies, ["start", "stop"]);
}

#[tokio::test]
async fn a_start_that_is_still_being_ordered_is_not_ordered_after_the_stop() {
    let (hook, orders) = serve(|before, _| (if before == 0 { 503 } else { 202 }, String::new())).await;
    let control = Control::Webhook { url: format!("http://{hook}/"), secret: None };
    let mut backend = backend(vec![format!("http://127.0.0.1:{}/v1", free_ports(2))], control, 1);
    pool_of(&mut backend).minimum = Duration::ZERO;
    let stage = Stage::new(&backend);
    stage.fleet.set_target(1);
    let seen = Arc::clone(&orders);
    stage.until(|_| seen.lock().unwrap().len() == 1).await;
    stage.fleet.set_target(0);
    stage.until_count(ReplicaState::Stopped, 1).await;
    let orders = orders.lock().unwrap();
    let is_stop = |body: &Bytes| body.windows(6).any(|window| window == b"\"stop\"");
    assert_eq!(orders.iter().map(|(_, _, body)| is_stop(body)).collect::<Vec<_>>(), [false, true]);
}

#[tokio::test]
async fn a_webhook_that_refuses_is_not_asked_again_at_once() {
    let (hook, orders) = serve(|_, _| (403, String::new())).await;
    let control = Control::Webhook { url: format!("http://{hook}/"), secret: None };
    let stage = Stage::new(&backend(vec![format!("http://127.0.0.1:{}/v1", free_ports(2))], control, 1));
    stage.fleet.set_target(1);
    stage
        .until(|_| {
            stage.sentences().iter().any(|sentence| sentence.contains("answered 403; next try in 5 s"))
        })
        .await;
    let starts = |(_, headers, body): &&(String, HeaderMap, Bytes)| {
        assert!(!headers.contains_key(webhook::SIGNATURE_HEADER));
        body.windows(7).any(|window| window == b"\"start\"")
    };
    assert_eq!(orders.lock().unwrap().iter().filter(starts).count(), 1);
}

#[tokio::test]
async fn replicas_of_others_are_found_by_their_health_and_paid_while_they_answer() {
    let (server, asked) =
        serve(|before, _| (if (5..=9).contains(&before) { 500 } else { 200 }, String::new())).await;
    let mut backend = backend(vec![format!("http://{server}/v1")], Control::None, 1);
    backend.health.path = Some("/health".to_owned());
    backend.api_key = Some(Secret::new("sk-gpu".to_owned()));
    let stage = Stage::new(&backend);
    assert_eq!(stage.fleet.availability(), Availability::NoReplica);
    stage.until_count(ReplicaState::Ready, 1).await;
    let appeared = stage.clock.now();
    stage.until_count(ReplicaState::Failed, 1).await;
    let lost = stage.clock.now();
    stage.fleet.tick(lost);
    let first = stage.fleet.accrue(lost);
    assert_eq!(u128::from(first.replica_millis), lost.since(appeared).as_millis());
    stage.until_count(ReplicaState::Ready, 1).await;
    assert!(stage.fleet.acquire().is_some());
    let asked = asked.lock().unwrap();
    assert!(
        asked
            .iter()
            .all(|(path, headers, _)| path == "/health" && headers["authorization"] == "Bearer sk-gpu")
    );
}

#[tokio::test]
async fn a_queue_inside_the_server_makes_the_fleet_full_before_it_is() {
    let (server, _) = serve(|_, path| match path {
        "/metrics" => (200, "vllm:num_requests_running 8\nvllm:num_requests_waiting 40\n".to_owned()),
        _ => (200, String::new()),
    })
    .await;
    let mut backend = backend(vec![format!("http://{server}/v1")], Control::None, 1);
    if let BackendKind::SelfHosted(own) = &mut backend.kind {
        own.metrics_url = Some("/metrics".to_owned());
    }
    let stage = Stage::new(&backend);
    stage.until(|fleet| fleet.availability() == Availability::Full).await;
    assert!(stage.fleet.acquire().is_none());
    assert_eq!(stage.fleet.snapshot()[0].waiting, Some(40));
}

#[tokio::test]
async fn an_api_is_a_fleet_that_is_always_there_and_has_no_rent() {
    let mut backend = backend(vec!["https://api.openai.com/v1".to_owned()], Control::None, 1);
    backend.kind = BackendKind::Api;
    backend.health.path = None;
    let stage = Stage::new(&backend);
    let leases: Vec<_> = (0..1_000).map(|_| stage.fleet.acquire().unwrap()).collect();
    assert_eq!(stage.fleet.in_flight(), 1_000);
    drop(leases);
    assert_eq!(stage.fleet.in_flight(), 0);
    stage.clock.advance(Duration::from_hours(1));
    assert_eq!(stage.fleet.accrue(stage.clock.now()).rent, NanoUsd::ZERO);
}

#[tokio::test]
async fn the_loop_follows_the_target_by_itself_and_ends_when_told() {
    let directory = tempfile::tempdir().unwrap();
    let port = free_ports(2);
    let control = Control::Command { start: http_server(directory.path(), port), stop: Vec::new() };
    let mut backend = backend(vec![format!("http://127.0.0.1:{port}/v1")], control, 1);
    pool_of(&mut backend).minimum = Duration::ZERO;
    let (told, mut tellings) = watch::channel(BTreeMap::<&'static str, Timestamp>::new());
    let sink = Box::new(move |event: FleetEvent| {
        told.send_modify(|seen| {
            seen.insert(event.kind.as_str(), event.at);
        });
    });
    let clock = Clock::accelerated(START, 100);
    let fleet = Fleet::with_events(&backend, clock.clone(), sink);
    let (stop, stopped) = watch::channel(false);
    let running = tokio::spawn(Arc::clone(&fleet).run(stopped));
    let mut wait_for = async |kind: &'static str| {
        let seen = tellings.wait_for(|seen| seen.contains_key(kind));
        tokio::time::timeout(DEADLINE, seen).await.expect(kind).unwrap()[kind]
    };
    fleet.set_target(1);
    let ordered = wait_for("start_ordered").await;
    wait_for("ready").await;
    assert!(answers(port));
    stop.send(true).unwrap();
    let ended = wait_for("stopped").await;
    tokio::time::timeout(DEADLINE, running).await.unwrap().unwrap();
    assert!(!answers(port));
    let rent = fleet.accrue(clock.now());
    assert_eq!(u128::from(rent.replica_millis), ended.since(ordered).as_millis());
}
