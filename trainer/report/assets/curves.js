// The charts, the ledger's flow, the times and the alarms. What a chart shows is data.charts' to say (trainer/report/charts.py).

const view = { axis: "step", smoothing: 1, hidden: new Set(), hiddenSeries: new Set(), cursor: null };
const several = data.runs.length > 1;
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "4 4"];
const HEIGHT = 190;
const MARGIN = { left: 50, right: 12, top: 20, bottom: 24 };
const HEADROOM = 3; // a level more than so many times above the lines is told in the legend and not drawn
const CHARACTER = 6.6; // pixels that a letter of a stage's name may take

const runColor = (run) => color(run);
const shownRuns = () => data.runs.map((run, place) => ({ ...run, place })).filter((run) => !view.hidden.has(run.place) && axisOf(run));

/** The x of each of a run's steps, null where the run cannot be drawn over this axis. */
function axisOf(run) {
  return view.axis === "step" ? run.steps : run.drawn;
}

/** Centred moving mean of `window` steps (odd) within each stage, so that it neither lags nor softens a stage's jump. */
function smooth(values, window, bands) {
  if (window <= 1) return values;
  const half = window >> 1;
  const means = new Array(values.length).fill(null);
  for (const { first, last } of bands) {
    let sum = 0;
    let count = 0;
    let from = first;
    let to = first;
    for (let place = first; place <= last; place++) {
      for (; to <= Math.min(last, place + half); to++) if (values[to] !== null) (sum += values[to]), count++;
      for (; from < place - half; from++) if (values[from] !== null) (sum -= values[from]), count--;
      if (values[place] !== null) means[place] = sum / count;
    }
  }
  return means;
}

class Plot {
  /** about: {title, unit, about}. run: the only run of a stack. */
  constructor(about, run = null) {
    this.spec = about;
    this.run = run;
    this.svg = makeSvg("svg", {
      class: "plot", tabindex: "0", role: "img",
      onpointermove: (event) => this.point(event),
      onpointerleave: () => setCursor(null),
      onkeydown: (event) => this.key(event),
      onblur: () => setCursor(null),
    });
    this.legend = make("div", { class: "legend" });
    const title = run && several ? `${about.title} · ${run.name}` : about.title;
    this.figure = make("figure", { class: "chart" },
      make("figcaption", { title: about.about }, make("strong", {}, title), " ", make("span", { class: "quiet" }, about.unit === "share" ? "" : about.unit)),
      this.svg, this.legend);
    this.figure.dataset.title = about.title;
  }

  get place() {
    return { left: MARGIN.left, right: this.width - MARGIN.right, top: MARGIN.top, bottom: HEIGHT - MARGIN.bottom };
  }

  draw() {
    this.width = Math.max(220, this.figure.clientWidth - 24);
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    this.svg.setAttribute("height", HEIGHT);
    this.svg.replaceChildren();
    this.runs = this.run ? shownRuns().filter((run) => run.place === this.run.place) : shownRuns();
    this.figure.hidden = this.run !== null && this.runs.length === 0;
    this.crosshair = makeSvg("g", { class: "crosshair" });
    if (this.prepare()) {
      this.frame();
      this.body();
    } else {
      this.svg.append(makeSvg("text", { x: this.width / 2, y: HEIGHT / 2, class: "empty" }, "not measured in the runs shown"));
    }
    this.svg.append(this.crosshair);
    this.legendOf(null);
    this.svg.setAttribute("aria-label", `${this.figure.querySelector("figcaption").textContent.trim()}: ${this.legend.textContent}`);
  }

  x(value) {
    const { left, right } = this.place;
    return left + ((value - this.x0) / (this.x1 - this.x0)) * (right - left);
  }

  y(value) {
    const { top, bottom } = this.place;
    return bottom - ((value - this.y0) / (this.y1 - this.y0)) * (bottom - top);
  }

