// The live page in a real browser, against a real proxy.
import assert from "node:assert/strict";
import fs from "node:fs";
import { createRequire } from "node:module";
import { after, before, beforeEach, test } from "node:test";

import { chromium } from "playwright-core";

import { Proxy, until } from "./proxy.mjs";

const axe = fs.readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const LAUNCH = {
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
};

let browser, proxy;
before(async () => {
  browser = await chromium.launch(LAUNCH);
  proxy = await Proxy.open();
});
after(async () => {
  await browser?.close();
  await proxy?.close();
});
beforeEach(async () => {
  await fetch(`${proxy.admin}/api/unpin`, { method: "POST", body: JSON.stringify({ pool: "gpu" }) });
});

// Opens the page; `page.faults` collects what must not happen.
async function open(options = {}, url = proxy.admin) {
  const page = await browser.newPage({ viewport: { width: 1280, height: 900 }, ...options });
  page.faults = [];
  page.on("pageerror", (error) => page.faults.push(String(error)));
  page.on("console", (message) => message.type() === "error" && page.faults.push(message.text()));
  page.on("request", (request) => new URL(request.url()).origin === url || page.faults.push(`asked ${request.url()}`));
  page.on("dialog", (dialog) => page.faults.push(`dialog: ${dialog.message()}`));
  await page.goto(`${url}/`);
  return page;
}

const isLive = (page) => page.locator("#link[data-state=live]").waitFor();
const tile = (page, label) => page.locator("dt", { hasText: new RegExp(`^${label}$`) }).locator("xpath=following-sibling::dd").first().innerText();

test("values change as traffic does, without an error or a request to another host", async () => {
  const page = await open();
  await isLive(page);
  const requests = Number((await tile(page, "Requests")).replaceAll(",", ""));
  for (let n = 0; n < 20; n += 1) assert.equal((await proxy.call()).status, 200);
  await until("the count of requests", async () => Number((await tile(page, "Requests")).replaceAll(",", "")) >= requests + 20);
  await until("the volume", async () => !(await tile(page, "Volume")).startsWith("0/"));
  const row = page.locator("#calls tr").first();
  assert.match(await row.innerText(), /gpt-4o-mini[\s\S]*openai|gpu/);
  assert.match(await row.innerText(), /\$0\.0/);
  const path = page.locator("[data-volume] path.line").first();
  const drawn = await path.getAttribute("d");
  await until("the line to grow", async () => (await path.getAttribute("d")) !== drawn);
  assert.notEqual(await page.locator("[data-sentence]").innerText(), "");
  assert.deepEqual(page.faults, []);
  await page.close();
});

test("a pin is asked for, cancelled, given and taken back, by keyboard alone", async () => {
  const page = await open();
  await isLive(page);
  await page.getByRole("button", { name: "Pin gpu" }).focus();
  await page.keyboard.press("Enter");
  assert.match(await page.locator("#confirm").innerText(), /Pin gpu to gpu\?/);
  await page.keyboard.press("Escape");
  assert.equal(await page.locator("#confirm").isVisible(), false);
  assert.notEqual((await proxy.call()).headers.get("x-breakeven-reason"), "pinned");

  await page.keyboard.press("Enter");
  await page.locator("#confirm-yes").focus();
  await page.keyboard.press("Enter");
  // The dialog's own button reads "Unpin" too while it asks: look in the pool's row alone.
  const unpin = page.getByRole("group", { name: "Pin gpu" }).getByRole("button", { name: "Unpin" });
  await unpin.waitFor();
  assert.equal(await page.getByRole("button", { name: "Pin gpu" }).getAttribute("aria-pressed"), "true");
  const pinned = await proxy.call();
  assert.equal(pinned.headers.get("x-breakeven-backend"), "gpu");
  assert.equal(pinned.headers.get("x-breakeven-reason"), "pinned");

  await unpin.click();
  await page.locator("#confirm-yes").click();
  await unpin.waitFor({ state: "detached" });
  assert.notEqual((await proxy.call()).headers.get("x-breakeven-reason"), "pinned");
  assert.deepEqual(page.faults, []);
  await page.close();
});

