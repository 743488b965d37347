mod config;
mod durability;
mod ledger;
