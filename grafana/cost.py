"""Cost: what is spent, what each backend alone would have cost, what was saved, and where break-even is."""
from panels import API, EVEN, FILLED, IDLE, JOB, KINDS, LOGARITHMIC, NOTHING, OWN, STACKED, Dashboard, by_kind, happening, in_range, named, of_query, override, per_hour, query, variable

FILTER = f'{JOB},backend=~"$backend",model=~"$model",team=~"$team"'
SPEND, ALL_API, ALL_OWN = (f"breakeven_{name}_usd_total{{{JOB}}}" for name in ("spend", "all_api_cost", "all_selfhosted_cost"))
COST = f"breakeven_request_cost_usd_total{{{FILTER}}}"
RENT = f'breakeven_spend_usd_total{{{JOB},backend=~"$own"}}'
USED = f'breakeven_request_cost_usd_total{{{JOB},backend=~"$own"}}'
GAIN = [("red", None), ("text", -0.005), ("green", 0.005)]
BUDGET = [("green", None), ("orange", 0.8), ("red", 0.95)]
LIMIT, SPENT, START, END = (f"max by (budget) (breakeven_budget_{name}{{{JOB}}})" for name in ("limit_usd", "spent_usd", "period_start_timestamp_seconds", "period_end_timestamp_seconds"))


def ledger(period, amount):
    return f'sum(breakeven_ledger_usd{{{JOB},period="{period}",amount="{amount}"}})'


def dashboard():
    board = Dashboard("breakeven-cost", "breakeven / Cost", "What the traffic costs, what each backend alone would have cost, what was saved, and where break-even is.", "now-24h",
                      [variable("backend", f"breakeven_spend_usd_total{{{JOB}}}", "Backend"), variable("model", f"breakeven_request_cost_usd_total{{{JOB}}}", "Model"), variable("team", f"breakeven_request_cost_usd_total{{{JOB}}}", "Team")], ["flips", "pins", "prices"])
    first_screen(board)
    attribution(board)
    unit_costs(board)
    trust(board)
    budgets(board)
    return board


def first_screen(board):
    volume, even = (f"max by (pool) (breakeven_{name}_requests_per_hour{{{JOB}}})" for name in ("volume", "threshold"))
    board.stat("Spend now", "US dollars per hour at the present rate: token charges, rent and fees.", per_hour(SPEND), "currencyUSD", 4, 4, True, decimals=2)
    board.stat("The API alone", "What the same requests would cost per hour if the API served all of them.", per_hour(ALL_API), "currencyUSD", 4, 4, True, decimals=2, steps=[(API, None)])
    board.stat("Self-hosted alone", "Rent per hour of the replicas that all the requests would need.", per_hour(ALL_OWN), "currencyUSD", 4, 4, True, decimals=2, steps=[(OWN, None)])
    board.stat("Saved against the API", "What the API alone would have cost in the selected range, minus what was spent. Negative: the API alone would have been cheaper.", f"{in_range(ALL_API)} - {in_range(SPEND)}", "currencyUSD", 4, 4, decimals=2, steps=GAIN)
    board.add("gauge", "Volume of break-even", "The volume that the router decides on, as a share of the volume at which both cost the same. Below 100% the API is cheaper, above it self-hosting is.", [query(f"{volume} / {even}", "{{pool}}", instant=True)], "percentunit", 4, 4, decimals=0, steps=[(API, None), (EVEN, 0.9), (OWN, 1.1)], low=0, high=2, empty="no break-even")
    board.stat("Preferred now", "The backend that each pool's traffic prefers.", [query(f'max by (pool, backend) (breakeven_route_preferred{{{JOB},backend=~"${kind}"}}) == 1', "{{backend}}", instant=True) for kind in ("api", "own")], "none", 4, 4, options={"textMode": "name"}, overrides=KINDS)
    board.graph("Spend per hour, and what each backend alone would cost", "Stacked: US dollars per hour owed to each backend. Dashed: the same requests all on the API, or all self-hosted. Where the stack is below both, money is saved.",
                by_kind(per_hour(f"breakeven_spend_usd_total{{{JOB},BACKENDS}}", "backend")) + [query(per_hour(ALL_API), "the API alone"), query(per_hour(ALL_OWN), "self-hosted alone")], "currencyUSD", 14, 10, decimals=2, low=0, custom=STACKED,
                overrides=KINDS + [named("the API alone", color="light-blue", dashed=1, fill=0, width=2, unstacked=1), named("self-hosted alone", color="light-green", dashed=1, fill=0, width=2, unstacked=1)])
    edge = f"max by (pool) (breakeven_threshold_band_requests_per_hour{{{JOB},edge=\"EDGE\"}})"
    board.graph("Volume against break-even", "Requests per hour. Inside the band the router stays where it is.",
                [query(volume, "{{pool}} volume"), query(even, "{{pool}} break-even"), query(edge.replace("EDGE", "upper"), "{{pool}} band, upper"), query(edge.replace("EDGE", "lower"), "{{pool}} band, lower")], "locale", 10, 10, decimals=0, low=0,
                overrides=[of_query("A", color="purple", width=3, fill=0), of_query("B", color=EVEN, dashed=1, fill=0), of_query("C", color=EVEN, width=1, fill=0, hidden=1), of_query("D", color=EVEN, width=1, fill=0, hidden=1)])
    board.stat("Spent today", "From the ledger, so restarts change nothing.", ledger("today", "cost"), "currencyUSD", 4, 4, decimals=2)
    board.stat("Spent this month", "From the ledger, so restarts change nothing.", ledger("month", "cost"), "currencyUSD", 4, 4, decimals=2)
    board.stat("Saved today", "Against the API alone, from the ledger.", ledger("today", "net_savings"), "currencyUSD", 4, 4, decimals=2, steps=GAIN)
    board.stat("Saved against self-hosting alone", "Rent that all the requests would have needed in the selected range, minus what was spent.", f"{in_range(ALL_OWN)} - {in_range(SPEND)}", "currencyUSD", 4, 4, decimals=2, steps=GAIN)
    board.stat("Idle rent today", "Rent and fees of self-hosted backends that no request used, from the ledger.", ledger("today", "idle"), "currencyUSD", 4, 4, decimals=2, steps=[(IDLE, None)])
    board.stat("Per 1,000 requests", "Spend of the selected range per thousand requests, idle rent included.", f"{in_range(SPEND)} / ({in_range(f'breakeven_requests_total{{{JOB}}}')} > 0) * 1000", "currencyUSD", 4, 4, decimals=3)


