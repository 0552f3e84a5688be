// The page's behaviour: themes, the choice of a network, sortable tables. Texts from files reach the page as text, never as markup.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const byId = id => document.getElementById(id);
  const color = name => getComputedStyle(root).getPropertyValue(name).trim();
  const config = {
    responsive: true, displayModeBar: "hover", displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]],
    toImageButtonOptions: { format: "svg", filename: data.study },
  };
  let split = "validation";
  let chosen = null;

  function element(tag, options = {}, ...children) {
    const made = document.createElement(tag);
    const { text, ...rest } = options;
    if (text !== undefined) made.textContent = text;
    for (const [name, value] of Object.entries(rest)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  // ---- plots

  function painted(figure, isNarrow) {
    const copy = structuredClone(figure);
    const muted = color("--muted"), line = color("--line"), text = color("--text"), surface = color("--surface");
    for (const trace of copy.data) {
      const own = color(`--role-${trace.meta.role}`);
      if (trace.mode.includes("lines")) trace.line.color = own;
      if (trace.mode.includes("markers")) {
        trace.marker.color = own;
        trace.marker.line = { width: 1.3, color: surface };
      }
      if (isNarrow && trace.mode === "markers+text") trace.mode = "markers";
      if (trace.mode.includes("text")) trace.textfont = { size: 11, color: own, shadow: [1, 2, 3].map(px => `0 0 ${px}px ${surface}`).join(", ") };
      for (const bar of [trace.error_x, trace.error_y]) if (bar) bar.color = own;
    }
    const axis = { gridcolor: line, linecolor: line, tickcolor: line, tickangle: 0, tickfont: { color: muted, size: isNarrow ? 10 : 12 } };
    const layout = copy.layout;
    for (const name of ["xaxis", "yaxis"]) {
      const title = { text: layout[name].title.text, font: { color: muted, size: 13 }, standoff: 10 };
      layout[name] = { ...layout[name], ...axis, title };
    }
    layout.paper_bgcolor = layout.plot_bgcolor = "rgba(0,0,0,0)";
    layout.font = { family: getComputedStyle(document.body).fontFamily, size: 12, color: text };
    layout.hoverlabel = { ...layout.hoverlabel, bgcolor: surface, bordercolor: color("--strong-line"), font: { size: 12, color: text } };
    layout.modebar = { bgcolor: "rgba(0,0,0,0)", color: color("--strong-line"), activecolor: muted };
    for (const shape of layout.shapes || []) shape.line.color = muted;
    for (const note of layout.annotations || []) note.font = { color: muted, size: 12 };
    return copy;
  }

  function ring(figure) {
    const at = { x: [], y: [] };
    for (const trace of figure.data) {
      const index = (trace.customdata || []).indexOf(chosen);
      if (chosen && index >= 0) { at.x = [trace.x[index]]; at.y = [trace.y[index]]; }
    }
    const marker = { symbol: "circle-open", size: 19, color: color("--text"), line: { width: 2 } };
    return { ...at, mode: "markers", marker, hoverinfo: "skip", showlegend: false, meta: { role: "ring" } };
  }

  function draw(id, figure) {
    const place = byId(id);
    if (!place || !figure) return;
    const ready = painted(figure, place.clientWidth < 480);
    ready.data.push(ring(ready));
    Plotly.react(place, ready.data, ready.layout, config);
    if (!place.dataset.listens) {
      place.dataset.listens = "yes";
      place.on("plotly_click", event => {
        const id = event.points.map(point => point.customdata).find(id => data.networks[id]);
        if (id) choose(id);
      });
      place.on("plotly_hover", event => {
        const known = event.points.some(point => data.networks[point.customdata]);
        place.querySelectorAll(".nsewdrag").forEach(layer => { layer.style.cursor = known ? "pointer" : ""; });
      });
    }
  }

  function drawAll() {
    draw("pareto", data.figures[split]);
    draw("hypervolume", data.figures.hypervolume);
    draw("cost", data.figures.cost);
    for (const name of Object.keys(data.figures)) if (/^(device|further)-/.test(name)) draw(name, data.figures[name]);
  }

  // ---- the chosen network

  function choose(id) {
    chosen = id;
    showPanel(id, data.networks[id]);
    showCommands(id);
    document.querySelectorAll("tr[data-arch]").forEach(row => row.classList.toggle("chosen", row.dataset.arch === id));
    drawAll();
  }

  function showPanel(id, network) {
    const origin = element("span", { class: `chip ${network.is_family ? "family" : "front"}`, text: network.origin });
    const head = element("div", { class: "head" }, element("h3", { text: network.label }), origin);
    if (network.label !== id) head.append(element("code", { text: id }));
    const numbers = element("dl", { class: "numbers" });
    for (const [word, value, source] of network.numbers) {
      const figure = element("dd", { text: value });
      if (source) figure.append(" ", element("small", { text: source }));
      numbers.append(element("div", { class: value.length > 30 ? "wide" : "" }, element("dt", { text: word }), figure));
    }
    byId("panel").replaceChildren(head, numbers, element("h4", { text: "Stages" }), stageTable(network.stages), ...blockChart(network));
  }

  function stageTable(rows) {
    const columns = { part: "", px: "Map", width: "Width", depth: "Depth", entry: "Opens with", conv: "Convolution", attention: "Lowtention", mlp: "MLP" };
    const used = Object.keys(columns).filter(name => rows.some(row => row[name]));
    const head = element("tr", {}, ...used.map(name => element("th", { scope: "col", text: columns[name] })));
    const body = rows.map(row => element("tr", {}, ...used.map(name => element("td", { text: row[name] || "–" }))));
    const table = element("table", { class: "stages" }, element("thead", {}, head), element("tbody", {}, ...body));
    return element("div", { class: "scroll" }, table);
  }

  function blockChart(network) {
    const shares = {};
    for (const [, kind, , share] of network.blocks) shares[kind] = (shares[kind] || 0) + share;
    const kinds = element("ul", { class: "kinds" });
    for (const [kind, share] of Object.entries(shares).sort((a, b) => b[1] - a[1])) {
      const swatch = element("i");
      swatch.style.background = `var(--kind-${kind})`;
      kinds.append(element("li", {}, swatch, `${kind} ${(100 * share).toFixed(0)} %`));
    }
    const longest = Math.max(...network.blocks.map(block => block[2]), 1e-9);
    const rows = network.blocks.map(([place, kind, ms, share, source, macs]) => {
      const fill = element("div", { class: source === "measured" ? "fill" : "fill guess" });
      fill.style.background = `var(--kind-${kind})`;
      fill.style.width = `${100 * Math.max(ms, 0) / longest}%`;
      return element("tr", { title: `${kind}, ${(macs / 1e6).toFixed(2)} M MACs` },
        element("td", { text: place }), element("td", { class: "bar" }, fill),
        element("td", { class: "number", text: ms.toFixed(4) }), element("td", { class: "number", text: `${(100 * share).toFixed(1)} %` }),
        element("td", { class: "mark", text: source }));
    });
    const head = ["Block", "", "ms", "Share", "Source"].map((text, i) => element("th", { scope: "col", text, class: i === 2 || i === 3 ? "number" : "" }));
    const table = element("table", { class: "blocks" }, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows));
    return [element("h4", { text: `Latency by block${network.device ? ` on ${network.device}` : ""}, ${network.total_ms.toPrecision(3)} ms predicted in sum` }), kinds, element("div", { class: "scroll" }, table)];
  }

  function showCommands(id) {
    document.querySelectorAll("[data-command]").forEach(line => { line.textContent = line.dataset.command.replaceAll("ARCH_ID", id); });
    document.querySelectorAll("[data-needs-weights]").forEach(step => { step.hidden = !data.networks[id].has_weights; });
    const name = byId("chosen-name");
    if (name) name.textContent = data.networks[id].label;
  }

  // ---- tables

  function sortBy(table, column, direction) {
    const body = table.tBodies[0];
    const key = row => {
      const text = row.cells[column].dataset.value ?? row.cells[column].textContent;
      return text === "" ? null : isNaN(text) ? text.toLowerCase() : Number(text);
    };
    const rows = [...body.rows].map(row => [key(row), row]);
    rows.sort(([a], [b]) => a === null ? 1 : b === null ? -1 : (a < b ? -1 : a > b ? 1 : 0) * direction);
    body.append(...rows.map(([, row]) => row));
    table.querySelectorAll("th").forEach((head, i) => {
      if (i === column) head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    });
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    table.querySelectorAll("th button").forEach(button => {
      const head = button.parentElement;
      button.addEventListener("click", () => sortBy(table, head.cellIndex, head.getAttribute("aria-sort") === "ascending" ? -1 : 1));
    });
  }

  // ---- controls

  document.querySelectorAll("[data-choose]").forEach(button => button.addEventListener("click", () => {
    choose(button.dataset.choose);
    byId("panel").scrollIntoView({ behavior: "smooth", block: "nearest" });
  }));
  document.querySelectorAll("[data-split]").forEach(button => button.addEventListener("click", () => {
    split = button.dataset.split;
    document.querySelectorAll("[data-split]").forEach(other => other.setAttribute("aria-pressed", String(other === button)));
    draw("pareto", data.figures[split]);
  }));
  document.querySelectorAll("[data-copy]").forEach(button => button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(button.parentElement.querySelector("pre").textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(button.parentElement.querySelector("pre"));
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }));

  const systemDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => root.dataset.theme === "dark";
  function setTheme(theme) {
    root.dataset.theme = theme;
    byId("theme").textContent = isDark() ? "Light theme" : "Dark theme";
    drawAll();
  }
  byId("theme").addEventListener("click", () => {
    const theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("lowsearch-theme", theme); } catch { /* a page from a file may have no storage */ }
    setTheme(theme);
  });
  systemDark.addEventListener("change", event => setTheme(event.matches ? "dark" : "light"));
  const wanted = new URLSearchParams(location.hash.slice(1));
  setTheme(wanted.get("theme") || root.dataset.theme);
  const first = wanted.get("arch") || data.selected;
  if (data.networks[first]) choose(first);
})();
