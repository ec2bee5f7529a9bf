// The transport view: references coloured token by token, and beside them what was predicted in place of the chosen token.

const NLL_TOP = 6; // nats at which the colour is full: a right token of 0.25 %
const RECORDS = 8; // shown at a time

function drawTransport(box) {
  const view = DATA.transport;
  if (!view) return box.append(note("No tokens here: there is no model, or --transport_records 0 left them out."));
  box.append(new TransportView(view).element);
}

class TransportView {
  constructor(view) {
    this.view = view;
    this.runs = view.runs.map((_, i) => i).filter((i) => view.runs[i]);
    this.run = this.runs.at(-1);
    this.by = "emo";
    this.order = view.records.map((_, r) => r);
    this.at = null; // {record, token} chosen
    this.records = el("div", { class: "records", on: { click: (event) => this.click(event), keydown: (event) => this.key(event) } });
    this.more = el("button", { type: "button", class: "more", on: { click: () => this.showMore(true) } });
    this.map = new TokenMap(view.runs, (r, t) => this.select(r, t));
    this.panel = el("aside", { class: "panel", "aria-label": "The chosen token" });
    this.scale = el("p", { class: "scale" });
    const all = view.runs.flatMap((run) => run?.records.flat() ?? []);
    this.random = all.reduce((sum, token) => sum + token.mean_cost, 0) / all.length || 1;
    const controls = el("div", { class: "controls" },
      choice("Run", "transport-run", this.runs.map((i) => [String(i), runName(i)]), String(this.run), (i) => this.choose({ run: Number(i) })),
      choice("Colour by", "transport-by", [["emo", "emo"], ["nll", "nll"]], this.by, (by) => this.choose({ by })),
      choice("Order", "transport-order", [["", "as in the data"], ["worst", "worst token first"]], "", (order) => this.sort(order)),
      this.scale);
    this.element = el("div", { class: "transport" }, controls, this.map.figure,
      el("div", { class: "reading" }, el("div", {}, this.records, this.more), this.panel));
    this.showMore();
    this.map.draw(this.run);
    this.selectFirst();
  }

  selectFirst() {
    const first = this.order.find((r) => this.tokens(r).length);
    if (first !== undefined) this.select(first, this.worst(first), false);
  }

  sort(order) {
    const worst = (r) => this.tokens(r)[this.worst(r)]?.[this.by] ?? -1;
    this.order = this.view.records.map((_, r) => r);
    if (order) this.order.sort((a, b) => worst(b) - worst(a));
    this.records.replaceChildren();
    this.showMore();
    this.selectFirst();
  }

  tokens(record) {
    return this.view.runs[this.run].records[record] ?? [];
  }

  worst(record) {
    return this.tokens(record).reduce((best, token, t, all) => (token[this.by] > all[best][this.by] ? t : best), 0);
  }

  choose(changes) {
    const focused = this.records.contains(document.activeElement);
    Object.assign(this, changes);
    if ("run" in changes) {
      this.map.draw(this.run);
      const shown = this.records.childElementCount;
      this.records.replaceChildren();
      while (this.records.childElementCount < shown) this.showMore();
      const radio = this.element.querySelector(`input[name="transport-run"][value="${this.run}"]`);
      radio.checked = true;
      if (this.at) this.select(this.at.record, Math.min(this.at.token, this.tokens(this.at.record).length - 1), focused);
    }
    this.colour();
  }

  showMore(focus = false) {
    const before = this.records.childElementCount;
    const shown = this.order.slice(before, before + RECORDS);
    this.records.append(...shown.map((r) => this.record(r)));
    const left = this.view.records.length - this.records.childElementCount;
    this.more.hidden = left <= 0;
    this.more.textContent = `Show ${Math.min(RECORDS, left)} more`;
    this.colour();
    if (focus && shown.length && this.tokens(shown[0]).length) this.select(shown[0], 0);
  }

  record(r) {
    const { instruction, input } = this.view.records[r];
    const tokens = this.tokens(r);
    const mean = (key) => number(tokens.reduce((sum, token) => sum + token[key], 0) / tokens.length);
    const line = el("div", { class: "tokens", role: "listbox", "aria-label": `Reference ${r + 1}: ${instruction}`, "aria-orientation": "horizontal" });
    tokens.forEach((token, t) => line.append(...this.token(token, r, t)));
    return el("article", { class: "record" },
      instruction ? el("p", { class: "asked", text: instruction }) : null, input ? el("p", { class: "asked input", text: input }) : null,
      tokens.length ? line : note("The prompt fills the whole length: no token is left to predict."),
      tokens.length ? el("p", { class: "means", text: `nll ${mean("nll")} · emo ${mean("emo")}` }) : null);
  }

