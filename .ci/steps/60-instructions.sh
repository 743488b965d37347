#!/usr/bin/env bash
# Instructions of the proxy per call and per streamed event, against what is recorded, with ten percent of slack.
# To record anew: RECORD=1 .ci/run 60-instructions
set -euo pipefail
need valgrind valgrind
cargo build --locked --quiet --release --bin breakeven
cargo build --locked --quiet --release --manifest-path tests/bench/Cargo.toml
tests/bench/target/release/bench instructions --breakeven target/release/breakeven \
  --config tests/bench/configs/breakeven.toml --recorded tests/bench/instructions.json ${RECORD:+--record}
