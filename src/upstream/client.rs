//! The upstream connections of one worker thread.
//!
//! Each worker has its own, one set a backend: no lock is shared between workers, and a slow or dead backend
//! takes nothing from another. Plain HTTP goes through [`Pool`]; TLS, HTTP/2 and uploads that pass through
//! go through hyper's client.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, header};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client as HyperClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;

use super::delivery::Delivery;
use super::pool::{Pool, PoolSettings, PooledBody, SendError};
use super::upload::{Upload, UploadError};
use super::{Backend, BaseUrl, Place};
use crate::clock::Alarms;
use crate::config::Timeouts;
use crate::health::probe::root_cause;
use crate::tls;

/// Idle connections kept to one replica.
const MAX_IDLE_CONNECTIONS: usize = 1024;

/// A request body on its way up: collected, and then cheap to send again, or passing through.
pub enum RequestBody {
    Full(Option<Bytes>),
    /// The same on its way through a client that says nothing of how far it has come.
    Delivered(Option<Bytes>, Delivery),
    Upload(Box<Upload>),
}

impl std::fmt::Debug for RequestBody {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(match self {
            Self::Full(_) | Self::Delivered(..) => "Full",
            Self::Upload(_) => "Upload",
        })
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = UploadError;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, UploadError>>> {
        match self.get_mut() {
            Self::Full(bytes) => Poll::Ready(taken(bytes)),
            Self::Delivered(bytes, delivery) => {
                delivery.complete();
                Poll::Ready(taken(bytes))
            }
            Self::Upload(upload) => upload.poll_frame(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Full(bytes) | Self::Delivered(bytes, _) => bytes.as_ref().is_none_or(Bytes::is_empty),
            Self::Upload(upload) => upload.incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Full(bytes) | Self::Delivered(bytes, _) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64)
            }
            Self::Upload(upload) => upload.incoming.size_hint(),
        }
    }
}

fn taken(bytes: &mut Option<Bytes>) -> Option<Result<Frame<Bytes>, UploadError>> {
    bytes.take().filter(|bytes| !bytes.is_empty()).map(|bytes| Ok(Frame::data(bytes)))
}

/// An upstream's answer as it arrives. Dropped before its end it tells the upstream to stop.
#[derive(Debug)]
pub enum UpstreamBody {
    Pooled(PooledBody),
    Hyper(Incoming),
}

impl UpstreamBody {
    /// Whether all that has arrived was handed out, so that to ask for more at once would be in vain.
    pub fn is_drained(&self) -> bool {
        match self {
            Self::Pooled(body) => body.is_drained(),
            Self::Hyper(_) => false,
        }
    }
}

/// An answer broke off. The details are for the log.
#[derive(Debug, thiserror::Error)]
#[error("the upstream's connection broke: {0}")]
pub struct BrokenBody(String);

