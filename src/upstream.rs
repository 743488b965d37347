//! The side that we call.

pub mod http1;
pub mod pool;
