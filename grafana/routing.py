"""Routing and break-even: where the break-even volume is, how far the traffic is from it, what the router did."""
from panels import API, EVEN, FILLED, JOB, KINDS, LOGARITHMIC, NOTHING, OWN, QUIET, RATE, STACKED, STEPPED, Dashboard, by_kind, happening, in_range, named, of_query, quantile, query, variable

POOL = f'{JOB},pool=~"$pool"'
REASONS = {"cheapest": "purple", "hysteresis": "super-light-purple", "threshold": "dark-purple", "pinned": "yellow", "only_offer": "text", "overflow": "orange", "unhealthy": "red", "failover": "dark-red", "not_eligible": "semi-dark-yellow"}


def gauge(name, by="pool", more=""):
    return f"max by ({by}) (breakeven_{name}{{{POOL}{more}}})"


VOLUME, EVEN_VOLUME = gauge("volume_requests_per_hour"), gauge("threshold_requests_per_hour")


def dashboard():
    board = Dashboard("breakeven-routing", "breakeven / Routing & break-even", "Where the break-even volume is, how far the traffic is from it, and what the router did about it.", "now-24h",
                      [variable("pool", f"breakeven_volume_requests_per_hour{{{JOB}}}", "Pool")], ["flips", "pins", "circuit", "prices"])
    now(board)
    break_even(board)
    decisions(board)
    capacity(board)
    return board


def now(board):
    board.row("Now")
    board.stat("Preferred backend", "The backend that each pool's traffic prefers.", [query(f'max by (pool, backend) (breakeven_route_preferred{{{POOL},backend=~"${kind}"}}) == 1', "{{backend}}", instant=True) for kind in ("api", "own")], "none", options={"textMode": "name"}, overrides=KINDS)
    board.add("gauge", "Volume of break-even", "Below 100% the API is cheaper, above it self-hosting is.", [query(f"{VOLUME} / {EVEN_VOLUME}", "{{pool}}", instant=True)], "percentunit", 4, 4, decimals=0, steps=[(API, None), (EVEN, 0.9), (OWN, 1.1)], low=0, high=2, empty="no break-even")
    board.stat("Distance to break-even", "Requests per hour above (+) or below (-) the break-even volume.", [query(f"{VOLUME} - {EVEN_VOLUME}", "{{pool}}")], "locale", graph=True, decimals=0, steps=[(API, None), (OWN, 0)], empty="no break-even")
    average = [f"max by (pool) (breakeven_average_cost_usd_per_request{{{POOL},backend=~\"${kind}\"}})" for kind in ("api", "own")]
    board.stat("At stake per hour", "What the dearer backend would cost more than the cheaper one at the present volume: the price of a wrong route.", [query(f"abs({average[0]} - {average[1]}) * {VOLUME}", "{{pool}}")], "currencyUSD", graph=True, decimals=2, empty="0")
    every, served = (f"breakeven_route_decisions_total{{{POOL}{backend}}}" for backend in ("", ',backend=~"$own"'))
    board.stat("Self-hosted share", "Share of the pool's requests in the selected range that a self-hosted backend got.", f"{in_range(served)} / {in_range(every)}", "percentunit", decimals=1)
    board.stat("Changes of preference", "In the selected range. Many of them mean a hysteresis band that is too narrow.", in_range(f"breakeven_route_flips_total{{{POOL}}}"), "short", decimals=0, steps=[("green", None), ("orange", 12), ("red", 48)])


def break_even(board):
    board.row("Break-even")
    edges = {edge: gauge("threshold_band_requests_per_hour", more=f',edge="{edge}"') for edge in ("upper", "lower")}
    board.graph("Volume against break-even: $pool", "Requests per hour. Inside the band the router stays where it is. The break-even volume moves with prices, with the mix of tokens, and with the number of replicas needed.",
                [query(VOLUME, "volume"), query(EVEN_VOLUME, "break-even"), query(edges["upper"], "band, upper edge"), query(edges["lower"], "band, lower edge")], "locale", 24, 11, decimals=0, low=0, repeat="pool",
                overrides=[named("volume", color="purple", width=3, fill=0), named("break-even", color=EVEN, dashed=1, fill=0), named("band, upper edge", color=EVEN, width=0, fill=14, below="band, lower edge"), named("band, lower edge", color=EVEN, width=0, fill=0)])
    board.graph("Volume and capacity", "Requests per hour that the pool can serve at full size with the present mix of tokens. Beyond it calls overflow to the API.",
                [query(VOLUME, "{{pool}} volume"), query(gauge("pool_capacity_requests_per_hour"), "{{pool}} capacity")], "locale", 6, 8, decimals=0, low=0, overrides=[of_query("A", shades="purple", width=3, fill=0), of_query("B", shades="red", dashed=1, fill=0)])
    board.graph("Average cost of 1,000 requests", "At the present volume, rent included in full. Where the lines cross is break-even.", by_kind(f"max by (backend) (breakeven_average_cost_usd_per_request{{{POOL},BACKENDS}}) * 1000"), "currencyUSD", decimals=3, width=6, custom=LOGARITHMIC, overrides=KINDS)
    board.graph("Cost of 1,000 more requests", "As the router sees it: nothing on a replica that is paid and has room, the next replica's rent on one that is full.", by_kind(f"max by (backend) (breakeven_marginal_cost_usd_per_request{{{POOL},BACKENDS}}) * 1000"), "currencyUSD", decimals=3, low=0, width=6, overrides=KINDS)
    board.graph("What a full replica is worth", "API dollars that a fully used replica replaces, per dollar of rent. Below 1 no replica can ever pay.", [query(gauge("pool_kappa_ratio"), "{{pool}}")], "none", 6, decimals=2, low=0, steps=[("red", None), ("transparent", 1)], custom={"thresholdsStyle": {"mode": "area"}, "fillOpacity": 0}, overrides=[of_query("A", shades="purple")])


