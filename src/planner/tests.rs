//! The planner under a clock that tests move, with a real gateway and a real ledger.
