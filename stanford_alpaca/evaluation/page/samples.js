// The responses side by side: searched, filtered, and compared word by word.

const FILTERS = {
  all: ["all", () => true],
  differ: [
    "the runs differ",
    (row) => new Set(row.texts.map((texts) => JSON.stringify(texts))).size > 1,
  ],
  equal: ["some right", (row) => row.right.some(Boolean)],
  none: ["none right", (row) => !row.right.some(Boolean)],
};
// share of letters that two texts have in common, from which on their differences are marked
const CLOSE = 0.4;
const LONGEST = 1e6; // word pairs that are compared; what differs beyond that is marked as a whole

function drawSamples(box) {
  const rows = firstModel() < 0 ? [] : (DATA.samples ?? []).map(prepared);
  if (!rows.length) {
    const why = "without a model or --data there are none, and running text asks nothing.";
    return box.append(note(`No responses here: ${why}`));
  }
  const decodings = [...new Set(rows.map((row) => row.decoding))];
  const [decoding] = decodings;
  const state = { words: "", decoding, filter: "all", against: "reference", shown: PAGE };
  const status = el("p", { class: "status", role: "status" });
  const entries = el("div", { class: "samples" });
  const on = { click: () => show(state.shown + PAGE, true) };
  const more = el("button", { type: "button", class: "more", on });
  let found = rows;

  function change(changes) {
    Object.assign(state, changes);
    const words = state.words.toLowerCase().split(/\s+/).filter(Boolean);
    const [, fits] = FILTERS[state.filter];
    const holds = ({ haystack }) => words.every((word) => haystack.includes(word));
    found = rows.filter((row) => row.decoding === state.decoding && fits(row) && holds(row));
    entries.replaceChildren();
    show(PAGE);
  }

  function show(shown, focus = false) {
    const before = entries.childElementCount;
    state.shown = Math.min(shown, found.length);
    const next = found.slice(before, state.shown);
    entries.append(...next.map((row) => sampleEntry(row, state.against)));
    if (focus) entries.children[before]?.focus();
    const all = rows.filter((row) => row.decoding === state.decoding).length;
    status.textContent = `${whole(found.length)} of ${count(all, "record")}`;
    more.hidden = state.shown >= found.length;
    more.textContent = `Show ${Math.min(PAGE, found.length - state.shown)} more`;
  }

  const search = el("input", {
    type: "search",
    id: "search",
    placeholder: "words in question, answer or response",
    on: { input: (event) => change({ words: event.target.value }) },
  });
  const filters = Object.entries(FILTERS).map(([key, [label]]) => [key, label]);
  const ways = decodings.map((name) => [name, name]);
  const first = DATA.runs[firstModel()].name;
  const against = [["reference", "the reference"], ["first", first], ["", "nothing"]];
  box.append(
    el("div", { class: "controls", role: "search", "aria-label": "Responses" },
      el("label", { class: "field", for: "search" }, el("span", { text: "Search" }), search),
      choice("Show", "filter", filters, "all", (filter) => change({ filter })),
      ways.length > 1
        ? choice("Decoding", "decoding", ways, decoding, (way) => change({ decoding: way }))
        : null,
      choice("Mark differences from", "against", against, "reference", (value) =>
        change({ against: value }))),
    status, entries, more);
  change({});
}

function firstModel() {
  return DATA.runs.findIndex((run) => run.model);
}

/** A row with what filtering asks of it: responses as lists, which are right, and all its text. */
function prepared(row) {
  const texts = row.responses.filter((text) => text !== null).map((text) => [text].flat());
  const right = texts.flat().map((text) => text.trim() === row.reference.trim());
  const words = [row.instruction, row.input, row.reference, ...texts.flat()];
  return { ...row, texts, right, haystack: words.join("\n").toLowerCase() };
}

function sampleEntry(row, against) {
  const first = [row.responses[firstModel()]].flat()[0];
  const base = { reference: row.reference, first }[against];
  const columns = [
    el("div", { class: "answer reference" },
      el("h4", { text: "reference" }),
      el("p", { text: row.reference || "–" })),
  ];
  row.responses.forEach((response, i) => {
    if (response === null) return;
    const plain = base === undefined || (against === "first" && i === firstModel());
    const bodies = [response].flat().map((text) => answer(text, row, plain ? undefined : base));
    columns.push(el("div", { class: "answer" }, el("h4", {}, runName(i)), ...bodies));
  });
  return el("article", { class: "sample", tabindex: -1 },
    el("h3", { text: row.instruction || "–" }),
    row.input ? el("p", { class: "input", text: row.input }) : null,
    el("div", { class: "answers" }, ...columns));
}

/** A response, marked where it differs from `base`, if there is one. */
function answer(text, { reference }, base) {
  const same = text.trim() === reference.trim();
  const nothing = el("span", { class: "empty", text: "(nothing)" });
  const marked = base === undefined ? [text] : wordDiff(base, text);
  const label = "equal to the reference";
  const equal = el("span", { class: "equal", role: "img", "aria-label": label, text: " ✓" });
  const words = text ? marked : [nothing];
  return el("p", { class: same ? "right" : null }, ...words, same ? equal : null);
}

/** The words of `text` as nodes: what `base` lacks is inserted, what only `base` has is deleted. */
function wordDiff(base, text) {
  const [a, b] = [base, text].map((words) => words.match(/\S+|\s+/g) ?? []);
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start++;
  const most = Math.min(a.length, b.length) - start;
  let end = 0;
  while (end < most && a[a.length - 1 - end] === b[b.length - 1 - end]) end++;
  const middle = common(a.slice(start, a.length - end), b.slice(start, b.length - end));
  const kept = middle.filter(([kind]) => kind === "same").map(([, words]) => words);
  const alike = [...a.slice(0, start), ...a.slice(a.length - end), ...kept];
  // there is nothing to see in two texts that say other things
  if (letters(alike) < CLOSE * Math.max(letters(a), letters(b))) return [text];
  const nodes = [b.slice(0, start).join("")];
  for (const [kind, words] of middle) {
    if (kind !== "same" && words.trim()) nodes.push(el(kind, { text: words }));
    else if (kind !== "del") nodes.push(words);
  }
  return [...nodes, b.slice(b.length - end).join("")];
}

/** How many letters there are, white space left out. */
function letters(words) {
  return words.join("").replace(/\s/g, "").length;
}

/** A longest common subsequence as runs of [same | del | ins, words]. */
function common(a, b) {
  if (a.length * b.length > LONGEST) return [["del", a.join("")], ["ins", b.join("")]];
  const width = b.length + 1;
  const best = new Uint32Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      const at = i * width + j;
      const below = at + width;
      best[at] = a[i] === b[j] ? best[below + 1] + 1 : Math.max(best[below], best[at + 1]);
    }
  }
  const runs = [];
  const add = (kind, word) => {
    if (runs.at(-1)?.[0] === kind) runs.at(-1)[1] += word;
    else runs.push([kind, word]);
  };
  let [i, j] = [0, 0];
  while (i < a.length || j < b.length) {
    const at = i * width + j;
    const skip = j === b.length || best[at + width] >= best[at + 1];
    if (i < a.length && j < b.length && a[i] === b[j]) add("same", (i++, b[j++]));
    else if (i < a.length && skip) add("del", a[i++]);
    else add("ins", b[j++]);
  }
  return runs;
}
