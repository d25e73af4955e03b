"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const ROWS = 100; // of a table at once

// ---- figures: drawn when they come near the window, in the colours of the page

const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function dressed() {
  const axis = { color: colour("--soft"), gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line") };
  const look = { "font.color": colour("--ink"), "legend.font.color": colour("--ink"), "title.font.color": colour("--ink") };
  for (const [key, value] of Object.entries(axis)) for (const at of ["xaxis", "yaxis"]) look[`${at}.${key}`] = value;
  return look;
}

const drawn = [];
function draw(panel) {
  const figure = data.figures[Number(panel.dataset.figure)];
  Plotly.newPlot(panel, figure.data, figure.layout, { responsive: true, displayModeBar: false })
    .then(() => Plotly.relayout(panel, dressed()))
    .then(() => { drawn.push(panel); panel.dataset.drawn = "yes"; });
}

const near = new IntersectionObserver(entries => {
  for (const entry of entries) if (entry.isIntersecting) { near.unobserve(entry.target); draw(entry.target); }
}, { rootMargin: "600px" });
document.querySelectorAll(".panel").forEach(panel => near.observe(panel));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(panel => Plotly.relayout(panel, dressed())));
document.querySelectorAll("details").forEach(one => one.addEventListener("toggle", () =>
  one.querySelectorAll("[data-drawn]").forEach(panel => Plotly.Plots.resize(panel))));
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(one => { one.open = true; }));
addEventListener("beforeprint", () => near.takeRecords() && document.querySelectorAll(".panel:not([data-drawn])").forEach(panel => { near.unobserve(panel); draw(panel); }));

// ---- tables: a cell is [text, what to sort by, link]

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function compare(a, b) {
  if (a === null || b === null) return (a === null) - (b === null); // what is not known comes last
  if (typeof a === "number" && typeof b === "number") return a - b;
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  return a.localeCompare(b, undefined, { numeric: true });
}

function table(place) {
  const { head, rows } = data[place.dataset.table];
  const label = place.dataset.label;
  let sorted = rows, column = null, up = true, at = 0, words = [];
  const search = element("input", { type: "search", placeholder: "such as quantizer.bits=2 frozen" });
  const count = element("span", { role: "status" });
  const body = element("tbody");
  const short = name => { // its shortest ending that no other column shares
    const parts = name.split(".");
    for (let from = parts.length - 1; from > 0; from--) {
      const end = parts.slice(from).join(".");
      if (head.filter(other => `.${other}`.endsWith(`.${end}`)).length === 1) return end;
    }
    return name;
  };
  const heads = head.map((text, index) => {
    const button = element("button", { type: "button", textContent: short(text), title: text });
    const th = element("th", { scope: "col" }, button);
    button.addEventListener("click", () => {
      up = column === index ? !up : true;
      column = index;
      const way = up ? 1 : -1;
      sorted = [...rows].sort((a, b) => {
        const known = a[index][1] !== null && b[index][1] !== null;
        return (known ? way : 1) * compare(a[index][1], b[index][1]);
      });
      heads.forEach(other => other.removeAttribute("aria-sort"));
      th.setAttribute("aria-sort", up ? "ascending" : "descending");
      at = 0;
      show();
    });
    return th;
  });
  const back = element("button", { type: "button", textContent: "Back" });
  const next = element("button", { type: "button", textContent: "Next" });
  const pages = element("div", { className: "pages" }, back, next);
  const scroll = element("div", { className: "scroll", tabIndex: 0, role: "region" },
    element("table", {}, element("thead", {}, element("tr", {}, ...heads)), body));
  scroll.setAttribute("aria-label", label);
  back.addEventListener("click", () => { at -= ROWS; show(); });
  next.addEventListener("click", () => { at += ROWS; show(); });
  search.addEventListener("input", () => {
    words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    at = 0;
    show();
  });

  function show() {
    const found = sorted.filter(row => {
      const cells = row.map(cell => cell[0].toLowerCase());
      // key=value is the whole value of a column, by the end of its name; another word is a part of any cell
      const has = word => word.includes("=")
        ? cells.some((cell, index) => `.${head[index].toLowerCase()}=${cell}`.endsWith(`.${word}`))
        : cells.some(cell => cell.includes(word));
      return words.every(has);
    });
    body.replaceChildren(...found.slice(at, at + ROWS).map(row => element("tr", {}, ...row.map(([text, , link]) =>
      element("td", {}, link === undefined ? text : element("a", { href: link, textContent: text }))))));
    const range = found.length > ROWS ? `, shown ${at + 1} to ${Math.min(at + ROWS, found.length)}` : "";
    count.textContent = `${found.length} of ${rows.length}${range}`;
    pages.hidden = found.length <= ROWS;
    back.disabled = at === 0;
    next.disabled = at + ROWS >= found.length;
  }

  place.append(element("div", { className: "bar" }, element("label", {}, `Filter ${label.toLowerCase()} `, search), count), scroll, pages);
  show();
}

document.querySelectorAll(".sortable").forEach(table);
