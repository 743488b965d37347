"""Building blocks of the dashboards: Grafana's classic JSON model, one call a panel.

Conventions: API backends are blue, self-hosted ones green, what did not happen is dashed, idle rent is red; what
belongs to no backend is a shade of purple, unless its name says good or bad.
A query that is about API backends selects them with `$api`, one about self-hosted backends with `$own`; both
are hidden variables, so no backend's name is ever written into a dashboard.
"""
import json
import pathlib

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
JOB = 'job=~"$job",instance=~"$instance"'
RATE = "[$__rate_interval]"
RANGE = "[$__range]"
API, OWN, EVEN, IDLE, NEUTRAL = "blue", "green", "orange", "red", "purple"
# Rows of the grid that a graph needs to have room for a table below it.
TABLE_FROM_HEIGHT = 10


def query(expr, legend="", instant=False, table=False):
    target = {"expr": " ".join(expr.split()), "legendFormat": legend or "__auto", "datasource": SOURCE, "editorMode": "code"}
    target |= {"instant": True, "range": False} if instant or table else {"instant": False, "range": True}
    return target | ({"format": "table"} if table else {})


def per_hour(selector, by=""):
    return f"sum{f' by ({by})' if by else ''} (rate({selector}{RATE})) * 3600"


def in_range(selector, by=""):
    return f"sum{f' by ({by})' if by else ''} (increase({selector}{RANGE}))"


def quantile(q, metric, selector, by=""):
    return f"histogram_quantile({q}, sum by ({by + ', ' if by else ''}le) (rate({metric}_bucket{{{selector}}}{RATE})))"


def happening(selector, by, legend, factor=1, nothing="none"):
    """Rates of what happens: a line for each kind that does, and one at zero when none does."""
    times = "" if factor == 1 else f" * {factor}"
    return [query(f"sum by ({by}) (rate({selector}{RATE})){times} > 0", legend), query(f"sum(rate({selector}{RATE})) == 0", nothing)]


# What an override can set, by a short name.
PROPERTIES = {
    "color": lambda v: ("color", {"mode": "fixed", "fixedColor": v}),
    "shades": lambda v: ("color", {"mode": "shades", "fixedColor": v}),
    "dashed": lambda v: ("custom.lineStyle", {"fill": "dash", "dash": [8, 8]}),
    "fill": lambda v: ("custom.fillOpacity", v),
    "width": lambda v: ("custom.lineWidth", v),
    "below": lambda v: ("custom.fillBelowTo", v),
    "unstacked": lambda v: ("custom.stacking", {"mode": "none", "group": "B"}),
    "unit": lambda v: ("unit", v),
    "decimals": lambda v: ("decimals", v),
    "title": lambda v: ("displayName", v),
    "hidden": lambda v: ("custom.hideFrom", {"legend": True, "tooltip": True, "viz": False}),
}


def override(matcher, options, settings):
    pairs = [PROPERTIES[name](value) for name, value in settings.items()]
    return {"matcher": {"id": matcher, "options": options}, "properties": [{"id": i, "value": v} for i, v in pairs]}


def named(name, **settings):
    return override("byName", name, settings)


def of_query(ref, **settings):
    return override("byFrameRefID", ref, settings)


def by_kind(expression, legend="{{backend}}"):
    """An expression with its `BACKENDS` replaced: by the API backends in query A, by the self-hosted ones in B."""
    return [query(expression.replace("BACKENDS", f'backend=~"${kind}"'), legend) for kind in ("api", "own")]


KINDS = [of_query("A", shades=API), of_query("B", shades=OWN)]
STACKED = {"stacking": {"mode": "normal", "group": "A"}, "fillOpacity": 35, "lineWidth": 1}
# Stacked kinds of which some do not happen: without lines, which would run along the top of the others.
FILLED = STACKED | {"lineWidth": 0, "fillOpacity": 60}
SINGLE = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}}
STEPPED = {"lineInterpolation": "stepAfter"}
LOGARITHMIC = {"scaleDistribution": {"type": "log", "log": 10}, "fillOpacity": 0}
# The axis of what is mostly zero, and its line while it is.
QUIET = {"axisSoftMax": 0.1}
NOTHING = named("none", color="text", fill=0)