def attribution(board):
    board.row("Where the money goes")
    board.graph("Saved per hour", "US dollars per hour against each backend alone. Below zero, that backend alone would be cheaper now.",
                [query(f"{per_hour(ALL_API)} - {per_hour(SPEND)}", "against the API"), query(f"{per_hour(ALL_OWN)} - {per_hour(SPEND)}", "against self-hosting")], "currencyUSD", decimals=2,
                steps=[("red", None), ("transparent", 0)], custom={"thresholdsStyle": {"mode": "area"}, "fillOpacity": 0}, overrides=[named("against the API", color="light-blue"), named("against self-hosting", color="light-green")])
    board.graph("Rent, used and idle", "Used is what requests were attributed; the rest of the rent is idle.",
                [query(per_hour(USED), "used"), query(f"clamp_min({per_hour(RENT)} - {per_hour(USED)}, 0)", "idle")], "currencyUSD", decimals=2, low=0, custom=STACKED, overrides=[named("used", color=OWN), named("idle", color=IDLE)])
    board.graph("Spend per hour by kind", "Token charges of APIs, rent of replicas, and fees per request.", happening(SPEND, "kind", "{{kind}}", 3600), "currencyUSD", decimals=2, low=0, custom=FILLED,
                overrides=[NOTHING, named("tokens", color=API), named("capacity", color=OWN), named("requests", color="yellow")])
    board.graph("Cost per hour by team", "Attributed cost. Idle rent belongs to no team and is not in it.", [query(per_hour(COST, "team"), "{{team}}")], "currencyUSD", 12, decimals=2, low=0, custom=STACKED)
    board.graph("Cost per hour by model", "Attributed cost, by the name that clients asked for.", [query(per_hour(COST, "model"), "{{model}}")], "currencyUSD", 12, decimals=2, low=0, custom=STACKED)


