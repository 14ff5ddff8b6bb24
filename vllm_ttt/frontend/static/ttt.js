
// The page asks /v1/ttt once a second while it can be seen, and draws what has changed. Names come from people: they only ever
// become text. The key is kept by the tab, in sessionStorage, and travels in a header.

const $ = (id) => document.getElementById(id);
const STORE = "vllm-ttt-key";
const PERIOD = 1000;  // ms between two looks, if the server answers quickly
const LONGEST = 5000;  // and if it does not
const FIRST = 24;     // cards that are shown before somebody asks for more
const AT_ONCE = 4;    // sessions that are asked for side by side
// Why something was not learned, by what the server calls it (docs/reference.md).
const WHY = { short: "too short", loss: "noise to the model", nonfinite: "not finite", repetition: "repeats itself", full: "no room",
  unread: "left before", history: "learned before", frozen: "frozen", limit: "over the hour's limit", rollback: "rolled back", error: "error", filter: "filtered" };
const why = (reason) => WHY[reason] ?? reason;

let key = sessionStorage.getItem(STORE) ?? "";
let shown = FIRST;
let timer = 0;
let settings = null;           // what the server adapts, and the first rate
let newest = 0;                // number of the latest round; an older one that comes late is dropped
const cards = new Map();       // session id -> {element, session, mark}

class Refusal extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

async function ask(path, method = "GET", body) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  const answer = await fetch(`v1/${path}`, { method, headers, body: body && JSON.stringify(body), cache: "no-store" });
  const json = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Refusal(answer.status, json.error?.message ?? json.error ?? `the server answers ${answer.status}`);
  return json;
}

const of = (id) => `ttt/sessions/${encodeURIComponent(id)}`;
const number = (n) => n.toLocaleString("en").replaceAll(",", "\u2009");
const given = (x) => x !== undefined && x !== null, rate = (x) => x.toPrecision(2);
const nats = (x) => (!given(x) ? "–" : x.toFixed(x < 10 ? 2 : 1));
const bytes = (n) => (n < 1e6 ? `${(n / 1e3).toFixed(0)} kB` : n < 1e9 ? `${(n / 1e6).toFixed(1)} MB` : `${(n / 1e9).toFixed(2)} GB`);

function make(name, attributes = {}, text = "") {
  const svg = ["line", "path", "circle", "text"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [k, v] of Object.entries(attributes)) element.setAttribute(k, v);
  element.textContent = text;
  return element;
}

// Looking

async function look() {
  clearTimeout(timer);
  if (document.hidden) return;
  const began = performance.now();
  const round = ++newest;
  try {
    const { sessions, next } = await ask("ttt/sessions");
    if (round !== newest) return;
    say("live", "live");
    $("key").hidden = true;
    $("key-change").hidden = !key;
    await show(sessions, next);
  } catch (error) {
    if (round !== newest) return;
    if (error.status === 401) return wantKey(key ? "The server does not know this key." : "");
    say("lost", error.status ? error.message : "the server does not answer; trying again");
  }
  if (round !== newest) return;
  // A server with very many sessions, or a slow one, is asked less often.
  timer = setTimeout(look, Math.min(LONGEST, Math.max(PERIOD, performance.now() - began)));
}

function say(state, text) {
  $("state").className = `state ${state}`;
  if ($("state-text").textContent !== text) $("state-text").textContent = text;
}

function wantKey(why) {
  sessionStorage.removeItem(STORE);
  key = "";
  newest++;
  clearTimeout(timer);
  cards.forEach((card) => card.element.remove());
  cards.clear();
  $("command").textContent = $("model").textContent = "";
  for (const id of ["sessions", "empty", "key-change"]) $(id).hidden = true;
  $("key").hidden = false;
  $("key-error").textContent = why;
  say("", "no key");
  $("key-input").focus();
}

async function model() {
  if (!$("model").textContent) {
    const { data } = await ask("models");
    settings = await ask("ttt/config");
    $("model").textContent = data[0]?.id ?? "";
  }
  return $("model").textContent;
}

