//! Sockets of applications: accepted in one place, served by one worker thread each, drained at the end.
//!
//! A worker has a runtime of its own and its own upstream connections, so that a call never leaves its
//! thread. The acceptor hands every connection to the worker with the fewest.

pub mod listening;
pub mod patience;
pub mod process;
pub mod streams;
pub mod tls;

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use http::Request;
use http_body::Body as _;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tracing::{debug, warn};

use crate::clock::Stopwatch;
use crate::config::Limits;
use crate::gateway::shares::Held;
use crate::gateway::{Gateway, Identity, Shares};
use crate::openai::Endpoint;
use crate::proxy;
use crate::upstream::client::Clients;
use listening::Listening;
use patience::{Patient, Phase, RestTimer};
use streams::{Paced, Streams};

/// Connections on their way to a worker.
const HANDED_OVER: usize = 1024;
/// What a connection reads at once, after it has sent as much before; and what may wait for its client.
const READ_BYTES: usize = 64 * 1024;
/// As [`READ_BYTES`], while connections are few: a long prompt then comes in one piece, which is not copied. A
/// connection keeps its buffer as long as it lasts, so this takes 48 MiB more at most, and as much again where clients
/// leave their answers unread.
const LONG_READ_BYTES: usize = 256 * 1024;
/// Connections that make long reads.
const LONG_READERS: usize = 256;
/// How often workers close upstream connections that have rested too long.
const HOUSEKEEPING: Duration = Duration::from_secs(1);
/// What an HTTP/2 client sends first.
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2";

/// The worker threads.
#[derive(Debug)]
pub struct Workers {
    threads: Vec<Worker>,
    /// Connections of each address.
    shares: Arc<Shares>,
    stop: watch::Sender<Stop>,
}

/// How far the end has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stop {
    No,
    /// No new requests on a connection; what is under way may finish.
    Drain,
    /// Answers that are under way end with a word of why.
    CutOff,
    /// Now.
    Abort,
}

#[derive(Debug)]
struct Worker {
    sender: mpsc::Sender<Accepted>,
    connections: Arc<AtomicUsize>,
    thread: JoinHandle<()>,
}

/// A connection on its way to its worker.
#[derive(Debug)]
struct Accepted {
    stream: std::net::TcpStream,
    address: IpAddr,
    /// What it may read at once.
    read_bytes: usize,
    open: Open,
    _held: Held,
}

impl Workers {
    /// Starts the threads.
    pub fn start(gateway: &Arc<Gateway>, tls: Option<&tls::Acceptor>) -> anyhow::Result<Self> {
        let config = gateway.state().config.clone();
        let (stop, stopped) = watch::channel(Stop::No);
        let mut workers = Vec::with_capacity(config.server.workers);
        for number in 0..config.server.workers.max(1) {
            let (sender, receiver) = mpsc::channel(HANDED_OVER);
            let connections = Arc::new(AtomicUsize::new(0));
            let work = Work { gateway: gateway.clone(), tls: tls.cloned(), stop: stopped.clone() };
            let thread = std::thread::Builder::new()
                .name(format!("worker-{number}"))
                .spawn(move || run(work, receiver))
                .context("cannot start a worker thread")?;
            workers.push(Worker { sender, connections, thread });
        }
        Ok(Self { threads: workers, shares: Arc::default(), stop })
    }

    /// Accepts connections and hands them out until `stop`.
    pub async fn accept(
        &self,
        listener: TcpListener,
        gateway: Arc<Gateway>,
        mut stop: watch::Receiver<bool>,
    ) {
        let mut listening = Listening::new(listener, "application");
        loop {
            let (stream, peer) = tokio::select! {
                accepted = listening.accept() => accepted,
                _ = stop.wait_for(|asked| *asked) => return,
            };
            self.hand_over(stream, peer, &gateway.state().config.limits);
        }
    }

