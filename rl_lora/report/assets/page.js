"use strict";
// The page is built from elements and text nodes only; no string is parsed as HTML.

const byId = (id) => document.getElementById(id);

function element(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

async function unpack(id) {
  const text = byId(id).textContent;
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

async function loadPlotly() {
  const script = document.createElement("script");
  script.textContent = await unpack("plotly");
  document.head.append(script);
  byId("plotly").remove();
}

function report(message) {
  byId("message").textContent = message;
  byId("message").hidden = false;
}

// --- theme ---------------------------------------------------------------------------------------

const THEMES = ["auto", "light", "dark"];
const systemTheme = matchMedia("(prefers-color-scheme: dark)");

function storedTheme() {
  try {
    return localStorage.getItem("theme") ?? "auto";
  } catch {  // some browsers disable storage for files
    return "auto";
  }
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = `theme: ${theme}`;
  try {
    localStorage.setItem("theme", theme);
  } catch {
    // The choice then lasts until the page is closed.
  }
  drawAll();
}

function cssColor(name) {
  const [variable, opacity] = name.split("@");
  const value = getComputedStyle(document.documentElement).getPropertyValue(`--${variable}`).trim();
  if (opacity === undefined) return value;
  const [red, green, blue] = [1, 3, 5].map((i) => parseInt(value.slice(i, i + 2), 16));
  return `rgba(${red},${green},${blue},${opacity})`;
}

// A copy of part of a figure, with the palette's names replaced by the theme's colours.
function painted(value, key) {
  if (Array.isArray(value)) return key === "x" || key === "y" ? value : value.map((v) => painted(v));
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, painted(v, k)]));
  }
  const isColor = typeof value === "string" && /color$/i.test(key ?? "");
  return isColor && /^(c\d|ink|muted|line)(@[\d.]+)?$/.test(value) ? cssColor(value) : value;
}

// --- figures -------------------------------------------------------------------------------------

const isTouch = matchMedia("(pointer: coarse)");
const figures = new Map();  // id -> {figure, plot}
let drawing = 0;  // number of the current pass over all figures; a new pass ends the old one

function figureLayout(figure) {
  const layout = painted(figure.layout);
  const axes = { gridcolor: cssColor("line"), zerolinecolor: cssColor("line"), linecolor: cssColor("line"),
    tickfont: { size: 12 }, automargin: true };
  for (const name of new Set([...Object.keys(layout).filter((k) => /^[xy]axis/.test(k)), "xaxis", "yaxis"])) {
    const axis = layout[name] ?? {};
    const title = axis.title ? { ...axis.title, standoff: 8, font: { size: 12.5 } } : undefined;
    layout[name] = { ...axes, ...axis, title };
    if (name.startsWith("x")) {
      const last = Math.max(...figure.data.flatMap((trace) => trace.orientation === "h" ? [Infinity] : trace.x));
      Object.assign(layout[name], { showgrid: false, zeroline: false }, last <= 8 ? { dtick: 1 } : {});
      layout[name].unifiedhovertitle = { text: "step %{x}" };
    }
    layout[name].fixedrange = isTouch.matches;  // dragging a figure on a touch screen scrolls the page
  }
  const long = figure.data.filter((trace) => trace.showlegend !== false).length;
  return {
    hovermode: "x unified", bargap: 0.08, uirevision: "kept", ...layout,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 12, r: 12, t: 8, b: 8 },
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: cssColor("ink") },
    hoverlabel: { bgcolor: cssColor("card"), bordercolor: cssColor("line"), font: { color: cssColor("ink") },
      namelength: 36 },
    showlegend: long > 1,
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, xanchor: "left", font: { size: 12 },
      itemwidth: 30, bgcolor: "rgba(0,0,0,0)" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: cssColor("muted"), activecolor: cssColor("ink") },
    dragmode: isTouch.matches ? false : "zoom",
  };
}

function draw(id) {
  const { figure, plot } = figures.get(id);
  const config = { responsive: true, displaylogo: false, displayModeBar: isTouch.matches ? false : "hover",
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],  // no button that would send data
    toImageButtonOptions: { filename: figure.id, scale: 2 } };
  return Plotly.react(plot, figure.data.map((trace) => painted(trace)), figureLayout(figure), config);
}

// One at a time, so that the page stays responsive.
async function drawAll() {
  const pass = ++drawing;
  if (!window.Plotly) return;
  for (const id of [...figures.keys()]) {
    if (pass !== drawing) return;
    await draw(id);
    await new Promise((resolve) => setTimeout(resolve));
  }
  document.documentElement.dataset.drawn = String(figures.size);
}

function figureCard(figure) {
  const known = figures.get(figure.id);
  const plot = known?.plot ?? element("div", "plot");
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", figure.title);
  figures.set(figure.id, { figure, plot });
  const note = figure.note ? element("p", "note", figure.note) : null;
  const card = element("div", "card figure", element("h3", "", figure.title), plot, note);
  card.id = `figure-${figure.id}`;
  return card;
}

// --- tiles, tables, sections ---------------------------------------------------------------------

function tileCard(tile) {
  return element("div", "card tile", element("div", "label", tile.label),
    element("div", "value", tile.value), element("div", "detail", tile.detail));
}

function tableCard(table) {
  const cell = (tag, text, index) => element(tag, table.is_numeric[index] ? "num" : "", text);
  const head = element("tr", "", ...table.columns.map((name, i) => cell("th", name, i)));
  const rows = table.rows.map((row) => element("tr", "", ...row.map((text, i) => cell("td", text, i))));
  const grid = element("table", "", element("thead", "", head), element("tbody", "", ...rows));
  const body = [element("div", "scroll", grid), table.note ? element("p", "note", table.note) : null];
  if (table.is_folded) {
    return element("div", "card", element("details", "", element("summary", "", table.title), ...body));
  }
  return element("div", "card", table.title ? element("h3", "", table.title) : null, ...body);
}

function sectionNode(section) {
  const node = element("section", "", element("h2", "", section.title));
  node.id = section.id;
  if (section.figures.length) node.append(element("div", "figures", ...section.figures.map(figureCard)));
  node.append(...section.tables.map(tableCard));
  return node;
}

function notesNode(notes) {
  const list = element("ul", "notes", ...notes.map((note) => element("li", "", note)));
  const node = element("section", "", element("h2", "", "Notes"), element("div", "card", list));
  node.id = "notes";
  return node;
}

// Shows the data; what the reader has opened, filtered and zoomed is kept.
function show(page) {
  const open = [...document.querySelectorAll("details[open] > summary")].map((s) => s.textContent);
  const [left, top] = [window.scrollX, window.scrollY];
  document.title = page.title;
  byId("title").textContent = page.title;
  byId("subtitle").textContent = page.subtitle;
  byId("tiles").replaceChildren(...page.tiles.map(tileCard));
  const ids = new Set(page.sections.flatMap((section) => section.figures.map((figure) => figure.id)));
  for (const id of figures.keys()) if (!ids.has(id)) figures.delete(id);
  const nodes = page.sections.map(sectionNode);
  if (page.transcripts) nodes.splice(-1, 0, transcriptsNode(page.transcripts));
  if (page.notes.length) nodes.push(notesNode(page.notes));
  byId("sections").replaceChildren(...nodes);
  for (const summary of document.querySelectorAll("details > summary")) {
    summary.parentElement.open = open.includes(summary.textContent);
  }
  window.scrollTo(left, top);
  return drawAll();
}