  /** Takes in the x of the runs shown, with room for evaluations before training. */
  spanX(points) {
    this.x0 = Math.min(...points.map(([low]) => low));
    this.x1 = Math.max(...points.map(([, high]) => high));
    if (this.x1 <= this.x0) (this.x0 -= 0.5), (this.x1 += 0.5);
  }

  frame() {
    const { left, right, top, bottom } = this.place;
    const ground = makeSvg("g", { class: "ground" });
    const first = this.runs[0];
    const xs = axisOf(first);
    const edge = (place) => (place <= 0 ? xs[0] : (xs[place - 1] + xs[Math.min(place, xs.length - 1)]) / 2);
    const bands = first.bands.map((band, place) => ({
      names: band.names,
      from: Math.max(left, this.x(place === 0 ? Math.min(xs[0], this.x0) : edge(band.first))),
      to: Math.min(right, this.x(place === first.bands.length - 1 ? xs[xs.length - 1] : edge(band.last + 1))),
    }));
    // All stages are named at the same length, the longest at which all have room; where none is, each by what fits it.
    const fits = (band, name) => name.length * CHARACTER < band.to - band.from - 6;
    const named = (band, length) => band.names[Math.min(length, band.names.length - 1)];
    const length = [0, 1, 2].find((each) => bands.every((band) => fits(band, named(band, each))));
    bands.forEach((band, place) => {
      if (place % 2) ground.append(makeSvg("rect", { class: "band", x: band.from, y: top, width: Math.max(0, band.to - band.from), height: bottom - top }));
      const name = length === undefined ? band.names.find((each) => fits(band, each)) : named(band, length);
      if (name) ground.append(makeSvg("text", { class: "band-name", x: (band.from + band.to) / 2, y: top - 7 }, name, makeSvg("title", {}, band.names[0])));
    });
    for (const tick of ticks(this.y0, this.y1, 5)) {
      ground.append(
        makeSvg("line", { class: "grid", x1: left, x2: right, y1: this.y(tick), y2: this.y(tick) }),
        makeSvg("text", { class: "tick-y", x: left - 6, y: this.y(tick) + 3.5 }, sayTick(tick, this.spec.unit)));
    }
    for (const tick of ticks(this.x0, this.x1, Math.max(2, Math.min(7, this.width / 75)))) {
      if (tick !== Math.round(tick)) continue;
      ground.append(makeSvg("text", { class: "tick-x", x: this.x(tick), y: bottom + 15 }, sayTick(tick, "")));
    }
    ground.append(makeSvg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }));
    this.svg.append(ground);
  }

  path(xs, ys) {
    let d = "";
    let open = false;
    for (let place = 0; place < xs.length; place++) {
      if (ys[place] === null) {
        open = false;
        continue;
      }
      d += `${open ? "L" : "M"}${this.x(xs[place]).toFixed(1)} ${this.y(ys[place]).toFixed(1)}`;
      open = true;
    }
    return d;
  }

  point(event) {
    const box = this.svg.getBoundingClientRect();
    const { left, right } = this.place;
    const at = ((event.clientX - box.left) / box.width) * this.width;
    if (this.x1 === undefined || at < left - 8 || at > right + 8) return setCursor(null);
    return setCursor(this.x0 + ((at - left) / (right - left)) * (this.x1 - this.x0));
  }

  key(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move || !this.runs.length) return;
    event.preventDefault();
    const xs = axisOf(this.runs[0]);
    const from = view.cursor === null ? (move > 0 ? -1 : xs.length) : nearest(xs, view.cursor);
    setCursor(xs[Math.max(0, Math.min(xs.length - 1, from + move * (event.shiftKey ? 10 : 1)))]);
  }

  /** Where the cursor is: a line, and the legend's values there. */
  mark() {
    this.crosshair.replaceChildren();
    if (this.x1 === undefined || !this.runs.length) return undefined;
    if (view.cursor !== null) {
      const { left, right, top, bottom } = this.place;
      const xs = axisOf(this.runs[0]);
      if (view.cursor < this.x0 || view.cursor > this.x1) return this.legendOf(view.cursor);
      const place = nearest(xs, view.cursor);
      const x = Math.max(left, Math.min(right, this.x(xs[place])));
      const side = x > (left + right) / 2 ? "end" : "start";
      this.crosshair.append(
        makeSvg("line", { x1: x, x2: x, y1: top, y2: bottom }),
        makeSvg("text", { x: x + (side === "end" ? -5 : 5), y: bottom - 5, "text-anchor": side },
          view.axis === "step" ? `step ${grouped.format(xs[place])}` : `${grouped.format(xs[place])} drawn, step ${grouped.format(this.runs[0].steps[place])}`));
    }
    return this.legendOf(view.cursor);
  }

  item(swatch, label, value, extra = {}) {
    return make(extra.onclick ? "button" : "span", { class: "key", type: extra.onclick ? "button" : null, ...extra }, swatch, make("span", {}, label), make("b", {}, value));
  }

  swatch(stroke, dash = "", filled = false) {
    const swatch = makeSvg("svg", { class: "swatch", viewBox: "0 0 18 8", width: 18, height: 8, "aria-hidden": "true" });
    const line = filled ? makeSvg("rect", { x: 3, y: 0, width: 9, height: 8, rx: 2 }) : makeSvg("line", { x1: 0, x2: 18, y1: 4, y2: 4, "stroke-width": 2.5, "stroke-dasharray": dash || null });
    line.style[filled ? "fill" : "stroke"] = stroke;
    swatch.append(line);
    return swatch;
  }
}

