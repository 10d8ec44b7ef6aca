// Draws the figures: one card per plot, redrawn when a run is hidden, an axis is switched or the theme changes.
//
//   state {hidden, explore} --figures.js--> traces and axes --dress()--> Plotly.react

const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif';
// A plot on paper, in CSS pixels: fits A4 and letter upright.
const PAPER = { width: 660, height: 300 };
const CONFIG = {
  responsive: true,
  displaylogo: false,
  displayModeBar: "hover",
  modeBarButtons: [["toImage", "resetScale2d"]],
};

// The plots of the page, in order. `when` leaves a plot out where there is nothing to see.
function chartsOf(results) {
  const target = results.target_loss;
  const bars = results.runs.reduce((sum, run) => sum + run.workers_detail.length, 0);
  const hasAccuracy = results.runs.some((run) => run.curve.some((point) => point.accuracy !== null));
  return [
    {
      id: "loss-seconds",
      title: "Loss over wall time",
      explain: "What a reader with a clock sees: lower and further left is better; a ring marks where a run reaches the target. Double-click shows the first points too.",
      figure: (shown) => lines(shown, "seconds", "loss", { target }),
    },
    {
      id: "loss-samples",
      title: "Loss over samples",
      explain: "The same curves without the clock: what a sample teaches in each mode. A gap here is the price of stale or rounded gradients.",
      figure: (shown) => lines(shown, "samples", "loss", { target }),
    },
    {
      id: "accuracy",
      title: "Accuracy over wall time",
      explain: "Share of validation samples that the model gets right, by the seconds it has trained.",
      figure: (shown) => lines(shown, "seconds", "accuracy"),
      when: hasAccuracy,
      wide: true,
    },
    {
      id: "thrift",
      title: `${hasAccuracy ? "Accuracy" : "Loss"} against bytes`,
      explain: `Each curve is one run as it trains, its end marked and named; an end further left at the same height took fewer bytes to the same ${hasAccuracy ? "accuracy" : "loss"}, on a logarithmic axis: that is what compression buys.`,
      figure: thrift,
      when: results.runs.some((run) => thriftPoints(run, thriftMeasure(results.runs)).length),
      height: () => (isNarrow() ? 440 : 430),
      sized: true,
      wide: true,
    },
    {
      id: "explore",
      title: "Any measure over any axis",
      explain: "Choose what to look at; over bytes, a curve further left learns more from each byte that a worker moves.",
      figure: (shown) => lines(shown, state.explore.x, state.explore.y, { target, log: state.explore.scale === "log" }),
      switches: [
        { key: "x", label: "Over", choices: Object.entries(AXES).map(([key, axis]) => [key, axis.button]) },
        {
          key: "y",
          label: "Show",
          choices: Object.entries(MEASURES)
            .filter(([key]) => key !== "accuracy" || hasAccuracy)
            .map(([key, measure]) => [key, measure.button]),
        },
        { key: "scale", label: "Scale", choices: [["linear", "Linear"], ["log", "Log"]] },
      ],
      wide: true,
    },
    {
      id: "staleness",
      title: "Staleness of the pushes",
      explain: "How many versions the parameters had moved on between pull and push: always 0 in sync, the number of other workers on average in async.",
      figure: stalenessHistogram,
      wide: bars > 12,
    },
    {
      id: "worker-time",
      title: "Where the workers' time went",
      explain: "Seconds that each worker computed and seconds that it waited for the server or for other workers.",
      figure: workerTime,
      height: (shown) => 90 + (bars <= 12 ? 30 : bars <= 32 ? 22 : 13) * bars * (shown.length / results.runs.length),
      wide: bars > 12,
    },
    {
      id: "throughput",
      title: "Samples per second",
      explain: "How fast the whole job goes through its data, training only; longer is better.",
      figure: throughput,
      height: (shown) => 90 + 46 * shown.length,
    },
    {
      id: "bytes",
      title: "Bytes per worker",
      explain: "What one worker pushed (gradients, full colour) and pulled (parameters, pale) in the whole run; shorter is better.",
      figure: traffic,
      height: (shown) => 90 + 46 * shown.length,
    },
  ].filter((chart) => chart.when !== false);
}

