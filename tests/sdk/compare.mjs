// The unmodified `openai` package for Node against breakeven, each call compared with the same call made directly.
//
//   node compare.mjs PROXY_URL DIRECT_URL MODEL DIRECT_MODEL KEY BACKEND [self-hosted]
//
// Ends with status 1 when anything differs.

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

// The package lies where NODE_PATH says, not beside this file.
const require = createRequire(import.meta.url);
const { default: OpenAI, toFile } = await import(pathToFileURL(require.resolve("openai")));

const [proxy, direct, model, directModel, key, backend, kind] = process.argv.slice(2);
const selfHosted = kind === "self-hosted";
const changing = new Set(["id", "created", "created_at", "completed_at", "system_fingerprint", "call_id", "item_id",
  "obfuscation", "_request_id"]);
// A model of the proxy's routes that the API does not have: its list of models adds it.
const routesOwn = "house-model";
const abortDeadlineMs = 5_000;
const messages = [{ role: "user", content: "What is the right time in Zürich? 時間" }];
const schema = {
  type: "object",
  properties: { city: { type: "string" }, days: { type: "integer" } },
  required: ["city", "days"],
  additionalProperties: false,
};
const tool = { type: "function", function: { name: "weather", parameters: schema } };

function plain(value) {
  if (Array.isArray(value)) return value.map(plain);
  if (value === null || typeof value !== "object") return value;
  // OpenAI adds `usage: null` to every chunk of a stream whose usage was asked for, as the proxy does.
  const kept = ([name, inner]) => !changing.has(name) && !(name === "usage" && inner === null);
  return Object.fromEntries(
    Object.entries(value).filter(kept).map(([name, inner]) => [name, plain(inner)]));
}

async function all(stream) {
  const items = [];
  for await (const item of stream) items.push(item);
  return items;
}

async function failure(call) {
  try {
    await call();
  } catch (error) {
    return [error.constructor.name, error.status, error.code, error.type, error.param, error.message];
  }
  throw new Error("the call succeeded");
}

const anywhere = {
  chat: (client, model) => client.chat.completions.create({ model, messages, max_tokens: 9 }),
  async "chat stream"(client, model) {
    const chunks = await all(await client.chat.completions.create({ model, messages, stream: true }));
    assert(chunks.every((chunk) => chunk.choices.length > 0 && !chunk.usage), "usage that was not asked for");
    return chunks;
  },
  async "chat stream with usage"(client, model) {
    const body = { model, messages, stream: true, stream_options: { include_usage: true } };
    const chunks = await all(await client.chat.completions.create(body));
    assert(chunks.at(-1).usage.completion_tokens > 0);
    assert.deepEqual(chunks.at(-1).choices, []);
    return chunks;
  },
  async "chat stream helper"(client, model) {
    const runner = client.chat.completions.stream({ model, messages });
    return [await runner.finalContent(), (await runner.finalChatCompletion()).choices[0].finish_reason];
  },
  async tools(client, model) {
    const first = await client.chat.completions.create({ model, messages, tools: [tool] });
    const call = first.choices[0].message.tool_calls[0];
    assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)).sort(), ["city", "days"]);
    const history = [...messages, first.choices[0].message, { role: "tool", tool_call_id: call.id, content: "sunny" }];
    const second = await client.chat.completions.create({ model, messages: history, tools: [tool] });
    return [first, second.choices[0].finish_reason];
  },
  "tools stream": async (client, model) =>
    all(await client.chat.completions.create({ model, messages, tools: [tool], stream: true })),
  async "structured output"(client, model) {
    const format = { type: "json_schema", json_schema: { name: "trip", schema, strict: true } };
    const reply = await client.chat.completions.create({ model, messages, response_format: format });
    assert.equal(typeof JSON.parse(reply.choices[0].message.content).days, "number");
    return reply;
  },
  responses: (client, model) => client.responses.create({ model, input: "Hello there" }),
  "responses stream": async (client, model) =>
    all(await client.responses.create({ model, input: "Hello there", stream: true })),
  "bad request": (client, model) => failure(() => client.post("/chat/completions", { body: { model } })),
};

const apiOnly = {
  async embeddings(client) {
    const result = await client.embeddings.create({ model: "text-embedding-3-small", input: ["one"], dimensions: 8 });
    assert.equal(result.data[0].embedding.length, 8);
    return result;
  },
  models: async (client) => (await all(client.models.list())).map((model) => model.id).filter((id) => id !== routesOwn).sort(),
  "one model": (client, model) => client.models.retrieve(model),
  transcription: async (client) => client.audio.transcriptions.create({
    model: "gpt-4o-mini-transcribe",
    file: await toFile(Buffer.alloc(10_000, 7), "speech.wav"),
  }),
  async speech(client) {
    const answer = await client.audio.speech.create({ model: "gpt-4o-mini-tts", voice: "alloy", input: "one two" });
    return Buffer.from(await answer.arrayBuffer()).toString("hex");
  },
  "unknown model": (client) => failure(() => client.chat.completions.create({ model: "no-such-model", messages })),
  "bad key": (client, model) =>
    failure(() => client.withOptions({ apiKey: "sk-wrong-key-0000" }).chat.completions.create({ model, messages })),
};

async function aborted() {
  const answer = await fetch(`${direct.replace(/\/v1$/, "")}/fake/totals`);
  return (await answer.json()).aborted;
}

async function cancel(client) {
  const before = await aborted();
  const body = { model, messages, stream: true, max_tokens: 20_000 };
  const stream = await client.chat.completions.create(body, { headers: { "x-fake-output-tokens": "20000" } });
  for await (const _ of stream) break;
  const deadline = Date.now() + abortDeadlineMs;
  while ((await aborted()) === before) assert(Date.now() < deadline, "the server still generates");
}

const options = { apiKey: key, maxRetries: 0, timeout: 30_000 };
const through = new OpenAI({ ...options, baseURL: proxy });
const straight = new OpenAI({ ...options, baseURL: direct });
let wrong = 0;
async function check(name, run) {
  try {
    await run();
    console.log(`ok    ${name}`);
  } catch (error) {
    wrong += 1;
    console.log(`WRONG ${name}: ${error.message}`);
  }
}
for (const [name, scenario] of Object.entries({ ...anywhere, ...(selfHosted ? {} : apiOnly) })) {
  await check(name, async () =>
    assert.deepEqual(plain(await scenario(through, model)), plain(await scenario(straight, directModel))));
}
await check("x-breakeven headers", async () => {
  const { response } = await through.chat.completions.create({ model, messages }).withResponse();
  assert.equal(response.headers.get("x-breakeven-backend"), backend);
});
await check("cancel in mid-stream", () => cancel(through));
console.log(`openai for Node, backend ${backend}: ${wrong} wrong`);
process.exitCode = wrong ? 1 : 0;
