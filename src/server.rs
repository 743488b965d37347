//! Sockets of applications: accepted in one place, served by one worker thread each, drained at the end.
//!
//! A worker has a runtime of its own and its own upstream connections, so that a call never leaves its
//! thread. The acceptor hands every connection to the worker with the fewest.

pub mod patience;
pub mod tls;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use http::Request;
use http_body::Body as _;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tracing::{debug, warn};

use crate::clock::Stopwatch;
use crate::config::Limits;
use crate::gateway::Gateway;
use crate::openai::Endpoint;
use crate::proxy;
use crate::upstream::client::Clients;
use patience::{Patient, Phase};

/// Connections on their way to a worker.
const HANDED_OVER: usize = 1024;
/// How often workers close upstream connections that have rested too long.
const HOUSEKEEPING: Duration = Duration::from_secs(1);
/// Pause after an accept that failed for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);
/// What an HTTP/2 client sends first.
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2";

/// The worker threads.
#[derive(Debug)]
pub struct Workers {
    workers: Vec<Worker>,
    stop: watch::Sender<Stop>,
}

/// How far the end has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stop {
    No,
    /// No new requests on a connection; what is under way may finish.
    Drain,
    /// Now.
    Abort,
}

#[derive(Debug)]
struct Worker {
    sender: mpsc::Sender<std::net::TcpStream>,
    connections: Arc<AtomicUsize>,
    thread: JoinHandle<()>,
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
            let work = Work {
                gateway: gateway.clone(),
                connections: connections.clone(),
                limits: config.limits.clone(),
                tls: tls.cloned(),
                stop: stopped.clone(),
            };
            let thread = std::thread::Builder::new()
                .name(format!("worker-{number}"))
                .spawn(move || run(work, receiver))
                .context("cannot start a worker thread")?;
            workers.push(Worker { sender, connections, thread });
        }
        Ok(Self { workers, stop })
    }

    /// Accepts connections and hands them out until `stop`.
    pub async fn accept(
        &self,
        listener: TcpListener,
        max_connections: usize,
        mut stop: watch::Receiver<bool>,
    ) {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = stop.wait_for(|asked| *asked) => return,
            };
            match accepted {
                Ok((stream, peer)) => self.hand_over(stream, peer, max_connections),
                Err(error) => {
                    warn!(%error, "cannot accept a connection: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn hand_over(&self, stream: TcpStream, peer: SocketAddr, max_connections: usize) {
        let open: usize = self.workers.iter().map(|worker| worker.connections.load(Ordering::Relaxed)).sum();
        let least = self.workers.iter().min_by_key(|worker| worker.connections.load(Ordering::Relaxed));
        let Some(worker) = least.filter(|_| open < max_connections) else {
            debug!(%peer, open, "a connection was refused: there are {open} already");
            return;
        };
        let handed = stream.set_nodelay(true).and_then(|()| stream.into_std());
        let Ok(stream) = handed else { return };
        worker.connections.fetch_add(1, Ordering::Relaxed);
        if worker.sender.try_send(stream).is_err() {
            worker.connections.fetch_sub(1, Ordering::Relaxed);
            warn!(%peer, "a connection was refused: the workers are behind");
        }
    }

    /// Lets what is under way finish, for so long at most; then ends it.
    pub async fn drain(&self, patience: Duration, abort: impl Future<Output = ()>) {
        self.stop.send_replace(Stop::Drain);
        let ends = || self.workers.iter().all(|worker| worker.thread.is_finished());
        let finished = async {
            while !ends() {
                tokio::time::sleep(DRAIN_LOOK).await;
            }
        };
        tokio::select! {
            () = finished => {}
            () = tokio::time::sleep(patience) => warn!("calls were cut off: they took longer than {patience:?}"),
            () = abort => warn!("calls were cut off: a second signal came"),
        }
        self.stop.send_replace(Stop::Abort);
        // What is cut off books itself at once.
        while !ends() {
            tokio::time::sleep(DRAIN_LOOK).await;
        }
    }
}

/// How often a drain looks whether the workers have ended.
const DRAIN_LOOK: Duration = Duration::from_millis(10);

/// What a worker works with.
struct Work {
    gateway: Arc<Gateway>,
    connections: Arc<AtomicUsize>,
    limits: Limits,
    tls: Option<tls::Acceptor>,
    stop: watch::Receiver<Stop>,
}

fn run(work: Work, receiver: mpsc::Receiver<std::net::TcpStream>) {
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(serve(Arc::new(work), receiver)),
        Err(error) => tracing::error!(%error, "a worker cannot start its runtime: {error}"),
    }
}

