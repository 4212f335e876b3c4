// One question opened: its text shaded by attention, its steps, its thoughts by their top tokens,
// its graph, and the answer after every number of thoughts.

// Shown again after every step; focus stays on what corresponds to the element that had it.
function drawDetail(viewer) {
  const { open: record, k } = viewer;
  const focused = document.activeElement && document.activeElement.dataset.focus;
  const isGraphFocused = document.activeElement && document.activeElement.dataset.node;
  const isRawOpen = byId("raw") && byId("raw").open;
  const isLayersOpen = byId("by-layer") && byId("by-layer").open;
  byId("detail").replaceChildren(...[
    titleBar(viewer),
    questionText(record, k),
    facts(viewer),
    stepper(viewer),
    thoughtTable(viewer),
    record.graph ? graphFigure(viewer) : null,
    answerList(record, k),
    layerTable(record, isLayersOpen),
    rawJson(record, isRawOpen),
  ].filter(Boolean));
  const again = focused
    ? byId("detail").querySelector(`[data-focus="${focused}"]`)
    : isGraphFocused && byId("detail").querySelector(`[data-node="${isGraphFocused}"]`);
  if (again) again.focus({ preventScroll: true });
}

function titleBar(viewer) {
  const { open: record } = viewer;
  return element("div", { class: "bar" },
    element("h3", { id: "detail-title" }, `Question ${record.index}`),
    element("span", { class: record.correct ? "mark right" : "mark" }, record.correct ? "right" : "wrong"),
    record.class ? element("span", { class: "soft" }, words(record.class)) : null,
    element("span", { class: "end" },
      element("button", { type: "button", "data-focus": "previous", onclick: () => viewer.step(-1) }, "\u2191 previous"),
      element("button", { type: "button", "data-focus": "next", onclick: () => viewer.step(1) }, "\u2193 next"),
      element("button", {
        type: "button", "data-focus": "raw", onclick: () => {
          byId("raw").open = true;
          byId("raw").scrollIntoView({ block: "nearest" });
        },
      }, "raw JSON")));
}

// The tokens of the question, shaded by the attention of thought k.
function questionText(record, k) {
  const thought = record.thoughts.find((each) => each.k === k);
  const attention = thought && thought.attention_per_10000.map((value) => value / 10000);
  if (!attention || !record.question_tokens) return element("p", { class: "question" }, record.question);
  const strengths = prominence(attention);
  // Word tokenizers drop blanks; without them the question's words would run together.
  const isSpaced = /\s/.test(record.question_tokens.join("").trim());
  return element("p", { class: "question", "aria-label": record.question },
    record.question_tokens.map((token, place) => [
      element("span", {
        title: `attention ${decimal(attention[place], 4)}`,
        style: { background: `color-mix(in oklab, var(--accent) ${Math.round(50 * strengths[place])}%, transparent)` },
      }, token),
      isSpaced ? null : " ",
    ]));
}

function facts(viewer) {
  const { open: record, k, run } = viewer;
  const current = k > 0 ? Math.floor((k - 1) / Math.max(run.c_thought, 1)) : null;
  const pairs = [
    ["steps", element("ol", { class: "steps" }, record.steps.map((step, place) =>
      element("li", { class: place === current && "now" }, step)))],
    ["gold answer", record.gold],
    ["its answer", record.prediction ?? `none; it wrote ${record.text}`],
    typeof record.log_p === "number" ? ["its confidence", percent(Math.exp(record.log_p))] : null,
    ...Object.entries(record.shortcuts || {}).map(([rule, verdict]) => [words(rule), verdict]),
  ];
  return element("dl", { class: "facts" },
    pairs.filter(Boolean).map(([name, content]) => [element("dt", {}, name), element("dd", {}, content)]));
}

function stepper(viewer) {
  const { open: record, k } = viewer;
  const answer = record.answers.find((each) => each.k === k);
  const buttons = Array.from({ length: record.num_thoughts + 1 }, (_, number) =>
    element("button", {
      type: "button", role: "radio", "aria-checked": String(number === k), "data-focus": `k${number}`,
      "aria-label": `after ${plural(number, "thought")}`, tabindex: number === k ? 0 : -1,
      onclick: () => viewer.go(record, number),
    }, String(number)));
  return element("div", { class: "stepper", role: "radiogroup", "aria-label": "Thoughts" },
    element("span", { class: "label" }, "\u2190 thought \u2192"), buttons,
    answer ? element("span", { class: answer.correct ? "mark right" : "mark", role: "status" },
      answer.prediction === null ? `would write ${shorten(answer.text)}` : `would answer ${shorten(answer.prediction)}`) : null);
}

const shorten = (text) => (text.length > 44 ? text.slice(0, 43) + "\u2026" : text);

