mod config;
mod durability;
mod ledger;
mod metrics;
