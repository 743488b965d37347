//! Integration tests: real servers on real sockets.

mod accounting;
mod calibrate;
mod check;
mod config;
mod demo;
mod durability;
mod export;
mod fake;
mod fleet;
mod fuzz;
mod import;
mod invoices;
mod keys;
mod kubernetes;
mod ledger;
mod live;
mod metrics;
#[cfg(feature = "otel")]
mod otel;
mod plan;
mod postgres;
mod proxy;
mod resilience;
mod shared;
mod simulation;
mod support;
mod tidy;
mod upstream_pool;