class LinePlot extends Plot {
  /** Collects the lines: {run, label, role, stroke, dash, xs, raw, means}. */
  prepare() {
    this.lines = [];
    this.labels = [];
    for (const [place, series] of this.spec.series.entries()) {
      this.labels.push({ label: series.label, role: series.role, place });
      for (const run of this.runs) {
        const raw = run.columns[series.key];
        if (!raw) continue;
        const level = series.role === "level";
        this.lines.push({
          run, label: series.label, role: series.role, xs: axisOf(run), raw, stroke: level ? (several ? runColor(run.place) : "var(--ink)") : several ? runColor(run.place) : color(place),
          dash: level ? "4 3" : several ? DASHES[place % DASHES.length] : "", means: level ? raw : smooth(raw, view.smoothing, run.bands),
        });
      }
    }
    if (this.spec.evaluations) {
      const names = [...new Set(data.runs.flatMap((run) => run.evaluations.map((each) => each.name)))].sort();
      names.forEach((name, place) => {
        const label = `${name}, pass@1`;
        this.labels.push({ label, role: "points", place });
        for (const run of this.runs) {
          const found = run.evaluations.find((each) => each.name === name);
          if (found) {
            const xs = view.axis === "step" ? found.steps : found.drawn;
            this.lines.push({ run, label, role: "points", xs, steps: found.steps, raw: found.values, means: found.values, stroke: several ? runColor(run.place) : color(place + 1), dash: several ? DASHES[(place + 1) % DASHES.length] : "" });
          }
        }
      });
    }
    this.drawn = this.lines.filter((line) => !view.hiddenSeries.has(this.id(line.label)));
    const moving = this.drawn.filter((line) => line.role !== "level" && line.raw.some((value) => value !== null));
    const spans = (moving.length ? moving : this.drawn);
    if (!spans.length) return false;
    let low = Infinity;
    let high = -Infinity;
    for (const line of spans) for (const value of line.raw) if (value !== null) (low = Math.min(low, value)), (high = Math.max(high, value));
    if (!Number.isFinite(low)) return false;
    for (const line of this.drawn) {
      if (line.role !== "level") continue;
      const values = line.raw.filter((value) => value !== null);
      line.far = Math.max(...values) > HEADROOM * Math.max(high, 0);
      if (!line.far) (low = Math.min(low, ...values)), (high = Math.max(high, ...values));
    }
    this.rangeY(low, high);
    this.spanX([...this.runs.map((run) => [axisOf(run)[0], axisOf(run).at(-1)]), ...spans.map((line) => [line.xs[0], line.xs.at(-1)])]);
    return true;
  }

