// The page: controls from the model's description, one request at a time, and a history.

const $ = (id) => document.getElementById(id);
const COMMON = ["sampler", "num_steps", "guidance_scale", "strength", "temperature", "top_k", "top_p"];
const NAMES = {
  prompts: "Prompt", negative_prompts: "Negative prompt", class_labels: "Class", layout: "Layout",
  image: "Picture", mask: "Mask", segmentation: "Map of classes", depth: "Depth", low_res: "Small picture",
  noise_level: "Noise level", sampler: "Sampler", num_steps: "Steps", guidance_scale: "Guidance scale",
  strength: "Strength", aesthetic_score: "Aesthetic score", temperature: "Temperature", seed: "Seed",
  num_images: "Images",
};
const HISTORY = 60; // pictures that stay on the page

let model = null;
let token = sessionStorage.getItem("token") || "";
let job = null;
let sending = false; // a request whose answer hasn't come
const readers = {}; // field -> function that gives its value, or undefined
const writers = {}; // field -> function that shows a value

// ------------------------------------------------------------------------------------------- HTTP

async function ask(path, options = {}) {
  const headers = { ...(token ? { Authorization: `Bearer ${token}` } : {}), ...options.headers };
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) {
    await login();
    return ask(path, options);
  }
  if (!answer.ok) {
    const body = await answer.json().catch(() => ({}));
    throw new Error(body.error?.message || `the server answers ${answer.status}`);
  }
  return answer;
}

function login() {
  const dialog = $("login");
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve, reject) => dialog.addEventListener("close", () => {
    const given = $("token").value;
    $("token").value = ""; // so that Escape doesn't give a wrong token again
    if (!/^[!-~]+$/.test(given)) return reject(new Error("this server needs its token, in ASCII"));
    token = given;
    sessionStorage.setItem("token", token);
    return resolve();
  }, { once: true }));
}

// The JSON of a path; a connection that is lost for some seconds is taken up again.
async function askAgain(path, tries = 5) {
  try {
    return await (await ask(path)).json();
  } catch (error) {
    if (!(error instanceof TypeError) || tries === 0) throw error; // fetch's error without an answer
    await new Promise((resolve) => setTimeout(resolve, 1000));
    return askAgain(path, tries - 1);
  }
}

// --------------------------------------------------------------------------------------- controls

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in node && name !== "list") node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function labelled(name, control, help = "") {
  const text = NAMES[name] || name.replaceAll("_", " ");
  control.name = name;
  if (help) control.title = help;
  return element("label", {}, text, control);
}

function addText(name, parent, rows = 2) {
  const area = element("textarea", { rows, spellcheck: false });
  parent.append(labelled(name, area));
  readers[name] = () => (name === "prompts" || area.value.trim() ? area.value : undefined);
  writers[name] = (value) => { area.value = value ?? ""; };
}

function addNumber(name, parent, attributes = {}, help = "") {
  const input = element("input", { type: "number", step: "any", ...attributes });
  parent.append(labelled(name, input, help));
  readers[name] = () => (input.value === "" ? undefined : Number(input.value));
  writers[name] = (value) => { input.value = value ?? ""; };
  return input;
}

function addOption(option, parent) {
  const { name, kind, many, help, range, choices } = option;
  const hint = `${help}${range ? `, in ${range}` : ""}`;
  const initial = option.default;
  if (choices.length || kind === "bool") {
    const values = choices.length ? choices : ["true", "false"];
    const select = element("select", {}, element("option", { value: "" }, `default${initial === null ? "" : `: ${initial}`}`));
    select.append(...values.map((value) => element("option", { value }, value)));
    parent.append(labelled(name, select, hint));
    readers[name] = () => (select.value === "" ? undefined : kind === "bool" ? select.value === "true" : select.value);
    writers[name] = (value) => { select.value = value === undefined ? "" : String(value); };
  } else if (many || kind === "str") {
    const input = element("input", { type: "text", placeholder: initial === null ? "" : String(initial) });
    parent.append(labelled(name, input, many ? `${hint}; several with commas` : hint));
    readers[name] = () => readList(input.value, kind);
    writers[name] = (value) => { input.value = value === undefined ? "" : String(value); };
  } else {
    addNumber(name, parent, { step: kind === "int" ? "1" : "any", placeholder: initial === null ? "" : String(initial) }, hint);
  }
}

