// What is built once: the head of the page, a panel for each branch, the timeline.

// What only several branches have is left out for one.
document.body.classList.toggle("single", branches === 1);
document.body.classList.toggle("opens", opens);
document.body.classList.toggle("drafted", drafted);
const winner = blockSizes.indexOf(decode.winnerBlockSize);
byId("title").textContent = decode.method ? `Replay of a ${decode.method} decode` : "Replay of a decode";
const ending = {
  eos: "stopped at the end of the text",
  length: "filled the canvas",
  stop: "stopped at a stop text",
};
byId("outcome").textContent = [
  decode.model,
  plural(steps, "forward"),
  ending[decode.stopReason] ?? decode.stopReason,
  drafted ? `${plural(figures[steps].adopted, "draft")} adopted` : "",
  winner >= 0 && branches > 1 ? `block ${decode.winnerBlockSize} won` : "",
  decode.seconds ? `${decode.seconds.toFixed(2)} s` : "",
]
  .filter(Boolean)
  .join(" · ");
for (const [name, value] of Object.entries(decode.settings)) {
  const item = make("li", "", `${name.replaceAll("_", " ")} `);
  item.append(make("b", "", Array.isArray(value) ? value.join(", ") : String(value)));
  byId("settings").append(item);
}
for (const [name, text, size] of [
  ["prompt", decode.prompt, `${plural(decode.promptTokens, "token")}`],
  ["text", decode.text, `${plural(decode.textTokens, "token")}`],
]) {
  byId(`${name}-box`).hidden = text === null;
  byId(name).textContent = text ?? "";
  byId(`${name}-size`).textContent = size;
}

const finalCanvas = decode.canvas ?? [];
const widths = Array.from({ length: genLength }, (_, position) =>
  Math.min(
    18,
    Math.max(
      2,
      ...changeLog.flatMap((tokens) =>
        tokens[position]
          .filter((change) => change.token !== mask)
          .map((change) => columns(shown(change.token))),
      ),
    ),
  ),
);
const isText = (token) => token !== undefined && token !== mask && !ends.has(token);
const resultEnd = (() => {
  const end = finalCanvas.findIndex((token) => !isText(token));
  return end < 0 ? finalCanvas.length : end + 1;
})();
// Behind the last position at which a branch ever held text, ends of text alone: small cells will do.
const textEnd = widths.reduce(
  (end, _, position) =>
    changeLog.some((tokens) => tokens[position].some(({ token }) => isText(token))) ? position + 1 : end,
  resultEnd,
);
// Lines are those of the result; behind it, of whatever branch goes on.
const breaksLine = (position) => {
  const tokens =
    position < resultEnd
      ? [finalCanvas[position]]
      : changeLog.map((changes) => held(changes[position].at(-1)));
  return tokens.some((token) => isText(token) && pieces.get(token)?.includes("\n"));
};

const panels = blockSizes.map((size, branch) => {
  const panel = make("section", "branch");
  panel.setAttribute("aria-label", `Branch of block size ${size}`);
  const head = make("div", "branch-head"),
    tokens = make("div", "tokens"),
    meter = make("div", "meter"),
    fill = make("i");
  const badge = (name, text) => head.appendChild(make("span", `badge ${name}`, text));
  head.append(make("h2", "", branches > 1 ? `block ${size}` : `block size ${size}`));
  const panelParts = {
    panel,
    fill,
    leader: badge("leader", "leads"),
    winner: badge("winner", "winner"),
    synced: badge("synced", ""),
    rest: badge("rest", "sat out"),
    queries: badge("queries", ""),
  };
  const tally = head.appendChild(make("span", "tally"));
  const number = (label, sign) => {
    const part = tally.appendChild(make("span", sign ? `sign ${label}` : ""));
    part.title = sign ? `tokens by ${label}` : "tokens decoded";
    if (sign) part.append(make("b", "", sign));
    return part.appendChild(make("span"));
  };
  panelParts.count = number("", "");
  tally.append(` of ${toDecode}`);
  if (branches > 1)
    for (const [how, sign] of [
      ["commit", "C"],
      ["merge", "M"],
      ["sync", "S"],
    ])
      panelParts[`${how}Count`] = number(how, sign);
  meter.append(fill);
  let row = tokens.appendChild(make("div", "row"));
  panelParts.cells = Array.from({ length: genLength }, (_, position) => {
    if (position === textEnd && position < genLength) row = tokens.appendChild(make("div", "row behind"));
    const cell = row.appendChild(make("span", "cell mask", "·"));
    cell.style.width = `calc(${widths[position]}ch + 3px)`;
    cell.dataset.branch = branch;
    cell.dataset.position = position;
    cell.dataset.token = mask;
    if (position < textEnd && breaksLine(position)) row = tokens.appendChild(make("div", "row"));
    return cell;
  });
  // What the page shows at the moment: reading it back from the document would be slow.
  panelParts.looks = panelParts.cells.map(() => "cell mask");
  panelParts.tokens = panelParts.cells.map(() => mask);
  panelParts.changes = panelParts.cells.map(() => null);
  panel.append(head, meter, tokens);
  byId("branches").append(panel);
  return panelParts;
});

// The drafts of a forward stand apart from the branches: rows that the next step writes over.
const draftCard = make("section", "drafts-card"),
  draftRows = make("div");
if (drafted) {
  draftCard.setAttribute("aria-label", "Drafts of the forward");
  draftCard.append(make("h2", "", "drafts of this forward"), draftRows);
  byId("branches").append(draftCard);
}

const slider = byId("slider"),
  timeline = byId("timeline");
slider.max = steps;
const share = (step) => `${(100 * step) / steps}%`;
const most = Math.max(
  1,
  ...figures.map(({ written }) => Math.sqrt(written.commit + written.merge + written.sync)),
);
const bars = records.map((record, index) => {
  const bar = make("div", "bar"),
    { written, syncs } = figures[index + 1];
  const total = written.commit + written.merge + written.sync;
  bar.style.left = share(index + 1);
  bar.style.width = `clamp(2px, ${70 / steps}%, 16px)`;
  for (const how of ["commit", "merge", "sync"]) {
    if (!written[how]) continue;
    // Square roots: the first forwards write far more than the rest.
    bar.appendChild(make("i", how)).style.height =
      `${(100 * Math.sqrt(total) * written[how]) / (total * most)}%`;
  }
  timeline.append(bar);
  if (record.kind === "refresh" || ((syncs.size || record.adopted) && steps <= 60)) {
    const mark = make("span", "mark", record.kind === "refresh" ? "R" : "");
    if (record.adopted) mark.append(make("span", "adopted-mark", "A".repeat(record.adopted)));
    mark.style.left = share(index + 1);
    if (syncs.size && steps <= 60)
      mark.append(Object.assign(make("span", "", "S"), { style: "color: var(--sync)" }));
    timeline.append(mark);
  }
  return bar;
});
