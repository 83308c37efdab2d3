"use strict";
const root = document.documentElement;
const blocks = JSON.parse(document.getElementById("figures").textContent);
const PRINTED = { single: 690, several: 325 }; // CSS pixels across a page of A4

// ---- themes
const system = matchMedia("(prefers-color-scheme: dark)");
const button = document.getElementById("theme");
let printing = false;

function dark() {
  return root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
}

function colours() {
  if (printing) return { ink: "#1b1f24", rule: "#d0d7de", page: "#ffffff" };
  const read = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  return { ink: read("--ink"), rule: read("--rule"), page: read("--page") };
}

function layoutOf(panel, theme, size) {
  const layout = structuredClone(panel.figure.layout);
  for (const axis of ["xaxis", "yaxis"]) {
    layout[axis] = { gridcolor: theme.rule, linecolor: theme.rule, ...layout[axis] };
  }
  return {
    ...layout,
    ...size,
    autosize: !size,
    showlegend: layout.showlegend ?? true,
    font: { color: theme.ink, size: 12, family: "system-ui, sans-serif" },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 8, r: 8, t: 8, b: 8 },
    legend: { orientation: "h", yanchor: "bottom", y: 1.02, x: 0 },
    hoverlabel: { bgcolor: theme.page, bordercolor: theme.rule, font: { color: theme.ink } },
    modebar: { color: theme.rule, activecolor: theme.ink, bgcolor: "rgba(0,0,0,0)" },
  };
}

const UPLOADS = ["sendChartToCloud", "sendDataToCloud"]; // nothing leaves the page

const config = {
  responsive: true,
  displaylogo: false,
  displayModeBar: matchMedia("(hover: none)").matches ? false : "hover", // else it would stand over the figure
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "toImage", ...UPLOADS],
  plotlyServerURL: "",
};

const drawn = new Map(); // element to panel

function draw(element, panel) {
  let size = null;
  if (printing) size = { width: PRINTED[element.closest(".panels").classList.contains("single") ? "single" : "several"] };
  drawn.set(element, panel);
  return Plotly.react(element, structuredClone(panel.figure.data), layoutOf(panel, colours(), size), config);
}

function redraw() {
  button.textContent = dark() ? "Light theme" : "Dark theme";
  for (const [element, panel] of drawn) draw(element, panel);
}

button.addEventListener("click", () => {
  root.dataset.theme = dark() ? "light" : "dark";
  redraw();
});
system.addEventListener("change", redraw);

// ---- figures
const pending = new Map();
const watcher = new IntersectionObserver(
  (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => reveal(entry.target)),
  { rootMargin: "500px" },
);

function reveal(element) {
  watcher.unobserve(element);
  const panel = pending.get(element);
  pending.delete(element);
  if (panel) draw(element, panel);
}

function make(tag, properties = {}, children = []) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;");

// A figure that leaves the page takes along what it shows and what ran.
async function save(panel, caption) {
  const light = { ink: "#1b1f24", rule: "#d0d7de", page: "#ffffff" };
  const size = { width: 720, height: panel.figure.layout.height + 90 };
  const figure = { data: structuredClone(panel.figure.data), layout: layoutOf(panel, light, size) };
  figure.layout.showlegend = true;
  figure.layout.legend = { orientation: "h", yanchor: "top", y: -0.2, x: 0 }; // below, since the title stands above
  const lines = caption.split(" · ").reduce((done, part) => {
    const longer = done.length ? `${done.at(-1)} · ${part}` : part;
    return done.length && longer.length > 100 ? [...done, part] : [...done.slice(0, -1), longer];
  }, []);
  const text = [`<b>${escaped(panel.title)}</b>`, ...lines.map(escaped)].join("<br>");
  figure.layout.title = { text, font: { size: 12 }, x: 0.01, xanchor: "left", y: 1, yanchor: "top", pad: { t: 8 } };
  figure.layout.margin = { ...figure.layout.margin, t: 90 };
  const url = await Plotly.toImage(figure, { format: "svg", ...size });
  make("a", { href: url, download: `${panel.title}.svg` }).click();
}

