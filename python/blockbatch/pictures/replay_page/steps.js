// What changes with every step.

let step = 0,
  picked = null,
  pinned = false,
  timer = null;
const split = new Uint8Array(genLength);

const map = byId("map"),
  ROW = 15;
blockSizes.forEach((size) =>
  byId("map-names").append(make("li", "", branches > 1 ? `block ${size}` : "canvas")),
);
map.style.height = `${ROW * branches}px`;

const drawMap = () => {
  const style = getComputedStyle(document.documentElement),
    color = (name) => style.getPropertyValue(`--${name}`);
  const ratio = window.devicePixelRatio || 1,
    width = map.clientWidth;
  map.width = width * ratio;
  map.height = ROW * branches * ratio;
  const pen = map.getContext("2d"),
    column = width / genLength;
  pen.scale(ratio, ratio);
  const figure = figures[step];
  for (let branch = 0; branch < branches; branch++) {
    const top = branch * ROW + 2,
      tall = ROW - 4;
    pen.fillStyle = color("hatch");
    pen.fillRect(0, top, width, tall);
    for (let position = 0; position < genLength; position++) {
      const change = panels[branch].changes[position];
      if (held(change) === mask) continue;
      const fresh = change.step === step;
      pen.globalAlpha = fresh ? 1 : 0.45;
      pen.fillStyle = color(change.how === "merge" ? "merge-fresh" : change.how);
      pen.fillRect(position * column, top, Math.max(column - (column > 4 ? 1 : 0), 0.5), tall);
      if (figure.stale.get(branch)?.has(position)) {
        pen.globalAlpha = 1;
        pen.fillStyle = color("refresh");
        pen.fillRect(position * column, top, Math.max(column - (column > 4 ? 1 : 0), 1), 3);
      }
      if (split[position]) {
        pen.globalAlpha = 1;
        pen.fillStyle = color("split");
        pen.fillRect(position * column, top + tall - 3, Math.max(column - (column > 4 ? 1 : 0), 1), 3);
      }
    }
    pen.globalAlpha = 1;
    const extent = figure.windows[branch];
    if (extent && extent[1] > extent[0] && figure.active.has(branch)) {
      pen.strokeStyle = color("window");
      pen.lineWidth = 1.5;
      pen.strokeRect(extent[0] * column + 0.75, top - 1, (extent[1] - extent[0]) * column - 1.5, tall + 2);
    }
  }
  if (picked) {
    pen.strokeStyle = color("split");
    pen.lineWidth = 2;
    pen.strokeRect(picked.position * column - 1, picked.branch * ROW + 1, column + 2, ROW - 2);
  }
};

const show = (wanted) => {
  step = Math.max(0, Math.min(steps, wanted));
  const figure = figures[step],
    record = step ? records[step - 1] : null;
  for (let branch = 0; branch < branches; branch++) {
    for (let position = 0; position < genLength; position++)
      panels[branch].changes[position] = latest(changeLog[branch][position], step);
  }
  for (let position = 0; position < genLength; position++) {
    const tokens = new Set(panels.map(({ changes }) => held(changes[position])));
    tokens.delete(mask);
    split[position] = tokens.size > 1 ? 1 : 0;
  }
  panels.forEach((parts, branch) => showBranch(parts, branch, figure, record));
  if (drafted) showDrafts(record);
  bars.forEach((bar, index) => bar.classList.toggle("ahead", index >= step));
  slider.value = step;
  const { written } = figure;
  const said = [
    ["committed", written.commit],
    ["merged", written.merge],
    ["synced", written.sync],
  ]
    .filter(([, count]) => count)
    .map(([word, count]) => `${count} ${word}`);
  if (record?.adopted) said.push(`${plural(record.adopted, "draft")} adopted`);
  const place = step ? `forward ${step} of ${steps}` : `before the first of ${plural(steps, "forward")}`;
  byId("status").textContent = [place, ...said].join(", ");
  slider.setAttribute("aria-valuetext", record ? `${place}, ${record.kind}` : place);
  byId("phase").className = `phase ${record ? record.kind : ""}`;
  byId("phase").textContent = record ? record.kind : "start";
  byId("nfe-total").textContent = step;
  for (const phase of ["init", "block", "refresh"]) byId(`nfe-${phase}`).textContent = figure.nfe[phase];
  byId("queries").textContent = record?.tokens ?? "–";
  byId("leader").textContent = figure.leader < 0 ? "–" : `block ${blockSizes[figure.leader]}`;
  drawMap();
  inspect();
};

