// The sample browser. The index (data.samples) is columns: of groups, and of rows, a row a sample. Texts and tokens lie in packed
// pieces behind the scripts and are opened when they are asked for.

const store = data.samples;
const rows = store.rows;
const groups = store.groups;
const COUNT = rows.group.length;
const ROW_HEIGHT = 48;
const VERDICTS = ["wrong", "right", "no verdict"];
const MARKS = ["✗", "✓", "?"];
const COLORINGS = ["none", "logprob", "entropy", "advantage"];
const LEVELS = 10; // classes of a token's colour
const DEEPEST = { logprob: 5, entropy: 3 }; // nats at which a colour is full
const SEARCH_DELAY = 200;
const UNIT = 1000; // the pieces hold thousandths of a nat

const browser = {
  order: new Uint32Array(0), // the rows listed, in their order
  at: -1, // the place in `order` of the chosen row
  row: -1,
  hits: null, // of each row whether the search found it, null without a search
  search: 0, // the newest search's number
  query: "",
  shown: 0, // how often a sample was asked to be shown; what comes late is dropped
  picked: {}, // facet → set of the values picked
  unfolded: false,
  coloring: 0,
  formulas: true,
};

// Pieces

const opened = new Map(); // the last pieces, newest last
const KEPT = 12;

/** The JSON of the piece with this id; null where the page has none. */
async function openPiece(id) {
  if (opened.has(id)) {
    const piece = opened.get(id);
    opened.delete(id);
    opened.set(id, piece);
    return piece;
  }
  const piece = readPiece(id);
  opened.set(id, piece);
  if (opened.size > KEPT) opened.delete(opened.keys().next().value);
  return piece;
}

