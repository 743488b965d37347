//! breakeven: a reverse proxy in front of the `OpenAI` API and a self-hosted endpoint that sends each call
//! to whichever costs less at the current volume.
//!
//! ARCHITECTURE.md in the repository has the map, the layers and the invariants.

pub mod admin;
pub mod cli;
pub mod clock;
pub mod commands;
pub mod config;
pub mod demo;
pub mod economics;
pub mod fleet;
pub mod gateway;
pub mod health;
pub mod keys;
pub mod ledger;
pub mod metrics;
pub mod openai;
pub mod planner;
pub mod prices;
pub mod proxy;
pub mod server;
pub mod shared;
pub mod simulator;
pub mod telemetry;
pub mod tls;
pub mod upstream;
