//! The end of the process, and changes of its configuration, while calls are under way.

use std::time::Duration;

use breakeven::demo::{FakeBackend, Personality, Settings};
use breakeven::ledger::Outcome;
use http::{Method, StatusCode};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::Served;
use crate::support::{End, Events, Http, chat, data, with};

const MODEL: &str = "gpt-4o-mini";
const LONG: Duration = Duration::from_secs(20);

async fn slow_api() -> FakeBackend {
    let settings = Settings {
        output_tokens: 200,
        time_per_output_token: Duration::from_millis(5),
        ..Settings::default()
    };
    FakeBackend::start(Personality::OpenAi, settings).await.unwrap()
}

fn config_of(api: &FakeBackend) -> String {
    format!(
        "[backends.openai]\nkind = \"api\"\nbase_url = \"{}\"\n\
         [routes.chat]\nmodels = [\"{MODEL}\"]\npolicy = \"api\"\noffers = [{{ backend = \"openai\" }}]\n",
        api.url()
    )
}

async fn until_not_ready(served: &Served) {
    let admin = Http::new(&served.admin_url());
    let mut look = tokio::time::interval(Duration::from_millis(2));
    let unready = async {
        while admin.get("/readyz").await.status != StatusCode::SERVICE_UNAVAILABLE {
            look.tick().await;
        }
    };
    tokio::time::timeout(Duration::from_millis(500), unready).await.expect("it says at once that it drains");
}

#[tokio::test]
async fn sigterm_makes_it_unready_at_once_while_streams_finish_and_the_admin_side_answers() {
    let api = slow_api().await;
    let mut served = Served::start("", &config_of(&api), &[]).await;
    let http = Http::new(&served.url());
    let stream = http.open("/chat/completions", &with(chat(MODEL), json!({"stream": true}))).await;
    let mut events = Events::of(stream);
    events.next().await.unwrap();

    served.signal("-TERM");
    until_not_ready(&served).await;
    let admin = Http::new(&served.admin_url());
    assert!(admin.get("/metrics").await.text().contains("breakeven_requests_total"));
    assert_eq!(admin.get("/livez").await.status, StatusCode::OK);
    let reload = admin.send(admin.request(Method::POST, "/api/reload"), bytes::Bytes::new());
    let reload =
        tokio::time::timeout(Duration::from_secs(1), reload).await.expect("it does not wait for the drain");
    assert_eq!(reload.status, StatusCode::SERVICE_UNAVAILABLE);

    let (rest, _) = events.rest().await;
    assert_eq!(rest.last().unwrap(), "data: [DONE]", "the stream came to its end");
    let ended = tokio::time::timeout(LONG, served.child.wait()).await.expect("it ends").unwrap();
    assert!(ended.success(), "{}", served.log());
}

#[tokio::test]
async fn a_second_signal_ends_what_the_first_one_waits_for() {
    let api = slow_api().await;
    let mut served = Served::start("", &config_of(&api), &[]).await;
    // The last word waits for the count.
    served.load_vocabulary(MODEL).await;
    api.set(|settings| settings.output_tokens = 10_000);
    let http = Http::new(&served.url());
    let stream = http.open("/chat/completions", &with(chat(MODEL), json!({"stream": true}))).await;
    let mut events = Events::of(stream);
    events.next().await.unwrap();
    served.signal("-TERM");
    until_not_ready(&served).await;
    served.signal("-TERM");
    let (rest, end) = events.rest().await;
    assert_eq!(end, End::Complete);
    assert!(data(&rest).last().unwrap()["error"].is_object(), "it says that something is missing: {rest:?}");
    let ended = tokio::time::timeout(LONG, served.child.wait()).await.expect("it ends").unwrap();
    assert!(ended.success(), "{}", served.log());
    let rows = breakeven::ledger::query::recent(&served.ledger(), usize::MAX).unwrap();
    assert_eq!(rows.len(), 2, "what was cut off is booked");
    assert_eq!(rows[0].outcome, Outcome::Timeout, "and not as if its client had left");
}

/// To its empty line, and no byte of what follows.
async fn read_head(stream: &mut TcpStream) -> Vec<u8> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    head
}

/// An API of which one connection is a WebSocket that says what it hears.
async fn echoing_api() -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        read_head(&mut stream).await;
        let switch = "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n";
        stream.write_all(switch.as_bytes()).await.unwrap();
        let (mut from, mut to) = stream.split();
        // Until the proxy ends it.
        drop(tokio::io::copy(&mut from, &mut to).await);
    });
    address
}