async function readPiece(id) {
  let node = byId(id);
  if (document.readyState === "loading" && !node?.nextElementSibling) {
    await new Promise((done) => document.addEventListener("DOMContentLoaded", done, { once: true }));
    node = byId(id);
  }
  if (!node) return null;
  const packed = atob(node.textContent);
  const bytes = new Uint8Array(packed.length);
  for (let place = 0; place < bytes.length; place++) bytes[place] = packed.charCodeAt(place);
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

// Which rows, in which order

const firstRow = new Int32Array(groups.run.length + 1).fill(COUNT); // of each group
for (let row = COUNT - 1; row >= 0; row--) firstRow[rows.group[row]] = row;

const groupOf = (row) => rows.group[row];
const FACETS = {
  run: { of: (row) => groups.run[groupOf(row)], names: data.runs.map((run) => run.name) },
  verdict: { of: (row) => rows.verdict[row], names: VERDICTS },
  reason: { of: (row) => rows.reason[row], names: store.reasons },
  fate: { of: (row) => groups.fate[groupOf(row)], names: store.fates },
  source: { of: (row) => sourceOf[groups.prompt[groupOf(row)]], names: null },
  stage: { of: (row) => groups.stage[groupOf(row)], names: store.stages },
  finish: { of: (row) => rows.finish[row], names: store.finishes },
  languages: { of: (row) => rows.mixed[row], names: ["not mixed", "mixed"] },
};
const CHIPS = 10; // a facet of more values is a menu

const sourceNames = [...new Set(store.prompts.map(([, , source]) => source || "not recorded"))].sort();
const sourceOf = store.prompts.map(([, , source]) => sourceNames.indexOf(source || "not recorded"));
FACETS.source.names = sourceNames;

const SORTS = {
  "step": (row) => groups.step[groupOf(row)],
  "prompt": (row) => groups.prompt[groupOf(row)],
  "tokens": (row) => rows.tokens[row],
  "advantage": (row) => rows.advantage[row],
  "mean log-probability": (row) => rows.logprob[row],
  "mean entropy": (row) => rows.entropy[row],
  "steps since sampled": (row) => lagOf(row),
};

/** How many updates behind the step's own weights the sample was drawn; null where unknown. */
function lagOf(row) {
  const version = rows.version[row];
  return version === null ? null : groups.step[groupOf(row)] - 1 - version;
}

const limit = (id) => (byId(id).value.trim() === "" ? null : Number(byId(id).value));

function listRows() {
  const picked = Object.entries(browser.picked).filter(([, values]) => values.size).map(([name, values]) => [FACETS[name].of, values]);
  const [stepFrom, stepTo, tokensFrom, tokensTo] = ["step-from", "step-to", "tokens-from", "tokens-to"].map(limit);
  const kept = new Uint32Array(COUNT);
  let count = 0;
  for (let row = 0; row < COUNT; row++) {
    if (browser.hits && !browser.hits[row]) continue;
    const step = groups.step[groupOf(row)];
    if ((stepFrom !== null && step < stepFrom) || (stepTo !== null && step > stepTo)) continue;
    const tokens = rows.tokens[row];
    if ((tokensFrom !== null && !(tokens >= tokensFrom)) || (tokensTo !== null && (tokens === null || tokens > tokensTo))) continue;
    if (picked.every(([of, values]) => values.has(of(row)))) kept[count++] = row;
  }
  const order = kept.slice(0, count);
  const value = SORTS[byId("sort").value];
  const turn = byId("descending").getAttribute("aria-pressed") === "true" ? -1 : 1;
  // What has no value stands last in both directions.
  const keys = new Float64Array(COUNT);
  for (const row of order) keys[row] = value(row) ?? NaN;
  order.sort((a, b) => {
    const [left, right] = [keys[a], keys[b]];
    if (Number.isNaN(left) || Number.isNaN(right)) return Number.isNaN(left) - Number.isNaN(right) || a - b;
    return turn * (left - right) || a - b;
  });
  browser.order = order;
  browser.at = order.indexOf(browser.row);
  byId("list-space").style.height = `${order.length * ROW_HEIGHT}px`;
  sayFound();
}

function refresh() {
  listRows();
  byId("list").scrollTop = browser.at < 0 ? 0 : Math.max(0, browser.at * ROW_HEIGHT - 2 * ROW_HEIGHT);
  if (browser.at < 0) choose(browser.order.length ? 0 : -1);
  else drawRows();
}

function sayFound() {
  let right = 0;
  let judged = 0;
  for (const row of browser.order) {
    judged += rows.verdict[row] < 2;
    right += rows.verdict[row] === 1;
  }
  const share = judged ? `, ${sayPart(right / judged)} of the judged right` : "";
  byId("found").textContent = `${grouped.format(browser.order.length)} of ${grouped.format(COUNT)} samples${share}${browser.searching ?? ""}`;
}

// The list: only the rows in sight are in the document.

let drawnFrom = -1;
const LONG_OPENING = 16;

/** How many characters all questions begin with, whole words, where it is many: the list leaves them out. */
const opening = (() => {
  const questions = store.prompts.map(([, preview]) => preview);
  if (questions.length < 2) return 0;
  let length = 0;
  while (length < questions[0].length && questions.every((question) => question[length] === questions[0][length])) length++;
  const words = questions[0].lastIndexOf(" ", length - 1) + 1;
  return words < LONG_OPENING ? 0 : words;
})();

function drawRows() {
  const list = byId("list");
  const from = Math.max(0, Math.floor(list.scrollTop / ROW_HEIGHT) - 4);
  const to = Math.min(browser.order.length, from + Math.ceil(list.clientHeight / ROW_HEIGHT) + 9);
  const space = byId("list-rows");
  space.style.transform = `translateY(${from * ROW_HEIGHT}px)`;
  const fresh = [];
  for (let place = from; place < to; place++) fresh.push(listRow(place));
  space.replaceChildren(...fresh);
  drawnFrom = from;
  list.setAttribute("aria-activedescendant", browser.at >= from && browser.at < to ? `option-${browser.at}` : "");
  if (!browser.order.length) space.append(make("p", { class: "quiet nothing" }, "No sample is like that."));
}

function listRow(place) {
  const row = browser.order[place];
  const group = groupOf(row);
  const [, preview] = store.prompts[groups.prompt[group]];
  const verdict = rows.verdict[row];
  const run = several ? make("i", { class: "dot", style: { background: runColor(groups.run[group]) }, title: data.runs[groups.run[group]].name }) : null;
  return make("div", {
    class: "row", role: "option", id: `option-${place}`, "aria-selected": String(place === browser.at), "aria-setsize": browser.order.length, "aria-posinset": place + 1,
    onclick: () => choose(place),
  },
    make("span", { class: `mark verdict-${verdict}`, title: VERDICTS[verdict] }, MARKS[verdict]),
    make("span", { class: "row-head" }, opening ? `…${preview.slice(opening)}` : preview || "question not recorded"),
    make("span", { class: "row-side" }, rows.tokens[row] === null ? "" : `${grouped.format(rows.tokens[row])} tok`),
    make("span", { class: "row-ending" }, rows.ending[row]),
    make("span", { class: "row-side" }, run, ` ${store.reasons[rows.reason[row]]} · ${store.fates[groups.fate[group]]} · step ${groups.step[group]}`));
}

/** The row at this place of the list becomes the chosen one, and is scrolled into sight. */
function choose(place) {
  browser.at = place;
  browser.row = place < 0 ? -1 : browser.order[place];
  const list = byId("list");
  if (place >= 0) {
    const top = place * ROW_HEIGHT;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + ROW_HEIGHT > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW_HEIGHT - list.clientHeight;
  }
  drawRows();
  showSample();
}

function move(by) {
  if (!browser.order.length) return;
  choose(Math.max(0, Math.min(browser.order.length - 1, browser.at + by)));
}

/** To the next sample of the group, whether it is listed or not. */
function moveInGroup(by) {
  const row = browser.row + by;
  if (browser.row < 0 || row < 0 || row >= COUNT || groupOf(row) !== groupOf(browser.row)) return;
  chooseRow(row);
}

function chooseRow(row) {
  const place = browser.order.indexOf(row);
  if (place >= 0) return choose(place);
  browser.at = -1;
  browser.row = row;
  drawRows();
  return showSample();
}

// Search: through every piece, a piece at a time; a newer search ends an older one.

async function search(query) {
  const number = ++browser.search;
  browser.query = query;
  browser.hits = null;
  browser.searching = "";
  if (!query) return refresh();
  const pattern = new RegExp(query.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), "iu");
  const hits = new Uint8Array(COUNT);
  let shown = performance.now();
  let group = 0;
  let row = 0;
  for (let place = 0; place < store.pieces; place++) {
    const piece = opened.has(`texts-${place}`) ? await opened.get(`texts-${place}`) : await readPiece(`texts-${place}`);
    if (number !== browser.search) return undefined;
    for (const each of piece) {
      const asked = pattern.test(each.question) || pattern.test(each.answer) || pattern.test(store.prompts[groups.prompt[group]][0]);
      for (const sample of each.samples) {
        if (asked || pattern.test(sample.text) || pattern.test(sample.detail)) hits[row] = 1;
        row++;
      }
      group++;
    }
    if (performance.now() - shown > 150 && place < store.pieces - 1) {
      shown = performance.now();
      browser.hits = hits;
      browser.searching = `; searched ${sayPart((place + 1) / store.pieces)}`;
      listRows();
      drawRows();
      await new Promise((done) => setTimeout(done));
    }
  }
  browser.hits = hits;
  browser.searching = "";
  return refresh();
}

