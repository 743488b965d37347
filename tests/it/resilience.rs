//! What breaks, what is hostile, and what is too much: the proxy stays up, exact and closed.

mod admin;
mod canary;
mod chaos;
mod disk;
mod drain;
mod fairness;
mod http2;
mod kill;
mod overload;
mod postgres;
mod smuggling;
mod soak;
mod steering;
mod tls;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use breakeven::ledger::query;
use serde_json::json;
use tempfile::TempDir;
use tokio::process::{Child, Command};

use crate::support::{Events, Http, chat, free_address, soon, with};

/// Below the folder of a process.
const LEDGER: &str = "ledger/breakeven.db";

/// `breakeven serve` as a process of its own, with a folder of its own.
struct Served {
    child: Child,
    folder: TempDir,
    address: SocketAddr,
    admin: SocketAddr,
}

impl Served {
    /// Starts with a configuration without `[server]`'s addresses and `[ledger]`; `server` is more of `[server]`.
    async fn start(server: &str, config: &str, environment: &[(&str, &str)]) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), server, config, environment).await
    }

    /// The same in a folder that may hold a ledger, or a disk of its own, in `ledger/`.
    async fn start_in(folder: TempDir, server: &str, config: &str, environment: &[(&str, &str)]) -> Self {
        Self::start_with_admin_at(free_address(), folder, server, config, environment).await
    }

    /// The same with an address of the admin side's own.
    async fn start_with_admin_at(
        admin: SocketAddr,
        folder: TempDir,
        server: &str,
        config: &str,
        environment: &[(&str, &str)],
    ) -> Self {
        let address = free_address();
        std::fs::create_dir_all(folder.path().join("ledger")).unwrap();
        let text = format!(
            "[server]\nlisten = \"{address}\"\nadmin_listen = \"{admin}\"\nworkers = 2\n{server}\n\
             [ledger]\npath = \"{}\"\n{config}",
            folder.path().join(LEDGER).display()
        );
        std::fs::write(folder.path().join("breakeven.toml"), text).unwrap();
        // Whatever it listens on, it is asked through the loopback.
        let admin = SocketAddr::from(([127, 0, 0, 1], admin.port()));
        let child = Self::spawn(&folder, environment);
        let mut served = Self { child, folder, address, admin };
        served.ready().await;
        served
    }

    fn spawn(folder: &TempDir, environment: &[(&str, &str)]) -> Child {
        let log =
            std::fs::OpenOptions::new().append(true).create(true).open(folder.path().join("log")).unwrap();
        // For figures, the program as it is released.
        let program = std::env::var("BREAKEVEN_TEST_PROGRAM");
        Command::new(program.as_deref().unwrap_or(env!("CARGO_BIN_EXE_breakeven")))
            .args(["serve", "--config"])
            .arg(folder.path().join("breakeven.toml"))
            .envs(environment.iter().copied())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap()
    }

    /// Starts it again where it was.
    async fn restart(&mut self) {
        self.child = Self::spawn(&self.folder, &[]);
        self.ready().await;
    }

    async fn ready(&mut self) {
        let mut look = tokio::time::interval(Duration::from_millis(2));
        let up = async {
            while tokio::net::TcpStream::connect(self.admin).await.is_err() {
                look.tick().await;
            }
        };
        let up = tokio::time::timeout(Duration::from_secs(20), up).await;
        up.unwrap_or_else(|_| panic!("it does not start: {}", self.log()));
        let reply = Http::new(&format!("http://{}", self.admin)).get("/readyz").await;
        assert_eq!(reply.status, 200, "{}", reply.text());
    }

    fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    fn admin_url(&self) -> String {
        format!("http://{}", self.admin)
    }

    /// Where its ledger is.
    fn ledger(&self) -> PathBuf {
        self.folder.path().join(LEDGER)
    }

    fn process(&self) -> u32 {
        self.child.id().expect("it runs")
    }

    /// Waits until its log says so.
    async fn says(&self, words: &str) {
        let mut look = tokio::time::interval(Duration::from_millis(10));
        let said = async {
            while !self.log().contains(words) {
                look.tick().await;
            }
        };
        let said = tokio::time::timeout(Duration::from_secs(20), said).await;
        said.unwrap_or_else(|_| panic!("it does not say `{words}`: {}", self.log()));
    }

    /// Lets the proxy count the tokens of an answer that nobody hears to its end, for which it loads 50 MB of
    /// vocabulary: where that takes time or room that is not what is tested.
    async fn load_vocabulary(&self, model: &str) {
        let http = Http::new(&self.url());
        let stream = http.open("/chat/completions", &with(chat(model), json!({"stream": true}))).await;
        Events::of(stream).next().await.unwrap();
        let booked = async || (!query::recent(&self.ledger(), 1).unwrap().is_empty()).then_some(());
        soon(Duration::from_secs(20), booked).await.expect("what was heard of it is booked");
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    fn signal(&self, name: &str) {
        let id = self.process().to_string();
        assert!(std::process::Command::new("kill").args([name, &id]).status().unwrap().success());
    }
}

/// The value of a metric without labels.
async fn metric(admin_url: &str, name: &str) -> u64 {
    let reply = Http::new(admin_url).get("/metrics").await;
    let line =
        reply.text().lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')).map(str::to_owned);
    line.unwrap_or_else(|| panic!("{name} is not in\n{}", reply.text())).parse().unwrap()
}

/// Resident memory of the proxy, in KiB.
fn resident(served: &Served) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{}/status", served.process())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// A number from the environment, for runs that are larger than a test's.
fn scale(variable: &str, default: usize) -> usize {
    std::env::var(variable).map_or(default, |number| number.parse().expect("a number"))
}
