"""Grafana dashboards (classic JSON): reading them, filling in their variables, and rules of good form."""
import json
import pathlib
import re
from dataclasses import dataclass, field

VARIABLE = re.compile(r"\$\{(\w+)(?::\w+)?\}|\$([A-Za-z_]\w*)")
BUILT_IN = {"__rate_interval", "__interval", "__range", "datasource"}
NEEDS_UNIT = {"stat", "gauge", "bargauge", "timeseries", "table", "heatmap"}
GRID_COLUMNS = 24


@dataclass
class Panel:
    raw: dict
    title: str = ""
    series: dict = field(default_factory=dict)  # refId -> [(labels, [(time, value)])]

    def queries(self):
        return self.raw.get("targets", [])


class Dashboard:
    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.raw = json.loads(self.path.read_text(encoding="utf-8"))
        self.uid, self.title = self.raw["uid"], self.raw["title"]
        self.shown = [Panel(raw, raw["title"]) for raw in self.raw["panels"] if raw["type"] != "row"]
        self.folded = [Panel(raw, raw["title"]) for row in self.raw["panels"] if row["type"] == "row" for raw in row["panels"]]
        self.panels = self.shown + self.folded
        self.rows = [raw for raw in self.raw["panels"] if raw["type"] == "row"]
        self.variables = {v["name"]: v for v in self.raw["templating"]["list"]}
        self.annotations = [a for a in self.raw["annotations"]["list"] if a.get("expr")]

    def expressions(self):
        """(where, expression) of everything that is sent to Prometheus, variables unfilled."""
        for panel in self.panels:
            for target in panel.queries():
                yield f"{panel.title} {target['refId']}", target["expr"]
        for note in self.annotations:
            yield f"annotation {note['name']}", note["expr"]
        for name, variable in self.variables.items():
            if variable["type"] == "query":
                yield f"variable {name}", variable["query"]["query"]


def escaped(value):
    """A label value inside a PromQL regular expression in quotes."""
    return re.escape(value).replace("\\-", "-").replace("\\", "\\\\")


def names_in(text):
    return {a or b for a, b in VARIABLE.findall(text)}


class Scope:
    """The values of a dashboard's variables, all of each, over a range of time."""

    def __init__(self, dashboard, prometheus, start, end, rate_interval):
        self.start, self.end = start, end
        self.values = {"__rate_interval": rate_interval, "__interval": rate_interval, "__range": f"{int(end - start)}s"}
        self.empty = []
        for name, variable in dashboard.variables.items():
            if variable["type"] != "query":
                continue
            metric, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"]).groups()
            found = prometheus.label_values(label, self.fill(metric), start, end)
            if not found:
                self.empty.append(name)
            self.values[name] = variable.get("allValue") or "|".join(escaped(value) for value in found)

    def fill(self, text):
        return VARIABLE.sub(lambda m: self.values.get(m[1] or m[2], m[0]), text)


def form(dashboard, uids):
    """Sentences about what is wrong with a dashboard's form."""
    raw, used = dashboard.raw, set()
    for key, want in (("editable", False), ("id", None)):
        if raw.get(key) != want:
            yield f"`{key}` is {raw.get(key)!r}, not {want!r}"
    if not raw.get("tags"):
        yield "no tags: the links between dashboards find none"
    everything = json.dumps([raw["panels"], raw["annotations"], [[v.get("query"), v.get("datasource")] for v in dashboard.variables.values()]])
    used = names_in(everything)
    for name in set(dashboard.variables) - used:
        yield f"variable {name} is not used"
    for name in used - set(dashboard.variables) - BUILT_IN:
        yield f"variable ${name} is not defined"
    ids, places = {}, {}
    for panel in dashboard.panels + [Panel(row, row["title"]) for row in dashboard.rows]:
        if panel.raw["id"] in ids:
            yield f"{panel.title}: id {panel.raw['id']} is also that of {ids[panel.raw['id']]}"
        ids[panel.raw["id"]] = panel.title
        grid = panel.raw["gridPos"]
        if grid["x"] + grid["w"] > GRID_COLUMNS:
            yield f"{panel.title}: wider than the grid"
        for spot in ((x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])):
            if places.setdefault(spot, panel.title) != panel.title:
                yield f"{panel.title}: overlaps {places[spot]}"
                break
    for panel in dashboard.panels:
        yield from panel_form(panel)
    for uid in re.findall(r"/d/([\w-]+)", json.dumps(raw)):
        if uid not in uids:
            yield f"link to the unknown dashboard {uid}"


def panel_form(panel):
    defaults = panel.raw["fieldConfig"]["defaults"]
    if not panel.raw.get("description"):
        yield f"{panel.title}: no description"
    if panel.raw["type"] in NEEDS_UNIT and not defaults.get("unit"):
        yield f"{panel.title}: no unit"
    refs = [target["refId"] for target in panel.queries()]
    if not refs or len(set(refs)) < len(refs):
        yield f"{panel.title}: no queries, or two of one name"
    for target in panel.queries():
        expr = target["expr"]
        if target["datasource"]["uid"] != "${datasource}":
            yield f"{panel.title} {target['refId']}: does not use the data source variable"
        for counter in re.findall(r"\b(breakeven_\w+_(?:total|bucket))\b", expr):
            if not re.search(rf"(rate|increase)\({counter}", expr):
                yield f"{panel.title} {target['refId']}: {counter} without rate or increase"
        if "histogram_quantile" in expr and not re.search(r"by \([^)]*\ble\)", expr):
            yield f"{panel.title} {target['refId']}: a quantile without `le`"
        if re.search(r'=\s*"\$\{?\w', expr.replace("=~", "~")) and not re.search(r'[=!]~"\$', expr):
            yield f"{panel.title} {target['refId']}: a variable of many values is matched with ="
