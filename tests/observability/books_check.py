#!/usr/bin/env python3
"""Counters in Prometheus against the ledger, over a restart, and alerts that fire for real.

  books_check.py BREAKEVEN
"""
import contextlib
import json
import pathlib
import sqlite3
import sys
import tempfile
import urllib.error
import urllib.request

from processes import end, fetch, free_ports, process, prometheus, wait_until
from prometheus import Prometheus

CONFIG = """
[server]
listen = "127.0.0.1:{listen}"
admin_listen = "127.0.0.1:{admin}"
[ledger]
path = "{folder}/ledger.db"
[metrics]
teams = ["search"]
[policy]
window = "10s"
slot = "1s"
min_dwell = "1s"
[backends.openai]
kind = "api"
base_url = "http://127.0.0.1:{api}/v1"
[backends.gpu]
kind = "self_hosted"
base_url = "http://127.0.0.1:{own}/v1"
hourly_usd = 2.99
capacity = {{ input_tokens_per_second = 15000, output_tokens_per_second = 10000, max_in_flight = 64 }}
[routes.chat]
models = ["gpt-4o-mini"]
offers = [{{ backend = "openai" }}, {{ backend = "gpu", model = "llama" }}]
"""


class Stage:
    """A proxy between two fakes, and a Prometheus that scrapes it."""

    def __init__(self, breakeven, folder):
        self.breakeven, self.folder = breakeven, folder
        self.listen, self.admin, self.api, self.own, self.port = free_ports(5)
        self.config = folder / "breakeven.toml"
        self.config.write_text(CONFIG.format(**vars(self)), encoding="utf-8")
        self.prometheus = Prometheus(f"http://127.0.0.1:{self.port}")
        self.sent = 0

    def fake(self, port, personality):
        return process([self.breakeven, "fake-backend", "--listen", f"127.0.0.1:{port}", "--personality", personality], self.folder / f"{personality}.log")

    def serve(self, name):
        return process([self.breakeven, "serve", "--config", self.config], self.folder / f"{name}.log")

    def scrapes(self):
        return process(prometheus(self.folder / "prometheus", self.port, f"127.0.0.1:{self.admin}", quick=True), self.folder / "prometheus.log")

    def ask(self, path, body, **headers):
        request = urllib.request.Request(path, json.dumps(body).encode(), {"content-type": "application/json", "authorization": "Bearer sk-test"} | headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            answer.read()

    def call(self, number):
        body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "weather " * (number % 17 + 1)}], "max_tokens": number % 50 + 1, "stream": number % 3 == 0}
        self.ask(f"http://127.0.0.1:{self.listen}/v1/chat/completions", body, **({"x-breakeven-tags": "team=search"} if number % 2 else {}))
        self.sent += 1

    def pin(self, backend):
        self.ask(f"http://127.0.0.1:{self.admin}/api/pin", {"pool": "gpu", "backend": backend})

    def value(self, expr):
        """A single number that Prometheus has for an expression now, or none."""
        found = self.prometheus.call("query", query=expr)["result"]
        return float(found[0]["value"][1]) if found else None

    def waits_for(self, what, expr, wanted):
        wait_until(f"{what} in Prometheus ({expr})", lambda: self.value(expr) == wanted, 60)


def firing(name):
    return f'count(ALERTS{{alertname="{name}",alertstate="firing"}})'


def increase_nanos(samples):
    """What a counter of dollars grew by, resets included, in nano-dollars; it starts at zero with its process."""
    total = before = 0
    for _, value in samples:
        nanos = round(float(value) * 1e9)
        total += nanos - before if nanos >= before else nanos
        before = nanos
    return total


def in_prometheus(stage):
    """Nano-dollars attributed to requests, by backend and team."""
    sums = {}
    for row in stage.prometheus.call("query", query="breakeven_request_cost_usd_total[1h]")["result"]:
        key = row["metric"]["backend"], row["metric"]["team"]
        sums[key] = sums.get(key, 0) + increase_nanos(row["values"])
    return {key: nanos for key, nanos in sums.items() if nanos}


def in_ledger(stage):
    sql = "SELECT backend, CASE team WHEN 'search' THEN team ELSE 'other' END, sum(cost) FROM calls JOIN labels ON labels.id = label GROUP BY 1, 2"
    with contextlib.closing(sqlite3.connect(stage.folder / "ledger.db")) as ledger:
        return {(backend, team): nanos for backend, team, nanos in ledger.execute(sql) if nanos}


def rows(stage):
    with contextlib.closing(sqlite3.connect(stage.folder / "ledger.db")) as ledger:
        return ledger.execute("SELECT count(*) FROM calls").fetchone()[0]


def calls_are_counted(stage, count, since_restart):
    for backend in ("openai", "gpu"):
        stage.pin(backend)
        for number in range(count):
            stage.call(number)
    stage.waits_for("every call", "sum(breakeven_requests_total)", since_restart + 2 * count)


def check(stage):
    with stage.fake(stage.own, "vllm"), stage.scrapes(), stage.fake(stage.api, "openai") as api:
        wait_until("Prometheus", lambda: fetch(f"http://127.0.0.1:{stage.port}/-/ready"))
        with stage.serve("first"):
            stage.waits_for("the proxy", "sum(breakeven_requests_total)", 0)
            calls_are_counted(stage, 40, 0)
        print("killed: the alert that it is down fires")
        stage.waits_for("the alert", firing("BreakevenDown"), 1)
        with stage.serve("second"):
            stage.waits_for("the restarted proxy at zero", "sum(breakeven_requests_total)", 0)
            calls_are_counted(stage, 25, 0)
            # A row is in the ledger's tables a moment after its call.
            wait_until("the last rows of the ledger", lambda: rows(stage) == stage.sent)
            counted, booked = in_prometheus(stage), in_ledger(stage)
            print(f"nano-dollars after {stage.sent} calls and a restart: {counted}")
            assert counted == booked, f"Prometheus has {counted}, the ledger {booked}"
            assert len(booked) == 4, f"both backends and both teams took part: {booked}"
            alerts_fire(stage, api)


def alerts_fire(stage, api):
    stage.config.write_text(stage.config.read_text(encoding="utf-8") + "nonsense = true\n", encoding="utf-8")
    stage.waits_for("the alert", firing("BreakevenConfigReloadFailed"), 1)
    print("a broken configuration: the alert fires")
    end(api)
    stage.pin("openai")
    for _ in range(20):
        with contextlib.suppress(urllib.error.URLError):
            stage.call(1)
    stage.waits_for("the alert", firing("BreakevenCircuitOpen"), 1)
    print("a dead API: the alert that its circuit is open fires")


def main():
    with tempfile.TemporaryDirectory() as folder:
        check(Stage(pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(folder)))
    print("4 passed, 0 failed")


if __name__ == "__main__":
    main()