    fn hand_over(&self, stream: TcpStream, peer: SocketAddr, limits: &Limits) {
        let open: usize = self.threads.iter().map(|worker| worker.connections.load(Ordering::Relaxed)).sum();
        let least = self.threads.iter().min_by_key(|worker| worker.connections.load(Ordering::Relaxed));
        let Some(worker) = least.filter(|_| open < limits.max_connections) else {
            debug!(%peer, open, "a connection was refused: there are {open} already");
            return;
        };
        let free = limits.max_connections - open;
        let Some(held) = self.shares.enter(Identity::address(peer.ip()), free, limits.caller_share) else {
            debug!(%peer, open, "a connection was refused: its address has its share of {open} already");
            return;
        };
        let handed = stream.set_nodelay(true).and_then(|()| stream.into_std());
        let Ok(stream) = handed else { return };
        let read_bytes = if open < LONG_READERS { LONG_READ_BYTES } else { READ_BYTES };
        let open = Open::count(&worker.connections);
        let accepted = Accepted { stream, address: peer.ip(), read_bytes, open, _held: held };
        if worker.sender.try_send(accepted).is_err() {
            warn!(%peer, "a connection was refused: the workers are behind");
        }
    }

    /// Lets what is under way finish, for so long at most; then ends it.
    pub async fn drain(&self, gateway: &Gateway, patience: Duration, abort: impl Future<Output = ()>) {
        self.stop.send_replace(Stop::Drain);
        tokio::select! {
            () = self.ended() => return,
            () = tokio::time::sleep(patience) => warn!("calls were cut off: they took longer than {patience:?}"),
            () = abort => warn!("calls were cut off: a second signal came"),
        }
        gateway.cut_off();
        self.stop.send_replace(Stop::CutOff);
        // Who does not take the last word is not waited for.
        tokio::time::timeout(CUT_OFF_GRACE, self.ended()).await.ok();
        self.stop.send_replace(Stop::Abort);
        // What is cut off books itself at once.
        self.ended().await;
    }

    async fn ended(&self) {
        while !self.threads.iter().all(|worker| worker.thread.is_finished()) {
            tokio::time::sleep(DRAIN_LOOK).await;
        }
    }
}

/// How often a drain looks whether the workers have ended.
const DRAIN_LOOK: Duration = Duration::from_millis(10);
/// Answers that are cut off have so long to be taken.
const CUT_OFF_GRACE: Duration = Duration::from_secs(1);

/// What a worker works with.
struct Work {
    gateway: Arc<Gateway>,
    tls: Option<tls::Acceptor>,
    stop: watch::Receiver<Stop>,
}

fn run(work: Work, receiver: mpsc::Receiver<Accepted>) {
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(serve(Arc::new(work), receiver)),
        Err(error) => tracing::error!(%error, "a worker cannot start its runtime: {error}"),
    }
}

async fn serve(work: Arc<Work>, mut receiver: mpsc::Receiver<Accepted>) {
    let clients = Arc::new(Clients::default());
    let mut stop = work.stop.clone();
    let ledger = work.gateway.ledger.clone();
    // Ends with the runtime, after all calls.
    tokio::spawn(async move { ledger.gather().await });
    let mut connections = JoinSet::new();
    let mut housekeeping = tokio::time::interval(HOUSEKEEPING);
    loop {
        tokio::select! {
            received = receiver.recv() => match received {
                Some(accepted) => {
                    connections.spawn(connection(work.clone(), clients.clone(), accepted));
                }
                None => break,
            },
            _ = housekeeping.tick() => {
                clients.close_expired();
                while connections.try_join_next().is_some() {}
            }
            _ = stop.wait_for(|stop| *stop != Stop::No) => break,
        }
    }
    // What was handed over before the end is served as well.
    while let Ok(accepted) = receiver.try_recv() {
        connections.spawn(connection(work.clone(), clients.clone(), accepted));
    }
    let finished = async {
        while connections.join_next().await.is_some() {}
        // Tunnels have left their connections, and are in flight as other calls are.
        while work.gateway.in_flight() > 0 {
            tokio::time::sleep(DRAIN_LOOK).await;
        }
    };
    tokio::select! {
        () = finished => {}
        _ = stop.wait_for(|stop| *stop == Stop::Abort) => {}
    }
    // Dropping the set cuts off what is left, and each call books what it has.
}

/// Counts a connection out on drop.
#[derive(Debug)]
struct Open(Arc<AtomicUsize>);