// One sample

async function showSample() {
  const number = ++browser.shown;
  const row = browser.row;
  const place = byId("sample");
  if (row < 0) return place.replaceChildren(make("p", { class: "quiet" }, "No sample is chosen."));
  const group = groupOf(row);
  const piece = groups.piece[group];
  const wantsTokens = COLORINGS[browser.coloring] !== "none" && groups.detail[group];
  const [texts, tokens] = await Promise.all([openPiece(`texts-${piece}`), wantsTokens ? openPiece(`tokens-${piece}`) : null]);
  if (browser.shown !== number) return undefined;
  const first = firstRow[group];
  const record = texts[groups.place[group]];
  const detail = tokens?.[groups.place[group]]?.[row - first] ?? null;
  place.replaceChildren(...sampleNodes(row, record, record.samples[row - first], detail).filter(Boolean));
  place.scrollTop = 0;
  place.dataset.row = row;
  return undefined;
}

function sampleNodes(row, record, sample, tokens) {
  const group = groupOf(row);
  const [prompt, , source] = store.prompts[groups.prompt[group]];
  const fact = (name, value, title = null) => (value === null || value === "" ? null : make("div", { title }, make("dt", {}, name), make("dd", {}, value)));
  const lag = lagOf(row);
  const count = (value) => (value === null ? null : grouped.format(value));
  const verdict = rows.verdict[row];
  const reason = store.reasons[rows.reason[row]];
  return [
    make("div", { class: "sample-head" },
      make("span", { class: `badge verdict-${verdict}` }, MARKS[verdict], " ", reason === VERDICTS[verdict] ? reason : `${VERDICTS[verdict]}: ${reason}`),
      rows.mixed[row] ? make("span", { class: "badge mixed" }, "mixed languages") : null,
      make("span", { class: "quiet" }, sample.detail),
      make("span", { class: "spacer" }), mates(row)),
    make("dl", { class: "facts" },
      several ? fact("run", data.runs[groups.run[group]].name) : null,
      fact("step", groups.step[group], store.stages[groups.stage[group]]), fact("stage", store.stages[groups.stage[group]]),
      fact("prompt", prompt), fact("source", source), fact("fate", store.fates[groups.fate[group]]),
      fact("drawn in step", groups.drawn[group]),
      fact("weights", rows.version[row] === null ? null : `version ${rows.version[row]}${lag > 0 ? `, ${lag} behind` : ""}`),
      fact("tokens", count(rows.tokens[row])), fact("finish", store.finishes[rows.finish[row]]),
      fact("advantage", rows.advantage[row] === null ? "none" : say(rows.advantage[row])),
      fact("mean log-probability", rows.logprob[row] === null ? null : say(rows.logprob[row])),
      fact("mean entropy", rows.entropy[row] === null ? null : say(rows.entropy[row]))),
    make("h3", {}, "Question"),
    make("div", { class: "text" }, proseNodes(record.question, 0, record.question.length, hitMarks(record.question))),
    make("h3", {}, "Ground truth"),
    make("div", { class: "text" }, record.answer ? proseNodes(record.answer, 0, record.answer.length, hitMarks(record.answer)) : "not recorded"),
    make("div", { class: "response-head" }, make("h3", {}, "Response"), make("span", { class: "spacer" }), ...responseTools(sample)),
    coloringLegend(row, tokens),
    make("div", { class: "text response" }, responseNodes(row, sample, tokens)),
  ];
}