OPTIONS = {
    "stat": SINGLE | {"colorMode": "value", "graphMode": "area", "justifyMode": "auto", "textMode": "auto", "wideLayout": True},
    "gauge": SINGLE | {"showThresholdLabels": False, "showThresholdMarkers": True},
    "bargauge": SINGLE | {"displayMode": "gradient", "orientation": "horizontal", "showUnfilled": True, "valueMode": "color", "text": {"titleSize": 14, "valueSize": 20}},
    "table": {"showHeader": True, "cellHeight": "sm", "footer": {"show": False, "reducer": ["sum"], "fields": ""}},
    "state-timeline": {"mergeValues": True, "showValue": "auto", "rowHeight": 0.85, "tooltip": {"mode": "single"},
                       "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True}},
    "heatmap": {"calculate": False, "color": {"scheme": "Oranges", "mode": "scheme", "steps": 64}, "cellGap": 1},
}


def timeseries_options(width, height):
    roomy = width >= 12 and height >= TABLE_FROM_HEIGHT
    legend = {"displayMode": "table" if roomy else "list", "placement": "bottom", "showLegend": True, "calcs": ["lastNotNull", "mean", "max"] if roomy else []}
    return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}


def variable(name, metric, label=None, of=None, hidden=False):
    """A variable with the values that the label `of` has in a metric; `All` of a hidden one is their list."""
    text = f"label_values({metric}, {of or name})"
    made = {"name": name, "label": label or name, "type": "query", "datasource": SOURCE, "query": {"query": text, "refId": "v"}, "definition": text, "refresh": 2, "sort": 1,
            "multi": True, "includeAll": True, "hide": 2 if hidden else 0, "current": {"selected": True, "text": ["All"], "value": ["$__all"]}}
    return made if hidden else made | {"allValue": ".+"}


def annotation(name, expr, color, title, text, enabled=True):
    return {"name": name, "datasource": SOURCE, "enable": enabled, "expr": expr, "iconColor": color, "titleFormat": title, "textFormat": text, "step": "60s"}


ANNOTATIONS = {
    "flips": annotation("Preference", f"changes(breakeven_route_preferred{{{JOB}}}[1m]) > 0 and breakeven_route_preferred{{{JOB}}} == 1", "purple", "Preference changed", "{{pool}} now prefers {{backend}}"),
    "pins": annotation("Pins", f"changes(breakeven_route_pinned{{{JOB}}}[1m]) > 0", "yellow", "Pinned or unpinned", "{{pool}}", False),
    "circuit": annotation("Circuit", f'increase(breakeven_circuit_transitions_total{{{JOB},to="open"}}[1m]) > 0', "red", "Circuit opened", "{{backend}}"),
    "prices": annotation("Prices", f"changes(breakeven_token_price_usd_per_million_tokens{{{JOB}}}[5m]) > 0", "orange", "Price changed", "{{backend}} {{model}} {{type}}"),
    "reloads": annotation("Reloads", f"changes(breakeven_config_reload_timestamp_seconds{{{JOB}}}[1m]) > 0", "blue", "Configuration reloaded", "{{instance}}", False),
}


