// What the other scripts draw with: elements, numbers, ticks, colours. Every text enters as a text node, never as markup.

const SVG = "http://www.w3.org/2000/svg";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

/** An element. attributes: `class`, `on<event>` handlers, `style` as an object, else attributes; null and false are left out. */
function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function makeSvg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "style") Object.assign(node.style, value);
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const COLORS = 8;
const color = (place) => `var(--c${place % COLORS})`;
const FATE_COLORS = {
  trained: "var(--c0)", recovered: "var(--c2)", uniform: "var(--grey)", expired: "var(--c1)", aborted: "var(--c4)",
  failed: "var(--ink)", pending: "var(--c6)", waiting: "var(--c6)",
};
const REASON_COLORS = {
  right: "var(--right)", wrong: "var(--wrong)", process: "var(--c4)", truncated: "var(--c3)", format: "var(--c5)",
  repetition: "var(--c6)", timeout: "var(--c7)", error: "var(--ink)", unjudged: "var(--grey)",
};
const PHASE_COLORS = {
  sampling: "var(--c0)", rewarding: "var(--c3)", scoring: "var(--c5)", update: "var(--c4)", "weight sync": "var(--c2)",
  checkpoint: "var(--c6)", evaluation: "var(--c1)", other: "var(--grey)",
};

const grouped = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });

/** A number for a reader, by unit. digits: significant ones. */
function say(value, unit = "", digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (unit === "share") return `${trim((100 * value).toFixed(Math.abs(value) < 0.1 && value !== 0 ? 2 : 1))} %`;
  const size = Math.abs(value);
  if (size >= 10000) return grouped.format(value);
  if (Number.isInteger(value)) return String(value);
  if (size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e").replace("-", "−").replace("e-", "e−");
  return trim(value.toPrecision(digits)).replace("-", "−");
}

function trim(text) {
  return text.includes(".") && !text.includes("e") ? text.replace(/\.?0+$/, "") : text;
}

function sayTick(value, unit) {
  if (unit === "share") return `${trim((100 * value).toFixed(2))}%`;
  const size = Math.abs(value);
  if (size >= 1e6) return `${trim((value / 1e6).toFixed(2))}M`;
  if (size >= 1e4) return `${trim((value / 1e3).toFixed(1))}k`;
  return say(value, unit, 3);
}

function saySeconds(seconds) {
  if (seconds < 120) return `${trim(seconds.toFixed(1))} s`;
  if (seconds < 7200) return `${trim((seconds / 60).toFixed(1))} min`;
  return `${trim((seconds / 3600).toFixed(1))} h`;
}

function sayPart(part) {
  return part > 0 && part < 0.001 ? "< 0.1 %" : `${trim((100 * part).toFixed(1))} %`;
}

/** About `count` round numbers from low to high. */
function ticks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= raw * 0.999) * power;
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at++) found.push(Number((at * step).toPrecision(12)));
  return found;
}

/** The place of the value in sorted `values` that is nearest to x. */
function nearest(values, x) {
  let low = 0;
  let high = values.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] < x) low = middle + 1;
    else high = middle;
  }
  return low > 0 && x - values[low - 1] <= values[low] - x ? low - 1 : low;
}

/** Shows the tooltip near a place of the window, inside it. */
function showTip(lines, x, y) {
  const tip = byId("tip");
  tip.replaceChildren(...lines.map((line) => make("div", {}, line)));
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 12, innerWidth - width - 4))}px`;
  tip.style.top = `${y + 16 + height > innerHeight ? y - height - 8 : y + 16}px`;
}

function hideTip() {
  byId("tip").hidden = true;
}