/** The group's samples as small squares, the chosen one ringed. */
function mates(row) {
  const group = groupOf(row);
  const first = firstRow[group];
  const squares = [];
  for (let each = first; each < firstRow[group + 1]; each++) {
    const label = `sample ${each - first + 1} of the group: ${VERDICTS[rows.verdict[each]]}`;
    squares.push(make("button", { type: "button", class: `mate verdict-${rows.verdict[each]}`, "aria-label": label, title: label, "aria-current": each === row ? "true" : null, onclick: () => chooseRow(each) }, MARKS[rows.verdict[each]]));
  }
  return make("span", { class: "mates", role: "group", "aria-label": "The group's samples" }, squares);
}

function responseTools(sample) {
  const marks = [sample.loop && "repeated passage", sample.foreign && "foreign script"].filter(Boolean);
  return [
    ...marks.map((mark) => make("mark", { class: mark === "repeated passage" ? "loop" : "foreign" }, mark)),
    make("button", { type: "button", "aria-pressed": String(browser.unfolded), onclick: toggleFold }, "thinking ", make("kbd", {}, "f")),
    make("button", { type: "button", "aria-pressed": String(browser.formulas), onclick: toggleFormulas }, "formulas ", make("kbd", {}, "m")),
    make("button", { type: "button", "aria-pressed": String(browser.coloring > 0), onclick: cycleColoring }, `tokens: ${COLORINGS[browser.coloring]} `, make("kbd", {}, "t")),
  ];
}

