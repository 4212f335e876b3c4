// The graph of a question: layers by distance from the root, nodes coloured by value, edges by
// attention. Nodes that the root does not reach stand in a block of their own.

const LAYER_HEIGHT = 64;
const MIN_ROOM = 74;

function distancesFrom(start, edges, count) {
  const found = new Array(count).fill(null);
  found[start] = 0;
  for (let queue = [start]; queue.length; ) {
    const node = queue.shift();
    for (const [parent, child] of edges) {
      if (parent === node && found[child] === null) {
        found[child] = found[node] + 1;
        queue.push(child);
      }
    }
  }
  return found;
}

// Rows of nodes: those the root reaches by distance, then the others by distance from their heads.
function layersOf(graph) {
  const count = graph.nodes.length, all = graph.nodes.map((_, node) => node);
  const depth = distancesFrom(graph.root, graph.edges, count);
  const children = new Set(graph.edges.map(([, child]) => child));
  const heads = all.filter((node) => depth[node] === null && !children.has(node));
  const apart = all.map((node) => {
    const known = heads.map((head) => distancesFrom(head, graph.edges, count)[node]);
    return Math.min(...known.filter((value) => value !== null), count);
  });
  const rowsBy = (nodes, of) => {
    const values = [...new Set(nodes.map(of))].sort((a, b) => a - b);
    return values.map((value) => nodes.filter((node) => of(node) === value));
  };
  const reached = rowsBy(all.filter((node) => depth[node] !== null), (node) => depth[node]);
  const others = rowsBy(all.filter((node) => depth[node] === null), (node) => apart[node]);
  return { depth, reached: untangle(reached, graph.edges), others: untangle(others, graph.edges) };
}

// Order each row by the mean place of its nodes' neighbours in the rows above and below.
function untangle(rows, edges) {
  const place = new Map();
  const remember = (row) => row.forEach((node, at) => place.set(node, (at + 0.5) / row.length));
  rows.forEach(remember);
  for (let sweep = 0; sweep < 8; sweep++) {
    const order = sweep % 2 ? [...rows.keys()].reverse() : [...rows.keys()];
    for (const number of order) {
      const near = new Set([...(rows[number - 1] || []), ...(rows[number + 1] || [])]);
      const middle = new Map(rows[number].map((node) => {
        const ends = edges.flatMap(([a, b]) => (a === node ? [b] : b === node ? [a] : []));
        const known = ends.filter((end) => near.has(end)).map((end) => place.get(end));
        return [node, known.length ? known.reduce((a, b) => a + b) / known.length : place.get(node)];
      }));
      rows[number].sort((a, b) => middle.get(a) - middle.get(b));
      remember(rows[number]);
    }
  }
  return rows;
}

// {x, y} of every node, and the height of the drawing; a row too wide for the page zigzags.
function placeNodes(graph, width) {
  const { depth, reached, others } = layersOf(graph);
  const places = new Array(graph.nodes.length), labels = [];
  let y = 30;
  const put = (rows) => {
    for (const row of rows) {
      const lines = Math.ceil((row.length * MIN_ROOM) / width), room = width / row.length;
      row.forEach((node, at) => {
        places[node] = { x: room * (at + 0.5), y: y + (at % lines) * 36 };
      });
      y += LAYER_HEIGHT + (lines - 1) * 36;
    }
  };
  put(reached);
  if (others.length) {
    labels.push({ y: y - 8, text: "not reached from the root" });
    y += 32;
    put(others);
  }
  return { depth, places, labels, height: y - 18 };
}

function drawGraph(graph, state, width, on) {
  const { places, labels, height } = placeNodes(graph, width);
  const { k, pinned } = state;
  const most = Math.max(...graph.values.flat(), 1e-9);
  // Attention is that of thoughts, of which the first is number 1.
  const attention = graph.edge_attention[k - 1] || [];
  const strengths = prominence(attention);
  const near = new Set(pinned === null ? [] : [pinned, ...graph.edges.flatMap(([a, b]) =>
    a === pinned ? [b] : b === pinned ? [a] : [])]);
  const svg = shape("svg", {
    role: "group", viewBox: `0 0 ${width} ${height}`, height,
    "aria-label": `Graph of ${graph.nodes.length} nodes and ${graph.edges.length} edges after thought ${k}`,
  });
  for (const { y, text } of labels) {
    svg.append(
      shape("line", { x1: 0, x2: width, y1: y - 14, y2: y - 14, stroke: "var(--line)" }),
      shape("text", { x: 0, y: y + 4 }, text)
    );
  }
  graph.edges.forEach(([from, to], edge) => {
    const isFaded = pinned !== null && from !== pinned && to !== pinned;
    svg.append(drawEdge(places[from], places[to], strengths[edge] || 0, isFaded,
      edgeWords(graph, edge, k)));
  });
  graph.nodes.forEach((name, node) => {
    svg.append(drawNode(graph, node, places[node], {
      k, most, isPinned: node === pinned, isFaded: pinned !== null && !near.has(node), on,
    }));
  });
  return svg;
}

