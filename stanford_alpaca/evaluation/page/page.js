"use strict";
// What all sections use. Texts of the data only ever become text nodes; colours and widths are set
// through the CSSOM.

const DATA = JSON.parse(document.getElementById("data").textContent);
const OWN = ["records", "bench"]; // sections that only some pages have
const PAGE = 20; // entries of a long list that are shown at a time

/**
 * An element. Properties: `text`, `vars` ({--name: value}), `on` ({event: handler}); all others are
 * attributes.
 */
function el(tag, props = {}, ...children) {
  return dress(document.createElement(tag), props, children);
}

function svg(tag, props = {}, ...children) {
  return dress(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);
}

function dress(node, { text, vars = {}, on = {}, ...attributes }, children) {
  if (text !== undefined) node.textContent = text;
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    node.setAttribute(name, value === true ? "" : value);
  }
  for (const [name, value] of Object.entries(vars)) node.style.setProperty(name, value);
  for (const [name, handler] of Object.entries(on)) node.addEventListener(name, handler);
  node.append(...children.filter((child) => child !== null));
  return node;
}

function whole(value) {
  return Math.round(value).toLocaleString("en").replaceAll("-", "−");
}

/** A number as one reads it: four digits that say something. */
function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e7) return value.toExponential(1);
  if (size === 0 || size >= 1000) return whole(value);
  const digits = size >= 100 ? 1 : size >= 10 ? 2 : size >= 1 ? 3 : 4;
  const text = size >= 1e-3 ? value.toFixed(digits) : value.toExponential(1);
  return text.replaceAll("-", "−");
}

function percent(p) {
  if (p >= 0.9995 && p < 1) return "> 99.9 %";
  if (p > 0 && p < 0.0005) return "< 0.1 %";
  return `${(100 * p).toFixed(1)} %`;
}

function count(n, noun) {
  return `${whole(n)} ${noun}${n === 1 ? "" : "s"}`;
}

function readable(name) {
  return name.replaceAll("_", " ");
}

/** The runs' places in the palette: grey for a base model that comes first, else colours. */
const COLOURS = (() => {
  const first = DATA.runs[0].curves ? 1 : 0;
  return DATA.runs.map((_, i) => (i + first === 0 ? 0 : ((i + first - 1) % 6) + 1));
})();

function runClass(i) {
  return `run run-${COLOURS[i]}`;
}

function runName(i) {
  const { name, path } = DATA.runs[i];
  const swatch = el("i", { class: "swatch", "aria-hidden": "true" });
  return el("span", { class: runClass(i), title: path }, swatch, name);
}

/** Radio buttons as one control; `change` gets the value that was chosen. */
function choice(label, name, options, chosen, change) {
  const box = el("fieldset", { class: "choice" }, el("legend", { text: label }));
  for (const [value, content] of options) {
    const on = { change: () => change(value) };
    const input = el("input", { type: "radio", name, value, checked: value === chosen, on });
    box.append(el("label", {}, input, el("span", {}, content)));
  }
  return box;
}

function note(text) {
  return el("p", { class: "note", text });
}

function list(words) {
  return words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} and ${words.at(-1)}`;
}

/** The end of a path on somebody's machine; all of a name on the hub. */
function place(name) {
  return /^[/.~]/.test(name) ? String(name).replace(/\/+$/, "").split("/").at(-1) : name;
}

function drawTitle() {
  const names = DATA.runs.map((run) => run.name);
  const eyebrow = document.getElementById("eyebrow");
  if (DATA.records) eyebrow.textContent = "Data seen through a model";
  document.getElementById("title").textContent = list(names);
  document.title = `${list(names)}: ${eyebrow.textContent.toLowerCase()}`;
  const about = DATA.evaluation;
  const runs = count(DATA.runs.length, "run");
  const seen = about && (about.trained_on ? ", which a run was trained on" : ", held out");
  document.getElementById("lede").textContent = DATA.records
    ? `${count(DATA.records.rows.length, "record")} read before training.`
    : about
    ? `${runs}, measured on ${count(about.records, "record")} of ${place(about.data)}${seen}.`
    : `${runs}; nothing was evaluated.`;
  const TITLES = { model_name_or_path: "from", learning_rate: "learning rate" };
  document.getElementById("runs").append(
    ...DATA.runs.map((run, i) => {
      const told = Object.entries(run.flags).filter(([, value]) => value !== false);
      const facts = told.map(([flag, value]) => {
        const values = [value].flat().map(place).join(", ");
        return `${TITLES[flag] ?? readable(flag)} ${values}`;
      });
      if (run.curves) {
        const last = Object.values(run.curves).map((points) => points.at(-1)[0]);
        facts.push(`logged up to step ${whole(Math.max(...last))}`);
      }
      if (!run.model) facts.push("not finished: no model to evaluate");
      if (!facts.length) facts.push("no training log: a base model");
      return el("li", {}, runName(i), el("span", { class: "facts", text: facts.join(" · ") }));
    }),
  );
  document.getElementById("footer").textContent =
    `stanford-alpaca-emo ${DATA.version} · EMO: arXiv 2310.04691 · ` +
    "this file holds all it shows and asks for nothing.";
}

function drawTheme() {
  const button = document.getElementById("theme");
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
  const show = () =>
    button.setAttribute("aria-label", isDark() ? "Switch to light" : "Switch to dark");
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    show();
  });
  dark.addEventListener("change", show);
  show();
}

document.addEventListener("DOMContentLoaded", () => {
  drawTitle();
  drawTheme();
  const sections = {
    records: drawRecords,
    bench: drawBench,
    training: drawCurves,
    measures: drawMeasures,
    responses: drawSamples,
    transport: drawTransport,
  };
  const there = DATA.sections ?? Object.keys(sections).filter((id) => !OWN.includes(id));
  for (const [id, draw] of Object.entries(sections)) {
    if (there.includes(id)) draw(document.querySelector(`#${id} .content`));
    else document.querySelectorAll(`#${id}, nav a[href="#${id}"]`).forEach((node) => node.remove());
  }
});
