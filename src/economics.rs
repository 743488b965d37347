//! The economics, as values in and values out: no clock, no I/O, no async, no floats for money.
//!
//! The live planner and the simulator are two thin drivers of this module.

pub mod adaptive;
pub mod break_even;
pub mod capacity;
pub mod catalog;
pub mod cheapest;
pub mod constant;
pub mod layers;
pub mod lcp;
pub mod length;
pub mod money;
pub mod policy;
pub mod prices;
pub mod route;
pub mod savings;
pub mod threshold;
pub mod time;
pub mod usage;
pub mod volume;
pub mod work;

pub use catalog::{Billing, Capacity, PoolSpec, Work};
pub use money::{NanoUsd, TokenPrice};
pub use policy::{Decision, Fleet, Policy, PolicyKind, PolicySettings, Preference, Reason, Slot, policy_for};
pub use prices::{PriceCard, Prices, Tier};
pub use threshold::{Band, Threshold};
pub use time::Timestamp;
pub use usage::Usage;
pub use volume::VolumeWindow;
