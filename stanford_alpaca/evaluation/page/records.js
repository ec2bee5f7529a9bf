// What a model made of data before training: sentences, the records that were read, duplicates.

const DATA_ORDERS = {
  telling: ["the most telling", null],
  nll: ["nll", (row) => row.nll],
  emo: ["emo", (row) => row.emo],
  ratio: ["emo / nll", (row) => row.ratio],
  distance: ["distance", (row) => row.distance],
  weight: ["weight under emo2", (row) => row.weight.emo2],
};

function drawRecords(box) {
  const { lines, rows, shown } = DATA.records;
  const said = el("ul", { class: "sentences" }, ...lines.map((text) => el("li", { text })));
  const body = el("tbody");
  const more = el("button", { type: "button", class: "more", on: { click: () => grow() } });
  let order = [];
  function grow() {
    const next = order.slice(body.childElementCount, body.childElementCount + PAGE);
    body.append(...next.map((i) => recordRow(rows[i])));
    const left = order.length - body.childElementCount;
    more.hidden = left <= 0;
    more.textContent = `Show ${Math.min(PAGE, left)} more`;
  }
  function sort(by) {
    const value = DATA_ORDERS[by][1];
    const rest = rows.map((_, i) => i).filter((i) => !shown.includes(i));
    order = value ? rows.map((_, i) => i) : [...shown, ...rest];
    if (value) order.sort((a, b) => value(rows[b]) - value(rows[a]));
    body.replaceChildren();
    grow();
  }
  const orders = Object.entries(DATA_ORDERS).map(([by, [label]]) => [by, label]);
  const names = ["record", "tokens", "nll", "emo", "emo / nll", "distance", "emo", "emo2", ""];
  box.append(said,
    el("div", { class: "controls" }, choice("Order", "data-order", orders, "telling", sort)),
    el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Records" },
      el("table", { class: "measures" },
        el("caption", { text: "emo, emo2 on the right: the record's share of the pull, mle = 1" }),
        titles(...names), body)),
    more, ...duplicates());
  sort("telling");
}

function recordRow(row) {
  const kind = row.suspicious ? "suspicious label" : row.kind;
  const { nll, emo, ratio, distance, weight } = row;
  const values = [nll, emo, ratio, distance, weight.emo, weight.emo2].map(number);
  return el("tr", { class: row.suspicious ? "target" : null },
    el("th", { scope: "row", text: `${place(row.source)}, record ${row.record}` }),
    el("td", { text: whole(row.tokens) }),
    ...values.map((text) => el("td", { text })),
    el("td", { text: kind }));
}

/** Groups of places, the first ones of each kind. */
function duplicates() {
  const { exact, conflicting, near } = DATA.records.duplicates;
  const named = ([source, record]) => `${place(source)}, record ${record}`;
  const joined = (groups, sign) => groups.map((group) => group.map(named).join(sign));
  const kinds = [
    ["Records that occur more than once", joined(exact, " = ")],
    ["One question with several answers", joined(conflicting, " ≠ ")],
    [`Near duplicates, a Jaccard similarity of ${DATA.records.near} and more`,
      (near ?? []).map(([one, two, much]) => `${named(one)} ≈ ${named(two)}, ${number(much)}`)],
  ];
  return kinds.flatMap(([title, texts]) => {
    if (!texts.length) return [];
    const left = texts.length - PAGE;
    const shown = texts.slice(0, PAGE).map((text) => el("li", { text }));
    if (left > 0) shown.push(el("li", { text: `and ${whole(left)} more in the JSON of --out` }));
    return [el("h3", { text: title }), el("ul", { class: "sentences" }, ...shown)];
  });
}
