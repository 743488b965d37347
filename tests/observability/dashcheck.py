#!/usr/bin/env python3
"""Runs every query of the dashboards and rules against a Prometheus that has scraped a real breakeven.

  dashcheck.py --prometheus URL --metrics FILE --start T --end T [--step S] [--rate-interval D]

Wrong are: a query that does not parse or match, a panel without a value, a legend with a label that its series
lack, a metric that is not exported, an exported family that is on no dashboard and in no rule, a rule that cannot
be evaluated, and bad form of a dashboard. A gauge that is absent in this run passes only if docs/metrics.md says that
it can be absent.
"""
import argparse
import pathlib
import re
import sys

from dashboards import Dashboard, Scope, form
from prometheus import Prometheus, QueryError, is_number

ROOT = pathlib.Path(__file__).resolve().parents[2]
METRIC = re.compile(r"(?<![\w:])(breakeven_\w+)(?![\w:])")
RECORDED = re.compile(r"(?<![\w:])(\w+:breakeven_\w+:\w+)")


def run(panel, prometheus, scope, step):
    """Fills `panel.series`; sentences about queries that fail and legends that lie."""
    for target in panel.queries():
        where = f"{panel.title} {target['refId']}"
        expr = scope.fill(target["expr"])
        try:
            if target.get("instant"):
                found = prometheus.instant(expr, scope.end)
            else:
                found = prometheus.range(expr, scope.start, scope.end, step)
        except QueryError as error:
            yield f"{where}: {error}"
            continue
        panel.series[target["refId"]] = found
        for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
            if any(label not in labels for labels, _ in found):
                yield f"{where}: the legend has {label}, which not every series has"


def has_values(panel):
    return any(is_number(value) for found in panel.series.values() for _, values in found for _, value in values)


def check_dashboard(dashboard, prometheus, arguments, uids):
    yield from form(dashboard, uids)
    scope = Scope(dashboard, prometheus, arguments.start, arguments.end, arguments.rate_interval)
    for name in scope.empty:
        yield f"variable {name} has no values"
    for note in dashboard.annotations:
        try:
            prometheus.instant(scope.fill(note["expr"]), scope.end)
        except QueryError as error:
            yield f"annotation {note['name']}: {error}"
    for panel in dashboard.panels:
        yield from run(panel, prometheus, scope, arguments.step)
        if not has_values(panel):
            yield f"{panel.title}: no value"


def check_rules(prometheus):
    rules = prometheus.rules()
    if not rules:
        yield "Prometheus has no rules"
    for rule in rules:
        if rule["health"] == "err":
            yield f"rule {rule['name']}: {rule['lastError']}"


def check_names(dashboards, rule_texts, metrics):
    """Names used and not exported or recorded; families exported and not used."""
    exported = set(re.findall(r"^# TYPE (\S+)", metrics, re.M))
    manual = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    can_be_absent = set(re.findall(r"^\| `(\w+)` \| gauge \|.*\babsent\b", manual, re.M))
    recorded = {name for text in rule_texts for name in re.findall(r"record: (\S+)", text)}
    texts = [(f"{board.uid}, {where}", text) for board in dashboards for where, text in board.expressions()]
    texts += [("the rules", text) for text in rule_texts]
    used = set()
    for where, text in texts:
        text = re.sub(r'"[^"]*"|\'[^\']*\'|docs/\S+|/d/\S+', "", text)
        for name in METRIC.findall(text):
            family = name if name in exported else re.sub(r"_(bucket|sum|count)$", "", name)
            used.add(family)
            if family not in exported | can_be_absent:
                yield f"{where}: {name} is not exported"
        for name in set(RECORDED.findall(text)) - recorded:
            yield f"{where}: {name} is not recorded by any rule"
    for family in sorted(exported - used):
        yield f"{family} is exported, but on no dashboard and in no rule"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prometheus", required=True)
    parser.add_argument("--metrics", required=True, type=pathlib.Path)
    parser.add_argument("--start", required=True, type=float)
    parser.add_argument("--end", required=True, type=float)
    parser.add_argument("--step", default=5, type=float)
    parser.add_argument("--rate-interval", default="15s")
    arguments = parser.parse_args()
    prometheus = Prometheus(arguments.prometheus)
    dashboards = [Dashboard(path) for path in sorted((ROOT / "grafana/dashboards").glob("*.json"))]
    rules = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "deploy/prometheus").glob("*.yml")) if path.name in ("alerts.yml", "recording.yml")]
    uids = {board.uid for board in dashboards}
    checks = [(board.uid, check_dashboard(board, prometheus, arguments, uids)) for board in dashboards]
    checks += [("rules", check_rules(prometheus)), ("names", check_names(dashboards, rules, arguments.metrics.read_text(encoding="utf-8")))]
    failed = 0
    for name, found in checks:
        sentences = list(found)
        failed += bool(sentences)
        print(f"{name}: {'fine' if not sentences else ''}", *(f"  {sentence}" for sentence in sentences), sep="\n" if sentences else "")
    print(f"{len(checks) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