function coloringLegend(row, tokens) {
  const kind = COLORINGS[browser.coloring];
  if (kind === "none") return null;
  const line = (...parts) => make("p", { class: "coloring quiet" }, parts);
  const advantage = rows.advantage[row];
  if (!tokens) {
    const why = groups.detail[groupOf(row)] ? "This sample has no detail of its tokens." : "The page holds no detail of this sample's tokens.";
    return line(why);
  }
  if (kind === "advantage") {
    return line(advantage === null ? "No advantage: it was not trained on." : `Advantage ${say(advantage)}, the same for every token of a sample; full colour at 2.`);
  }
  if (!tokens[kind]) return line(kind === "entropy" ? "No entropy: its tokens were not scored." : "No log-probabilities are kept.");
  const steps = Array.from({ length: LEVELS + 1 }, (_, level) => make("i", { class: `k-${kind} l${level}` }));
  const ends = kind === "logprob" ? ["0: certain", `−${DEEPEST.logprob} nats or less`] : ["0", `${DEEPEST.entropy} nats or more`];
  return line(kind === "logprob" ? "log-probability as sampled " : "entropy ", ends[0], " ", make("span", { class: "ramp" }, steps), " ", ends[1]);
}

/** Where the thinking is: [start, end, where the rest begins]; null where none is to be told. The opening tag may be the prompt's. */
function thinkingOf(text) {
  const close = text.indexOf("</think>");
  const open = text.indexOf("<think>");
  if (close < 0) return open < 0 ? null : [open + 7, text.length, text.length, false];
  return [open >= 0 && open < close ? open + 7 : 0, close, close + 8, true];
}

function responseNodes(row, sample, tokens) {
  const { text } = sample;
  const kind = COLORINGS[browser.coloring];
  const marks = [...markSpans(sample), ...hitMarks(text)].sort((a, b) => a.start - b.start);
  const colored = tokens && kind !== "none" && (kind === "advantage" ? rows.advantage[row] !== null : tokens[kind]);
  const nodes = colored ? (start, end) => tokenNodes(row, text, tokens, kind, start, end) : (start, end) => proseNodes(text, start, end, marks);
  const thinking = thinkingOf(text);
  if (!thinking) return nodes(0, text.length);
  const [start, end, rest, closed] = thinking;
  const label = `thinking, ${grouped.format(end - start)} characters${closed ? "" : ", never closed"}`;
  // What is folded is not laid out; it is made when it is first unfolded.
  const inside = make("div", { class: "thinking" });
  const fold = make("details", { open: browser.unfolded || !closed }, make("summary", {}, label), inside);
  const unfold = () => fold.open && !inside.hasChildNodes() && inside.append(...nodes(start, end));
  fold.addEventListener("toggle", unfold);
  unfold();
  const before = text.slice(0, start).replace("<think>", "").trim() ? nodes(0, start) : [];
  return [...before, fold, ...nodes(afterBreaks(text, rest), text.length)];
}

/** A block stands on lines of its own: the line breaks around it would only open gaps. */
function afterBreaks(text, place) {
  while (text[place] === "\n") place++;
  return place;
}

