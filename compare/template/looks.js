// How a run looks, everywhere on the page: the mode decides the hue, the codec the line style.
//
// Rules of this file
//   1. A run keeps its colour, dash, marker and pattern in every plot, whatever else is shown.
//   2. Two runs with the same mode and codec differ in lightness.
//
// Source: hues after Okabe and Ito, "Color Universal Design", readable with any kind of colour vision.

const HUES = {
  sync: { light: "#0b6bcb", dark: "#63aeff" },
  async: { light: "#d55e00", dark: "#ff9b52" },
  ssp: { light: "#00815d", dark: "#3ecfa3" },
  local: { light: "#8a4fbf", dark: "#c39bf0" },
};
const MORE_HUES = [
  { light: "#b0447f", dark: "#f08fc0" },
  { light: "#8c7a00", dark: "#e0cc4a" },
  { light: "#3b7f8c", dark: "#7fcbd8" },
];
// By kind of codec, the first of it; "x+y" is for pushes and pulls.
const STYLES = {
  none: { dash: "solid", svg: "", symbol: "circle", pattern: "" },
  fp16: { dash: "6px,4px", svg: "5 3", symbol: "diamond", pattern: "/" },
  bf16: { dash: "2px,3px", svg: "2 2.5", symbol: "square", pattern: "." },
  int8: { dash: "14px,4px", svg: "9 3", symbol: "cross", pattern: "-" },
  sign: { dash: "1px,5px", svg: "1 4", symbol: "star", pattern: "+" },
  topk: { dash: "10px,3px,2px,3px", svg: "7 2 2 2", symbol: "triangle-up", pattern: "x" },
  randk: { dash: "10px,3px,2px,3px,2px,3px", svg: "7 2 2 2 2 2", symbol: "triangle-down", pattern: "\\" },
};
const MORE_STYLES = [
  { dash: "18px,6px", svg: "12 4", symbol: "hexagon", pattern: "|" },
  { dash: "4px,8px", svg: "3 6", symbol: "pentagon", pattern: "/" },
  { dash: "16px,4px,6px,4px", svg: "10 3 4 3", symbol: "star-diamond", pattern: "x" },
  { dash: "3px,3px,9px,3px", svg: "2 2 6 2", symbol: "hourglass", pattern: "-" },
];

const darkScheme = window.matchMedia("(prefers-color-scheme: dark)");
let printing = false;

function isDark() {
  return darkScheme.matches && !printing;
}

// Too narrow for words inside a bar.
function isNarrow() {
  return !printing && window.innerWidth < 600;
}

// The colours of page and plots, as the style sheet has them now. On paper they are always the light ones.
function theme() {
  const paper = { card: "#ffffff", ink: "#172033", muted: "#5a6576", line: "#e2e6ec" };
  if (printing) return paper;
  const style = getComputedStyle(document.documentElement);
  const read = (name) => style.getPropertyValue("--" + name).trim();
  return { card: read("card"), ink: read("ink"), muted: read("muted"), line: read("line") };
}

// Index of each run's hue, style and lightness; by position in `runs`.
function looksOf(runs) {
  const hues = new Map();
  const styles = new Map();
  const seen = new Map();
  return runs.map((run) => {
    const codec = run.compress === "none" && run.compress_pull !== "none" ? "none+" + run.compress_pull : run.compress;
    if (!hues.has(run.mode)) hues.set(run.mode, HUES[run.mode] || MORE_HUES[hues.size % MORE_HUES.length]);
    if (!styles.has(codec)) styles.set(codec, styleOf(codec, [...styles.values()]));
    const both = run.mode + "/" + codec;
    const variant = seen.get(both) || 0;
    seen.set(both, variant + 1);
    return { hue: hues.get(run.mode), style: styles.get(codec), variant };
  });
}

// The style of the codec's kind, or where another density of it has that already, one that nobody has.
function styleOf(codec, taken) {
  const free = MORE_STYLES.filter((style) => !taken.includes(style));
  const own = STYLES[codec] || STYLES[codec.split(":")[0]];
  return own && !taken.includes(own) ? own : free[0] || MORE_STYLES[taken.length % MORE_STYLES.length];
}

function colourOf(look) {
  const base = look.hue[isDark() ? "dark" : "light"];
  return look.variant ? mix(base, isDark() ? "#ffffff" : "#000000", Math.min(0.75, 0.3 * look.variant)) : base;
}

// `share` of `other` in `colour`; both "#rrggbb".
function mix(colour, other, share) {
  const part = (hex, i) => parseInt(hex.slice(1 + 2 * i, 3 + 2 * i), 16);
  const mixed = [0, 1, 2].map((i) => Math.round(part(colour, i) * (1 - share) + part(other, i) * share));
  return "#" + mixed.map((value) => value.toString(16).padStart(2, "0")).join("");
}

function translucent(colour, opacity) {
  return colour + Math.round(255 * opacity).toString(16).padStart(2, "0");
}

// The little piece of line in front of a run's name.
function swatchOf(look) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("class", "swatch");
  svg.setAttribute("width", "26");
  svg.setAttribute("height", "12");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS(space, "line");
  const facts = { x1: 0, x2: 26, y1: 6, y2: 6, stroke: colourOf(look), "stroke-width": 3, "stroke-dasharray": look.style.svg };
  for (const [name, value] of Object.entries(facts)) line.setAttribute(name, value);
  svg.append(line);
  return svg;
}

// An element with text in it; text never becomes markup.
function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined && text !== null) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function number(value, digits) {
  return value === null || value === undefined ? "\u2013" : value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

// Samples per second: tenths where they are more than noise.
function rate(value) {
  return number(value, value >= 1000 ? 0 : 1);
}

// Hundredths where they are more than noise.
function seconds(value) {
  return number(value, value < 10 ? 2 : 1);
}

function megabytes(bytes) {
  const size = bytes / 1e6;
  return number(size, size >= 1000 ? 0 : size >= 1 ? 1 : 3);
}

// plotly reads a little markup in names and hover texts; this takes the meaning out of a user's text.
function plain(text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}
