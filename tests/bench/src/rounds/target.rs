//! What is measured, and how it is started.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use tempfile::TempDir;

use super::{Arguments, OUR_CORE, PROXY_CORE, pin};

/// How long a program may take to start.
pub const START_TIMEOUT: Duration = Duration::from_secs(20);
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
const NGINX_CONF: &str = include_str!("../../nginx.conf");
const CALL: &str = r#"{"model":"gpt-4o-mini","messages":[{"role":"user","content":"hi"}]}"#;

enum Kind {
    /// No proxy.
    Direct,
    Nginx,
    Passthrough,
    Breakeven {
        program: PathBuf,
        config: String,
    },
}

pub struct Target {
    pub name: String,
    kind: Kind,
}

/// A target that answers calls. It ends with this value.
pub struct Running {
    pub address: SocketAddr,
    pub pid: Option<u32>,
    /// From start to the first call answered.
    pub startup_ms: f64,
    process: Option<Child>,
    _directory: TempDir,
}

impl Target {
    /// The targets asked for; nginx is left out where it is not installed.
    pub fn all(arguments: &Arguments) -> anyhow::Result<Vec<Self>> {
        let mut targets = Vec::new();
        for name in &arguments.targets {
            let kind = match name.as_str() {
                "direct" => Kind::Direct,
                "passthrough" => Kind::Passthrough,
                "nginx" if Command::new("nginx").arg("-v").stderr(Stdio::null()).status().is_err() => {
                    eprintln!("bench: nginx is not installed, so there is nothing to take ratios to");
                    continue;
                }
                "nginx" => Kind::Nginx,
                _ => {
                    let path = arguments.configs.join(format!("{name}.toml"));
                    let config =
                        fs::read_to_string(&path).with_context(|| format!("`{}`", path.display()))?;
                    let program = arguments.breakeven.canonicalize();
                    let program = program.with_context(|| format!("`{}`", arguments.breakeven.display()))?;
                    Kind::Breakeven { program, config }
                }
            };
            targets.push(Self { name: name.clone(), kind });
        }
        Ok(targets)
    }

    /// Starts it on the proxy's core and waits until it answers a call.
    pub fn start(&self, upstream: SocketAddr) -> anyhow::Result<Running> {
        let directory = tempfile::tempdir()?;
        let address = free_address()?;
        let places =
            Places { listen: address, admin: free_address()?, upstream, directory: directory.path() };
        let Some(mut command) = self.command(&places)? else {
            let none = Running {
                address: upstream,
                pid: None,
                startup_ms: 0.0,
                process: None,
                _directory: directory,
            };
            return Ok(none);
        };
        let log = directory.path().join("log");
        let output = fs::File::create(&log)?;
        command.current_dir(directory.path()).stdout(output.try_clone()?).stderr(output);
        let began = Instant::now();
        pin(PROXY_CORE)?;
        let spawned = command.spawn();
        pin(OUR_CORE)?;
        let mut process = spawned.with_context(|| format!("{command:?}"))?;
        let answered = wait_until(START_TIMEOUT, || {
            let status = request(address, "/v1/chat/completions", CALL);
            status.is_ok_and(|status| status == 200)
        });
        if let Err(error) = answered {
            end(&mut process);
            let said = fs::read_to_string(log).unwrap_or_default();
            return Err(error.context(format!("`{}` does not answer; it said: {said}", self.name)));
        }
        let startup_ms = began.elapsed().as_secs_f64() * 1e3;
        let pid = Some(process.id());
        Ok(Running { address, pid, startup_ms, process: Some(process), _directory: directory })
    }

    /// `None`: there is nothing to start.
    fn command(&self, places: &Places<'_>) -> anyhow::Result<Option<Command>> {
        Ok(Some(match &self.kind {
            Kind::Direct => return Ok(None),
            Kind::Nginx => {
                let conf = places.write("nginx.conf", NGINX_CONF)?;
                let mut command = Command::new("nginx");
                command.arg("-p").arg(places.directory).arg("-c").arg(conf);
                command
            }
            Kind::Passthrough => {
                let mut command = Command::new(std::env::current_exe()?);
                command.arg("passthrough");
                command.arg(format!("--listen={}", places.listen));
                command.arg(format!("--upstream={}", places.upstream));
                command
            }
            Kind::Breakeven { program, config } => {
                let config = places.write("breakeven.toml", config)?;
                let mut command = Command::new(program);
                command.arg("serve").arg("--config").arg(config);
                command
            }
        }))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            end(process);
        }
    }
}

/// What configurations name as `{listen}`, `{admin}`, `{upstream}` and `{directory}`.
struct Places<'a> {
    listen: SocketAddr,
    admin: SocketAddr,
    upstream: SocketAddr,
    directory: &'a Path,
}

impl Places<'_> {
    fn write(&self, name: &str, template: &str) -> anyhow::Result<PathBuf> {
        let path = self.directory.join(name);
        let text = template
            .replace("{listen}", &self.listen.to_string())
            .replace("{admin}", &self.admin.to_string())
            .replace("{upstream}", &self.upstream.to_string())
            .replace("{directory}", &self.directory.display().to_string());
        fs::write(&path, text)?;
        Ok(path)
    }
}

/// An address that nobody listens on.
pub fn free_address() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

/// Sends one request on a connection of its own; the status of the answer.
pub fn request(address: SocketAddr, target: &str, body: &str) -> anyhow::Result<u16> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    let request = format!(
        "POST {target} HTTP/1.1\r\nhost: {address}\r\nauthorization: Bearer sk-bench\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes())?;
    let mut status_line = [0; 12];
    stream.read_exact(&mut status_line)?;
    std::str::from_utf8(&status_line[9..])?.parse().context("no status in the answer")
}

/// Asks again every millisecond: what is waited for takes a few.
pub fn wait_until(patience: Duration, mut is_so: impl FnMut() -> bool) -> anyhow::Result<()> {
    let began = Instant::now();
    while !is_so() {
        anyhow::ensure!(began.elapsed() < patience, "not within {patience:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Ends a process that we started: politely, then not.
pub fn end(process: &mut Child) {
    let pid = i32::try_from(process.id()).ok().and_then(rustix::process::Pid::from_raw);
    if let Some(pid) = pid {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
    let began = Instant::now();
    while began.elapsed() < STOP_TIMEOUT {
        if !matches!(process.try_wait(), Ok(None)) {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let _ = process.kill();
    let _ = process.wait();
}