/** How deep a session learns: in which layers and modules. */
function depth() {
  const { layers, modules, rank } = settings.adapt;
  const which = layers === "all" ? "every layer" : layers === 1 ? "the last layer" : `the last ${layers} layers`;
  return `A session learns in ${which}: ${modules.join(" and ")}, rank ${rank}.`;
}

async function show(sessions, more) {
  await model();
  $("empty").hidden = sessions.length > 0;
  $("sessions").hidden = !sessions.length;
  if (!sessions.length) await command();
  const sum = (name) => sessions.reduce((total, s) => total + s[name], 0);
  const totals = [[more ? "sessions, of more" : "sessions", sessions.length], ["tokens learned", sum("tokens_learned")], ["waiting", sum("tokens_pending")]];
  describe($("totals"), totals.map(([name, value]) => [name, number(value)]));
  $("depth").textContent = depth();
  const wanted = $("find").value.trim();
  const found = sessions.filter((s) => s.session_id.includes(wanted));
  const visible = found.slice(0, shown);
  $("more").hidden = found.length <= shown;
  $("more-text").textContent = `${number(visible.length)} of ${number(found.length)}, most recently used first.`;
  const names = new Set(visible.map((s) => s.session_id));
  for (const [name, card] of cards) if (!names.has(name)) { card.element.remove(); cards.delete(name); }
  // A card stays where it is while the order of use changes: what one reads must not jump.
  for (const s of visible) {
    if (cards.has(s.session_id)) continue;
    const card = build(s.session_id);
    cards.set(s.session_id, card);
    const fresh = sessions[0] === s && cards.size > 1;
    fresh ? $("cards").prepend(card.element) : $("cards").append(card.element);
  }
  const due = [];
  for (const s of visible) {
    const card = cards.get(s.session_id);
    const mark = JSON.stringify([s.version, s.tokens_seen, s.tokens_learned, s.tokens_skipped, s.tier, s.frozen, s.error, s.created,
      s.saved_version, s.bytes]);
    draw(card, { losses: [], ...card.session, ...s });
    if (card.mark !== mark) due.push([s, card, mark]);
  }
  const worker = async () => {
    for (let next = due.shift(); next; next = due.shift()) {
      const [s, card, mark] = next;
      try {
        draw(card, await ask(of(s.session_id)), true);
        card.mark = mark;
      } catch (error) {
        if (error.status !== 404) throw error;  // gone meanwhile: the next round shows it
      }
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, worker));
}

async function command() {
  if ($("command").textContent) return;
  const body = JSON.stringify({ model: await model(), max_tokens: 1, session_id: "first", prompt:
    "The lighthouse stood at the end of a narrow spit of land, where the river met the sea. Each evening the keeper climbed the " +
    "two hundred steps, lit the lamp, and wrote in the log how the wind had turned. The lighthouse log was older than the keeper: " +
    "two hundred years of wind, each evening one line, and on some evenings only the words: the lamp is lit." });
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const url = new URL("v1/completions", location.href);
  const auth = key ? '-H "Authorization: Bearer $API_KEY" ' : "";
  $("command").textContent = `for i in 1 2 3 4 5 6; do\n  curl -s ${url} ${auth}\\\n    -H 'Content-Type: application/json' \\\n` +
    `    -d ${quoted(body)}; echo\ndone`;
}

// One session

function build(name) {
  const element = $("card").content.firstElementChild.cloneNode(true);
  const title = element.querySelector(".name");
  title.textContent = title.title = name;
  element.setAttribute("aria-label", `Session ${name}`);
  const card = { element, session: null, mark: "", points: [], at: -1 };
  for (const button of element.querySelectorAll("button")) {
    button.addEventListener("click", () => confirm(card, button.dataset.action));
  }
  const svg = element.querySelector("svg");
  svg.addEventListener("pointermove", (event) => point(card, event.clientX - svg.getBoundingClientRect().left));
  for (const end of ["pointerleave", "blur"]) svg.addEventListener(end, () => read(card, -1));
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || !card.points.length) return;
    event.preventDefault();
    const last = card.points.length - 1;
    $("said").textContent = read(card, card.at < 0 ? last : Math.min(last, Math.max(0, card.at + step)));
  });
  return card;
}

