
// --- the transcript browser ----------------------------------------------------------------------

const PAGE_SIZE = 12;  // cards added to a column at a time
const filters = { run: "", origin: "", from: "", to: "", source: "", verdict: "", shortest: "",
  longest: "", search: "", problem: "" };
const view = { raw: false, tab: "correct", shown: { correct: PAGE_SIZE, wrong: PAGE_SIZE } };
let transcripts = null;

const VERDICTS = {
  correct: (t) => t.correct,
  wrong: (t) => !t.correct,
  truncated: (t) => t.truncated,
  "not in the format": (t) => !t.format,
};

function matches(t) {
  const limit = (text, otherwise) => (text === "" ? otherwise : Number(text));
  const step = t.step ?? 0;
  if (filters.run !== "" && t.run !== Number(filters.run)) return false;
  if (filters.origin && t.origin !== filters.origin) return false;
  if (step < limit(filters.from, -Infinity) || step > limit(filters.to, Infinity)) return false;
  if (filters.source && t.source !== filters.source) return false;
  if (filters.problem && t.problem !== filters.problem) return false;
  if (filters.verdict) {
    const test = VERDICTS[filters.verdict] ?? ((item) => item.status === filters.verdict.slice(8));
    if (!test(t)) return false;
  }
  if (t.tokens < limit(filters.shortest, -Infinity) || t.tokens > limit(filters.longest, Infinity)) return false;
  return !filters.search || plainText(t).includes(filters.search.toLowerCase());
}

function plainText(t) {
  t.plain ??= [t.question, t.completion].map((list) => list.map(segmentSource).join("")).join("\n").toLowerCase();
  return t.plain;
}

function segmentSource(segment) {
  if (typeof segment === "string") return segment;
  return "f" in segment ? transcripts.formulas[segment.f].src : "";
}

// --- text and formulas ---

const MATHML = "http://www.w3.org/1998/Math/MathML";

function mathNode(tree) {
  const [tag, attributes, ...children] = tree;
  const node = document.createElementNS(MATHML, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.map((child) => (typeof child === "string" ? child : mathNode(child))));
  return node;
}

function formulaNode(formula) {
  const node = document.createElementNS(MATHML, "math");
  node.setAttribute("display", formula.display ? "block" : "inline");
  node.setAttribute("title", formula.src);
  node.append(mathNode(formula.tree));
  return node;
}

function segmentNode(segment, isRaw) {
  if (typeof segment === "string") return document.createTextNode(segment);
  if ("f" in segment) {
    const formula = transcripts.formulas[segment.f];
    return isRaw ? document.createTextNode(formula.src) : formulaNode(formula);
  }
  if ("cut" in segment) {
    return element("span", "cut", `${segment.cut.toLocaleString("en")} characters omitted`);
  }
  const times = segment.n > 1 ? ` × ${segment.n.toLocaleString("en")}` : "";
  return element("span", "hidden-char", segment.h + times);
}

function textNode(segments, className, isRaw) {
  const node = element("div", `text ${className}`, ...segments.map((s) => segmentNode(s, isRaw)));
  node.dir = "auto";
  return node;
}

// --- cards and columns ---

function transcriptCard(t) {
  const origin = t.origin === "training" ? `step ${t.step ?? "?"}` : t.origin;
  const words = [transcripts.runs.length > 1 ? transcripts.runs[t.run] : null, origin, t.source,
    `${t.tokens.toLocaleString("en")} tokens`, t.reward === null ? null : `reward ${t.reward.toFixed(2)}`,
    ...t.terms.map(([name, value]) => `${name} ${value.toFixed(2)}`)];
  const meta = element("div", "meta", element("span", "verdict", t.correct ? "✓ correct" : "✗ wrong"),
    ...words.filter(Boolean).map((word) => element("span", "", word)));
  if (t.truncated) meta.append(element("span", "warn", "truncated"));
  if (t.status !== "ok") meta.append(element("span", "warn", t.status.replaceAll("_", " ")));
  if (!t.format) meta.append(element("span", "", "not in the format"));
  if (t.problem) {
    const same = element("button", "", filters.problem ? "all problems" : "same problem");
    same.type = "button";
    same.title = t.problem;
    same.onclick = () => setFilter("problem", filters.problem ? "" : t.problem);
    meta.append(same);
  }
  const completion = textNode(t.completion, `completion${view.raw ? " raw" : ""}`, view.raw);
  const answer = element("div", "answer", element("span", "", "answer ", element("b", "", t.answer ?? "none")),
    element("span", "", "reference ", element("b", "", t.reference ?? "none")));
  return element("article", "card", meta, textNode(t.question, "question", view.raw), completion, answer);
}

