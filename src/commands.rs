//! One module a command: arguments, and what is done with them.

pub mod prices;