  /** The token as an option, with the white space before it outside, where it is not coloured. */
  token(token, r, t) {
    const text = token.text || this.piece(token.id);
    const [, space, word] = text.match(/^(\s*)([^]*)$/);
    const option = el("span", { class: token.text ? "token" : "token special", role: "option", tabindex: -1, "aria-selected": "false",
      "data-record": r, "data-token": t, text: word || "↵" });
    return word ? [space, option] : [option, space];
  }

  piece(id) {
    return this.view.runs[this.run].pieces[id] ?? `[${id}]`;
  }

  colour() {
    const top = { nll: NLL_TOP, emo: this.random }[this.by];
    for (const option of this.records.querySelectorAll(".token")) {
      const token = this.tokens(option.dataset.record)[option.dataset.token];
      option.style.setProperty("--heat", Math.sqrt(Math.min(1, token[this.by] / top)).toFixed(3));
    }
    this.element?.setAttribute("data-by", this.by);
    const steps = [0, 0.25, 0.5, 0.75, 1].map((heat) => el("span", { vars: { "--heat": heat }, text: (top * heat * heat).toFixed(2) }));
    this.scale.replaceChildren(...steps, el("small", { text: { nll: "nats and more", emo: "a random token" }[this.by] }));
  }

  option(r, t) {
    return this.records.querySelector(`[data-record="${r}"][data-token="${t}"]`);
  }

  select(record, token, focus = true) {
    while (!this.option(record, token) && !this.more.hidden) this.showMore();
    for (const old of this.records.querySelectorAll('[aria-selected="true"]')) {
      old.setAttribute("aria-selected", "false");
      old.tabIndex = -1;
    }
    this.at = { record, token };
    const option = this.option(record, token);
    if (!option) return;
    option.setAttribute("aria-selected", "true");
    option.tabIndex = 0;
    if (focus) option.focus();
    this.map.mark(record, token);
    this.panel.replaceChildren(...this.explained(this.tokens(record)[token], record, token));
  }

  click(event) {
    const option = event.target.closest(".token");
    if (option) this.select(Number(option.dataset.record), Number(option.dataset.token));
  }

  key(event) {
    if (!this.at || !event.target.closest(".token")) return;
    const { record, token } = this.at;
    const last = this.tokens(record).length - 1;
    const to = {
      ArrowRight: () => (token < last ? [record, token + 1] : this.beside(record, 1)),
      ArrowLeft: () => (token > 0 ? [record, token - 1] : this.beside(record, -1)),
      ArrowDown: () => this.line(1),
      ArrowUp: () => this.line(-1),
      Home: () => [record, 0],
      End: () => [record, last],
    }[event.key]?.();
    if (to === undefined) return;
    event.preventDefault();
    if (to) this.select(...to);
  }

  /** The nearest record before or after that has tokens: its last or first one. */
  beside(record, way) {
    let place = this.order.indexOf(record) + way;
    while (place in this.order && !this.tokens(this.order[place]).length) place += way;
    const next = this.order[place];
    return next === undefined ? null : [next, way > 0 ? 0 : this.tokens(next).length - 1];
  }

  /** The token that stands nearest on the line above or below. */
  line(way) {
    const place = (option) => option.getBoundingClientRect();
    const here = place(this.option(this.at.record, this.at.token));
    const beyond = [...this.records.querySelectorAll(".token")].map((option) => [option, place(option)]).filter(([, box]) => (box.top - here.top) * way > here.height / 2);
    if (!beyond.length) return this.beside(this.at.record, way);
    const distance = ([, box]) => Math.abs(box.top - here.top) * 1e4 + Math.abs(box.left + box.width / 2 - here.left - here.width / 2);
    const [{ dataset }] = beyond.reduce((best, other) => (distance(other) < distance(best) ? other : best));
    return [Number(dataset.record), Number(dataset.token)];
  }

  // ---- the panel -----------------------------------------------------------------------------------------------------

  explained(token, record, t) {
    const before = this.tokens(record).slice(0, t).map(({ text }) => text).join("");
    const figures = [["nll", number(token.nll)], ["emo", number(token.emo)], ["probability", percent(token.p)], ["rank", whole(token.rank)]];
    return [
      el("div", { "aria-live": "polite" },
        el("p", { class: "before", text: before.length > 60 ? `…${before.slice(-60)}` : before || "The reference begins:" }),
        el("h3", { class: "chosen" }, this.word(token.id, token.text)),
        el("p", { class: "gloss", text: this.gloss(token) })),
      el("dl", { class: "figures" }, ...figures.map(([name, value]) => el("div", {}, el("dt", { text: name }), el("dd", { text: value })))),
      this.predictions(token), this.others(token, record, t), this.nearest(token)].filter((part) => part);
  }

