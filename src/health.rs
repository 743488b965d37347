//! Whether a backend should be asked at all: what calls and probes have shown of it.
//!
//! Passive health is [`Circuit`]: every call tells it how it went. Active health is [`probe::probe`]: one
//! request to the health path. [`Throttle`] reads OpenAI's `x-ratelimit-*` headers, so that traffic is steered
//! before it fails. All three are given the time, and are read without a lock.

pub mod circuit;
pub mod probe;
pub mod throttle;

pub use circuit::{Circuit, CircuitState};
pub use probe::{Probe, probe};
pub use throttle::Throttle;
