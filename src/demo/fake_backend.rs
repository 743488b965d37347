//! A scriptable server that speaks OpenAI's API: the other side of every test, and of the demo.
//!
//! It is a real HTTP server (HTTP/1.1 and h2c) on a real socket, in the process or as a process of its own. It
//! answers every endpoint that the proxy has to understand in the shape of one of three servers
//! ([`Personality`]), takes the time that its [`Settings`] say, and goes wrong when it is told to ([`Fault`]).
//! It keeps the truth: what it saw ([`FakeBackend::requests`]) and what it made ([`FakeBackend::produced`]).
//!
//! Replies are made of words that are one token each, so its token counts are exact in the vocabulary of the
//! gpt-4o family, and equal requests get equal replies.

mod answer;
mod chat;
mod costs;
mod delivery;
mod echo;
mod errors;
mod log;
mod media;
mod responses;
mod routes;
mod script;
mod slots;
mod store;
mod text;
mod wire;

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};

use self::answer::Ask;
pub use self::costs::Costs;
use self::delivery::{Body, Delivery, Pace};
use self::errors::Failure;
use self::log::Log;
pub use self::log::{Produced, SeenRequest, State, Totals};
use self::script::Behaviour;
pub use self::script::{Chaos, Fault};
use self::slots::Slots;
use self::store::Store;
pub use self::text::words;
use self::wire::{Connection, Wire};
use crate::clock::Clock;

/// Larger request bodies break the connection.
const MAX_BODY_BYTES: usize = 64 << 20;

/// How long [`FakeBackend::until`] waits for what it was told.
const MAX_WAIT: Duration = Duration::from_secs(20);

/// vLLM and llama.cpp close connections that are idle for so long.
const IDLE_CLOSE: Duration = Duration::from_secs(5);

/// A request header that sets [`Settings::output_tokens`] for that request.
pub const OUTPUT_TOKENS: &str = "x-fake-output-tokens";

/// Whose shapes and habits are imitated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum Personality {
    #[value(name = "openai")]
    OpenAi,
    Vllm,
    #[value(name = "llamacpp")]
    LlamaCpp,
}

/// How the server is, changeable while it runs with [`FakeBackend::set`].
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Models it has; empty: any. llama.cpp serves any name in any case.
    pub models: Vec<String>,
    /// The only key that is accepted; none: no key is asked for.
    pub api_key: Option<String>,
    /// Longest input and output together, in tokens.
    pub context_window: u64,
    /// Tokens of a reply that no limit cuts.
    pub output_tokens: u64,
    /// Tokens of thought before the reply; part of the output.
    pub reasoning_tokens: u64,
    /// Tokens of each input that are reported as cached.
    pub cached_input_tokens: u64,
    pub serves_embeddings: bool,
    pub time_to_first_token: Duration,
    pub time_per_output_token: Duration,
    /// Requests that generate at once; more of them wait in line.
    pub slots: usize,
    /// Whether `/health` says so.
    pub healthy: bool,
    /// While it loads its model it answers everything with 503.
    pub loading: bool,
    /// Faults of every call.
    pub faults: Vec<Fault>,
    pub chaos: Option<Chaos>,
    /// What every call is answered, instead of what it asks for.
    pub verbatim: Option<Verbatim>,
    /// What the organisation's costs are; none: there is no such endpoint.
    pub costs: Option<Costs>,
    /// Responses after which a connection is closed; none: never.
    pub requests_per_connection: Option<u32>,
}

impl Default for Settings {
    /// Fast, healthy and without limits: any model, no key, 16 tokens a reply at once.
    fn default() -> Self {
        Self {
            models: Vec::new(),
            api_key: None,
            context_window: 128_000,
            output_tokens: 16,
            reasoning_tokens: 0,
            cached_input_tokens: 0,
            serves_embeddings: false,
            time_to_first_token: Duration::ZERO,
            time_per_output_token: Duration::ZERO,
            slots: 1_024,
            healthy: true,
            loading: false,
            faults: Vec::new(),
            chaos: None,
            verbatim: None,
            costs: None,
            requests_per_connection: None,
        }
    }
}

