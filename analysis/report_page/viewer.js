// The questions: a list to search, filter and sort, and one opened, thought by thought.
// The address holds the question, the thought and a pinned node of the graph: #id=17&k=2&node=5.

const SORTS = {
  file: ["in the file\u2019s order", (a, b) => a.index - b.index],
  wrong: ["wrong first", (a, b) => isRight(a) - isRight(b)],
  late: ["latest to settle first", (a, b) => (b.early_stop ?? -1) - (a.early_stop ?? -1)],
  doubtful: ["least confident answers first", (a, b) => (a.log_p ?? 0) - (b.log_p ?? 0)],
  unsure: ["least certain thoughts first", (a, b) => meanOf(b, "entropy") - meanOf(a, "entropy")],
  rank: ["gold steps ranked worst first", (a, b) => meanOf(b, "gold_step_rank") - meanOf(a, "gold_step_rank")],
};

const isRight = (record) => Number(record.correct);

function meanOf(record, name) {
  const values = record.thoughts.map((thought) => thought[name]).filter((v) => typeof v === "number");
  return values.length ? values.reduce((a, b) => a + b) / values.length : 0;
}

// Whether the answer differs between two numbers of thoughts up to the trained one.
function changes(record) {
  const trained = record.answers.filter((answer) => answer.k <= record.num_thoughts);
  return new Set(trained.map((answer) => answer.prediction ?? answer.text)).size > 1;
}

class Viewer {
  constructor(report) {
    this.records = report.records;
    this.run = report.run;
    this.byIndex = new Map(this.records.map((record) => [record.index, record]));
    this.shown = [];
    this.open = null;
    this.k = 0;
    this.pinned = null;
    this.graphWidth = 0;
    this.setUpControls(report.ablations.shortcuts);
    document.addEventListener("keydown", (event) => this.onKey(event));
    window.addEventListener("hashchange", () => this.restore());
    this.filter();
    this.restore();
    // A shared address is about its question, not about what stands above.
    if (location.hash.includes("id=")) byId("viewer").scrollIntoView();
  }

  setUpControls(shortcuts) {
    for (const [name, [label]] of Object.entries(SORTS)) {
      byId("sort").append(element("option", { value: name }, label));
    }
    byId("shortcut").append(element("option", { value: "" }, "right, tied or wrong"));
    for (const rule of Object.keys(shortcuts || {})) {
      for (const verdict of ["tied", "wrong"]) {
        byId("shortcut").append(
          element("option", { value: `${rule}/${verdict}` }, `${words(rule)}: ${verdict}`));
      }
    }
    byId("shortcut-control").hidden = !shortcuts;
    for (const id of ["search", "only-wrong", "only-changing", "shortcut", "sort"]) {
      byId(id).addEventListener("input", () => this.filter());
    }
  }

  filter() {
    const text = byId("search").value.trim().toLowerCase();
    const [rule, verdict] = byId("shortcut").value.split("/");
    this.shown = this.records.filter((record) =>
      (!text || `${record.index} ${record.question} ${record.gold} ${record.text}`.toLowerCase().includes(text))
      && (!byId("only-wrong").checked || !isRight(record))
      && (!byId("only-changing").checked || changes(record))
      && (!rule || (record.shortcuts && record.shortcuts[rule] === verdict)));
    this.shown.sort(SORTS[byId("sort").value][1]);
    this.drawList();
  }

  drawList() {
    byId("count").textContent = `${this.shown.length} of ${plural(this.records.length, "question")}`;
    byId("list").replaceChildren(...(this.shown.length
      ? this.shown.map((record) => this.listItem(record))
      : [element("li", { class: "empty" }, "No question fits. Take a filter away.")]));
    this.markOpen(false);
  }

  listItem(record) {
    const right = isRight(record);
    return element("li", {}, element("a", { href: address(record.index, this.k, null), "data-index": record.index },
      element("span", { class: "place" }, String(record.index)),
      element("span", { class: "text wide" }, lastPart(record.question)),
      element("span", { class: right ? "mark right" : "mark" },
        element("span", { class: "unseen" }, right ? "right" : "wrong")),
      element("span", { class: "text soft" }, record.gold),
      dots(record)));
  }

