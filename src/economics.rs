//! The economics, as values in and values out: no clock, no I/O, no async, no floats for money.
//!
//! The live planner and the simulator are two thin drivers of this module.

pub mod adaptive;
pub mod catalog;
pub mod layers;
pub mod lcp;
pub mod money;
pub mod policy;
pub mod prices;
pub mod time;
pub mod usage;

pub use catalog::{Billing, Capacity, PoolSpec, Work};
pub use money::{NanoUsd, TokenPrice};
pub use policy::{Decision, Fleet, Policy, Preference, Reason, Slot};
pub use prices::{PriceCard, Prices, Tier};
pub use time::Timestamp;
pub use usage::Usage;
