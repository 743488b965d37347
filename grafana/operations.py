"""Operations: rate, errors, duration and saturation of the proxy and its backends, and the health of the accounting."""
from panels import FILLED, JOB, KINDS, NOTHING, QUIET, RATE, STACKED, Dashboard, by_kind, happening, in_range, named, of_query, quantile, query, variable

BACKEND = f'{JOB},backend=~"$backend"'
FAILED = 'outcome=~"upstream_error|timeout"'
QUANTILES = (0.5, 0.95, 0.99)
UP = [("red", None), ("green", 1)]
TOKENS = {"input": "purple", "input_cached": "super-light-purple", "input_cache_write": "light-purple", "input_audio": "semi-dark-purple", "input_image": "dark-purple",
          "output": "orange", "output_reasoning": "super-light-orange", "output_audio": "semi-dark-orange", "output_image": "dark-orange"}


def dashboard():
    board = Dashboard("breakeven-ops", "breakeven / Operations", "Rate, errors, duration and saturation of the proxy and its backends, and the health of the accounting.", "now-3h",
                      [variable("backend", f"breakeven_spend_usd_total{{{JOB}}}", "Backend")], ["circuit", "flips", "reloads"])
    health(board)
    requests(board)
    latency(board)
    backends(board)
    accounting(board)
    process(board)
    return board


def health(board):
    total = f"sum(rate(breakeven_requests_total{{{BACKEND}}}{RATE}))"
    board.row("Health")
    board.stat("Instances up", "breakeven instances that Prometheus can scrape.", 'sum(up{job=~"$job",instance=~"$instance"})', "short", decimals=0, steps=UP)
    board.stat("Requests", "Finished requests per second.", total, "reqps", graph=True, decimals=2)
    board.stat("Errors", "Share of requests that failed upstream or timed out. The objective is below 0.5%.", f"sum(rate(breakeven_requests_total{{{BACKEND},{FAILED}}}{RATE})) / {total}", "percentunit", graph=True, decimals=2, steps=[("green", None), ("orange", 0.005), ("red", 0.02)])
    board.stat("First token, p95", "Nineteen in twenty streams show their first token sooner.", quantile(0.95, "breakeven_time_to_first_token_seconds", BACKEND), "s", graph=True, decimals=2, steps=[("green", None), ("orange", 1.5), ("red", 2.5)])
    board.stat("Overhead, p99", "Time that breakeven itself adds to a request.", quantile(0.99, "breakeven_proxy_overhead_seconds", JOB), "s", graph=True, decimals=2, steps=[("green", None), ("orange", 0.005), ("red", 0.01)])
    board.stat("Alerts firing", "Alerts of breakeven's rule files.", 'count(ALERTS{alertname=~"Breakeven.+",alertstate="firing"}) or vector(0)', "short", decimals=0, steps=[("green", None), ("red", 1)])


def requests(board):
    board.row("Requests")
    board.graph("Requests by backend", "Finished per second.", by_kind(f"sum by (backend) (rate(breakeven_requests_total{{{BACKEND},BACKENDS}}{RATE}))"), "reqps", decimals=2, low=0, custom=STACKED, overrides=KINDS)
    board.graph("Not successful, by outcome", "Finished per second, without the successful ones.", [query(f'sum by (outcome) (rate(breakeven_requests_total{{{BACKEND},outcome!="success"}}{RATE}))', "{{outcome}}")], "reqps", decimals=3, low=0, custom=STACKED | QUIET, overrides=[named("upstream_error", color="red"), named("timeout", color="orange"), named("client_error", color="yellow"), named("cancelled", color="text")])
    board.graph("Tokens by type", "Billable tokens per second; the types are disjoint.", happening(f"breakeven_tokens_total{{{BACKEND}}}", "type", "{{type}}"), "short", decimals=0, low=0, custom=FILLED, overrides=[NOTHING] + [named(kind, color=color) for kind, color in TOKENS.items()])
    board.graph("In flight", "Requests sent to a backend and not finished.", by_kind(f"sum by (backend) (breakeven_inflight_requests{{{BACKEND},BACKENDS}})"), "short", 12, decimals=0, low=0, overrides=KINDS)
    board.graph("Refused before any backend was tried", "Per second, by reason.", happening(f"breakeven_rejected_requests_total{{{JOB}}}", "reason", "{{reason}}"), "reqps", 12, decimals=3, low=0, custom=STACKED | QUIET, overrides=[NOTHING])