  markOpen(isScrolled) {
    for (const link of byId("list").querySelectorAll("a")) {
      const isOpen = this.open && Number(link.dataset.index) === this.open.index;
      if (isOpen) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
      if (isOpen && byId("list").contains(document.activeElement)) link.focus({ preventScroll: true });
      // Only the list moves: scrollIntoView would move the page as well.
      if (isOpen && isScrolled) {
        const list = byId("list"), top = link.offsetTop;
        if (top < list.scrollTop || top + link.offsetHeight > list.scrollTop + list.clientHeight) {
          list.scrollTop = top - list.clientHeight / 3;
        }
      }
    }
  }

  // What the address names; without a question, the first in the list, without touching it.
  restore() {
    const named = new URLSearchParams(location.hash.slice(1));
    const record = this.byIndex.get(Number(named.get("id") ?? NaN)) || this.open || this.shown[0];
    const k = named.has("k") ? Number(named.get("k")) : this.open ? this.k : record.num_thoughts;
    this.show(record, k, nodeNamed(named.get("node"), record));
  }

  // A pinned node stays as long as its question.
  go(record, k, pinned = record === this.open ? this.pinned : null) {
    const hash = address(record.index, clamp(k, record), pinned);
    if (hash !== location.hash) history.replaceState(null, "", hash);
    this.show(record, k, pinned);
  }

  show(record, k, pinned) {
    this.open = record;
    this.k = clamp(k, record);
    this.pinned = pinned;
    drawDetail(this);
    this.markOpen(true);
    for (const link of byId("list").querySelectorAll("a")) {
      const index = Number(link.dataset.index);
      link.hash = address(index, this.k, index === record.index ? pinned : null);
    }
  }

  step(by) {
    if (!this.shown.length) return;
    const place = this.shown.indexOf(this.open);
    const next = place < 0 ? 0 : Math.min(Math.max(place + by, 0), this.shown.length - 1);
    this.go(this.shown[next], this.k);
  }

  onKey(event) {
    const isTyping = event.target.matches("input[type=search], select, textarea");
    if (event.ctrlKey || event.metaKey || event.altKey || (isTyping && event.key !== "Escape")) return;
    const steps = {
      ArrowDown: () => this.step(1), ArrowUp: () => this.step(-1),
      ArrowRight: () => this.go(this.open, this.k + 1), ArrowLeft: () => this.go(this.open, this.k - 1),
      "/": () => byId("search").focus(), Escape: () => event.target.blur(),
    };
    if (!steps[event.key]) return;
    // Above and below the questions, arrows scroll the page as usual.
    const { top, bottom } = byId("viewer").getBoundingClientRect();
    if (event.key.startsWith("Arrow") && (top > innerHeight || bottom < 0)) return;
    if (event.key !== "Escape") event.preventDefault();
    steps[event.key]();
  }
}

const address = (index, k, node) => `#id=${index}&k=${k}${node === null ? "" : `&node=${node}`}`;

// The node that an address names; null where it names none of the question's graph.
function nodeNamed(text, record) {
  const node = text ? Number(text) : NaN;
  return record.graph && node in record.graph.nodes ? node : null;
}

const clamp = (k, record) =>
  Math.min(Math.max(Number.isFinite(k) ? Math.round(k) : 0, 0), record.num_thoughts);

// Questions begin alike, so the end says more: the last sentence, or all of a short one.
function lastPart(question) {
  return question.length <= 60 ? question : "\u2026 " + question.split(/(?<=[.?!])\s+/).at(-1);
}

// One dot for each number of thoughts up to the trained one, filled where the answer is right.
function dots(record) {
  const answers = record.answers.filter((answer) => answer.k <= record.num_thoughts);
  const told = answers.map((answer) => `${answer.k}: ${answer.correct ? "right" : "wrong"}`);
  return element("span", { class: "dots", role: "img", "aria-label": `after k thoughts, ${told.join(", ")}` },
    answers.map((answer) => element("i", { class: answer.correct && "right" })));
}
