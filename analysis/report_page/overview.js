// The first screen: what was trained, how well it answers, and whether its thoughts are used; and
// below the questions, what else was measured.

const REPLACEMENTS = {
  zeros: "zeros", mean: "the mean thought", noise_added: "thoughts plus noise",
  noise: "noise of their norm", other_record: "another question\u2019s thoughts",
  permuted: "thoughts in another order", placeholder: "the placeholder",
};

// Path classes from the best to the worst: right ones in the accent, wrong ones in greys.
const CLASS_COLOURS = {
  correct_path: "var(--accent)",
  longer_path: "color-mix(in oklab, var(--accent) 62%, var(--surface))",
  correct_label: "color-mix(in oklab, var(--accent) 32%, var(--surface))",
  hallucination: "var(--grey-3)",
  wrong_target: "var(--grey-2)",
  incorrect_label: "var(--grey-1)",
};

const GROUPS = [
  ["optimal", "var(--accent)", null], ["frontier", "var(--ink)", null],
  ["reached", "var(--grey-1)", "6 3"], ["unreachable", "var(--grey-2)", "2 3"],
];

function drawHead(report) {
  const { run, ablations } = report;
  byId("head").append(
    element("p", { class: "eyebrow" }, "What a trained model thinks"),
    element("h1", {}, run.name),
    element("p", { class: "lead" }, run.sentences.join(" ")),
    element("dl", { class: "headline" }, headline(report).map(({ id, label, text, note }) =>
      element("div", { id },
        element("dt", {}, label), element("dd", { class: "figure" }, text),
        element("dd", { class: "range" }, note))))
  );
  document.title = run.name + " \u2013 report";
  byId("foot").append(run.origin);
  byId("viewer-lead").append(
    report.records.length < ablations.num_records
      ? `The first ${report.records.length} of ${plural(ablations.num_records, "question")}. `
      : `${capital(plural(report.records.length, "question"))}. `,
    "Keys: ", element("kbd", {}, "\u2191"), " ", element("kbd", {}, "\u2193"), " for questions, ",
    element("kbd", {}, "\u2190"), " ", element("kbd", {}, "\u2192"), " for thoughts, ",
    element("kbd", {}, "/"), " to search. The address names both, to be shared."
  );
}

function headline({ curve, ablations, probes }) {
  const tiles = [];
  if (curve) {
    const { last, best } = curve;
    tiles.push({
      id: "tile-last", label: `accuracy of this checkpoint: stage ${last.stage}, epoch ${last.epoch}`,
      text: percent(last.acc), note: `95\u00a0% interval ${range(last.low, last.high)}`,
    });
    tiles.push({
      id: "tile-best", label: `best of ${plural(curve.evaluations.length, "epoch")}: epoch ${best.epoch}`,
      text: percent(best.acc), note: `${range(best.low, best.high)}; chosen on these records`,
    });
  }
  if (!curve || curve.is_other_data) {
    const { own } = ablations;
    tiles.push({
      id: "tile-own", label: `accuracy on ${plural(ablations.num_records, "record")} of this file`,
      text: percent(own.acc), note: `95\u00a0% interval ${range(own.low, own.high)}`,
    });
  }
  const strongest = whole(ablations).find((row) => row.name === "other_record") || whole(ablations)[0];
  if (strongest) {
    tiles.push({
      id: "tile-used", label: `points, with ${REPLACEMENTS[strongest.name] || words(strongest.name)} in place of its own`,
      text: points(strongest.difference),
      note: `95\u00a0% interval ${points(strongest.difference_low)} to ${points(strongest.difference_high)}`,
    });
  }
  const named = meansOf(probes.thoughts, "gold_step_word");
  const byChance = meansOf(probes.thoughts, "other_step_word");
  // Pause tokens, which are all alike, can be read as words as well, but hold no thoughts.
  if (named.length && strongest) {
    tiles.push({
      id: "tile-named", label: "of the thoughts, read as a word, name their step",
      text: percent(mean(named)),
      note: `another question’s step: ${percent(mean(byChance))}; by thought `
        + named.map((value) => (100 * value).toFixed(1)).join(", "),
    });
  }
  return tiles;
}

const mean = (values) => values.reduce((sum, value) => sum + value) / values.length;

// A figure's means over records, thought by thought, where it has one.
const meansOf = (thoughts, name) => thoughts.map((row) => row[name] && row[name].mean)
  .filter((value) => typeof value === "number");

// The replacements of all thoughts at once.
const whole = (ablations) => ablations.replacements.filter((row) => row.positions === "all");

