//! The demo's machine room: a webhook that starts and stops the fake self-hosted server when the proxy says so.

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::Mutex;
use tokio::task::{JoinHandle, JoinSet};

use super::{FakeBackend, Personality, Settings};

/// Orders are small.
const MAX_ORDER_BYTES: usize = 4_096;

/// One rented machine that can be on or off, and the webhook that turns it.
#[derive(Debug)]
pub struct MachineRoom {
    pub hook_url: String,
    /// Base URL of the machine's server, while it runs.
    pub server_url: String,
    machine: Arc<Machine>,
    serving: JoinHandle<()>,
}

#[derive(Debug)]
struct Machine {
    address: SocketAddr,
    /// Bound and never listening, so that the system gives the port to nobody else while the machine is off.
    _port: TcpSocket,
    personality: Personality,
    settings: Settings,
    /// Real time from the order to start until it serves.
    startup: Duration,
    running: Mutex<Option<FakeBackend>>,
}

#[derive(Debug, Deserialize)]
struct Order {
    action: Action,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Action {
    Start,
    Stop,
}

impl MachineRoom {
    /// A machine that is off, behind a webhook on a free port of the loopback.
    pub async fn open(personality: Personality, settings: Settings, startup: Duration) -> io::Result<Self> {
        let port = TcpSocket::new_v4()?;
        port.set_reuseaddr(true)?;
        port.bind((Ipv4Addr::LOCALHOST, 0).into())?;
        let address = port.local_addr()?;
        let server_url = format!("http://{address}/v1");
        let running = Mutex::new(None);
        let machine = Arc::new(Machine { address, _port: port, personality, settings, startup, running });
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let hook_url = format!("http://{}/", listener.local_addr()?);
        let serving = tokio::spawn(serve(listener, Arc::clone(&machine)));
        Ok(Self { hook_url, server_url, machine, serving })
    }

    pub async fn is_running(&self) -> bool {
        self.machine.running.lock().await.is_some()
    }

    pub async fn close(self) {
        self.serving.abort();
        self.machine.turn_off().await;
    }
}

impl Machine {
    async fn turn_on(&self) -> io::Result<()> {
        let mut running = self.running.lock().await;
        if running.is_none() {
            tokio::time::sleep(self.startup).await;
            let server = FakeBackend::start_on(self.address, self.personality, self.settings.clone()).await?;
            *running = Some(server);
        }
        Ok(())
    }

    async fn turn_off(&self) {
        if let Some(server) = self.running.lock().await.take() {
            server.stop().await;
        }
    }
}

async fn serve(listener: TcpListener, machine: Arc<Machine>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        while connections.try_join_next().is_some() {}
        let machine = Arc::clone(&machine);
        let answer = service_fn(move |request| {
            let machine = Arc::clone(&machine);
            async move { Ok::<_, Infallible>(obey(&machine, request).await) }
        });
        connections.spawn(async move {
            // The caller repeats an order whose answer it did not get.
            drop(http1::Builder::new().serve_connection(TokioIo::new(stream), answer).await);
        });
    }
}

async fn obey(machine: &Machine, request: Request<Incoming>) -> Response<Empty<Bytes>> {
    let body = Limited::new(request.into_body(), MAX_ORDER_BYTES)
        .collect()
        .await
        .map(http_body_util::Collected::to_bytes);
    let order = body.ok().and_then(|body| serde_json::from_slice::<Order>(&body).ok());
    let status = match order.map(|order| order.action) {
        None => StatusCode::BAD_REQUEST,
        Some(Action::Stop) => {
            machine.turn_off().await;
            StatusCode::OK
        }
        Some(Action::Start) => match machine.turn_on().await {
            Ok(()) => StatusCode::OK,
            Err(_) => StatusCode::SERVICE_UNAVAILABLE,
        },
    };
    let mut response = Response::new(Empty::new());
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::Full;
    use hyper_util::client::legacy::Client;
    use hyper_util::rt::TokioExecutor;

    async fn post(url: &str, body: &'static str) -> Option<StatusCode> {
        let client = Client::builder(TokioExecutor::new()).build_http();
        let request = Request::post(url).body(Full::new(Bytes::from(body))).unwrap();
        client.request(request).await.ok().map(|response| response.status())
    }

    #[tokio::test]
    async fn orders_turn_the_machine_on_and_off_at_one_address() {
        let room = MachineRoom::open(Personality::Vllm, Settings::default(), Duration::ZERO).await.unwrap();
        let models = format!("{}/models", room.server_url);
        for _ in 0..2 {
            assert_eq!(post(&models, "").await, None, "off");
            assert_eq!(post(&room.hook_url, r#"{"action":"start","replica":0}"#).await, Some(StatusCode::OK));
            assert!(post(&models, "").await.is_some() && room.is_running().await);
            assert_eq!(post(&room.hook_url, r#"{"action":"stop","replica":0}"#).await, Some(StatusCode::OK));
        }
        assert_eq!(post(&room.hook_url, "{}").await, Some(StatusCode::BAD_REQUEST));
        room.close().await;
    }
}
