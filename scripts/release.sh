#!/usr/bin/env bash
# Builds a release for this machine and shows that it works:
#
#   scripts/release.sh [FOLDER]         default: dist/
#
# FOLDER then has breakeven-VERSION-TARGET.tar.gz (program, licence, configuration, unit, dashboards, rules,
# completions), its bill of materials, and SHA256SUMS. Verify a download with `sha256sum --check SHA256SUMS`.
# Two builds of one commit with one toolchain make the same archive.
set -euo pipefail
cd "$(dirname "$0")/.."
output="$(realpath -m "${1:-dist}")"
temp="$(mktemp -d)"
trap 'rm -rf "$temp"' EXIT

if [ -n "$(git status --porcelain)" ]; then
  echo "the work tree has changes that no commit has: a release is built from a commit" >&2
  exit 1
fi
# Times inside the archive, and the paths of this machine, are not to differ from build to build.
SOURCE_DATE_EPOCH="$(git log -1 --format=%ct)"
export SOURCE_DATE_EPOCH
export RUSTFLAGS="${RUSTFLAGS:-} --remap-path-prefix=$PWD=. --remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=/cargo"

version="$(cargo metadata --locked --no-deps --format-version 1 | python3 -c 'import json,sys; print(json.load(sys.stdin)["packages"][0]["version"])')"
target="$(rustc -vV | sed -n 's/^host: //p')"
name="breakeven-$version-$target"

binary="$(scripts/build-release)"

root="$temp/$name"
mkdir -p "$root"/{completions,config,deploy}
install -s "$binary" "$root/breakeven"
cp LICENSE README.md CHANGELOG.md SECURITY.md "$root/"
cp config/breakeven.toml config/prices.toml "$root/config/"
cp -r deploy/systemd deploy/prometheus grafana "$root/deploy/"
rm -rf "$root"/deploy/grafana/{*.py,__pycache__}
for shell in bash zsh fish; do "$root/breakeven" completions "$shell" > "$root/completions/breakeven.$shell"; done

mkdir -p "$output"
tar --create --sort=name --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX --mtime="@$SOURCE_DATE_EPOCH" \
  --directory "$temp" "$name" | gzip --no-name -9 > "$output/$name.tar.gz"
scripts/sbom.py "$target" > "$output/$name.cdx.json"
(cd "$output" && sha256sum "$name.tar.gz" "$name.cdx.json" > SHA256SUMS)

# What was packed is what is tried: unpacked elsewhere, in an empty folder, with an empty environment.
mkdir "$temp/try"
(cd "$output" && sha256sum --check --quiet SHA256SUMS)
tar --extract --gzip --file "$output/$name.tar.gz" --directory "$temp/try"
try="$temp/try/$name"
cd "$temp/try"
[ "$(env -i "$try/breakeven" --version)" = "breakeven $version" ]
env -i OPENAI_API_KEY=none "$try/breakeven" check --config "$try/config/breakeven.toml"
env -i "$try/breakeven" demo --for 10s --headless --listen 127.0.0.1:0 --admin-listen 127.0.0.1:0
ls -l "$output"
cat "$output/SHA256SUMS"
