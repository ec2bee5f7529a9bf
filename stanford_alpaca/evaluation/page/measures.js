// The measures with their intervals, drawn too, and the paired differences between models.

function drawMeasures(box) {
  const found = DATA.evaluation;
  if (!found) {
    const why = "there is no model yet, or no --data with records was given.";
    return box.append(note(`Nothing was measured: ${why}`));
  }
  const shown = DATA.runs.map((_, i) => i).filter((i) => DATA.runs[i].model);
  const wide = found.rows.some((row) => row.cells.some((cell) => cell && cell[1] !== null));
  const theirs = found.rows.some((row) => row.references);
  const drawn = el("span", { class: "hidden", text: "drawn" });
  const columns = [
    ...shown.map((i) => el("th", { scope: "col" }, runName(i))),
    theirs ? el("th", { scope: "col", text: "references" }) : null,
    wide ? el("th", { scope: "col", class: "forest" }, drawn) : null,
  ];
  const line = (row) => [
    ...shown.map((i) => measureCell(row, row.cells[i], i)),
    theirs ? measureCell(row, row.references, null) : null,
    wide ? el("td", { class: "forest" }, forest(row, shown)) : null,
  ];
  box.append(measureTable("Measures with intervals", columns, found.rows, line));
  box.append(...found.notes.map(note));
  drawEntropy(box, shown);
  if (found.differences.length) return drawDifferences(box, found);
  if (found.pairs.length) {
    box.append(note("There are too few records for the intervals of differences."));
  }
}

function drawDifferences(box, { pairs, differences }) {
  const columns = pairs.map(([model, minus]) => {
    const pair = el("span", { class: "pair" }, runName(model), " minus ", runName(minus));
    return el("th", { scope: "col" }, pair);
  });
  const line = (row) => row.cells.map((cell) => differenceCell(cell, row.better));
  const text =
    "Paired, so that what is hard for both does not blur them. " +
    "A mark shows where p < 0.05; p is not corrected for how many there are.";
  box.append(
    el("h3", { text: "Differences, on the same records" }),
    el("p", { class: "lede", text }),
    measureTable("Paired differences", columns, differences, line),
  );
}

/** A table of measures that scrolls by itself; `line` returns the cells of a row. */
function measureTable(label, columns, rows, line) {
  const head = el("tr", {}, el("th", { scope: "col", text: "measure" }), ...columns);
  const full = (row) => el("tr", {}, measureName(row), ...line(row));
  const table = el("table", { class: "measures" }, el("thead", {}, head), ...grouped(rows, full));
  const props = { class: "scroll", role: "region", "aria-label": label, tabindex: 0 };
  return el("div", props, table);
}

/** A table body for each way of decoding that the measures' names end with. */
function grouped(rows, line) {
  const groups = new Map();
  for (const row of rows) {
    const [, measure, decoding] = row.measure.match(/^(.*?)(?: \((.*)\))?$/);
    groups.set(decoding, [...(groups.get(decoding) ?? []), line({ ...row, measure })]);
  }
  return [...groups].map(([decoding, lines]) => {
    const text = `Responses: ${decoding}`;
    const props = { scope: "rowgroup", class: "group", colspan: 99, text };
    const title = decoding ? el("tr", {}, el("th", props)) : null;
    return el("tbody", {}, title, ...lines);
  });
}

function measureName({ measure, better }) {
  const title = { "1": "higher is better", "-1": "lower is better" }[better];
  const text = { "1": "↑", "-1": "↓" }[better];
  const props = { class: "arrow", title, role: "img", "aria-label": title, text };
  return el("th", { scope: "row" }, readable(measure), text ? el("span", props) : null);
}

function measureCell(row, cell, i) {
  if (!cell) return el("td", { text: i === null ? "" : "–" });
  const best = i !== null && row.best === i;
  const counted = cell[1] === null && Number.isInteger(cell[0]);
  const text = counted ? whole(cell[0]) : number(cell[0]);
  const said = best ? el("span", { class: "hidden", text: " (best)" }) : null;
  const value = el(best ? "strong" : "span", { class: "value", text }, said);
  return el("td", { class: best ? `best ${runClass(i)}` : null }, value, range(cell[1], cell[2]));
}

/** An interval under its value; null if there is none. */
function range(low, high) {
  const text = `${number(low)} to ${number(high)}`;
  return low === null ? null : el("span", { class: "range", text });
}

/** Values and intervals of a row on a scale of its own. */
function forest(row, shown) {
  const cells = shown.map((i) => [i, row.cells[i]]).filter(([, cell]) => cell && cell[1] !== null);
  if (!cells.length) return "";
  const low = Math.min(...cells.map(([, cell]) => cell[1]));
  const high = Math.max(...cells.map(([, cell]) => cell[2]));
  const [width, line] = [170, 9];
  const x = (value) => 6 + ((width - 12) * (value - low)) / (high - low || 1);
  const marks = cells.flatMap(([i, [value, from, to]], n) => [
    svg("line", { class: runClass(i), x1: x(from), x2: x(to), y1: 6 + n * line, y2: 6 + n * line }),
    svg("circle", { class: runClass(i), cx: x(value), cy: 6 + n * line, r: 3.2 }),
  ]);
  const height = 3 + cells.length * line;
  const props = { viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": "true" };
  return svg("svg", props, ...marks);
}

function differenceCell(cell, better) {
  if (!cell) return el("td", { text: "–" });
  const sure = cell.p !== null && cell.p < 0.05 && cell.verdict !== "cannot measure";
  const verdict = !sure || !better ? "" : cell.mean * better > 0 ? "better" : "worse";
  const mark = verdict ? el("span", { class: "verdict", text: verdict }) : null;
  const text = `${cell.mean > 0 ? "+" : ""}${number(cell.mean)}`;
  const p = cell.p !== null && (cell.p < 0.001 ? "p < 0.001" : `p ${cell.p.toFixed(3)}`);
  return el("td", { class: verdict || null },
    el("span", { class: "value", text }, mark),
    range(cell.low, cell.high),
    p ? el("span", { class: "range", text: p }) : null,
    cell.verdict ? el("span", { class: "range", text: cell.verdict }) : null);
}
