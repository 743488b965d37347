//! Integration tests: real servers on real sockets.

mod accounting;
mod config;
mod durability;
mod fake;
mod fleet;
mod ledger;
mod metrics;
mod support;
mod upstream_pool;
