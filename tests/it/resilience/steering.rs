//! Backends that hang, limit and fill up: what one does never holds up another.
