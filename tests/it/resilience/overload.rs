//! More than there is room for: what is refused is told at once, and what is served stays fast.

use std::net::SocketAddr;
use std::time::Duration;

use breakeven::clock::Stopwatch;
use breakeven::demo::{FakeBackend, Fault, Personality, Settings, Verbatim};
use http::StatusCode;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{Served, metric, resident, scale};
use crate::support::proxy::Proxy;
use crate::support::{Events, Http, chat, with};

/// A shared machine has pauses of its own.
const ROOM: Duration = Duration::from_millis(100);
const MODEL: &str = "gpt-4o-mini";

fn config_before(api: &FakeBackend, config: &str) -> String {
    format!(
        "{config}\n[backends.openai]\nkind = \"api\"\nbase_url = \"{}\"\n\
         [routes.chat]\nmodels = [\"{MODEL}\"]\npolicy = \"api\"\noffers = [{{ backend = \"openai\" }}]\n",
        api.url()
    )
}

async fn proxy_before(api: &FakeBackend, config: &str) -> Proxy {
    Proxy::start(&config_before(api, config)).await
}

fn streamed() -> serde_json::Value {
    with(chat(MODEL), json!({"stream": true}))
}

#[tokio::test]
async fn a_full_proxy_answers_503_at_once_and_says_when_to_come_back() {
    let settings = Settings { time_per_output_token: Duration::from_mins(1), ..Settings::default() };
    let api = FakeBackend::start(Personality::OpenAi, settings).await.unwrap();
    let proxy = proxy_before(&api, "[limits]\nmax_in_flight = 2").await;
    let http = Http::new(&proxy.url());
    let mut held = Vec::new();
    for _ in 0..2 {
        held.push(http.open("/chat/completions", &streamed()).await);
    }
    let watch = Stopwatch::start();
    let reply = http.post("/chat/completions", &chat(MODEL)).await;
    assert_eq!(reply.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!((reply.header("retry-after"), &reply.json()["error"]["code"]), ("1", &json!("overloaded")));
    assert!(watch.elapsed() < Duration::from_secs(1), "{:?}", watch.elapsed());
    drop(held);
    assert!(api.until(|api| api.totals().aborted == 2).await);
    api.set(|settings| settings.time_per_output_token = Duration::ZERO);
    assert_eq!(proxy.entries().await.len(), 2);
    assert_eq!(http.post("/chat/completions", &chat(MODEL)).await.status, StatusCode::OK);
}

#[tokio::test]
async fn connections_beyond_the_limit_are_closed_and_their_places_come_back() {
    let api = FakeBackend::start(Personality::OpenAi, Settings::default()).await.unwrap();
    let proxy = proxy_before(&api, "[limits]\nmax_connections = 3").await;
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(speak(proxy.address()).await.expect("there is room"));
    }
    assert!(speak(proxy.address()).await.is_none(), "the fourth is closed");
    drop(held);
    let served = async { while speak(proxy.address()).await.is_none() {} };
    tokio::time::timeout(Duration::from_secs(10), served).await.expect("a place comes back");
}

#[tokio::test]
async fn bodies_beyond_what_all_may_take_are_refused_while_the_others_wait() {
    let settings =
        Settings { faults: vec![Fault::SlowHeaders(Duration::from_mins(1))], ..Settings::default() };
    let api = FakeBackend::start(Personality::OpenAi, settings).await.unwrap();
    let proxy = proxy_before(&api, "[limits]\nmax_buffered_bytes = \"1MiB\"").await;
    let http = Http::new(&proxy.url());
    let long = |kibibytes: usize| json!({"model": MODEL, "messages": [{"role": "user", "content": "x".repeat(kibibytes << 10)}]});
    let waiting = tokio::spawn({
        let (http, body) = (http.clone(), long(800));
        async move { http.post("/chat/completions", &body).await }
    });
    assert!(api.until(|api| api.calls().len() == 1).await);
    for path in ["/chat/completions", "/moderations"] {
        let reply = http.post(path, &long(400)).await;
        assert_eq!(reply.status, StatusCode::SERVICE_UNAVAILABLE, "{path}");
        assert_eq!(
            (reply.header("retry-after"), &reply.json()["error"]["code"]),
            ("1", &json!("overloaded"))
        );
    }
    api.set(|settings| settings.faults.clear());
    assert_eq!(http.post("/chat/completions", &long(1)).await.status, StatusCode::OK, "a small one has room");
    waiting.abort();
    assert_eq!(proxy.entries().await.len(), 2);
    assert_eq!(http.post("/chat/completions", &long(400)).await.status, StatusCode::OK, "the room is back");
}

