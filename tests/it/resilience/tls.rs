//! TLS on the applications' listener: both versions of HTTP, and certificates that are renewed under way.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use breakeven::demo::{FakeBackend, Personality, Settings};
use rustls::pki_types::{CertificateDer, ServerName};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use super::Served;
use super::http2::{Frame, Raw, post};
use crate::support::proxy::Proxy;
use crate::support::{Http, chat, with};

const MODEL: &str = "gpt-4o-mini";
const LONG: Duration = Duration::from_secs(20);

/// Writes a new certificate and its key, each in one step, and returns the certificate.
fn renew(folder: &Path) -> CertificateDer<'static> {
    let certified = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    for (name, text) in
        [("cert.pem", certified.cert.pem()), ("key.pem", certified.signing_key.serialize_pem())]
    {
        let new = folder.join(format!("{name}.new"));
        std::fs::write(&new, text).unwrap();
        std::fs::rename(new, folder.join(name)).unwrap();
    }
    certified.cert.der().clone()
}

async fn connect(
    address: SocketAddr,
    trusted: &CertificateDer<'static>,
    protocol: &[u8],
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(trusted.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![protocol.to_vec()];
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from("localhost").unwrap();
    tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await
}

/// A stream with its first event read, over HTTP/1.1.
async fn open_stream(mut connection: TlsStream<TcpStream>) -> TlsStream<TcpStream> {
    let body = with(chat(MODEL), json!({"stream": true})).to_string();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    connection.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
    let mut start = [0; 15];
    connection.read_exact(&mut start).await.unwrap();
    assert_eq!(&start, b"HTTP/1.1 200 OK");
    connection
}

#[tokio::test]
async fn both_versions_of_http_are_spoken_and_a_renewed_certificate_is_taken_up_without_harm() {
    let settings = Settings {
        output_tokens: 400,
        time_per_output_token: Duration::from_millis(5),
        ..Settings::default()
    };
    let api = FakeBackend::start(Personality::OpenAi, settings).await.unwrap();
    let config = format!(
        "[backends.openai]\nkind = \"api\"\nbase_url = \"{}\"\n\
         [routes.chat]\nmodels = [\"{MODEL}\"]\npolicy = \"api\"\noffers = [{{ backend = \"openai\" }}]\n",
        api.url()
    );
    let certificates = tempfile::tempdir().unwrap();
    let folder = certificates.path().display();
    let first = renew(certificates.path());
    let tls = format!("tls = {{ certificate = \"{folder}/cert.pem\", private_key = \"{folder}/key.pem\" }}");
    let served = Served::start(&tls, &config, &[]).await;

    let mut http2 = Raw::start(connect(served.address, &first, b"h2").await.unwrap(), &[]).await;
    http2.send(&post(1, &with(chat(MODEL), json!({"max_tokens": 2})).to_string())).await;
    assert_eq!(http2.until(Frame::ends_stream).await.map(|frame| frame.stream), Some(1));

    let mut stream = open_stream(connect(served.address, &first, b"http/1.1").await.unwrap()).await;
    std::fs::write(certificates.path().join("cert.pem"), "no certificate").unwrap();
    served.signal("-HUP");
    served.says("was not reloaded").await;
    assert!(connect(served.address, &first, b"http/1.1").await.is_ok(), "the one before stays in force");

    // Without a signal: the files are looked at every two seconds.
    let second = renew(certificates.path());
    let mut look = tokio::time::interval(Duration::from_millis(50));
    let renewed = async {
        while connect(served.address, &second, b"h2").await.is_err() {
            look.tick().await;
        }
    };
    tokio::time::timeout(LONG, renewed).await.expect("the new certificate is in force");
    assert!(connect(served.address, &first, b"h2").await.is_err());

    let mut rest = String::new();
    stream.read_to_string(&mut rest).await.unwrap();
    assert!(rest.contains("data: [DONE]"), "the stream from before came to its end");
}

#[tokio::test]
async fn a_client_that_begins_a_handshake_and_no_more_is_closed() {
    let api = FakeBackend::start(Personality::OpenAi, Settings::default()).await.unwrap();
    let certificates = tempfile::tempdir().unwrap();
    renew(certificates.path());
    let folder = certificates.path().display();
    let tls = format!("tls = {{ certificate = \"{folder}/cert.pem\", private_key = \"{folder}/key.pem\" }}");
    let config = format!(
        "[limits]\nheader_timeout = \"200ms\"\n[backends.openai]\nkind = \"api\"\nbase_url = \"{}\"\n",
        api.url()
    );
    let served = Served::start(&tls, &config, &[]).await;
    for start in [&b""[..], b"\x16\x03\x01\x02\x00\x01", b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n"] {
        let mut stream = TcpStream::connect(served.address).await.unwrap();
        stream.write_all(start).await.unwrap();
        let mut answer = Vec::new();
        let closed = tokio::time::timeout(LONG, stream.read_to_end(&mut answer)).await;
        assert!(closed.is_ok(), "{start:?}");
        assert!(!answer.starts_with(b"HTTP"), "{start:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_admin_side_speaks_tls_too_and_healthcheck_knows_it() {
    let certificates = tempfile::tempdir().unwrap();
    let trusted = renew(certificates.path());
    let folder = certificates.path();
    let config = format!(
        "[server.admin_tls]\ncertificate = \"{0}/cert.pem\"\nprivate_key = \"{0}/key.pem\"\n\
         [backends.openai]\nkind = \"api\"\nbase_url = \"http://127.0.0.1:9/v1\"\n",
        folder.display()
    );
    let proxy = Proxy::start(&config).await;
    let admin = proxy.running.admin_address;
    assert!(connect(admin, &trusted, b"h2").await.is_err(), "it has HTTP/1.1 only");
    let mut connection = connect(admin, &trusted, b"http/1.1").await.unwrap();
    connection
        .write_all(b"GET /readyz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let mut plain = TcpStream::connect(admin).await.unwrap();
    plain.write_all(b"GET /readyz HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    // A broken connection is as good.
    drop(plain.read_to_end(&mut answer).await);
    assert!(!answer.starts_with(b"HTTP"), "without TLS there is no answer");

    let path = folder.join("breakeven.toml");
    std::fs::write(&path, &config).unwrap();
    let asked = tokio::process::Command::new(env!("CARGO_BIN_EXE_breakeven"))
        .args(["healthcheck", "--ready", "--admin", &admin.to_string(), "--config"])
        .arg(&path)
        .output();
    let asked = asked.await.unwrap();
    assert!(asked.status.success(), "{}", String::from_utf8_lossy(&asked.stderr));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backend_with_a_certificate_of_an_authority_of_ones_own_is_probed_and_called() {
    let api = FakeBackend::start(Personality::OpenAi, Settings::default()).await.unwrap();
    let certificates = tempfile::tempdir().unwrap();
    renew(certificates.path());
    let folder = certificates.path().display();
    let tls = format!("tls = {{ certificate = \"{folder}/cert.pem\", private_key = \"{folder}/key.pem\" }}");
    let config = format!("[backends.openai]\nkind = \"api\"\nbase_url = \"{}\"\n", api.url());
    // What stands for the server of a model is another proxy, which speaks TLS.
    let backend = Served::start(&tls, &config, &[]).await;
    let config = |trust: &str| {
        format!(
            "[backends.gpu]\nkind = \"self_hosted\"\nserver = \"other\"\nbase_url = \"https://localhost:{}/v1\"\n\
             hourly_usd = 1\ncapacity = {{ input_tokens_per_second = 1000, output_tokens_per_second = 100, \
             max_in_flight = 8 }}\nhealth = {{ path = \"/v1/models\", interval = \"1s\" }}\n{trust}\n\
             [routes.chat]\nmodels = [\"{MODEL}\"]\npolicy = \"self_hosted\"\noffers = [{{ backend = \"gpu\" }}]\n",
            backend.address.port()
        )
    };
    let trusting = config(&format!("ca_file = \"{folder}/cert.pem\""));
    let proxy = Proxy::start(&trusting).await.ready().await;
    let reply = Http::new(&proxy.url()).post("/chat/completions", &chat(MODEL)).await;
    assert_eq!((reply.status, reply.header("x-breakeven-backend")), (200.try_into().unwrap(), "gpu"));

    let check = |name: &str, text: &str| {
        let path = certificates.path().join(name);
        std::fs::write(&path, text).unwrap();
        let run = std::process::Command::new(env!("CARGO_BIN_EXE_breakeven"))
            .args(["check", "--online", "--config"])
            .arg(&path)
            .output()
            .unwrap();
        (run.status.success(), String::from_utf8_lossy(&[run.stdout, run.stderr].concat()).into_owned())
    };
    let (is_fine, said) = check("trusting.toml", &trusting);
    assert!(is_fine, "{said}");
    let (is_fine, said) = check("public.toml", &config(""));
    assert!(!is_fine && said.contains("certificate"), "{said}");
}