  rangeY(low, high) {
    if (this.spec.zero && low >= 0) low = 0;
    const least = this.spec.unit === "share" && !this.spec.zero ? 0.1 : Math.max(Math.abs(high), 1e-12) * 0.02;
    if (high - low < least) {
      const middle = (low + high) / 2;
      (low = middle - least / 2), (high = middle + least / 2);
    }
    const room = 0.06 * (high - low);
    this.y0 = low === 0 ? 0 : low - room;
    this.y1 = high + room;
    if (this.y0 < 0 && low >= 0) this.y0 = 0;
  }

  /** The place of a line's value at the cursor; -1 where the line has begun later or ended before. */
  at(line, cursor) {
    const { xs } = line;
    const half = xs.length > 1 ? (xs.at(-1) - xs[0]) / (xs.length - 1) / 2 : 0.5;
    if (!line.steps && (cursor < xs[0] - half || cursor > xs.at(-1) + half)) return -1;
    return nearest(xs, cursor);
  }

  id(label) {
    return `${this.spec.title}/${label}`;
  }

  body() {
    const group = makeSvg("g", { class: "lines" });
    for (const line of this.drawn) {
      if (line.far) continue;
      const smoothed = line.role === "line" && view.smoothing > 1 && line.means !== line.raw;
      if (smoothed) group.append(this.stroke(line, this.thin(line.xs, line.raw), "raw", ""));
      group.append(this.stroke(line, this.thin(line.xs, line.means), line.role, line.dash));
      const few = line.raw.filter((value) => value !== null).length;
      if (line.role === "points" || few === 1) {
        line.xs.forEach((x, place) => {
          if (line.raw[place] === null) return;
          const dot = makeSvg("circle", { cx: this.x(x), cy: this.y(line.raw[place]), r: 3.2 });
          dot.style.fill = line.stroke;
          group.append(dot);
        });
      }
    }
    this.svg.append(group);
  }

  stroke(line, [xs, ys], kind, dash) {
    const path = makeSvg("path", { class: `line ${kind}`, d: this.path(xs, ys), "stroke-dasharray": dash || null });
    path.style.stroke = line.stroke;
    return path;
  }

  /** Of more points than pixels, the least and the greatest of each pixel's, in their order: no spike is lost. */
  thin(xs, ys) {
    const size = Math.floor(xs.length / this.width);
    if (size < 3) return [xs, ys];
    const kept = [];
    for (let start = 0; start < xs.length; start += size) {
      let low = -1;
      let high = -1;
      for (let place = start; place < Math.min(xs.length, start + size); place++) {
        if (ys[place] === null) continue;
        if (low < 0 || ys[place] < ys[low]) low = place;
        if (high < 0 || ys[place] > ys[high]) high = place;
      }
      if (low >= 0) kept.push(...(low === high ? [low] : low < high ? [low, high] : [high, low]));
    }
    return [kept.map((place) => xs[place]), kept.map((place) => ys[place])];
  }

  legendOf(cursor) {
    const items = this.labels.map(({ label, role, place }) => {
      const lines = (this.lines ?? []).filter((line) => line.label === label);
      if (!lines.length) return null;
      const hidden = view.hiddenSeries.has(this.id(label));
      const values = lines.map((line) => {
        const at = cursor === null ? line.raw.findLastIndex((value) => value !== null) : this.at(line, cursor);
        // An evaluation is read at its own step, which may be far from the cursor.
        const text = say(line.raw[at], this.spec.unit) + (line.far ? " (above)" : "") + (line.steps && cursor !== null ? ` at ${line.steps[at]}` : "");
        return several ? make("b", { style: { color: line.stroke } }, text) : text;
      });
      const dash = role === "level" ? "4 3" : several ? lines[0].dash : "";
      return this.item(this.swatch(several ? "var(--quiet)" : lines[0].stroke, dash), label, values.flatMap((value, at) => (at ? [" ", value] : [value])), {
        "aria-pressed": String(!hidden), title: cursor === null ? "the last value; click to hide or show" : "at the cursor",
        onclick: () => {
          if (hidden) view.hiddenSeries.delete(this.id(label));
          else view.hiddenSeries.add(this.id(label));
          this.draw();
          [...this.legend.querySelectorAll(".key")][this.labels.filter((each) => this.lines.some((line) => line.label === each.label)).findIndex((each) => each.label === label)]?.focus();
        },
      });
    });
    this.legend.replaceChildren(...items.filter(Boolean));
  }
}