function markSpans(sample) {
  const spans = [];
  if (sample.loop) {
    const [start, end, period, count] = sample.loop;
    spans.push({ start, end, kind: "loop", title: period ? `repeated: a stretch of ${period} characters, ${count} times` : "this passage occurred before, word for word" });
  }
  for (let place = 0; place < (sample.foreign?.length ?? 0); place += 2) {
    spans.push({ start: sample.foreign[place], end: sample.foreign[place + 1], kind: "foreign", title: "in a script that is none of the question's" });
  }
  return spans;
}

/** Where the search's words are. */
function hitMarks(text) {
  if (!browser.query) return [];
  const pattern = new RegExp(browser.query.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), "giu");
  return Array.from(text.matchAll(pattern), (match) => ({ start: match.index, end: match.index + match[0].length, kind: "hit", title: "" })).slice(0, 500);
}

/** A part of a text: formulas as such, and between them the marks. */
function proseNodes(text, start, end, marks) {
  const nodes = [];
  let at = start;
  const formulas = browser.formulas ? findFormulas(text.slice(start, end)) : [];
  for (const formula of formulas) {
    const opens = start + formula.start;
    nodes.push(...markedNodes(text, at, formula.display && text[opens - 1] === "\n" && opens > at ? opens - 1 : opens, marks));
    at = start + formula.end;
    const math = renderFormula(formula.source, formula.display);
    const hit = marks.find((mark) => mark.start < at && mark.end > opens);
    const node = math ?? make("code", { class: "formula-source", title: "a formula that is shown as its source" }, text.slice(opens, at));
    nodes.push(hit ? make("mark", { class: hit.kind, title: hit.title }, node) : node);
    if (math && formula.display && text[at] === "\n" && at < end) at++;
  }
  nodes.push(...markedNodes(text, at, end, marks));
  return nodes;
}

const TAG = /<\/?(?:think|answer)>|<[|｜][^<>|｜]{1,60}[|｜]>/g;

function markedNodes(text, start, end, marks) {
  const within = marks.filter((mark) => mark.start < end && mark.end > start);
  const edges = new Set([start, end]);
  for (const mark of within) edges.add(Math.max(start, mark.start)).add(Math.min(end, mark.end));
  const sorted = [...edges].sort((a, b) => a - b);
  const nodes = [];
  for (let place = 0; place + 1 < sorted.length; place++) {
    const [from, to] = [sorted[place], sorted[place + 1]];
    const over = within.filter((mark) => mark.start <= from && mark.end >= to);
    const inner = taggedNodes(text.slice(from, to));
    if (over.length) nodes.push(make("mark", { class: over.map((mark) => mark.kind).join(" "), title: over.map((mark) => mark.title).filter(Boolean).join("; ") || null }, inner));
    else nodes.push(...inner);
  }
  return nodes;
}

/** Tags and special tokens stand out. */
function taggedNodes(text) {
  const nodes = [];
  let at = 0;
  for (const match of text.matchAll(TAG)) {
    nodes.push(text.slice(at, match.index), make("span", { class: "tag" }, match[0]));
    at = match.index + match[0].length;
  }
  nodes.push(text.slice(at));
  return nodes;
}

/** The tokens that begin in a part of the text. Tokens of one character have one end and stand together. */
function tokenNodes(row, text, tokens, kind, start, end) {
  const nodes = [];
  let from = 0;
  const many = tokens.ends.length;
  for (let token = 0; token < many; token++) {
    const first = token;
    const to = from + tokens.ends[token];
    while (token + 1 < many && tokens.ends[token + 1] === 0) token++;
    if (to > start && from < end) {
      const node = make("span", { class: `token k-${kind} ${levelClass(row, tokens, kind, first, token)}` }, text.slice(Math.max(from, start), Math.min(to, end)));
      node.dataset.first = first;
      node.dataset.last = token;
      nodes.push(node);
    }
    from = to;
  }
  if (from < end) nodes.push(text.slice(Math.max(from, start), end));
  return nodes;
}