function describe(list, entries) {
  const text = JSON.stringify(entries);
  if (list.dataset.text === text) return;
  list.dataset.text = text;
  list.replaceChildren(...entries.map(([name, value]) => {
    const group = make("div");
    group.append(make("dt", {}, name), make("dd", {}, value));
    return group;
  }));
}

function draw(card, s, chart = false) {
  const q = (selector) => card.element.querySelector(selector);
  const before = card.session;
  card.session = s;
  q(".number").textContent = s.version;
  if (before && before.version !== s.version) {
    q(".version").classList.remove("ticked");
    requestAnimationFrame(() => requestAnimationFrame(() => q(".version").classList.add("ticked")));
  }
  const tiers = { slot: "in a slot", memory: "in memory", disk: "on disk", new: "new" };
  const badges = [["", s.bytes ? `${tiers[s.tier] ?? s.tier}, ${bytes(s.bytes)}` : tiers[s.tier] ?? s.tier]];
  if (s.frozen) badges.push(["frozen", "frozen"]);
  if (s.tokens_pending || s.requests_open) badges.push(["learning", s.tokens_pending ? "learning" : "being served"]);
  if (s.saved_version) badges.push(["", s.saved_version === s.version ? "saved" : `saved: version ${s.saved_version}`]);
  const text = JSON.stringify(badges);
  if (q(".badges").dataset.text !== text) {
    q(".badges").dataset.text = text;
    q(".badges").replaceChildren(...badges.map(([kind, label]) => make("span", { class: `badge ${kind}` }, label)));
  }
  const norms = Object.values(s.norm ?? {}).filter((x) => x !== null);
  const skipped = Object.entries(s.tokens_skipped).filter(([, n]) => n);
  describe(q(".facts"), [
    ["learned", `${number(s.tokens_learned)} tokens`],
    ["waiting", `${number(s.tokens_pending)} tokens`],
    ["rate", given(s.rate) ? rate(s.rate) + ` (from ${rate(settings.learn.rate)})` : "–"],
    ["delta's norm", norms.length ? `${(100 * Math.max(...norms)).toFixed(0)} %` : "–"],
    ...(typeof s.cache_share === "number" ? [["by its cache", `${(100 * s.cache_share).toFixed(0)} % of the tokens, ` +
      `${nats(Math.abs(s.cache_gain))} nats per token ${s.cache_gain < 0 ? "lost" : "gained"}`]] : []),
    ["not learned", skipped.length ? skipped.map(([reason, n]) => `${number(n)} tokens: ${why(reason)}`).join(", ") : "–"],
  ]);
  q(".card > .error").textContent = s.error ?? (s.frozen_reason && s.frozen_reason !== "asked for" ? `It learns no more: ${s.frozen_reason}.` : "");
  q('[data-action="freeze"]').textContent = s.frozen ? "Unfreeze" : "Freeze";
  const back = q('[data-action="rollback"]');
  back.disabled = !s.versions?.length;
  back.title = back.disabled ? "No earlier version is kept yet" : "";
  if (chart) plot(card);
}