impl Body for UpstreamBody {
    type Data = Bytes;
    type Error = BrokenBody;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BrokenBody>>> {
        match self.get_mut() {
            Self::Pooled(body) => {
                Pin::new(body).poll_frame(context).map_err(|error| BrokenBody(error.to_string()))
            }
            Self::Hyper(body) => {
                Pin::new(body).poll_frame(context).map_err(|error| BrokenBody(error.to_string()))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Pooled(body) => body.is_end_stream(),
            Self::Hyper(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Pooled(body) => body.size_hint(),
            Self::Hyper(body) => body.size_hint(),
        }
    }
}

/// Why a request got no answer.
#[derive(Debug, thiserror::Error)]
pub enum NoAnswer {
    /// Nothing was sent.
    #[error("cannot connect: {0}")]
    Connect(String),
    #[error("the connection broke: {0}")]
    Broken(String),
}

type Https = HyperClient<HttpsConnector<HttpConnector>, RequestBody>;

/// The connections to one backend.
#[derive(Debug)]
pub struct Client {
    /// One for each replica that speaks plain HTTP.
    pools: Vec<Option<Pool>>,
    hyper: OnceLock<Https>,
    /// For upgrades, which HTTP/2 does not have.
    http1: OnceLock<Https>,
    authorities: Vec<CertificateDer<'static>>,
    timeouts: Timeouts,
}

impl Client {
    fn new(backend: &Backend) -> Self {
        let timeouts = backend.spec.timeouts.clone();
        let settings = PoolSettings {
            connect_timeout: timeouts.connect,
            idle_timeout: timeouts.idle_connection,
            max_idle: MAX_IDLE_CONNECTIONS,
        };
        let pools = backend
            .bases()
            .iter()
            .zip(backend.fleet.replicas())
            .map(|(base, replica)| Pool::at(&base.origin(), settings.clone(), replica.endpoint.clone()).ok())
            .collect();
        let authorities = backend.spec.authorities.clone();
        Self { pools, hyper: OnceLock::new(), http1: OnceLock::new(), authorities, timeouts }
    }

    /// Sends a request to a replica and waits for the head of its answer. `delivery` is complete once all of a
    /// collected body is on its way.
    pub async fn send(
        &self,
        place: &Place,
        method: &Method,
        path_and_query: &str,
        headers: &HeaderMap,
        body: RequestBody,
        delivery: &Delivery,
    ) -> Result<Response<UpstreamBody>, NoAnswer> {
        let base = place.base();
        match (self.pools.get(place.replica()), body) {
            (Some(Some(pool)), RequestBody::Full(bytes)) if !headers.contains_key(header::UPGRADE) => {
                let target = base.target(path_and_query);
                match pool.send(method, &target, headers, bytes.unwrap_or_default(), delivery).await {
                    Ok(response) => Ok(response.map(UpstreamBody::Pooled)),
                    Err(error @ (SendError::Connect { .. } | SendError::ConnectTimeout { .. })) => {
                        Err(NoAnswer::Connect(error.to_string()))
                    }
                    Err(SendError::Wire(error)) => Err(NoAnswer::Broken(error.to_string())),
                }
            }
            (pool, body) => {
                let address = pool.and_then(Option::as_ref).and_then(Pool::address);
                let body = match body {
                    RequestBody::Full(bytes) => RequestBody::Delivered(bytes, delivery.clone()),
                    other => other,
                };
                self.send_by_hyper(address, base, method, path_and_query, headers, body).await
            }
        }
    }

    async fn send_by_hyper(
        &self,
        address: Option<SocketAddr>,
        base: &BaseUrl,
        method: &Method,
        path_and_query: &str,
        headers: &HeaderMap,
        body: RequestBody,
    ) -> Result<Response<UpstreamBody>, NoAnswer> {
        let uri = base
            .join_at(address, path_and_query)
            .ok_or_else(|| NoAnswer::Connect("the path is not valid".to_owned()))?;
        let mut request = Request::new(body);
        *request.method_mut() = method.clone();
        *request.uri_mut() = uri;
        *request.headers_mut() = headers.clone();
        request.headers_mut().insert(header::HOST, base.host().clone());
        let is_upgrade = headers.contains_key(header::UPGRADE);
        let client = if is_upgrade {
            self.http1.get_or_init(|| https(&self.authorities, &self.timeouts, false))
        } else {
            self.hyper.get_or_init(|| https(&self.authorities, &self.timeouts, true))
        };
        match client.request(request).await {
            Ok(response) => Ok(response.map(UpstreamBody::Hyper)),
            Err(error) if error.is_connect() => Err(NoAnswer::Connect(root_cause(&error))),
            Err(error) => Err(NoAnswer::Broken(root_cause(&error))),
        }
    }
}

/// A client that trusts these authorities, or else those that browsers trust.
fn https(authorities: &[CertificateDer<'static>], timeouts: &Timeouts, http2: bool) -> Https {
    let own = (!authorities.is_empty()).then(|| {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(authorities.iter().cloned());
        roots
    });
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(timeouts.connect));
    let connector = HttpsConnectorBuilder::new().with_tls_config(tls::client_config(own)).https_or_http();
    let connector = if http2 {
        connector.enable_http1().enable_http2().wrap_connector(tcp)
    } else {
        connector.enable_http1().wrap_connector(tcp)
    };
    HyperClient::builder(TokioExecutor::new())
        .pool_idle_timeout(timeouts.idle_connection)
        .pool_timer(TokioTimer::new())
        .pool_max_idle_per_host(MAX_IDLE_CONNECTIONS)
        .set_host(false)
        .build(connector)
}

/// A backend and the client made for it.
type Known = (Arc<Backend>, Arc<Client>);

/// The clients of one worker thread, by the backend's position. Its lock is never contended.
#[derive(Debug, Default)]
pub struct Clients {
    by_backend: Mutex<Vec<Option<Known>>>,
    /// For the waits of the calls.
    pub alarms: Alarms,
}

impl Clients {
    /// The client of a backend; one that a reload has changed gets a new one.
    pub fn of(&self, backend: &Arc<Backend>) -> Arc<Client> {
        let mut clients = self.by_backend.lock().unwrap_or_else(PoisonError::into_inner);
        let index = usize::from(backend.id.0);
        if clients.len() <= index {
            clients.resize_with(index + 1, || None);
        }
        match &clients[index] {
            Some((known, client)) if Arc::ptr_eq(known, backend) => client.clone(),
            _ => {
                let client = Arc::new(Client::new(backend));
                clients[index] = Some((backend.clone(), client.clone()));
                client
            }
        }
    }

    /// Closes connections that have rested too long. To be called now and then.
    pub fn close_expired(&self) {
        let clients = self.by_backend.lock().unwrap_or_else(PoisonError::into_inner);
        clients
            .iter()
            .flatten()
            .flat_map(|(_, client)| client.pools.iter().flatten())
            .for_each(Pool::close_expired);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use http_body_util::{BodyExt as _, Full};
    use hyper::service::service_fn;
    use hyper_util::rt::TokioIo;
    use hyper_util::server::conn::auto;
    use rustls::pki_types::PrivateKeyDer;
    use tokio::net::TcpListener;

    use super::*;

    /// A TLS server on a free port that speaks these protocols, and answers with the HTTP version it was asked in.
    async fn server(protocols: &[&[u8]]) -> (u16, CertificateDer<'static>) {
        let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let key = PrivateKeyDer::try_from(certified.signing_key.serialize_der()).unwrap();
        let mut config =
            rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_no_client_auth()
                .with_single_cert(vec![certified.cert.der().clone()], key)
                .unwrap();
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let Ok(stream) = acceptor.accept(stream).await else { continue };
                tokio::spawn(async move {
                    let answer = |request: Request<Incoming>| async move {
                        let version = format!("{:?}", request.version());
                        Ok::<_, std::convert::Infallible>(Response::new(Full::new(Bytes::from(version))))
                    };
                    let served = auto::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(stream), service_fn(answer))
                        .await;
                    drop(served);
                });
            }
        });
        (port, certified.cert.der().clone())
    }

    async fn version(protocols: &[&[u8]], http2: bool, trusts: bool) -> Result<Bytes, String> {
        deliver(protocols, http2, trusts, &Delivery::default()).await
    }

    async fn deliver(
        protocols: &[&[u8]],
        http2: bool,
        trusts: bool,
        delivery: &Delivery,
    ) -> Result<Bytes, String> {
        let (port, authority) = server(protocols).await;
        let authorities = if trusts { vec![authority] } else { Vec::new() };
        let timeouts = Timeouts {
            connect: Duration::from_secs(5),
            first_byte: Duration::from_secs(5),
            between_bytes: Duration::from_secs(5),
            total: Duration::from_secs(5),
            idle_connection: Duration::from_secs(5),
        };
        let client = https(&authorities, &timeouts, http2);
        let request = Request::post(format!("https://localhost:{port}/v1/x"))
            .body(RequestBody::Delivered(Some(Bytes::from("{}")), delivery.clone()));
        let response = client.request(request.unwrap()).await.map_err(|error| root_cause(&error))?;
        Ok(response.into_body().collect().await.unwrap().to_bytes())
    }

    #[tokio::test]
    async fn tls_upstreams_are_spoken_to_in_http_2_where_they_can_and_in_http_1_where_they_cannot() {
        assert_eq!(version(&[b"h2", b"http/1.1"], true, true).await.unwrap(), "HTTP/2.0");
        assert_eq!(version(&[b"http/1.1"], true, true).await.unwrap(), "HTTP/1.1");
        assert_eq!(version(&[], true, true).await.unwrap(), "HTTP/1.1");
        assert_eq!(version(&[b"h2", b"http/1.1"], false, true).await.unwrap(), "HTTP/1.1");
    }

    #[tokio::test]
    async fn a_request_is_delivered_once_a_connection_has_taken_it_and_not_while_there_is_none() {
        for protocols in [&[&b"h2"[..]][..], &[]] {
            let (trusted, refused) = (Delivery::default(), Delivery::default());
            deliver(protocols, true, true, &trusted).await.unwrap();
            deliver(protocols, true, false, &refused).await.unwrap_err();
            assert!(trusted.is_complete() && !refused.is_complete());
        }
    }

    #[tokio::test]
    async fn a_certificate_that_nobody_vouches_for_is_refused() {
        assert!(version(&[b"h2"], true, false).await.unwrap_err().contains("UnknownIssuer"));
    }
}
