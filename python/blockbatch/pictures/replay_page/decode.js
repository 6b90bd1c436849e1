"use strict";
// The decode: for every branch and position its changes in order, for every step its figures, tokens as text.
// The page counts forwards done: 0 is the empty canvas, k the state after record k - 1 of the trace.
const decode = JSON.parse(document.getElementById("decode").textContent);
const { records, blockSizes, genLength, mask, threshold } = decode;
const steps = records.length,
  branches = blockSizes.length;
const ends = new Set(decode.eos),
  pieces = new Map(Object.entries(decode.pieces).map(([id, text]) => [Number(id), text]));
const byId = (id) => document.getElementById(id);
const make = (tag, className = "", text = "") => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== "") element.textContent = text;
  return element;
};
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

// [branch][position]: changes {step, token, how, confidence, from}, of which the latest up to a step holds.
const changeLog = blockSizes.map(() => Array.from({ length: genLength }, () => []));
// Of a fill: what was given stands before every forward, as no change of any.
const given = decode.given ?? [];
given.forEach((token, position) => {
  if (token === mask) return;
  for (const changes of changeLog) changes[position].push({ step: -1, token, how: "given", confidence: null });
});
const toDecode = genLength - given.filter((token) => token !== mask).length;
const figures = [
  {
    decoded: blockSizes.map(() => 0),
    windows: blockSizes.map(() => null),
    active: new Set(),
    leader: -1,
    nfe: { init: 0, block: 0, refresh: 0 },
    written: { commit: 0, merge: 0, sync: 0 },
    syncs: new Map(),
    queries: new Map(),
    computed: new Map(),
    stale: new Map(),
    adopted: 0,
  },
];

const latest = (changes, step) => {
  let low = 0,
    high = changes.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (changes[middle].step <= step) low = middle + 1;
    else high = middle;
  }
  return low ? changes[low - 1] : null;
};
const now = (branch, position) => changeLog[branch][position].at(-1) ?? null;
const held = (change) => (change ? change.token : mask);

// With Dream's published rule the branch leads that holds most tokens, up to the first that ends a text.
const heldUpTo = decode.heldUpTo && new Set(decode.heldUpTo);
const countHeld = (branch) => {
  let count = 0;
  for (let position = 0; position < genLength; position++) {
    const token = held(now(branch, position));
    if (token !== mask) count++;
    if (heldUpTo.has(token)) break;
  }
  return count;
};

records.forEach((record, index) => {
  const step = index + 1,
    before = figures[index];
  const figure = {
    decoded: [...before.decoded],
    windows: [...before.windows],
    active: new Set(record.rows),
    leader: 0,
    nfe: { ...before.nfe, [record.phase]: before.nfe[record.phase] + 1 },
    written: { commit: 0, merge: 0, sync: 0 },
    syncs: new Map(),
    queries: new Map(),
    // With open queries: the positions computed, and those of them whose K/V was that of another token.
    computed: new Map(),
    stale: new Map(),
    adopted: before.adopted + record.adopted,
  };
  record.rows.forEach((branch, row) => {
    figure.windows[branch] = record.windows[row];
    if (record.queries) figure.queries.set(branch, record.queries[row]);
    if (record.positions) figure.computed.set(branch, new Set(record.positions[row]));
    if (record.stale) figure.stale.set(branch, new Set(record.stale[row]));
  });
  for (const [how, changes] of [
    ["commit", record.commits],
    ["merge", record.merges],
  ]) {
    for (const [branch, positions, tokens, confidence] of changes) {
      positions.forEach((position, i) => {
        changeLog[branch][position].push({
          step,
          token: tokens[i],
          how,
          confidence: confidence ? confidence[i] : null,
        });
      });
      figure.written[how] += positions.length;
      if (how === "commit") figure.decoded[branch] += positions.length;
    }
  }
  if (heldUpTo) figure.decoded = blockSizes.map((_, branch) => countHeld(branch));
  // Before the syncs: afterwards those that took over its state have decoded as much.
  figure.leader = figure.decoded.indexOf(Math.max(...figure.decoded));
  for (const [branch, leader] of record.syncs) {
    for (let position = 0; position < genLength; position++) {
      const own = now(branch, position),
        theirs = now(leader, position);
      if (held(own) === held(theirs)) continue;
      changeLog[branch][position].push({
        step,
        token: held(theirs),
        how: "sync",
        confidence: theirs?.confidence ?? null,
        from: leader,
      });
      if (held(theirs) !== mask) figure.written.sync++;
    }
    figure.decoded[branch] = figure.decoded[leader];
    figure.syncs.set(branch, leader);
  }
  figures.push(figure);
});

// The first forward after which branches hold different tokens, or else one that merges, that adopts a draft,
// that syncs or that computes a token once more; the middle of a decode without any of these.
const opening = () => {
  const differ = (step) =>
    Array.from({ length: genLength }, (_, position) => position).some((position) => {
      const tokens = new Set(changeLog.map((changes) => held(latest(changes[position], step))));
      tokens.delete(mask);
      return tokens.size > 1;
    });
  const found = [
    differ,
    (step) => figures[step].written.merge > 0,
    (step) => records[step - 1].adopted > 0,
    (step) => figures[step].syncs.size > 0,
    (step) => [...figures[step].stale.values()].some((positions) => positions.size > 0),
  ];
  const numbers = records.map((_, index) => index + 1);
  for (const is of found) {
    const first = numbers.find(is);
    if (first !== undefined) return first;
  }
  return Math.ceil(steps / 2);
};

const opens = records.some((record) => record.positions),
  drafted = records.some((record) => record.drafts.length);

// Whitespace has to be seen, and nothing in a text may change how its neighbours look.
const NAMED = new Map([
  ["\n", "↵"],
  ["\t", "⇥"],
  ["\r", "␍"],
  [" ", "␣"],
]);
const shown = (token) => {
  if (ends.has(token)) return "∎";
  const piece = pieces.get(token);
  if (piece === undefined) return `#${token}`;
  if (piece === "") return "∅";
  return piece.replace(
    /[\s\p{C}]/gu,
    (c) =>
      NAMED.get(c) ??
      (c < " " ? String.fromCharCode(0x2400 + c.charCodeAt(0)) : `⟨${c.codePointAt(0).toString(16)}⟩`),
  );
};
const blank = new Set([...pieces].filter(([, piece]) => /^\s+$/.test(piece)).map(([token]) => token));
const EAST_ASIAN =
  "\\u1100-\\u115f\\u2e80-\\ua4cf\\uac00-\\ud7a3\\uf900-\\ufaff\\ufe30-\\ufe6f\\uff00-\\uff60\\uffe0-\\uffe6";
const WIDE = new RegExp(`[${EAST_ASIAN}]|\\p{Emoji_Presentation}`, "u");
const columns = (text) => Array.from(text).reduce((sum, c) => sum + (WIDE.test(c) ? 2 : 1), 0);