impl Open {
    fn count(connections: &Arc<AtomicUsize>) -> Self {
        connections.fetch_add(1, Ordering::Relaxed);
        Self(connections.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn connection(work: Arc<Work>, clients: Arc<Clients>, accepted: Accepted) {
    let Accepted { stream, address, read_bytes, open: _open, _held } = accepted;
    let Ok(stream) = TcpStream::from_std(stream) else { return };
    // What is in force now holds for as long as the connection does.
    let limits = work.gateway.state().config.limits.clone();
    let talk = Talk { work: &work, clients, limits: &limits, address, read_bytes };
    match &work.tls {
        None => {
            let mut start = [0; HTTP2_PREFACE.len()];
            let mut stop = work.stop.clone();
            // A connection on which nobody has said anything does not hold up the drain.
            let silenced = async {
                if stop.wait_for(|stop| *stop != Stop::No).await.is_ok() {
                    tokio::time::sleep(DRAIN_GRACE).await;
                }
            };
            let peeked = tokio::select! {
                peeked = peek(&stream, &mut start, &limits) => peeked,
                () = silenced => return,
            };
            let Some(length) = peeked else { return };
            let is_http2 = start[..length] == *HTTP2_PREFACE;
            talk.hold(stream, is_http2).await;
        }
        Some(acceptor) => match acceptor.accept(stream, limits.header_timeout).await {
            Ok(stream) => {
                let is_http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
                talk.hold(stream, is_http2).await;
            }
            Err(error) => debug!(%error, "a TLS handshake failed: {error}"),
        },
    }
}

/// Looks at the first bytes without taking them. None when they do not come in time.
async fn peek(stream: &TcpStream, start: &mut [u8], limits: &Limits) -> Option<usize> {
    let mut length = tokio::time::timeout(limits.idle_timeout, stream.peek(start)).await.ok()?.ok()?;
    let mut pause = PEEK_PAUSE;
    let waiting = Stopwatch::start();
    // Fewer bytes than a preface decide only when they are not the beginning of one.
    while length > 0 && length < start.len() && start[..length] == HTTP2_PREFACE[..length] {
        if waiting.elapsed() >= limits.header_timeout {
            return None;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PEEK_PAUSE);
        length = stream.peek(start).await.ok()?;
    }
    Some(length)
}

/// Once a drain has begun, a connection has so long to say its first word.
const DRAIN_GRACE: Duration = Duration::from_millis(100);
/// Pause before looking again at a connection that has sent half of a preface; doubled each time, so that a
/// thousand connections which send one letter cost next to nothing.
const PEEK_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PEEK_PAUSE: Duration = Duration::from_millis(500);
/// Streams that one HTTP/2 connection may have open.
const MAX_HTTP2_STREAMS: u32 = 256;
/// Streams that a client has opened and reset before they were looked at; more of them end the connection, which is
/// how a rapid reset (CVE-2023-44487) ends.
const MAX_HTTP2_RESETS_WAITING: usize = 20;
/// Streams that break the rules of HTTP/2, over the life of a connection; more of them end it.
const MAX_HTTP2_FAULTS: usize = 256;
/// Bytes of one stream that wait for the socket.
const HTTP2_SEND_BUFFER: usize = 64 * 1024;

/// One client's connection, and what it is served with.
struct Talk<'a> {
    work: &'a Work,
    clients: Arc<Clients>,
    limits: &'a Limits,
    address: IpAddr,
    /// As [`Accepted::read_bytes`].
    read_bytes: usize,
}

impl Talk<'_> {
    async fn hold<S>(self, stream: S, is_http2: bool)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let result = if is_http2 { self.http2(stream).await } else { self.http1(stream).await };
        if let Err(error) = result {
            debug!(%error, "a connection ended: {error}");
        }
    }

    /// The longest time that a client may leave a connection without a request, or an answer unread.
    fn rest(&self) -> Duration {
        self.limits.idle_timeout.max(self.limits.header_timeout)
    }

    /// Ends when that is asked for, or more.
    async fn asked_to(&self, stop: Stop) {
        let mut asked = self.work.stop.clone();
        // An error means that nobody is left who could ask for more: that is the end, too.
        drop(asked.wait_for(|asked| *asked >= stop).await);
    }

