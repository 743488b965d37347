//! The modules that read bytes from outside, and what must hold for any bytes.
//!
//! They are the program's own files, by links: the rest of the program (servers, databases, Kubernetes) would take a
//! quarter of an hour to build with the fuzzer's instruments, and is not needed.

extern crate self as breakeven;

pub mod config;
pub mod economics;
pub mod openai;
pub mod prices;

#[path = "../targets.rs"]
mod targets;

pub use targets::{answer, config as config_text, money, request, sse};
