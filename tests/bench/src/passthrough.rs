//! The measure of what HTTP itself costs: hyper's server, hyper-util's pooled client, and nothing between.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri, header, uri};
use http_body_util::{BodyExt, Empty, combinators::UnsyncBoxBody};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};

/// Connections to the upstream that rest at the same time.
const MAX_IDLE: usize = 8192;

#[derive(clap::Args)]
pub struct Arguments {
    #[arg(long)]
    listen: SocketAddr,
    #[arg(long)]
    upstream: SocketAddr,
}

struct Upstream {
    client: Client<HttpConnector, Incoming>,
    authority: uri::Authority,
    host: HeaderValue,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve(arguments))
}

async fn serve(arguments: &Arguments) -> anyhow::Result<()> {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    let client = Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_max_idle_per_host(MAX_IDLE)
        .set_host(false)
        .build(connector);
    let authority = arguments.upstream.to_string();
    let upstream = Arc::new(Upstream {
        client,
        host: HeaderValue::from_str(&authority)?,
        authority: authority.parse()?,
    });
    let listener = TcpListener::bind(arguments.listen).await?;
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(connection(stream, Arc::clone(&upstream)));
    }
}

async fn connection(stream: TcpStream, upstream: Arc<Upstream>) {
    if stream.set_nodelay(true).is_err() {
        return;
    }
    let service = service_fn(move |request| forward(request, Arc::clone(&upstream)));
    let served =
        http1::Builder::new().timer(TokioTimer::new()).serve_connection(TokioIo::new(stream), service);
    if let Err(error) = served.await {
        eprintln!("passthrough: {error}");
    }
}

async fn forward(
    mut request: Request<Incoming>,
    upstream: Arc<Upstream>,
) -> Result<Response<UnsyncBoxBody<Bytes, hyper::Error>>, Infallible> {
    let mut parts = uri::Parts::default();
    parts.scheme = Some(uri::Scheme::HTTP);
    parts.authority = Some(upstream.authority.clone());
    parts.path_and_query = request.uri().path_and_query().cloned();
    *request.uri_mut() = Uri::from_parts(parts).expect("scheme, authority and path make a URI");
    strip_hop(request.headers_mut());
    request.headers_mut().insert(header::HOST, upstream.host.clone());
    match upstream.client.request(request).await {
        Ok(mut response) => {
            strip_hop(response.headers_mut());
            Ok(response.map(BodyExt::boxed_unsync))
        }
        Err(error) => {
            eprintln!("passthrough: {error}");
            let mut response = Response::new(Empty::new().map_err(|never| match never {}).boxed_unsync());
            *response.status_mut() = StatusCode::BAD_GATEWAY;
            Ok(response)
        }
    }
}

/// Removes what belongs to one hop (RFC 9110, section 7.6.1).
fn strip_hop(headers: &mut HeaderMap) {
    for name in [header::CONNECTION, header::TRANSFER_ENCODING, header::TE, header::TRAILER, header::UPGRADE]
    {
        headers.remove(name);
    }
    headers.remove("keep-alive");
}