def unit_costs(board):
    requests, tokens = f"breakeven_requests_total{{{FILTER}}}", f"breakeven_tokens_total{{{FILTER}}}"

    def each(counted, factor):
        return by_kind(f"sum by (backend) (rate(breakeven_spend_usd_total{{{JOB},BACKENDS}}[$__rate_interval])) / (sum by (backend) (rate({counted}{{{JOB},BACKENDS}}[$__rate_interval])) > 0) * {factor}")
    board.row("Unit cost and chargeback")
    board.graph("US dollars per 1,000 requests", "Spend divided by requests, idle rent included.", each("breakeven_requests_total", "1000"), "currencyUSD", decimals=3, custom=LOGARITHMIC, overrides=KINDS)
    board.graph("US dollars per million tokens", "Spend divided by billable tokens, idle rent included.", each("breakeven_tokens_total", "1e6"), "currencyUSD", decimals=3, custom=LOGARITHMIC, overrides=KINDS)
    columns = {"Value #A": "Requests", "Value #B": "Tokens", "Value #C": "Cost", "Value #D": "Share", "team": "Team"}
    board.add("table", "Chargeback by team", "Requests, tokens and attributed cost in the selected range.",
              [query(in_range(requests, "team"), table=True), query(in_range(tokens, "team"), table=True), query(in_range(COST, "team"), table=True), query(f"{in_range(COST, 'team')} / ignoring (team) group_left () {in_range(COST)}", table=True)], "short", 8, 8,
              transformations=[{"id": "merge", "options": {}}, {"id": "organize", "options": {"excludeByName": {"Time": True}, "renameByName": columns}}, {"id": "sortBy", "options": {"sort": [{"field": "Cost", "desc": True}]}}],
              overrides=[named("Cost", unit="currencyUSD", decimals=2), named("Share", unit="percentunit", decimals=1), named("Requests", unit="locale", decimals=0), named("Tokens", unit="short", decimals=1)])


def budgets(board):
    board.row("Budgets", collapsed=True)
    board.add("bargauge", "Used by budget", "Share of each budget that is spent in its period.", [query(f"{SPENT} / {LIMIT}", "{{budget}}", instant=True)], "percentunit", 8, 8, decimals=0, steps=BUDGET, low=0, high=1, empty="no budget")
    board.graph("Spent, even pace and limit", "Spent above the even pace: the budget runs out before its period ends.",
                [query(SPENT, "{{budget}} spent"), query(f"{LIMIT} * (time() - {START}) / ({END} - {START})", "{{budget}} even pace"), query(LIMIT, "{{budget}} limit")], "currencyUSD", decimals=2, low=0,
                overrides=[of_query("A", shades="purple", width=3), of_query("B", shades="text", dashed=1, fill=0), of_query("C", shades="red", fill=0)])
    board.stat("Left of each budget", "US dollars until the limit. Below zero the budget is overdrawn.", [query(f"{LIMIT} - {SPENT}", "{{budget}}", instant=True)], "currencyUSD", 8, 8, decimals=2, steps=[("red", None), ("text", 0)], empty="no budget")


def trust(board):
    prices = f'max by (backend, model, type) (breakeven_token_price_usd_per_million_tokens{{{JOB},model=~"$model"}})'
    counted, reported = (f"breakeven_token_counts_total{{{JOB}{source}}}" for source in ("", ',source="upstream_usage"'))
    board.row("Can the numbers be trusted?")
    board.stat("Age of the prices", "Time since somebody confirmed the prices of each API.", [query(f"time() - max by (backend) (breakeven_price_book_timestamp_seconds{{{JOB}}})", "{{backend}}", instant=True)], "dtdurations", 6, 5, decimals=0, steps=[("green", None), ("orange", 14 * 86400), ("red", 30 * 86400)], options={"textMode": "value_and_name"})
    board.stat("Requests without a price", "Counted as 0 dollars in the selected range, because the price book does not know their model.", in_range(f"breakeven_unpriced_requests_total{{{JOB}}}"), "short", 6, 5, decimals=0, steps=[("green", None), ("red", 0.5)])
    board.stat("Tokens reported by the upstream", "Share of the requests in the selected range whose tokens the upstream counted; breakeven counted the rest.", f"{in_range(reported)} / {in_range(counted)}", "percentunit", 6, 5, decimals=1, steps=[("red", None), ("orange", 0.9), ("green", 0.97)])
    board.stat("Rent of a replica", "US dollars per hour of one replica, as configured.", [query(f"max by (pool) (breakeven_capacity_price_usd_per_hour{{{JOB}}})", "{{pool}}", instant=True)], "currencyUSD", 6, 5, decimals=2, options={"textMode": "value_and_name"})
    board.add("table", "Prices in force", "US dollars per million tokens.", [query(prices, table=True)], "currencyUSD", 24, 7, decimals=3,
              transformations=[{"id": "organize", "options": {"excludeByName": {"Time": True}, "renameByName": {"backend": "Backend", "model": "Model", "type": "Tokens"}}}, {"id": "sortBy", "options": {"sort": [{"field": "Model", "desc": False}]}}], overrides=[override("byType", "number", {"title": "Price"})])
