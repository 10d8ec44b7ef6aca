// Puts the page together and answers clicks. Everything it shows is in `state`.

const state = {
  results: JSON.parse(document.getElementById("results").textContent),
  looks: new Map(),
  hidden: new Set(),
  sorts: { "runs-table": { column: null, direction: 1 }, "workers-table": { column: null, direction: 1 } },
  explore: { x: "bytes", y: "loss", scale: "linear" },
  charts: [],
};

function shownRuns() {
  return state.results.runs.filter((run) => !state.hidden.has(run.name)).map((run) => ({ run, look: state.looks.get(run.name) }));
}

function byId(id) {
  return document.getElementById(id);
}

function drawHeader() {
  const { sentences, created } = state.results;
  byId("headline").textContent = sentences.headline;
  byId("second").textContent = sentences.bytes;
  byId("caption").textContent = sentences.caption;
  byId("when").textContent = created.slice(0, 16).replace("T", " ") + (created.endsWith("+00:00") ? " UTC" : "");
  byId("when").dateTime = created;
}

// Four figures that answer the usual questions: who was first, who is best, who is fastest, who moves least. A run within
// half a percent of the best is named too.
function drawTiles() {
  const runs = state.results.runs;
  const moved = (run) => run.bytes.pushed_per_worker + run.bytes.pulled_per_worker;
  const tiles = [
    ["First at the target", (run) => run.seconds_to_target, -1, (run) => [seconds(run.seconds_to_target), "s"]],
    ["Lowest validation loss", (run) => run.validation_loss, -1, (run) => [number(run.validation_loss, 4), ""]],
    ["Most samples/s", (run) => run.samples_per_second, 1, (run) => [rate(run.samples_per_second), "/s"]],
    ["Fewest bytes per worker", moved, -1, (run) => [megabytes(moved(run)), "MB"]],
  ];
  byId("tiles").replaceChildren(
    ...tiles.map(([label, measure, best, figure]) => {
      const good = bestOf(measure, best, runs);
      good.sort((a, b) => best * (measure(b) - measure(a)));
      const tile = element("div", null, "tile");
      const value = element("div", null, "value");
      const who = element("div", null, "who");
      if (good.length) {
        const [amount, unit] = figure(good[0]);
        value.append(amount, " ", element("small", unit));
        who.append(...good.slice(0, 2).map((run) => nameOf(run)));
        if (good.length > 2) who.append(element("span", `and ${good.length - 2} more`, "unit"));
      } else {
        value.textContent = "\u2013";
        who.textContent = "no run";
      }
      tile.append(element("div", label, "label"), value, who);
      return tile;
    }),
  );
}

function drawToggles() {
  const focused = byId("toggles").contains(document.activeElement) ? document.activeElement.dataset.run : null;
  byId("toggles").replaceChildren(
    ...state.results.runs.map((run) => {
      const button = element("button", null, "toggle");
      button.type = "button";
      button.title = "Show or hide this run everywhere; double-click shows it alone";
      button.setAttribute("aria-pressed", String(!state.hidden.has(run.name)));
      button.dataset.run = run.name;
      button.append(swatchOf(state.looks.get(run.name)), element("span", run.name));
      return button;
    }),
  );
  // Whoever switches runs by the keyboard stays where they are.
  for (const button of byId("toggles").children) if (button.dataset.run === focused) button.focus();
  byId("show-all").hidden = state.hidden.size === 0;
}

function changed() {
  drawToggles();
  drawRunsTable();
  drawWorkersTable();
  drawAll();
}

function toggle(name) {
  if (!state.hidden.delete(name)) state.hidden.add(name);
  changed();
}

function showOnly(name) {
  state.hidden = new Set(state.results.runs.map((run) => run.name).filter((other) => other !== name));
  changed();
}

function drawFailures() {
  const failures = state.results.failures;
  byId("failures").hidden = failures.length === 0;
  byId("failure-list").replaceChildren(
    ...failures.map((failure) => {
      const box = element("div", null, "failure");
      box.append(element("strong", failure.name), element("pre", failure.reason), element("p", "Whole log: " + failure.log, "explain"));
      box.append(commandOf(failure.command));
      return box;
    }),
  );
}

function drawTexts() {
  const written = state.results.runs.filter((run) => run.text !== null);
  byId("texts").hidden = written.length === 0;
  byId("text-list").replaceChildren(
    ...written.map((run) => {
      const box = element("div");
      const title = element("h3");
      title.append(swatchOf(state.looks.get(run.name)), element("span", run.name));
      box.append(title, element("pre", run.text));
      return box;
    }),
  );
}

