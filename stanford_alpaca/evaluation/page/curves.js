// The training curves: a chart a quantity, one line a run, a crosshair that pointer and arrow keys
// move.

const CHARTS = [
  ["loss", "Loss"],
  ["nll", "nll, nats a token"],
  ["emo", "emo, expected cost"],
  ["learning_rate", "Learning rate"],
];
const WIDE = 15; // a range from which on the scale is logarithmic at first
const MARGIN = { left: 52, right: 14, top: 12, bottom: 26 };
const HEIGHT = 220;

function drawCurves(box) {
  const logged = DATA.runs.map((_, i) => i).filter((i) => DATA.runs[i].curves);
  if (!logged.length) return box.append(note("None of these runs left a training log."));
  const hidden = new Set();
  const charts = CHARTS.map(([key, title]) => new Chart(key, title, logged, hidden)).filter(
    (chart) => chart.lines.length,
  );
  const toggles = logged.map((i) => {
    const on = { click: (event) => toggle(i, event.currentTarget) };
    const props = { type: "button", class: "legend", "aria-pressed": "true", on };
    return el("button", props, runName(i));
  });
  const log = charts.some((chart) => chart.wide());
  charts.forEach((chart) => (chart.log = log));
  const scales = [["log", "logarithmic"], ["linear", "linear"]];
  const scale = (value) => charts.forEach((chart) => chart.draw((chart.log = value === "log")));
  function toggle(i, button) {
    if (!hidden.delete(i)) hidden.add(i);
    button.setAttribute("aria-pressed", String(!hidden.has(i)));
    charts.forEach((chart) => chart.draw());
  }
  box.append(
    el("div", { class: "controls" },
      el("div", { class: "legends", role: "group", "aria-label": "Runs shown" }, ...toggles),
      choice("Scale", "scale", scales, log ? "log" : "linear", scale)),
    el("div", { class: "charts" }, ...charts.map((chart) => chart.figure)),
  );
  const redraw = new ResizeObserver(() => charts.forEach((chart) => chart.draw()));
  redraw.observe(box);
}

class Chart {
  constructor(key, title, runs, hidden) {
    this.key = key;
    this.hidden = hidden;
    this.lines = runs.flatMap((i) =>
      [[key, false], [`eval_${key}`, true]]
        .filter(([name]) => DATA.runs[i].curves[name])
        .map(([name, held]) => ({ run: i, held, points: DATA.runs[i].curves[name] })),
    );
    const steps = this.lines.flatMap((line) => line.points.map(([step]) => step));
    this.steps = [...new Set(steps)].sort((a, b) => a - b);
    this.at = null; // the place in steps that the crosshair is at
    this.readout = el("p", { class: "readout" });
    this.canvas = svg("svg", {
      class: "chart",
      tabindex: 0,
      role: "slider",
      "aria-label": `${title} by step`,
      "aria-valuemin": this.steps[0] ?? 0,
      "aria-valuemax": this.steps.at(-1) ?? 0,
      on: {
        pointermove: (event) => this.point(event),
        pointerdown: (event) => this.point(event),
        pointerleave: () => this.move(null),
        keydown: (event) => this.key_(event),
        focus: () => this.at === null && this.move(this.steps.length - 1),
        blur: () => this.move(null),
      },
    });
    this.figure = el("figure", {}, el("figcaption", { text: title }), this.canvas, this.readout);
    this.say();
  }

  visible() {
    return this.lines.filter((line) => !this.hidden.has(line.run));
  }

  /** Whether its values span more than a linear scale can show; a learning rate ends at 0. */
  wide() {
    const values = valuesOf(this.lines);
    const [least, most] = [Math.min(...values), Math.max(...values)];
    return this.key !== "learning_rate" && least > 0 && most > WIDE * least;
  }