function readList(text, kind) {
  if (text.trim() === "") return undefined;
  if (kind === "str") return text.trim();
  const values = text.split(",").map(Number);
  if (values.some(Number.isNaN)) throw new Error(`${text}: write numbers, with commas between them`);
  return values.length === 1 ? values[0] : values;
}

// A file of a picture, with a button that removes it; returns a function that gives its content.
function pictureField(name, parent, onLoad = () => {}) {
  const input = element("input", { type: "file", accept: "image/*" });
  const clear = element("button", { type: "button" }, "Remove");
  let content;
  const change = async () => {
    const file = input.files[0];
    content = file ? await dataUrl(file) : undefined;
    onLoad(content);
  };
  input.addEventListener("change", change);
  clear.addEventListener("click", () => { input.value = ""; change(); });
  parent.append(element("div", { className: "field" }, labelled(name, input), element("div", { className: "tools" }, clear)));
  return () => content;
}

function addPicture(name, parent, onLoad) {
  readers[name] = pictureField(name, parent, onLoad);
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

// A picture whose holes are painted with the mouse, a finger or, in its middle, the keyboard.
function addMaskedPicture(parent, needed) {
  const [height, width] = model.size;
  const canvas = element("canvas", { width, height, tabIndex: 0 });
  canvas.setAttribute("aria-label", "Paint the part that is made anew. Arrow keys move, space paints.");
  const brush = element("input", { type: "number", min: 1, max: Math.max(height, width), value: Math.ceil(width / 6) });
  const clear = element("button", { type: "button" }, "Clear mask");
  const field = element("details", { open: needed }, element("summary", {}, needed ? "Picture and mask" : "Change a picture"));
  const paint = element("canvas", { width, height }); // the mask itself, white in holes
  let picture = null;
  let painted = false;
  let cursor = [width / 2, height / 2];
  const context = canvas.getContext("2d");
  const mask = paint.getContext("2d");
  // Left, top, width and height of the picture's middle, to which the server crops it.
  const middle = () => {
    const scale = Math.max(width / picture.naturalWidth, height / picture.naturalHeight);
    const sides = [width / scale, height / scale];
    return [(picture.naturalWidth - sides[0]) / 2, (picture.naturalHeight - sides[1]) / 2, ...sides];
  };
  const show = () => {
    context.clearRect(0, 0, width, height);
    if (picture) context.drawImage(picture, ...middle(), 0, 0, width, height);
    context.globalAlpha = 0.6;
    context.drawImage(paint, 0, 0);
    context.globalAlpha = 1;
    if (document.activeElement === canvas) context.strokeRect(cursor[0] - 2, cursor[1] - 2, 4, 4);
  };
  const dab = (x, y) => {
    mask.fillStyle = "#fff";
    mask.beginPath();
    const radius = Number(brush.value) / 2;
    mask.arc(x, y, radius, 0, 7);
    mask.fill();
    painted ||= -radius < x && x < width + radius && -radius < y && y < height + radius;
    show();
  };
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * width, ((event.clientY - box.top) / box.height) * height];
  };
  let down = false;
  canvas.addEventListener("pointerdown", (event) => { down = true; canvas.setPointerCapture(event.pointerId); dab(...at(event)); });
  canvas.addEventListener("pointermove", (event) => { if (down) dab(...at(event)); });
  canvas.addEventListener("pointerup", () => { down = false; });
  canvas.addEventListener("focus", show);
  canvas.addEventListener("blur", show);
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const clip = (value, side) => Math.min(Math.max(value, 0), side);
    if (step) cursor = [clip(cursor[0] + step[0] * width / 16, width), clip(cursor[1] + step[1] * height / 16, height)];
    else if (event.key === " ") dab(...cursor);
    else return;
    event.preventDefault();
    show();
  });
  clear.addEventListener("click", () => { mask.clearRect(0, 0, width, height); painted = false; show(); });
  addPicture("image", field, (url) => {
    picture = null;
    if (!url) return show();
    const loaded = new Image();
    loaded.onload = () => { picture = loaded; show(); };
    loaded.src = url;
  });
  field.append(canvas, element("div", { className: "tools" }, element("label", {}, "Brush", brush), clear));
  parent.append(field);
  readers.mask = () => {
    if (!painted || !picture) return undefined;
    const flat = element("canvas", { width: picture.naturalWidth, height: picture.naturalHeight });
    const drawn = flat.getContext("2d");
    drawn.fillRect(0, 0, flat.width, flat.height);
    drawn.drawImage(paint, ...middle());
    return flat.toDataURL("image/png");
  };
}

