// A real proxy between two scriptable servers, each a process of its own.
import { spawn } from "node:child_process";
import fs from "node:fs";
import net from "node:net";
import os from "node:os";
import path from "node:path";

const breakeven = process.env.BREAKEVEN ?? "target/release/breakeven";

export async function freePort() {
  return new Promise((resolve, reject) => {
    const server = net.createServer().once("error", reject);
    server.listen(0, "127.0.0.1", () => {
      const { port } = server.address();
      server.close(() => resolve(port));
    });
  });
}

// Asks until the answer is true.
export async function until(what, question, seconds = 20) {
  const deadline = Date.now() + seconds * 1000;
  for (;;) {
    const answer = await Promise.resolve().then(question).catch(() => false);
    if (answer) return answer;
    if (Date.now() > deadline) throw new Error(`${what} did not come within ${seconds} s`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

function run(log, ...parameters) {
  const out = fs.openSync(log, "a");
  const child = spawn(breakeven, parameters, { stdio: ["ignore", out, out] });
  child.gone = new Promise((resolve) => child.once("exit", resolve));
  return child;
}

async function end(child) {
  if (child.exitCode !== null || child.signalCode !== null) return;
  child.kill("SIGTERM");
  const timer = setTimeout(() => child.kill("SIGKILL"), 10_000);
  await child.gone;
  clearTimeout(timer);
}

export class Proxy {
  static async open(adminToken) {
    const proxy = new Proxy();
    proxy.folder = fs.mkdtempSync(path.join(os.tmpdir(), "breakeven-page-"));
    const [listen, admin, api, own] = [await freePort(), await freePort(), await freePort(), await freePort()];
    proxy.url = `http://127.0.0.1:${listen}`;
    proxy.admin = `http://127.0.0.1:${admin}`;
    proxy.token = adminToken;
    proxy.log = path.join(proxy.folder, "log");
    proxy.config = path.join(proxy.folder, "breakeven.toml");
    fs.writeFileSync(proxy.config, `
[server]
listen = "127.0.0.1:${listen}"
admin_listen = "127.0.0.1:${admin}"
${adminToken ? `admin_token = { env = "PAGE_TEST_TOKEN" }` : ""}
[ledger]
path = "${path.join(proxy.folder, "ledger.db")}"
[policy]
window = "10s"
slot = "1s"
min_dwell = "1s"
[backends.openai]
kind = "api"
base_url = "http://127.0.0.1:${api}/v1"
[backends.gpu]
kind = "self_hosted"
base_url = "http://127.0.0.1:${own}/v1"
hourly_usd = 2.99
billing = "while_running"
capacity = { input_tokens_per_second = 15000, output_tokens_per_second = 10000, max_in_flight = 64 }
[routes.chat]
models = ["gpt-4o-mini"]
offers = [{ backend = "openai" }, { backend = "gpu", model = "llama" }]
`);
    proxy.fakes = [
      run(proxy.log, "fake-backend", "--listen", `127.0.0.1:${api}`, "--personality", "openai"),
      run(proxy.log, "fake-backend", "--listen", `127.0.0.1:${own}`, "--personality", "vllm"),
    ];
    await proxy.start();
    return proxy;
  }

  async start() {
    if (this.token) process.env.PAGE_TEST_TOKEN = this.token;
    this.child = run(this.log, "serve", "--config", this.config);
    await until("the proxy", async () => (await fetch(`${this.admin}/livez`)).ok).catch((error) => {
      throw new Error(`${error.message}\n${fs.readFileSync(this.log, "utf8")}`);
    });
  }

  async stop() {
    await end(this.child);
  }

  async close() {
    await Promise.all([this.child, ...this.fakes].map(end));
    fs.rmSync(this.folder, { recursive: true, force: true });
  }

  async call(model = "gpt-4o-mini") {
    const answer = await fetch(`${this.url}/v1/chat/completions`, {
      method: "POST",
      headers: { "content-type": "application/json", authorization: "Bearer sk-test" },
      body: JSON.stringify({ model, messages: [{ role: "user", content: "Say something about the weather." }], max_tokens: 40 }),
    });
    await answer.text();
    return answer;
  }
}
