//! One module a command: arguments, and what is done with them.

pub mod check;
pub mod prices;
pub mod report;
pub mod schema;
