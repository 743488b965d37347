#!/usr/bin/env bash
# Spans: the one test that needs the feature `otel`, against a collector in the test.
set -euo pipefail
cargo test --locked --features otel --test it otel
