// The page in a real browser: node tests/browser.mjs ADDRESS FOLDER, which gets the screenshots.
import assert from "node:assert/strict";
import { writeFile } from "node:fs/promises";
import { createRequire } from "node:module";

const [address, folder] = process.argv.slice(2);
const { chromium } = createRequire(`${process.cwd()}/runs/browser/package.json`)("playwright-core");
const executablePath = process.env.CHROMIUM || "/usr/bin/chromium";
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"] });
const page = await browser.newPage({ viewport: { width: 1200, height: 850 } });
page.setDefaultTimeout(40_000);
const errors = [];
page.on("pageerror", (error) => errors.push(String(error)));
page.on("console", (message) => { if (message.type() === "error") errors.push(message.text()); });

const field = (name) => page.getByLabel(name, { exact: true });
const make = () => page.getByRole("button", { name: "Make pictures" }).click();
const status = (pattern) => page.waitForFunction(
  (source) => new RegExp(source).test(document.querySelector("#status").textContent), pattern);
const screenshot = (name) => page.screenshot({ path: `${folder}/${name}.png` });

await page.goto(address);
await page.waitForSelector("body[data-ready]");

// A prompt becomes pictures; the same seed becomes the same pictures.
await field("Prompt").fill("red circle");
await field("Seed").fill("1");
await field("Images").fill("2");
await make();
await status("^2 pictures");
const bytes = () => page.evaluate(() => {
  const image = document.querySelector("figure img");
  const canvas = Object.assign(document.createElement("canvas"), { width: image.naturalWidth, height: image.naturalHeight });
  canvas.getContext("2d").drawImage(image, 0, 0);
  return canvas.toDataURL();
});
const first = await bytes();
await make();
await page.waitForFunction(() => document.querySelectorAll("figure").length === 4);
await status("^2 pictures");
assert.equal(await bytes(), first);
await screenshot("pictures");

// A saved picture gives its settings back.
const [download] = await Promise.all([page.waitForEvent("download"), page.locator("figcaption a").first().click()]);
await download.saveAs(`${folder}/saved.png`);
await field("Prompt").fill("another");
await page.locator("#settings").setInputFiles(`${folder}/saved.png`);
await page.waitForFunction(() => document.querySelector("[name=prompts]").value === "red circle");

// Settings without a control are named, and a seed beyond 53 bits stays what it is.
const seed = "9007199254740993";
const asked = JSON.stringify({ prompts: "red circle", more_prompts: [["blue", 0.5]], seed });
const json = async (path, options) => (await fetch(new URL(path, address), options)).json();
let job = await json("/api/jobs", { method: "POST", body: asked, headers: { "Content-Type": "application/json" } });
while (["waiting", "running"].includes(job.state)) job = await json(`/api/jobs/${job.id}?after=${job.version}`);
const content = await (await fetch(new URL(job.pictures[0], address))).arrayBuffer();
await writeFile(`${folder}/more.png`, Buffer.from(content));
await page.locator("#settings").setInputFiles(`${folder}/more.png`);
await status("^These are the settings of the picture, without: more prompts\\.$");
assert.equal(await field("Seed").inputValue(), seed);
await field("Seed").fill("1");
await field("Images").fill("2");

// A mask is painted; with the keyboard, too.
await page.locator("summary", { hasText: "Change a picture" }).click();
await page.locator("input[name=image]").setInputFiles(`${folder}/saved.png`);
const canvas = page.locator("canvas").first();
await canvas.focus();
for (let i = 0; i < 20; i += 1) await page.keyboard.press("ArrowLeft"); // the cursor stays at the border
await page.keyboard.press("ArrowRight");
await page.keyboard.press("Space");
const requests = [];
page.on("request", (request) => { if (request.url().endsWith("/api/jobs")) requests.push(request.postDataJSON()); });
await make();
await page.waitForFunction(() => document.querySelectorAll("figure").length === 6);
assert.match(requests.at(-1).mask, /^data:image\/png;base64,/);

// Settings of another picture don't take them out of the form, which the page says.
await page.locator("#settings").setInputFiles(`${folder}/saved.png`);
await status("^These are the settings of the picture; still in the form: Picture, Mask\\.$");
await page.getByRole("button", { name: "Remove" }).click();
await page.getByRole("button", { name: "Clear mask" }).click();

// A control net sees a hint.
await page.locator("summary", { hasText: "Control nets" }).click();
await page.locator("input[name=edges]").setInputFiles(`${folder}/saved.png`);
await field("Weight of edges").fill("0.5");
await make();
await page.waitForFunction(() => document.querySelectorAll("figure").length === 8);
const [[name, hint, weight]] = requests.at(-1).controls;
assert.deepEqual([name, hint.slice(0, 22), weight], ["edges", "data:image/png;base64,", 0.5]);
await page.getByRole("button", { name: "Remove" }).last().click();

// A long request shows previews, and is cancelled.
await field("Steps").fill("1000");
await make();
await page.waitForSelector("#preview:not([hidden])").catch(async (error) => { console.log(await page.textContent("#status")); throw error; });
await screenshot("preview");
await page.getByRole("button", { name: "Cancel" }).click();
await status("^Cancelled$");

// What the model refuses is said.
await field("Steps").fill("");
await field("Height").fill("9999");
await page.evaluate(() => { document.querySelector("form").noValidate = true; });
await make();
await status("image_size|9999");
await field("Height").fill("");

// A phone, and the dark.
await page.setViewportSize({ width: 360, height: 760 });
assert.equal(await page.evaluate(() => document.documentElement.scrollWidth), 360);
await screenshot("phone");
await page.emulateMedia({ colorScheme: "dark" });
await screenshot("dark");
assert.deepEqual(errors.filter((text) => !text.includes("400")), []);
await browser.close();
console.log(`the page works; screenshots lie in ${folder}`);
