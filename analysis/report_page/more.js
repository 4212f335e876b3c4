// Below the questions: what else was measured, graphs first, the rest folded.

function drawMore({ ablations, probes }) {
  const parts = [
    probes.graph ? ["search", "Does it search? Values of nodes", searchPart(probes)] : null,
    ["thoughts", "Thoughts by position", thoughtsPart(probes.thoughts)],
    ["layers", "Their steps, layer by layer", layersPart(probes.layers)],
    probes.linear.length ? ["linear", "Linear probes", linearPart(probes.linear)] : null,
    ["confidence", "Confidence of the answers", confidencePart(probes.confidence)],
    ablations.replacements.some((row) => row.positions !== "all") ? ["replacements", "All replacements", replacementsPart(ablations)] : null,
    ablations.transplant ? ["transplant", "Transplanted thoughts", transplantPart(ablations.transplant)] : null,
  ];
  for (const [id, title, content] of parts.filter(Boolean)) {
    byId("more").append(element("details", { id: "more-" + id, open: id === "search" },
      element("summary", {}, title), element("div", {}, content)));
  }
}

function searchPart({ graph, num_thoughts }) {
  const known = GROUPS.filter(([name]) => graph.groups[name].some((row) => row.n));
  const highs = known.flatMap(([name]) => graph.groups[name].map((row) => row.high));
  const top = Math.max(...highs.filter((value) => typeof value === "number"), 0.01);
  const label = "Mean value of nodes after k thoughts, by group";
  return [
    element("p", { class: "lead" },
      "A node\u2019s value after k thoughts is the probability of its name where the text that follows names a node. The frontier holds the nodes as far from the root as the node that the gold text names there; optimal ones lie on a shortest path to the target. Bands are 95\u00a0% intervals over questions."),
    lineChart({
      label,
      x: { min: 0, max: Math.max(num_thoughts, 1), ticks: graph.groups[known[0][0]].map((row) => row.k), title: "thoughts (k)" },
      y: { min: 0, max: top, ticks: [0, top / 2, top], format: (value) => decimal(value, top < 0.1 ? 3 : 2) },
      series: known.map(([name, colour, dash]) => ({
        name, colour, dash,
        points: graph.groups[name].map((row) => ({ x: row.k, y: row.mean, low: row.low, high: row.high })),
      })),
    }),
    legend(known.map(([name, colour]) => [name, colour])),
    numbers("search", label, ["group", "k", "mean value", "low", "high", "nodes"],
      known.flatMap(([name]) => graph.groups[name].map((row) => [
        name, number(row.k, String(row.k)), number(row.mean, decimal(row.mean, 3)),
        number(row.low, decimal(row.low, 3)), number(row.high, decimal(row.high, 3)), number(row.n, String(row.n)),
      ]))),
    table("Frontier against the rest, and the most valued nodes",
      ["k", "area under the curve, frontier against the rest", "share of the top node", "of the top 2", "of the top 3"],
      graph.auc.map((row, place) => [number(row.k, String(row.k)), meanCell(row), ...graph.top[place].map(share)])),
    table("Attention from thoughts to edges", ["edges to", ...graph.attention[known[0][0]].map((row) => `thought ${row.k}`)],
      known.map(([name]) => [`${name} nodes`, ...graph.attention[name].map((row) => number(row.mean, decimal(row.mean, 4)))])),
  ];
}

// Name in probes.json, what it is, how it is written.
const THOUGHT_ROWS = [
  ["gold_step_word", "names its step, read as a word of answers", percent],
  ["gold_step_top1", "its step is the top token", percent],
  ["gold_step_rank_median", "median rank of its step", (value) => decimal(value, 1)],
  ["entropy", "entropy, in nats", decimal], ["norm_ratio", "norm, over that of embeddings", decimal],
  ["max_cosine", "cosine to the nearest embedding", decimal],
  ["cosine_last_state", "cosine to the state before", decimal],
  ["cosine_previous", "cosine to the thought before", decimal],
  ["cosine_other_records", "cosine to other questions\u2019 thoughts", decimal],
];