function levelClass(row, tokens, kind, first, last) {
  if (kind === "advantage") {
    const advantage = rows.advantage[row];
    return `l${Math.min(LEVELS, Math.round((Math.abs(advantage) / 2) * LEVELS))} ${advantage < 0 ? "below" : "above"}`;
  }
  let most = 0;
  for (let token = first; token <= last; token++) most = Math.max(most, Math.abs(tokens[kind][token] ?? 0));
  return `l${Math.min(LEVELS, Math.round((most / UNIT / DEEPEST[kind]) * LEVELS))}`;
}

function tokenTip(node, event) {
  const row = Number(byId("sample").dataset.row);
  const group = groupOf(row);
  openPiece(`tokens-${groups.piece[group]}`).then((tokens) => {
    const detail = tokens[groups.place[group]][row - firstRow[group]];
    const lines = [];
    for (let token = Number(node.dataset.first); token <= Number(node.dataset.last); token++) {
      const logprob = detail.logprob?.[token];
      const entropy = detail.entropy?.[token];
      lines.push(`token ${token + 1} of ${detail.ends.length}`);
      if (logprob !== undefined && logprob !== null) lines.push(`log-probability ${(logprob / UNIT).toFixed(3).replace("-", "−")}, probability ${sayPart(Math.exp(logprob / UNIT))}`);
      if (entropy !== undefined && entropy !== null) lines.push(`entropy ${(entropy / UNIT).toFixed(3)} nats`);
    }
    if (rows.advantage[row] !== null) lines.push(`advantage ${say(rows.advantage[row])}`);
    showTip(lines, event.clientX, event.clientY);
  });
}

function toggleFold() {
  browser.unfolded = !browser.unfolded;
  showSample();
}

function toggleFormulas() {
  browser.formulas = !browser.formulas;
  showSample();
}

function cycleColoring() {
  browser.coloring = (browser.coloring + 1) % COLORINGS.length;
  if (browser.coloring) browser.unfolded = true;
  showSample();
}

// Beginning

function showFacets() {
  for (const [name, facet] of Object.entries(FACETS)) {
    const counts = new Array(facet.names.length).fill(0);
    for (let row = 0; row < COUNT; row++) counts[facet.of(row)]++;
    const values = facet.names.map((label, value) => ({ label, value, count: counts[value] })).filter((each) => each.count);
    browser.picked[name] = new Set();
    if (values.length < 2) continue;
    values.sort((a, b) => (["run", "stage", "verdict"].includes(name) ? a.value - b.value : b.count - a.count));
    byId("facets").append(make("fieldset", {}, make("legend", {}, name), values.length > CHIPS ? facetMenu(name, values) : values.map((each) => facetChip(name, each))));
  }
}

function facetChip(name, { label, value, count }) {
  const chip = make("button", { type: "button", class: "chip", "aria-pressed": "false", "data-facet": name, "data-value": label }, label, " ", make("small", {}, grouped.format(count)));
  chip.addEventListener("click", () => {
    const picked = browser.picked[name];
    if (!picked.delete(value)) picked.add(value);
    chip.setAttribute("aria-pressed", String(picked.has(value)));
    refresh();
  });
  return chip;
}

function facetMenu(name, values) {
  return make("select", {
    "aria-label": name, "data-facet": name,
    onchange: (event) => {
      browser.picked[name] = new Set(event.target.value === "" ? [] : [Number(event.target.value)]);
      refresh();
    },
  }, make("option", { value: "" }, `all ${values.length}`), values.map((each) => make("option", { value: each.value }, `${each.label} (${grouped.format(each.count)})`)));
}

