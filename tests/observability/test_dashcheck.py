"""The check itself: it must find what is wrong, or a clean run means nothing."""
import argparse
import copy
import json
import pathlib
import tempfile
import unittest

import dashcheck
from dashboards import Dashboard, form
from prometheus import QueryError

COST = json.loads((dashcheck.ROOT / "grafana/dashboards/breakeven-cost.json").read_text(encoding="utf-8"))
ARGUMENTS = argparse.Namespace(start=0, end=60, step=5, rate_interval="15s")


class Fake:
    """A Prometheus that answers every query with the same series."""

    def __init__(self, series, error=None):
        self.series, self.error = series, error

    def instant(self, expr, at):
        if self.error:
            raise QueryError(self.error)
        return self.series

    def range(self, expr, start, end, step):
        return self.instant(expr, end)

    def label_values(self, label, selector, start, end):
        return ["gpu-1.5"]


def board(change=lambda raw: None):
    raw = copy.deepcopy(COST)
    change(raw)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "board.json"
        path.write_text(json.dumps(raw), encoding="utf-8")
        return Dashboard(path)


def panel(raw):
    return next(panel for panel in raw["panels"] if panel["type"] == "timeseries")


def wrong_form(change):
    return list(form(board(change), {"breakeven-cost"}))


class Form(unittest.TestCase):
    def test_the_dashboard_as_it_is_has_good_form(self):
        self.assertEqual(wrong_form(lambda raw: None), [])

    def test_each_fault_of_form_is_found(self):
        def expr(text):
            return lambda raw: panel(raw)["targets"][0].update(expr=text)
        for change, says in (
            (lambda raw: panel(raw).update(description=""), "no description"),
            (lambda raw: panel(raw)["gridPos"].update(x=0, y=0), "overlaps"),
            (lambda raw: panel(raw)["gridPos"].update(x=20), "wider than the grid"),
            (lambda raw: panel(raw)["targets"][1].update(refId="A"), "two of one name"),
            (lambda raw: panel(raw).update(id=1), "is also that of"),
            (lambda raw: panel(raw)["fieldConfig"]["defaults"].update(unit=""), "no unit"),
            (expr("breakeven_spend_usd_total"), "without rate or increase"),
            (expr("histogram_quantile(0.9, sum(rate(breakeven_proxy_overhead_seconds_bucket[1m])))"), "without `le`"),
            (expr("up{job=~\"$nobody\"}"), "$nobody is not defined"),
            (lambda raw: raw.update(editable=True), "editable"),
        ):
            with self.subTest(says):
                self.assertTrue(any(says in sentence for sentence in wrong_form(change)), says)


class Queries(unittest.TestCase):
    def found(self, prometheus, change=lambda raw: None):
        return list(dashcheck.check_dashboard(board(change), prometheus, ARGUMENTS, {"breakeven-cost"}))

    def labelled(self, value):
        labels = {label: "x" for label in ("backend", "pool", "team", "model", "kind", "budget", "type")}
        return Fake([(labels, [(60.0, value)])])

    def test_values_everywhere_are_fine(self):
        self.assertEqual(self.found(self.labelled(1.0)), [])

    def test_a_panel_without_a_series_or_with_nothing_but_nan_is_found(self):
        for prometheus in (Fake([]), self.labelled(float("nan"))):
            self.assertIn("Spend now: no value", self.found(prometheus))

    def test_a_query_that_prometheus_refuses_is_found(self):
        self.assertTrue(any("parse error" in sentence for sentence in self.found(Fake([], "parse error"))))

    def test_a_legend_with_a_label_that_is_not_there_is_found(self):
        self.assertTrue(any("the legend has backend" in sentence for sentence in self.found(Fake([({}, [(60.0, 1.0)])]))))

    def test_a_value_of_a_variable_is_escaped(self):
        scope = dashcheck.Scope(board(), Fake([]), 0, 60, "15s")
        self.assertEqual(scope.fill('{backend=~"$own"}'), r'{backend=~"gpu-1\\.5"}')


class Names(unittest.TestCase):
    def found(self, metrics, rules=""):
        return list(dashcheck.check_names([board()], [rules], metrics))

    def test_a_metric_that_is_not_exported_is_found_and_so_is_one_that_nobody_uses(self):
        found = self.found("# TYPE breakeven_nobody_asks gauge\n", "expr: job:breakeven_nothing:rate1h > 0")
        self.assertTrue(any("breakeven_spend_usd_total is not exported" in sentence for sentence in found))
        self.assertTrue(any("breakeven_nobody_asks is exported, but" in sentence for sentence in found))
        self.assertTrue(any("job:breakeven_nothing:rate1h is not recorded" in sentence for sentence in found))

    def test_a_gauge_is_missed_unless_the_manual_says_that_it_can_be_absent(self):
        names = ("breakeven_ledger_ship_timestamp_seconds", "breakeven_ledger_unshipped_records")
        found = self.found("", "".join(f"expr: {name} > 0\n" for name in names))
        self.assertEqual([name for name in names if f"the rules: {name} is not exported" in found], [names[1]])


if __name__ == "__main__":
    unittest.main()
