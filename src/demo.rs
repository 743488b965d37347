//! The whole thing on one machine without a key, a GPU or a network: fake servers, real proxy, made-up traffic.

pub mod bill;
pub mod day;
pub mod fake_backend;
pub mod history;
pub mod hook;
pub mod load;
pub mod picture;
pub mod process;
pub mod stage;

pub use fake_backend::{
    Chaos, Costs, FakeBackend, Fault, Personality, Produced, SeenRequest, Settings, State, Totals, Verbatim,
};
