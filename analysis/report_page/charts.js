// Line charts, bars with intervals, stacked columns and heat maps. Line charts are drawn again at
// every width, so that their text keeps its size.

const MARGIN = { top: 22, right: 14, bottom: 40, left: 44 };
const HEIGHT = 250;

// Draw into `node` whenever its width changes; at once where the width is known beforehand.
function atEveryWidth(node, draw, width = 0) {
  let drawn = width;
  if (width) node.append(draw(width));
  new ResizeObserver(([entry]) => {
    const width = Math.round(entry.contentRect.width);
    if (width && width !== drawn) node.replaceChildren(draw((drawn = width)));
  }).observe(node);
  return node;
}

// chart: {label, x: {min, max, ticks, title}, y: {min, max, ticks, format}, series, spans, levels,
// marks}. A series is {name, points: [{x, y, low, high}], colour, dash, dots}.
const lineChart = (chart) =>
  atEveryWidth(element("div", { class: "chart" }), (width) => drawLines(chart, width));

function drawLines(chart, width) {
  const { x, y } = chart;
  const right = width - MARGIN.right, bottom = HEIGHT - MARGIN.bottom;
  const atX = (value) =>
    MARGIN.left + ((value - x.min) / (x.max - x.min || 1)) * (right - MARGIN.left);
  const atY = (value) => bottom - ((value - y.min) / (y.max - y.min || 1)) * (bottom - MARGIN.top);
  const svg = shape("svg", {
    role: "img", "aria-label": chart.label, viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT,
  });
  (chart.spans || []).forEach((span, place) => svg.append(...drawSpan(span, place, atX, bottom)));
  for (const tick of y.ticks) {
    svg.append(
      shape("line", { x1: MARGIN.left, x2: right, y1: atY(tick), y2: atY(tick), stroke: "var(--line)" }),
      shape("text", { x: MARGIN.left - 8, y: atY(tick) + 4, "text-anchor": "end" }, y.format(tick))
    );
  }
  const step = Math.ceil((x.ticks.length * 30) / (right - MARGIN.left));
  x.ticks.forEach((tick, place) => {
    if (place % step) return;
    svg.append(shape("text", { x: atX(tick), y: bottom + 18, "text-anchor": "middle" }, String(tick)));
  });
  svg.append(shape("text", { x: (MARGIN.left + right) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, x.title));
  (chart.marks || []).forEach((mark) => svg.append(...drawMark(mark, atX, bottom)));
  (chart.levels || []).forEach((level) => svg.append(...drawLevel(level, atY, right)));
  chart.series.forEach((series) => svg.append(...drawSeries(series, atX, atY, y.format)));
  return svg;
}

function drawSpan(span, place, atX, bottom) {
  const from = atX(span.from), to = atX(span.to);
  return [
    shape("rect", {
      x: from, y: MARGIN.top, width: to - from, height: bottom - MARGIN.top,
      fill: place % 2 ? "none" : "var(--shade)",
    }),
    shape("text", { x: (from + to) / 2, y: 14, "text-anchor": "middle" },
      to - from < 54 ? span.short : span.label),
  ];
}

const drawMark = (mark, atX, bottom) => [
  shape("line", {
    x1: atX(mark.x), x2: atX(mark.x), y1: MARGIN.top, y2: bottom,
    stroke: "var(--grey-1)", "stroke-dasharray": "2 3",
  }),
  shape("text", { x: atX(mark.x), y: 14, "text-anchor": "middle" }, mark.label),
];

const drawLevel = (level, atY, right) => [
  shape("line", {
    x1: MARGIN.left, x2: right, y1: atY(level.y), y2: atY(level.y),
    stroke: "var(--grey-1)", "stroke-dasharray": "6 4",
  }),
  // Beside the upper edge the label goes below its line, where the curve is not.
  shape("text", { x: right, y: atY(level.y) + (level.y > 0.85 ? 14 : -5), "text-anchor": "end" }, level.label),
];

function drawSeries(series, atX, atY, format) {
  const known = series.points.filter((point) => typeof point.y === "number");
  const path = (list, key) =>
    list.map((point) => `${atX(point.x).toFixed(1)},${atY(point[key]).toFixed(1)}`);
  const parts = [];
  const banded = known.filter((point) => typeof point.low === "number");
  if (banded.length > 1) {
    const edge = [...path(banded, "high"), ...path(banded, "low").reverse()];
    parts.push(shape("polygon", { points: edge.join(" "), fill: series.colour, opacity: 0.16 }));
  }
  parts.push(
    shape("polyline", {
      points: path(known, "y").join(" "), fill: "none", stroke: series.colour,
      "stroke-width": 2, "stroke-dasharray": series.dash, "stroke-linejoin": "round",
    })
  );
  for (const point of series.dots === false ? [] : known) {
    const low = typeof point.low === "number" ? `, ${format(point.low)} to ${format(point.high)}` : "";
    parts.push(
      shape("circle", { cx: atX(point.x), cy: atY(point.y), r: 3.5, fill: series.colour },
        shape("title", {}, `${series.name}, ${point.x}: ${format(point.y)}${low}`))
    );
  }
  return parts;
}

const PERCENT_AXIS = {
  min: 0, max: 1, ticks: [0, 0.25, 0.5, 0.75, 1], format: (value) => percent(value, 0),
};

// rows: {name, value, low, high, text, own}; shares of 1.
function bars(label, rows) {
  return element(
    "ul",
    { class: "bars", "aria-label": label },
    rows.map((row) =>
      element(
        "li",
        { class: row.own && "own" },
        element("span", { class: "name" }, row.name),
        element(
          "span",
          { class: "track", "aria-hidden": "true" },
          element("span", { class: "fill", style: { width: 100 * (row.value || 0) + "%" } }),
          typeof row.value !== "number" ? null : element("span", {
            class: "whisker",
            style: { left: 100 * row.low + "%", width: 100 * (row.high - row.low) + "%" },
          })
        ),
        element("span", { class: "value" }, element("b", {}, row.text), " ", row.note || "")
      )
    )
  );
}

// columns: {x, shares: {name: share}}; colours: [[name, colour]] from the bottom up.
const stackedColumns = (label, columns, colours, title) =>
  atEveryWidth(element("div", { class: "chart" }), (width) => {
    const bottom = HEIGHT - MARGIN.bottom, room = (width - MARGIN.left - MARGIN.right) / columns.length;
    const height = bottom - MARGIN.top;
    const svg = shape("svg", { role: "img", "aria-label": label, viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT });
    for (const tick of PERCENT_AXIS.ticks) {
      const y = bottom - tick * height;
      svg.append(
        shape("line", { x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y, stroke: "var(--line)" }),
        shape("text", { x: MARGIN.left - 8, y: y + 4, "text-anchor": "end" }, percent(tick, 0))
      );
    }
    columns.forEach((column, place) => {
      let below = 0;
      const x = MARGIN.left + room * (place + 0.14);
      for (const [name, colour] of colours) {
        const part = column.shares[name] || 0;
        if (!part) continue;
        below += part;
        svg.append(shape("rect", {
          x, y: bottom - below * height, width: room * 0.72, height: Math.max(part * height - 0.75, 0.5), fill: colour,
        }, shape("title", {}, `${column.x}, ${words(name)}: ${percent(part)}`)));
      }
      svg.append(shape("text", { x: x + room * 0.36, y: bottom + 18, "text-anchor": "middle" }, String(column.x)));
    });
    svg.append(shape("text", { x: (MARGIN.left + width - MARGIN.right) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, title));
    return svg;
  });

// A colour between surface and accent; what is small stays visible by the square root.
const tint = (value, most = 1) =>
  `color-mix(in oklab, var(--accent) ${Math.round(100 * Math.sqrt(Math.min(Math.max(value / (most || 1), 0), 1)))}%, var(--surface))`;

// How far shares stand out, 0 to 1 each: the largest is 1 where it is far above the mean, and where
// all are alike none stands out.
function prominence(shares) {
  const known = shares.filter((share) => typeof share === "number");
  const mean = known.reduce((sum, share) => sum + share, 0) / (known.length || 1);
  const most = Math.max(...known.map((share) => share - mean), 2 * mean, 1e-12);
  return shares.map((share) => Math.max((share || 0) - mean, 0) / most);
}

// rows: {name, cells: [{text, value}]}; value 0 to 1 gives the shade.
function heatMap(label, head, rows) {
  const cell = ({ text, value }) =>
    element("td", {
      "data-value": value,
      style: {
        background: `color-mix(in oklab, var(--accent) ${Math.round(60 * (value || 0))}%, var(--surface))`,
      },
    }, text);
  return element(
    "div",
    { class: "scroll" },
    element(
      "table",
      { class: "heat", "aria-label": label },
      element("thead", {}, element("tr", {}, head.map((text) => element("th", { scope: "col" }, text)))),
      element("tbody", {}, rows.map((row) =>
        element("tr", {}, element("th", { scope: "row" }, row.name), row.cells.map(cell))))
    )
  );
}