/// Opens a WebSocket through the proxy.
async fn open_tunnel(served: &Served) -> TcpStream {
    let mut client = TcpStream::connect(served.address).await.unwrap();
    let hello = "GET /v1/realtime?model=gpt-realtime HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\n\
                 connection: upgrade\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZQ==\r\n\r\n";
    client.write_all(hello.as_bytes()).await.unwrap();
    let head = read_head(&mut client).await;
    assert!(head.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&head));
    client
}

/// A frame from a client, its mask all zero, and whether it comes back.
async fn is_echoed(client: &mut TcpStream) -> bool {
    let frame = b"\x82\x84\0\0\0\0ping";
    let mut heard = [0; 10];
    client.write_all(frame).await.is_ok() && client.read_exact(&mut heard).await.is_ok() && heard == *frame
}

#[tokio::test]
async fn a_drain_waits_for_a_tunnel_as_for_a_stream() {
    let api = echoing_api().await;
    let config = format!("[backends.openai]\nkind = \"api\"\nbase_url = \"http://{api}/v1\"\n");
    let mut served = Served::start("", &config, &[]).await;
    let mut client = open_tunnel(&served).await;
    assert!(is_echoed(&mut client).await);
    served.signal("-TERM");
    until_not_ready(&served).await;
    assert!(is_echoed(&mut client).await, "it goes on");
    drop(client);
    let ended = tokio::time::timeout(LONG, served.child.wait()).await.expect("it ends").unwrap();
    assert!(ended.success(), "{}", served.log());
}

#[tokio::test]
async fn a_tunnel_ends_when_its_time_is_over_or_when_nothing_passes() {
    for timeouts in ["first_byte = \"500ms\", total = \"500ms\"", "between_bytes = \"200ms\""] {
        let api = echoing_api().await;
        let config = format!(
            "[backends.openai]\nkind = \"api\"\nbase_url = \"http://{api}/v1\"\ntimeouts = {{ {timeouts} }}\n"
        );
        let served = Served::start("", &config, &[]).await;
        let mut client = open_tunnel(&served).await;
        let mut nothing = [0; 1];
        let ended = tokio::time::timeout(LONG, client.read(&mut nothing)).await.expect(timeouts);
        assert!(matches!(ended, Ok(0) | Err(_)), "{timeouts}");
    }
}

/// The stop command of its only replica ends when somebody takes away a file.
#[tokio::test]
async fn a_second_signal_ends_the_wait_for_replicas_as_well() {
    let api = slow_api().await;
    let own = FakeBackend::start(Personality::Vllm, Settings::default()).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mark = folder.path().join("stopping");
    let stop = format!("touch {mark}; while test -e {mark}; do sleep 0.05; done", mark = mark.display());
    let config = format!(
        "[policy]\nslot = \"1s\"\n\
         [backends.gpu]\nkind = \"self_hosted\"\nbase_url = \"{}\"\nhourly_usd = 2.99\n\
         billing = \"while_running\"\nminimum = \"0s\"\n\
         capacity = {{ input_tokens_per_second = 100, output_tokens_per_second = 100, max_in_flight = 8 }}\n\
         control = {{ kind = \"command\", start = [\"true\"], stop = [\"sh\", \"-c\", {stop:?}] }}\n{}",
        own.url(),
        config_of(&api)
            .replace("[{", "[{ backend = \"gpu\", model = \"llama\" }, {")
            .replace("\"api\"\noffers", "\"cheapest\"\noffers"),
    );
    let mut served = Served::start_in(folder, "", &config, &[]).await;
    let admin = Http::new(&served.admin_url());
    let reply = admin.post("/api/pin", &json!({"pool": "gpu", "backend": "openai"})).await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
    let stopping = crate::support::soon(LONG, async || mark.exists().then_some(())).await;
    assert!(stopping.is_some(), "{}", served.log());
    served.signal("-TERM");
    served.says("draining").await;
    served.signal("-TERM");
    let ended = tokio::time::timeout(Duration::from_secs(10), served.child.wait()).await;
    std::fs::remove_file(&mark).unwrap();
    assert!(ended.expect("it does not wait for the replica").unwrap().success(), "{}", served.log());
    assert!(served.log().contains("replicas have not confirmed their stop"), "{}", served.log());
}