// A number, or a mean with its interval where it has one.
function meanCell(value, format = decimal) {
  const mean = value !== null && typeof value === "object" ? value.mean : value;
  if (typeof mean !== "number") return null;
  const hasInterval = value !== mean && typeof value.low === "number";
  const text = format(mean);
  if (!hasInterval) return number(mean, text);
  const between = format === percent ? range(value.low, value.high) : `${format(value.low)} to ${format(value.high)}`;
  return number(mean, `${text} (${between})`);
}

function thoughtsPart(rows) {
  const states = Math.max(...rows.map((row) => (row.window || []).length));  // none for pauses
  const line = (label, format, of) => [label, ...rows.map((row) => meanCell(of(row), format))];
  return table("Thoughts by position", ["mean over questions", ...rows.map((row) => `thought ${row.k}`)], [
    ...THOUGHT_ROWS.map(([name, label, format]) => line(label, format, (row) => row[name])),
    ...Array.from({ length: states }, (_, place) =>
      line(`share of the state ${place + 1} before`, percent, (row) => (row.window || [])[place])),
  ]);
}

const layersPart = ({ gold_step_top1: shares }) => [
  element("p", { class: "lead" }, "Share of questions whose gold step is the top token at a thought, read at each layer."),
  heatMap("Gold step on top, by thought and layer", ["k", ...shares[0].map((_, layer) => layerName(layer))],
    shares.map((row, place) => ({
      name: String(place + 1),
      cells: row.map((value) => ({ text: value === null ? "\u2013" : percent(value, 0), value })),
    }))),
];

function linearPart(rows) {
  const thoughts = [...new Set(rows.map((row) => row.k))], steps = [...new Set(rows.map((row) => row.step))];
  const find = (k, step) => rows.find((row) => row.k === k && row.step === step);
  const own = rows.filter((row) => row.p !== null);
  return [
    element("p", { class: "lead" }, "How well a linear map tells a step from a thought, on questions it was not fitted to."),
    heatMap("Accuracy of linear probes, by thought and step", ["thought", ...steps.map((step) => `step ${step}`)],
      thoughts.map((k) => ({
        name: String(k),
        cells: steps.map((step) => {
          const row = find(k, step);
          return { text: row ? percent(row.accuracy) : "\u2013", value: row && row.accuracy };
        }),
      }))),
    table("Each thought and the step it stands for",
      ["thought", "its step", "accuracy", "best other step", "commonest value", "p"],
      own.map((row) => [number(row.k, String(row.k)), number(row.step, String(row.step)), share(row.accuracy),
        share(row.best_other_step), share(row.majority), number(row.p, pValue(row.p))])),
  ];
}

const replacementsPart = (ablations) => table("All replacements",
  ["read in place of the thoughts", "which", "accuracy", INTERVAL, "difference", "its 95\u00a0% interval", "p", "lost", "gained"],
  ablations.replacements.map((row) => {
    const [name, ...rest] = replacementRow(row);
    return [name, row.positions, ...rest];
  }));

const confidencePart = ({ right, wrong, auc, calibration_error, reliability }) => [
  element("p", { class: "lead" },
    `Confidence is the probability of the whole answer. Area under the curve, right against wrong: ${decimal(auc)}; calibration error ${decimal(calibration_error)}.`),
  table("log p of answers", ["answers", "number", "mean log p"],
    [["right", right], ["wrong", wrong]].map(([name, row]) => [name, number(row.n, String(row.n)), meanCell(row)])),
  table("Accuracy by confidence", ["confidence", "answers", "mean confidence", "accuracy", INTERVAL],
    reliability.map((row) => [range(row.from, row.to, 0), number(row.n, String(row.n)), share(row.confidence), share(row.acc), interval(row)])),
];

const transplantPart = ({ num_pairs, ...kinds }) => [
  element("p", { class: "lead" },
    `${capital(plural(num_pairs, "question"))} read the thoughts of another one. Whose answer follows, where the answers of both are equal or not?`),
  table("Transplanted thoughts", ["answers of the two", "pairs", "follows the thoughts", "keeps its own", "neither"],
    ["unequal", "equal"].filter((name) => kinds[name]).map((name) => [
      name, number(kinds[name].n, String(kinds[name].n)),
      ...["follows_donor", "keeps_own", "neither"].map((kind) => {
        const found = kinds[name][kind];
        return number(found.share, `${percent(found.share)} (${range(found.low, found.high)})`);
      }),
    ])),
];
