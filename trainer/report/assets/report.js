// The page's head, its theme and its keys; then everything is shown.

function showRuns() {
  const single = data.runs.length === 1;
  byId("runs").append(...data.runs.map((run, place) => {
    const { about } = run;
    const evaluations = run.evaluations.map((each) => {
      const [first, last] = [each.values[0], each.values.at(-1)];
      const change = each.values.length > 1 ? make("small", { class: "quiet" }, ` from ${say(first, "share")} at step ${each.steps[0]}`) : null;
      return stat(`${each.name}, pass@1 at step ${each.steps.at(-1)}`, make("span", {}, say(last, "share"), change));
    });
    const steps = run.steps.at(-1);
    const from = run.steps[0] > 1 ? ` (from ${run.steps[0]})` : "";
    const lasting = run.alarms.filter((alarm) => alarm.spans.some(([, last]) => last === steps)).map((alarm) => alarm.name.replaceAll("_", " "));
    const seconds = Object.values(run.seconds).flat().reduce((sum, value) => sum + (value ?? 0), 0);
    const facts = [about.model, about.commit && `commit ${about.commit}`, about.cpu && `${about.cpu}${about.cores ? `, ${about.cores} cores` : ""}`, about.torch && `torch ${about.torch}`, about.date].filter(Boolean);
    return make("div", { class: "run-head" },
      make(single ? "h1" : "h2", {}, several ? make("i", { class: "dot", style: { background: runColor(place) } }) : null, run.name),
      make("p", { class: "quiet" }, facts.join(" · ") || "model and machine not recorded"),
      make("dl", { class: "stats" }, stat("steps", `${grouped.format(steps)}${from}`), ...evaluations,
        evaluations.length ? null : stat("pass@1", "not evaluated"),
        seconds ? stat("time in steps", saySeconds(seconds)) : null,
        run.ledger ? stat("prompts drawn", grouped.format(run.ledger.drawn)) : null,
        run.alarms.length ? stat("alarms now", lasting.length ? make("span", { class: "bad" }, lasting.join(", ")) : "none") : null));
  }));
}

function stat(name, value) {
  return make("div", {}, make("dt", {}, name), make("dd", {}, value));
}

const THEMES = ["auto", "light", "dark"];

function showTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = { auto: "Theme: auto", light: "Theme: light", dark: "Theme: dark" }[theme];
}

/** The theme chosen before; a browser may forbid a file to remember anything. */
function recall() {
  try {
    const theme = localStorage.getItem("theme");
    return THEMES.includes(theme) ? theme : "auto";
  } catch {
    return "auto";
  }
}

function changeTheme() {
  const next = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
  showTheme(next);
  try {
    localStorage.setItem("theme", next);
  } catch {
    // Not remembered.
  }
}

function pressKey(event) {
  const help = byId("help");
  if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
  const field = event.target.closest?.("input:not([type=range], [type=radio]), select, textarea");
  if (field) {
    if (event.key === "Escape") {
      field.blur();
      byId("list").focus({ preventScroll: true });
    }
    return;
  }
  const act = {
    j: () => toSamples(() => move(1)),
    k: () => toSamples(() => move(-1)),
    "]": () => moveInGroup(1),
    "[": () => moveInGroup(-1),
    "/": () => toSamples(() => byId("text").focus({ preventScroll: true })),
    f: toggleFold,
    t: cycleColoring,
    m: toggleFormulas,
    "?": () => help.showModal(),
  }[event.key];
  if (!act || (!COUNT && event.key !== "?")) return;
  event.preventDefault();
  act();
}

/** Does it with the browser in sight. */
function toSamples(act) {
  const panes = document.querySelector(".panes").getBoundingClientRect();
  if (panes.top > innerHeight * 0.6 || panes.bottom > innerHeight + 40 || panes.bottom < innerHeight * 0.5) byId("samples").scrollIntoView();
  act();
}

document.body.classList.toggle("several", several);
showTheme(recall());
byId("theme").addEventListener("click", changeTheme);
byId("help-open").addEventListener("click", () => byId("help").showModal());
document.addEventListener("keydown", pressKey);
showRuns();
showCurves();
showLedgers();
showTimes();
showAlarms();
showSamples();
let drawnWidth = 0;
// By width alone: a legend that needs one more line for the cursor's values makes the charts higher, which is nothing to draw for.
new ResizeObserver(([{ contentRect }]) => {
  if (contentRect.width === drawnWidth) return;
  drawnWidth = contentRect.width;
  requestAnimationFrame(drawPlots);
}).observe(byId("charts"));
performance.mark("interactive");
