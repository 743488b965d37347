//! One module a command: arguments, and what is done with them.

pub mod check;
pub mod economy;
pub mod report;
pub mod schema;
pub mod prices;
pub mod simulate;
pub mod prices;
pub mod report;
pub mod schema;