/// An answer that is sent as it is: odd spacing, unknown members, a capture of a real server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verbatim {
    pub content_type: &'static str,
    pub body: Bytes,
}

/// A running server. It stops when it is dropped.
#[derive(Debug)]
pub struct FakeBackend {
    server: Arc<Server>,
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    accepting: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Server {
    personality: Personality,
    settings: Mutex<Settings>,
    next_faults: Mutex<VecDeque<Fault>>,
    random: Mutex<fastrand::Rng>,
    slots: Slots,
    store: Store,
    log: Arc<Log>,
    clock: Clock,
    number: AtomicU64,
    /// Generations that nobody waits for any more.
    orphans: Mutex<JoinSet<()>>,
}

impl FakeBackend {
    /// Starts on a free port of the loopback.
    pub async fn start(personality: Personality, settings: Settings) -> io::Result<Self> {
        Self::start_on((Ipv4Addr::LOCALHOST, 0).into(), personality, settings).await
    }

    pub async fn start_on(
        listen: SocketAddr,
        personality: Personality,
        settings: Settings,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(listen).await?;
        let address = listener.local_addr()?;
        let seed = settings.chaos.as_ref().map_or(0, |chaos| chaos.seed);
        let log = Arc::new(Log::new());
        let server = Arc::new(Server {
            personality,
            slots: Slots::new(settings.slots, Arc::clone(&log)),
            settings: Mutex::new(settings),
            next_faults: Mutex::default(),
            random: Mutex::new(fastrand::Rng::with_seed(seed)),
            store: Store::default(),
            log,
            clock: Clock::system(),
            number: AtomicU64::new(0),
            orphans: Mutex::default(),
        });
        let (stop, stopped) = oneshot::channel();
        let accepting = tokio::spawn(accept(Arc::clone(&server), listener, stopped));
        Ok(Self { server, address, stop: Some(stop), accepting: Some(accepting) })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The base URL that goes into a config: `http://127.0.0.1:PORT/v1`.
    pub fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    /// The last requests, oldest first, probes included.
    pub fn requests(&self) -> Vec<SeenRequest> {
        self.server.log.requests()
    }

    /// The last requests that are calls: no health probes, no lists of models.
    pub fn calls(&self) -> Vec<SeenRequest> {
        self.requests().into_iter().filter(|request| routes::is_call(request.uri.path())).collect()
    }

    /// What the last calls made it do, oldest first, those that still run included.
    pub fn produced(&self) -> Vec<Produced> {
        self.server.log.produced()
    }

    /// Sums over every call that has ended.
    pub fn totals(&self) -> Totals {
        self.server.log.totals()
    }

    /// Changes the settings for requests that come from now on.
    pub fn set(&self, change: impl FnOnce(&mut Settings)) {
        let mut settings = self.server.lock_settings();
        let before = settings.clone();
        change(&mut settings);
        if settings.slots != before.slots {
            self.server.slots.resize(settings.slots);
        }
        let reseeded = settings.chaos.as_ref().map(|chaos| chaos.seed);
        if let Some(seed) = reseeded.filter(|_| settings.chaos != before.chaos) {
            lock(&self.server.random).seed(seed);
        }
    }

    /// The next `count` calls go wrong like this. Calls queue up behind earlier orders; probes are spared.
    pub fn fail_next(&self, count: usize, fault: &Fault) {
        lock(&self.server.next_faults).extend(std::iter::repeat_n(fault.clone(), count));
    }

    /// Calls that generate now.
    pub fn in_flight(&self) -> usize {
        self.server.slots.running()
    }

    /// Calls that wait for a slot now.
    pub fn waiting(&self) -> usize {
        self.server.slots.waiting()
    }

    pub fn most_in_flight(&self) -> usize {
        self.server.slots.most_running()
    }

    /// Time since it started, on the scale of [`State::Aborted`] and [`SeenRequest::at`].
    pub fn elapsed(&self) -> Duration {
        self.server.log.started.elapsed()
    }

    /// Waits until something is true of it, at most 20 s; false when it never was.
    pub async fn until(&self, condition: impl Fn(&Self) -> bool) -> bool {
        let mut version = self.server.log.watch();
        let wait = async {
            while !condition(self) {
                if version.changed().await.is_err() {
                    return;
                }
            }
        };
        tokio::time::timeout(MAX_WAIT, wait).await.is_ok()
    }

    /// Stops as if killed: the port closes and every connection with it.
    pub async fn stop(mut self) {
        drop(self.stop.take());
        if let Some(accepting) = self.accepting.take() {
            // The task ends by itself or was cancelled with its runtime: both are the end.
            drop(accepting.await);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Server {
    fn lock_settings(&self) -> MutexGuard<'_, Settings> {
        lock(&self.settings)
    }

    fn settings(&self) -> Settings {
        self.lock_settings().clone()
    }

    /// What goes wrong with the next call: the settings' faults, the next ordered one, and chance.
    fn behaviour(&self, settings: &Settings, path: &str) -> Behaviour {
        if !routes::is_call(path) {
            return Behaviour::default();
        }
        let ordered = lock(&self.next_faults).pop_front();
        let drawn = settings.chaos.as_ref().and_then(|chaos| script::draw(chaos, &mut lock(&self.random)));
        Behaviour::of(settings.faults.iter().chain(&ordered).chain(drawn))
    }

    /// Finishes a generation even if whoever asked for it goes away.
    async fn run_to_the_end<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> T {
        let (sender, receiver) = oneshot::channel();
        {
            let mut orphans = lock(&self.orphans);
            while orphans.try_join_next().is_some() {}
            // Sending fails when nobody waits for it; then dropping the result is what is wanted.
            orphans.spawn(async move { drop(sender.send(work.await)) });
        }
        match receiver.await {
            Ok(result) => result,
            Err(_) => std::future::pending().await,
        }
    }
}

async fn accept(server: Arc<Server>, listener: TcpListener, mut stopped: oneshot::Receiver<()>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            _ = &mut stopped => break,
            accepted = listener.accept() => {
                if let Ok((stream, _)) = accepted {
                    connections.spawn(serve(Arc::clone(&server), stream));
                }
            }
            Some(_) = connections.join_next() => {}
        }
    }
    connections.shutdown().await;
    lock(&server.orphans).abort_all();
}

async fn serve(server: Arc<Server>, stream: TcpStream) {
    // Latency would only be worse without it.
    drop(stream.set_nodelay(true));
    let connection = Arc::new(Connection::default());
    let wire = TokioIo::new(Wire::new(stream, Arc::clone(&connection)));
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new());
    builder.http2().timer(TokioTimer::new());
    let idle = (server.personality != Personality::OpenAi).then_some(IDLE_CLOSE);
    builder.http1().header_read_timeout(idle);
    let answer = service_fn(move |request| {
        let (server, connection) = (Arc::clone(&server), Arc::clone(&connection));
        async move { respond(&server, connection, request).await }
    });
    // A connection that breaks is what clients do, and what the script orders.
    drop(builder.serve_connection(wire, answer).await);
}

/// The story of one request.
async fn respond(
    server: &Arc<Server>,
    connection: Arc<Connection>,
    request: Request<Incoming>,
) -> Result<Response<Body>, io::Error> {
    let number = server.number.fetch_add(1, Ordering::Relaxed);
    let seen = read(server, request).await?;
    let mut settings = server.settings();
    if let Ok(tokens) = seen.header(OUTPUT_TOKENS).parse() {
        settings.output_tokens = tokens;
    }
    let behaviour = server.behaviour(&settings, seen.uri.path());
    if !behaviour.header_delay.is_zero() {
        tokio::time::sleep(behaviour.header_delay).await;
    }
    if behaviour.reset_before_headers {
        connection.reset();
        return Err(io::ErrorKind::ConnectionReset.into());
    }
    let served = connection.served.fetch_add(1, Ordering::SeqCst) + 1;
    let last = settings.requests_per_connection.is_some_and(|most| served >= most);
    let json = if is_json(&seen) { seen.json() } else { serde_json::Value::Null };
    let model = json.get("model").and_then(serde_json::Value::as_str).unwrap_or_default().to_owned();
    let answered = answer(server, &settings, &behaviour, &seen, json, number);
    let stream = answered.as_ref().is_ok_and(|answer| matches!(answer.payload, answer::Payload::Events(_)));
    let tally = routes::is_call(seen.uri.path()).then(|| server.log.open(seen.uri.path(), &model, stream));
    let mut response = match (answered, tally) {
        (Ok(answer), Some(tally)) => {
            let pace = Pace {
                to_first_token: settings.time_to_first_token,
                per_token: settings.time_per_output_token,
            };
            Delivery { server: Arc::clone(server), connection, behaviour, tally, pace }.send(answer).await
        }
        (Ok(answer), None) => match answer.payload {
            answer::Payload::Whole(body) => delivery::whole(answer.content_type, body),
            answer::Payload::Events(_) => unreachable!("only calls stream"),
        },
        (Err(failure), tally) => {
            if let Some(tally) = tally {
                tally.refuse(failure.status.as_u16());
            }
            delivery::failure(&failure)
        }
    };
    delivery::sign(&mut response, server.personality, number, &model, last);
    Ok(response)
}

async fn read(server: &Server, request: Request<Incoming>) -> Result<SeenRequest, io::Error> {
    let (head, body) = request.into_parts();
    let at = server.log.started.elapsed();
    let body = Limited::new(body, MAX_BODY_BYTES).collect().await.map_err(io::Error::other)?.to_bytes();
    let seen = SeenRequest {
        method: head.method,
        uri: head.uri,
        version: head.version,
        headers: head.headers,
        body,
        at,
    };
    server.log.saw(seen.clone());
    Ok(seen)
}

fn is_json(seen: &SeenRequest) -> bool {
    !seen.body.is_empty() && !seen.header("content-type").starts_with("multipart/")
}

fn answer(
    server: &Server,
    settings: &Settings,
    behaviour: &Behaviour,
    seen: &SeenRequest,
    json: serde_json::Value,
    number: u64,
) -> Result<answer::Answer, Failure> {
    let personality = server.personality;
    let path = seen.uri.path();
    if settings.loading {
        return Err(errors::loading(personality));
    }
    if let Some(costs) = settings.costs.as_ref().filter(|_| path == costs::PATH) {
        return costs.answer(personality, seen);
    }
    check_key(personality, settings, seen)?;
    if let Some(answer) = routes::own(server, path, seen.uri.query().unwrap_or_default()) {
        return answer;
    }
    if let Some(refusal) = behaviour.refuse {
        return Err(errors::ordered(personality, refusal));
    }
    if personality == Personality::Vllm && path.len() > 1 && path.ends_with('/') {
        let location = format!("http://{}{}", seen.header("host"), path.trim_end_matches('/'));
        return Err(Failure { location: Some(location), ..Failure::new(307, serde_json::Value::Null) });
    }
    let method = seen.method.as_str();
    let Some(below) = path.strip_prefix("/v1") else {
        return Err(errors::not_found(personality, method, path));
    };
    if seen.header("content-encoding") == "gzip" {
        return Err(errors::compressed_body(personality));
    }
    if !seen.header(echo::ECHO).is_empty() {
        return Ok(echo::echo(seen));
    }
    if let Some(verbatim) = settings.verbatim.as_ref().filter(|_| routes::is_call(path)) {
        return Ok(answer::Answer::verbatim(verbatim));
    }
    let ask = Ask {
        personality,
        settings,
        behaviour,
        method,
        path: below,
        content_type: seen.header("content-type"),
        body: &seen.body,
        json,
        number,
        created: server.clock.now().as_millis() / 1000,
    };
    routes::v1(server, &ask)
}

fn check_key(personality: Personality, settings: &Settings, seen: &SeenRequest) -> Result<(), Failure> {
    let Some(wanted) = &settings.api_key else { return Ok(()) };
    let given = seen.header("authorization").strip_prefix("Bearer ");
    if given == Some(wanted) || routes::is_open(personality, seen.uri.path()) {
        return Ok(());
    }
    Err(errors::unauthorized(personality, given))
}