function thoughtTable(viewer) {
  const { open: record, k } = viewer;
  if (!record.thoughts.length) return element("p", { class: "soft" }, "This checkpoint has no thoughts to read.");
  const width = Math.max(...record.thoughts.map((thought) => thought.top.length));
  return element("div", {},
    element("h4", {}, "Thoughts by their top tokens"),
    element("div", { class: "scroll" }, element("table", { class: "thoughts", "aria-label": "Thoughts by their top tokens" },
      element("thead", {}, element("tr", {},
        element("th", { scope: "col" }, "k"),
        Array.from({ length: width }, (_, place) =>
          element("th", { scope: "col", class: place > 2 && "rest" }, `top ${place + 1}`)),
        element("th", { scope: "col" }, "word"),
        element("th", { scope: "col", class: "number" }, "gold rank"),
        element("th", { scope: "col", class: "number rest" }, "entropy"))),
      element("tbody", {}, record.thoughts.map((thought) =>
        element("tr", { class: thought.k === k && "now", onclick: () => viewer.go(record, thought.k) },
          element("th", { scope: "row" }, String(thought.k)),
          thought.top.map((pair, place) => tokenCell(pair, place, thought.gold_step_rank === place + 1)),
          element("td", {}, visible(thought.word || "")),
          element("td", { class: "number" }, thought.gold_step_rank === null ? "\u2013" : String(thought.gold_step_rank)),
          element("td", { class: "number rest" }, decimal(thought.entropy))))))));
}

const tokenCell = ([token, probability], place, isGold) =>
  element("td", {
    class: `token${isGold ? " gold" : ""}${place > 2 ? " rest" : ""}`, title: isGold ? "the gold step" : null,
  },
    element("b", {}, visible(token)), " ", element("small", {}, rounded(probability)),
    element("i", { style: { width: 100 * probability + "%" } }));

const rounded = (probability) => (probability < 0.005 ? "< 1\u00a0%" : percent(probability, 0));

// A token as it is read: blanks around it go, one that is nothing else is named.
function visible(token) {
  const text = token.trim();
  if (text) return text;
  return token.includes("\n") ? "\u23ce" : token ? "\u2423" : "(empty)";
}

function graphFigure(viewer) {
  const { open: record, k } = viewer, { graph } = record;
  const reading = element("p", { id: "reading", role: "status" });
  const read = (node) => {
    const shown = node === null ? viewer.pinned : node;
    reading.textContent = shown === null
      ? "Point at a node for its numbers; click, or press Enter, to pin it."
      : nodeWords(graph, shown, k) + (shown === viewer.pinned ? " (pinned)" : "");
  };
  const pin = (node) => viewer.go(record, k, viewer.pinned === node ? null : node);
  read(null);
  const draw = (width) => {
    viewer.graphWidth = width;
    return drawGraph(graph, { k, pinned: viewer.pinned }, width, { pin, read });
  };
  const drawing = atEveryWidth(element("div", {}), draw, viewer.graphWidth);
  return element("div", { id: "graph" },
    element("h4", {}, `The graph after ${plural(k, "thought")}`),
    drawing, reading,
    element("ul", { class: "legend" },
      element("li", {}, "value 0", element("i", { class: "scale" }), decimal(Math.max(...graph.values.flat()))),
      ["edges: attention", "square: root", "diamond: target", "dashed: distractor"]
        .map((text) => element("li", {}, text))));
}

function answerList(record, k) {
  return element("div", {},
    element("h4", {}, "The answer after k thoughts"),
    element("ol", { class: "answers" }, record.answers.map((answer) =>
      element("li", { class: [answer.k === k && "now", answer.k > record.num_thoughts && "beyond"].filter(Boolean).join(" ") || null },
        element("span", {}, `k = ${answer.k}`),
        element("span", { class: "text" }, answer.text,
          answer.k === record.num_thoughts ? element("span", { class: "soft" }, " (as trained)") : null,
          answer.class ? element("span", { class: "soft" }, ` (${words(answer.class)})`) : null),
        element("span", { class: answer.correct ? "mark right" : "mark" }, answer.correct ? "right" : "wrong")))));
}

function layerTable(record, isOpen) {
  const rows = record.thoughts.filter((thought) => thought.by_layer && thought.by_layer.length);
  if (!rows.length) return null;
  const head = ["k", ...rows[0].by_layer.map((_, layer) => layerName(layer))];
  return element("details", { id: "by-layer", open: isOpen },
    element("summary", {}, "Top token layer by layer"),
    heatMap("Top token of each thought, layer by layer", head, rows.map((thought) => ({
      name: String(thought.k),
      cells: thought.by_layer.map(([token, probability]) => ({
        text: `${visible(token)} ${rounded(probability)}`, value: probability,
      })),
    }))));
}

// Written out only when asked for: it is long.
function rawJson(record, isOpen) {
  const text = element("pre", { tabindex: 0, "aria-label": "Raw JSON" });
  const write = () => {
    text.textContent = JSON.stringify(record, null, 1);
  };
  if (isOpen) write();
  return element("details", {
    id: "raw", open: isOpen, ontoggle: (event) => {
      if (event.target.open && !text.textContent) write();
    },
  }, element("summary", {}, "Raw JSON of this question"), text);
}
