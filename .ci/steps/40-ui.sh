#!/usr/bin/env bash
# The live page in Debian's Chromium, against a real proxy.
set -euo pipefail

need chromium chromium fonts-dejavu-core
need node nodejs
need npm npm
# The packages ship no binaries of their own: the browser is Debian's.
(cd tests/ui && npm ci --ignore-scripts --no-audit --no-fund --silent)
BREAKEVEN="$PWD/target/release/breakeven" node --test tests/ui/page.test.mjs
