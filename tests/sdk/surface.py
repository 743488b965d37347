"""Every method of every resource of the `openai` package, called once directly and once through breakeven.

    surface.py --proxy http://127.0.0.1:4000/v1 --direct http://127.0.0.1:8000/v1 [--key sk-right]

The server behind is `breakeven fake-backend`, asked to echo what it got, so that what is compared is the request
as it arrived: method, path, query, headers, body. Methods are found by introspection. One that is neither called
nor listed below with a reason is a failure, and so is one that is listed and does not exist.
"""

import argparse
import inspect
import pathlib
import sys
import tempfile
from functools import cached_property

import openai
from openai._resource import SyncAPIResource
from pydantic import BaseModel

from compare import plain

SOCKET = "a WebSocket: the tunnel is tested in tests/it/proxy/endpoints.rs"
LOCAL = "makes no request"
# Not called, each with the reason.
LEFT_OUT = {
    "realtime.connect": SOCKET,
    "beta.realtime.connect": SOCKET,
    "live.connect": SOCKET,
    "live.forks.connect": SOCKET,
    "live.sideband.connect": SOCKET,
    "realtime.translations.connect": SOCKET,
    "responses.connect": SOCKET,
    "beta.responses.connect": SOCKET,
    "beta.agents.environments.files.prepare": LOCAL,
    "beta.agents.environments.files.prepare_directory": LOCAL,
    "beta.agents.sessions.artifacts.for_result": "asks with what `artifacts.list` asks, for an object of another call",
    "webhooks.unwrap": LOCAL,
    "webhooks.verify_signature": LOCAL,
    "models.list": "the proxy adds the models of its routes: compared in compare.py",
}
FILE = ("a.txt", b"the right time \xff\x00")
MESSAGES = [{"role": "user", "content": "x"}]
# Arguments by name, where a string will not do.
ARGUMENTS = {"messages": MESSAGES, "metadata": {"a": "b"}, "model": "gpt-4o-mini", "files": [FILE], "max_wait_seconds": 1}
# Arguments that one method needs besides those without a default, or otherwise.
MORE = {
    "admin.organization.external_keys.create": {"external_id": "x", "kms_arn": "x", "role_arn": "x"},
    "audio.voices.create": {"audio_sample": FILE, "consent": "x"},
    "beta.agents.automations.create": {"expression": "x", "timezone": "x"},
    "beta.agents.environments.files.create": {"file_id": "x"},
    "beta.agents.environments.files.upload": {"path": "/workspace/a.txt"},
    # An echo is never processed: it asks once and gives up.
    "files.wait_for_processing": {"poll_interval": 0, "max_wait_seconds": 0},
    "responses.stream": {"input": "x", "model": "gpt-4o-mini"},
    "uploads.upload_file_chunked": {"file": FILE[1], "filename": FILE[0], "bytes": len(FILE[1])},
    "videos.edit": {"video": FILE},
    "videos.extend": {"video": FILE},
}


class Counting(openai.OpenAI):
    """A client that counts its requests."""

    made = 0

    def _prepare_request(self, request):
        self.made += 1
        return super()._prepare_request(request)


def client_of(base_url, key):
    return Counting(base_url=base_url, api_key=key, admin_api_key=key, max_retries=0, timeout=20,
                    default_headers={"x-fake-echo": "echo_1"})


def methods(resource, path=()):
    """Names of all methods below a client or a resource."""
    for name in sorted(dir(type(resource))):
        if name.startswith("_") or name in ("with_raw_response", "with_streaming_response"):
            continue
        member = inspect.getattr_static(type(resource), name)
        if isinstance(member, (cached_property, property)):
            inner = getattr(resource, name) if name != "http_client" else None
            if isinstance(inner, SyncAPIResource):
                yield from methods(inner, (*path, name))
        elif inspect.isfunction(member) and isinstance(resource, SyncAPIResource):
            yield ".".join((*path, name))


def of(client, name):
    for part in name.split("."):
        client = getattr(client, part)
    return client


def argument(parameter):
    if parameter.name in ARGUMENTS:
        return ARGUMENTS[parameter.name]
    kind = str(parameter.annotation)
    if "FileTypes" in kind:
        return FILE
    if any(word in kind for word in ("Iterable[", "List[", "Sequence", "list[")):
        return ["x"] if "str" in kind.lower() and "Param" not in kind else [{"type": "x"}]
    if kind in ("int", "float"):
        return 1
    if any(word in kind for word in ("Dict[", "Mapping", "object")) or kind.endswith("Param"):
        return {"type": "x"}
    return "x"


def arguments(name, method):
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    required = [
        parameter for parameter in inspect.signature(method).parameters.values()
        if parameter.default is parameter.empty and parameter.kind not in variadic
    ]
    return {parameter.name: argument(parameter) for parameter in required} | MORE.get(name, {})


def outcome(client, name):
    """What a call brings, whatever that is, and how many requests it took."""
    before = client.made
    try:
        method = of(client, name)
        result = method(**arguments(name, method))
        if hasattr(result, "__enter__") and not isinstance(result, BaseModel):
            with result as stream:
                result = list(stream) if hasattr(stream, "__iter__") else stream
        elif isinstance(result, openai.Stream):
            result = list(result)
        elif hasattr(result, "read"):
            result = result.read().decode()
        seen = plain(result)
    except Exception as error:
        seen = [type(error).__name__, str(error)]
    return seen, client.made - before


def check(name, proxied, direct):
    straight, requests = outcome(direct, name)
    through, _ = outcome(proxied, name)
    if requests == 0:
        print(f"WRONG {name}: no request was made: {straight}; call it otherwise, or list it with the reason")
    elif repr(straight) != repr(through):
        print(f"WRONG {name}\n  through: {through!r:.2000}\n  direct:  {straight!r:.2000}")
    else:
        return True
    return False


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proxy", required=True)
    parser.add_argument("--direct", required=True)
    parser.add_argument("--key", default="sk-right")
    options = parser.parse_args()
    proxied, direct = client_of(options.proxy, options.key), client_of(options.direct, options.key)
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "a.txt")
        file.write_bytes(FILE[1])
        names = list(methods(direct))
        unknown = LEFT_OUT.keys() - set(names)
        for name in unknown:
            print(f"WRONG {name}: it is left out, and does not exist")
        called = [name for name in names if name not in LEFT_OUT]
        equal = sum(check(name, proxied, direct) for name in called)
    print(f"openai {openai.__version__} for Python: {equal} of {len(called)} methods give through the proxy what they "
          f"give directly; {len(LEFT_OUT)} left out")
    return 1 if equal < len(called) or unknown else 0


if __name__ == "__main__":
    sys.exit(main())
