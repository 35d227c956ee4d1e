"use strict";
// Draws the plots in the page's colours; a click on a method, or on one of its points, shows that method alone.
(async () => {
  // plotly and the plots come compressed, in base 85 with "," for "<".
  const unpack = async ({ textContent: text, dataset }) => {
    const digits = new Uint8Array(128);
    [..."0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;,=>?@^_`{|}~"].forEach((digit, i) => (digits[digit.charCodeAt(0)] = i));
    const view = new DataView(new ArrayBuffer((text.length / 5) * 4));
    for (let i = 0, at = 0; i < text.length; at += 4) {
      let number = 0;
      for (const end = i + 5; i < end; i++) number = number * 85 + digits[text.charCodeAt(i)];
      view.setUint32(at, number);
    }
    const packed = new Blob([new Uint8Array(view.buffer, 0, Number(dataset.bytes))]);
    return new Response(packed.stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };
  const script = document.createElement("script");
  script.textContent = await unpack(document.getElementById("plotly"));
  document.head.append(script);
  const plots = JSON.parse(await unpack(document.getElementById("plots")));

  const places = [...document.querySelectorAll("[data-plot]")];
  const nav = document.getElementById("filter");
  const buttons = [...nav.querySelectorAll("button[data-method]")];
  const all = document.getElementById("all");
  const chosen = new Set();
  const shown = (method) => method === null || chosen.size === 0 || chosen.has(method);

  const theme = () => {
    const css = getComputedStyle(document.documentElement);
    const [paper, ink, soft, grid, line] = ["paper", "ink", "soft", "grid", "line"].map((name) => css.getPropertyValue("--" + name).trim());
    const look = { "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "font.color": ink, "font.family": getComputedStyle(document.body).fontFamily };
    for (const axis of ["xaxis", "yaxis"]) {
      look[axis + ".gridcolor"] = grid;
      look[axis + ".linecolor"] = line;
      look[axis + ".tickfont.color"] = soft;
      look[axis + ".title.font.color"] = soft;
      look[axis + ".title.font.size"] = 13;
    }
    return Object.assign(look, { "hoverlabel.bgcolor": paper, "hoverlabel.bordercolor": soft, "hoverlabel.font.color": ink, "hoverlabel.font.size": 13 });
  };

  const nested = (flat) => {
    const tree = {};
    for (const [path, value] of Object.entries(flat)) {
      const keys = path.split(".");
      const last = keys.pop();
      keys.reduce((node, key) => (node[key] ??= {}), tree)[last] = value;
    }
    return tree;
  };
  const merged = (a, b) => {
    const both = { ...a };
    for (const [key, value] of Object.entries(b)) {
      both[key] = value && typeof value === "object" && !Array.isArray(value) ? merged(both[key] ?? {}, value) : value;
    }
    return both;
  };

  const touch = matchMedia("(pointer: coarse)").matches;
  const look = nested(theme());
  for (const place of places) {
    const { data, layout } = plots[place.dataset.plot];
    const whole = merged(merged(layout, look), { autosize: true, dragmode: touch ? false : "zoom" });
    for (const trace of data) if (trace.marker && !/open/.test(trace.marker.symbol ?? "")) trace.marker.line = { width: 1, color: look.hoverlabel.bgcolor };
    Plotly.newPlot(place, data, whole, { displayModeBar: false, responsive: true });
    // The axes stay where they are when methods go: what is left is read on the same scale.
    Plotly.relayout(place, { "xaxis.autorange": false, "yaxis.autorange": false });
    place.on("plotly_click", (event) => choose(event.points[0].data.meta.method));
  }

  const choose = (method) => {
    if (method === null) return;
    chosen.has(method) ? chosen.delete(method) : chosen.add(method);
    apply();
  };
  const apply = () => {
    for (const button of buttons) button.setAttribute("aria-pressed", String(chosen.has(button.dataset.method)));
    nav.classList.toggle("filtered", chosen.size > 0);
    all.hidden = chosen.size === 0;
    for (const element of document.querySelectorAll("main [data-method], .key [data-method]")) element.hidden = !shown(element.dataset.method);
    for (const place of places) Plotly.restyle(place, { visible: place.data.map((trace) => shown(trace.meta.method)) });
  };
  for (const button of buttons) button.addEventListener("click", () => choose(button.dataset.method));
  all.addEventListener("click", () => { chosen.clear(); apply(); });

  const repaint = () => { for (const place of places) Plotly.relayout(place, theme()); };
  for (const query of ["(prefers-color-scheme: dark)", "print"]) matchMedia(query).addEventListener("change", repaint);
  const fit = () => { for (const place of places) Plotly.Plots.resize(place); };
  for (const event of ["beforeprint", "afterprint"]) addEventListener(event, fit);
  document.documentElement.dataset.ready = "true";
})();