class Dashboard:
    """Collects panels left to right, top to bottom, on Grafana's grid of 24 columns."""

    def __init__(self, uid, title, description, span, variables, annotations):
        self.x = self.y = self.height = self.last_id = 0
        self.panels = self.into = []
        everywhere = [
            {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "current": {}, "hide": 0},
            variable("job", "breakeven_build_info", "Job"),
            variable("instance", 'breakeven_build_info{job=~"$job"}', "Instance"),
            variable("api", f'breakeven_spend_usd_total{{{JOB},kind="tokens"}}', of="backend", hidden=True),
            variable("own", f"breakeven_capacity_price_usd_per_hour{{{JOB}}}", of="pool", hidden=True),
        ]
        built_in = {"builtIn": 1, "datasource": {"type": "grafana", "uid": "-- Grafana --"}, "enable": True, "hide": True, "iconColor": "rgba(0, 211, 255, 1)", "name": "Annotations & Alerts", "type": "dashboard"}
        link = {"title": "breakeven", "type": "dashboards", "tags": ["breakeven"], "asDropdown": False, "includeVars": True, "keepTime": True, "targetBlank": False, "icon": "external link"}
        self.raw = {"uid": uid, "title": title, "description": description, "tags": ["breakeven"], "schemaVersion": 39, "version": 1, "editable": False, "graphTooltip": 1, "timezone": "browser",
                    "time": {"from": span, "to": "now"}, "refresh": "1m", "links": [link], "templating": {"list": everywhere + variables},
                    "annotations": {"list": [built_in] + [ANNOTATIONS[name] for name in annotations]}, "panels": self.panels}

    def row(self, title, collapsed=False):
        """A heading. The panels of a collapsed row are in the row, and not loaded until somebody opens it."""
        self.y += self.height
        self.x = self.height = 0
        made = {"id": self.next_id(), "type": "row", "title": title, "collapsed": collapsed, "gridPos": {"h": 1, "w": 24, "x": 0, "y": self.y}, "panels": []}
        self.panels.append(made)
        self.into = made["panels"] if collapsed else self.panels
        self.y += 1

    def next_id(self):
        self.last_id += 1
        return self.last_id

    def add(self, kind, title, description, queries, unit, width, height, *, decimals=None, steps=None, overrides=(), custom=None, options=None, mappings=None, low=None, high=None, transformations=None, empty=None, repeat=None):
        if self.x + width > 24:
            self.y += self.height
            self.x = self.height = 0
        self.height = max(self.height, height)
        for index, target in enumerate(queries):
            target["refId"] = chr(ord("A") + index)
        coloured = kind in ("stat", "gauge", "bargauge", "table")
        steps = steps or [("text" if kind in ("stat", "table") else "green", None)]
        defaults = {"unit": unit, "color": {"mode": "thresholds"} if coloured else {"mode": "shades", "fixedColor": NEUTRAL}, "mappings": mappings or [], "custom": custom or {},
                    "thresholds": {"mode": "absolute", "steps": [{"color": color, "value": value} for color, value in steps]}}
        if kind == "timeseries":
            defaults["custom"] = {"lineWidth": 2, "fillOpacity": 8, "showPoints": "never", "spanNulls": 180000, "axisBorderShow": False} | (custom or {})
        defaults |= {key: value for key, value in (("decimals", decimals), ("min", low), ("max", high), ("noValue", empty)) if value is not None}
        basis = timeseries_options(width, height) if kind == "timeseries" else OPTIONS[kind]
        panel = {"id": self.next_id(), "type": kind, "title": title, "description": description, "datasource": SOURCE, "gridPos": {"h": height, "w": width, "x": self.x, "y": self.y},
                 "targets": queries, "fieldConfig": {"defaults": defaults, "overrides": list(overrides)}, "options": basis | (options or {})}
        panel |= {"transformations": transformations} if transformations else {}
        panel |= {"repeat": repeat, "repeatDirection": "v"} if repeat else {}
        self.into.append(panel)
        self.x += width

    def stat(self, title, description, queries, unit, width=4, height=4, graph=False, **rest):
        queries = [query(queries, instant=not graph)] if isinstance(queries, str) else queries
        options = {"graphMode": "area" if graph else "none"} | rest.pop("options", {})
        self.add("stat", title, description, queries, unit, width, height, options=options, **rest)

    def graph(self, title, description, queries, unit, width=8, height=8, **rest):
        self.add("timeseries", title, description, queries, unit, width, height, **rest)

    def text(self):
        return json.dumps(self.raw, indent=1, ensure_ascii=False) + "\n"

    def path(self):
        return pathlib.Path(__file__).parent / "dashboards" / f"{self.raw['uid']}.json"
