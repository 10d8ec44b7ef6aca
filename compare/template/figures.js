// What each plot shows: pure functions from the results to plotly traces and axes.
//
// Rules of this file
//   1. No element of the page is touched here; charts.js draws.
//   2. A figure gets the runs that are shown and their looks; it decides nothing about colour.
//   3. Each figure explains itself in one sentence.

const AXES = {
  seconds: { title: "wall time (s)", button: "Seconds", value: (point) => point.seconds },
  samples: { title: "samples, whole job", button: "Samples", value: (point) => point.samples },
  bytes: { title: "MB pushed and pulled per worker", button: "Bytes", value: (point) => point.bytes / 1e6 },
};
const MEASURES = {
  loss: { title: "validation loss", button: "Validation loss", points: (run) => run.curve, value: (point) => point.loss, range: (point) => point.loss_range, digits: ".4f" },
  training: { title: "training loss", button: "Training loss", points: (run) => run.training, value: (point) => point.loss, range: (point) => point.loss_range, digits: ".4f" },
  accuracy: { title: "validation accuracy", button: "Accuracy", points: (run) => run.curve, value: (point) => point.accuracy, range: (point) => point.accuracy_range, digits: ".1%" },
};

// A line per run: one measure over one axis, with the target where it makes sense. The pointer shows all runs there;
// where there is no room for that, the nearest one.
function lines(shown, x, y, { target = null, log = false } = {}) {
  const axis = AXES[x];
  const measure = MEASURES[y];
  const together = !isNarrow();
  const data = shown.map(({ run, look }) => {
    const points = pointsOf(measure, run);
    const few = points.length <= 40;
    const seeds = run.seeds && run.seeds.length > 1;
    const spans = points.map((point) => measure.range(point)).map((range) => (range ? [range.low, range.high] : [null, null]));
    return {
      type: "scatter",
      mode: few ? "lines+markers" : "lines",
      name: plain(run.name),
      x: points.map(axis.value),
      y: points.map(measure.value),
      customdata: points.map((point, i) => [seconds(point.seconds), point.samples, point.bytes / 1e6, ...spans[i]]),
      line: { color: colourOf(look), width: 2.2, dash: look.style.dash },
      marker: { color: colourOf(look), size: 5.5, symbol: look.style.symbol },
      hovertemplate:
        (together ? `${plain(run.name)}  ` : `<b>${plain(run.name)}</b><br>${measure.title} `) +
        `<b>%{y:${measure.digits}}</b>` +
        (seeds ? `, seeds %{customdata[3]:${measure.digits}} to %{customdata[4]:${measure.digits}}` : "") +
        (together ? "  after " : "<br>") +
        "%{customdata[0]} s, %{customdata[1]:,} samples, %{customdata[2]:,.1f} MB<extra></extra>",
    };
  });
  const layout = {
    xaxis: { title: { text: axis.title }, rangemode: "tozero", unifiedhovertitle: { text: measure.title }, spikecolor: theme().muted, spikethickness: 1 },
    yaxis: { title: { text: measure.title }, type: log ? "log" : "linear", tickformat: y === "accuracy" ? "~%" : "" },
    hovermode: together ? "x unified" : "closest",
    hoverdistance: 60,
  };
  const curves = data.map((trace) => trace.y);
  const values = curves.flat();
  data.unshift(...shown.flatMap(({ run, look }) => band(run, look, axis, measure)));
  if (y !== "accuracy" && !log) layout.yaxis.range = withoutTheCliff(curves);
  if (y === "loss" && target !== null && values.length) {
    layout.shapes = [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: target, y1: target, line: { width: 1.2, dash: "dot" } }];
    layout.annotations = [
      { xref: "paper", x: 0.005, xanchor: "left", y: log ? Math.log10(target) : target, yanchor: "bottom", showarrow: false, text: "target " + +target.toPrecision(4) },
    ];
    if (x === "seconds") data.push(...crossings(shown, target));
  }
  return { data, layout };
}

function pointsOf(measure, run) {
  return measure.points(run).filter((point) => measure.value(point) !== null);
}

// From the lowest to the highest seed, behind the line of their mean; nothing for a single seed.
function band(run, look, axis, measure) {
  const points = pointsOf(measure, run).filter(measure.range);
  if (points.length < 2) return [];
  const there = points.map(axis.value);
  const edge = (side) => points.map((point) => measure.range(point)[side]);
  return [
    {
      type: "scatter",
      mode: "lines",
      name: plain(run.name),
      x: [...there, ...there.slice().reverse()],
      y: [...edge("high"), ...edge("low").reverse()],
      fill: "toself",
      fillcolor: translucent(colourOf(look), 0.18),
      line: { width: 0 },
      hoverinfo: "skip",
    },
  ];
}