const showBranch = (parts, branch, figure, record) => {
  const active = figure.active.has(branch),
    extent = active ? figure.windows[branch] : null;
  const tally = { commit: 0, merge: 0, sync: 0, given: 0 },
    computed = figure.computed.get(branch),
    stale = figure.stale.get(branch);
  for (let position = 0; position < genLength; position++) {
    const change = parts.changes[position],
      token = held(change),
      cell = parts.cells[position];
    let look = "cell ";
    look += token === mask ? "mask" : change.how;
    if (token !== mask) tally[change.how]++;
    if (ends.has(token)) look += " eos";
    else if (blank.has(token)) look += " blank";
    if (change && change.step === step) look += " fresh";
    if (split[position] && token !== mask) look += " split";
    if (extent && position >= extent[0] && position < extent[1]) {
      look += " window";
      if (position === extent[0]) look += " first";
      if (position === extent[1] - 1) look += " last";
    }
    if (computed?.has(position)) look += stale?.has(position) ? " query stale" : " query";
    if (parts.tokens[position] !== token) {
      parts.tokens[position] = cell.dataset.token = token;
      cell.textContent = token === mask ? "·" : shown(token);
    }
    if (parts.looks[position] !== look) parts.looks[position] = cell.className = look;
  }
  const leader = figure.syncs.get(branch);
  parts.panel.classList.toggle("refresh", active && record?.kind === "refresh");
  parts.panel.classList.toggle("idle", step > 0 && !active);
  parts.leader.classList.toggle("on", branches > 1 && figure.leader === branch);
  parts.winner.classList.toggle("on", branches > 1 && step === steps && branch === winner);
  parts.synced.classList.toggle("on", leader !== undefined);
  parts.synced.textContent = leader === undefined ? "" : `S \u2190 block ${blockSizes[leader]}`;
  parts.rest.classList.toggle("on", step > 0 && !active);
  const queries = active ? figure.queries.get(branch) : undefined;
  parts.queries.classList.toggle("on", queries !== undefined);
  parts.queries.textContent = queries ? `queries ${queries}` : "shared result";
  const count = tally.commit + tally.merge + tally.sync;
  parts.count.textContent = count;
  if (branches > 1)
    for (const how of ["commit", "merge", "sync"]) parts[`${how}Count`].textContent = tally[how];
  parts.fill.style.width = `${(100 * count) / toDecode}%`;
};

// What each draft holds that the branch did not, and whether the commit wrote it too.
const showDrafts = (record) => {
  draftRows.replaceChildren();
  if (!record?.drafts.length) {
    const why = record && record.kind !== "block" ? "a full forward takes none" : "none in this forward";
    draftRows.append(make("p", "soft", record ? why : "none yet"));
    return;
  }
  for (const [length, queries, positions, tokens] of record.drafts) {
    const line = draftRows.appendChild(make("div", "draft"));
    const adopted = length === record.adoptedLength;
    line.append(make("span", "draft-name", `+${length}`));
    const row = line.appendChild(make("span", "tokens row"));
    positions.forEach((position, i) => {
      const change = panels[0].changes[position],
        hit = change?.step === step && change.token === tokens[i];
      const cell = row.appendChild(make("span", `cell guess${hit ? " hit" : ""}`, shown(tokens[i])));
      cell.title = `position ${position}: ${hit ? "written" : "not written"}`;
      cell.dataset.branch = 0;
      cell.dataset.position = position;
      cell.dataset.token = tokens[i];
    });
    line.classList.toggle("adopted", adopted);
    line.append(make("span", "soft", `${queries} queries`));
    if (adopted) line.append(make("span", "badge adopted on", "adopted"));
  }
  if (record.adopted > 1)
    draftRows.append(make("p", "soft", `${record.adopted} adopted, one after the other; the last is marked.`));
};