function drawEdge(from, to, strength, isFaded, label) {
  const across = to.x - from.x, down = to.y - from.y, length = Math.hypot(across, down) || 1;
  const end = { x: to.x - (across / length) * 13, y: to.y - (down / length) * 13 };
  // Edges along a row bend below it, so that they do not run through the nodes between.
  const bend = Math.abs(down) < 12 ? 26 : 0;
  const middle = { x: (from.x + end.x) / 2, y: (from.y + end.y) / 2 + bend };
  const tip = Math.atan2(end.y - middle.y, end.x - middle.x);
  const wing = (turn) => `${end.x - 6 * Math.cos(tip + turn)},${end.y - 6 * Math.sin(tip + turn)}`;
  const colour = strength > 0.02 ? tint(strength) : "var(--grey-3)";
  const group = shape("g", { class: isFaded && "faded" }, shape("title", {}, label));
  group.append(
    shape("path", {
      d: `M${from.x},${from.y} Q${middle.x},${middle.y} ${end.x},${end.y}`,
      fill: "none", stroke: colour, "stroke-width": 1 + 3 * strength,
    }),
    shape("polygon", { points: `${end.x},${end.y} ${wing(0.45)} ${wing(-0.45)}`, fill: colour })
  );
  return group;
}

function drawNode(graph, node, { x, y }, { k, most, isPinned, isFaded, on }) {
  const value = graph.values[k][node];
  const role = roleOf(graph, node);
  const options = {
    class: "shape", fill: tint(value, most), stroke: "var(--ink)", "stroke-width": isPinned ? 3 : role ? 2 : 1,
    "stroke-dasharray": role === "distractor" ? "3 2" : null,
  };
  const body = role === "root"
    ? shape("rect", { x: x - 10, y: y - 10, width: 20, height: 20, ...options })
    : role
      ? shape("polygon", { points: `${x},${y - 13} ${x + 13},${y} ${x},${y + 13} ${x - 13},${y}`, ...options })
      : shape("circle", { cx: x, cy: y, r: 9, ...options });
  return shape("g", {
    class: isFaded ? "node faded" : "node", tabindex: 0, role: "button", "data-node": node,
    "aria-pressed": String(isPinned), "aria-label": nodeWords(graph, node, k),
    onclick: () => on.pin(node), onmouseenter: () => on.read(node), onmouseleave: () => on.read(null),
    onfocus: () => on.read(node), onblur: () => on.read(null),
    onkeydown: (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      on.pin(node);
    },
  }, body, shape("text", {
    x, y: y + 25, "text-anchor": "middle", class: role && "strong",
    stroke: "var(--surface)", "stroke-width": 3, "paint-order": "stroke",
  }, graph.nodes[node]));
}

const roleOf = (graph, node) =>
  node === graph.root ? "root" : node === graph.target ? "target"
    : node === graph.distractor ? "distractor" : null;

function nodeWords(graph, node, k) {
  const role = roleOf(graph, node), group = graph.groups && graph.groups[k] && graph.groups[k][node];
  const values = graph.values.map((row) => decimal(row[node], 3)).join(", ");
  return `${graph.nodes[node]}${role ? ` (${role})` : ""}: value ${decimal(graph.values[k][node], 3)} after `
    + `${plural(k, "thought")}${group ? `, ${group}` : ""}; by thought from 0: ${values}`;
}

function edgeWords(graph, edge, k) {
  const [from, to] = graph.edges[edge];
  const value = (graph.edge_attention[k - 1] || [])[edge];
  return `${graph.nodes[from]} \u2192 ${graph.nodes[to]}`
    + (typeof value === "number" ? `: attention ${decimal(value, 3)} at thought ${k}` : "");
}
