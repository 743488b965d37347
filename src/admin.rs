//! The admin side: metrics, health, status, the live page, and the few things an owner can do.

pub mod api;
pub mod page;

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body::Frame;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tracing::debug;

use crate::commands::serve::Reload;
use crate::config::WhenUnavailable;
use crate::gateway::{Gateway, Identity, Shares};
use crate::metrics;
use crate::openai::query::query_value;
use crate::server::listening::Listening;
use crate::server::patience::{Patient, Phase};
use crate::server::tls::Acceptor;

/// Connections at a time; scrapers and browsers need a handful.
const MAX_CONNECTIONS: usize = 128;
/// Places that one address may hold while nobody else holds any (`gateway::shares`): whoever comes from another one,
/// a kubelet or a scraper, finds room.
const ADDRESS_SHARE: f64 = 0.9;
/// For a request's head, and for a rest between two requests.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Bodies of requests are a line of JSON.
const MAX_BODY_BYTES: usize = 64 * 1024;
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a client may take nothing of an answer that waits for it.
const WRITE_TIMEOUT: Duration = Duration::from_secs(20);
/// Events that may wait for a slow reader of the event stream; then it is closed.
const MAX_EVENTS_WAITING: usize = 16;

/// The admin side of one gateway.
#[derive(Debug, Clone)]
pub struct Admin {
    gateway: Arc<Gateway>,
    reloads: mpsc::Sender<Reload>,
    stop: watch::Sender<bool>,
}

type Answer = Response<AdminBody>;

/// A whole answer, or events as they come.
#[derive(Debug)]
pub enum AdminBody {
    Full(Full<Bytes>),
    Events(mpsc::Receiver<Bytes>),
}

impl http_body::Body for AdminBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match self.get_mut() {
            Self::Full(body) => Pin::new(body).poll_frame(context),
            Self::Events(events) => {
                events.poll_recv(context).map(|event| event.map(|event| Ok(Frame::data(event))))
            }
        }
    }
}

impl Admin {
    pub fn new(gateway: Arc<Gateway>, reloads: mpsc::Sender<Reload>) -> Self {
        Self { gateway, reloads, stop: watch::Sender::new(false) }
    }

    /// Serves until [`Admin::stop`].
    pub fn serve(&self, listener: TcpListener, tls: Option<Acceptor>, tasks: &mut JoinSet<()>) {
        let admin = self.clone();
        tasks.spawn(async move { admin.accept(listener, tls).await });
    }

    pub fn stop(&self) {
        self.stop.send_replace(true);
    }

    async fn accept(self, listener: TcpListener, tls: Option<Acceptor>) {
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut stop = self.stop.subscribe();
        let shares = Arc::<Shares>::default();
        let mut connections = JoinSet::new();
        let mut listening = Listening::new(listener, "admin");
        loop {
            let (stream, peer) = tokio::select! {
                accepted = listening.accept() => accepted,
                _ = stop.wait_for(|asked| *asked) => return,
            };
            while connections.try_join_next().is_some() {}
            let free = places.available_permits();
            let Some(held) = shares.enter(Identity::address(peer.ip()), free, ADDRESS_SHARE) else {
                continue;
            };
            let Ok(place) = places.clone().try_acquire_owned() else { continue };
            let (admin, tls) = (self.clone(), tls.clone());
            connections.spawn(async move {
                let _place = (place, held);
                if let Err(error) = admin.welcome(stream, tls).await {
                    debug!("an admin connection ended: {error}");
                }
            });
        }
    }

    async fn welcome(self, stream: TcpStream, tls: Option<Acceptor>) -> anyhow::Result<()> {
        match tls {
            None => self.hold(stream).await?,
            Some(tls) => self.hold(tls.accept(stream, HEADER_TIMEOUT).await?).await?,
        }
        Ok(())
    }

    async fn hold(self, stream: impl AsyncRead + AsyncWrite + Unpin) -> hyper::Result<()> {
        let phase = Phase::default();
        let stream = Patient::new(stream, phase.clone(), HEADER_TIMEOUT, WRITE_TIMEOUT);
        let service = service_fn(move |request| {
            let (admin, phase) = (self.clone(), phase.clone());
            phase.handed_over();
            async move {
                let answer = admin.answer(request).await;
                phase.answered();
                Ok::<_, Infallible>(answer)
            }
        });
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .serve_connection(TokioIo::new(stream), service)
            .await
    }

    async fn answer(&self, request: Request<Incoming>) -> Answer {
        let path = request.uri().path().to_owned();
        // The page's files hold no figures: it asks for the token itself, and sends it with what it fetches.
        let is_open = matches!(path.as_str(), "/livez" | "/readyz") || page::find(&path).is_some();
        if !is_open && let Some(refusal) = self.refuse(&request) {
            return refusal;
        }
        let method = request.method().clone();
        match (method, path.as_str()) {
            (Method::GET, "/livez") => text(StatusCode::OK, "ok"),
            (Method::GET, "/readyz") => self.ready(),
            (Method::GET, "/metrics") => self.metrics(),
            (Method::GET, "/api/status") => json_answer(StatusCode::OK, &api::status(&self.gateway)),
            (Method::GET, "/api/spend") => {
                let query = request.uri().query().unwrap_or_default().to_owned();
                self.spend(query).await
            }
            (Method::GET, "/api/events") => self.events(),
            (Method::POST, "/api/pin") => self.pin(request, true).await,
            (Method::POST, "/api/unpin") => self.pin(request, false).await,
            (Method::POST, "/api/reload") => self.reload().await,
            (Method::GET, path) => match page::find(path) {
                Some(resource) => resource.response().map(|body| AdminBody::Full(Full::new(body))),
                None => problem(StatusCode::NOT_FOUND, "there is nothing here"),
            },
            _ => problem(StatusCode::METHOD_NOT_ALLOWED, "this is not how it is done here"),
        }
    }

