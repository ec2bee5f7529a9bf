// What a comparison of losses found over all seeds: sentences, and tables of texts.

function drawBench(box) {
  const { lines, tables } = DATA.bench;
  box.append(el("ul", { class: "sentences" }, ...lines.map((text) => el("li", { text }))));
  const cell = (text) => el("td", { text });
  const line = ([name, ...cells]) =>
    el("tr", {}, el("th", { scope: "row", text: name }), ...cells.map(cell));
  for (const { title, head, rows } of tables) {
    const body = el("tbody", {}, ...rows.map(line));
    const props = { class: "scroll", role: "region", "aria-label": title, tabindex: 0 };
    const table = el("table", { class: "measures" }, titles(...head), body);
    box.append(el("h3", { text: title }), el("div", props, table));
  }
}