async fn serve(work: Arc<Work>, mut receiver: mpsc::Receiver<std::net::TcpStream>) {
    let clients = Arc::new(Clients::default());
    let mut stop = work.stop.clone();
    let mut connections = JoinSet::new();
    let mut housekeeping = tokio::time::interval(HOUSEKEEPING);
    loop {
        tokio::select! {
            received = receiver.recv() => match received {
                Some(stream) => {
                    connections.spawn(connection(work.clone(), clients.clone(), stream));
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
    while let Ok(stream) = receiver.try_recv() {
        connections.spawn(connection(work.clone(), clients.clone(), stream));
    }
    tokio::select! {
        () = async { while connections.join_next().await.is_some() {} } => {}
        _ = stop.wait_for(|stop| *stop == Stop::Abort) => {}
    }
    // Dropping the set cuts off what is left, and each call books what it has.
}

/// Counts a connection out on drop.
struct Open(Arc<AtomicUsize>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn connection(work: Arc<Work>, clients: Arc<Clients>, stream: std::net::TcpStream) {
    let _open = Open(work.connections.clone());
    let Ok(stream) = TcpStream::from_std(stream) else { return };
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
                peeked = peek(&stream, &mut start, &work.limits) => peeked,
                () = silenced => return,
            };
            let Some(length) = peeked else { return };
            let is_http2 = start[..length] == *HTTP2_PREFACE;
            talk(&work, clients, stream, is_http2).await;
        }
        Some(acceptor) => {
            let handshake = tokio::time::timeout(work.limits.header_timeout, acceptor.accept(stream)).await;
            match handshake {
                Ok(Ok(stream)) => {
                    let is_http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
                    talk(&work, clients, stream, is_http2).await;
                }
                Ok(Err(error)) => debug!(%error, "a TLS handshake failed: {error}"),
                Err(_) => debug!("a TLS handshake did not end in time"),
            }
        }
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

async fn talk<S>(work: &Work, clients: Arc<Clients>, stream: S, is_http2: bool)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let gateway = work.gateway.clone();
    let phase = Phase::default();
    let rest = work.limits.idle_timeout.max(work.limits.header_timeout);
    // An HTTP/2 connection may be opened ahead of need, but not without ever asking for anything.
    let head = if is_http2 { rest } else { work.limits.header_timeout };
    let stream = Patient::new(stream, phase.clone(), head, rest);
    let service = service_fn(move |request: Request<Incoming>| {
        let (gateway, clients, phase) = (gateway.clone(), clients.clone(), phase.clone());
        phase.handed_over();
        async move {
            // An upload may go on after its answer has begun, and HTTP/2 carries many calls at a time.
            let is_whole = request.body().is_end_stream()
                || Endpoint::of(request.method(), request.uri().path()).is_routed();
            let answer = proxy::handle(&gateway, &clients, request).await;
            if is_whole && !is_http2 {
                phase.answered();
            }
            Ok::<_, Infallible>(answer)
        }
    });
    let io = TokioIo::new(stream);
    let mut stop = work.stop.clone();
    let drain = async move { stop.wait_for(|stop| *stop != Stop::No).await.map_or((), drop) };
    let result = if is_http2 {
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .max_concurrent_streams(MAX_HTTP2_STREAMS)
            .max_header_list_size(u32::try_from(work.limits.max_header_bytes).unwrap_or(u32::MAX))
            .keep_alive_interval(Some(work.limits.idle_timeout));
        let connection = std::pin::pin!(builder.serve_connection(io, service));
        until_drained(connection, drain, http2::Connection::graceful_shutdown).await
    } else {
        let mut builder = http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            .header_read_timeout(rest)
            .max_buf_size(work.limits.max_header_bytes.max(8192));
        let connection = std::pin::pin!(builder.serve_connection(io, service).with_upgrades());
        until_drained(connection, drain, http1::UpgradeableConnection::graceful_shutdown).await
    };
    if let Err(error) = result {
        debug!(%error, "a connection ended: {error}");
    }
}

/// Drives a connection; once `drain` is done, until what is under way has finished.
async fn until_drained<C>(
    mut connection: std::pin::Pin<&mut C>,
    drain: impl Future<Output = ()>,
    shut_down: impl Fn(std::pin::Pin<&mut C>),
) -> hyper::Result<()>
where
    C: Future<Output = hyper::Result<()>>,
{
    tokio::select! {
        result = &mut connection => return result,
        () = drain => shut_down(connection.as_mut()),
    }
    connection.await
}