/// A connection that has had an answer; none when it was closed instead.
async fn speak(address: SocketAddr) -> Option<TcpStream> {
    let mut stream = TcpStream::connect(address).await.ok()?;
    stream.write_all(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n").await.ok()?;
    let mut start = [0; 12];
    stream.read_exact(&mut start).await.ok()?;
    Some(stream)
}

#[tokio::test]
async fn what_is_too_large_or_too_slow_is_told_so() {
    let api = FakeBackend::start(Personality::OpenAi, Settings::default()).await.unwrap();
    let limits = "[limits]\nmax_body_bytes = \"1KiB\"\nmax_upload_bytes = \"3KiB\"\nmax_header_bytes = \"8KiB\"\nbody_timeout = \"100ms\"\n\
                  header_timeout = \"100ms\"\nidle_timeout = \"150ms\"";
    let proxy = proxy_before(&api, limits).await;
    let start = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n";
    let upload = "POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-type: application/octet-stream\r\n";
    let chunk = format!("7d0\r\n{}\r\n", "x".repeat(2000));
    let cases = [
        ("413", format!("{start}content-length: 2000\r\n\r\n{}", "x".repeat(2000))),
        ("431", format!("{start}x-large: {}\r\n\r\n", "x".repeat(64 << 10))),
        ("408", format!("{start}content-length: 500\r\n\r\n{{")),
        ("413", format!("{upload}content-length: 4000\r\n\r\n{}", "x".repeat(4000))),
        ("413", format!("{upload}transfer-encoding: chunked\r\n\r\n{}", chunk.repeat(2))),
        ("408", format!("{upload}transfer-encoding: chunked\r\n\r\n{chunk}")),
        ("", start.to_owned()),
        ("", "P".to_owned()),
        ("", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned()),
        ("", String::new()),
    ];
    for (status, text) in cases {
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        drop(stream.write_all(text.as_bytes()).await);
        let mut answer = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut answer)).await;
        assert!(read.is_ok(), "{text:.80}: it is left open");
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.get(9..).unwrap_or_default().starts_with(status), "{text:.80}: {answer}");
    }
    assert!(api.calls().is_empty());
}