  draw() {
    const width = Math.max(this.canvas.parentNode.clientWidth, 200);
    const values = valuesOf(this.visible().length ? this.visible() : this.lines);
    const log = this.log && this.key !== "learning_rate" && Math.min(...values) > 0;
    const [at, ticks] = log ? powers(values) : evenly(values, this.key);
    const last = this.steps.at(-1) || 1;
    this.x = (value) => MARGIN.left + ((width - MARGIN.left - MARGIN.right) * value) / last;
    this.y = (value) => HEIGHT - MARGIN.bottom - (HEIGHT - MARGIN.top - MARGIN.bottom) * at(value);
    this.canvas.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.canvas.setAttribute("height", HEIGHT);
    const axis = [];
    for (const [tick, text] of ticks) {
      const y = this.y(tick);
      axis.push(
        svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y }),
        svg("text", { class: "tick", x: MARGIN.left - 8, y: y + 4, "text-anchor": "end", text }),
      );
    }
    const [, , every] = nice(0, last, width > 400 ? 5 : 3);
    for (let tick = 0; tick <= last; tick += every) {
      const place = { x: this.x(tick), y: HEIGHT - 6, "text-anchor": "middle" };
      axis.push(svg("text", { class: "tick", ...place, text: short(tick, every) }));
    }
    this.cross = svg("g", { class: "cross" });
    const paths = this.visible().map((line) => this.path(line));
    this.canvas.replaceChildren(...axis, ...paths, this.cross);
    this.move(this.at);
  }

  path({ run, held, points }) {
    const places = points.map(([step, value]) => [this.x(step), this.y(value)]);
    const rounded = places.map((place) => place.map((value) => value.toFixed(1)));
    if (!held && points.length > 1) {
      return svg("polyline", { class: `line ${runClass(run)}`, points: rounded.join(" ") });
    }
    const rings = rounded.map(([cx, cy]) => svg("circle", { class: "ring", cx, cy, r: 3.5 }));
    return svg("g", { class: runClass(run) }, ...rings);
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const x = event.clientX - box.left;
    const distance = (i) => Math.abs(this.x(this.steps[i]) - x);
    this.move(this.steps.reduce((best, _, i) => (distance(i) < distance(best) ? i : best), 0));
  }

  key_(event) {
    const last = this.steps.length - 1;
    const jump = Math.max(1, Math.round(last / 10));
    const moves = {
      ArrowLeft: -1, ArrowRight: 1, ArrowDown: -1, ArrowUp: 1,
      PageDown: -jump, PageUp: jump, Home: -last, End: last,
    };
    if (!(event.key in moves)) return;
    event.preventDefault();
    this.move(Math.min(last, Math.max(0, (this.at ?? last) + moves[event.key])));
  }

  move(at) {
    this.at = at;
    this.cross.replaceChildren();
    if (at !== null) {
      const x = this.x(this.steps[at]);
      this.cross.append(svg("line", { x1: x, x2: x, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }));
      for (const { line, step, value } of this.values()) {
        const place = { cx: this.x(step), cy: this.y(value), r: 4 };
        this.cross.append(svg("circle", { class: runClass(line.run), ...place }));
      }
    }
    this.say();
  }

  /** What each visible line had last at the crosshair. */
  values() {
    const step = this.steps[this.at ?? this.steps.length - 1];
    return this.visible().flatMap((line) => {
      const point = line.points.findLast(([at]) => at <= step);
      return point ? [{ line, step: point[0], value: point[1] }] : [];
    });
  }

  say() {
    const step = this.steps[this.at ?? this.steps.length - 1];
    const texts = new Map();
    for (const { line, value } of this.values()) {
      const text = `${line.held ? "held out " : ""}${number(value)}`;
      texts.set(line.run, [...(texts.get(line.run) ?? []), text]);
    }
    const parts = [...texts].map(([run, values]) => [run, values.join(", ")]);
    this.readout.replaceChildren(
      el("span", { class: "step", text: `step ${whole(step)}` }),
      ...parts.map(([run, text]) => el("span", {}, runName(run), ` ${text}`)),
    );
    this.canvas.setAttribute("aria-valuenow", step ?? 0);
    const words = parts.map(([run, text]) => `${DATA.runs[run].name} ${text}`);
    this.canvas.setAttribute("aria-valuetext", `step ${step}: ${words.join(", ")}`);
  }
}

function valuesOf(lines) {
  return lines.flatMap((line) => line.points.map(([, value]) => value));
}

/** A linear scale: where a value lies between 0 and 1, and the ticks as [value, text]. */
function evenly(values, key) {
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const fromZero = key === "learning_rate" || least < 0.35 * most;
  const [low, high, step] = nice(fromZero ? Math.min(0, least) : least, most, 4);
  const length = Math.round((high - low) / step) + 1;
  const ticks = Array.from({ length }, (_, n) => low + n * step);
  return [(value) => (value - low) / (high - low), ticks.map((tick) => [tick, short(tick, step)])];
}

/** A logarithmic one: ticks at 1, 2 and 5, or at powers of ten where there are many. */
function powers(values) {
  const low = Math.log10(Math.min(...values)) - 0.05;
  const high = Math.log10(Math.max(...values)) + 0.05;
  const all = [];
  for (let power = Math.floor(low); power <= high; power++) {
    all.push(...[1, 2, 5].map((factor) => factor * 10 ** power));
  }
  const inside = all.filter((tick) => Math.log10(tick) >= low && Math.log10(tick) <= high);
  const isPower = (tick) => Math.abs(Math.log10(tick) % 1) < 1e-6;
  const ticks = inside.length <= 7 ? inside : inside.filter(isPower);
  const texts = ticks.map((tick) => [tick, String(+tick.toPrecision(1))]);
  return [(value) => (Math.log10(value) - low) / (high - low), texts];
}

/** A range that holds both numbers and ends on ticks: [low, high, step]. */
function nice(low, high, ticks) {
  if (high === low) high = low + (Math.abs(low) || 1);
  const raw = (high - low) / ticks;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * ([1, 2, 2.5, 5].find((factor) => factor * power >= raw * 0.999) ?? 10);
  return [Math.floor(low / step + 1e-9) * step, Math.ceil(high / step - 1e-9) * step, step];
}

/** A tick's number, with no more digits than the step has. */
function short(value, step) {
  if (Math.abs(value) < step / 1e6) return "0";
  if (step < 1e-3) return value.toExponential(1).replace(".0e", "e").replace("-", "−");
  if (step >= 1000) return `${+(value / 1000).toFixed(1)}k`;
  const shows = (digits) => Math.abs(Number(step.toFixed(digits)) - step) < step * 1e-6;
  return value.toFixed([0, 1, 2, 3, 4, 5, 6].find(shows) ?? 6);
}
