//! breakeven: a reverse proxy in front of the `OpenAI` API and a self-hosted endpoint that sends each call
//! to whichever costs less at the current volume.
//!
//! ARCHITECTURE.md in the repository has the map, the layers and the invariants.

pub mod clock;
pub mod config;
pub mod economics;
pub mod ledger;
pub mod upstream;
