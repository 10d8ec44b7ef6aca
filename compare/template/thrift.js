// What a byte buys: accuracy, or loss where the task has none, against the bytes that a worker has moved so far.
//
// Rules of this file
//   1. As in figures.js: no element of the page is touched. The size of the plot comes in, so that names can be placed.
//   2. Each curve ends in a mark with the run's name beside it; a name covers no other name and no mark if it can be helped.
//
// Names are placed one after the other, each where it costs least: near its mark, inside the plot, over little else.

const THRIFT = { margin: { l: 58, r: 18, t: 14, b: 46, autoexpand: false }, font: 11.5, line: 14, mark: 7 };
// Directions from a mark to its name, the readable ones first, and distances in pixels.
const DIRECTIONS = [[1, 0], [-1, 0], [0, -1], [0, 1], [1, -1], [-1, -1], [1, 1], [-1, 1]];
const DISTANCES = [9, 22, 38, 56, 78, 104, 134];

function thriftMeasure(runs) {
  return MEASURES[runs.some((run) => run.curve.some((point) => point.accuracy !== null)) ? "accuracy" : "loss"];
}

// Points that a logarithmic axis of bytes can show.
function thriftPoints(run, measure) {
  return run.curve.filter((point) => point.bytes > 0 && measure.value(point) !== null);
}

function thrift(shown, size) {
  const measure = thriftMeasure(state.results.runs);
  const curves = shown.map(({ run, look }) => ({ run, look, points: thriftPoints(run, measure) })).filter(({ points }) => points.length);
  const x = (point) => point.bytes / 1e6;
  const hover = (run) =>
    `<b>${plain(run.name)}</b><br>${measure.title} <b>%{y:${measure.digits}}</b> after <b>%{x:,.3~f} MB</b><br>` +
    "%{customdata[0]} s, %{customdata[1]:,} samples<extra></extra>";
  const trace = (run, points, rest) => ({
    type: "scatter",
    name: plain(run.name),
    x: points.map(x),
    y: points.map(measure.value),
    customdata: points.map((point) => [seconds(point.seconds), point.samples]),
    hovertemplate: hover(run),
    ...rest,
  });
  const lines = curves.map(({ run, look, points }) =>
    trace(run, points, { mode: "lines", opacity: 0.75, line: { color: colourOf(look), width: 1.8, dash: look.style.dash } }),
  );
  const ends = curves.map(({ run, look, points }) =>
    trace(run, points.slice(-1), {
      mode: "markers",
      cliponaxis: false,
      marker: { color: colourOf(look), size: 11, symbol: look.style.symbol, line: { color: theme().card, width: 1.5 } },
    }),
  );
  const axes = thriftAxes(curves, x, measure);
  return {
    data: [...lines, ...ends],
    layout: {
      margin: THRIFT.margin,
      xaxis: { title: { text: AXES.bytes.title }, type: "log", range: axes.x.map(Math.log10), ...thriftTicks(axes.x) },
      yaxis: { title: { text: measure.title }, range: axes.y, tickformat: measure === MEASURES.accuracy ? "~%" : "" },
      hovermode: "closest",
      annotations: thriftNames(curves, x, measure, axes, size),
    },
  };
}

// Both axes begin where the first steps of training are over: the ends are what is compared.
function thriftAxes(curves, x, measure) {
  if (!curves.length) return { x: [1, 10], y: [0, 1] };
  const later = curves.map(({ points }) => points.slice(Math.min(points.length - 1, Math.ceil(points.length / 6))));
  const [bytes, values] = [later.flat().map(x), later.flat().map(measure.value)];
  const [left, right] = [Math.min(...bytes), Math.max(...bytes)];
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const room = Math.max(1.25, (right / left) ** 0.06);
  // Where there is little width, the names of the rightmost ends need a column of their own.
  const beside = Math.max(room, isNarrow() ? (10 * (right / left)) ** 0.4 : (right / left) ** 0.1);
  const margin = 0.1 * (high - low) || 0.05 * Math.abs(high) || 0.05;
  return { x: [left / room, right * beside], y: [low - margin, high + margin] };
}

// 1, 2, 5, 10, ... where they fit, or else fewer, down to powers of ten.
function thriftTicks([left, right]) {
  const powers = Array.from({ length: 24 }, (_, i) => i - 9);
  const inside = (steps) => powers.flatMap((power) => steps.map((step) => step * 10 ** power)).filter((value) => left <= value && value <= right);
  const tickvals = [[1, 2, 5], [1, 3], [1]].map(inside).find((values) => values.length <= (isNarrow() ? 5 : 11)) || inside([1]);
  return { tickmode: "array", tickvals, ticktext: tickvals.map((value) => String(+value.toPrecision(1))), tickangle: 0 };
}