// Where the untrained model's loss towers over all the rest, start the axis below it: the end is where runs differ.
function withoutTheCliff(curves) {
  const later = curves.flatMap((losses) => losses.slice(Math.max(1, Math.ceil(losses.length / 12))));
  const low = Math.min(...later);
  const high = Math.max(...later);
  const top = Math.max(...curves.flat());
  if (later.length < 4 || top - low < 1.25 * (high - low)) return undefined;
  const margin = 0.06 * (high - low);
  return [low - margin, high + margin];
}

// A ring where each run reaches the target.
function crossings(shown, target) {
  return shown
    .filter(({ run }) => run.seconds_to_target !== null)
    .map(({ run, look }) => ({
      type: "scatter",
      mode: "markers",
      name: plain(run.name),
      x: [run.seconds_to_target],
      y: [target],
      marker: { symbol: "circle-open", size: 13, color: colourOf(look), line: { width: 2.5 } },
      hoverinfo: isNarrow() ? "all" : "skip", // not a row among those of the curves; the table has it too
      hovertemplate: isNarrow() && `<b>${plain(run.name)}</b><br>reaches the target after <b>${seconds(run.seconds_to_target)} s</b><extra></extra>`,
    }));
}

// What is beyond nearly all pushes of every run shares the last bin: one late start must not flatten all the rest.
function stalenessHistogram(shown) {
  const most = Math.max(0, ...shown.map(({ run }) => run.staleness.max));
  const usual = Math.max(1, ...shown.map(({ run }) => quantile(run.staleness.histogram, 0.99)));
  const cut = most > 2 * usual + 2;
  const last = cut ? usual + 1 : most;
  const bins = last <= 24 ? 1 : Math.ceil((last + 1) / 24);
  const end = Math.floor(last / bins) * bins;
  const words = (bin) => (cut && bin === end ? `${bin} to ${most}` : bins > 1 ? `${bin} to ${bin + bins - 1}` : `${bin}`);
  const data = shown.map(({ run, look }) => {
    const counts = new Map();
    let total = 0;
    for (const [value, count] of Object.entries(run.staleness.histogram)) {
      const bin = Math.min(end, Math.floor(Number(value) / bins) * bins);
      counts.set(bin, (counts.get(bin) || 0) + count);
      total += count;
    }
    const x = [...counts.keys()].sort((a, b) => a - b);
    return bar(look, {
      name: plain(run.name),
      x,
      y: x.map((bin) => counts.get(bin) / total),
      customdata: x.map((bin) => [counts.get(bin), words(bin)]),
      hovertemplate: `<b>${plain(run.name)}</b><br>staleness %{customdata[1]}: <b>%{y:.1%}</b> of pushes (%{customdata[0]:,})<extra></extra>`,
    });
  });
  const each = Math.max(1, Math.ceil((end / bins + 1) / (isNarrow() ? 6 : 13))) * bins;
  const ticks = Array.from({ length: Math.floor(end / each) + 1 }, (_, i) => i * each);
  if (cut && end - ticks[ticks.length - 1] < each / 2) ticks.pop();
  if (cut) ticks.push(end);
  const ticktext = ticks.map((bin) => (cut && bin === end ? `${bin} to ${most}` : String(bin)));
  return {
    data,
    layout: {
      barmode: "group",
      xaxis: { title: { text: "staleness (versions)" }, tickmode: "array", tickvals: ticks, ticktext, showgrid: false },
      yaxis: { title: { text: "share of pushes" }, tickformat: "~%" },
      bargap: 0.25,
    },
  };
}

// The least staleness that this share of the pushes does not exceed.
function quantile(histogram, share) {
  const values = Object.keys(histogram).map(Number).sort((a, b) => a - b);
  let left = share * values.reduce((sum, value) => sum + histogram[value], 0);
  return values.find((value) => (left -= histogram[value]) <= 0) || 0;
}

// One horizontal bar per run.
function throughput(shown) {
  const data = shown.map(({ run, look }) =>
    bar(look, {
      orientation: "h",
      name: plain(run.name),
      y: [run.name],
      x: [run.samples_per_second],
      cliponaxis: false,
      text: ["<b>" + rate(run.samples_per_second) + "</b>"],
      hovertemplate: `<b>${plain(run.name)}</b><br><b>%{x:.1f}</b> samples/s<br>${number(run.samples, 0)} samples in ${seconds(run.seconds)} s<extra></extra>`,
    }, "outside"),
  );
  return { data, layout: ranked("samples per second, whole job", runRows(shown), 34) };
}