class StackPlot extends Plot {
  /** parts: name → [values of a step], with colours. whole: the top of the axis, null for the greatest sum. */
  constructor(about, run, parts, colors, whole) {
    super(about, run);
    this.parts = Object.entries(parts).filter(([, values]) => values.some(Boolean));
    this.colors = colors;
    this.whole = whole;
  }

  prepare() {
    if (!this.runs.length || !this.parts.length) return false;
    const xs = axisOf(this.runs[0]);
    const size = Math.max(1, Math.ceil(xs.length / (this.width / 2.5)));
    this.blocks = [];
    for (let start = 0; start < xs.length; start += size) {
      const end = Math.min(xs.length, start + size);
      const means = this.parts.map(([, values]) => {
        let sum = 0;
        for (let place = start; place < end; place++) sum += values[place] ?? 0;
        return sum / (end - start);
      });
      this.blocks.push({ start, end, means });
    }
    const half = xs.length > 1 ? (xs.at(-1) - xs[0]) / (xs.length - 1) / 2 : 0.5;
    this.spanX([[xs[0] - half, xs.at(-1) + half]]);
    this.edge = (place) => (place === 0 ? this.x0 : place >= xs.length ? this.x1 : (xs[place - 1] + xs[place]) / 2);
    this.y0 = 0;
    this.y1 = this.whole ?? 1.05 * Math.max(1e-9, ...this.blocks.map((block) => block.means.reduce((a, b) => a + b, 0)));
    return true;
  }

  body() {
    const bases = this.blocks.map(() => 0);
    const group = makeSvg("g", { class: "stack" });
    this.parts.forEach(([name], part) => {
      let over = "";
      let back = "";
      this.blocks.forEach((block, place) => {
        const [left, right] = [this.x(this.edge(block.start)).toFixed(1), this.x(this.edge(block.end)).toFixed(1)];
        const top = this.y(bases[place] + block.means[part]).toFixed(1);
        const base = this.y(bases[place]).toFixed(1);
        over += `${place ? "L" : "M"}${left} ${top}L${right} ${top}`;
        back = `L${right} ${base}L${left} ${base}${back}`;
        bases[place] += block.means[part];
      });
      const path = makeSvg("path", { d: `${over}${back}Z` });
      path.style.fill = this.colors[name] ?? color(part);
      group.append(path);
    });
    this.svg.append(group);
  }

  legendOf(cursor) {
    if (!this.runs?.length) return;
    const xs = axisOf(this.runs[0]);
    const at = cursor === null ? xs.length - 1 : cursor > this.x1 ? -1 : nearest(xs, cursor);
    const unit = this.spec.unit;
    this.legend.replaceChildren(...this.parts.map(([name, values], part) =>
      this.item(this.swatch(this.colors[name] ?? color(part), "", true), name, at < 0 ? "–" : unit === "s" ? saySeconds(values[at] ?? 0) : say(values[at] ?? 0, unit))));
  }
}

const plots = [];
let marking = false;

function setCursor(x) {
  if (view.cursor === x) return;
  view.cursor = x;
  if (marking) return;
  marking = true;
  requestAnimationFrame(() => {
    marking = false;
    for (const plot of plots) plot.mark();
  });
}

function drawPlots() {
  view.cursor = null;
  for (const plot of plots) plot.draw();
}

