//! A server that answers every request with the same bytes: for what no well-behaved fake sends.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::support::Http;
use crate::support::proxy::Proxy;

/// A proxy before a server of canned answers.
pub(super) struct Canned {
    pub(super) proxy: Proxy,
    pub(super) http: Http,
    seen: Arc<Mutex<Vec<Bytes>>>,
}

impl Canned {
    /// Answers with `answer`, and then closes the connection.
    pub(super) async fn new(answer: impl Into<Bytes>) -> Self {
        Self::with_config(answer, "").await
    }

    /// With more lines at the top of the config.
    pub(super) async fn with_config(answer: impl Into<Bytes>, config: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (answer, seen) = (answer.into(), Arc::new(Mutex::new(Vec::new())));
        let saw = seen.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(serve(stream, answer.clone(), saw.clone()));
            }
        });
        let config = format!(
            "{config}\n[backends.api]\nkind = \"api\"\nbase_url = \"http://{address}/v1\"\n\
             [routes.chat]\nmodels = [\"gpt-4o-mini\"]\noffers = [{{ backend = \"api\" }}]\n"
        );
        let proxy = Proxy::start(&config).await.ready().await;
        let http = Http::new(&proxy.url());
        Self { proxy, http, seen }
    }

    /// With another proxy, that has the ledger of the one before.
    pub(super) async fn restart(self) -> Self {
        let proxy = self.proxy.restart().await.ready().await;
        let http = Http::new(&proxy.url());
        Self { proxy, http, seen: self.seen }
    }

    /// The requests that came, head and body.
    pub(super) fn seen(&self) -> Vec<String> {
        let seen = self.seen.lock().unwrap();
        seen.iter().map(|request| String::from_utf8_lossy(request).into_owned()).collect()
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.proxy.address()
    }
}

async fn serve(mut stream: TcpStream, answer: Bytes, seen: Arc<Mutex<Vec<Bytes>>>) {
    let Some(request) = read_request(&mut stream).await else { return };
    seen.lock().unwrap().push(request);
    drop(stream.write_all(&answer).await);
    drop(stream.shutdown().await);
    // What the other side still sends is taken, so that its connection ends cleanly.
    drop(tokio::io::copy(&mut stream, &mut tokio::io::sink()).await);
}

/// A request whose body, if it has one, has a length.
async fn read_request(stream: &mut TcpStream) -> Option<Bytes> {
    let mut request = Vec::new();
    loop {
        if let Some(end) = memchr::memmem::find(&request, b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&request[..end]).to_lowercase();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            let length: usize = length.map_or(0, |length| length.parse().unwrap());
            if request.len() >= end + 4 + length {
                return Some(request.into());
            }
        }
        if stream.read_buf(&mut request).await.ok()? == 0 {
            return None;
        }
    }
}

/// An answer with a body whose length is told.
pub(super) fn answer(head: &str, body: &[u8]) -> Vec<u8> {
    let mut answer =
        format!("HTTP/1.1 200 OK\r\n{head}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len())
            .into_bytes();
    answer.extend_from_slice(body);
    answer
}

/// Sends text and reads until the connection closes.
pub(super) async fn raw(address: SocketAddr, text: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    // A server that refuses a body may reset the connection after its answer.
    drop(stream.read_to_end(&mut answer).await);
    String::from_utf8_lossy(&answer).into_owned()
}
