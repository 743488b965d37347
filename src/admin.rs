//! The admin side.

pub mod page;
