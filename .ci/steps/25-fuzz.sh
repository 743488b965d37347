#!/usr/bin/env bash
# The fuzzer's workspace links the program's own modules: whatever they come to use must be there too.
set -euo pipefail
cargo check --locked --quiet --manifest-path tests/fuzz/Cargo.toml --lib
