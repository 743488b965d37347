//! What many proxies have in common, through Redis or Valkey: volume, budgets, rate limits, and who plans.
//!
//! Nothing here is on the request path. Once every `shared.refresh` a proxy sends one pipeline: what it has
//! seen and used, all of it as absolute sums, so that a repeated exchange counts nothing twice; and gets back
//! what the others have. Between two exchanges it goes by what it was told. Every script is atomic in Redis, and
//! times are those of Redis's clock.
//!
//! An exchange that fails closes the connection; what is known stays in force until the next one succeeds.
//! docs/many-proxies.md is the owner's view, with the bounds.

pub mod budgets;
pub mod lease;
pub mod rates;
pub mod replicas;
pub mod volume;

use std::path::{Path, PathBuf};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, Pipeline, TlsCertificates, Value};
use tracing::warn;
use uuid::Uuid;

use crate::config::Shared;
use crate::economics::time::millis;
use crate::tls;

/// Who we are to the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Lives as long as our ledger: what the ledger has of an earlier process is ours.
    pub proxy: String,
    /// This process.
    pub process: String,
}

impl Identity {
    /// That of the proxy whose ledger is at `ledger`: its name is in a file beside the ledger, made at the first
    /// start. A name that cannot be kept is a new one each time.
    pub fn beside(ledger: &Path) -> Self {
        let mut path = ledger.as_os_str().to_owned();
        path.push(".proxy");
        let proxy = kept_name(Path::new(&path)).unwrap_or_else(|error| {
            let path = Path::new(&path).display();
            warn!("this proxy's name cannot be kept in `{path}`: {error}");
            new_name()
        });
        Self { proxy, process: new_name() }
    }
}

fn kept_name(path: &Path) -> std::io::Result<String> {
    match std::fs::read_to_string(path) {
        Ok(name) if Uuid::try_parse(name.trim()).is_ok() => Ok(name.trim().to_owned()),
        Ok(_) => make_name(path),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => make_name(path),
        Err(error) => Err(error),
    }
}

fn make_name(path: &Path) -> std::io::Result<String> {
    let name = new_name();
    std::fs::write(path, format!("{name}\n"))?;
    Ok(name)
}

fn new_name() -> String {
    Uuid::now_v7().to_string()
}

/// How to come to a connection.
#[derive(Debug, Clone)]
pub struct Link {
    settings: Shared,
    identity: Identity,
}

/// A connection whose scripts are loaded.
#[derive(Clone)]
pub struct Store {
    connection: MultiplexedConnection,
    keys: Keys,
    scripts: Scripts,
    identity: Identity,
    lease: Duration,
    timeout: Duration,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Store").field("identity", &self.identity).finish_non_exhaustive()
    }
}

/// Names of keys.
#[derive(Debug, Clone)]
struct Keys {
    prefix: String,
}

impl Keys {
    fn named(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }
}

/// SHA-1 digests by which Redis knows the scripts.
#[derive(Debug, Clone)]
struct Scripts {
    beat: String,
    budget: String,
    rate: String,
    replicas: String,
}

#[derive(Debug, thiserror::Error)]
pub enum SharedError {
    #[error("Redis cannot be reached, or refuses")]
    Redis(#[from] redis::RedisError),
    #[error("cannot read `{path}`")]
    Ca { path: PathBuf, source: std::io::Error },
    #[error("Redis did not answer within {} ms", .0.as_millis())]
    Late(Duration),
    #[error("Redis holds what is not ours under our keys: {0}")]
    Strange(String),
}

impl From<redis::ParsingError> for SharedError {
    fn from(error: redis::ParsingError) -> Self {
        Self::Strange(error.to_string())
    }
}

impl Link {
    pub fn new(settings: Shared, identity: Identity) -> Self {
        Self { settings, identity }
    }

    /// Connects, within `shared.connect_timeout`, and loads the scripts.
    pub async fn connect(&self) -> Result<Store, SharedError> {
        let patience = self.settings.connect_timeout;
        let connected = tokio::time::timeout(patience, self.open()).await;
        connected.unwrap_or(Err(SharedError::Late(patience)))
    }

    async fn open(&self) -> Result<Store, SharedError> {
        tls::install();
        let url = self.settings.redis.expose();
        let client = match &self.settings.ca {
            Some(path) => {
                // Read each time: it may have been renewed since.
                let read = tokio::fs::read(path).await;
                let pem = read.map_err(|source| SharedError::Ca { path: path.clone(), source })?;
                Client::build_with_tls(url, TlsCertificates { client_tls: None, root_cert: Some(pem) })?
            }
            None => Client::open(url)?,
        };
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.settings.connect_timeout))
            .set_response_timeout(Some(self.settings.timeout));
        let mut connection = client.get_multiplexed_async_connection_with_config(&config).await?;
        let mut load = redis::pipe();
        for script in [BEAT, BUDGET, RATE, REPLICAS] {
            load.cmd("SCRIPT").arg("LOAD").arg(script);
        }
        let (beat, budget, rate, replicas) = load.query_async(&mut connection).await?;
        Ok(Store {
            connection,
            keys: Keys { prefix: self.settings.prefix.clone() },
            scripts: Scripts { beat, budget, rate, replicas },
            identity: self.identity.clone(),
            lease: self.settings.lease,
            timeout: self.settings.timeout,
        })
    }
}

const BEAT: &str = include_str!("shared/beat.lua");
const BUDGET: &str = include_str!("shared/budget.lua");
const RATE: &str = include_str!("shared/rate.lua");
const REPLICAS: &str = include_str!("shared/replicas.lua");

/// Questions on their way to Redis in one pipeline; the answers come in their order.
#[derive(Debug, Default)]
pub struct Exchange {
    pipeline: Pipeline,
    questions: usize,
}

/// Answers that have not been read yet.
#[derive(Debug)]
pub struct Answers(std::vec::IntoIter<Value>);

impl Answers {
    fn next(&mut self) -> Result<Value, SharedError> {
        self.0.next().ok_or_else(|| SharedError::Strange("an answer is missing".to_owned()))
    }
}

impl Store {
    /// Sends everything at once, and waits for the answers, at most `shared.timeout`.
    pub async fn send(&mut self, exchange: &Exchange) -> Result<Answers, SharedError> {
        if exchange.questions == 0 {
            return Ok(Answers(Vec::new().into_iter()));
        }
        let asked = exchange.pipeline.query_async::<Vec<Value>>(&mut self.connection);
        let answers = tokio::time::timeout(self.timeout, asked).await;
        Ok(Answers(answers.map_err(|_| SharedError::Late(self.timeout))??.into_iter()))
    }

    fn lease_millis(&self) -> u64 {
        millis(self.lease)
    }
}

/// A number that a script has written.
fn number<N: std::str::FromStr>(text: &str) -> Result<N, SharedError> {
    text.parse().map_err(|_| SharedError::Strange(format!("`{text}` is not a number")))
}