function showCurves() {
  const place = byId("charts");
  for (const spec of data.charts) {
    const kind = spec.kind === "stack" ? data.runs.map((run, at) => verdictPlot(spec, { ...run, place: at })) : [new LinePlot(spec)];
    for (const plot of kind) {
      plots.push(plot);
      place.append(plot.figure);
    }
  }
  const legend = byId("run-legend");
  if (several) {
    data.runs.forEach((run, at) => {
      const chip = make("button", { type: "button", class: "chip", "aria-pressed": "true", onclick: () => toggleRun(chip, at) }, make("i", { class: "dot", style: { background: runColor(at) } }), run.name);
      legend.append(chip);
    });
  }
  const slider = byId("smoothing");
  view.smoothing = Math.max(...data.runs.map((run) => run.smoothing));
  const saySmoothing = () => (byId("smoothing-value").textContent = view.smoothing > 1 ? `${view.smoothing} steps` : "none");
  slider.value = view.smoothing;
  saySmoothing();
  slider.addEventListener("input", () => {
    view.smoothing = Number(slider.value);
    saySmoothing();
    requestAnimationFrame(drawPlots);
  });
  for (const radio of document.getElementsByName("axis")) {
    if (radio.value === "drawn" && data.runs.every((run) => !run.drawn)) radio.disabled = true;
    radio.addEventListener("change", () => {
      view.axis = radio.value;
      drawPlots();
    });
  }
  const unchanging = [];
  if (data.constant.length) {
    const seen = data.constant.map(([title, label, value]) => `${title}${label.toLowerCase() === title.toLowerCase() ? "" : `, ${label}`}: ${say(value)}`);
    unchanging.push(`The same at every step, so not drawn: ${seen.join(" · ")}.`);
  }
  if (data.missing.length) unchanging.push(`Not in these metrics: ${data.missing.join(", ")}.`);
  byId("unchanging").textContent = unchanging.join(" ");
}

function toggleRun(chip, at) {
  if (view.hidden.has(at)) view.hidden.delete(at);
  else view.hidden.add(at);
  chip.setAttribute("aria-pressed", String(!view.hidden.has(at)));
  drawPlots();
}

function verdictPlot(spec, run) {
  const parts = Object.fromEntries(spec.series.filter((each) => run.columns[each.key]).map((each) => [each.label, run.columns[each.key]]));
  return new StackPlot(spec, run, parts, REASON_COLORS, 1);
}

// The ledger: drawn → the fates; what was left over of a step's batch goes through a node of its own.

const SURPLUS = ["recovered", "pending", "expired"];
const LOST = ["uniform", "aborted", "failed"];
const ROOMY = 18; // a ribbon so thick holds its own label

function showLedgers() {
  for (const [place, run] of data.runs.entries()) byId("flows").append(ledgerFigure(run, place));
}

function runTitle(run, place) {
  return several ? make("h3", {}, make("i", { class: "dot", style: { background: runColor(place) } }), run.name) : null;
}

function ledgerFigure(run, place) {
  const ledger = run.ledger;
  if (!ledger || !ledger.drawn) return make("figure", { class: "card" }, runTitle(run, place), make("p", { class: "quiet" }, "These metrics keep no ledger of prompts."));
  const fates = ["trained", ...SURPLUS, ...LOST].filter((fate) => fate in ledger);
  const sum = fates.reduce((total, fate) => total + ledger[fate], 0);
  const none = fates.filter((fate) => !ledger[fate]);
  return make("figure", { class: "card" }, runTitle(run, place), flowSvg(ledger, fates.filter((fate) => ledger[fate])),
    make("figcaption", { class: "quiet" },
      none.length ? `None ${listed(none)}. ` : "",
      sum === ledger.drawn ? "The fates add up to the prompts drawn." : make("strong", { class: "bad" }, `The fates add up to ${grouped.format(sum)}, not to the ${grouped.format(ledger.drawn)} drawn.`)));
}

