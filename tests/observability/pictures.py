#!/usr/bin/env python3
"""Draws docs/pictures from a demo: the three dashboards, and the live page in light, dark and at phone width.

  pictures.py BREAKEVEN [--seconds 75]

Needs Debian's prometheus, chromium, nodejs and npm, and once
  (cd tests/ui && npm ci --ignore-scripts)
  (cd tests/observability/render && npm install --ignore-scripts --legacy-peer-deps && node node_modules/esbuild/install.js && npm run build)
"""
import argparse
import contextlib
import json
import pathlib
import subprocess
import sys
import tempfile

from dashboards import Dashboard, Scope
from dashcheck import run
from processes import ROOT, fetch, free_ports, process, wait_until
from prometheus import Prometheus
from recording import record, served

PICTURES = ROOT / "docs/pictures"
RENDER = pathlib.Path(__file__).parent / "render"
STEP = 180
RATE_INTERVAL = "12m"


def legend(template, labels):
    if template != "__auto":
        for name, value in labels.items():
            template = template.replace("{{" + name + "}}", value)
        return template
    return labels.get("__name__", "Value")


def with_gaps(values):
    """Nothing where Prometheus has nothing, as Grafana draws it."""
    shown = []
    for time, value in values:
        if shown and time - shown[-1][0] > 1.5 * STEP:
            shown.append((shown[-1][0] + STEP, None))
        shown.append((time, value))
    return shown


def frames(panel):
    """Grafana's data frames of a panel, as its Prometheus data source makes them."""
    for target in panel.queries():
        ref, found = target["refId"], panel.series[target["refId"]]
        if target.get("format") == "table":
            if found:
                yield table(ref, found, sum(t.get("format") == "table" for t in panel.queries()) > 1)
            continue
        if target.get("format") == "heatmap":
            found = apart(found)
        for labels, values in found:
            name, values = legend(target["legendFormat"], labels), with_gaps(values)
            yield {"refId": ref, "name": name, "fields": [{"name": "Time", "type": "time", "values": [int(t * 1000) for t, _ in values]},
                                                         {"name": "Value", "type": "number", "labels": labels, "display": name, "values": [None if v is None or v != v else v for _, v in values]}]}


def table(ref, found, numbered):
    names = sorted({name for labels, _ in found for name in labels})
    columns = [{"name": name, "type": "string", "values": [labels.get(name, "") for labels, _ in found]} for name in names]
    value = {"name": f"Value #{ref}" if numbered else "Value", "type": "number", "values": [values[-1][1] for _, values in found]}
    return {"refId": ref, "name": ref, "fields": [{"name": "Time", "type": "time", "values": [int(values[-1][0] * 1000) for _, values in found]}, *columns, value]}


def apart(found):
    """Cumulative buckets, each for itself."""
    below, single = {}, []
    for labels, values in sorted(found, key=lambda row: float(row[0]["le"])):
        single.append((labels, [(time, max(0, value - below.get(time, 0))) for time, value in values]))
        below = dict(values)
    return single


def draw(dashboard, prometheus, start, end, folder):
    scope = Scope(dashboard, prometheus, start, end, RATE_INTERVAL)
    for panel in dashboard.shown:
        for sentence in run(panel, prometheus, scope, STEP):
            print(f"  {sentence}")
    data = {"title": dashboard.title, "from": int(start * 1000), "to": int(end * 1000), "rows": [{"title": row["title"], "y": row["gridPos"]["y"]} for row in dashboard.rows],
            "panels": [{"id": panel.raw["id"], "type": panel.raw["type"], "title": scope.fill(panel.title).replace(".+", "gpu"), "gridPos": panel.raw["gridPos"], "fieldConfig": panel.raw["fieldConfig"], "options": panel.raw["options"],
                        "transformations": panel.raw.get("transformations", []), "frames": list(frames(panel))} for panel in dashboard.shown]}
    file, picture = folder / f"{dashboard.uid}.json", PICTURES / f"{dashboard.uid}.png"
    file.write_text(json.dumps(data), encoding="utf-8")
    subprocess.run(["node", RENDER / "shoot.mjs", file, picture], check=True)
    print(f"drawn: {picture.relative_to(ROOT)}")


@contextlib.contextmanager
def day(arguments, folder):
    """A demo of one day; its admin side and its process."""
    listen, port = free_ports(2)
    demo = [arguments.breakeven, "demo", "--for", f"{arguments.seconds}s", "--headless", "--listen", f"127.0.0.1:{listen}", "--admin-listen", f"127.0.0.1:{port}"]
    with process(demo, folder / "demo.log") as running:
        wait_until("the demo's admin side", lambda: fetch(f"http://127.0.0.1:{port}/livez"))
        yield f"http://127.0.0.1:{port}", running


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("breakeven", type=pathlib.Path)
    parser.add_argument("--seconds", type=int, default=75)
    arguments = parser.parse_args()
    PICTURES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        # The browser takes processor time that a recording would lack, so each has a day of its own.
        with day(arguments, folder) as (admin, _):
            failed = subprocess.run(["node", ROOT / "tests/ui/pictures.mjs", admin, PICTURES], check=False).returncode
        with day(arguments, folder) as (admin, running):
            scrapes = record(admin, running)
        with served(scrapes, folder, free_ports(1)[0]) as url:
            for path in sorted((ROOT / "grafana/dashboards").glob("*.json")):
                draw(Dashboard(path), Prometheus(url), scrapes[0][0] + 600, scrapes[-1][0], folder)
    return failed


if __name__ == "__main__":
    sys.exit(main())