// The numbers of a drawing as a table, for those who do not see it.
function numbersOf(panel) {
  const trace = panel.figure.data[0];
  const show = (value) => (value === null ? "–" : typeof value === "number" ? String(+value.toPrecision(6)) : value);
  const row = (cells, tag) =>
    make("tr", {}, cells.map((cell, i) => {
      const header = tag === "th" || i === 0;
      return make(header ? "th" : "td", { textContent: show(cell), ...(header && { scope: tag ? "col" : "row" }) });
    }));
  if (trace.type === "heatmap") {
    const head = row(["learned / tested", ...trace.x], "th");
    return make("table", {}, [make("thead", {}, [head]), make("tbody", {}, trace.z.map((z, i) => row([trace.y[i], ...z])))]);
  }
  const rows = panel.figure.data
    .filter((part) => !part.fill)
    .flatMap((part) => part.x.map((x, i) => row([part.meta, x, part.y[i]])));
  const axes = ["xaxis", "yaxis"].map((axis) => panel.figure.layout[axis].title.text || "group");
  return make("table", {}, [make("thead", {}, [row(["group", ...axes], "th")]), make("tbody", {}, rows)]);
}

function panelElement(panel, caption) {
  const plot = make("div", { className: "plot", role: "img", ariaLabel: panel.words });
  plot.style.minHeight = `${panel.figure.layout.height}px`;
  const button = make("button", { type: "button", textContent: "SVG", ariaLabel: `Save ${panel.title} as SVG` });
  button.addEventListener("click", () => save(panel, caption));
  const box = make("div", { className: "scroll", tabIndex: 0, role: "region", ariaLabel: `Numbers of ${panel.title}` });
  const details = make("details", {}, [make("summary", { textContent: "Numbers" }), box]);
  details.addEventListener("toggle", () => box.firstChild || box.append(numbersOf(panel)), { once: true });
  const header = make("header", {}, [make("h4", { textContent: panel.title }), button]);
  pending.set(plot, panel);
  watcher.observe(plot);
  return make("article", { className: "panel" }, [header, plot, details]);
}

function show(container, view, caption) {
  for (const plot of container.querySelectorAll(".plot")) {
    watcher.unobserve(plot);
    pending.delete(plot);
    if (drawn.delete(plot)) Plotly.purge(plot);
  }
  const panels = view ? view.panels : [];
  container.classList.toggle("single", panels.length === 1 && panels[0].figure.data[0].type !== "heatmap");
  const narrow = panels.every((panel) => panel.figure.data[0].type === "heatmap" && panel.figure.data[0].x.length <= 5);
  container.style.setProperty("--least", narrow ? "270px" : "350px");
  container.replaceChildren(...panels.map((panel) => panelElement(panel, caption)));
  if (!view) container.append(make("p", { textContent: "No runs share this." }));
}

function choices(container, block) {
  const names = [...new Set(block.views.flatMap((view) => Object.keys(view.choice)))];
  const selects = new Map();
  const chosen = (view) => [...selects].every(([name, it]) => view.choice[name] === it.value);
  const update = () => show(container, block.views.find(chosen), block.caption);
  for (const name of names) {
    const values = [...new Set(block.views.map((view) => view.choice[name]))];
    if (values.length < 2) continue;
    const select = make("select", {}, values.map((value) => make("option", { value, textContent: value })));
    select.addEventListener("change", update);
    selects.set(name, select);
    container.previousElementSibling.append(make("label", {}, [`${name} `, select]));
  }
  update();
}

for (const block of blocks) choices(document.querySelector(`[data-block="${block.id}"]`), block);
redraw();

// ---- definitions on hover and on focus
const tip = make("div", { className: "tip", role: "tooltip", id: "tip", hidden: true });
document.body.append(tip);

function explain(term) {
  const definition = document.getElementById(term.hash.slice(1));
  if (!definition) return;
  tip.textContent = definition.textContent;
  tip.hidden = false;
  term.setAttribute("aria-describedby", "tip");
  const at = term.getBoundingClientRect();
  const left = Math.min(at.left, root.clientWidth - tip.offsetWidth - 12);
  tip.style.left = `${Math.max(12, left) + scrollX}px`;
  tip.style.top = `${at.bottom + 6 + scrollY}px`;
}

function hush() {
  tip.hidden = true;
}

for (const term of document.querySelectorAll(".term")) {
  term.addEventListener("mouseenter", () => explain(term));
  term.addEventListener("focus", () => explain(term));
  term.addEventListener("mouseleave", hush);
  term.addEventListener("blur", hush);
}
document.addEventListener("keydown", (event) => event.key === "Escape" && hush());

// ---- print: everything drawn, in the light theme, at the width of the paper
addEventListener("beforeprint", () => {
  printing = true;
  for (const element of [...pending.keys()]) reveal(element);
  redraw();
});
addEventListener("afterprint", () => {
  printing = false;
  redraw();
});