  word(id, text = this.piece(id)) {
    const shown = (text || this.piece(id)).replace(/^ /, "").replaceAll("\n", "↵");
    return el("span", { class: "word", text: shown || "␣" });
  }

  /** nll and emo in words: how much is elsewhere, and whether that is near. */
  gloss({ p, emo, mean_cost: mean }) {
    if (p > 0.995) return "Nearly all of the probability is on the right token.";
    const cost = emo / (1 - p);
    return `${percent(1 - p)} of the probability is on other tokens. They lie ${number(cost)} away on average; a random token, ${number(mean)}.`;
  }

  predictions(token) {
    const rows = token.top.map(([id, p, cost]) => ({ id, p, cost, product: p * cost }));
    let [p, product] = token.rest;
    if (!rows.some(({ id }) => id === token.id)) {
      rows.push({ id: token.id, p: token.p, cost: 0, product: 0, rank: token.rank });
      p = Math.max(0, p - token.p);
    }
    const others = this.view.runs[this.run].tokens - rows.length;
    const top = Math.max(...rows.map((row) => row.product), product) || 1;
    const line = (name, row, kind) =>
      el("tr", { class: kind }, el("th", { scope: "row" }, name), bar(row.p, row.p, percent(row.p), "p"),
        el("td", { text: small(row.cost) }), bar(row.product, row.product / top, small(row.product), "product"));
    const name = (row) => el("span", {}, this.word(row.id), row.id === token.id ? el("span", { class: "tag", text: row.rank ? `right, rank ${whole(row.rank)}` : "right" }) : "");
    return el("table", { class: "predictions" },
      el("caption", { text: "What the model expected" }),
      el("thead", {}, el("tr", {}, ...["token", "probability", "cost", "product"].map((title) => el("th", { scope: "col", text: title })))),
      el("tbody", {}, ...rows.map((row) => line(name(row), row, row.id === token.id ? "target" : "")),
        others > 0 ? line(`${whole(others)} others`, { p, cost: product / p, product }, "rest") : null),
      el("tfoot", {}, el("tr", {}, el("th", { scope: "row", text: "sum" }), el("td", { text: "100 %" }), el("td"), el("td", { "data-value": token.emo }, el("b", { text: small(token.emo) }), " emo"))));
  }

  nearest(token) {
    const near = this.view.runs[this.run].neighbours[token.id] ?? [];
    return el("div", { class: "nearest" }, el("h4", { text: "Nearest to it under the cost" }),
      el("ul", {}, ...near.map(([id, cost]) => el("li", {}, this.word(id), " ", el("span", { class: "cost", text: small(cost) })))));
  }

  /** The same token under the other runs, where they cut the reference alike. */
  others(token, record, t) {
    const same = this.runs.filter((i) => this.view.runs[i].records[record]?.[t]?.id === token.id);
    if (same.length < 2) return null;
    const rows = same.map((i) => {
      const { nll, emo } = this.view.runs[i].records[record][t];
      const button = el("button", { type: "button", class: "quiet", "aria-pressed": String(i === this.run), on: { click: () => this.compare(i) } }, runName(i));
      return el("tr", { class: i === this.run ? "target" : null }, el("th", { scope: "row" }, button), el("td", { text: number(nll) }), el("td", { text: number(emo) }));
    });
    return el("table", { class: "others" }, el("caption", { text: "The same token under each run" }),
      el("thead", {}, el("tr", {}, ...["run", "nll", "emo"].map((title) => el("th", { scope: "col", text: title })))), el("tbody", {}, ...rows));
  }

  compare(i) {
    this.choose({ run: i });
    this.panel.querySelector('.others [aria-pressed="true"]')?.focus();
  }
}

/** A cost, or a share of one: four places, so that a column adds up. */
function small(value) {
  return value > 0 && value < 5e-5 ? "< 0.0001" : Number.isNaN(value) ? "–" : value === 0 ? "0" : value.toFixed(4);
}

/** A number with a bar behind it; `share` is the bar's part of the whole width. */
function bar(value, share, text, kind) {
  return el("td", { class: `meter ${kind}`, "data-value": value, vars: { "--share": share.toFixed(4) } }, el("span", { text }));
}
