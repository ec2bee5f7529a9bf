// nll and emo against entropy: one curve a model, over the temperatures that its logits can be divided by.

const TEMPERATE = [0.4, 2.5]; // what is drawn at least; far outside nll is so large that nothing else is seen

function drawEntropy(box, shown) {
  const { temperatures } = DATA.evaluation;
  const drawn = shown.filter((i) => DATA.evaluation.curves[i]);
  if (!drawn.length) return;
  const charts = [["nll", "nll, nats a token"], ["emo", "emo, expected cost"]].map(([measure, title]) =>
    el("figure", {}, el("figcaption", { text: `${title}, by entropy` }), entropyChart(measure, title, drawn)));
  box.append(
    el("h3", { text: "At every entropy" }),
    el("p", { class: "lede", text: "A curve is one model at all temperatures, a ring the one it was measured at. Two models on one curve are one model at two temperatures." }),
    el("div", { class: "charts" }, ...charts),
    el("p", { class: "readout" }, ...drawn.map((i) => el("span", {}, runName(i), ` at temperature ${number(temperatures[i])}`))),
  );
}

function entropyChart(measure, title, drawn) {
  const { curves: whole, temperatures } = DATA.evaluation;
  const curves = whole.map((curve, i) => curve && near(curve, temperatures[i]));
  const [width, height] = [520, HEIGHT];
  const xs = drawn.flatMap((i) => curves[i].entropy);
  const [x0, x1, every] = nice(Math.min(...xs), Math.max(...xs), 5);
  const [at, ticks] = evenly(drawn.flatMap((i) => curves[i][measure]), measure);
  const x = (value) => MARGIN.left + ((width - MARGIN.left - MARGIN.right) * (value - x0)) / (x1 - x0);
  const y = (value) => height - MARGIN.bottom - (height - MARGIN.top - MARGIN.bottom) * at(value);
  const axis = ticks.flatMap(([tick, text]) => [
    svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(tick), y2: y(tick) }),
    svg("text", { class: "tick", x: MARGIN.left - 8, y: y(tick) + 4, "text-anchor": "end", text }),
  ]);
  for (let tick = x0; tick <= x1 + every / 2; tick += every) {
    axis.push(svg("text", { class: "tick", x: x(tick), y: height - 6, "text-anchor": "middle", text: short(tick, every) }));
  }
  const marks = drawn.flatMap((i) => {
    const { temperature, entropy } = curves[i];
    const points = entropy.map((value, n) => `${x(value).toFixed(1)},${y(curves[i][measure][n]).toFixed(1)}`).join(" ");
    const [cx, cy] = [entropy, curves[i][measure]].map((values) => between(Math.log(temperatures[i]), temperature.map(Math.log), values));
    const said = `${DATA.runs[i].name} at temperature ${number(temperatures[i])}: entropy ${number(cx)}, ${measure} ${number(cy)}`;
    return [
      svg("polyline", { class: `line ${runClass(i)}`, points }),
      svg("g", { class: runClass(i) }, svg("circle", { class: "ring", cx: x(cx), cy: y(cy), r: 4 }, svg("title", { text: said }))),
    ];
  });
  return svg("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title} by entropy in nats` }, ...axis, ...marks);
}

/** The part of a curve that is drawn. */
function near(curve, measured) {
  const [low, high] = [Math.min(TEMPERATE[0], measured / 1.2), Math.max(TEMPERATE[1], measured * 1.2)];
  const kept = curve.temperature.map((value, n) => (value >= low && value <= high ? n : -1)).filter((n) => n >= 0);
  return Object.fromEntries(Object.entries(curve).map(([name, values]) => [name, kept.map((n) => values[n])]));
}

/** The value at a place among rising places, on the line between its two neighbours. */
function between(place, places, values) {
  const after = places.findIndex((one) => one >= place);
  const n = after < 0 ? places.length - 1 : Math.max(after, 1);
  const share = (place - places[n - 1]) / (places[n] - places[n - 1]);
  return values[n - 1] + share * (values[n] - values[n - 1]);
}
