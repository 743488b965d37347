#!/usr/bin/env python3
"""Writes grafana/dashboards/*.json; with --check, only says whether they are what it would write."""
import sys

import cost
import operations
import routing


def main(arguments):
    stale = []
    for made in (cost.dashboard(), routing.dashboard(), operations.dashboard()):
        path = made.path()
        if "--check" not in arguments:
            path.write_text(made.text(), encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != made.text():
            stale.append(path.name)
    if stale:
        print(f"not what grafana/generate.py writes: {', '.join(stale)}", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
