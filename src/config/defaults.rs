//! What is in force where the owner has written nothing, each with its reason.

use std::time::Duration;

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

const fn minutes(minutes: u64) -> Duration {
    Duration::from_secs(minutes * 60)
}

/// Loopback, so that nothing is open to a network before somebody has decided that.
pub const LISTEN: &str = "127.0.0.1:4000";
pub const ADMIN_LISTEN: &str = "127.0.0.1:4001";

/// Twice the calls, since clients keep idle connections.
pub const MAX_CONNECTIONS: u64 = 16_384;
/// Thousands of slow streams on one proxy are normal; each costs some tens of KiB.
pub const MAX_IN_FLIGHT: u64 = 8192;
/// A flood leaves a tenth to whoever comes next; a caller that is alone hardly misses it.
pub const CALLER_SHARE: f64 = 0.9;
/// Below it, most places would always be empty.
pub const SMALLEST_CALLER_SHARE: f64 = 0.1;
/// A dozen photographs in base64; gateways that stop at 32 KiB or 1 MiB break vision calls.
pub const MAX_BODY_BYTES: u64 = 32 << 20;
pub const MAX_BUFFERED_BYTES: u64 = 512 << 20;
pub const MAX_UPLOAD_BYTES: u64 = 512 << 20;
/// Above what proxies in front of us let through (8 to 32 KiB).
pub const MAX_HEADER_BYTES: u64 = 64 << 10;
/// A head is one packet or two: whoever needs longer is broken or hostile.
pub const HEADER_TIMEOUT: Duration = seconds(10);
/// The largest body over a 2 Mbit/s line.
pub const BODY_TIMEOUT: Duration = minutes(2);
/// Longer than the 60 s of most load balancers, so that they close first and no request meets a closing socket.
pub const IDLE_TIMEOUT: Duration = seconds(75);
/// A deploy must not cut a long stream; orchestrators need their grace period raised to match.
pub const DRAIN_TIMEOUT: Duration = minutes(10);

/// In the working directory.
pub const LEDGER_PATH: &str = "breakeven.db";
/// Some 600 KiB in memory, and a transaction of some tens of milliseconds.
pub const POSTGRES_BATCH_ROWS: u64 = 2000;
pub const MOST_POSTGRES_BATCH_ROWS: u64 = 20_000;
/// A server across an ocean, or one that is starting.
pub const POSTGRES_CONNECT_TIMEOUT: Duration = seconds(10);
/// Beyond it a batch is better tried anew: nothing waits for it but the next.
pub const POSTGRES_STATEMENT_TIMEOUT: Duration = seconds(30);

/// Long enough to average single calls out, short enough to follow the day.
pub const WINDOW: Duration = minutes(10);
/// Noise of 20% over ten minutes' calls stays within it.
pub const MARGIN: f64 = 0.10;
/// Changes cost cold caches and starts.
pub const MIN_DWELL: Duration = minutes(5);
/// The slot that policies are measured with.
pub const SLOT: Duration = seconds(60);

/// First backend, the other one, and once more.
pub const MAX_ATTEMPTS: u64 = 3;
/// Rides out a restarted worker behind a load balancer.
pub const BACKOFF: Duration = Duration::from_millis(200);
/// Beyond it a person has noticed: better another backend or an honest error.
pub const MAX_BACKOFF: Duration = seconds(5);
/// In an outage the proxy adds at most a fifth to the load that broke the backend.
pub const BUDGET_RATIO: f64 = 0.2;

/// What all keys of a deployment in Redis begin with.
pub const SHARED_PREFIX: &str = "breakeven:";
/// What a call adds is known everywhere after two of these; a dozen proxies are no load for Redis.
pub const SHARED_REFRESH: Duration = Duration::from_millis(500);
/// Faster than this is load without use.
pub const SHORTEST_SHARED_REFRESH: Duration = Duration::from_millis(50);
/// So many exchanges fit into a slot, that the others' part is there when it is over.
pub const SHARED_REFRESHES_A_SLOT: u32 = 4;
/// Outlives a stall of some seconds, and leaves a takeover within ten.
pub const SHARED_LEASE: Duration = seconds(6);
pub const LONGEST_SHARED_LEASE: Duration = minutes(5);
/// A lease has to be renewed several times before it ends.
pub const SHARED_REFRESHES_A_LEASE: u32 = 6;
/// Redis is near, and nobody waits for it but the exchange.
pub const SHARED_CONNECT_TIMEOUT: Duration = seconds(2);
pub const SHARED_TIMEOUT: Duration = seconds(1);
/// Longer names are a mistake.
pub const LONGEST_SHARED_PREFIX: usize = 128;