def latency(board):
    board.row("Latency")
    times = (("Request duration", "breakeven_request_duration_seconds", "From the request's arrival to the last byte of its answer."),
             ("Time to first token", "breakeven_time_to_first_token_seconds", "Streams only: from the request's arrival to the first token sent."),
             ("Time per output token", "breakeven_time_per_output_token_seconds", "Streams only: decode time per token after the first."))
    for title, metric, description in times:
        targets = [query(quantile(q, metric, f'{BACKEND},backend=~"${kind}"', "backend"), "{{backend}} p%d" % (q * 100)) for kind in ("api", "own") for q in (0.5, 0.95)]
        colors = [of_query(ref, shades="blue" if ref < "C" else "green", fill=0) for ref in "ABCD"] + [of_query(ref, dashed=1) for ref in "BD"]
        board.graph(title, description + " Half and nineteen in twenty are faster.", targets, "s", decimals=3 if "token" in title else 2, low=0, overrides=colors)
    board.add("heatmap", "Time to first token, distribution", "How streams spread over the buckets.", [query(f"sum by (le) (increase(breakeven_time_to_first_token_seconds_bucket{{{BACKEND}}}{RATE}))", "{{le}}") | {"format": "heatmap"}], "s", 12, 8)
    board.graph("Time added by breakeven", "From the request's arrival to the last byte, without the time spent waiting for a backend.", [query(quantile(q, "breakeven_proxy_overhead_seconds", JOB), f"p{q * 100:.0f}") for q in QUANTILES], "s", 12, decimals=2, low=0, overrides=[of_query("A", color="super-light-purple"), of_query("B", color="purple"), of_query("C", color="orange", fill=0)])


def backends(board):
    board.row("Backends")
    is_off = f'min by (backend) (breakeven_backend_up{{{BACKEND}}}) == 0 and on (backend) label_replace(max by (pool) (breakeven_pool_wanted_replicas{{{JOB}}}) == 0, "backend", "$1", "pool", "(.*)")'
    health = [query(f"min by (backend) (breakeven_backend_up{{{BACKEND}}}) unless on (backend) ({is_off})", "{{backend}}", instant=True), query(f"({is_off}) + 2", "{{backend}}", instant=True)]
    texts = {"0": {"text": "down", "color": "red", "index": 0}, "1": {"text": "up", "color": "green", "index": 1}, "2": {"text": "off", "color": "text", "index": 2}}
    board.stat("Backends up", "Whether the last health probe succeeded; a backend that is not probed is up. Off: no replica is wanted.", health, "none", 6, 8, mappings=[{"type": "value", "options": texts}], options={"textMode": "value_and_name"})
    states = {"0": {"text": "closed", "color": "green", "index": 0}, "1": {"text": "half open", "color": "orange", "index": 1}, "2": {"text": "open", "color": "red", "index": 2}}
    circuit = f'max by (backend) (2 * breakeven_circuit_state{{{BACKEND},state="open"}} + on (job, instance, backend) breakeven_circuit_state{{{BACKEND},state="half_open"}})'
    board.add("state-timeline", "Circuit", "Open: the backend gets no requests. Half open: it gets one on trial.", [query(circuit, "{{backend}}")], "none", 9, 8, mappings=[{"type": "value", "options": states}], custom={"fillOpacity": 80, "lineWidth": 0})
    board.graph("Attempts by result", "Attempts that did not succeed, per second.", happening(f'breakeven_upstream_attempts_total{{{BACKEND},result!="ok"}}', "backend, result", "{{backend}} {{result}}"), "reqps", 9, decimals=3, low=0, custom=QUIET, overrides=[NOTHING])
    board.graph("Retries", "Attempts at the same backend again, per second. A retry can be billed twice.", happening(f"breakeven_retries_total{{{BACKEND}}}", "backend, reason", "{{backend}} {{reason}}"), "reqps", 12, decimals=3, low=0, custom=QUIET, overrides=[NOTHING])
    board.graph("Moved to another backend", "Requests per second that another backend served after a failure.", happening(f"breakeven_fallbacks_total{{{JOB}}}", "from, to, reason", "{{from}} to {{to}} {{reason}}"), "reqps", 12, decimals=3, low=0, custom=QUIET, overrides=[NOTHING])


