mod config;
mod durability;
mod ledger;
mod metrics;
//! Integration tests: real servers on real sockets.

mod fake;
mod support;
mod upstream_pool;
mod accounting;
