// What was predicted in place of one token, and what that costs.

class Explanation {
  /** Of a place in `runs`; `compare` gets the place of another run to be shown instead. */
  constructor(runs, run, compare) {
    this.runs = runs;
    this.run = run;
    this.view = runs[run];
    this.compare = compare;
  }

  /** The token and what to think of it. */
  head(record, t) {
    const token = this.view.records[record][t];
    const before = this.view.records[record].slice(0, t).map(({ text }) => text).join("");
    const text = before.length > 60 ? `…${before.slice(-60)}` : before || "The reference begins:";
    return [
      el("p", { class: "before", text }),
      el("h3", { class: "chosen" }, this.word(token.id, token.text)),
      el("p", { class: "gloss", text: this.gloss(token) })];
  }

  /** All there is of it. */
  details(record, t) {
    const token = this.view.records[record][t];
    const figure = (name, value) =>
      el("div", {}, el("dt", { text: name }), el("dd", { text: value }));
    const figures = el("dl", { class: "figures" },
      figure("nll", number(token.nll)),
      figure("emo", number(token.emo)),
      figure("probability", percent(token.p)),
      figure("rank", whole(token.rank)));
    const others = this.others(token, record, t);
    const parts = [figures, this.predictions(token), others, this.nearest(token)];
    return parts.filter((part) => part);
  }

  word(id, text = piece(this.view, id)) {
    const shown = (text || piece(this.view, id)).replace(/^ /, "").replaceAll("\n", "↵");
    return el("span", { class: "word", text: shown || "␣" });
  }

  /** nll and emo in words: how much is elsewhere, and whether that is near. */
  gloss({ p, emo, mean_cost: mean }) {
    if (p > 0.995) return "Nearly all of the probability is on the right token.";
    const cost = emo / (1 - p);
    return (
      `${percent(1 - p)} of the probability is on other tokens. ` +
      `They lie ${number(cost)} away on average; a random token, ${number(mean)}.`
    );
  }

  predictions(token) {
    const rows = token.top.map(([id, p, cost]) => ({ id, p, cost, product: p * cost }));
    let [p, product] = token.rest;
    if (!rows.some(({ id }) => id === token.id)) {
      rows.push({ id: token.id, p: token.p, cost: 0, product: 0, rank: token.rank });
      p = Math.max(0, p - token.p);
    }
    const others = this.view.tokens - rows.length;
    const top = Math.max(...rows.map((row) => row.product), product) || 1;
    const line = (name, row, kind) =>
      el("tr", { class: kind },
        el("th", { scope: "row" }, name),
        bar(row.p, row.p, percent(row.p), "p"),
        el("td", { text: small(row.cost) }),
        bar(row.product, row.product / top, small(row.product), "product"));
    const tag = ({ rank }) =>
      el("span", { class: "tag", text: rank ? `right, rank ${whole(rank)}` : "right" });
    const name = (row) =>
      el("span", {}, this.word(row.id), row.id === token.id ? tag(row) : "");
    const rest = { p, cost: product / p, product };
    return el("table", { class: "predictions" },
      el("caption", { text: "What the model expected" }),
      titles("token", "probability", "cost", "product"),
      el("tbody", {},
        ...rows.map((row) => line(name(row), row, row.id === token.id ? "target" : "")),
        others > 0 ? line(`${whole(others)} others`, rest, "rest") : null),
      el("tfoot", {}, el("tr", {},
        el("th", { scope: "row", text: "sum" }),
        el("td", { text: "100 %" }),
        el("td"),
        el("td", { "data-value": token.emo }, el("b", { text: small(token.emo) }), " emo"))));
  }

  nearest(token) {
    const near = this.view.neighbours[token.id] ?? [];
    const item = ([id, cost]) =>
      el("li", {}, this.word(id), " ", el("span", { class: "cost", text: small(cost) }));
    return el("div", { class: "nearest" },
      el("h4", { text: "Nearest to it under the cost" }),
      el("ul", {}, ...near.map(item)));
  }

  /** The same token under the other runs, where they cut the reference alike. */
  others(token, record, t) {
    const same = [...this.runs.keys()].filter(
      (i) => this.runs[i]?.records[record]?.[t]?.id === token.id,
    );
    if (same.length < 2) return null;
    const rows = same.map((i) => {
      const { nll, emo } = this.runs[i].records[record][t];
      const [pressed, on] = [String(i === this.run), { click: () => this.compare(i) }];
      const props = { type: "button", class: "quiet", "aria-pressed": pressed, on };
      return el("tr", { class: i === this.run ? "target" : null },
        el("th", { scope: "row" }, el("button", props, runName(i))),
        el("td", { text: number(nll) }),
        el("td", { text: number(emo) }));
    });
    return el("table", { class: "others" },
      el("caption", { text: "The same token under each run" }),
      titles("run", "nll", "emo"),
      el("tbody", {}, ...rows));
  }
}

/** The head of a table. */
function titles(...names) {
  return el("thead", {}, el("tr", {}, ...names.map((text) => el("th", { scope: "col", text }))));
}

/** The text of a token id under a run's tokenizer. */
function piece(view, id) {
  return view.pieces[id] ?? `[${id}]`;
}

/** A cost, or a share of one: four places, so that a column adds up. */
function small(value) {
  if (value > 0 && value < 5e-5) return "< 0.0001";
  return Number.isNaN(value) ? "–" : value === 0 ? "0" : value.toFixed(4);
}

/** A number with a bar behind it; `share` is the bar's part of the whole width. */
function bar(value, share, text, kind) {
  const vars = { "--share": share.toFixed(4) };
  return el("td", { class: `meter ${kind}`, "data-value": value, vars }, el("span", { text }));
}
