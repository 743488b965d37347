//! Connections to one `http://` base URL, kept open between calls.
//!
//! A pool belongs to one worker thread: its connections are registered with that worker's runtime, and its lock
//! is never contended. With an [`Endpoint`] the host is a name, and the address to connect to is the replica's own;
//! connections to an address that it had before are not used again. The connection used last is used first, so that a quiet hour lets the others expire.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Response, Uri};
use http_body::{Frame, SizeHint};
use tokio::net::TcpStream;

use super::delivery::Delivery;
use super::http1::decode::Decoder;
use super::http1::{Answer, Connection, RequestHead, WireError};
use crate::clock::Stopwatch;
use crate::fleet::Endpoint;

/// A reused connection that turns out closed within this time of sending was closed before it saw the request,
/// so the request may be sent again; later, the upstream failed at the work.
const STALE_WITHIN: Duration = Duration::from_secs(1);
const DEFAULT_PORT: u16 = 80;

#[derive(Debug, Clone)]
pub struct PoolSettings {
    pub connect_timeout: Duration,
    /// Connections that rest longer are closed; below the keep-alive timeout of the servers (often 5 s).
    pub idle_timeout: Duration,
    /// Connections that rest at the same time.
    pub max_idle: usize,
}

#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// Nothing was sent.
    #[error("cannot connect to `{address}`")]
    Connect {
        address: String,
        #[source]
        source: io::Error,
    },
    /// Nothing was sent.
    #[error("`{address}` did not accept the connection in {timeout:?}")]
    ConnectTimeout { address: String, timeout: Duration },
    #[error(transparent)]
    Wire(#[from] WireError),
}

#[derive(Debug, thiserror::Error)]
#[error("`{url}` is not an http:// base URL")]
pub struct BadBaseUrl {
    url: String,
}

#[derive(Debug, Clone)]
pub struct Pool(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    host: String,
    port: u16,
    host_field: HeaderValue,
    /// Path of the base URL, without a slash at its end.
    prefix: String,
    settings: PoolSettings,
    endpoint: Option<Arc<Endpoint>>,
    idle: Mutex<Vec<Idle>>,
}

#[derive(Debug)]
struct Idle {
    connection: Box<Connection>,
    /// Where it leads, if that may change.
    address: Option<SocketAddr>,
    since: Stopwatch,
}

/// How long a connection had rested when it was taken for a call.
#[derive(Debug, Clone, Copy)]
struct Rest {
    since: Stopwatch,
    lasted: Duration,
}

impl Rest {
    /// Whether it was taken no longer than `limit` ago.
    fn is_within(&self, limit: Duration) -> bool {
        self.since.elapsed() < self.lasted + limit
    }
}

impl Pool {
    pub fn new(base_url: &str, settings: PoolSettings) -> Result<Self, BadBaseUrl> {
        Self::at(base_url, settings, None)
    }

    /// Connections to `endpoint`, if there is one, instead of to the host of the URL.
    pub fn at(
        base_url: &str,
        settings: PoolSettings,
        endpoint: Option<Arc<Endpoint>>,
    ) -> Result<Self, BadBaseUrl> {
        let bad = || BadBaseUrl { url: base_url.to_owned() };
        let uri: Uri = base_url.parse().map_err(|_| bad())?;
        let authority = uri.authority().ok_or_else(bad)?;
        if uri.scheme_str() != Some("http") || authority.as_str().contains('@') {
            return Err(bad());
        }
        Ok(Self(Arc::new(Shared {
            host: authority.host().trim_matches(['[', ']']).to_owned(),
            port: authority.port_u16().unwrap_or(DEFAULT_PORT),
            host_field: HeaderValue::from_str(authority.as_str()).map_err(|_| bad())?,
            prefix: uri.path().trim_end_matches('/').to_owned(),
            settings,
            endpoint,
            idle: Mutex::default(),
        })))
    }

    /// Sends a request to `target`, a path (and query) below the base URL, and waits for the head of the answer.
    ///
    /// `host`, framing and the fields of one hop are written here; those in `headers` are passed over. A reused
    /// connection that the upstream had closed meanwhile is replaced by a new one, once.
    pub async fn send(
        &self,
        method: &Method,
        target: &str,
        headers: &HeaderMap,
        body: Bytes,
        delivery: &Delivery,
    ) -> Result<Response<PooledBody>, SendError> {
        let shared = &*self.0;
        let target = [shared.prefix.as_str(), target];
        let request = RequestHead { method, target: &target, host: &shared.host_field, headers };
        let address = shared.address();
        if let Some((mut connection, rest)) = self.checkout(address) {
            match connection.exchange(&request, body.clone(), delivery).await {
                Ok(answer) => return Ok(self.respond(connection, address, answer)),
                Err(WireError::Closed) if rest.is_within(STALE_WITHIN) => delivery.undo(),
                Err(error) => return Err(error.into()),
            }
        }
        let mut connection = shared.connect(address).await?;
        let answer = connection.exchange(&request, body, delivery).await?;
        Ok(self.respond(connection, address, answer))
    }

