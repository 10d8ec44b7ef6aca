// The two tables: runs (sortable) and workers.
//
// Rules of this file
//   1. A column says how to read, write and judge its value; nothing else knows columns.
//   2. A value that does not exist sorts last, whichever way.

// `best`: -1 the lowest value is best, 1 the highest, 0 none. `unit` is the second line of the heading.
const COLUMNS = [
  { title: "Run", value: (run) => run.name, text: (run) => run.name, best: 0 },
  { title: "Validation", unit: "loss", value: (run) => run.validation_loss, text: (run) => number(run.validation_loss, 4) + half(run, "validation_loss", 1, 4), best: -1 },
  { title: "Validation", unit: "accuracy", value: (run) => run.validation_accuracy, text: (run) => percent(run.validation_accuracy) + half(run, "validation_accuracy", 100, 1), best: 1, optional: true },
  { title: "Samples", unit: "per second", value: (run) => run.samples_per_second, text: (run) => rate(run.samples_per_second) + half(run, "samples_per_second", 1, run.samples_per_second >= 1000 ? 0 : 1), best: 1 },
  { title: "To target", unit: "seconds", value: (run) => run.seconds_to_target, text: (run) => number(run.seconds_to_target, 1), best: -1 },
  { title: "Training", unit: "seconds", value: (run) => run.seconds, text: (run) => number(run.seconds, 1), best: -1 },
  { title: "Staleness", unit: "mean", value: (run) => run.staleness.mean, text: (run) => number(run.staleness.mean, 2), best: 0 },
  { title: "Staleness", unit: "max", value: (run) => run.staleness.max, text: (run) => number(run.staleness.max, 0), best: 0 },
  { title: "Pushed", unit: "MB/worker", value: (run) => run.bytes.pushed_per_worker, text: (run) => megabytes(run.bytes.pushed_per_worker), best: -1 },
  { title: "Pulled", unit: "MB/worker", value: (run) => run.bytes.pulled_per_worker, text: (run) => megabytes(run.bytes.pulled_per_worker), best: -1 },
  { title: "Learning", unit: "rate", value: (run) => run.lr, text: (run) => (run.lr ? String(+run.lr.toPrecision(4)) : "\u2013"), best: 0 },
];

// Half of what the seeds span.
function half(run, name, scale, digits) {
  const range = run.spread && run.spread[name];
  return range ? " \u00b1 " + number((scale * (range.high - range.low)) / 2, digits) : "";
}

function percent(value) {
  return value === null ? "\u2013" : number(100 * value, 1) + " %";
}

function columnsOf(runs) {
  return COLUMNS.filter((column) => !column.optional || runs.some((run) => column.value(run) !== null));
}

// A value this close to the best one, relative to it, is as good.
const AS_GOOD = 0.005;

// The runs whose value is the best (`best` 1: highest, -1: lowest) or as good as the best.
function bestRuns(value, best, runs) {
  const known = runs.filter((run) => value(run) !== null);
  if (!best || !known.length) return [];
  const top = best * Math.max(...known.map((run) => best * value(run)));
  return known.filter((run) => Math.abs(value(run) - top) <= AS_GOOD * Math.abs(top));
}

// Those of a column that deserve bold type: none where all are equally good.
function winners(column, runs) {
  const good = bestRuns(column.value, column.best, runs);
  return good.length < runs.filter((run) => column.value(run) !== null).length ? good : [];
}

function sortedRuns(runs) {
  const { column, direction } = state.sort;
  if (column === null) return runs;
  const value = columnsOf(runs)[column].value;
  return [...runs].sort((a, b) => {
    const [left, right] = [value(a), value(b)];
    if (left === null || right === null) return (left === null) - (right === null);
    return direction * (left < right ? -1 : left > right ? 1 : 0);
  });
}

function drawRunsTable() {
  const runs = state.results.runs;
  const columns = columnsOf(runs);
  const head = element("tr");
  columns.forEach((column, index) => {
    const cell = element("th");
    cell.scope = "col";
    if (state.sort.column === index) cell.setAttribute("aria-sort", state.sort.direction > 0 ? "ascending" : "descending");
    const button = element("button", column.title);
    button.type = "button";
    if (column.unit) button.append(document.createElement("br"), column.unit);
    button.addEventListener("click", () => sortBy(index, column));
    cell.append(button);
    head.append(cell);
  });
  const body = element("tbody");
  const best = columns.map((column) => winners(column, runs));
  for (const run of sortedRuns(runs)) {
    const row = element("tr", null, state.hidden.has(run.name) ? "hidden-run" : "");
    columns.forEach((column, index) => {
      const cell = element("td");
      if (index === 0) cell.append(nameOf(run));
      else cell.append(element("span", column.text(run), best[index].includes(run) ? "best" : ""));
      row.append(cell);
    });
    body.append(row);
  }
  const thead = element("thead");
  thead.append(head);
  document.getElementById("runs-table").replaceChildren(thead, body);
}

// The first click brings the best to the top, the second turns the order, the third restores the order of the runs.
function sortBy(index, column) {
  const first = column.best > 0 ? -1 : 1;
  if (state.sort.column !== index) state.sort = { column: index, direction: first };
  else if (state.sort.direction === first) state.sort.direction = -first;
  else state.sort = { column: null, direction: 1 };
  drawRunsTable();
  document.querySelectorAll("#runs-table th button")[index].focus();
}

function nameOf(run) {
  const name = element("span", null, "run-name");
  name.append(swatchOf(state.looks.get(run.name)), element("span", run.name));
  return name;
}

function drawWorkersTable() {
  const slow = new Map((state.results.settings.slow || []).map((text) => text.split(":")));
  const head = element("tr");
  for (const title of ["Run", "Worker", "Steps", "Samples", "Seconds", "Computing", "Waiting", "of its time"]) head.append(element("th", title));
  const body = element("tbody");
  for (const run of state.results.runs) {
    run.workers_detail.forEach((worker, index) => {
      const row = element("tr", null, (index === 0 ? "first-of-run" : "") + (state.hidden.has(run.name) ? " hidden-run" : ""));
      const first = element("td");
      if (index === 0) first.append(nameOf(run));
      const who = element("td", worker.name);
      if (slow.has(worker.name)) who.append(element("span", slow.get(worker.name).replace("x", "") + "\u00d7 slower", "tag"));
      const share = worker.seconds > 0 ? Math.min(1, worker.wait_seconds / worker.seconds) : 0;
      const figures = [
        number(worker.steps, 0),
        number(worker.samples, 0),
        number(worker.seconds, 1),
        number(Math.max(0, worker.seconds - worker.wait_seconds), 1) + " s",
        number(worker.wait_seconds, 1) + " s",
      ];
      row.append(first, who, ...figures.map((text) => element("td", text)), waitCell(share, run));
      body.append(row);
    });
  }
  const thead = element("thead");
  thead.append(head);
  document.getElementById("workers-table").replaceChildren(thead, body);
}

function waitCell(share, run) {
  const cell = element("td");
  const meter = element("span", null, "meter");
  const filled = element("i");
  filled.style.width = 100 * share + "%";
  filled.style.background = colourOf(state.looks.get(run.name));
  meter.append(filled);
  const both = element("span", null, "share");
  both.append(meter, element("span", percent(share)));
  cell.append(both);
  return cell;
}