function plot(card) {
  const svg = card.element.querySelector("svg");
  const chunks = card.session.losses.filter((c) => c.loss !== null);
  const measured = chunks.filter((c) => c.frozen_loss !== null);
  const gain = card.element.querySelector(".gain");
  const last = measured.filter((c) => c.version > (c.skipped ? 0 : 1)).slice(-8);  // version 0 is the base model itself
  const mean = last.reduce((sum, c) => sum + c.frozen_loss - c.loss, 0) / last.length;
  if (!last.length) gain.textContent = chunks.length ? "not yet compared with the base model (every fourth chunk is)" : "nothing learned yet";
  else if (Math.abs(mean) < 0.005) gain.textContent = "no difference from the base model";
  else {
    const percent = 100 * (1 - Math.exp(-mean));
    gain.replaceChildren(make("b", { class: mean < 0 ? "worse" : "" }, `${mean < 0 ? "+" : "−"}${Math.abs(percent).toFixed(0)} %`),
      ` perplexity against the base model (${nats(Math.abs(mean))} nats per token ${mean < 0 ? "lost" : "gained"})`);
  }
  card.points = [];
  card.at = -1;
  card.element.querySelector(".readout").textContent = "";
  svg.replaceChildren();
  const width = svg.clientWidth || 360, height = svg.clientHeight || 152;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const values = chunks.flatMap((c) => [c.loss, c.frozen_loss]).filter((x) => x !== null);
  if (!values.length) {
    svg.append(make("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "losses appear here, chunk by chunk"));
    svg.setAttribute("aria-label", "No losses yet");
    return;
  }
  const [left, right, top, bottom] = [34, 8, 8, 20];
  const low = Math.min(...values), high = Math.max(...values), room = Math.max(0.1, (high - low) * 0.08);
  const y = (loss) => top + (height - top - bottom) * (1 - (loss - low + room) / (high - low + 2 * room));
  const x = (i) => left + (width - left - right) * (chunks.length > 1 ? i / (chunks.length - 1) : 0.5);
  const step = [0.1, 0.2, 0.5, 1, 2, 5].find((s) => (high - low + 2 * room) / s <= 4) ?? 10;
  for (let tick = Math.ceil((low - room) / step) * step; tick <= high + room; tick += step) {
    svg.append(make("line", { class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }));
    svg.append(make("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, tick.toFixed(step < 1 ? 1 : 0)));
  }
  const [from, to] = [chunks[0].version, chunks.at(-1).version];
  svg.append(make("text", { x: left, y: height - 4 }, `version ${from}`));
  if (to !== from) svg.append(make("text", { x: width - right, y: height - 4, "text-anchor": "end" }, `version ${to}`));
  const line = (pairs) => pairs.map(([i, loss], n) => `${n ? "L" : "M"}${x(i).toFixed(1)} ${y(loss).toFixed(1)}`).join("");
  const at = measured.map((c) => [chunks.indexOf(c), c]);
  if (at.length > 1 && mean > 0) {
    const below = chunks.map((c, i) => [i, c.loss]).slice(at[0][0], at.at(-1)[0] + 1);
    svg.append(make("path", { class: "between", d: `${line([...at.map(([i, c]) => [i, c.frozen_loss]), ...below.toReversed()])}Z` }));
  }
  svg.append(make("path", { class: "base", d: line(at.map(([i, c]) => [i, c.frozen_loss])) }));
  svg.append(make("path", { class: "session", d: line(chunks.map((c, i) => [i, c.loss])) }));
  for (const [i, c] of at) svg.append(make("circle", { class: "base", cx: x(i), cy: y(c.frozen_loss), r: 2.5 }));
  chunks.forEach((c, i) => svg.append(make("circle", { class: c.skipped ? "skipped" : "session", cx: x(i), cy: y(c.loss), r: 2.5 })));
  card.points = chunks.map((c, i) => ({ x: x(i), chunk: c }));
  read(card, -1);
  const latest = measured.at(-1);
  svg.setAttribute("aria-label", `Loss of ${chunks.length} chunks, now ${nats(chunks.at(-1).loss)} nats per token` +
    (latest ? `; latest measurement: base model ${nats(latest.frozen_loss)}, session ${nats(latest.loss)}` : ""));
}

function point(card, at) {
  const distance = (p) => Math.abs(p.x - at);
  if (card.points.length) read(card, card.points.reduce((best, p, i) => (distance(p) < distance(card.points[best]) ? i : best), 0));
}

/** Say what the chunk was, marked in the chart; -1: the latest, unmarked. */
function read(card, i) {
  card.at = i;
  const svg = card.element.querySelector("svg"), readout = card.element.querySelector(".readout");
  svg.querySelector(".at")?.remove();
  const { x, chunk } = card.points.at(i) ?? {};
  if (!chunk) return "";
  if (i >= 0) svg.prepend(make("line", { class: "at", x1: x, x2: x, y1: 8, y2: svg.viewBox.baseVal.height - 20 }));
  return readout.textContent = [`version ${chunk.version}`, `${chunk.tokens} tokens`, `session ${nats(chunk.loss)}`,
    typeof chunk.cache_loss === "number" ? `with its cache ${nats(chunk.cache_loss)}` : "",
    chunk.frozen_loss === null ? "" : `base model ${nats(chunk.frozen_loss)}`, given(chunk.rate) ? `rate ${rate(chunk.rate)}` : "",
    chunk.skipped ? `not learned: ${why(chunk.skipped)}` : ""]
    .filter(Boolean).join(" · ");
}

// Changing one, after a question

const QUESTIONS = {
  freeze: (s) => s.frozen
    ? { action: "unfreeze", title: "Unfreeze", text: "It learns again from what it is sent from now on.", button: "Unfreeze" }
    : { action: "freeze", title: "Freeze", text: "It is served as it is now, and learns nothing until it is unfrozen.", button: "Freeze" },
  fork: () => ({ action: "fork", title: "Fork", text: "Another session begins where this one is, and goes its own way.",
    button: "Fork", label: "Name of the new session", body: (to) => ({ to }) }),
  rollback: (s) => ({ action: "rollback", title: "Roll back",
    text: `It returns to the version that you choose. What it has learned since then, up to version ${s.version}, is lost.`,
    button: "Roll back", label: "Version", choices: s.versions.toReversed(), body: (version) => ({ version: Number(version) }),
    danger: true }),
  reset: (s) => ({ action: "reset", title: "Reset",
    text: `All that it has learned (${number(s.tokens_learned)} tokens) is lost. Its next answer is the base model's.`,
    button: "Reset", danger: true }),
};
let question = null;

function confirm(card, action) {
  const s = card.session;
  question = { ...QUESTIONS[action](s), id: s.session_id };
  $("ask-title").textContent = `${question.title} “${s.session_id}”?`;
  $("ask-text").textContent = question.text;
  $("ask-do").textContent = question.button;
  $("ask-do").className = question.danger ? "primary danger" : "primary";
  $("ask-do").disabled = false;
  $("ask-error").textContent = "";
  $("ask-field").hidden = !question.label;
  $("ask-label").textContent = question.label ?? "";
  $("ask-input").hidden = Boolean(question.choices);
  $("ask-input").required = Boolean(question.label && !question.choices);
  $("ask-input").value = "";
  $("ask-select").hidden = !question.choices;
  $("ask-select").replaceChildren(...(question.choices ?? []).map((v) => make("option", { value: v }, `version ${v}`)));
  $("ask").showModal();
  (question.label ? (question.choices ? $("ask-select") : $("ask-input")) : question.danger ? $("ask-cancel") : $("ask-do")).focus();
}

$("ask").querySelector("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const { id, action, title, choices, body } = question;
  const value = choices ? $("ask-select").value : $("ask-input").value.trim();
  $("ask-do").disabled = true;
  try {
    await ask(`${of(id)}/${action}`, "POST", body?.(value));
    $("ask").close();
    $("said").textContent = `${title}: done for ${id}`;
    if (cards.has(id)) cards.get(id).mark = "";
    look();
  } catch (error) {
    $("ask-error").textContent = error.message;
    $("ask-do").disabled = false;
  }
});
$("ask-cancel").addEventListener("click", () => $("ask").close());

// The rest of the page

$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  if (/[^\x21-\x7e]/.test($("key-input").value.trim())) return wantKey("A key has letters, digits and signs of ASCII only.");
  key = $("key-input").value.trim();
  $("key-input").value = "";
  sessionStorage.setItem(STORE, key);
  look();
});
$("key-change").addEventListener("click", () => wantKey(""));
$("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText($("command").textContent);
    $("copy").textContent = "Copied";
  } catch {  // not a secure context: leave it selected
    getSelection().selectAllChildren($("command"));
    $("copy").textContent = "Selected: copy it with your keyboard";
  }
  setTimeout(() => { $("copy").textContent = "Copy the command"; }, 2500);
});
$("more-button").addEventListener("click", () => { shown += FIRST; look(); });
$("find").addEventListener("input", look);
document.addEventListener("visibilitychange", () => (document.hidden ? say("", "paused") : look()));
let resized = 0;
addEventListener("resize", () => {
  clearTimeout(resized);
  resized = setTimeout(() => cards.forEach((card) => card.session?.losses && plot(card)), 150);
});
look();
