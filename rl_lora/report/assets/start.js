
// --- start, and the live page --------------------------------------------------------------------

const POLL_MS = 2000;
let version = document.documentElement.dataset.version;

async function poll() {
  const live = byId("live");
  try {
    const answer = await fetch("version", { cache: "no-store" });
    const newest = await answer.text();
    if (newest !== version) {
      const data = await (await fetch("data", { cache: "no-store" })).json();
      await show(data);
    }
    version = newest;
    live.className = "";
    live.textContent = "live";
  } catch {
    live.className = "lost";
    live.textContent = "server stopped; showing the last data received";
  }
  setTimeout(poll, POLL_MS);
}

async function start() {
  const root = document.documentElement.dataset;
  byId("theme").onclick = () => setTheme(THEMES[(THEMES.indexOf(root.theme) + 1) % THEMES.length]);
  setTheme(THEMES.includes(storedTheme()) ? storedTheme() : "auto");
  systemTheme.addEventListener("change", drawAll);
  await show(JSON.parse(await unpack("data")));
  byId("data").remove();
  await loadPlotly();
  await drawAll();
  if (document.documentElement.dataset.mode === "live") {
    byId("live").hidden = false;
    poll();
  }
}

if (typeof DecompressionStream === "undefined") {
  report("This browser is too old for the report: it needs one of 2023 or later.");
} else {
  start().catch((error) => report(`The report could not be drawn: ${error}`));
}