    /// With a token, it must be there. Without one we listen on loopback, and a page of another site in the
    /// owner's browser must not reach us: neither under a name of its own nor with a form.
    fn refuse(&self, request: &Request<Incoming>) -> Option<Answer> {
        let state = self.gateway.state();
        let headers = request.headers();
        let header = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        if let Some(token) = &state.config.server.admin_token {
            let given = header(header::AUTHORIZATION).and_then(|value| value.strip_prefix("Bearer "));
            let given = given.map(str::to_owned).or_else(|| query_value(request.uri().query()?, "token"));
            return match given {
                Some(given) if token.matches(given.as_bytes()) => None,
                _ => {
                    let mut refusal =
                        problem(StatusCode::UNAUTHORIZED, "send the admin token as a bearer token");
                    let scheme = HeaderValue::from_static("Bearer");
                    refusal.headers_mut().insert(header::WWW_AUTHENTICATE, scheme);
                    Some(refusal)
                }
            };
        }
        let host = header(header::HOST).unwrap_or_default();
        if !api::is_loopback_host(host) {
            return Some(problem(
                StatusCode::FORBIDDEN,
                "without `server.admin_token` only loopback names are served",
            ));
        }
        let is_foreign = header(header::ORIGIN)
            .is_some_and(|origin| origin.split_once("://").map(|(_, at)| at) != Some(host));
        (request.method() == Method::POST && is_foreign)
            .then(|| problem(StatusCode::FORBIDDEN, "a page of another site may not do this"))
    }

    fn ready(&self) -> Answer {
        if self.gateway.is_draining() {
            return text(StatusCode::SERVICE_UNAVAILABLE, "draining");
        }
        let goes_on = self.gateway.state().config.ledger.when_unavailable == WhenUnavailable::Continue;
        match self.gateway.ledger.unavailable_reason() {
            // Who wants calls to go on does not want a load balancer to take them away.
            Some(why) if goes_on => text(StatusCode::OK, &format!("going on without recording: {why}")),
            Some(why) => text(StatusCode::SERVICE_UNAVAILABLE, &format!("unable to record: {why}")),
            None => text(StatusCode::OK, "ok"),
        }
    }

    fn metrics(&self) -> Answer {
        let mut answer = text(StatusCode::OK, &self.gateway.metrics.render());
        answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(metrics::CONTENT_TYPE));
        answer
    }

    async fn spend(&self, query: String) -> Answer {
        let gateway = self.gateway.clone();
        match tokio::task::spawn_blocking(move || api::spend(&gateway, &query)).await {
            Ok(Ok(rows)) => json_answer(StatusCode::OK, &rows),
            Ok(Err(why)) => problem(StatusCode::BAD_REQUEST, &why),
            Err(_) => problem(StatusCode::INTERNAL_SERVER_ERROR, "the ledger could not be read"),
        }
    }

    /// Status and new calls, once a second, for as long as somebody reads them.
    fn events(&self) -> Answer {
        let (sender, receiver) = mpsc::channel(MAX_EVENTS_WAITING);
        let (gateway, mut stop) = (self.gateway.clone(), self.stop.subscribe());
        tokio::spawn(async move {
            tokio::select! {
                () = api::send_events(gateway, sender) => {}
                _ = stop.wait_for(|asked| *asked) => {}
            }
        });
        let mut answer = Response::new(AdminBody::Events(receiver));
        let headers = answer.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        answer
    }

    async fn pin(&self, request: Request<Incoming>, pins: bool) -> Answer {
        let body = Limited::new(request.into_body(), MAX_BODY_BYTES).collect();
        let body = match tokio::time::timeout(BODY_TIMEOUT, body).await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(_)) => return problem(StatusCode::PAYLOAD_TOO_LARGE, "the body is too large or broken"),
            Err(_) => return problem(StatusCode::REQUEST_TIMEOUT, "the body took too long"),
        };
        match api::pin(&self.gateway, &body, pins) {
            Ok(()) => json_answer(StatusCode::OK, &api::status(&self.gateway)),
            Err(why) => problem(StatusCode::BAD_REQUEST, &why),
        }
    }

    async fn reload(&self) -> Answer {
        let (reply, result) = tokio::sync::oneshot::channel();
        match self.reloads.try_send(reply) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => {
                return problem(StatusCode::SERVICE_UNAVAILABLE, "reloads are waiting already");
            }
            Err(TrySendError::Closed(_)) => {
                return problem(StatusCode::SERVICE_UNAVAILABLE, "the proxy is shutting down");
            }
        }
        match result.await {
            Ok(Ok(())) => json_answer(StatusCode::OK, &json!({"reloaded": true})),
            Ok(Err(why)) => problem(StatusCode::UNPROCESSABLE_ENTITY, &why),
            Err(_) => problem(StatusCode::SERVICE_UNAVAILABLE, "the proxy is shutting down"),
        }
    }
}

fn text(status: StatusCode, body: &str) -> Answer {
    let mut answer = Response::new(AdminBody::Full(Full::new(Bytes::copy_from_slice(body.as_bytes()))));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    answer
}

fn json_answer(status: StatusCode, body: &Value) -> Answer {
    let mut answer = text(status, &body.to_string());
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}

fn problem(status: StatusCode, why: &str) -> Answer {
    json_answer(
        status,
        &json!({"error": {"message": why, "type": "admin_error", "param": null, "code": status.as_u16()}}),
    )
}