function listed(words) {
  return words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} or ${words.at(-1)}`;
}

function flowSvg(ledger, fates) {
  const [width, height, top, gap, bar] = [640, 250, 26, 16, 12];
  const room = height - top - 8;
  const surplus = fates.filter((fate) => SURPLUS.includes(fate));
  const whole = fates.reduce((total, fate) => total + ledger[fate], 0);
  const scale = (room - gap * Math.max(0, fates.length - 1)) / whole;
  const thick = (count) => Math.max(1.5, count * scale);
  const [x0, x1, x2] = [4, 250, 440];
  const svg = makeSvg("svg", { viewBox: `0 0 ${width} ${height}`, class: "flow", role: "img" });
  svg.setAttribute("aria-label", `${ledger.drawn} prompts drawn: ${fates.map((fate) => `${ledger[fate]} ${fate}`).join(", ")}`);
  const ribbons = makeSvg("g", { class: "ribbons" });
  const bars = makeSvg("g");
  svg.append(ribbons, bars);

  const ribbon = (fromX, fromY, toX, toY, size, fill, title) => {
    const middle = (fromX + toX) / 2;
    const path = makeSvg("path", {
      d: `M${fromX} ${fromY}C${middle} ${fromY} ${middle} ${toY} ${toX} ${toY}v${size}C${middle} ${toY + size} ${middle} ${fromY + size} ${fromX} ${fromY + size}Z`,
    }, makeSvg("title", {}, title));
    path.style.fill = fill;
    ribbons.append(path);
  };
  const node = (x, y, size, fill) => {
    const rect = makeSvg("rect", { x, y, width: bar, height: size, rx: 2 });
    rect.style.fill = fill;
    bars.append(rect);
  };
  const label = (x, y, name, count, anchor = "start") =>
    bars.append(makeSvg("text", { x, y, "text-anchor": anchor, class: anchor === "middle" ? "halo" : null }, makeSvg("tspan", { class: "name" }, name), ` ${grouped.format(count)}`, name === "drawn" ? "" : makeSvg("tspan", { class: "part" }, `  ${sayPart(count / ledger.drawn)}`)));

  const colorOf = (fate) => FATE_COLORS[fate];
  const places = {};
  let y = top;
  for (const fate of fates) {
    places[fate] = y;
    y += thick(ledger[fate]) + gap;
  }
  const total = fates.reduce((sum, fate) => sum + thick(ledger[fate]), 0);
  const drawnY = top + (y - gap - top - total) / 2;
  node(x0, drawnY, total, "var(--ink)");
  label(x0, drawnY - 9, "drawn", ledger.drawn);
  let from = drawnY;
  const through = surplus.reduce((sum, fate) => sum + thick(ledger[fate]), 0);
  const passing = surplus.length && { y: (places[surplus[0]] + places[surplus.at(-1)] + thick(ledger[surplus.at(-1)]) - through) / 2, size: through };
  for (const fate of fates) {
    const size = thick(ledger[fate]);
    if (!SURPLUS.includes(fate)) {
      ribbon(x0 + bar, from, x2, places[fate], size, colorOf(fate), `${fate}: ${grouped.format(ledger[fate])}`);
      from += size;
    } else if (fate === surplus[0]) {
      const count = surplus.reduce((sum, each) => sum + ledger[each], 0);
      ribbon(x0 + bar, from, x1, passing.y, through, "var(--c6)", `left over of a step's batch: ${grouped.format(count)}`);
      node(x1, passing.y, through, "var(--c6)");
      if (through >= ROOMY) label(x1 - 8, passing.y + through / 2 + 4, "surplus", count, "end");
      else label(x1 + bar / 2, passing.y - 7, "surplus", count, "middle");
      from += through;
      let out = passing.y;
      for (const each of surplus) {
        ribbon(x1 + bar, out, x2, places[each], thick(ledger[each]), colorOf(each), `${each}: ${grouped.format(ledger[each])}`);
        out += thick(ledger[each]);
      }
    }
    node(x2, places[fate], size, colorOf(fate));
    label(x2 + bar + 8, places[fate] + size / 2 + 4, fate, ledger[fate]);
  }
  return svg;
}

