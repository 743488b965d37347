//! Integration tests: real servers on real sockets.

mod fake;
mod support;