function clearFilters() {
  byId("filters").reset();
  for (const picked of Object.values(browser.picked)) picked.clear();
  for (const chip of byId("facets").querySelectorAll("[aria-pressed]")) chip.setAttribute("aria-pressed", "false");
  byId("descending").setAttribute("aria-pressed", "false");
  byId("descending").textContent = "↑";
  if (browser.query) search("");
  else refresh();
}

function showSamples() {
  const held = groups.run.length;
  const parts = [];
  if (!COUNT) {
    parts.push(store.found_groups ? "No group of the sample files can be read." : "No samples were recorded: the run's folder has no samples/.");
  } else {
    parts.push("A run records some groups of a step, of each fate in turn: shares among them are not the run's.");
  }
  if (COUNT && held < store.found_groups) {
    parts.push(`${grouped.format(held)} of ${grouped.format(store.found_groups)} recorded groups are in this page, taken evenly over the steps.`);
  }
  const detailed = groups.detail.filter(Boolean).length;
  if (COUNT && detailed < held) parts.push(detailed ? `Tokens can be coloured in ${grouped.format(detailed)} of ${grouped.format(held)} groups.` : "No detail of tokens is in this page.");
  byId("samples-note").textContent = parts.join(" ");
  byId("sample-notes").append(...store.notes.map((note) => make("li", {}, note)));
  byId("sample-notes").hidden = !store.notes.length;
  byId("browser").hidden = !COUNT && !store.notes.length;
  if (!COUNT) {
    for (const id of ["filters", "found"]) byId(id).hidden = true;
    document.querySelector(".panes").hidden = true;
    return;
  }
  const sortable = Object.entries(SORTS).filter(([, value]) => rows.group.some((_, row) => value(row) !== null));
  byId("sort").append(...sortable.map(([name]) => make("option", { value: name }, name)));
  const steps = groups.step.reduce(([low, high], step) => [Math.min(low, step), Math.max(high, step)], [Infinity, -Infinity]);
  byId("step-from").placeholder = steps[0];
  byId("step-to").placeholder = steps[1];
  showFacets();
  for (const id of ["step-from", "step-to", "tokens-from", "tokens-to"]) byId(id).addEventListener("input", refresh);
  byId("sort").addEventListener("change", refresh);
  byId("descending").addEventListener("click", (event) => {
    const down = event.currentTarget.getAttribute("aria-pressed") !== "true";
    event.currentTarget.setAttribute("aria-pressed", String(down));
    event.currentTarget.textContent = down ? "↓" : "↑";
    refresh();
  });
  byId("clear").addEventListener("click", clearFilters);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  let waiting = 0;
  byId("text").addEventListener("input", (event) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => search(event.target.value.trim()), SEARCH_DELAY);
  });
  byId("list").addEventListener("scroll", () => requestAnimationFrame(() => {
    if (Math.floor(byId("list").scrollTop / ROW_HEIGHT) - 4 !== drawnFrom) drawRows();
  }));
  byId("list").addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor(byId("list").clientHeight / ROW_HEIGHT) - 1);
    const by = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -COUNT, End: COUNT }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    move(by);
  });
  const sample = byId("sample");
  sample.addEventListener("pointerover", (event) => (event.target.classList.contains("token") ? tokenTip(event.target, event) : hideTip()));
  sample.addEventListener("pointerleave", hideTip);
  sample.addEventListener("keydown", stepToken);
  listRows();
  choose(browser.order.length ? 0 : -1);
}

/** ← and → in a sample go from token to token, where they are coloured. */
function stepToken(event) {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const all = [...byId("sample").querySelectorAll(".token")];
  if (!by || !all.length) return;
  event.preventDefault();
  const at = all.findIndex((node) => node.classList.contains("current"));
  all[at]?.classList.remove("current");
  const node = all[Math.max(0, Math.min(all.length - 1, at + by))];
  node.classList.add("current");
  node.scrollIntoView({ block: "nearest" });
  const box = node.getBoundingClientRect();
  tokenTip(node, { clientX: box.left, clientY: box.bottom });
}
