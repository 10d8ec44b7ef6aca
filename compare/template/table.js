// The two tables, runs and workers. Every heading sorts its table.
//
// Rules of this file
//   1. A column says how to read, write and judge its value; nothing else knows columns.
//   2. Both tables are drawn and sorted by the same code; how one is sorted now is in `state.sorts`.
//   3. A value that does not exist sorts last, whichever way.

// `best`: -1 the lowest value is best, 1 the highest, 0 none. `unit` is the second line of the heading. `cell` makes what
// a cell shows where text does not do; it gets the row above, too.
const RUN_COLUMNS = [
  { title: "Run", value: (run) => run.name, cell: linkOf, best: 0 },
  { title: "Validation", unit: "loss", value: (run) => run.validation_loss, text: (run) => number(run.validation_loss, 4) + half(run, "validation_loss", 1, 4), best: -1 },
  { title: "Validation", unit: "accuracy", value: (run) => run.validation_accuracy, text: (run) => percent(run.validation_accuracy) + half(run, "validation_accuracy", 100, 1), best: 1, optional: true },
  { title: "Samples", unit: "per second", value: (run) => run.samples_per_second, text: (run) => rate(run.samples_per_second) + half(run, "samples_per_second", 1, run.samples_per_second >= 1000 ? 0 : 1), best: 1 },
  { title: "To target", unit: "seconds", value: (run) => run.seconds_to_target, text: (run) => seconds(run.seconds_to_target), best: -1 },
  { title: "Training", unit: "seconds", value: (run) => run.seconds, text: (run) => seconds(run.seconds), best: -1 },
  { title: "Staleness", unit: "mean", value: (run) => run.staleness.mean, text: (run) => number(run.staleness.mean, 2), best: 0 },
  { title: "Staleness", unit: "max", value: (run) => run.staleness.max, text: (run) => number(run.staleness.max, 0), best: 0 },
  { title: "Pushed", unit: "MB/worker", value: (run) => run.bytes.pushed_per_worker, text: (run) => megabytes(run.bytes.pushed_per_worker), best: -1 },
  { title: "Pulled", unit: "MB/worker", value: (run) => run.bytes.pulled_per_worker, text: (run) => megabytes(run.bytes.pulled_per_worker), best: -1 },
  { title: "Learning", unit: "rate", value: (run) => run.lr, text: (run) => (run.lr ? String(+run.lr.toPrecision(4)) : "\u2013"), best: 0 },
];

// A row is a worker of a run: {run, worker}.
const WORKER_COLUMNS = [
  { title: "Run", value: ({ run }) => run.name, cell: ({ run }, above) => (above && above.run === run ? "" : nameOf(run)), best: 0 },
  { title: "Worker", value: ({ worker }) => worker.name, cell: workerOf, best: 0 },
  { title: "Steps", value: ({ worker }) => worker.steps, text: ({ worker }) => number(worker.steps, 0), best: 0 },
  { title: "Samples", value: ({ worker }) => worker.samples, text: ({ worker }) => number(worker.samples, 0), best: 0 },
  { title: "Training", unit: "seconds", value: ({ worker }) => worker.seconds, text: ({ worker }) => seconds(worker.seconds), best: 0 },
  { title: "Computing", unit: "seconds", value: computing, text: (row) => seconds(computing(row)), best: 0 },
  { title: "Waiting", unit: "seconds", value: ({ worker }) => worker.wait_seconds, text: ({ worker }) => seconds(worker.wait_seconds), best: 0 },
  { title: "Waiting", unit: "of its time", value: waitShare, cell: waitCell, best: 0 },
];

// Half of what the seeds span.
function half(run, name, scale, digits) {
  const range = run.spread && run.spread[name];
  return range ? " \u00b1 " + number((scale * (range.high - range.low)) / 2, digits) : "";
}

function percent(value) {
  return value === null ? "\u2013" : number(100 * value, 1) + " %";
}

// A value this close to the best one, relative to it, is as good.
const AS_GOOD = 0.005;

// The rows whose value is the best (`best` 1: highest, -1: lowest) or as good as the best.
function bestOf(value, best, rows) {
  const known = rows.filter((row) => value(row) !== null);
  if (!best || !known.length) return [];
  const top = best * Math.max(...known.map((row) => best * value(row)));
  return known.filter((row) => Math.abs(value(row) - top) <= AS_GOOD * Math.abs(top));
}

