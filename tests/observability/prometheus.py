"""A small client of Prometheus' HTTP API."""
import json
import math
import time
import urllib.error
import urllib.parse
import urllib.request


class QueryError(Exception):
    pass


class Prometheus:
    def __init__(self, url):
        self.url = url.rstrip("/")

    def call(self, path, **parameters):
        query = urllib.parse.urlencode(parameters, doseq=True)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise QueryError(json.load(error).get("error", str(error))) from None

    def instant(self, expr, at):
        """[(labels, [(time, value)])] of a vector; a scalar is a vector without labels."""
        data = self.call("query", query=expr, time=at)
        if data["resultType"] == "scalar":
            return [({}, [sample(data["result"])])]
        return [(row["metric"], [sample(row["value"])]) for row in data["result"]]

    def range(self, expr, start, end, step):
        data = self.call("query_range", query=expr, start=start, end=end, step=step)
        return [(row["metric"], [sample(pair) for pair in row["values"]]) for row in data["result"]]

    def label_values(self, label, selector, start, end):
        return self.call(f"label/{label}/values", **{"match[]": selector, "start": start, "end": end})

    def rules(self):
        return [rule for group in self.call("rules")["groups"] for rule in group["rules"]]

    def wait_for(self, what, question, seconds=60):
        """Asks until the answer is true; the answer, or an error that says what did not come."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                answer = question(self)
                if answer:
                    return answer
            except (OSError, QueryError):
                pass
            time.sleep(0.2)
        raise TimeoutError(f"{what} did not come within {seconds} s")


def sample(pair):
    return float(pair[0]), float(pair[1])


def is_number(value):
    return not math.isnan(value)
