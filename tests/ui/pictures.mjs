// node pictures.mjs ADMIN_URL FOLDER: pictures of the live page when enough of the day has passed to see both sides.
import path from "node:path";

import { chromium } from "playwright-core";

const [url, folder] = process.argv.slice(2);
const SHARE_OF_DAY = 0.8;
const LOOKS = {
  "page-light": { colorScheme: "light", viewport: { width: 1280, height: 1200 } },
  "page-dark": { colorScheme: "dark", viewport: { width: 1280, height: 1200 } },
  "page-phone": { colorScheme: "light", viewport: { width: 390, height: 844 }, deviceScaleFactor: 2 },
};

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
});
try {
  const pages = await Promise.all(Object.entries(LOOKS).map(async ([name, look]) => {
    const page = await browser.newPage(look);
    await page.goto(`${url}/`);
    await page.locator("#link[data-state=live]").waitFor();
    return [name, page];
  }));
  for (;;) {
    const status = await (await fetch(`${url}/api/status`)).json();
    if ((status.now_ms % 86_400_000) / 86_400_000 > SHARE_OF_DAY) break;
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
  for (const [name, page] of pages) {
    const phone = name === "page-phone" ? { fullPage: true, clip: { x: 0, y: 0, width: 390, height: 1900 } } : {};
    await page.screenshot({ path: path.join(folder, `${name}.png`), ...phone });
  }
} finally {
  await browser.close();
}
