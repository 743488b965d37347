//! A real Redis server of a test's own.

use std::net::{SocketAddr, TcpListener};
use std::process::Stdio;
use std::time::Duration;

use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

/// `redis-server` on a free port, without persistence: what is killed has forgotten everything.
#[derive(Debug)]
pub(crate) struct Redis {
    child: Option<Child>,
    pub(crate) folder: TempDir,
    address: SocketAddr,
    options: Vec<String>,
}

impl Redis {
    pub(crate) const PACKAGE: &str = "redis-server";

    pub(crate) fn is_installed() -> bool {
        let folders = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&folders).any(|folder| folder.join("redis-server").is_file())
    }

    pub(crate) async fn start() -> Self {
        Self::start_with(|_, _| Vec::new()).await
    }

    /// `options` are made of the folder and the port; with `--port 0` among them it listens in another way.
    pub(crate) async fn start_with(options: impl FnOnce(&TempDir, u16) -> Vec<String>) -> Self {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let options = options(&folder, address.port());
        let mut redis = Self { child: None, folder, address, options };
        redis.up().await;
        redis
    }

    /// Starts it, or starts it again where it was.
    pub(crate) async fn up(&mut self) {
        let port = self.address.port().to_string();
        let child = Command::new("redis-server")
            .args(["--bind", "127.0.0.1", "--port", &port, "--save", "", "--appendonly", "no"])
            .args(["--loglevel", "warning", "--dir"])
            .arg(self.folder.path())
            .args(&self.options)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("it is installed and starts");
        self.child = Some(child);
        let listens = async {
            let mut look = tokio::time::interval(Duration::from_millis(5));
            while TcpStream::connect(self.address).await.is_err() {
                look.tick().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), listens).await.expect("Redis listens");
    }

    /// SIGKILL.
    pub(crate) async fn kill(&mut self) {
        self.child.take().expect("it runs").kill().await.unwrap();
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://{}/0", self.address)
    }

    /// Sends one command of plain words, and returns what comes back at once.
    pub(crate) async fn command(&self, words: &str) -> String {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(format!("{words}\r\n").as_bytes()).await.unwrap();
        let mut answer = vec![0; 4096];
        let length = stream.read(&mut answer).await.unwrap();
        String::from_utf8(answer[..length].to_vec()).unwrap()
    }
}
