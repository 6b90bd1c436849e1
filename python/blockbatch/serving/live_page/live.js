"use strict";
// The canvases of one decode as its forwards come. A branch and position hold {token, how, forward}, or nothing
// while they are masked.
const byId = (id) => document.getElementById(id);
const make = (tag, className = "", text = "") => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== "") element.textContent = text;
  return element;
};
const page = JSON.parse(byId("page").textContent);
byId("key-box").hidden = !page.keyed;
for (const name of ["", ...page.presets.map((one) => `preset ${one}`), ...page.methods.map((one) => `method ${one}`)])
  byId("settings").append(new Option(name.replace("_", " ") || "of the server", name));

// Milliseconds that a forward is shown at least, so that eyes can follow a small model.
const SHOWN = 120;
let about = null,
  panels = [],
  pieces = new Map(),
  counts = {},
  aborter = null;

const glyphs = { "\n": "\u21b5", "\t": "\u21e5", " ": "\u00b7" };
const shown = (token) => {
  if (about.eos.includes(token)) return "\u220e";
  const text = pieces.get(token) ?? "";
  if (text === "") return `#${token}`;
  // Spaces and line ends are seen, characters that steer a terminal or a line are named.
  return text.replace(/[\n\t]|^ +$/g, (found) => [...found].map((one) => glyphs[one]).join(""))
    .replace(/[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2060-\u2069]/g, (one) =>
      `\u27e8${one.codePointAt(0).toString(16)}\u27e9`);
};

const grow = (panel, length) => {
  while (panel.cells.length < length) {
    const cell = panel.tokens.appendChild(make("span", "cell mask", "\u00b7"));
    cell.dataset.position = panel.cells.length;
    cell.dataset.token = about.mask;
    panel.cells.push(cell);
    panel.held.push(null);
  }
};

const begin = (told) => {
  about = told;
  pieces = new Map();
  counts = {};
  learn(told.pieces);
  byId("about").textContent = `${told.model} \u00b7 ${told.method} \u00b7 prompt of ${told.promptTokens} tokens`;
  byId("text").textContent = "";
  document.body.classList.toggle("single", told.blockSizes.length === 1);
  panels = told.blockSizes.map((size) => {
    const box = make("section", "branch"),
      head = box.appendChild(make("div", "branch-head")),
      row = make("div", "row");
    head.append(make("h2", "", `block ${size}`));
    const winner = head.appendChild(make("span", "badge winner", "winner"));
    const tally = head.appendChild(make("span", "tally"));
    box.appendChild(make("div", "tokens")).append(row);
    const panel = { box, winner, tally, size, tokens: row, cells: [], held: [] };
    grow(panel, told.genLength);
    return panel;
  });
  byId("branches").replaceChildren(...panels.map(({ box }) => box));
};

const learn = (told) => {
  for (const [token, text] of Object.entries(told)) pieces.set(Number(token), text);
};

const forward = (told) => {
  learn(told.pieces);
  counts[told.phase] = (counts[told.phase] ?? 0) + 1;
  const number = Object.values(counts).reduce((sum, count) => sum + count, 0);
  for (const [how, changes] of [
    ["commit", told.commits],
    ["merge", told.merges],
  ])
    for (const [branch, positions, tokens] of changes)
      positions.forEach((position, place) => {
        grow(panels[branch], position + 1);
        panels[branch].held[position] = { token: tokens[place], how, number };
      });
  for (const [branch, leader] of told.syncs) {
    const from = panels[leader].held;
    grow(panels[branch], from.length);
    panels[branch].held = panels[branch].held.map((mine, position) => {
      const theirs = from[position] ?? null;
      if (mine?.token === theirs?.token) return mine;
      return theirs && { token: theirs.token, how: "sync", number };
    });
  }
  panels.forEach((panel, branch) => draw(panel, told.windows[told.rows.indexOf(branch)], number));
  byId("phase").className = `phase ${told.phase}`;
  byId("phase").textContent = told.kind;
  const phases = Object.entries(counts).map(([phase, count]) => `${phase} ${count}`);
  byId("status").textContent = `forward ${number} (${phases.join(", ")})`;
};

const draw = (panel, window, number) => {
  const [start, end] = window ?? [0, 0];
  grow(panel, end);
  let filled = 0;
  panel.held.forEach((change, position) => {
    const cell = panel.cells[position];
    let look = `cell ${change ? change.how : "mask"}`;
    if (change) filled++;
    if (change?.number === number) look += " fresh";
    if (change && about.eos.includes(change.token)) look += " eos";
    if (position >= start && position < end) look += " window";
    if (position === start && start < end) look += " first";
    if (position === end - 1) look += " last";
    cell.className = look;
    cell.dataset.token = change ? change.token : about.mask;
    cell.textContent = change ? shown(change.token) : "\u00b7";
  });
  panel.tally.textContent = `${filled} of ${panel.cells.length}`;
};

const finish = (told) => {
  const { nfe, seconds, winner } = told;
  byId("text").textContent = told.text;
  for (const panel of panels) panel.winner.classList.toggle("on", panels.length > 1 && panel.size === winner);
  byId("phase").className = "phase";
  byId("phase").textContent = "done";
  const end = `${told.tokens} tokens in ${nfe.total} forwards, ${seconds} s (${told.stopReason})`;
  const why = told.tokens ? "they are spaces, or special ones" : "the model ends its text with the first token";
  byId("status").textContent = told.text.trim() ? end : `${end}; the answer shows nothing: ${why}`;
};

const fail = (message) => {
  byId("phase").className = "phase failed";
  byId("phase").textContent = "failed";
  byId("status").textContent = message;
};

const take = (told) => {
  if (told.error) fail(told.error.message);
  else if (told.begin) begin(told.begin);
  else if (told.forward) forward(told.forward);
  else if (told.end) finish(told.end);
};

const events = async function* (response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) yield JSON.parse(part.slice("data: ".length));
  }
};

const ask = async () => {
  const [kind, name] = byId("settings").value.split(" ");
  const body = { prompt: byId("prompt").value, max_tokens: Number(byId("tokens").value) };
  if (name) body.blockbatch = { [kind]: name };
  const headers = { "content-type": "application/json" };
  if (page.keyed) headers.authorization = `Bearer ${byId("key").value}`;
  const { signal } = aborter;
  const response = await fetch("live", { method: "POST", headers, body: JSON.stringify(body), signal });
  if (!response.ok) {
    fail((await response.json()).error.message);
    return;
  }
  for await (const told of events(response)) {
    take(told);
    if (told.forward) await new Promise((next) => setTimeout(next, SHOWN));
    signal.throwIfAborted();
  }
};

const busy = (on) => {
  byId("go").disabled = on;
  byId("halt").disabled = !on;
};

byId("ask").addEventListener("submit", async (submitted) => {
  submitted.preventDefault();
  aborter = new AbortController();
  busy(true);
  try {
    await ask();
  } catch (error) {
    fail(aborter.signal.aborted ? "stopped" : String(error));
  }
  busy(false);
});
byId("halt").addEventListener("click", () => aborter.abort());