    /// Closes what has rested too long. Call it now and then: a pool without traffic closes nothing by itself.
    pub fn close_expired(&self) {
        let limit = self.0.settings.idle_timeout;
        let address = self.0.address();
        self.0.idle().retain(|idle| idle.address == address && idle.since.elapsed() < limit);
    }

    /// The URL it was made from, without a slash at its end.
    pub fn base_url(&self) -> String {
        format!("http://{}{}", self.0.host_field.to_str().unwrap_or_default(), self.0.prefix)
    }

    /// Where it connects to instead of the host of the URL.
    pub fn address(&self) -> Option<SocketAddr> {
        self.0.address()
    }

    /// Connections that wait for a call.
    pub fn idle_connections(&self) -> usize {
        self.0.idle().len()
    }

    fn checkout(&self, wanted: Option<SocketAddr>) -> Option<(Box<Connection>, Rest)> {
        loop {
            let Idle { mut connection, address, since } = self.0.idle().pop()?;
            let rest = Rest { since, lasted: since.elapsed() };
            if address == wanted && rest.lasted < self.0.settings.idle_timeout && connection.is_quiet() {
                return Some((connection, rest));
            }
        }
    }

    fn respond(
        &self,
        connection: Box<Connection>,
        address: Option<SocketAddr>,
        answer: Answer,
    ) -> Response<PooledBody> {
        let Answer { status, headers, decoder, keep_alive } = answer;
        let mut body = PooledBody {
            connection: Some(connection),
            address,
            decoder,
            keep_alive,
            pool: Arc::clone(&self.0),
        };
        if body.decoder.is_done() {
            body.release();
        }
        let mut response = Response::new(body);
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        response
    }
}

impl Shared {
    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn address(&self) -> Option<SocketAddr> {
        self.endpoint.as_ref().and_then(|endpoint| endpoint.load().as_deref().copied())
    }

    async fn connect(&self, own: Option<SocketAddr>) -> Result<Box<Connection>, SendError> {
        let timeout = self.settings.connect_timeout;
        let connecting = async {
            match own {
                Some(address) => TcpStream::connect(address).await,
                None => TcpStream::connect((self.host.as_str(), self.port)).await,
            }
        };
        let address = || format!("{}:{}", self.host, self.port);
        let stream = tokio::time::timeout(timeout, connecting)
            .await
            .map_err(|_| SendError::ConnectTimeout { address: address(), timeout })?
            .and_then(|stream| stream.set_nodelay(true).map(|()| stream))
            .map_err(|source| SendError::Connect { address: address(), source })?;
        Ok(Box::new(Connection::new(stream)))
    }

    fn checkin(&self, mut connection: Box<Connection>, address: Option<SocketAddr>) {
        connection.release_buffer();
        let mut idle = self.idle();
        if idle.len() < self.settings.max_idle {
            idle.push(Idle { connection, address, since: Stopwatch::start() });
        }
    }
}

/// The body of an answer. Dropped before its end it closes the connection, which tells the upstream to stop.
#[derive(Debug)]
pub struct PooledBody {
    connection: Option<Box<Connection>>,
    address: Option<SocketAddr>,
    decoder: Decoder,
    keep_alive: bool,
    pool: Arc<Shared>,
}

impl PooledBody {
    /// Whether all that has arrived was handed out, and it goes on.
    pub fn is_drained(&self) -> bool {
        self.connection.as_ref().is_some_and(|connection| connection.is_drained())
    }

    /// The body has ended: the connection goes back, if it can carry another call.
    fn release(&mut self) {
        if let Some(connection) = self.connection.take()
            && self.keep_alive
            && connection.is_reusable()
        {
            self.pool.checkin(connection, self.address);
        }
    }
}

impl http_body::Body for PooledBody {
    type Data = Bytes;
    type Error = WireError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, WireError>>> {
        let this = &mut *self;
        let Some(connection) = &mut this.connection else {
            return Poll::Ready(this.decoder.take_trailers().map(|trailers| Ok(Frame::trailers(trailers))));
        };
        let polled = ready!(connection.poll_body(context, &mut this.decoder));
        if this.decoder.is_done() {
            this.release();
        }
        Poll::Ready(match polled {
            Some(Ok(bytes)) => Some(Ok(Frame::data(bytes))),
            Some(Err(error)) => {
                this.connection = None;
                Some(Err(error))
            }
            None => this.decoder.take_trailers().map(|trailers| Ok(Frame::trailers(trailers))),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.decoder.is_done() && !self.decoder.has_trailers()
    }

    fn size_hint(&self) -> SizeHint {
        self.decoder.exact_length().map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}