def accounting(board):
    board.row("Accounting")
    board.graph("Ledger lag", "Time since the last row became durable, while rows are waiting.", [query(f"(time() - max by (instance) (breakeven_ledger_commit_timestamp_seconds{{{JOB}}})) * on (instance) (max by (instance) (breakeven_ledger_pending_records{{{JOB}}}) > bool 0)", "{{instance}}")], "s", decimals=1, low=0, steps=[("transparent", None), ("red", 60)], custom={"thresholdsStyle": {"mode": "line"}})
    board.graph("Ledger rows", "Durable and dropped rows per second, and rows that are not yet durable.", [query(f"sum by (result) (rate(breakeven_ledger_records_total{{{JOB}}}{RATE}))", "{{result}}"), query(f"sum(breakeven_ledger_pending_records{{{JOB}}})", "pending")], "short", decimals=1, low=0, overrides=[named("committed", color="green"), named("dropped", color="red"), named("pending", color="orange")])
    waiting = f"max by (instance) (breakeven_ledger_unshipped_records{{{JOB}}})"
    board.graph("Rows not in Postgres", "Rows that wait in the proxies' own ledgers. Without `ledger.postgres` there are none.", [query(waiting, "{{instance}}")], "short", 8, decimals=0, low=0, custom={"axisSoftMax": 10})
    board.graph("Copied to Postgres", "Rows per second, and failures to reach or write it.", [query(f"sum(rate(breakeven_ledger_shipped_records_total{{{JOB}}}{RATE}))", "rows"), query(f"sum(rate(breakeven_ledger_ship_failures_total{{{JOB}}}{RATE}))", "failures")], "short", 8, decimals=1, low=0, overrides=[named("rows", color="green"), named("failures", color="red")])
    age = f"time() - max by (instance) (breakeven_ledger_ship_timestamp_seconds{{{JOB}}}) and on (instance) {waiting} > 0"
    board.graph("Age of the copy in Postgres", "Time since Postgres last took what there was, while rows wait; no line while rows wait that it never took.", [query(f"{age} or {waiting} == 0", "{{instance}}")], "s", 8, decimals=0, low=0, custom={"axisSoftMax": 10})
    counts = [f'sum by (model) (rate(breakeven_token_counts_compared_total{{{JOB},source="{source}"}}[1h]))' for source in ("own", "upstream")]
    board.graph("Own token count against the upstream's", "The bias of the count that routing uses before the upstream reports. Zero is right.", [query(f"{counts[0]} / ({counts[1]} > 0) - 1", "{{model}}")], "percentunit", decimals=2, custom={"axisSoftMin": -0.01, "axisSoftMax": 0.01})
    board.graph("Error of single token counts, p95", "The difference to the upstream's count, as a share of it.", [query(quantile(0.95, "breakeven_token_estimate_error_ratio", JOB, "model").replace(RATE, "[1h]"), "{{model}}")], "percentunit", 12, decimals=2, low=0)
    board.graph("Where token counts come from", "Requests per second.", happening(f"breakeven_token_counts_total{{{JOB}}}", "source", "{{source}}", nothing="no requests"), "reqps", 12, decimals=2, low=0, custom=FILLED, overrides=[named("upstream_usage", color="purple"), named("own_tokenizer", color="yellow"), named("estimate", color="orange"), named("none", color="red"), named("no requests", color="text")])


def process(board):
    yes = [{"type": "value", "options": {"0": {"text": "reload refused", "index": 0}, "1": {"text": "in force", "index": 1}}}]
    board.row("Process")
    board.stat("Version", "Running builds.", [query(f"count by (version, revision) (breakeven_build_info{{{JOB}}})", "{{version}} ({{revision}})", instant=True)], "short", options={"textMode": "name"})
    board.stat("Configuration", "Whether the last reload of every instance succeeded.", f"min(breakeven_config_reload_success{{{JOB}}})", "none", steps=UP, mappings=yes)
    board.stat("Configuration read", "Time since the oldest of the configurations in force was read.", f"time() - min(breakeven_config_reload_timestamp_seconds{{{JOB}}})", "dtdurations", decimals=0)
    board.stat("Panics", "Caught in the selected range; each failed one request or background task.", in_range(f"breakeven_panics_total{{{JOB}}}"), "short", decimals=0, steps=[("green", None), ("red", 0.5)])
    board.stat("Folded into other", "Label values in the selected range that are not configured or had no room.", in_range(f"breakeven_label_overflow_total{{{JOB}}}"), "short", decimals=0, steps=[("green", None), ("orange", 0.5)])
    board.stat("Scrape", "Time that the slowest of the last scrapes took to render.", f"max(breakeven_metrics_render_seconds{{{JOB}}})", "s", decimals=1)
    heard = [{"type": "value", "options": {"0": {"text": "known", "index": 0}, "1": {"text": "unknown", "index": 1}}}]
    board.stat("Volume over all proxies", "Unknown: a proxy that shares its volume has not heard from the others, and decides on its own.", f"max(breakeven_shared_volume_stale{{{JOB}}})", "none", 4, 6, steps=[("green", None), ("red", 1)], mappings=heard)
    board.graph("Proxies", "How many share volume and budgets, and who of them plans.", [query(f"max(breakeven_shared_proxies{{{JOB}}})", "proxies"), query(f"max by (instance) (breakeven_planner_lease_held{{{JOB}}})", "{{instance}} plans")], "short", 20, 6, decimals=0, low=0, overrides=[of_query("B", color="text", fill=0)])