def decisions(board):
    board.row("What the router did")
    values = {"0": {"text": " ", "color": "transparent", "index": 0}, "1": {"text": "preferred", "color": "blue", "index": 1}, "2": {"text": "preferred", "color": "green", "index": 2}}
    rows = [query(f'max by (pool, backend) (breakeven_route_preferred{{{POOL},backend=~"${kind}"}}) * {value}', "{{pool}}: {{backend}}") for kind, value in (("api", 1), ("own", 2))]
    board.add("state-timeline", "Preferred backend", "Which backend each pool preferred, over time.", rows, "none", 20, 5, mappings=[{"type": "value", "options": values}], custom={"fillOpacity": 80, "lineWidth": 0})
    board.stat("Pinned", "Pools whose preference an operator has fixed by hand.", [query(f"max by (pool) (breakeven_route_pinned{{{POOL}}})", "{{pool}}", instant=True)], "none", 4, 5, mappings=[{"type": "value", "options": {"0": {"text": "no", "index": 0}, "1": {"text": "pinned", "color": "orange", "index": 1}}}], options={"textMode": "value_and_name"})
    board.graph("Requests by backend", "Routing decisions, stacked to 100%.", by_kind(f"sum by (backend) (rate(breakeven_route_decisions_total{{{POOL},BACKENDS}}{RATE}))"), "reqps", decimals=2, low=0, custom=STACKED | {"stacking": {"mode": "percent", "group": "A"}}, overrides=KINDS)
    board.graph("Requests by reason", "Why requests went where they went. overflow, unhealthy and failover cost more than the router wanted.", happening(f"breakeven_route_decisions_total{{{POOL}}}", "reason", "{{reason}}"), "reqps", decimals=2, low=0, custom=FILLED, overrides=[NOTHING] + [named(reason, color=color) for reason, color in REASONS.items()])
    changes = [query(f'sum by (to) (increase(breakeven_route_flips_total{{{POOL},to=~"${kind}"}}[1h]))', "{{to}}") for kind in ("api", "own")]
    board.graph("Changes of preference per hour", "By the backend that became preferred.", changes, "short", decimals=0, low=0, overrides=KINDS)


def capacity(board):
    board.row("Rented capacity")
    board.graph("Replicas", "Ready and starting, and how many the policy wants.", [query(f"max by (pool, state) (breakeven_pool_replicas{{{POOL}}})", "{{pool}} {{state}}"), query(gauge("pool_wanted_replicas"), "{{pool}} wanted")], "short", decimals=0, low=0, custom=STEPPED, overrides=[of_query("A", shades=OWN), of_query("B", color="purple", dashed=1, fill=0)])
    rates = [f"sum by (pool) (rate(breakeven_pool_{name}_seconds_total{{{POOL}}}{RATE}))" for name in ("busy", "rented")]
    board.graph("Utilisation", "Replica-seconds of work per replica-second paid for.", [query(f"{rates[0]} / ({rates[1]} > 0)", "{{pool}}")], "percentunit", decimals=0, low=0, high=1, steps=[("red", None), ("orange", 0.3), ("green", 0.6), ("orange", 0.92)], custom={"thresholdsStyle": {"mode": "dashed"}}, overrides=[of_query("A", shades=OWN)])
    board.graph("Queue for a slot", "Requests waiting for a self-hosted slot, and how long the slowest twentieth waits.", [query(quantile(0.95, "breakeven_queue_wait_seconds", POOL, "pool"), "{{pool}} wait p95"), query(f"sum by (pool) (breakeven_queue_depth{{{POOL}}})", "{{pool}} waiting")], "s", decimals=2, low=0, custom=QUIET, overrides=[of_query("A", shades=OWN), of_query("B", shades=EVEN, unit="short")])