/// What one Prometheus scrape of one target should stay below.
pub const MAX_SERIES: u64 = 2000;
pub const LOG_FILTER: &str = "info";

/// A TLS handshake across an ocean takes half a second.
pub const CONNECT_TIMEOUT: Duration = seconds(5);
/// Without streaming, the head comes when all is generated: as long as the OpenAI SDKs wait.
pub const API_FIRST_BYTE: Duration = minutes(10);
/// Without streaming, 8,000 tokens at 27 a second.
pub const OWN_FIRST_BYTE: Duration = minutes(5);
/// Reasoning models are silent for minutes in the middle of a stream.
pub const API_BETWEEN_BYTES: Duration = minutes(5);
/// A stopped vLLM keeps its streams open without a byte; a long prefill of others is a pause of seconds.
pub const OWN_BETWEEN_BYTES: Duration = minutes(2);
/// Ends what all other limits let through.
pub const TOTAL_TIMEOUT: Duration = minutes(60);
/// OpenAI's edge keeps idle connections for some minutes.
pub const API_IDLE_CONNECTION: Duration = seconds(90);
/// vLLM and llama.cpp close idle connections after 5 s; a request must not meet a closing socket.
pub const OWN_IDLE_CONNECTION: Duration = seconds(4);

/// Twelve checks a minute notice a dead replica before its circuit does.
pub const HEALTH_INTERVAL: Duration = seconds(5);
/// A llama.cpp server with all slots busy takes 6 s to answer: busy is not dead.
pub const HEALTH_TIMEOUT: Duration = seconds(10);
/// Single failures are the network's.
pub const CIRCUIT_FAILURES: u64 = 5;
/// A restarted process is back by then; a loading model is held back by its health check.
pub const CIRCUIT_OPEN_FOR: Duration = seconds(10);

/// An 8B model on an H100 with its weights on disk.
pub const STARTUP: Duration = minutes(5);
/// Clouds that bill by the second bill at least a minute.
pub const MINIMUM: Duration = minutes(1);
/// The lower edge of a band whose owner gave one number.
pub const BAND_DOWN_SHARE: f64 = 0.8;

/// An 8B model on one H100, for a first run without a configuration. `breakeven calibrate` measures yours.
pub const QUICK_START_INPUT_TOKENS_PER_SECOND: u64 = 15_000;
pub const QUICK_START_OUTPUT_TOKENS_PER_SECOND: u64 = 10_000;
pub const QUICK_START_MAX_IN_FLIGHT: u64 = 64;

/// Bounds of what is plausible; beyond them a unit is probably wrong.
pub const LONGEST_STARTUP: Duration = minutes(6 * 60);
pub const LONGEST_MINIMUM: Duration = minutes(31 * 24 * 60);
pub const LONGEST_WINDOW: Duration = minutes(24 * 60);
pub const LONGEST_SLOT: Duration = minutes(60);
/// A slot shorter than this holds too few calls to decide by.
pub const SHORTEST_SLOT: Duration = seconds(1);
/// The dearest machine that clouds rent (eight GPUs of the newest kind) is near 100 USD an hour.
pub const DEAREST_PLAUSIBLE_HOUR_NANO_USD: i64 = 1_000_000_000_000;
pub const MOST_REPLICAS: u64 = 1000;
pub const MOST_WORKERS: u64 = 1024;
pub const MOST_ATTEMPTS: u64 = 10;
/// Bodies are held in memory while they are routed and retried.
pub const LARGEST_BODY: u64 = 1 << 30;
pub const LEAST_BUFFERED: u64 = 1 << 20;
pub const MOST_BUFFERED: u64 = 1 << 40;
pub const LARGEST_UPLOAD: u64 = 1 << 40;
pub const SMALLEST_HEAD: u64 = 4 << 10;
pub const LARGEST_HEAD: u64 = 1 << 20;
/// Ids are 16 bits wide, and metrics have a label for each.
pub const MOST_BACKENDS: usize = 256;
pub const MOST_ROUTES: usize = 4096;
/// Each call looks at all of them.
pub const MOST_BUDGETS: usize = 256;
/// Each is a label value.
pub const MOST_TEAMS: usize = 200;