    /// Drives a connection to its end; none when that is asked for before. For it is asked once, which leaves word
    /// where it will be said, and then only when something has been said: not whenever the connection moves.
    async fn unless_asked_to<F: Future>(&self, stop: Stop, mut connection: Pin<&mut F>) -> Option<F::Output> {
        let said = self.work.stop.clone();
        let mut asked = pin!(self.asked_to(stop));
        let mut has_asked = false;
        std::future::poll_fn(|context| {
            if let Poll::Ready(output) = connection.as_mut().poll(context) {
                return Poll::Ready(Some(output));
            }
            if std::mem::replace(&mut has_asked, true) && !said.has_changed().unwrap_or(true) {
                return Poll::Pending;
            }
            asked.as_mut().poll(context).map(|()| None)
        })
        .await
    }

    async fn http1<S>(&self, stream: S) -> hyper::Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let phase = Phase::default();
        let stream = Patient::new(stream, phase.clone(), self.limits.header_timeout, self.rest());
        let (gateway, clients, address) = (self.work.gateway.clone(), self.clients.clone(), self.address);
        // hyper moves a call's future about, and keeps room for it as long as the connection lasts: kilobytes, which a
        // box gives back when the answer begins. The one within is pinned at once, so that it is not copied.
        let service = service_fn(move |request: Request<Incoming>| {
            let (gateway, clients, phase) = (gateway.clone(), clients.clone(), phase.clone());
            phase.handed_over();
            Box::pin(async move {
                // An upload may go on after its answer has begun.
                let is_whole = request.body().is_end_stream()
                    || Endpoint::of(request.method(), request.uri().path()).is_routed();
                let answer = pin!(proxy::handle(&gateway, &clients, request, address)).await;
                if is_whole {
                    phase.answered();
                }
                Ok::<_, Infallible>(answer)
            })
        });
        let mut builder = http1::Builder::new();
        builder
            .timer(RestTimer::new(self.rest()))
            .header_read_timeout(self.rest())
            .max_header_size(self.limits.max_header_bytes)
            .max_buf_size(self.read_bytes.max(self.limits.max_header_bytes));
        let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service).with_upgrades());
        if let Some(result) = self.unless_asked_to(Stop::Drain, connection.as_mut()).await {
            return result;
        }
        connection.as_mut().graceful_shutdown();
        // To be looked at once more when answers are cut off is all that they need.
        if let Some(result) = self.unless_asked_to(Stop::CutOff, connection.as_mut()).await {
            return result;
        }
        connection.await
    }

    async fn http2<S>(&self, stream: S) -> hyper::Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let phase = Phase::default();
        let rest = self.rest();
        // A connection may be opened ahead of need, but not without ever asking for anything.
        let stream = Patient::new(stream, phase.clone(), rest, rest);
        let (gateway, clients, address) = (self.work.gateway.clone(), self.clients.clone(), self.address);
        let service = service_fn(move |request: Request<Incoming>| {
            let (gateway, clients) = (gateway.clone(), clients.clone());
            phase.handed_over();
            Box::pin(async move {
                let answer = pin!(proxy::handle(&gateway, &clients, request, address)).await;
                Ok::<_, Infallible>(answer.map(Paced::new))
            })
        });
        let streams = Streams::new(rest, self.work.stop.clone());
        let mut builder = http2::Builder::new(streams.clone());
        builder
            .timer(TokioTimer::new())
            .max_concurrent_streams(MAX_HTTP2_STREAMS)
            .max_pending_accept_reset_streams(MAX_HTTP2_RESETS_WAITING)
            .max_local_error_reset_streams(MAX_HTTP2_FAULTS)
            .max_send_buf_size(HTTP2_SEND_BUFFER)
            .max_header_list_size(u32::try_from(self.limits.max_header_bytes).unwrap_or(u32::MAX))
            .keep_alive_interval(self.limits.idle_timeout)
            // A ping waits behind what a slow client has not read yet.
            .keep_alive_timeout(rest);
        let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
        let is_drained = tokio::select! {
            result = &mut connection => return result,
            () = self.asked_to(Stop::Drain) => true,
            () = streams.idle(rest) => false,
        };
        connection.as_mut().graceful_shutdown();
        if is_drained {
            return connection.await;
        }
        // Nothing is under way: what is left in buffers has so long to be taken.
        tokio::time::timeout(rest, connection).await.unwrap_or(Ok(()))
    }
}
