"""Processes of a test, each ended when the test ends, and free ports for them."""
import contextlib
import pathlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
ENDING_SECONDS = 20


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def process(arguments, log, **options):
    """Runs while the block does; its output goes to `log`, which is shown if the block fails."""
    with open(log, "wb") as output:
        running = subprocess.Popen([str(argument) for argument in arguments], stdout=output, stderr=subprocess.STDOUT, **options)
        try:
            yield running
        except BaseException:
            print(f"--- the end of {log}", pathlib.Path(log).read_text(errors="replace")[-3000:], "---", sep="\n", file=sys.stderr)
            raise
        finally:
            end(running)


def end(running):
    """SIGTERM, and SIGKILL when that does not help."""
    if running.poll() is None:
        running.terminate()
        try:
            running.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


def fetch(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def wait_until(what, question, seconds=30):
    """Asks until the answer is true, and gives it back."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, urllib.error.URLError):
            if answer := question():
                return answer
        time.sleep(0.1)
    raise TimeoutError(f"{what} did not come within {seconds} s")


def prometheus(folder, port, target, rules=None, quick=False):
    """The command of a Prometheus that scrapes `target` every second with the project's rules."""
    folder.mkdir(parents=True, exist_ok=True)
    rules = rules or [ROOT / "deploy/prometheus" / name for name in ("recording.yml", "alerts.yml")]
    files = []
    for path in rules:
        text = path.read_text(encoding="utf-8")
        if quick:  # fire after two seconds, whatever the rule says
            text = "\n".join(line.split("for:")[0] + "for: 2s" if line.strip().startswith("for:") else line for line in text.split("\n")).replace("interval: 30s", "interval: 1s")
        files.append(folder / path.name)
        files[-1].write_text(text, encoding="utf-8")
    config = folder / "prometheus.yml"
    config.write_text(f"""
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: [{", ".join(map(str, files))}]
scrape_configs:
  - job_name: breakeven
    static_configs: [{{targets: ["{target}"]}}]
""", encoding="utf-8")
    return ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}", "--storage.tsdb.retention.time=90d", "--log.level=warn"]
