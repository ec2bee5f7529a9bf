// The measures with their intervals, drawn too, and the paired differences between models.

function drawMeasures(box) {
  const found = DATA.evaluation;
  if (!found) return box.append(note("Nothing was measured: there is no model yet, or no --data with held-out records was given."));
  const shown = DATA.runs.map((_, i) => i).filter((i) => DATA.runs[i].model);
  const wide = found.rows.some((row) => row.cells.some((cell) => cell && cell[1] !== null));
  const theirs = found.rows.some((row) => row.references);
  const head = el("tr", {}, el("th", { scope: "col", text: "measure" }), ...shown.map((i) => el("th", { scope: "col" }, runName(i))),
    theirs ? el("th", { scope: "col", text: "references" }) : null, wide ? el("th", { scope: "col", class: "forest" }, el("span", { class: "hidden", text: "drawn" })) : null);
  const line = (row) =>
    el("tr", {}, measureName(row), ...shown.map((i) => measureCell(row, row.cells[i], i)),
      theirs ? measureCell(row, row.references, null) : null, wide ? el("td", { class: "forest" }, forest(row, shown)) : null);
  box.append(scrolling("Measures with intervals", el("table", { class: "measures" }, el("thead", {}, head), ...grouped(found.rows, line))));
  box.append(...found.notes.map(note));
  drawEntropy(box, shown);
  if (found.pairs.length && !found.differences.length) box.append(note("There are too few records for the intervals of differences."));
  if (!found.differences.length) return;
  const columns = found.pairs.map(([model, minus]) =>
    el("th", { scope: "col" }, el("span", { class: "pair" }, runName(model), " minus ", runName(minus))));
  const difference = (row) => el("tr", {}, measureName(row), ...row.cells.map((cell) => differenceCell(cell, row.better)));
  box.append(
    el("h3", { text: "Differences, on the same records" }),
    el("p", { class: "lede", text: "Paired, so that what is hard for both does not blur them. A mark shows where p < 0.05; p is not corrected for how many there are." }),
    scrolling("Paired differences", el("table", { class: "measures" },
      el("thead", {}, el("tr", {}, el("th", { scope: "col", text: "measure" }), ...columns)), ...grouped(found.differences, difference))),
  );
}

/** A table body for each way of decoding that the measures' names end with. */
function grouped(rows, line) {
  const groups = new Map();
  for (const row of rows) {
    const [, measure, decoding] = row.measure.match(/^(.*?)(?: \((.*)\))?$/);
    groups.set(decoding, [...(groups.get(decoding) ?? []), line({ ...row, measure })]);
  }
  return [...groups].map(([decoding, lines]) => {
    const title = decoding ? el("tr", {}, el("th", { scope: "rowgroup", class: "group", colspan: 99, text: `Responses: ${decoding}` })) : null;
    return el("tbody", {}, title, ...lines);
  });
}

function scrolling(label, table) {
  return el("div", { class: "scroll", role: "region", "aria-label": label, tabindex: 0 }, table);
}

function measureName({ measure, better }) {
  const hint = { "1": "higher is better", "-1": "lower is better" }[better];
  const arrow = { "1": "↑", "-1": "↓" }[better];
  return el("th", { scope: "row" }, readable(measure), arrow ? el("span", { class: "arrow", title: hint, role: "img", "aria-label": hint, text: arrow }) : null);
}

function measureCell(row, cell, i) {
  if (!cell) return el("td", { text: i === null ? "" : "–" });
  const best = i !== null && row.best === i;
  const counted = cell[1] === null && Number.isInteger(cell[0]);
  const value = el(best ? "strong" : "span", { class: "value", text: counted ? whole(cell[0]) : number(cell[0]) }, ...(best ? [el("span", { class: "hidden", text: " (best)" })] : []));
  const range = cell[1] === null ? null : el("span", { class: "range", text: `${number(cell[1])} to ${number(cell[2])}` });
  return el("td", { class: best ? `best ${runClass(i)}` : null }, value, range);
}

/** Values and intervals of a row on a scale of its own. */
function forest(row, shown) {
  const cells = shown.map((i) => [i, row.cells[i]]).filter(([, cell]) => cell && cell[1] !== null);
  if (!cells.length) return "";
  const [low, high] = [Math.min(...cells.map(([, cell]) => cell[1])), Math.max(...cells.map(([, cell]) => cell[2]))];
  const [width, line] = [170, 9];
  const x = (value) => 6 + ((width - 12) * (value - low)) / (high - low || 1);
  const marks = cells.flatMap(([i, [value, from, to]], n) => [
    svg("line", { class: runClass(i), x1: x(from), x2: x(to), y1: 6 + n * line, y2: 6 + n * line }),
    svg("circle", { class: runClass(i), cx: x(value), cy: 6 + n * line, r: 3.2 }),
  ]);
  return svg("svg", { viewBox: `0 0 ${width} ${3 + cells.length * line}`, width, height: 3 + cells.length * line, "aria-hidden": "true" }, ...marks);
}

function differenceCell(cell, better) {
  if (!cell) return el("td", { text: "–" });
  const sure = cell.p !== null && cell.p < 0.05 && cell.verdict !== "cannot measure";
  const verdict = !sure || !better ? "" : cell.mean * better > 0 ? "better" : "worse";
  const sign = cell.mean > 0 ? "+" : "";
  return el("td", { class: verdict || null },
    el("span", { class: "value", text: `${sign}${number(cell.mean)}` }, ...(verdict ? [el("span", { class: "verdict", text: verdict })] : [])),
    cell.low === null ? null : el("span", { class: "range", text: `${number(cell.low)} to ${number(cell.high)}` }),
    cell.p === null ? null : el("span", { class: "range", text: cell.p < 0.001 ? "p < 0.001" : `p ${cell.p.toFixed(3)}` }),
    cell.verdict ? el("span", { class: "range", text: cell.verdict }) : null);
}