#[tokio::test]
async fn a_client_that_stops_reading_is_given_up_and_its_call_is_booked() {
    let settings = Settings { output_tokens: 2_000_000, ..Settings::default() };
    let api = FakeBackend::start(Personality::OpenAi, settings).await.unwrap();
    let proxy = proxy_before(&api, "[limits]\nidle_timeout = \"300ms\"\nheader_timeout = \"200ms\"").await;
    let body = streamed().to_string();
    let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
    let head =
        format!("POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
    let mut start = [0; 12];
    stream.read_exact(&mut start).await.unwrap();
    assert!(api.until(|api| api.totals().aborted == 1).await, "the upstream's stream is let go");
    assert_eq!(proxy.entries().await[0].outcome, breakeven::ledger::Outcome::Cancelled);
    drop(stream);
}

#[tokio::test]
async fn a_client_that_closes_its_half_is_taken_for_one_that_has_gone() {
    let settings = Settings { time_per_output_token: Duration::from_mins(1), ..Settings::default() };
    let api = FakeBackend::start(Personality::OpenAi, settings).await.unwrap();
    let proxy = proxy_before(&api, "").await;
    for stream in [true, false] {
        let body = with(chat(MODEL), json!({"stream": stream})).to_string();
        let mut socket = TcpStream::connect(proxy.address()).await.unwrap();
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        let seen = api.calls().len();
        socket.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
        assert!(api.until(|api| api.calls().len() > seen).await);
        // As model servers do: without it, nobody would notice a client that crashed.
        socket.shutdown().await.unwrap();
        let aborted = 1 + u64::from(!stream);
        assert!(
            api.until(|api| api.totals().aborted == aborted).await,
            "the call upstream ends, stream: {stream}"
        );
    }
    let entries = proxy.entries().await;
    assert!(
        entries.iter().all(|entry| entry.outcome == breakeven::ledger::Outcome::Cancelled),
        "{entries:?}"
    );
}

#[tokio::test]
async fn heads_and_bodies_that_trickle_and_rests_that_last_are_closed_in_time() {
    let api = FakeBackend::start(Personality::OpenAi, Settings::default()).await.unwrap();
    let limits = "[limits]\nheader_timeout = \"300ms\"\nbody_timeout = \"400ms\"\nidle_timeout = \"500ms\"";
    let proxy = proxy_before(&api, limits).await;
    let start = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5000\r\n";
    let whole = "GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n".to_owned();
    // What comes at once, and what then comes letter by letter.
    let cases = [
        ("a head", start.to_owned(), "x-slow: "),
        ("a body", format!("{start}\r\n"), "{\"model\":\""),
        (
            "a chunked body",
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".to_owned(),
            "5;ext=",
        ),
        ("a second head", format!("{whole}{start}"), "x-slow: "),
        ("line ends before a head", String::new(), "\r\n"),
        ("a rest", whole.clone(), ""),
    ];
    for (name, at_once, trickle) in cases {
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        stream.write_all(at_once.as_bytes()).await.unwrap();
        let (mut reading, mut writing) = stream.split();
        let drip = async {
            let mut pause = tokio::time::interval(Duration::from_millis(50));
            for letter in trickle.bytes().chain(std::iter::repeat(b'a')) {
                pause.tick().await;
                if !trickle.is_empty() && writing.write_all(&[letter]).await.is_err() {
                    break;
                }
            }
            std::future::pending::<()>().await;
        };
        let mut answer = Vec::new();
        let watch = Stopwatch::start();
        tokio::select! {
            // An answer and then a reset is an end as well.
            _ = reading.read_to_end(&mut answer) => {}
            () = drip => {}
            () = tokio::time::sleep(Duration::from_secs(10)) => panic!("{name}: it is left open"),
        }
        assert!(watch.elapsed() >= Duration::from_millis(200), "{name}: closed after {:?}", watch.elapsed());
    }
    assert!(api.calls().is_empty());
}

/// The median of so many calls, one after the other, and the slowest one in a hundred.
async fn times(http: &Http, calls: usize) -> (Duration, Duration) {
    let mut times = Vec::with_capacity(calls);
    for _ in 0..calls {
        let watch = Stopwatch::start();
        assert_eq!(http.post("/chat/completions", &chat(MODEL)).await.status, StatusCode::OK);
        times.push(watch.elapsed());
    }
    times.sort_unstable();
    (times[calls / 2], times[calls * 99 / 100])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_streams_slow_heads_and_slow_readers_leave_other_calls_unharmed() {
    let slow = scale("BREAKEVEN_SLOW_STREAMS", 40);
    let api = FakeBackend::start(Personality::OpenAi, Settings { slots: 20_000, ..Settings::default() });
    let api = api.await.unwrap();
    // A process of its own, so that its memory is its own.
    let served = Served::start("", &config_before(&api, ""), &[]).await;
    let http = Http::new(&served.url());
    times(&http, 50).await;
    let ((alone, alone_p99), before) = (times(&http, 200).await, resident(&served));
    // What the API and the client do in this process takes its time as well.
    let direct = Http::new(&api.url());
    times(&direct, 50).await;
    let (_, direct_alone_p99) = times(&direct, 200).await;

    api.set(|settings| {
        settings.output_tokens = 100;
        settings.time_per_output_token = Duration::from_secs(5);
    });
    let mut streams = Vec::with_capacity(slow);
    for _ in 0..slow {
        let mut events = Events::of(http.open("/chat/completions", &streamed()).await);
        events.next().await.unwrap();
        streams.push(events);
    }
    // Fifteen megabytes: more than the sockets between take.
    let words = "long ".repeat(3_000);
    let event = format!("data: {{\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{words}\"}}}}]}}\n\n");
    let long = Verbatim { content_type: "text/event-stream", body: event.repeat(1_000).into() };
    api.set(|settings| {
        settings.time_per_output_token = Duration::ZERO;
        settings.verbatim = Some(long);
    });
    let mut sockets = Vec::new();
    let body = streamed().to_string();
    for index in 0..slow * 2 / 5 {
        let mut stream = TcpStream::connect(served.address).await.unwrap();
        let head =
            format!("POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n", body.len());
        // One of two says half of a head, the other takes nothing of a long answer.
        let text = if index % 2 == 0 { head } else { format!("{head}\r\n{body}") };
        stream.write_all(text.as_bytes()).await.unwrap();
        sockets.push(stream);
    }
    let served_readers = async {
        for stream in sockets.iter_mut().skip(1).step_by(2) {
            let mut start = [0; 15];
            stream.read_exact(&mut start).await.unwrap();
            assert_eq!(&start, b"HTTP/1.1 200 OK");
        }
    };
    tokio::time::timeout(Duration::from_mins(2), served_readers).await.expect("the readers are served");
    api.set(|settings| settings.verbatim = None);
    // What is measured is the state that lasts: buffers are full, and nothing moves in them.
    let settles = async { while times(&http, 20).await.1 > alone_p99 * 2 + ROOM {} };
    tokio::time::timeout(Duration::from_mins(1), settles).await.expect("buffers fill and that is all");
    let ((beside, beside_p99), after) = (times(&http, 200).await, resident(&served));
    let (_, direct_beside_p99) = times(&direct, 200).await;
    let per_connection = after.saturating_sub(before) / (slow * 7 / 5);
    eprintln!(
        "p99 alone {alone_p99:?}, beside {slow} slow streams and {} slow sockets {beside_p99:?} (without the proxy \
         {direct_alone_p99:?} and {direct_beside_p99:?}); {per_connection} KiB a connection",
        sockets.len()
    );
    // The median, as the slowest of few calls tell more of the machine than of the proxy.
    assert!(beside < alone * 2 + ROOM / 10, "{alone:?} alone, {beside:?} beside");
    assert!(per_connection < 1024, "{before} KiB before, {after} KiB after");
    assert_eq!(metric(&served.admin_url(), "breakeven_panics_total").await, 0);
    drop((streams, sockets));
}

#[tokio::test]
async fn whatever_clients_call_their_models_and_teams_the_series_stay_below_their_limit() {
    let api = FakeBackend::start(Personality::OpenAi, Settings::default()).await.unwrap();
    let proxy = proxy_before(&api, "[metrics]\nteams = [\"blue\", \"green\"]").await;
    let http = Http::new(&proxy.url());
    for number in 0..1_000 {
        let request = http
            .request(http::Method::POST, "/chat/completions")
            .header("content-type", "application/json")
            .header("x-breakeven-tags", format!("team=team-{number},project=p-{number}"));
        let reply = http.send(request, chat(&format!("model-{number}")).to_string().into()).await;
        assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
    }
    let reply = Http::new(&proxy.admin_url()).get("/metrics").await;
    let series = reply.text().lines().filter(|line| !line.starts_with('#') && !line.is_empty()).count();
    assert!(series <= 2_000, "{series}");
    assert!(reply.text().contains("model=\"other\""));
}
