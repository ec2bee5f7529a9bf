// All tokens of a run by nll and emo: to the right the unlikely ones, at the bottom those whose
// replacement was near in meaning.

const MAP = { height: 210, left: 44, right: 14, top: 12, bottom: 24 };
const NLL_TICKS = [0, 0.5, 2, 5, 10, 15, 20, 30];

class TokenMap {
  /** `choose` gets the record and the token that a dot stands for. */
  constructor(runs, choose) {
    this.runs = runs;
    this.choose = choose;
    this.most = { nll: 1, emo: 0.1 }; // of all runs, so that runs can be compared
    for (const token of runs.flatMap((run) => run?.records.flat() ?? [])) {
      for (const key of ["nll", "emo"]) this.most[key] = Math.max(this.most[key], token[key]);
    }
    const on = { click: (event) => this.click(event) };
    this.canvas = svg("svg", { class: "map", role: "img", on });
    const caption = "Every token, by nll to the right and by emo upwards";
    this.figure = el("figure", {}, el("figcaption", { text: caption }), this.canvas);
    new ResizeObserver(() => this.run !== undefined && this.draw(this.run)).observe(this.figure);
  }

  draw(run) {
    this.run = run;
    const width = Math.max(this.figure.clientWidth, 200);
    const [right, bottom] = [width - MAP.right, MAP.height - MAP.bottom];
    // the root gives room to what is likely
    const x = (nll) => MAP.left + (right - MAP.left) * Math.sqrt(nll / this.most.nll);
    const [, high, step] = nice(0, this.most.emo, 4);
    const y = (emo) => bottom - ((bottom - MAP.top) * emo) / high;
    const axis = [];
    for (let tick = 0; tick <= high + step / 2; tick += step) {
      axis.push(svg("line", { class: "grid", x1: MAP.left, x2: right, y1: y(tick), y2: y(tick) }));
      const place = { x: MAP.left - 8, y: y(tick) + 4, "text-anchor": "end" };
      axis.push(svg("text", { class: "tick", ...place, text: short(tick, step) }));
    }
    for (const tick of NLL_TICKS.filter((tick) => tick <= this.most.nll)) {
      const place = { x: x(tick), y: bottom + 16, "text-anchor": "middle" };
      axis.push(svg("text", { class: "tick", ...place, text: tick }));
    }
    const says = (text, y) =>
      svg("text", { class: "says", x: right, y, "text-anchor": "end", text });
    axis.push(says("another meaning", MAP.top + 12), says("another wording", bottom - 8));
    const dot = ({ text, nll, emo }, record, token) => {
      const place = { cx: x(nll).toFixed(1), cy: y(emo).toFixed(1), r: 4 };
      const title = `${text.trim() || "the end"}: nll ${number(nll)}, emo ${number(emo)}`;
      return svg("circle", { ...place, "data-record": record, "data-token": token },
        svg("title", { text: title }));
    };
    const dots = this.runs[run].records.flatMap((tokens, record) =>
      tokens.map((token, t) => dot(token, record, t)),
    );
    this.canvas.setAttribute("viewBox", `0 0 ${width} ${MAP.height}`);
    this.canvas.setAttribute("height", MAP.height);
    const label = `${count(dots.length, "token")} of ${DATA.runs[run].name} by nll and emo`;
    this.canvas.setAttribute("aria-label", label);
    this.canvas.replaceChildren(...axis, svg("g", { class: runClass(run) }, ...dots));
    if (this.marked) this.mark(...this.marked);
  }

  /** Shows which dot is the chosen token. */
  mark(record, token) {
    this.marked = [record, token];
    this.canvas.querySelector(".chosen-dot")?.classList.remove("chosen-dot");
    const dot = this.canvas.querySelector(`[data-record="${record}"][data-token="${token}"]`);
    dot?.classList.add("chosen-dot");
    dot?.parentNode.append(dot); // on top
  }

  click({ target }) {
    const dot = target.closest("circle");
    if (dot) this.choose(Number(dot.dataset.record), Number(dot.dataset.token));
  }
}