// Boxes of classes, drawn with the mouse or typed.
function addLayout(parent) {
  const canvas = element("canvas", { width: 256, height: 256 });
  canvas.setAttribute("aria-label", "Draw boxes here, or type them below.");
  const kind = element("input", { type: "number", min: 0, value: 0 });
  const text = element("textarea", { rows: 3, spellcheck: false });
  const context = canvas.getContext("2d");
  let boxes = [];
  let begin = null;
  const show = (extra) => {
    context.clearRect(0, 0, 256, 256);
    context.font = "14px sans-serif";
    for (const [label, [left, top, right, bottom]] of extra ? [...boxes, extra] : boxes) {
      context.strokeStyle = context.fillStyle = `hsl(${(label * 137) % 360} 70% 50%)`;
      context.strokeRect(left * 256, top * 256, (right - left) * 256, (bottom - top) * 256);
      context.fillText(String(label), left * 256 + 3, top * 256 + 15);
    }
  };
  const write = () => { text.value = boxes.map((box) => JSON.stringify(box)).join("\n"); show(); };
  const read = () => text.value.split("\n").filter((line) => line.trim()).map((line) => JSON.parse(line));
  const at = (event) => {
    const area = canvas.getBoundingClientRect();
    const clip = (value) => Math.round(Math.min(Math.max(value, 0), 1) * 1000) / 1000;
    return [clip((event.clientX - area.left) / area.width), clip((event.clientY - area.top) / area.height)];
  };
  const box = (end) => [Number(kind.value), [Math.min(begin[0], end[0]), Math.min(begin[1], end[1]), Math.max(begin[0], end[0]), Math.max(begin[1], end[1])]];
  canvas.addEventListener("pointerdown", (event) => { begin = at(event); canvas.setPointerCapture(event.pointerId); });
  canvas.addEventListener("pointermove", (event) => { if (begin) show(box(at(event))); });
  canvas.addEventListener("pointerup", (event) => {
    if (!begin) return; // pressed elsewhere
    const made = box(at(event));
    begin = null;
    if (made[1][0] < made[1][2] && made[1][1] < made[1][3]) boxes.push(made);
    write();
  });
  text.addEventListener("change", () => { try { boxes = read(); show(); } catch { status("A box is [class, [left, top, right, bottom]].", true); } });
  const field = element("fieldset", {}, element("legend", {}, "Layout"));
  field.append(canvas, element("div", { className: "tools" }, element("label", {}, "Class of new boxes", kind)), labelled("layout", text));
  parent.append(field);
  readers.layout = () => { try { return read(); } catch { throw new Error("layout: a box is [class, [left, top, right, bottom]]"); } };
  writers.layout = (value) => { boxes = value || []; write(); };
}

function addAdapters(parent) {
  const field = element("fieldset", {}, element("legend", {}, "Adapters"));
  const inputs = model.adapters.map((name) => {
    const input = element("input", { type: "number", step: "0.05", placeholder: "0" });
    field.append(element("label", {}, name, input));
    return [name, input];
  });
  parent.append(field);
  readers.adapters = () => {
    const chosen = inputs.filter(([, input]) => Number(input.value)).map(([name, input]) => [name, Number(input.value)]);
    return chosen.length ? chosen : undefined;
  };
  writers.adapters = (value) => {
    const weights = Object.fromEntries(value || []);
    for (const [name, input] of inputs) input.value = weights[name] ?? "";
  };
}