function showTimes() {
  for (const [place, run] of data.runs.entries()) {
    const phases = Object.entries(run.seconds);
    if (!phases.length) {
      byId("times").append(make("figure", { class: "card" }, runTitle(run, place), make("p", { class: "quiet" }, "These metrics say no times.")));
      continue;
    }
    const plot = new StackPlot({ title: "Time per step", unit: "s", about: "seconds of a step by phase" }, { ...run, place }, run.seconds, PHASE_COLORS, null);
    plots.push(plot);
    const totals = phases.map(([phase, values]) => [phase, values.reduce((sum, value) => sum + (value ?? 0), 0)]);
    const whole = totals.reduce((sum, [, seconds]) => sum + seconds, 0);
    const greatest = Math.max(...totals.map(([, seconds]) => seconds));
    const rows = totals.map(([phase, seconds]) =>
      make("tr", {}, make("th", { scope: "row" }, phase),
        make("td", { class: "bar-cell" }, make("i", { class: "bar-mark", style: { width: `${(100 * seconds) / greatest}%`, background: PHASE_COLORS[phase] } })),
        make("td", {}, saySeconds(seconds)), make("td", {}, sayPart(seconds / whole))));
    rows.push(make("tr", { class: "total" }, make("th", { scope: "row" }, "all steps"), make("td"), make("td", {}, saySeconds(whole)), make("td")));
    byId("times").append(make("div", { class: "card split" }, plot.figure, make("table", { class: "totals" }, make("tbody", {}, rows))));
  }
}

function showAlarms() {
  for (const [place, run] of data.runs.entries()) byId("alarm-list").append(alarmFigure(run, place));
}

function alarmFigure(run, place) {
  const [first, last] = [run.steps[0], run.steps.at(-1)];
  const saySteps = ([from, to]) => (from === to ? `step ${from}` : `steps ${from} to ${to}`);
  const strip = (spans, name) => {
    const svg = makeSvg("svg", { class: "strip", viewBox: "0 0 1000 12", preserveAspectRatio: "none", "aria-hidden": "true" }, makeSvg("rect", { class: "strip-ground", width: 1000, height: 12 }));
    const at = (step) => (1000 * (step - first)) / (last - first + 1);
    for (const [from, to] of spans) svg.append(makeSvg("rect", { class: "strip-span", x: at(from), width: Math.max(3, at(to + 1) - at(from)), height: 12 }, makeSvg("title", {}, `${name}: ${saySteps([from, to])}`)));
    return svg;
  };
  const row = (name, spans) =>
    make("tr", {}, make("th", { scope: "row" }, name), make("td", { class: "strip-cell" }, strip(spans, name)),
      make("td", {}, spans.slice(0, 6).map(saySteps).join(", ") + (spans.length > 6 ? `, and ${spans.length - 6} more` : "")));
  const nameOf = (alarm) => alarm.name.replaceAll("_", " ");
  const rows = run.alarms.filter((alarm) => alarm.spans.length).map((alarm) => row(nameOf(alarm), alarm.spans));
  const quiet = run.alarms.filter((alarm) => !alarm.spans.length).map(nameOf);
  const guarded = "guard/skipped" in run.columns;
  const skipped = run.skipped.reduce((sum, [, count]) => sum + count, 0);
  if (skipped) rows.push(row(`${skipped} mini-batch${skipped > 1 ? "es" : ""} skipped`, run.skipped.map(([step]) => [step, step])));
  return make("div", { class: "card" }, runTitle(run, place),
    rows.length ? make("table", { class: "alarms" }, make("tbody", {}, rows)) : null,
    quiet.length ? make("p", { class: "quiet" }, make("span", { class: "good" }, "✓ "), `No alarm of: ${quiet.join(", ")}.`) : null,
    run.alarms.length ? null : make("p", { class: "quiet" }, "These metrics carry no alarms."),
    skipped ? null : make("p", { class: "quiet" }, guarded ? [make("span", { class: "good" }, "✓ "), "No mini-batch was skipped for a number that is not finite."] : "These metrics do not say whether mini-batches were skipped."));
}
