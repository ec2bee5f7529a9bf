// nll and emo against entropy: one curve a model, over the temperatures that its logits can be
// divided by.

// What is drawn at least. Far outside nll is so large that nothing else is seen.
const TEMPERATE = [0.4, 2.5];
const CURVES = [
  ["nll", "nll, nats a token"],
  ["emo", "emo, expected cost"],
];

function drawEntropy(box, shown) {
  const { temperatures } = DATA.evaluation;
  const drawn = shown.filter((i) => DATA.evaluation.curves[i]);
  if (!drawn.length) return;
  const charts = CURVES.map(([measure, title]) => {
    const caption = el("figcaption", { text: `${title}, by entropy` });
    return el("figure", {}, caption, entropyChart(measure, title, drawn));
  });
  const text =
    "A curve is one model at all temperatures, a ring the one it was measured at. " +
    "Two models on one curve are one model at two temperatures.";
  const named = (i) => el("span", {}, runName(i), ` at temperature ${number(temperatures[i])}`);
  box.append(
    el("h3", { text: "At every entropy" }),
    el("p", { class: "lede", text }),
    el("div", { class: "charts" }, ...charts),
    el("p", { class: "readout" }, ...drawn.map(named)),
  );
}

function entropyChart(measure, title, drawn) {
  const { curves: whole, temperatures } = DATA.evaluation;
  const curves = whole.map((curve, i) => curve && near(curve, temperatures[i]));
  const [width, height] = [520, HEIGHT];
  const xs = drawn.flatMap((i) => curves[i].entropy);
  const [x0, x1, every] = nice(Math.min(...xs), Math.max(...xs), 5);
  const [at, ticks] = evenly(drawn.flatMap((i) => curves[i][measure]), measure);
  const [left, right] = [MARGIN.left, width - MARGIN.right];
  const x = (value) => left + ((right - left) * (value - x0)) / (x1 - x0);
  const y = (value) =>
    height - MARGIN.bottom - (height - MARGIN.top - MARGIN.bottom) * at(value);
  const label = (place, anchor, text) =>
    svg("text", { class: "tick", ...place, "text-anchor": anchor, text });
  const axis = ticks.flatMap(([tick, text]) => [
    svg("line", { class: "grid", x1: left, x2: right, y1: y(tick), y2: y(tick) }),
    label({ x: left - 8, y: y(tick) + 4 }, "end", text),
  ]);
  for (let tick = x0; tick <= x1 + every / 2; tick += every) {
    axis.push(label({ x: x(tick), y: height - 6 }, "middle", short(tick, every)));
  }
  const marks = drawn.flatMap((i) => entropyMarks(i, measure, curves[i], x, y));
  const about = { role: "img", "aria-label": `${title} by entropy in nats` };
  return svg("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, ...about },
    ...axis, ...marks);
}

/** A model's curve, and a ring at the temperature that it was measured at. */
function entropyMarks(i, measure, curve, x, y) {
  const { temperature, entropy } = curve;
  const points = entropy
    .map((value, n) => `${x(value).toFixed(1)},${y(curve[measure][n]).toFixed(1)}`)
    .join(" ");
  const measured = DATA.evaluation.temperatures[i];
  const [cx, cy] = [entropy, curve[measure]].map((values) =>
    between(Math.log(measured), temperature.map(Math.log), values));
  const said =
    `${DATA.runs[i].name} at temperature ${number(measured)}: ` +
    `entropy ${number(cx)}, ${measure} ${number(cy)}`;
  const ring = { class: "ring", cx: x(cx), cy: y(cy), r: 4 };
  return [
    svg("polyline", { class: `line ${runClass(i)}`, points }),
    svg("g", { class: runClass(i) }, svg("circle", ring, svg("title", { text: said }))),
  ];
}

/** The part of a curve that is drawn. */
function near(curve, measured) {
  const low = Math.min(TEMPERATE[0], measured / 1.2);
  const high = Math.max(TEMPERATE[1], measured * 1.2);
  const kept = curve.temperature
    .map((value, n) => (value >= low && value <= high ? n : -1))
    .filter((n) => n >= 0);
  const parts = Object.entries(curve).map(([name, values]) => [name, kept.map((n) => values[n])]);
  return Object.fromEntries(parts);
}

/** The value at a place among rising places, on the line between its two neighbours. */
function between(place, places, values) {
  const after = places.findIndex((one) => one >= place);
  const n = after < 0 ? places.length - 1 : Math.max(after, 1);
  const share = (place - places[n - 1]) / (places[n] - places[n - 1]);
  return values[n - 1] + share * (values[n] - values[n - 1]);
}
