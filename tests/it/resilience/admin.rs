//! The admin side against its network: who has no token, who takes all the places, who reads nothing.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use breakeven::demo::{FakeBackend, Personality, Settings};
use http::{Method, StatusCode};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

use super::Served;
use crate::support::proxy::Proxy;
use crate::support::{Http, free_address};

const LONG: Duration = Duration::from_secs(20);
const LIVEZ: &[u8] = b"GET /livez HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n";

fn config_of(api: &FakeBackend) -> String {
    format!("[backends.openai]\nkind = \"api\"\nbase_url = \"{}\"\n", api.url())
}

async fn api() -> FakeBackend {
    FakeBackend::start(Personality::OpenAi, Settings::default()).await.unwrap()
}

#[tokio::test]
async fn a_reload_that_takes_the_token_away_is_refused_while_the_network_can_reach_the_admin_side() {
    let api = api().await;
    let open = SocketAddr::from(([0, 0, 0, 0], free_address().port()));
    let token = "admin_token = { env = \"ADMIN_TOKEN\" }";
    let folder = tempfile::tempdir().unwrap();
    let served =
        Served::start_with_admin_at(open, folder, token, &config_of(&api), &[("ADMIN_TOKEN", "open-sesame")])
            .await;
    let path = served.folder.path().join("breakeven.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    // As a file it is good: the admin side is on the loopback there.
    let shut = text.replace(&open.to_string(), &format!("127.0.0.1:{}", open.port())).replace(token, "");
    std::fs::write(&path, shut).unwrap();

    let admin = Http::new(&served.admin_url());
    let reload = admin.request(Method::POST, "/api/reload").header("authorization", "Bearer open-sesame");
    let reload = admin.send(reload, bytes::Bytes::new()).await;
    assert_eq!(reload.status, StatusCode::UNPROCESSABLE_ENTITY, "{}", reload.text());
    assert!(reload.text().contains("server.admin_token"), "{}", reload.text());
    assert_eq!(admin.get("/metrics").await.status, StatusCode::UNAUTHORIZED);
    assert_eq!(admin.get("/livez").await.status, StatusCode::OK);

    // On the loopback nobody else is there.
    let served = Served::start(token, &config_of(&api), &[("ADMIN_TOKEN", "open-sesame")]).await;
    let path = served.folder.path().join("breakeven.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace(token, "")).unwrap();
    served.signal("-HUP");
    served.says("the configuration was reloaded").await;
    assert_eq!(Http::new(&served.admin_url()).get("/metrics").await.status, StatusCode::OK);
}

/// Asks whether it lives, from an address of the loopback. None when the connection is closed instead.
async fn lives(admin: SocketAddr, from: [u8; 4]) -> Option<TcpStream> {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::new(IpAddr::from(from), 0)).unwrap();
    let mut stream = socket.connect(admin).await.ok()?;
    stream.write_all(LIVEZ).await.ok()?;
    let mut start = [0; 12];
    stream.read_exact(&mut start).await.ok()?;
    (start == *b"HTTP/1.1 200").then_some(stream)
}

#[tokio::test]
async fn an_address_that_takes_every_place_it_gets_leaves_some_to_others() {
    let api = api().await;
    let proxy = Proxy::start(&config_of(&api)).await;
    let admin = proxy.running.admin_address;
    let mut held = Vec::new();
    while let Some(stream) = lives(admin, [127, 0, 0, 1]).await {
        held.push(stream);
        assert!(held.len() < 1000, "there is no bound");
    }
    assert!(held.len() > 100, "{}", held.len());
    assert!(lives(admin, [127, 0, 0, 2]).await.is_some(), "one that comes from elsewhere is answered");
    assert!(lives(admin, [127, 0, 0, 1]).await.is_none());
}

/// Under a clock that jumps: what waits for nothing but time takes none.
#[tokio::test(start_paused = true)]
async fn a_client_that_reads_nothing_of_its_answers_loses_its_connection() {
    let api = api().await;
    let proxy = Proxy::start(&config_of(&api)).await;
    let mut stream = TcpStream::connect(proxy.running.admin_address).await.unwrap();
    let asks = b"GET /page.js HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".repeat(100);
    let ends = async { while stream.write_all(&asks).await.is_ok() {} };
    tokio::time::timeout(Duration::from_mins(10), ends).await.expect("it is not served for ever");
}

#[tokio::test(start_paused = true)]
async fn a_body_that_does_not_come_is_not_waited_for() {
    let api = api().await;
    let proxy = Proxy::start(&config_of(&api)).await;
    let mut stream = TcpStream::connect(proxy.running.admin_address).await.unwrap();
    let head = "POST /api/pin HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 100\r\n\r\n{";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut start = [0; 12];
    let answered = tokio::time::timeout(Duration::from_mins(10), stream.read_exact(&mut start)).await;
    assert_eq!(answered.expect("an answer").unwrap(), start.len());
    assert_eq!(start, *b"HTTP/1.1 408");
    drop(tokio::time::timeout(LONG, stream.shutdown()).await);
}