// Control nets and image prompts: each adapter has a picture and a weight.
function addPictured(name, title, parent) {
  const field = element("details", {}, element("summary", {}, title));
  const entries = model[name].map((adapter) => {
    const read = pictureField(adapter, field);
    const weight = element("input", { type: "number", step: "0.05", value: 1 });
    field.append(element("label", {}, `Weight of ${adapter}`, weight));
    return () => (read() ? [adapter, read(), Number(weight.value)] : undefined);
  });
  parent.append(field);
  readers[name] = () => {
    const chosen = entries.map((read) => read()).filter((entry) => entry);
    return chosen.length ? chosen : undefined;
  };
}

function build() {
  const { conditions, options } = model;
  const parent = $("conditions");
  if (conditions.prompts) addText("prompts", parent, 3);
  if (model.negative_prompts) addText("negative_prompts", parent);
  if (conditions.class_labels) {
    const last = conditions.class_labels.num_classes - 1;
    const input = addNumber("class_labels", parent, { min: 0, max: last, step: 1, value: 0 }, `0 to ${last}`);
    input.required = conditions.class_labels.needed;
  }
  if (conditions.layout) addLayout(parent);
  for (const name of ["segmentation", "low_res", "depth"]) if (conditions[name]) addPicture(name, parent);
  if (conditions.noise_level) addNumber("noise_level", parent, { min: 0, step: 1 });
  if (conditions.aesthetic_score) addNumber("aesthetic_score", parent);
  if (model.changes_pictures) addMaskedPicture(parent, Boolean(conditions.mask));
  else if (conditions.image) addPicture("image", parent);
  if (model.adapters.length) addAdapters(parent);
  if (model.controls.length) addPictured("controls", "Control nets", parent);
  if (model.image_prompts.length) addPictured("image_prompts", "Image prompts", parent);

  const common = $("common");
  for (const name of COMMON) {
    const option = options.find((entry) => entry.name === name);
    if (option && (name !== "strength" || model.changes_pictures)) addOption(option, common);
  }
  const seed = addNumber("seed", common, { min: 0, step: 1, placeholder: "random" });
  const number = readers.seed; // of 53 bits; a larger seed goes as text both ways
  readers.seed = () => (seed.value === "" || Number.isSafeInteger(number()) ? number() : seed.value);
  addNumber("num_images", common, { min: 1, max: model.limits.max_images, step: 1, value: 1 });
  const sides = { min: model.factor, step: model.factor };
  const height = element("input", { type: "number", placeholder: String(model.size[0]), ...sides });
  const width = element("input", { type: "number", placeholder: String(model.size[1]), ...sides });
  common.append(element("label", {}, "Height", height), element("label", {}, "Width", width));
  readers.image_size = () => (height.value || width.value ? [Number(height.value || model.size[0]), Number(width.value || model.size[1])] : undefined);
  writers.image_size = (value) => { [height.value, width.value] = value || ["", ""]; };
  for (const option of options) if (!(option.name in readers) && option.name !== "strength") addOption(option, $("options"));
}

// --------------------------------------------------------------------------------------- requests