#[tokio::test]
async fn a_reload_changes_what_the_log_leaves_out() {
    let api = FakeBackend::start(Personality::OpenAi, Settings::default()).await.unwrap();
    let served = Served::start("", &format!("[log]\nfilter = \"info\"\n{}", config_of(&api)), &[]).await;
    let path = served.folder.path().join("breakeven.toml");
    let original = std::fs::read_to_string(&path).unwrap();
    let call = async || {
        // A connection that breaks is told at `debug`.
        let mut stream = TcpStream::connect(served.admin).await.unwrap();
        stream.write_all(b"nonsense\r\n\r\n").await.unwrap();
        tokio::io::copy(&mut stream, &mut tokio::io::sink()).await.unwrap();
    };
    call().await;
    put(&path, &original.replace("\"info\"", "\"debug\""));
    served.signal("-HUP");
    reloaded(&served, 1).await;
    assert!(!served.log().contains("DEBUG"), "{}", served.log());
    call().await;
    served.says("an admin connection ended").await;
    put(&path, &original.replace("\"info\"", "\"error\""));
    let admin = Http::new(&served.admin_url());
    let reply = admin.send(admin.request(Method::POST, "/api/reload"), bytes::Bytes::new()).await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
    assert_eq!(served.log().matches("was reloaded").count(), 1, "{}", served.log());
}

/// Replaces a file in one step, as editors and ConfigMaps do.
fn put(path: &std::path::Path, text: &str) {
    let new = path.with_extension("new");
    std::fs::write(&new, text).unwrap();
    std::fs::rename(new, path).unwrap();
}

/// Waits until so many reloads have taken place.
async fn reloaded(served: &Served, times: usize) {
    let mut look = tokio::time::interval(Duration::from_millis(20));
    let noticed = async {
        while served.log().matches("the configuration was reloaded").count() < times {
            look.tick().await;
        }
    };
    tokio::time::timeout(LONG, noticed).await.unwrap_or_else(|_| panic!("{}", served.log()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reloads_by_file_signal_and_api_drop_no_call() {
    let api = FakeBackend::start(Personality::OpenAi, Settings::default()).await.unwrap();
    let served = Served::start("", &config_of(&api), &[]).await;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let mut clients = JoinSet::new();
    for client in 0..8 {
        let (http, stopped) = (Http::new(&served.url()), stopped.clone());
        clients.spawn(async move {
            let body = with(chat(MODEL), json!({"stream": client % 2 == 0}));
            let mut calls = 0;
            while !*stopped.borrow() {
                let reply = http.post("/chat/completions", &body).await;
                assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
                assert!(client % 2 == 1 || reply.text().contains("[DONE]"));
                calls += 1;
            }
            calls
        });
    }
    let admin = Http::new(&served.admin_url());
    let path = served.folder.path().join("breakeven.toml");
    let original = std::fs::read_to_string(&path).unwrap();
    for round in 0..10 {
        let timeouts = format!("timeouts = {{ total = \"{}m\" }}\n[routes.chat]", 10 + round);
        put(&path, &original.replace("[routes.chat]", &timeouts));
        if round % 2 == 0 {
            served.signal("-HUP");
        } else {
            let reply = admin.send(admin.request(Method::POST, "/api/reload"), bytes::Bytes::new()).await;
            assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
        }
    }
    // Once more by the file alone, which is looked at every two seconds.
    put(&path, &original);
    reloaded(&served, 7).await;
    // And as the kubelet swaps a ConfigMap: the file is a link through `..data`, which is replaced by a rename.
    let folder = served.folder.path();
    for (version, total) in [("..1", "33m"), ("..2", "44m")] {
        std::fs::create_dir(folder.join(version)).unwrap();
        let timeouts = format!("timeouts = {{ total = \"{total}\" }}\n[routes.chat]");
        std::fs::write(
            folder.join(version).join("breakeven.toml"),
            original.replace("[routes.chat]", &timeouts),
        )
        .unwrap();
        std::os::unix::fs::symlink(version, folder.join("..new")).unwrap();
        std::fs::rename(folder.join("..new"), folder.join("..data")).unwrap();
        if version == "..1" {
            std::os::unix::fs::symlink("..data/breakeven.toml", folder.join("link")).unwrap();
            std::fs::rename(folder.join("link"), &path).unwrap();
            reloaded(&served, 8).await;
        }
    }
    reloaded(&served, 9).await;
    stop.send_replace(true);
    let mut calls = 0;
    while let Some(client) = clients.join_next().await {
        calls += client.unwrap();
    }
    assert!(calls > 50, "{calls}");
    assert!(!served.log().contains("was not reloaded"), "{}", served.log());
}
