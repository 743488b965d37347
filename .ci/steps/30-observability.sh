#!/usr/bin/env bash
# Dashboards, rules and metrics against a real Prometheus that scrapes a real proxy.
set -euo pipefail

need prometheus prometheus
need python3 python3
promtool check config deploy/prometheus/prometheus.yml
(cd deploy/prometheus && promtool test rules rules_test.yml)
python3 grafana/generate.py --check
(cd tests/observability && python3 -m unittest -q test_dashcheck)
python3 tests/observability/books_check.py target/release/breakeven
python3 tests/observability/demo_check.py target/release/breakeven