function drawOverview(report) {
  const grid = element("div", { class: "grid" });
  if (report.curve) grid.append(curveFigure(report));
  if (whole(report.ablations).length) grid.append(usedFigure(report.ablations));
  grid.append(sweepFigure(report.ablations));
  if (report.ablations.sweep[0].classes) grid.append(classFigure(report.ablations));
  if (report.ablations.shortcuts) grid.append(shortcutFigure(report.ablations));
  if (report.baselines.length) grid.append(baselineFigure(report));
  if (grid.children.length % 2) grid.lastChild.classList.add("wide");
  byId("overview").append(grid);
}

function curveFigure({ curve, baselines }) {
  const list = curve.evaluations;
  const first = Math.min(...list.map((line) => line.epoch)) - 1;
  const last = Math.max(...list.map((line) => line.epoch));
  const label = `Held-out accuracy by epoch, from ${percent(list[0].acc)} to ${percent(curve.last.acc)}`;
  return figure("curve", "Learning curve, stage by stage",
    "At each stage one more written step gives way to thoughts. The band is the 95\u00a0% interval over the records.",
    lineChart({
      label,
      x: { min: first, max: last, ticks: list.map((line) => line.epoch), title: "epochs" },
      y: PERCENT_AXIS,
      spans: curve.spans,
      levels: baselines.map((row) => ({ y: row.acc, label: `${row.name} ${percent(row.acc, 0)}` })),
      series: [{
        name: "epoch", colour: "var(--accent)",
        points: list.map((line) => ({ x: line.epoch, y: line.acc, low: line.low, high: line.high })),
      }],
    }),
    numbers("curve", label, ["epoch", "stage", "accuracy", INTERVAL],
      list.map((line) => [number(line.epoch, String(line.epoch)), number(line.stage, String(line.stage)),
        share(line.acc), interval(line)])));
}

function usedFigure(ablations) {
  const { own, num_records } = ablations;
  const label = "Accuracy with the model\u2019s own thoughts and with others in their place";
  const rows = whole(ablations);
  return figure("used", "Are the thoughts used?",
    `${verdict(ablations)} Each of ${plural(num_records, "record")} is compared with itself; lines are 95\u00a0% intervals.`,
    bars(label, [
      { name: "its own thoughts", value: own.acc, low: own.low, high: own.high, text: percent(own.acc), own: true },
      ...rows.map((row) => ({
        name: REPLACEMENTS[row.name] || words(row.name), value: row.acc, low: row.low, high: row.high,
        text: percent(row.acc), note: points(row.difference),
      })),
    ]),
    numbers("used", label,
      ["read in place of the thoughts", "accuracy", INTERVAL, "difference", "its 95\u00a0% interval", "p", "lost", "gained"],
      [["its own thoughts", share(own.acc), interval(own), null, null, null, null, null],
        ...rows.map(replacementRow)]));
}

const replacementRow = (row) => [
  REPLACEMENTS[row.name] || words(row.name), share(row.acc), interval(row),
  number(row.difference, points(row.difference)),
  number(row.difference_low + ".." + row.difference_high,
    `${points(row.difference_low)} to ${points(row.difference_high)}`),
  number(row.p, pValue(row.p)), number(row.num_lost, String(row.num_lost)),
  number(row.num_gained, String(row.num_gained)),
];

// What the replacements say, in a sentence that claims no more than their intervals do.
function verdict(ablations) {
  const rows = whole(ablations);
  const falls = (row) => row && row.difference_high < 0 && row.p < 0.05;
  const by = (row) => `${percent(ablations.own.acc)} to ${percent(row.acc)}`;
  const other = rows.find((row) => row.name === "other_record");
  if (falls(other)) {
    return `Yes, by their content: with another question\u2019s thoughts accuracy falls from ${by(other)}.`;
  }
  const worst = rows.filter(falls).sort((a, b) => a.difference - b.difference)[0];
  if (worst) {
    const name = REPLACEMENTS[worst.name] || words(worst.name);
    return `In part: with ${name} in their place accuracy falls from ${by(worst)}`
      + (other ? ", but another question\u2019s thoughts serve as well as its own." : ".");
  }
  return `No sign of it: on these ${plural(ablations.num_records, "record")} no replacement lowers `
    + "accuracy by more than chance would.";
}

