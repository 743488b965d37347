//! The demo's two servers, and the configuration of the proxy between them.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use super::hook::MachineRoom;
use super::{Chaos, FakeBackend, Fault, Personality, Settings};
use crate::clock::Clock;

/// The model that the demo's applications ask for; its list price is in the price book.
pub const MODEL: &str = "gpt-4o";
/// Names of the two backends.
pub const API: &str = "openai";
pub const SELF_HOSTED: &str = "gpu";
/// The teams whose applications call; the first of them has a budget.
pub const TEAMS: [&str; 2] = ["search", "support"];

/// From the order to start a machine until it serves, in the day's time.
const STARTUP: Duration = Duration::from_mins(5);
/// The fake servers' latencies, in real time.
const API_FIRST_TOKEN: Duration = Duration::from_millis(20);
const API_PER_TOKEN: Duration = Duration::from_micros(300);
const OWN_FIRST_TOKEN: Duration = Duration::from_millis(8);
const OWN_PER_TOKEN: Duration = Duration::from_micros(200);
/// Real time in which the volume is measured.
const REAL_WINDOW: Duration = Duration::from_millis(400);
/// Share of the GPU server's answers that report no usage, as happens with real ones. We count those ourselves.
const OWN_WITHOUT_USAGE: f64 = 0.01;
/// Longer than any limit that the load sets.
const LONG_REPLY: u64 = 100_000;

/// A fake OpenAI that is always there, and a fake GPU machine that is off.
#[derive(Debug)]
pub struct Stage {
    pub api: FakeBackend,
    pub room: MachineRoom,
    /// What "current volume" means, in the day's time: long enough for some ninety calls at noon.
    window: Duration,
}

/// The same real time at any speed, because there are as many calls in it.
fn window(clock: &Clock) -> Duration {
    let speed = Duration::from_hours(24).as_secs_f64() / clock.real(Duration::from_hours(24)).as_secs_f64();
    (REAL_WINDOW.mul_f64(speed)).clamp(Duration::from_mins(2), Duration::from_mins(45))
}

impl Stage {
    pub async fn open(clock: &Clock) -> io::Result<Self> {
        let api = Settings {
            time_to_first_token: API_FIRST_TOKEN,
            time_per_output_token: API_PER_TOKEN,
            output_tokens: LONG_REPLY,
            context_window: 1_000_000,
            ..Settings::default()
        };
        let own = Settings {
            time_to_first_token: OWN_FIRST_TOKEN,
            time_per_output_token: OWN_PER_TOKEN,
            chaos: Some(Chaos { seed: 1, probability: OWN_WITHOUT_USAGE, faults: vec![Fault::NoUsage] }),
            ..api.clone()
        };
        Ok(Self {
            api: FakeBackend::start(Personality::OpenAi, api).await?,
            room: MachineRoom::open(Personality::Vllm, own, clock.real(STARTUP)).await?,
            window: window(clock),
        })
    }

    pub async fn close(self) {
        self.room.close().await;
        self.api.stop().await;
    }

    /// The configuration, as an owner would write it.
    pub fn config(&self, listen: SocketAddr, admin_listen: SocketAddr, ledger: &Path) -> String {
        let ledger = toml::Value::String(ledger.to_string_lossy().into_owned());
        format!(
            r#"
[server]
listen = "{listen}"
admin_listen = "{admin_listen}"

[ledger]
path = {ledger}

[log]
filter = "error"

[metrics]
teams = ["{search}", "{support}"]

[budgets.{search}]
team = "{search}"
usd = 50
period = "day"

[policy]
window = "{window}s"
margin = 0.10
min_dwell = "30m"
slot = "60s"

[backends.{API}]
kind = "api"
base_url = "{api}"

[backends.{SELF_HOSTED}]
kind = "self_hosted"
base_url = "{own}"
hourly_usd = 2.99
billing = "while_running"
capacity = {{ input_tokens_per_second = 10000, output_tokens_per_second = 2000, max_in_flight = 256 }}
startup = "5m"
minimum = "1m"
max_replicas = 1
control = {{ kind = "webhook", url = "{hook}" }}

[routes.chat]
models = ["{MODEL}"]
policy = "cheapest"
offers = [{{ backend = "{API}" }}, {{ backend = "{SELF_HOSTED}", model = "meta-llama/Llama-3.3-70B-Instruct" }}]
"#,
            search = TEAMS[0],
            support = TEAMS[1],
            window = self.window.as_secs(),
            api = self.api.url(),
            own = self.room.server_url,
            hook = self.room.hook_url,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{self, Config};
    use crate::demo::day::{DAY, Day};
    use crate::economics::policy::{PolicyKind, PolicySettings, policy_for};
    use crate::economics::{Timestamp, Usage};
    use crate::simulator::{Tally, engine, priced};

    async fn configured() -> Config {
        let clock = Clock::accelerated(Timestamp::ZERO, 1_440);
        let stage = Stage::open(&clock).await.unwrap();
        let any = "127.0.0.1:0".parse().unwrap();
        let text = stage.config(any, any, Path::new("a\\b\"c.db"));
        config::parse(&text, "demo", &|_| None).unwrap_or_else(|problems| panic!("{problems}\n{text}"))
    }

    #[tokio::test]
    async fn the_simulator_says_that_the_demo_changes_twice_and_costs_less_than_either_side_alone() {
        let config = configured().await;
        let pool = config.backends.iter().find_map(config::Backend::pool).unwrap();
        let card = config.prices.card(MODEL).unwrap();
        let settings = PolicySettings {
            window: config.policy.window,
            margin: config.policy.margin,
            min_dwell: config.policy.min_dwell,
            slot: config.policy.slot,
        };
        let day = Day::at_speed(1_440);
        let (input, output) = day.mean_call_size();
        let mut tally = Tally::new(settings.slot);
        let mut owed = 0.0;
        for second in 0..DAY.as_secs() {
            let at = Duration::from_secs(second);
            owed += day.calls_per_hour(at) / 3600.0;
            if owed >= 1.0 {
                owed -= 1.0;
                tally.add(at, priced(card, &pool.capacity, &Usage::new(input, output), 1)).unwrap();
            }
        }
        let demand = tally.demand(1.0, Some(DAY));
        let mut policy = policy_for(&PolicyKind::Cheapest, &settings);
        let outcome = engine::run(policy.as_mut(), pool, &demand, Timestamp::ZERO);
        let alone = engine::run_fixed(1, pool, &demand).total();
        let held: Vec<u32> = outcome.slots.iter().map(|slot| slot.target).collect();
        let changes = held.windows(2).filter(|pair| pair[0] != pair[1]).count();
        assert_eq!(changes, 2);
        let less = |than: crate::economics::NanoUsd| outcome.total().to_usd_f64() / than.to_usd_f64();
        assert!(
            less(demand.api_cost()) < 0.9 && less(alone) < 0.9,
            "{} against {} and {alone}",
            outcome.total(),
            demand.api_cost()
        );
    }
}
