#!/usr/bin/env python3
"""A real Prometheus scrapes a real demo; every query of the dashboards and rules must find something.

  demo_check.py BREAKEVEN [--seconds 60]
"""
import argparse
import pathlib
import subprocess
import sys
import tempfile
import time

from processes import ROOT, fetch, free_ports, process, prometheus, wait_until


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("breakeven", type=pathlib.Path)
    parser.add_argument("--seconds", type=int, default=60)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return check(arguments.breakeven, arguments.seconds, pathlib.Path(folder))


def check(breakeven, seconds, folder):
    listen, admin, port = free_ports(3)
    # The demo outlasts the check, so that its last scrape is of a living proxy.
    demo = [breakeven, "demo", "--for", f"{seconds + 12}s", "--headless", "--listen", f"127.0.0.1:{listen}", "--admin-listen", f"127.0.0.1:{admin}"]
    with process(demo, folder / "demo.log") as running, process(prometheus(folder / "prometheus", port, f"127.0.0.1:{admin}"), folder / "prometheus.log"):
        wait_until("the demo's admin side", lambda: fetch(f"http://127.0.0.1:{admin}/livez"))
        wait_until("Prometheus", lambda: fetch(f"http://127.0.0.1:{port}/-/ready"))
        start = time.time()
        while time.time() < start + seconds:
            if running.poll() is not None:
                raise RuntimeError(f"the demo ended with status {running.returncode}")
            time.sleep(0.5)
        metrics = folder / "metrics.txt"
        metrics.write_text(fetch(f"http://127.0.0.1:{admin}/metrics"), encoding="utf-8")
        lint = subprocess.run(["promtool", "check", "metrics"], stdin=metrics.open(), capture_output=True, text=True, check=False)
        print(f"promtool check metrics: {lint.stdout + lint.stderr or 'fine'}")
        here = pathlib.Path(__file__).parent
        found = subprocess.run([sys.executable, here / "dashcheck.py", "--prometheus", f"http://127.0.0.1:{port}", "--metrics", metrics, "--start", f"{start + 5}", "--end", f"{time.time()}",
                                "--step", "2", "--rate-interval", "10s"], cwd=ROOT, check=False)
        return int(bool(lint.returncode or found.returncode))


if __name__ == "__main__":
    sys.exit(main())
