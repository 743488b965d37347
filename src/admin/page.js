// The live page: listens to `api/events`, draws what it hears, and pins pools.
// Text from the proxy only ever becomes text, never markup.

const HISTORY = 1200; // samples kept per pool; beyond, every other one is dropped
const CALLS_KEPT = 60;
const CALLS_SHOWN = 25;
const SILENCE_MS = 6000; // status comes once a second
const RETRY_MS = [500, 1000, 2000, 4000];

const at = (id) => document.getElementById(id);
const state = { status: null, pools: new Map(), calls: new Map(), paused: false, preferred: new Map() };

// ---- words and numbers

const finite = (value) => value !== null && value !== undefined && Number.isFinite(Number(value));

function usd(value) {
  if (!finite(value)) return "–";
  const amount = Number(value);
  const size = Math.abs(amount);
  const digits = size === 0 || size >= 0.995 ? 2 : Math.min(9, 2 - Math.floor(Math.log10(size)));
  return amount.toLocaleString("en-US", { style: "currency", currency: "USD", minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function count(value) {
  if (!finite(value)) return "–";
  const number = Number(value);
  return number.toLocaleString("en-US", { maximumFractionDigits: Math.abs(number) < 10 ? 1 : 0 });
}

function took(ms) {
  if (!finite(ms)) return "–";
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(ms < 10000 ? 2 : 1)} s`;
}

const clock = (ms, seconds) =>
  new Date(ms).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", ...(seconds ? { second: "2-digit" } : {}), hour12: false });

const words = (text) => String(text ?? "").replaceAll("_", " ");

// ---- small DOM helpers

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== undefined) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function drawn(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// Keeps the nodes of a list of [label, value, tone] and changes their text only.
function showTiles(list, facts) {
  const shape = facts.map(([label]) => label).join("|");
  if (list.dataset.shape !== shape) {
    list.dataset.shape = shape;
    list.replaceChildren(...facts.map(([label]) => element("div", {}, element("dt", {}, label), element("dd"))));
  }
  facts.forEach(([, value, tone], index) => {
    const dd = list.children[index].lastChild;
    setText(dd, value);
    dd.dataset.tone = tone ?? "";
  });
}

function announce(text) {
  setText(at("announcer"), text);
}

// ---- charts

const WIDTH = 560, HEIGHT = 220, LEFT = 52, RIGHT = 8, TOP = 10, BOTTOM = 22;

// A line chart that keeps its nodes; `lines` are {key, label, tone, dashed, thick, format}.
function chart(host, name, lines, band) {
  host.classList.add("chart");
  const svg = drawn("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": name, preserveAspectRatio: "none" });
  const grid = drawn("g", { "aria-hidden": "true" });
  const area = drawn("path", { class: "area" });
  const paths = lines.map((line) => drawn("path", { class: `line${line.dashed ? " dashed" : ""}${line.thick ? " thick" : ""}`, "data-tone": line.tone }));
  const cursor = drawn("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  svg.append(grid, area, ...paths, cursor);
  const values = lines.map(() => element("b"));
  const swatch = (line) => drawn("svg", { viewBox: "0 0 22 8", "aria-hidden": "true", "data-tone": line.tone }, drawn("path", { d: "M0 4H22", class: `line${line.dashed ? " dashed" : ""}` }));
  const legend = element("ul", { class: "legend" }, ...lines.map((line, index) => element("li", {}, swatch(line), `${line.label} `, values[index])));
  const bandText = element("b");
  if (band) legend.append(element("li", {}, element("span", { class: "band", "aria-hidden": "true" }), `${band.label} `, bandText));
  host.append(svg, legend);

  let samples = [], pointed = null, scale = null;
  const fit = () => {
    // The drawing keeps its pixels, so that text is not stretched.
    const width = Math.max(240, host.clientWidth || WIDTH);
    svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    return width;
  };
  const readout = () => {
    const sample = samples[pointed ?? samples.length - 1];
    lines.forEach((line, index) => setText(values[index], sample ? line.format(sample[line.key]) : "–"));
    if (band) setText(bandText, sample && finite(sample[band.lower]) ? `${count(sample[band.lower])} to ${count(sample[band.upper])}` : "–");
    cursor.setAttribute("visibility", pointed === null ? "hidden" : "visible");
    if (pointed !== null && scale) {
      cursor.setAttribute("x1", scale.x(pointed));
      cursor.setAttribute("x2", scale.x(pointed));
    }
  };
  svg.addEventListener("pointermove", (event) => {
    if (!scale || samples.length < 2) return;
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * scale.width;
    pointed = Math.max(0, Math.min(samples.length - 1, Math.round(scale.index(x))));
    readout();
  });
  svg.addEventListener("pointerleave", () => { pointed = null; readout(); });

  return (history) => {
    samples = history;
    const width = fit();
    const keys = [...lines.map((line) => line.key), ...(band ? [band.lower, band.upper] : [])];
    const top = niceTop(Math.max(0, ...history.flatMap((sample) => keys.map((key) => (finite(sample[key]) ? sample[key] : 0)))));
    const span = Math.max(1, history.length - 1);
    const x = (index) => LEFT + (index / span) * (width - LEFT - RIGHT);
    const y = (value) => HEIGHT - BOTTOM - (value / top) * (HEIGHT - BOTTOM - TOP);
    scale = { x, width, index: (pixel) => ((pixel - LEFT) / (width - LEFT - RIGHT)) * span };
    drawGrid(grid, history, top, width, x, y, lines[0].axis);
    lines.forEach((line, index) => paths[index].setAttribute("d", lineOf(history, line.key, x, y)));
    area.setAttribute("d", band ? bandOf(history, band, x, y) : "");
    if (pointed !== null && pointed >= history.length) pointed = null;
    readout();
    const last = history[history.length - 1];
    svg.setAttribute("aria-label", `${name}. Now: ${lines.map((line) => `${line.label} ${line.format(last[line.key])}`).join(", ")}.`);
  };
}

function niceTop(most) {
  if (!(most > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(most));
  return [1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10].map((step) => step * power).find((top) => top >= most * 1.05) ?? 20 * power;
}

function lineOf(history, key, x, y) {
  let path = "", pen = "M";
  history.forEach((sample, index) => {
    if (!finite(sample[key])) { pen = "M"; return; }
    path += `${pen}${x(index).toFixed(1)} ${y(sample[key]).toFixed(1)}`;
    pen = "L";
  });
  return path;
}

function bandOf(history, band, x, y) {
  const runs = [];
  history.forEach((sample, index) => {
    if (!finite(sample[band.lower]) || !finite(sample[band.upper])) { runs.push([]); return; }
    if (!runs.length) runs.push([]);
    runs[runs.length - 1].push([x(index), y(sample[band.lower]), y(sample[band.upper])]);
  });
  return runs.filter((run) => run.length > 1).map((run) => {
    const upper = run.map(([px, , high]) => `${px.toFixed(1)} ${high.toFixed(1)}`).join("L");
    const lower = run.toReversed().map(([px, low]) => `${px.toFixed(1)} ${low.toFixed(1)}`).join("L");
    return `M${upper}L${lower}Z`;
  }).join("");
}

function drawGrid(grid, history, top, width, x, y, axis) {
  const parts = [];
  for (let step = 0; step <= 4; step += 1) {
    const value = (top * step) / 4;
    parts.push(drawn("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) }));
    parts.push(drawn("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, axis(value)));
  }
  const ticks = Math.max(2, Math.min(5, Math.floor(width / 110)));
  for (let tick = 0; history.length > 1 && tick < ticks; tick += 1) {
    const index = Math.round((tick * (history.length - 1)) / (ticks - 1));
    const anchor = tick === 0 ? "start" : tick === ticks - 1 ? "end" : "middle";
    const short = history[history.length - 1].time - history[0].time < 900_000;
    parts.push(drawn("text", { x: x(index), y: HEIGHT - 6, "text-anchor": anchor }, clock(history[index].time, short)));
  }
  grid.replaceChildren(...parts);
}

const compact = (value) => value.toLocaleString("en-US", { notation: "compact", maximumSignificantDigits: 3 });
const dollars = (value) => "$" + (value > 0 && value < 0.01 ? value.toPrecision(1) : compact(value));

// ---- pools

function poolView(name) {
  const made = at("pool").content.cloneNode(true).firstElementChild;
  const part = (key) => made.querySelector(`[data-${key}]`);
  const id = `pool-${state.pools.size}`;
  made.setAttribute("aria-labelledby", id);
  part("name").id = id;
  const rate = { format: (value) => `${count(value)}`, axis: compact };
  const money = { format: (value) => `${usd(value)}`, axis: dollars };
  const view = {
    node: made, part, history: [], pins: made.querySelector(".pins"), apiName: "API",
    drawVolume: chart(part("volume"), `Volume of ${name} against break-even`, [
      { key: "volume", label: "volume", tone: "mix", thick: true, ...rate },
      { key: "even", label: "break-even", tone: "even", dashed: true, ...rate },
    ], { label: "band", lower: "down", upper: "up" }),
    drawCost: chart(part("cost"), `Cost per hour of ${name}`, [
      { key: "mix", label: "cheapest mix", tone: "mix", thick: true, ...money },
      { key: "api", label: "API alone", tone: "api", dashed: true, ...money },
      { key: "own", label: "self-hosted alone", tone: "own", dashed: true, ...money },
    ]),
  };
  view.pins.setAttribute("aria-label", `Pin ${name}`);
  at("pools").append(made);
  return view;
}

function remember(view, pool, now, gap) {
  const number = (value) => (finite(value) ? Number(value) : null);
  if (gap && view.history.length) view.history.push({ time: now });
  view.history.push({
    time: now, volume: number(pool.volume_requests_per_hour), even: number(pool.break_even_requests_per_hour),
    up: number(pool.band?.up), down: number(pool.band?.down),
    api: number(pool.api_usd_per_hour), own: number(pool.self_hosted_usd_per_hour), mix: number(pool.mix_usd_per_hour),
  });
  if (view.history.length > HISTORY) view.history = view.history.filter((_, index) => index % 2 === 1);
}

function showPool(view, pool) {
  const self = pool.preferred !== pool.api_backend;
  const shown = view.part;
  setText(shown("name"), `Pool ${pool.name}`);
  setText(shown("preferred"), pool.preferred);
  shown("preferred").dataset.tone = self ? "own" : "api";
  setText(shown("verdict"), pool.pinned ? "is pinned by hand" : self ? "serves: self-hosting costs less" : "serves: the API costs less");
  if (!pool.pinned && pool.reason !== "cheapest") setText(shown("verdict"), `is preferred (${words(pool.reason)})`);
  setText(shown("sentence"), sentence(pool));
  const { replicas = {} } = pool;
  const ratio = finite(pool.break_even_requests_per_hour) && pool.break_even_requests_per_hour > 0
    ? `${Math.round((100 * pool.volume_requests_per_hour) / pool.break_even_requests_per_hour)}%` : "–";
  const pays = pool.billing === "per_use" && pool.kappa >= 1 ? "always" : "never";
  showTiles(shown("facts"), [
    ["Volume", `${count(pool.volume_requests_per_hour)}/h`, "mix"],
    ["Break-even", finite(pool.break_even_requests_per_hour) ? `${count(pool.break_even_requests_per_hour)}/h` : pays, "even"],
    ["Volume of break-even", ratio],
    ["Replicas", `${count(replicas.ready)} ready${replicas.starting ? `, ${count(replicas.starting)} starting` : ""}`],
    ["Wanted", `${count(replicas.wanted)}, at most ${count(replicas.max)}`],
    ["Rent of a replica", `${usd(pool.rent_usd_per_hour)}/h`],
    ["Billing", words(pool.billing)],
  ]);
  showPins(view, pool);
  view.drawVolume(view.history);
  view.drawCost(view.history);
}

// The proxy's sentence, without the words that the line above it has said.
function sentence(pool) {
  const text = (pool.sentence ?? "").replaceAll("`", "").replace(`${pool.preferred} serves: `, "");
  return text.charAt(0).toUpperCase() + text.slice(1);
}

function showPins(view, pool) {
  const choices = [pool.api_backend, pool.name].filter(Boolean);
  const shape = [...choices, pool.pinned].join("|");
  if (view.pins.dataset.shape === shape) return;
  const focused = view.pins.contains(document.activeElement);
  view.pins.dataset.shape = shape;
  const buttons = choices.map((backend) => {
    const button = element("button", { type: "button", "aria-pressed": String(pool.pinned === backend), "data-tone": backend === pool.name ? "own" : "api" }, `Pin ${backend}`);
    button.addEventListener("click", () => askToPin(pool.name, backend));
    return button;
  });
  if (pool.pinned) {
    const unpin = element("button", { type: "button" }, "Unpin");
    unpin.addEventListener("click", () => askToUnpin(pool.name));
    buttons.push(unpin);
  }
  view.pins.replaceChildren(...buttons);
  if (focused) buttons[buttons.length - 1].focus();
}

// ---- the rest of the page

function showStatus(status, gap) {
  state.status = status;
  at("waiting").hidden = true;
  at("live").hidden = false;
  setText(at("version"), status.version ?? "");
  at("draining").hidden = !status.draining;
  const ledger = at("ledger");
  ledger.hidden = status.ledger?.available !== false;
  ledger.dataset.state = "bad";
  setText(ledger, "ledger unavailable");
  showToday(status.spend?.today ?? {});
  const pools = status.pools ?? [];
  at("no-pools").hidden = pools.length > 0;
  for (const pool of pools) {
    if (!state.pools.has(pool.name)) state.pools.set(pool.name, poolView(pool.name));
    const view = state.pools.get(pool.name);
    remember(view, pool, status.now_ms, gap);
    showPool(view, pool);
    const before = state.preferred.get(pool.name);
    if (before && before !== pool.preferred) announce(`Pool ${pool.name} now prefers ${pool.preferred}.`);
    state.preferred.set(pool.name, pool.preferred);
  }
  for (const [name, view] of state.pools) {
    if (!pools.some((pool) => pool.name === name)) { view.node.remove(); state.pools.delete(name); }
  }
  showBackends(status.backends ?? []);
  for (const call of (status.recent ?? []).toReversed()) keepCall(call);
  showCalls();
}

function showToday(today) {
  const saved = Number(today.net_savings_usd ?? 0);
  showTiles(at("today"), [
    ["Spent", usd(today.cost_usd)],
    ["API alone", usd(today.all_api_usd), "api"],
    [saved < 0 ? "Lost against the API" : "Saved against the API", usd(Math.abs(saved)), saved < 0 ? "loss" : "gain"],
    ["Rent", usd(today.rent_usd)],
    ["Idle rent", usd(today.idle_usd), Number(today.idle_usd) > 0 ? "idle" : ""],
    ["Requests", count(today.requests)],
  ]);
}

function showBackends(backends) {
  const body = at("backends");
  while (body.children.length > backends.length) body.lastChild.remove();
  backends.forEach((backend, index) => {
    if (!body.children[index]) {
      body.append(element("tr", {}, element("th", { scope: "row" }, element("span", { class: "dot" })), element("td"), element("td"), element("td"), element("td", { class: "number" }), element("td", { class: "number" })));
    }
    const [name, kind, health, circuit, flying, requests] = body.children[index].children;
    setText(name.firstChild, backend.name);
    name.firstChild.dataset.tone = backend.kind === "api" ? "api" : "own";
    setText(kind, backend.kind === "api" ? "API" : "self-hosted");
    // A self-hosted backend of which no replica is wanted is off, and nothing is wrong with it.
    const off = !backend.healthy && state.status.pools.some((pool) => pool.name === backend.name && pool.replicas?.wanted === 0);
    setText(health, backend.healthy ? "healthy" : off ? "off" : "down");
    health.dataset.tone = backend.healthy ? "gain" : off ? "" : "loss";
    setText(circuit, words(backend.circuit));
    circuit.dataset.tone = backend.circuit === "closed" ? "" : "loss";
    setText(flying, count(backend.in_flight));
    setText(requests, count(backend.requests_total));
  });
}

function keepCall(call) {
  state.calls.delete(call.id);
  state.calls.set(call.id, call);
  for (const id of state.calls.keys()) {
    if (state.calls.size <= CALLS_KEPT) break;
    state.calls.delete(id);
  }
}

function showCalls() {
  if (state.paused) return;
  const calls = [...state.calls.values()].sort((one, other) => other.at_ms - one.at_ms).slice(0, CALLS_SHOWN);
  at("no-calls").hidden = calls.length > 0;
  at("calls").replaceChildren(...calls.map((call) => {
    const pool = state.pools.has(call.backend);
    const bad = call.outcome !== "success";
    const cell = (label, text, attributes = {}) => element("td", { "data-label": label, ...attributes }, text);
    return element("tr", {},
      cell(undefined, clock(call.at_ms, true)),
      cell(undefined, call.model),
      cell(undefined, call.backend, { "data-tone": pool ? "own" : "api" }),
      cell(undefined, words(call.reason)),
      cell(undefined, bad ? `${call.status} ${words(call.outcome)}` : `${call.status}${call.stream ? " stream" : ""}`, bad ? { "data-tone": "loss" } : {}),
      cell("in", count(call.input_tokens), { class: "number" }),
      cell("out", count(call.output_tokens), { class: "number" }),
      cell(undefined, usd(call.cost_usd), { class: "number" }),
      cell(undefined, took(call.duration_ms), { class: "number" }));
  }));
}

at("pause").addEventListener("click", () => {
  state.paused = !state.paused;
  at("pause").setAttribute("aria-pressed", String(state.paused));
  setText(at("pause"), state.paused ? "Continue" : "Pause");
  showCalls();
});

// ---- pinning

function askToPin(pool, backend) {
  ask(`Pin ${pool} to ${backend}?`,
    `All calls of pool ${pool} will go to ${backend} while it can take them, whatever it costs, until you unpin it.`,
    `Pin ${backend}`, "api/pin", { pool, backend }, `Pool ${pool} is pinned to ${backend}.`);
}

function askToUnpin(pool) {
  ask(`Unpin ${pool}?`, `The policy decides again which backend pool ${pool} prefers.`, "Unpin", "api/unpin", { pool }, `Pool ${pool} is no longer pinned.`);
}

function ask(title, text, yes, path, body, done) {
  const dialog = at("confirm");
  setText(at("confirm-title"), title);
  setText(at("confirm-text"), text);
  setText(at("confirm-yes"), yes);
  at("confirm-error").hidden = true;
  at("confirm-no").onclick = () => dialog.close();
  at("confirm-yes").onclick = async () => {
    at("confirm-yes").disabled = true;
    const problem = await post(path, body);
    at("confirm-yes").disabled = false;
    at("confirm-error").hidden = !problem;
    setText(at("confirm-error"), problem ?? "");
    if (!problem) { dialog.close(); announce(done); }
  };
  dialog.showModal();
}

async function post(path, body) {
  try {
    const answer = await fetch(path, { method: "POST", headers: { ...credentials(), "content-type": "application/json" }, body: JSON.stringify(body) });
    if (answer.ok) return null;
    const said = await answer.json().catch(() => ({}));
    return said.error?.message ?? `The proxy answered ${answer.status}.`;
  } catch {
    return "The proxy did not answer.";
  }
}

// ---- the stream of events

// A link may carry the token (`/?token=..`); it goes where this tab keeps it, and out of the address.
const given = new URLSearchParams(location.search).get("token");
if (given) {
  sessionStorage.setItem("token", given);
  history.replaceState(null, "", location.pathname);
}
const credentials = () => (sessionStorage.getItem("token") ? { authorization: `Bearer ${sessionStorage.getItem("token")}` } : {});

function showLink(kind, text) {
  if (at("link").dataset.state === kind) return;
  at("link").dataset.state = kind;
  setText(at("link"), text);
  at("live").classList.toggle("stale", kind === "lost");
  if (kind === "lost") announce("Connection to the proxy lost, trying again.");
}

function askForToken() {
  const dialog = at("login");
  return new Promise((resolve) => {
    at("login-yes").onclick = () => { sessionStorage.setItem("token", at("token").value); at("token").value = ""; dialog.close(); };
    at("token").onkeydown = (event) => { if (event.key === "Enter") at("login-yes").click(); };
    dialog.onclose = resolve;
    dialog.showModal();
  });
}

function hear(kind, data) {
  if (kind === "call") {
    for (const call of [JSON.parse(data)].flat()) keepCall(call);
  } else if (kind === "status") {
    const gap = at("link").dataset.state === "lost";
    showStatus(JSON.parse(data), gap);
    showLink("live", "live");
  }
}

// Reads one connection until it ends or falls silent. Not EventSource, which cannot send a token.
async function listen() {
  const hangUp = new AbortController();
  let silence = setTimeout(() => hangUp.abort(), SILENCE_MS);
  try {
    const answer = await fetch("api/events", { headers: { ...credentials(), accept: "text/event-stream" }, signal: hangUp.signal, cache: "no-store" });
    if (answer.status === 401 || answer.status === 403) { clearTimeout(silence); await askForToken(); return; }
    if (!answer.ok) return;
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      clearTimeout(silence);
      silence = setTimeout(() => hangUp.abort(), SILENCE_MS);
      const frames = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
      rest = frames.pop();
      for (const frame of frames) {
        const fields = (name) => frame.split("\n").filter((line) => line.startsWith(`${name}:`)).map((line) => line.slice(name.length + 1).replace(/^ /, ""));
        const data = fields("data").join("\n");
        if (data) hear(fields("event")[0] ?? "message", data);
      }
    }
  } catch {
    // The proxy is away; the caller says so and tries again.
  } finally {
    clearTimeout(silence);
    hangUp.abort();
  }
}

for (let failures = 0; ; ) {
  const before = state.status;
  await listen();
  failures = state.status === before ? failures + 1 : 0;
  showLink("lost", "reconnecting");
  await new Promise((resolve) => setTimeout(resolve, RETRY_MS[Math.min(failures, RETRY_MS.length - 1)]));
}
