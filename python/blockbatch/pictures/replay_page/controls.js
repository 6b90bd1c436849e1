// The chosen position, and playing.

const marked = [];
const story = (branch, position) => {
  const change = panels[branch].changes[position];
  if (held(change) === mask) return change ? `masked again by the sync in forward ${change.step}` : "masked";
  const { how } = change;
  if (how === "given") return "given before the first forward";
  if (how === "commit") return `own commit in forward ${change.step}`;
  if (how === "sync") return `sync with block ${blockSizes[change.from]} in forward ${change.step}`;
  const donors = blockSizes.filter((_, other) => {
    const theirs = latest(
      changeLog[other][position].filter(
        (c) => c.step < change.step || (c.step === change.step && c.how === "commit"),
      ),
      change.step,
    );
    return other !== branch && held(theirs) === change.token;
  });
  const holders = `${donors.length > 1 ? "blocks" : "block"} ${donors.join(", ")}`;
  return `merged in forward ${change.step}, held by ${holders}`;
};
const sureness = (change) =>
  change && held(change) !== mask && change.confidence !== null ? change.confidence.toFixed(3) : "–";

const inspect = () => {
  marked.splice(0).forEach((cell) => cell.classList.remove("picked", "same"));
  if (!picked) return;
  const { branch, position } = picked,
    change = panels[branch].changes[position],
    token = held(change);
  panels.forEach(({ cells }, other) => {
    cells[position].classList.add(other === branch ? "picked" : "same");
    marked.push(cells[position]);
  });
  byId("where").textContent =
    `Position ${position} of block ${blockSizes[branch]}` + (pinned ? " (kept)" : "");
  const detail = byId("detail"),
    table = make("table"),
    head = table.createTHead().insertRow(),
    body = table.createTBody();
  detail.replaceChildren();
  const title = detail.appendChild(make("p"));
  title.append(make("span", "token", token === mask ? "MASK" : shown(token)), ` id ${token}`);
  if (ends.has(token) && pieces.has(token)) title.append(` ${pieces.get(token)}`);
  const told = detail.appendChild(make("p", "", story(branch, position)));
  if (token !== mask && change.confidence !== null) {
    told.append(`, confidence ${sureness(change)}`);
    if (change.how === "commit" && threshold !== null && change.confidence < threshold)
      told.append(` (below ${threshold}: ${decode.leaps ? "a leap, or " : ""}the surest of its window)`);
  }
  if (figures[step].stale.get(branch)?.has(position))
    detail.append(
      make("p", "soft", "Computed once more in this forward: its K/V was that of another token."),
    );
  if (split[position]) detail.append(make("p", "soft", "The branches hold different tokens here."));
  for (const [name, label] of [
    ["block", "Block size"],
    ["token", "Token"],
    ["id", "Token id"],
    ["by", "How it was written"],
    ["at", "Forward"],
    ["conf.", "Confidence"],
  ]) {
    const cell = head.appendChild(make("th", "", name));
    cell.scope = "col";
    cell.title = label;
  }
  panels.forEach(({ changes }, other) => {
    const theirs = changes[position],
      line = body.insertRow(),
      empty = held(theirs) === mask;
    if (other === branch) line.className = "picked";
    line.insertCell().textContent = blockSizes[other];
    Object.assign(line.insertCell(), {
      className: "piece",
      textContent: empty ? "MASK" : shown(theirs.token),
    });
    line.insertCell().textContent = empty ? "" : theirs.token;
    line.insertCell().textContent = empty ? "" : theirs.how;
    line.insertCell().textContent = empty || theirs.how === "given" ? "" : theirs.step;
    line.insertCell().textContent = empty ? "" : sureness(theirs);
  });
  detail.append(table);
};