// The card of a chart, empty; `drawAll` fills it.
function cardOf(chart) {
  const card = element("figure", null, chart.wide ? "card wide" : "card");
  card.id = "card-" + chart.id;
  const caption = element("figcaption");
  caption.append(element("h3", chart.title), element("p", chart.explain, "explain"));
  card.append(caption);
  if (chart.switches) {
    const row = element("div", null, "switches");
    row.append(...chart.switches.map((each) => switchOf(each)));
    card.append(row);
  }
  const plot = element("div", null, "plot");
  plot.id = "plot-" + chart.id;
  card.append(plot);
  return card;
}

function switchOf({ key, label: words, choices }) {
  const group = element("div", words, "switch");
  const segments = element("div", null, "segments");
  segments.setAttribute("role", "group");
  segments.setAttribute("aria-label", words);
  for (const [value, text] of choices) {
    const button = element("button", text);
    button.type = "button";
    button.dataset.key = key;
    button.dataset.value = value;
    button.setAttribute("aria-pressed", String(state.explore[key] === value));
    button.addEventListener("click", () => {
      state.explore[key] = value;
      for (const other of segments.children) other.setAttribute("aria-pressed", String(other === button));
      draw(state.charts.find((chart) => chart.id === "explore"));
    });
    segments.append(button);
  }
  group.append(segments);
  return group;
}

function draw(chart) {
  const place = document.getElementById("plot-" + chart.id);
  const shown = shownRuns();
  if (chart.height) place.style.height = Math.max(200, chart.height(shown)) + "px";
  const paper = { ...PAPER, height: chart.height ? place.clientHeight : PAPER.height };
  const own = { width: place.clientWidth, height: place.clientHeight };
  const { data, layout } = chart.figure(shown, printing ? paper : own);
  // plotly's own answer to a new size would move what has been placed by pixels.
  const size = printing ? paper : chart.sized ? own : { autosize: true };
  return Plotly.react(place, data, { ...dress(layout), ...size }, { ...CONFIG, responsive: !chart.sized });
}

// Plots that place something by pixels, after the window has changed. For a moment it may have no size at all.
function drawSized() {
  if (printing || window.innerWidth < 200) return;
  state.charts.filter((chart) => chart.sized).forEach(draw);
}

function drawAll() {
  state.charts.forEach(draw);
}

// Fonts, colours and margins that all plots share, under what the figure asks for.
function dress(layout) {
  const colours = theme();
  const axis = { gridcolor: colours.line, linecolor: colours.line, zeroline: false, ticks: "", automargin: true, separatethousands: true };
  const title = { font: { size: 12, color: colours.muted }, standoff: 8 };
  const own = (given) => ({ ...axis, ...given, title: given.title ? { ...title, ...given.title } : undefined });
  const coarse = window.matchMedia("(pointer: coarse), (max-width: 860px)").matches;
  return {
    ...layout,
    font: { family: FONT, size: 12, color: colours.ink },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    margin: layout.margin || { l: 52, r: 14, t: 10, b: 44 },
    showlegend: false,
    dragmode: coarse ? false : "zoom",
    hoverlabel: { bgcolor: colours.card, bordercolor: colours.muted, font: { family: FONT, size: 12.5, color: colours.ink }, align: "left" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colours.muted, activecolor: colours.ink },
    xaxis: own(layout.xaxis || {}),
    yaxis: own(layout.yaxis || {}),
    shapes: (layout.shapes || []).map((shape) => ({ ...shape, line: { color: colours.muted, ...shape.line } })),
    annotations: (layout.annotations || []).map((note) => ({ font: { size: 11.5, color: colours.muted }, ...note })),
  };
}