function sweepFigure(ablations) {
  const { sweep, num_thoughts, early_stop } = ablations;
  const label = `Accuracy after 0 to ${sweep.at(-1).k} thoughts; the model was trained with ${num_thoughts}`;
  const known = early_stop.filter((k) => k !== null);
  return figure("sweep", "More thoughts, fewer thoughts", sweepCaption(ablations, known),
    lineChart({
      label,
      x: { min: 0, max: Math.max(sweep.at(-1).k, 1), ticks: sweep.map((row) => row.k), title: "thoughts before the answer (k)" },
      y: PERCENT_AXIS,
      marks: [{ x: num_thoughts, label: "as trained" }],
      series: [{
        name: "thoughts", colour: "var(--accent)",
        points: sweep.map((row) => ({ x: row.k, y: row.acc, low: row.low, high: row.high })),
      }],
    }),
    numbers("sweep", label, ["k", "accuracy", INTERVAL, "tokens written", "answers that no longer change"],
      sweep.map((row) => [
        number(row.k, String(row.k)), share(row.acc), interval(row),
        number(row.mean_tokens, decimal(row.mean_tokens)),
        row.k <= num_thoughts && known.length
          ? share(known.filter((k) => k <= row.k).length / known.length) : null,
      ])));
}

function sweepCaption({ sweep, num_thoughts }, stops) {
  const first = sweep[0], trained = sweep.find((row) => row.k === num_thoughts);
  const parts = [`Trained with ${plural(num_thoughts, "thought")}.`];
  if (trained && first.mean_tokens > trained.mean_tokens + 0.5) {
    parts.push(`After fewer it writes what it has not thought: ${decimal(first.mean_tokens, 1)} tokens `
      + `after ${first.k}, ${decimal(trained.mean_tokens, 1)} after ${num_thoughts}.`);
  }
  if (stops.length && num_thoughts) {
    const early = stops.filter((k) => k < num_thoughts).length / stops.length;
    parts.push(`${percent(early, 0)} of the answers stand before the last thought.`);
  }
  return parts.join(" ");
}

function classFigure({ sweep }) {
  const known = Object.keys(CLASS_COLOURS).filter((name) => sweep.some((row) => row.classes[name].share));
  const colours = known.map((name) => [name, CLASS_COLOURS[name]]);
  const label = "Kinds of answers after k thoughts";
  return figure("classes", "What the answers are",
    "The written path, or where none is left the label, after k thoughts. Shades of the accent are right.",
    stackedColumns(label, sweep.map((row) => ({
      x: row.k, shares: Object.fromEntries(known.map((name) => [name, row.classes[name].share])),
    })), colours, "thoughts before the answer (k)"),
    legend(colours.map(([name, colour]) => [words(name), colour])),
    numbers("classes", label, ["k", ...known.map(words)],
      sweep.map((row) => [number(row.k, String(row.k)), ...known.map((name) =>
        number(row.classes[name].share, `${percent(row.classes[name].share)} (${range(row.classes[name].low, row.classes[name].high)})`))])));
}

function shortcutFigure({ shortcuts }) {
  const label = "Accuracy where rules that never look at the root are right, tied or wrong";
  const rows = Object.entries(shortcuts).flatMap(([rule, verdicts]) =>
    Object.entries(verdicts).map(([name, item]) => ({ rule, name, item })));
  return figure("shortcuts", "Search, or a shortcut?",
    "Rules that never look at the root answer most of these questions. Where such a rule ties or is wrong, the model has to search.",
    element("div", { class: "halves" }, Object.keys(shortcuts).map((rule) => element("div", {},
      element("h4", {}, capital(words(rule))),
      bars(`${label}: ${words(rule)}`, rows.filter((row) => row.rule === rule && row.item.n).map(({ name, item }) => ({
        name: `rule ${name}`, value: item.acc, low: item.low, high: item.high,
        text: percent(item.acc), note: `n = ${item.n}`,
      })))))),
    numbers("shortcuts", label, ["rule", "its verdict", "records", "accuracy", INTERVAL],
      rows.map(({ rule, name, item }) => [words(rule), name, number(item.n, String(item.n)),
        share(item.n ? item.acc : null), item.n ? interval(item) : null])));
}

function baselineFigure({ baselines, curve, ablations, run }) {
  const own = curve ? curve.last : ablations.own;
  const label = "Accuracy of this run and of the baselines, each at its last epoch";
  const caveat = baselines.some((row) => row.is_other_data)
    ? " Those marked * were asked other records." : "";
  return figure("baselines", "Beside the baselines", `Each run at its last epoch, with 95\u00a0% intervals over records; runs of other seeds differ by more.${caveat}`,
    bars(label, [
      { name: run.short_name, value: own.acc, low: own.low, high: own.high, text: percent(own.acc), own: true },
      ...baselines.map((row) => ({
        name: row.name + (row.is_other_data ? "*" : ""), value: row.acc, low: row.low, high: row.high,
        text: percent(row.acc), note: row.method,
      })),
    ]),
    numbers("baselines", label, ["run", "method", "epoch", "accuracy", INTERVAL, "best epoch"],
      baselines.map((row) => [row.folder, words(row.method), number(row.epoch, String(row.epoch)), share(row.acc),
        interval(row), share(row.best)])));
}