function drawSettings() {
  const { settings, target_loss: target, created } = state.results;
  const facts = [
    ["Task", state.results.task],
    ["Data", settings.data || "the task's own"],
    ["Parameters of the model", settings.parameters ? number(settings.parameters, 0) : ""],
    ["Workers", settings.workers],
    ["Slowed workers", (settings.slow || []).join(", ") || "none"],
    ["Samples of each run", settings.samples ? number(settings.samples, 0) : ""],
    ["Samples per step and worker", settings.batch_size || ""],
    ["Learning rate", settings.lr_rule, true],
    ["Target loss", target === null ? "none" : target],
    [settings.seeds > 1 ? "Seeds" : "Seed", settings.seeds > 1 ? `${settings.seed} to ${settings.seed + settings.seeds - 1}` : settings.seed],
    ["Server shards", settings.shards],
    ["Device", settings.device],
    ["Machine", settings.machine],
    ["Versions", `torch ${settings.torch}, torch-ps ${settings.torch_ps}`],
    ["Finished", created.replace("T", " ")],
  ];
  byId("chance").textContent =
    "Everything below is the same for all runs; " +
    (settings.seeds > 1
      ? `each is the mean of ${settings.seeds} seeds, a band reaches from the lowest to the highest of them.`
      : "one seed per run, so small differences may be chance (--seeds 3 shows how large it is).");
  byId("settings-list").replaceChildren(
    ...facts
      .filter(([, value]) => value !== "" && value !== undefined && value !== null)
      .map(([name, value, long]) => {
        const pair = element("div", null, long ? "long" : "");
        pair.append(element("dt", name), element("dd", value));
        return pair;
      }),
  );
  byId("command").replaceChildren(commandOf(settings.command || ""));
}

// Below the settings; `commandId` is where a run's name in the table leads.
function drawCommands() {
  byId("commands").replaceChildren(
    ...state.results.runs.map((run) => {
      const box = element("div", null, "of-run");
      box.id = commandId(run);
      box.append(nameOf(run), commandOf(run.command));
      return box;
    }),
  );
}

function commandId(run) {
  return "command-" + state.results.runs.indexOf(run);
}

// What a link leads to may be folded away.
function unfold() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  const folded = target && target.closest("details");
  if (!folded) return;
  folded.open = true;
  target.scrollIntoView();
}

function commandOf(command) {
  const box = element("div", null, "command");
  const text = element("pre", command);
  const button = element("button", "Copy");
  button.type = "button";
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(command);
      button.textContent = "Copied";
    } catch {
      window.getSelection().selectAllChildren(text);
      button.textContent = "Selected";
    }
  });
  box.append(text, button);
  return box;
}

// Everything that carries a run's colour.
function drawColoured() {
  drawTiles();
  drawTexts();
  drawCommands();
  changed();
}

function setPrinting(now) {
  if (printing === now) return;
  printing = now;
  drawColoured();
  for (const chart of state.charts) if (!chart.sized) Plotly.Plots.resize(byId("plot-" + chart.id));
}

function start() {
  const runs = state.results.runs;
  looksOf(runs).forEach((look, index) => state.looks.set(runs[index].name, look));
  state.charts = runs.length ? chartsOf(state.results) : [];
  byId("plots").append(...state.charts.map(cardOf));
  drawHeader();
  drawFailures();
  drawSettings();
  drawColoured();
  byId("toggles").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    // The second click of a double-click has already brought the run back: show it alone.
    if (event.detail === 2) showOnly(button.dataset.run);
    else toggle(button.dataset.run);
  });
  byId("show-all").addEventListener("click", () => {
    state.hidden.clear();
    changed();
    byId("toggles").firstElementChild.focus();
  });
  byId("summary").addEventListener("click", unfold); // also for a link that has been followed before
  window.addEventListener("hashchange", unfold);
  darkScheme.addEventListener("change", drawColoured);
  window.matchMedia("print").addEventListener("change", (event) => setPrinting(event.matches));
  window.addEventListener("resize", drawSized);
  window.addEventListener("beforeprint", () => setPrinting(true));
  window.addEventListener("afterprint", () => setPrinting(false));
}

start();
unfold();
// Whoever drives the page from outside need not guess.
document.documentElement.dataset.drawn = "yes";