function thriftNames(curves, x, measure, axes, size) {
  const inner = { width: size.width - THRIFT.margin.l - THRIFT.margin.r, height: size.height - THRIFT.margin.t - THRIFT.margin.b };
  const [from, to] = axes.x.map(Math.log10);
  const across = (point) => (inner.width * (Math.log10(x(point)) - from)) / (to - from);
  const down = (point) => (inner.height * (axes.y[1] - measure.value(point))) / (axes.y[1] - axes.y[0]);
  const paths = curves.map(({ points }) => thriftPath(points.map((point) => [across(point), down(point)])));
  const ends = curves.map(({ points }) => [across(points[points.length - 1]), down(points[points.length - 1])]);
  const marks = ends.map(([left, top]) => thriftBox(left, top, 2 * THRIFT.mark, 2 * THRIFT.mark));
  const names = [];
  // From the top down: the crowd is where the best runs end, and it spreads into the room below.
  const order = curves.map((_, i) => i).sort((a, b) => ends[a][1] - ends[b][1]);
  const found = new Map();
  for (const i of order) {
    const rows = thriftRows(curves[i].run.name);
    const box = { width: Math.max(...rows.map(thriftWidth)) + 6, height: THRIFT.line * rows.length + 2 };
    const best = thriftPlace(ends[i], box, inner, { marks: marks.filter((_, other) => other !== i), names, paths });
    names.push(best.box);
    found.set(i, { text: rows.join("<br>"), ...best });
  }
  return curves.map(({ points, look }, i) => {
    const { text, offset, distance } = found.get(i);
    const end = points[points.length - 1];
    return {
      x: Math.log10(x(end)),
      y: measure.value(end),
      ax: offset[0],
      ay: offset[1],
      text,
      align: "left",
      borderpad: 1,
      bgcolor: translucent(theme().card, 0.72),
      font: { size: THRIFT.font, color: colourOf(look) },
      arrowcolor: distance > DISTANCES[0] ? mix(colourOf(look), theme().card, 0.45) : "rgba(0,0,0,0)",
      arrowwidth: 1,
      arrowhead: 0,
      standoff: THRIFT.mark,
    };
  });
}

// A run's name in rows that are broken between its words.
function thriftRows(name) {
  const most = isNarrow() ? 13 : 20;
  const rows = [];
  for (const word of name.split(" ")) {
    const last = rows.length - 1;
    if (rows.length && rows[last].length + 1 + word.length <= most) rows[last] += " " + word;
    else rows.push(word.length > 26 ? word.slice(0, 25) + "\u2026" : word);
  }
  return rows.slice(0, 3).map(plain);
}

// Where a name costs least. Overlaps weigh most, then leaving the plot, then covering curves, then distance.
function thriftPlace([left, top], box, inner, taken) {
  let best = null;
  DISTANCES.forEach((distance, far) => {
    DIRECTIONS.forEach(([right, low], turn) => {
      const middle = [left + right * (distance + box.width / 2), top + low * (distance + box.height / 2)];
      const place = thriftBox(...middle, box.width, box.height);
      const outside = Math.max(0, -place[0], place[2] - inner.width - 10) + Math.max(0, -place[1], place[3] - inner.height);
      const cost =
        1000 * taken.names.filter((other) => overlap(place, other)).length +
        400 * taken.marks.filter((other) => overlap(place, other)).length +
        (outside ? 600 + outside : 0) +
        taken.paths.reduce((sum, path) => sum + path.filter(([a, b]) => place[0] < a && a < place[2] && place[1] < b && b < place[3]).length, 0) +
        12 * far +
        turn;
      if (!best || cost < best.cost) best = { cost, box: place, distance, offset: [middle[0] - left, middle[1] - top] };
    });
  });
  return best;
}

// A curve as points at most 6 pixels apart.
function thriftPath(corners) {
  return corners.flatMap(([a, b], i) => {
    if (!i) return [[a, b]];
    const [c, d] = corners[i - 1];
    const parts = Math.max(1, Math.ceil(Math.hypot(a - c, b - d) / 6));
    return Array.from({ length: parts }, (_, part) => [c + ((a - c) * (part + 1)) / parts, d + ((b - d) * (part + 1)) / parts]);
  });
}

function thriftBox(x, y, width, height) {
  return [x - width / 2, y - height / 2, x + width / 2, y + height / 2];
}

function overlap(a, b) {
  return a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
}

// Pixels that a row of text takes; plotly draws in the same font.
function thriftWidth(text) {
  thriftWidth.pen = thriftWidth.pen || document.createElement("canvas").getContext("2d");
  thriftWidth.pen.font = `${THRIFT.font}px ${FONT}`;
  return thriftWidth.pen.measureText(text.replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&amp;/g, "&")).width;
}