// Pushed in the run's full colour, pulled behind it in a pale one.
function traffic(shown) {
  const longest = Math.max(...shown.map(({ run }) => run.bytes.pushed_per_worker + run.bytes.pulled_per_worker), 1);
  const fits = (bytes) => bytes / longest > (isNarrow() ? 0.14 : 0.24);
  const data = shown.flatMap(({ run, look }) => {
    const facts = (key, word) => ({
      orientation: "h",
      name: plain(run.name),
      y: [run.name],
      x: [run.bytes[key] / 1e6],
      text: [fits(run.bytes[key]) ? (isNarrow() ? "" : word + " ") + megabytes(run.bytes[key]) : ""],
      insidetextanchor: "middle",
      hovertemplate: `<b>${plain(run.name)}</b><br>${word} <b>%{x:,.1f} MB</b> per worker<extra></extra>`,
    });
    return [bar(look, facts("pushed_per_worker", "pushed"), "inside"), pale(look, facts("pulled_per_worker", "pulled"))];
  });
  return { data, layout: { ...ranked("MB per worker", runRows(shown)), barmode: "stack" } };
}

// Where each worker's time went: computing in the run's colour, waiting as an outline.
function workerTime(shown) {
  const data = shown.flatMap(({ run, look }) => {
    const y = run.workers_detail.map((worker) => workerKey(run, worker));
    const computing = run.workers_detail.map((worker) => Math.max(0, worker.seconds - worker.wait_seconds));
    const waiting = run.workers_detail.map((worker) => Math.min(worker.wait_seconds, worker.seconds));
    const share = (part, i) => part / (run.workers_detail[i].seconds || 1);
    const template = (word) => `<b>${plain(run.name)}</b> %{customdata[0]}<br>${word} <b>%{customdata[2]} s</b>, %{customdata[1]:.0%} of its time<extra></extra>`;
    const facts = (values) => values.map((value, i) => [plain(run.workers_detail[i].name), share(value, i), seconds(value)]);
    return [
      bar(look, { orientation: "h", name: plain(run.name), y, x: computing, customdata: facts(computing), hovertemplate: template("computing") }),
      pale(look, {
        orientation: "h",
        name: plain(run.name),
        y,
        x: waiting,
        customdata: facts(waiting),
        text: waiting.map((value, i) => (share(value, i) >= 0.05 ? `${Math.round(100 * share(value, i))} %` + (isNarrow() ? "" : " waiting") : "")),
        insidetextanchor: "middle",
        cliponaxis: false,
        hovertemplate: template("waiting"),
      }),
    ];
  });
  const rows = shown.flatMap(({ run }) =>
    run.workers_detail.map((worker, i) => [workerKey(run, worker), (i ? "" : label(run.name, 1)) + plain(worker.name) + "  "]),
  );
  return { data, layout: { ...ranked("seconds", rows, isNarrow() ? 28 : 70), barmode: "stack", bargap: 0.28 } };
}

function workerKey(run, worker) {
  return run.name + "\n" + worker.name;
}

// A bar in the look of a run: the codec's line style becomes a pattern.
function bar(look, trace, textposition = "auto") {
  return {
    type: "bar",
    textposition,
    constraintext: "none",
    insidetextfont: { color: isDark() ? "#0b0f14" : "#ffffff" },
    marker: {
      color: colourOf(look),
      line: { width: 0 },
      pattern: { shape: look.style.pattern, size: 7, solidity: 0.3, fillmode: "replace", bgcolor: colourOf(look), fgcolor: mix(colourOf(look), "#ffffff", 0.3) },
    },
    ...trace,
  };
}

// The second part of a bar: an outline with a breath of the run's colour in it.
function pale(look, trace) {
  const colour = colourOf(look);
  return {
    type: "bar",
    textposition: "auto",
    constraintext: "none",
    textfont: { color: theme().ink },
    marker: { color: mix(colour, theme().card, 0.8), line: { color: colour, width: 1 } },
    ...trace,
  };
}

// A run's name beside its bar: long ones on two lines where there is room, what does not fit is in the hover text.
function label(name, lines = 2) {
  const words = name.split(" ");
  const split = lines > 1 && name.length > 16 && words.length > 2;
  const rows = split ? [words.slice(0, 2).join(" "), words.slice(2).join(" ")] : [name];
  const most = isNarrow() ? 16 : lines === 1 ? 36 : 28;
  return rows.map((row) => plain(row.length > most ? row.slice(0, most - 1) + "\u2026" : row) + "  ").join("<br>");
}

// Axes of horizontal bars. `rows` are pairs of a bar's key and its label; `room` are pixels for a text behind the bars.
function ranked(title, rows, room = 0) {
  return {
    xaxis: { title: { text: title }, rangemode: "tozero" },
    yaxis: {
      type: "category",
      autorange: "reversed",
      tickmode: "array",
      tickvals: rows.map(([key]) => key),
      ticktext: rows.map(([, text]) => text),
      automargin: true,
      showgrid: false,
      ticks: "",
    },
    bargap: 0.35,
    margin: { l: 52, r: 14 + room, t: 10, b: 44 },
  };
}

function runRows(shown) {
  return shown.map(({ run }) => [run.name, label(run.name)]);
}
