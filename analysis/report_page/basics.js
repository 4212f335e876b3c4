// Elements, numbers and words that every part of the page uses. Text enters the page as text nodes
// alone, never as HTML, so nothing that a data file holds can act as markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(node.style, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(2).filter((child) => child !== null && child !== undefined));
  return node;
}

const element = (tag, attributes, ...children) =>
  fill(document.createElement(tag), attributes, children);

const shape = (tag, attributes, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);

const byId = (id) => document.getElementById(id);

// A number and its unit never part at the end of a line.
const percent = (share, digits = 1) => (100 * share).toFixed(digits) + "\u00a0%";

const range = (low, high, digits = 1) =>
  (100 * low).toFixed(digits) + " to " + (100 * high).toFixed(digits);

// A difference of shares in percentage points, with a true minus sign.
function points(difference, digits = 1) {
  const text = Math.abs(100 * difference).toFixed(digits);
  return (difference < 0 ? "\u2212" : difference > 0 ? "+" : "") + text;
}

// With so many decimals, or as many more as a small number needs to show two digits.
function decimal(value, digits = 2) {
  if (typeof value !== "number") return "\u2013";
  const isSmall = value !== 0 && Math.abs(value) < 10 ** -digits;
  return (isSmall ? value.toPrecision(2) : value.toFixed(digits)).replaceAll("-", "\u2212");
}

function pValue(p) {
  if (typeof p !== "number") return "\u2013";
  return p < 0.001 ? "< 0.001" : p.toFixed(3);
}

// The 95 % intervals of this page are called so.
const INTERVAL = "95\u00a0% interval";

const plural = (count, word) => count.toLocaleString("en") + " " + word + (count === 1 ? "" : "s");

const words = (name) => name.replaceAll("_", " ");

// The states of layer 0 are embeddings.
const layerName = (layer) => (layer ? `layer ${layer}` : "embedding");

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

// A table; cells are texts, or {value, text} for numbers, whose exact value stays readable.
function table(caption, head, rows) {
  const isNumber = (column) => rows.some((row) => row[column] && row[column].text !== undefined);
  const cell = (content, column) =>
    element("td", { class: isNumber(column) && "number", "data-value": content && content.value },
      content === null || content === undefined ? "\u2013" : content.text ?? content);
  const headings = head.map((text, column) =>
    element("th", { scope: "col", class: isNumber(column) && "number" }, text)
  );
  return element(
    "div",
    { class: "scroll" },
    element(
      "table",
      { "aria-label": caption },
      element("thead", {}, element("tr", {}, headings)),
      element("tbody", {}, rows.map((row) => element("tr", {}, row.map(cell))))
    )
  );
}

const number = (value, text) => ({ value, text });

const share = (value) => number(value, typeof value === "number" ? percent(value) : "\u2013");

const interval = (item, low = "low", high = "high") =>
  typeof item[low] === "number"
    ? number(item[low] + ".." + item[high], range(item[low], item[high]))
    : number("", "\u2013");

// The numbers behind a figure, folded away: what a screen reader gets in place of the drawing.
const numbers = (name, caption, head, rows) =>
  element(
    "details",
    { class: "numbers", id: "numbers-" + name },
    element("summary", {}, "Numbers"),
    table(caption, head, rows)
  );

const figure = (id, title, caption, ...content) =>
  element(
    "figure",
    { id, "aria-labelledby": id + "-title" },
    element("h3", { id: id + "-title" }, title),
    caption ? element("figcaption", {}, caption) : null,
    ...content
  );

const legend = (entries) =>
  element(
    "ul",
    { class: "legend" },
    entries.map(([name, colour]) =>
      element("li", {}, element("i", { style: { background: colour } }), name)
    )
  );
