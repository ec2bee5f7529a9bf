// The transport view: references coloured token by token, and beside them what was predicted in
// place of the chosen token.

const NLL_TOP = 6; // nats at which the colour is full: a right token of 0.25 %
const RECORDS = 8; // shown at a time

function drawTransport(box) {
  const view = DATA.transport;
  if (!view?.runs.some(Boolean)) {
    const why = "there is no model or no --data, or --transport_records 0 left them out.";
    return box.append(note(`No tokens here: ${why}`));
  }
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
    this.records = el("div", {
      class: "records",
      on: { click: (event) => this.click(event), keydown: (event) => this.key(event) },
    });
    const on = { click: () => this.showMore(true) };
    this.more = el("button", { type: "button", class: "more", on });
    this.map = new TokenMap(view.runs, (r, t) => this.select(r, t));
    this.said = el("div", { "aria-live": "polite" });
    this.details = el("div");
    const props = { class: "panel", "aria-label": "The chosen token" };
    this.panel = el("aside", props, this.said, this.details);
    this.scale = el("p", { class: "scale" });
    const all = view.runs.flatMap((run) => run?.records.flat() ?? []);
    this.random = all.reduce((sum, token) => sum + token.mean_cost, 0) / all.length || 1;
    const runs = this.runs.map((i) => [String(i), runName(i)]);
    const values = [["emo", "emo"], ["nll", "nll"]];
    const orders = [["", "as in the data"], ["worst", "worst token first"]];
    const controls = el("div", { class: "controls" },
      choice("Run", "transport-run", runs, String(this.run), (run) =>
        this.change({ run: Number(run) })),
      choice("Colour by", "transport-by", values, this.by, (by) => this.change({ by })),
      choice("Order", "transport-order", orders, "", (order) => this.sort(order)),
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
    this.sorted = order;
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
    const values = this.tokens(record).map((token) => token[this.by]);
    return values.reduce((best, value, t) => (value > values[best] ? t : best), 0);
  }

  change(changes) {
    this.choose(changes);
    if (this.sorted) this.sort(this.sorted);
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
      // the run may cut the reference elsewhere
      const last = this.at ? this.tokens(this.at.record).length - 1 : -1;
      if (last >= 0) this.select(this.at.record, Math.min(this.at.token, last), focused);
      else this.selectFirst();
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
    const sum = (key) => tokens.reduce((total, token) => total + token[key], 0);
    const mean = (key) => number(sum(key) / tokens.length);
    const line = el("div", {
      class: "tokens",
      role: "listbox",
      "aria-label": `Reference ${r + 1}: ${instruction}`,
      "aria-orientation": "horizontal",
    });
    tokens.forEach((token, t) => line.append(...this.token(token, r, t)));
    const means = el("p", { class: "means", text: `nll ${mean("nll")} · emo ${mean("emo")}` });
    const none = "The prompt fills the whole length: no token is left to predict.";
    return el("article", { class: "record" },
      instruction ? el("p", { class: "asked", text: instruction }) : null,
      input ? el("p", { class: "asked input", text: input }) : null,
      ...(tokens.length ? [line, means] : [note(none)]));
  }

  /**
   * The token as an option, with the white space before it outside, where it is not coloured,
   * unless it is nothing else.
   */
  token(token, r, t) {
    const text = token.text || piece(this.view.runs[this.run], token.id);
    const [, space, word] = text.match(/^(\s*)([^]*)$/);
    const option = el("span", {
      class: token.text ? "token" : "token special",
      role: "option",
      tabindex: -1,
      "aria-selected": "false",
      "data-record": r,
      "data-token": t,
      text: word || (space.includes("\n") ? "↵" : space),
    });
    return word ? [space, option] : [option, space.includes("\n") ? space : ""];
  }

  colour() {
    const top = { nll: NLL_TOP, emo: this.random }[this.by];
    for (const option of this.records.querySelectorAll(".token")) {
      const token = this.tokens(option.dataset.record)[option.dataset.token];
      option.style.setProperty("--heat", Math.sqrt(Math.min(1, token[this.by] / top)).toFixed(3));
    }
    this.element?.setAttribute("data-by", this.by);
    const step = (heat) =>
      el("span", { vars: { "--heat": heat }, text: (top * heat * heat).toFixed(2) });
    const unit = { nll: "nats and more", emo: "a random token" }[this.by];
    const steps = [0, 0.25, 0.5, 0.75, 1].map(step);
    this.scale.replaceChildren(...steps, el("small", { text: unit }));
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
    const explanation = new Explanation(this.view.runs, this.run, (i) => this.compare(i));
    this.said.replaceChildren(...explanation.head(record, token));
    this.details.replaceChildren(...explanation.details(record, token));
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
    const beyond = [...this.records.querySelectorAll(".token")]
      .map((option) => [option, place(option)])
      .filter(([, box]) => (box.top - here.top) * way > here.height / 2);
    if (!beyond.length) return this.beside(this.at.record, way);
    const middle = (box) => box.left + box.width / 2;
    const distance = ([, box]) =>
      Math.abs(box.top - here.top) * 1e4 + Math.abs(middle(box) - middle(here));
    const [{ dataset }] = beyond.reduce((best, other) =>
      distance(other) < distance(best) ? other : best,
    );
    return [Number(dataset.record), Number(dataset.token)];
  }

  compare(i) {
    this.choose({ run: i });
    this.panel.querySelector('.others [aria-pressed="true"]')?.focus();
  }
}
