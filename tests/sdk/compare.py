"""The unmodified `openai` package against breakeven, each call compared with the same call made directly.

    compare.py --proxy http://127.0.0.1:4000/v1 --direct http://127.0.0.1:8000/v1 --model gpt-4o-mini
               [--direct-model NAME] [--key sk-right] [--backend openai] [--self-hosted] [--only chat,tools]

Ends with status 1 when anything differs.
"""

import argparse
import asyncio
import io
import json
import sys
import time
import urllib.request

import openai
from pydantic import BaseModel

CHANGING = {"id", "created", "created_at", "completed_at", "system_fingerprint", "call_id", "item_id", "obfuscation"}
# A model of the proxy's routes that the API does not have: its list of models adds it.
ROUTES_OWN = "house-model"
ABORT_DEADLINE_SECONDS = 5
MESSAGES = [{"role": "user", "content": "What is the right time in Zürich? 時間"}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": WEATHER}}


class Trip(BaseModel):
    city: str
    days: int
    warm: bool


def plain(value):
    """What must be equal: everything but ids and times."""
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items() if key not in CHANGING}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value


def chat(client, model):
    return client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=9, temperature=0)


def chat_many(client, model):
    return client.chat.completions.create(model=model, messages=MESSAGES, n=2, logprobs=True, seed=1)


def chat_unknown_member(client, model):
    return client.chat.completions.create(model=model, messages=MESSAGES, extra_body={"top_k": 5, "x": {"y": [1.0]}})


def chat_stream(client, model):
    chunks = list(client.chat.completions.create(model=model, messages=MESSAGES, stream=True, temperature=0, max_tokens=40))
    assert all(chunk.choices for chunk in chunks), "a chunk without choices, though no usage was asked for"
    assert all(chunk.usage is None for chunk in chunks), "usage that was not asked for"
    return chunks


def chat_stream_usage(client, model):
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(model=model, messages=MESSAGES, stream=True, stream_options=options))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0, "no usage though it was asked for"
    return chunks


def chat_stream_helper(client, model):
    with client.chat.completions.stream(model=model, messages=MESSAGES) as stream:
        kinds = [event.type for event in stream]
        return [kinds, stream.get_final_completion()]


def tools(client, model):
    first = client.chat.completions.create(model=model, messages=MESSAGES, tools=[TOOL])
    call = first.choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments).keys() == {"city", "days"}
    answer = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    history = [*MESSAGES, first.choices[0].message, answer]
    second = client.chat.completions.create(model=model, messages=history, tools=[TOOL])
    assert second.choices[0].message.content
    # The call's own id is in the second prompt, and its length is what counts.
    return [first, second.choices[0].finish_reason, second.usage.completion_tokens]


def tools_stream(client, model):
    return list(client.chat.completions.create(model=model, messages=MESSAGES, tools=[TOOL], stream=True))


def structured(client, model):
    parsed = client.chat.completions.parse(model=model, messages=MESSAGES, response_format=Trip)
    assert isinstance(parsed.choices[0].message.parsed, Trip)
    return parsed


def completions(client, model):
    return client.completions.create(model=model, prompt="Once upon", max_tokens=4, temperature=0)


def completions_stream(client, model):
    return list(client.completions.create(model=model, prompt="Once upon", max_tokens=4, temperature=0, stream=True))


def responses(client, model):
    response = client.responses.create(model=model, input="Hello there", instructions="Be brief.")
    assert response.output_text and response.usage.output_tokens > 0
    return response


def responses_stream(client, model):
    return list(client.responses.create(model=model, input="Hello there", stream=True))


def responses_helper(client, model):
    with client.responses.stream(model=model, input="Hello there") as stream:
        kinds = [event.type for event in stream]
        return [kinds, stream.get_final_response().output_text]


def embeddings(client, _model):
    result = client.embeddings.create(model="text-embedding-3-small", input=["one", "two"], dimensions=8)
    assert len(result.data) == 2 and len(result.data[0].embedding) == 8
    return result


def models(client, _model):
    return sorted(model.id for model in client.models.list() if model.id != ROUTES_OWN)


def one_model(client, model):
    return client.models.retrieve(model)


def transcription(client, _model):
    audio = io.BytesIO(bytes(range(256)) * 40)
    audio.name = "speech.wav"
    return client.audio.transcriptions.create(model="gpt-4o-mini-transcribe", file=audio)


def speech(client, _model):
    return client.audio.speech.create(model="gpt-4o-mini-tts", voice="alloy", input="one two three").read().hex()


def moderation(client, _model):
    return client.moderations.create(model="omni-moderation-latest", input="hello")


def upload(client, _model):
    return client.files.create(file=("in.jsonl", b'{"custom_id":"a"}\n'), purpose="batch")