// Those of a column that deserve bold type: none where all are equally good.
function winners(column, rows) {
  const good = bestOf(column.value, column.best, rows);
  return good.length < rows.filter((row) => column.value(row) !== null).length ? good : [];
}

function drawRunsTable() {
  const { runs } = state.results;
  const columns = RUN_COLUMNS.filter((column) => !column.optional || runs.some((run) => column.value(run) !== null));
  drawTable("runs-table", columns, runs, (run) => run);
}

function drawWorkersTable() {
  const rows = state.results.runs.flatMap((run) => run.workers_detail.map((worker) => ({ run, worker })));
  drawTable("workers-table", WORKER_COLUMNS, rows, ({ run }) => run);
}

// `runOf` says to which run a row belongs.
function drawTable(id, columns, rows, runOf) {
  const head = element("tr");
  head.append(...columns.map((column, index) => headingOf(id, columns, index, () => drawTable(id, columns, rows, runOf))));
  const best = columns.map((column) => winners(column, rows));
  const body = element("tbody");
  sortedRows(state.sorts[id], columns, rows).forEach((row, place, all) => {
    const line = element("tr", null, state.hidden.has(runOf(row).name) ? "hidden-run" : "");
    columns.forEach((column, index) => {
      const cell = element("td");
      cell.append(column.cell ? column.cell(row, all[place - 1]) : element("span", column.text(row), best[index].includes(row) ? "best" : ""));
      line.append(cell);
    });
    body.append(line);
  });
  const thead = element("thead");
  thead.append(head);
  byId(id).replaceChildren(thead, body);
}

function sortedRows({ column, direction }, columns, rows) {
  if (column === null) return rows;
  const { value } = columns[column];
  return [...rows].sort((a, b) => {
    const [left, right] = [value(a), value(b)];
    if (left === null || right === null) return (left === null) - (right === null);
    return direction * (left < right ? -1 : left > right ? 1 : 0);
  });
}

function headingOf(id, columns, index, redraw) {
  const { title, unit, best } = columns[index];
  const { column, direction } = state.sorts[id];
  const cell = element("th");
  cell.scope = "col";
  if (column === index) cell.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
  const button = element("button", title);
  button.type = "button";
  if (unit) button.append(document.createElement("br"), unit);
  button.addEventListener("click", () => {
    state.sorts[id] = nextSort(state.sorts[id], index, best > 0 ? -1 : 1);
    redraw();
    document.querySelectorAll(`#${id} th button`)[index].focus();
  });
  cell.append(button);
  return cell;
}

// The first click brings the best to the top, or else the lowest; the second turns the order, the third restores it.
function nextSort({ column, direction }, index, first) {
  if (column !== index) return { column: index, direction: first };
  return direction === first ? { column: index, direction: -first } : { column: null, direction: 1 };
}

function nameOf(run) {
  const name = element("span", null, "run-name");
  name.append(swatchOf(state.looks.get(run.name)), element("span", run.name));
  return name;
}

// A run's name that leads to the command that repeats it.
function linkOf(run) {
  const link = element("a");
  link.href = "#" + commandId(run);
  link.title = "To the command that repeats this run";
  link.append(nameOf(run));
  return link;
}

function workerOf({ worker }) {
  const slow = new Map((state.results.settings.slow || []).map((text) => text.split(":")));
  const who = element("span", worker.name);
  if (slow.has(worker.name)) who.append(element("span", slow.get(worker.name).replace("x", "") + "\u00d7 slower", "tag"));
  return who;
}

function computing({ worker }) {
  return Math.max(0, worker.seconds - worker.wait_seconds);
}

function waitShare({ worker }) {
  return worker.seconds > 0 ? Math.min(1, worker.wait_seconds / worker.seconds) : 0;
}

function waitCell(row) {
  const meter = element("span", null, "meter");
  const filled = element("i");
  filled.style.width = 100 * waitShare(row) + "%";
  filled.style.background = colourOf(state.looks.get(row.run.name));
  meter.append(filled);
  const both = element("span", null, "share");
  both.append(meter, element("span", percent(waitShare(row))));
  return both;
}