function status(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

function settings() {
  const request = {};
  for (const [name, read] of Object.entries(readers)) {
    const value = read();
    if (value !== undefined) request[name] = value;
  }
  return request;
}

// Whether the control of a setting, if there is one, says the same.
function isShown(name, value) {
  if (value == null || value === "") return true;
  const plain = (given) => {
    if (name === "adapters") return JSON.stringify((given || []).filter((pair) => pair[1] !== 0).sort());
    if (Array.isArray(given) && given.length === 1) return plain(given[0]);
    return JSON.stringify(typeof given === "string" ? given.replaceAll("\r\n", "\n") : given);
  };
  try {
    return name in readers && plain(readers[name]()) === plain(value);
  } catch {
    return false; // what the control has isn't valid
  }
}

// Shows the settings of a picture, says which of them the page can't show, and which pictures of
// the form, which a PNG doesn't carry, stay in it.
function show(request) {
  const names = (list) => list.map((name) => NAMES[name] || name.replaceAll("_", " ")).join(", ");
  for (const [name, write] of Object.entries(writers)) write(request[name]);
  const lost = Object.keys(request).filter((name) => !isShown(name, request[name]));
  const stay = Object.keys(readers).filter((name) => !(name in writers || name in request) && readers[name]() !== undefined);
  const without = lost.length ? `, without: ${names(lost)}` : "";
  const beside = stay.length ? `; still in the form: ${names(stay)}` : "";
  status(`These are the settings of the picture${without}${beside}.`, lost.length + stay.length > 0);
}

async function make(event) {
  event.preventDefault();
  if (job || sending) return;
  let request;
  sending = true;
  status("Sending …");
  try {
    request = settings();
    const body = JSON.stringify(request);
    job = await (await ask("/api/jobs", { method: "POST", body, headers: { "Content-Type": "application/json" } })).json();
  } catch (error) {
    job = null;
    return status(error.message, true);
  } finally {
    sending = false;
  }
  $("go").disabled = true;
  $("cancel").disabled = false;
  $("now").hidden = false;
  const steps = request.num_steps || model.options.find((option) => option.name === "num_steps")?.default;
  try {
    while (!["done", "failed", "cancelled"].includes(job.state)) {
      job = await askAgain(`/api/jobs/${job.id}?after=${job.version}`);
      const share = steps ? Math.min(job.evaluations / steps, 1) : undefined;
      if (job.state === "running" && share !== undefined) $("progress").value = share;
      else $("progress").removeAttribute("value");
      if (job.preview) { $("preview").src = `data:image/png;base64,${job.preview}`; $("preview").hidden = false; }
      status(job.state === "waiting" ? "Waiting for other requests …" : job.evaluations ? `Evaluation ${job.evaluations}` : "Starting …");
    }
    if (job.state === "failed") throw new Error(job.error);
    if (job.state === "done") {
      for (const path of job.pictures) await remember(path, { ...request, seed: job.seed });
      status(`${job.pictures.length} picture${job.pictures.length > 1 ? "s" : ""} in ${job.seconds.toFixed(1)} s, seed ${job.seed}`);
    } else status("Cancelled");
  } catch (error) {
    status(error.message, true);
  } finally {
    job = null;
    $("go").disabled = false;
    $("cancel").disabled = true;
    $("now").hidden = $("preview").hidden = true;
  }
}

async function remember(path, request) {
  const url = URL.createObjectURL(await (await ask(path)).blob());
  const again = element("button", { type: "button" }, "Use its settings");
  again.addEventListener("click", () => show(request));
  const text = request.prompts || "";
  const caption = element("figcaption", {}, `${text}${text ? ", " : ""}seed ${request.seed} `, again,
    element("a", { href: url, download: `${request.seed}-${path.split("/").pop()}` }, "Save"));
  $("history").prepend(element("figure", {}, element("img", { src: url, alt: text || `Picture of seed ${request.seed}` }), caption));
  for (const old of [...$("history").children].slice(HISTORY)) {
    URL.revokeObjectURL(old.querySelector("img").src);
    old.remove();
  }
}

async function readSettings(file) {
  try {
    show(await (await ask("/api/settings", { method: "POST", body: file })).json());
  } catch (error) {
    status(error.message, true);
  }
}

$("form").addEventListener("submit", make);
$("cancel").addEventListener("click", () => { if (job) ask(`/api/jobs/${job.id}`, { method: "DELETE" }).catch(() => {}); });
$("settings").addEventListener("change", (event) => { if (event.target.files[0]) readSettings(event.target.files[0]); });
document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
document.addEventListener("dragleave", () => document.body.classList.remove("dropping"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  if (event.dataTransfer.files[0]) readSettings(event.dataTransfer.files[0]);
});

try {
  model = await (await ask("/api/model")).json();
  $("model").textContent = `${model.name}, ${model.size[1]}×${model.size[0]} pixels`;
  build();
  document.body.dataset.ready = "true";
} catch (error) {
  status(error.message, true);
}