def unknown_model(client, _model):
    try:
        client.chat.completions.create(model="no-such-model", messages=MESSAGES)
    except openai.NotFoundError as error:
        return [type(error).__name__, error.status_code, error.code, error.type, error.param, error.message]
    raise AssertionError("an unknown model was served")


def bad_key(client, model):
    try:
        client.with_options(api_key="sk-wrong-key-0000").chat.completions.create(model=model, messages=MESSAGES)
    except openai.AuthenticationError as error:
        return [type(error).__name__, error.status_code, error.code, error.type, error.message]
    raise AssertionError("a bad key was taken")


def bad_request(client, model):
    try:
        client.post("/chat/completions", body={"model": model}, cast_to=object)
    except openai.BadRequestError as error:
        return [error.status_code, error.code, error.param, error.message]
    raise AssertionError("a chat without messages was served")


def raw_headers(client, model):
    raw = client.chat.completions.with_raw_response.create(model=model, messages=MESSAGES, max_tokens=9)
    wanted = ["content-type", "x-request-id", "openai-version", "x-ratelimit-limit-requests"]
    return {name: bool(raw.headers.get(name)) for name in wanted}


def asynchronous(client, model):
    async def run():
        async with openai.AsyncOpenAI(base_url=str(client.base_url), api_key=client.api_key) as own:
            calls = [own.chat.completions.create(model=model, messages=MESSAGES) for _ in range(8)]
            return await asyncio.gather(*calls)

    return asyncio.run(run())


ANYWHERE = [
    chat, chat_many, chat_unknown_member, chat_stream, chat_stream_usage, chat_stream_helper, tools, tools_stream,
    structured, completions, completions_stream, responses, responses_stream, responses_helper, asynchronous,
    bad_request,
]
API_ONLY = [
    embeddings, models, one_model, transcription, speech, moderation, upload, unknown_model, bad_key, raw_headers,
]


def check_reads_like(name, scenario, proxied, direct):
    through = plain(scenario(*proxied))
    straight = plain(scenario(*direct))
    if through == straight:
        return print(f"ok    {name}")
    print(f"WRONG {name}\n  through: {json.dumps(through, default=str)[:2000]}"
          f"\n  direct:  {json.dumps(straight, default=str)[:2000]}")
    return False


def check_headers(client, model, backend):
    raw = client.chat.completions.with_raw_response.create(model=model, messages=MESSAGES, max_tokens=9)
    headers = {name: raw.headers.get(name) for name in
               ("x-breakeven-backend", "x-breakeven-model", "x-breakeven-reason", "x-breakeven-request-id",
                "x-breakeven-cost-usd")}
    if headers["x-breakeven-backend"] != backend or not all(headers.values()):
        print(f"WRONG x-breakeven headers: {headers}, expected backend {backend}")
        return False
    return print("ok    x-breakeven headers")


def totals(direct):
    with urllib.request.urlopen(direct.removesuffix("/v1") + "/fake/totals") as answer:
        return json.load(answer)


def check_cancel(client, model, direct):
    """A stream that is closed early ends at the server as well."""
    before = totals(direct)["aborted"]
    stream = client.chat.completions.create(
        model=model, messages=MESSAGES, stream=True, max_tokens=20_000, extra_headers={"x-fake-output-tokens": "20000"}
    )
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + ABORT_DEADLINE_SECONDS
    while totals(direct)["aborted"] == before:
        if time.monotonic() > deadline:
            print("WRONG cancel: the server still generates")
            return False
    return print("ok    cancel in mid-stream")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proxy", required=True)
    parser.add_argument("--direct", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--direct-model")
    parser.add_argument("--key", default="sk-right")
    parser.add_argument("--backend", required=True)
    parser.add_argument("--self-hosted", action="store_true")
    parser.add_argument("--only", help="these scenarios, and no fake server behind: no check of the abort")
    options = parser.parse_args()
    proxied = openai.OpenAI(base_url=options.proxy, api_key=options.key, max_retries=0, timeout=30)
    straight = openai.OpenAI(base_url=options.direct, api_key=options.key, max_retries=0, timeout=30)
    direct_model = options.direct_model or options.model

    scenarios = ANYWHERE + ([] if options.self_hosted else API_ONLY)
    if options.only:
        scenarios = [scenario for scenario in scenarios if scenario.__name__ in options.only.split(",")]
    results = [
        check_reads_like(scenario.__name__, scenario, (proxied, options.model), (straight, direct_model))
        for scenario in scenarios
    ]
    results.append(check_headers(proxied, options.model, options.backend))
    if not options.only:
        results.append(check_cancel(proxied, options.model, options.direct))
    wrong = results.count(False)
    print(f"openai {openai.__version__} for Python, backend {options.backend}: "
          f"{len(results) - wrong} of {len(results)} as expected")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