const pick = (branch, position, keep) => {
  picked = { branch, position };
  pinned = keep;
  inspect();
  drawMap();
};
const hint = byId("detail").firstElementChild;
const letGo = () => {
  picked = null;
  pinned = false;
  inspect();
  byId("where").textContent = "Point at a token";
  byId("detail").replaceChildren(hint);
  drawMap();
};
const cellUnder = (event) => {
  const cell = event.target.closest?.(".cell[data-position]");
  return cell ? [Number(cell.dataset.branch), Number(cell.dataset.position)] : null;
};
const mapUnder = (event) => {
  const box = map.getBoundingClientRect(),
    clamp = (value, most) => Math.max(0, Math.min(most - 1, Math.floor(value)));
  return [
    clamp((event.clientY - box.top) / ROW, branches),
    clamp(((event.clientX - box.left) * genLength) / box.width, genLength),
  ];
};
for (const [element, under] of [
  [byId("branches"), cellUnder],
  [map, mapUnder],
]) {
  element.addEventListener("pointermove", (event) => {
    const at = under(event);
    if (at && !pinned) pick(...at, false);
  });
  element.addEventListener("click", (event) => {
    const at = under(event);
    if (!at) return;
    if (pinned && picked.branch === at[0] && picked.position === at[1]) pick(...at, false);
    else pick(...at, true);
  });
}

const PLAY = "M3 1v12l9-6z",
  PAUSE = "M2 1h4v12H2zM8 1h4v12H8z",
  STEP_MS = 700;
const playing = () => timer !== null;
const setPlaying = (on) => {
  clearTimeout(timer);
  timer = on ? setTimeout(tick, STEP_MS / Number(byId("speed").value)) : null;
  byId("play").setAttribute("aria-label", on ? "Pause" : "Play");
  byId("play-icon").setAttribute("d", on ? PAUSE : PLAY);
  // Read aloud, a playing decode would never come to an end.
  byId("status").setAttribute("aria-live", on ? "off" : "polite");
};
const tick = () => {
  show(step + 1);
  setPlaying(step < steps);
};
// Until something is chosen the page stands at what there is to see, and plays from the start.
let untouched = true;
const toggle = () => {
  if (!playing() && (step === steps || untouched)) show(0);
  untouched = false;
  setPlaying(!playing());
};
const go = (wanted) => {
  untouched = false;
  setPlaying(false);
  show(wanted);
};
byId("play").addEventListener("click", toggle);
byId("first").addEventListener("click", () => go(0));
byId("last").addEventListener("click", () => go(steps));
byId("back").addEventListener("click", () => go(step - 1));
byId("next").addEventListener("click", () => go(step + 1));
byId("speed").addEventListener("change", () => setPlaying(playing()));
slider.addEventListener("input", () => go(Number(slider.value)));
timeline.addEventListener("click", (event) => {
  const box = timeline.getBoundingClientRect();
  go(Math.round(((event.clientX - box.left) * steps) / box.width));
});

const MOVES = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
document.addEventListener("keydown", (event) => {
  const { key, target } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || target.closest?.("select, pre")) return;
  if (event.shiftKey && key in MOVES) {
    const from = picked ?? { branch: 0, position: -MOVES[key][1] },
      [down, right] = MOVES[key];
    pick(
      Math.max(0, Math.min(branches - 1, from.branch + down)),
      Math.max(0, Math.min(genLength - 1, from.position + right)),
      true,
    );
  } else if (key === "Escape") letGo();
  else if (key === " " && !target.closest?.("button, summary")) toggle();
  else if (key === "ArrowLeft") go(step - 1);
  else if (key === "ArrowRight") go(step + 1);
  else if (key === "Home") go(0);
  else if (key === "End") go(steps);
  else return;
  event.preventDefault();
});

const fromAddress = () => {
  const found = /^#forward=(\d+)$/.exec(location.hash);
  if (found) untouched = false;
  show(found ? Number(found[1]) : opening());
};
window.addEventListener("hashchange", fromAddress);
window.addEventListener("resize", drawMap);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMap);
fromAddress();