function columnNode(name, items) {
  const shown = items.slice(0, view.shown[name]);
  const head = element("h3", "", `${name === "correct" ? "Correct" : "Wrong"} (${items.length.toLocaleString("en")})`);
  const node = element("div", `column ${name}`, head, ...shown.map(transcriptCard));
  if (!items.length) node.append(element("p", "empty", "No transcript matches the filters."));
  if (items.length > shown.length) {
    const more = element("button", "more", `show more (${items.length - shown.length} left)`);
    more.type = "button";
    more.onclick = () => {
      view.shown[name] += 2 * PAGE_SIZE;
      listTranscripts();
    };
    node.append(more);
  }
  return node;
}

function listTranscripts() {
  const found = transcripts.records.filter(matches);
  const split = { correct: found.filter((t) => t.correct), wrong: found.filter((t) => !t.correct) };
  const columns = byId("transcript-columns");
  columns.dataset.tab = view.tab;
  columns.replaceChildren(...Object.entries(split).map(([name, items]) => columnNode(name, items)));
  for (const tab of document.querySelectorAll(".tabs button")) {
    tab.textContent = `${tab.dataset.tab === "correct" ? "Correct" : "Wrong"} (${split[tab.dataset.tab].length})`;
    tab.setAttribute("aria-selected", String(tab.dataset.tab === view.tab));
  }
  byId("transcript-count").textContent =
    `${found.length.toLocaleString("en")} of ${transcripts.records.length.toLocaleString("en")} in the sample`;
}

// --- filters ---

function setFilter(name, value) {
  filters[name] = value;
  view.shown = { correct: PAGE_SIZE, wrong: PAGE_SIZE };
  const control = document.querySelector(`[data-filter=${name}]`);
  if (control && control.value !== value) control.value = value;
  byId("problem-filter").hidden = !filters.problem;
  byId("problem-filter").textContent = `problem ${filters.problem} ✕`;
  listTranscripts();
}

function control(name, tag, more) {
  const node = Object.assign(document.createElement(tag), more);
  node.dataset.filter = name;
  node.value = filters[name];
  node.addEventListener("input", () => setFilter(name, node.value));
  return node;
}

function choice(name, label, options) {
  if (options.length < 2) return null;
  const select = control(name, "select", {});
  select.append(new Option("all", ""), ...options.map(([text, value]) => new Option(text, value)));
  select.value = filters[name];
  if (select.selectedIndex < 0) filters[name] = select.value = "";
  return element("label", "", label, select);
}

function range(low, high, label) {
  const box = (name, placeholder) => {
    const input = control(name, "input", { type: "number", min: "0", placeholder });
    input.setAttribute("aria-label", `${label}, ${placeholder}`);
    return input;
  };
  return element("label", "", label, element("span", "pair", box(low, "from"), "–", box(high, "to")));
}

function filterBar() {
  const distinct = (key) => [...new Set(transcripts.records.map((t) => t[key]))].map((v) => [v, v]);
  const statuses = distinct("status").map(([s]) => s).filter((s) => s !== "ok").sort();
  const verdicts = [...Object.keys(VERDICTS).map((v) => [v, v]),
    ...statuses.map((s) => [s.replaceAll("_", " "), `status: ${s}`])];
  const raw = Object.assign(element("input"), { type: "checkbox", checked: view.raw, id: "raw" });
  raw.onchange = () => {
    view.raw = raw.checked;
    listTranscripts();
  };
  const reset = Object.assign(element("button", "", "reset"), { type: "button", id: "reset" });
  reset.onclick = () => {
    for (const name of Object.keys(filters)) filters[name] = "";
    for (const node of document.querySelectorAll("[data-filter]")) node.value = "";
    setFilter("problem", "");
  };
  return element("div", "filters",
    choice("run", "run", transcripts.runs.length > 1 ? transcripts.runs.map((r, i) => [r, String(i)]) : []),
    choice("origin", "where", distinct("origin")),
    range("from", "to", "step"),
    choice("source", "source", distinct("source").filter(([s]) => s).sort()),
    choice("verdict", "verdict", verdicts),
    range("shortest", "longest", "length (tokens)"),
    element("label", "", "text contains", control("search", "input", { type: "search" })),
    element("label", "check", raw, "plain text, no maths"), reset);
}

function transcriptsNode(data) {
  transcripts = data;
  const tabs = element("div", "tabs", ...["correct", "wrong"].map((name) => {
    const tab = Object.assign(element("button"), { type: "button" });
    tab.dataset.tab = name;
    tab.onclick = () => {
      view.tab = name;
      listTranscripts();
    };
    return tab;
  }));
  const problem = Object.assign(element("button"), { type: "button", id: "problem-filter", hidden: !filters.problem });
  problem.textContent = `problem ${filters.problem} ✕`;
  problem.onclick = () => setFilter("problem", "");
  const count = element("p", "note");
  count.id = "transcript-count";
  const columns = element("div", "columns");
  columns.id = "transcript-columns";
  const node = element("section", "", element("h2", "", "Transcripts"),
    element("p", "note", data.note), filterBar(), count, problem, tabs, columns);
  node.id = "transcripts";
  queueMicrotask(listTranscripts);  // after the node has been inserted
  return node;
}
