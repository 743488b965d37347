"""A recording of a proxy's metrics on its own clock, and a Prometheus that serves it.

A demo's day passes in a minute. Scraped as it runs, every rate would be a thousand times too high; stamped with the
demo's own time, the metrics are those of a whole day.
"""
import contextlib
import json
import re
import subprocess
import time

from processes import fetch, process, wait_until

SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$")
SECONDS_BETWEEN_SCRAPES = 0.1


def record(admin, running):
    """Scrapes until the demo or its day ends: the demo's time in seconds and the text of its metrics, each time."""
    scrapes = []
    with contextlib.suppress(OSError):
        while running.poll() is None:
            now = json.loads(fetch(f"{admin}/api/status"))["now_ms"] / 1000
            if scrapes and now // 86400 > scrapes[0][0] // 86400:
                break
            scrapes.append((now, fetch(f"{admin}/metrics")))
            time.sleep(SECONDS_BETWEEN_SCRAPES)
    return scrapes


def openmetrics(scrapes):
    """The scrapes as one OpenMetrics file, family by family."""
    kinds, rows = {}, {}
    for now, text in scrapes:
        kinds.update(re.findall(r"^# TYPE (\S+) (\S+)", text, re.M))
        for line in text.splitlines():
            if match := SAMPLE.match(line):
                name, labels, value = match.groups()
                family = name if name in kinds else re.sub(r"_(bucket|sum|count)$", "", name)
                place = ",".join(filter(None, ['job="breakeven",instance="127.0.0.1:4001"', labels]))
                rows.setdefault(family, []).append(f"{name}{{{place}}} {value} {now:.3f}\n")
        rows.setdefault("up", []).append(f'up{{job="breakeven",instance="127.0.0.1:4001"}} 1 {now:.3f}\n')
    for family, lines in rows.items():
        kind = kinds.get(family, "gauge")
        yield f"# TYPE {family.removesuffix('_total') if kind == 'counter' else family} {kind}\n"
        yield from lines
    yield "# EOF\n"


@contextlib.contextmanager
def served(scrapes, folder, port):
    """A Prometheus that has nothing but the recording."""
    file, data, config = folder / "day.om", folder / "data", folder / "prometheus.yml"
    with file.open("w", encoding="utf-8") as out:
        out.writelines(openmetrics(scrapes))
    data.mkdir()
    subprocess.run(["promtool", "tsdb", "create-blocks-from", "openmetrics", file, data], check=True, stdout=subprocess.DEVNULL)
    config.write_text("global: {scrape_interval: 1m}\n", encoding="utf-8")
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={data}", f"--web.listen-address=127.0.0.1:{port}", "--storage.tsdb.retention.time=100y", "--log.level=warn"]
    with process(command, folder / "recording.log"):
        wait_until("Prometheus with the recording", lambda: fetch(f"http://127.0.0.1:{port}/-/ready"))
        yield f"http://127.0.0.1:{port}"