test("it survives a restart of the proxy, and keeps its history", async () => {
  const page = await open();
  await isLive(page);
  await until("some history", async () => ((await page.locator("[data-volume] path.line").first().getAttribute("d")) ?? "").split("L").length > 2);
  await proxy.stop();
  await page.locator("#link[data-state=lost]").waitFor();
  assert.equal(await page.locator("#announcer").innerText(), "Connection to the proxy lost, trying again.");
  await proxy.start();
  await isLive(page);
  const moves = async () => ((await page.locator("[data-volume] path.line").first().getAttribute("d")) ?? "").split("M").length - 1;
  assert.equal(await moves(), 2, "the line has a gap where the proxy was away");
  await proxy.call();
  const faults = page.faults.filter((fault) => !/ERR_(CONNECTION_REFUSED|INCOMPLETE_CHUNKED_ENCODING|CONNECTION_RESET|EMPTY_RESPONSE|ABORTED)/.test(fault));
  assert.deepEqual(faults, []);
  await page.close();
});

test("a model's name is text, whatever it is", async () => {
  const page = await open();
  await isLive(page);
  await proxy.call("<img src=x onerror=alert(1)>");
  await page.locator("#calls td", { hasText: "<img src=x onerror=alert(1)>" }).first().waitFor();
  assert.equal(await page.locator("#calls img").count(), 0);
  assert.deepEqual(page.faults, []);
  await page.close();
});

test("paused calls stay as they are", async () => {
  const page = await open();
  await isLive(page);
  await proxy.call("before");
  await page.locator("#calls td", { hasText: "before" }).first().waitFor();
  await page.getByRole("button", { name: "Pause" }).click();
  await proxy.call("meanwhile");
  const version = await page.locator("[data-volume] path.line").first().getAttribute("d");
  await until("two more events", async () => (await page.locator("[data-volume] path.line").first().getAttribute("d")) !== version);
  assert.equal(await page.locator("#calls td", { hasText: "meanwhile" }).count(), 0);
  await page.getByRole("button", { name: "Continue" }).click();
  await page.locator("#calls td", { hasText: "meanwhile" }).first().waitFor();
  await page.close();
});

for (const [name, options] of Object.entries({
  light: { colorScheme: "light" },
  dark: { colorScheme: "dark" },
  phone: { colorScheme: "light", viewport: { width: 390, height: 844 } },
})) {
  test(`it is accessible and fits: ${name}`, async () => {
    const page = await open(options);
    await isLive(page);
    await proxy.call();
    await page.locator("#calls tr").first().waitFor();
    const wide = await page.evaluate(() => document.documentElement.scrollWidth > document.documentElement.clientWidth);
    assert.equal(wide, false, "the page does not scroll sideways");
    await page.evaluate(axe);
    const found = async () => (await page.evaluate(() => globalThis.axe.run())).violations.map((v) => `${v.impact} ${v.id}: ${v.nodes.map((node) => node.html).join(" ").slice(0, 300)}`);
    assert.deepEqual(await found(), []);
    await page.getByRole("button", { name: "Pin gpu" }).click();
    assert.deepEqual(await found(), [], "with the dialog open");
    await page.close();
  });
}

test("with an admin token the page asks for it, and keeps asking until it is right", async () => {
  const guarded = await Proxy.open("a-token-of-this-test");
  try {
    const page = await open({}, guarded.admin);
    await page.locator("#login").waitFor();
    await page.locator("#token").fill("wrong");
    await page.keyboard.press("Enter");
    await until("the question again", async () => (await page.locator("#login").isVisible()) && (await page.locator("#token").inputValue()) === "");
    await page.locator("#token").fill("a-token-of-this-test");
    await page.keyboard.press("Enter");
    await isLive(page);
    await page.getByRole("button", { name: "Pin gpu" }).click();
    await page.locator("#confirm-yes").click();
    await page.getByRole("button", { name: "Unpin" }).waitFor();
    const faults = page.faults.filter((fault) => !fault.includes("401"));
    assert.deepEqual(faults, []);
    await page.close();

    const linked = await browser.newPage();
    await linked.goto(`${guarded.admin}/?token=a-token-of-this-test`);
    await isLive(linked);
    assert.equal(linked.url(), `${guarded.admin}/`);
    await linked.close();
  } finally {
    await guarded.close();
  }
});
