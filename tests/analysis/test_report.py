"""The report: made of the files beside it, safe to open, usable with keys, in a real browser."""

import base64
import hashlib
import json
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import conftest
import pytest
from browser import Browser, find_chromium
from runs import Experiment

from analysis import report
from analysis.report_data import page_data

GRAPH = {
    "idx_to_symbol": ["0", "1", "2", "3", "4", "5"],
    "edges": [[0, 2], [2, 4], [1, 3], [3, 5], [0, 5]],
    "root": 0, "target": 4, "neg_target": 3, "answer": "4", "steps": ["2", "4"],
}  # fmt: skip
NUM_RECORDS = 9
NASTY = "</script><script>alert(1)</script><!-- &amp; \"' \u2028 {{script}} <img src=x onerror=y>"

in_browser = pytest.mark.skipif(find_chromium() is None, reason="no Chromium on this machine")
# One process makes the run and starts the browser.
pytestmark = pytest.mark.xdist_group("report")


class Page(HTMLParser):
    """The elements of a page, by tag: attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = {}, [{}, ""]
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.setdefault(tag, []).append([dict(attributes), ""])
        self.open = self.elements[tag][-1]

    def handle_endtag(self, tag):
        self.open = [{}, ""]

    def handle_data(self, text):
        self.open[1] += text

    @property
    def data(self):
        (text,) = [t for a, t in self.elements["script"] if a.get("type") == "application/json"]
        return json.loads(text)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on records with graphs, whose stored answers are right and wrong."""
    folder = tmp_path_factory.mktemp("report")
    experiment = Experiment(folder, batch_size_eval=4)
    questions = [f"0 2 : 2 4 : 1 3 : 3 5 : 0 5 ? 4 3 : 0 {extra}" for extra in range(NUM_RECORDS)]
    experiment.write("val.json", [{"question": question} | GRAPH for question in questions])
    assert experiment.main() == 0
    report.write_report(experiment.run_dir)
    # What a model with random weights answers is all alike.
    path = experiment.run_dir / "analysis" / "checkpoint_3" / "ablations.json"
    content = json.loads(path.read_text())
    for index, record in enumerate(content["records"]):
        record["correct"] = index % 3 != 0
        record["shortcuts"]["fewer_persons_upstream"] = ("right", "tied", "wrong")[index % 3]
        record["early_stop"] = index % 2
        for answer in record["answers"]:
            answer["prediction"] = str(answer["k"] > index % 4)
    path.write_text(json.dumps(content))
    return experiment.run_dir


@pytest.fixture(scope="module")
def written(run):
    """(the page, the content of ablations.json and of probes.json)"""
    folder = run / "analysis" / "checkpoint_3"
    path = report.write_report(run, baselines=[run])
    assert path == folder / "report.html"
    return path, *(
        json.loads((folder / f"{name}.json").read_text()) for name in ("ablations", "probes")
    )


@pytest.fixture(scope="module")
def browser():
    with Browser() as started:
        started.show_as(1280)
        yield started


@pytest.fixture
def opened(browser, written):
    """The browser, with the report just opened."""
    browser.problems.clear()
    browser.open(written[0].as_uri())
    yield browser
    assert browser.problems == []


def listed(browser):
    return browser.run("[...document.querySelectorAll('#list a')].map(a => +a.dataset.index)")


def text_of(browser, selector):
    return browser.run(f"document.querySelector({selector!r}).textContent")


def choose(browser, element, value):
    """Set a control as a person does who changes it."""
    field = "checked" if isinstance(value, bool) else "value"
    browser.run(
        f"Object.assign(document.getElementById('{element}'), {{{field}: {json.dumps(value)}}})"
        ".dispatchEvent(new Event('input', {bubbles: true}))"
    )


def values_in(browser, table):
    """What the cells of a table stand for, row by row; None where one is no number."""
    rows = browser.run(
        f"[...document.querySelectorAll('#numbers-{table} tbody tr')]"
        ".map(row => [...row.cells].map(cell => cell.dataset.value ?? null))"
    )
    return [[value and number_in(value) for value in row] for row in rows]


def number_in(text):
    """A number, or the two of an interval."""
    low, _, high = text.partition("..")
    return (float(low), float(high)) if high else float(low)


# Without a browser


@pytest.mark.parametrize("browser_path", [None, "/usr/bin/chromium"])
def test_a_run_of_the_tests_without_a_browser_says_so_at_its_end(monkeypatch, browser_path):
    lines = []
    reporter = SimpleNamespace(write_line=lambda line, **markup: lines.append(line))
    monkeypatch.setattr(conftest, "find_chromium", lambda: browser_path)
    conftest.pytest_terminal_summary(reporter)
    assert ["No Chromium was found" in line for line in lines] == [True] * (browser_path is None)


def test_the_page_stands_alone_and_holds_the_files(written):
    path, ablations, probes = written
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    for name in ("ablations", "probes"):
        whole = {"ablations": ablations, "probes": probes}[name]
        shown = page.data[name]
        assert shown == {k: v for k, v in whole.items() if k not in ("records", "indices")}
    assert [record["index"] for record in page.data["records"]] == list(range(NUM_RECORDS))
    sources = [a.get(n) for tag in page.elements.values() for a, _ in tag for n in ("src", "href")]
    assert {source for source in sources if source} == {"#viewer", "data:,"}
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")


def test_no_other_script_may_run(written):
    page = Page(written[0].read_text(encoding="utf-8"))
    (script,) = [text for attributes, text in page.elements["script"] if not attributes]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [a["content"] for a, _ in page.elements["meta"] if "http-equiv" in a]
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def with_nasty_texts(written):
    """What the page would show if every text of the first record were nasty."""
    path, ablations, probes = written
    content = page_data(path.parents[2] / "checkpoint_3", ablations, probes, [])
    record = content["records"][0]
    record |= {"question": NASTY, "gold": NASTY, "steps": [NASTY], "prediction": NASTY}
    record["question_tokens"] = [NASTY] * len(record["question_tokens"])
    record["thoughts"][0]["top"][0][0] = record["graph"]["nodes"][0] = NASTY
    record["answers"][0]["text"] = content["run"]["name"] = NASTY
    return content


def test_no_text_of_the_data_becomes_markup(written):
    content = with_nasty_texts(written)
    page = Page(report.page(content))
    assert page.data == content
    assert len(page.elements["script"]) == 2 and "img" not in page.elements
    assert page.elements["title"][0][1] == NASTY


def test_too_many_questions_are_cut_so_that_the_page_stays_small(written, monkeypatch):
    path, ablations, probes = written
    content = page_data(path.parents[2] / "checkpoint_3", ablations, probes, [])
    whole = len(report.page(content).encode())
    monkeypatch.setattr(report, "MAX_BYTES", whole - 3_000)
    text = report.fitting_page(content)
    kept = Page(text).data["records"]
    assert len(text.encode()) <= whole - 3_000
    assert kept == content["records"][: len(kept)] and 0 < len(kept) < NUM_RECORDS


@pytest.fixture
def copied(written, tmp_path):
    """A copy of the run that a test may change, and its report."""
    run = shutil.copytree(written[0].parents[2], tmp_path / "run")
    return run, run / "analysis" / "checkpoint_3" / "report.html"


@pytest.mark.parametrize(
    "damage", ["nothing", "checkpoint", "data", "broken", "missing", "records"]
)
def test_only_what_is_missing_or_of_another_state_is_measured(copied, written, monkeypatch, damage):
    run, path = copied
    measured, options = [], {}
    for name, content in zip(("ablations", "probes"), written[1:], strict=True):
        monkeypatch.setattr(
            report, f"write_{name}",
            lambda subject, folder, name=name, content=content: measured.append(name) or content,
        )  # fmt: skip
    expected = ["ablations", "probes"]
    if damage == "nothing":
        expected = []
    elif damage == "checkpoint":
        with open(run / "checkpoint_3" / "config.json", "a") as file:
            file.write("\n")
    elif damage == "data":
        for name in expected:
            stored = json.loads(path.with_name(f"{name}.json").read_text())
            stored["data_sha256"] = "0" * 64
            path.with_name(f"{name}.json").write_text(json.dumps(stored))
    elif damage == "broken":
        path.with_name("probes.json").write_text('{"format": 1')
        expected = ["probes"]
    elif damage == "missing":
        path.with_name("ablations.json").unlink()
        expected = ["ablations"]
    else:
        options = {"num_records": 4}
    report.write_report(run, **options)
    assert measured == expected


def test_an_interrupted_report_leaves_the_old_one(copied, monkeypatch, capsys):
    run, path = copied
    before = path.read_bytes()

    def stop(content):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "fitting_page", stop)
    assert report.main([str(run)]) == 130
    assert path.read_bytes() == before
    assert sorted(p.name for p in path.parent.glob("*report*")) == ["report.html"]
    assert "was left as it is" in capsys.readouterr().err


def test_mistakes_are_one_message_and_status_2(copied, tmp_path, capsys):
    run, path = copied
    path.unlink()
    path.mkdir()
    for arguments, words in (
        ([run], "report.html: cannot be written"),
        ([tmp_path / "nowhere"], "does not exist"),
        ([run, "--baselines", tmp_path], "name the folder of a training run"),
        ([run, "--data", tmp_path / "none.json"], "cannot be read"),
        ([run, "--records", "0"], "--records 0: must be at least 1"),
        ([run, "--coconut-class", "nothing:Here", "--records", "2"], "there is no module nothing"),
    ):
        assert report.main([str(argument) for argument in arguments]) == 2
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1


# In a browser


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_opens_without_errors_and_fits_the_window(browser, written, width, scheme):
    browser.problems.clear()
    browser.show_as(width, scheme)
    browser.open(written[0].as_uri())
    browser.run("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    browser.settle()
    assert browser.problems == []
    assert browser.run("document.documentElement.scrollWidth") == width
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, background.removeprefix("rgb(").removesuffix(")").split(","))) / 3
    assert (brightness > 128) == (scheme == "light")
    browser.show_as(1280)


@in_browser
def test_the_figures_shown_are_those_of_the_files(opened, written):
    _, ablations, probes = written
    own = ablations["own"]
    assert [row[:2] for row in values_in(opened, "sweep")] == [
        [entry["k"], entry["acc"]] for entry in ablations["sweep"]
    ]
    used = values_in(opened, "used")
    assert used[0][1:3] == [own["acc"], (own["low"], own["high"])]
    names = ("acc", "difference", "p", "num_lost", "num_gained")
    assert [[row[i] for i in (1, 3, 5, 6, 7)] for row in used[1:]] == [
        [entry[name] for name in names] for entry in ablations["replacements"]
    ]
    groups = probes["graph"]["groups"]
    expected = {
        (e["k"], e["mean"], e["n"]) for entries in groups.values() for e in entries if e["n"]
    }
    shown = {(row[1], row[2], row[5]) for row in values_in(opened, "search") if row[5]}
    assert shown == expected
    verdicts = [split for rule in ablations["shortcuts"].values() for split in rule.values()]
    assert [row[2] for row in values_in(opened, "shortcuts")] == [split["n"] for split in verdicts]
    metrics = (written[0].parents[2] / "metrics.jsonl").read_text().splitlines()
    evaluations = [line for line in map(json.loads, metrics) if "eval/acc" in line]
    assert [row[:3] for row in values_in(opened, "curve")] == [
        [line["eval/epoch"] + 1, line["eval/stage"], line["eval/acc"]] for line in evaluations
    ]
    last = f"{100 * evaluations[-1]['eval/acc']:.1f}\u00a0%"
    assert text_of(opened, "#tile-last .figure") == last
    difference = next(e for e in ablations["replacements"] if e["name"] == "other_record")
    shown = text_of(opened, "#tile-used .figure").replace("\u2212", "-")
    assert float(shown) == pytest.approx(100 * difference["difference"], abs=0.051)


@in_browser
def test_filters_filter_and_sorting_sorts(opened, written):
    records = written[1]["records"]
    everything = list(range(NUM_RECORDS))
    assert listed(opened) == everything
    choose(opened, "only-wrong", True)
    wrong = [r["index"] for r in records if not r["correct"]]
    assert listed(opened) == wrong and 0 < len(wrong) < NUM_RECORDS
    assert text_of(opened, "#count") == f"{len(wrong)} of {NUM_RECORDS} questions"
    choose(opened, "only-changing", True)
    changing = [
        r["index"] for r in records
        if len({a["prediction"] for a in r["answers"] if a["k"] <= r["num_thoughts"]}) > 1
    ]  # fmt: skip
    assert listed(opened) == [i for i in wrong if i in changing]
    choose(opened, "only-wrong", False)
    assert listed(opened) == changing and 0 < len(changing) < NUM_RECORDS
    choose(opened, "only-changing", False)
    for verdict in ("tied", "wrong"):
        choose(opened, "shortcut", f"fewer_persons_upstream/{verdict}")
        assert listed(opened) == [
            r["index"] for r in records if r["shortcuts"]["fewer_persons_upstream"] == verdict
        ]
    choose(opened, "shortcut", "")
    choose(opened, "search", ": 0 7")
    assert listed(opened) == [7]
    choose(opened, "search", "no such words")
    assert listed(opened) == [] and "No question fits" in text_of(opened, "#list")
    choose(opened, "search", "")
    choose(opened, "sort", "wrong")
    assert listed(opened) == sorted(everything, key=lambda i: records[i]["correct"])
    choose(opened, "sort", "late")
    assert listed(opened) == sorted(everything, key=lambda i: -records[i]["early_stop"])


@in_browser
def test_arrow_keys_step_questions_and_thoughts_and_the_address_follows(opened):
    def place():
        title = text_of(opened, "#detail-title")
        checked = text_of(opened, "[aria-checked=true]")
        current = opened.run("document.querySelector('#list [aria-current]').dataset.index")
        assert title == f"Question {current}"
        return int(current), int(checked), opened.run("location.hash")

    opened.press("ArrowDown")  # the questions are not in view: this scrolls
    assert place() == (0, 2, "")
    opened.run("document.getElementById('viewer').scrollIntoView()")
    opened.press("ArrowDown")
    opened.press("ArrowDown")
    assert place() == (2, 2, "#id=2&k=2")
    opened.press("ArrowLeft")
    assert place() == (2, 1, "#id=2&k=1")
    opened.press("ArrowUp")
    assert place() == (1, 1, "#id=1&k=1")
    for _ in range(4):
        opened.press("ArrowRight")
    assert place() == (1, 2, "#id=1&k=2")
    choose(opened, "only-wrong", True)
    opened.press("ArrowDown")
    assert place()[0] == 0
    opened.press("ArrowDown")
    assert place()[0] == 3
    opened.press("/")
    opened.press("ArrowDown")
    assert place()[0] == 3
    assert opened.run("document.activeElement.id") == "search"


@in_browser
@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("#id=5&k=1", (5, 1)),
        ("#id=5", (5, 2)),
        ("#id=5&k=99", (5, 2)),
        ("#id=5&k=-3", (5, 0)),
        ("#id=77&k=1", (0, 1)),
        ("#id=x&k=y", (0, 0)),
    ],
)
def test_the_address_restores_question_and_thought(browser, written, address, expected):
    browser.problems.clear()
    browser.open(written[0].as_uri() + address)
    shown = text_of(browser, "#detail-title"), text_of(browser, "[aria-checked=true]")
    assert shown == (f"Question {expected[0]}", str(expected[1]))
    record = written[2]["records"][expected[0]]
    told = text_of(browser, ".stepper [role=status]")
    answers = {answer["k"]: answer for answer in written[1]["records"][expected[0]]["answers"]}
    assert told == f"would answer {answers[expected[1]]['prediction']}"
    rows = browser.run(
        "[...document.querySelectorAll('table.thoughts tbody tr')].map(row =>"
        " [...row.querySelectorAll('.token b')].map(each => each.textContent))"
    )
    # A shared address shows its question at once.
    top = browser.run("document.getElementById('viewer').getBoundingClientRect().top")
    assert -1 < top < 20
    assert rows == [[token.strip() for token, _ in t["top"]] for t in record["thoughts"]]
    assert browser.problems == []


@in_browser
def test_a_node_is_read_and_pinned_by_keyboard(opened, written):
    graph = written[2]["records"][0]["graph"]
    opened.run("document.querySelector('[data-node=\"2\"]').focus()")
    opened.settle()
    values = [row[2] for row in graph["values"]]
    reading = text_of(opened, "#reading")
    assert reading.startswith("2: value ")
    numbers = [float(text) for text in reading.rpartition(": ")[2].split(", ")]
    assert numbers == pytest.approx(values, abs=5e-4)
    opened.press("Enter")
    assert opened.run("document.activeElement.dataset.node") == "2"
    assert opened.run("document.activeElement.getAttribute('aria-pressed')") == "true"
    assert "(pinned)" in text_of(opened, "#reading")
    assert opened.run("location.hash") == "#id=0&k=2&node=2"
    opened.press("ArrowLeft")
    assert "after 1 thought" in text_of(opened, "#reading")
    assert opened.run("document.activeElement.dataset.node") == "2"
    assert opened.run("location.hash") == "#id=0&k=1&node=2"
    opened.press("Enter")
    assert "(pinned)" not in text_of(opened, "#reading")
    assert opened.run("location.hash") == "#id=0&k=1"
    opened.press("Enter")
    opened.press("ArrowDown")
    assert "(pinned)" not in text_of(opened, "#reading")
    assert opened.run("location.hash") == "#id=1&k=1"


@in_browser
@pytest.mark.parametrize(
    ("address", "pinned"),
    [
        ("#id=5&k=1&node=3", "3"),
        ("#id=5&node=0", "0"),
        ("#id=5&k=1&node=99", None),
        ("#id=5&k=1&node=-1", None),
        ("#id=5&k=1&node=1.5", None),
        ("#id=5&k=1&node=length", None),
        ("#id=5&k=1&node=", None),
        ("#id=5&k=1", None),
    ],
)
def test_the_address_restores_the_pinned_node(browser, written, address, pinned):
    browser.problems.clear()
    browser.open(written[0].as_uri() + address)
    shown = "document.querySelector('.node[aria-pressed=true]')?.dataset.node ?? null"
    assert browser.run(shown) == pinned
    assert text_of(browser, "#detail-title") == "Question 5"
    link = "document.querySelector('#list [data-index=\"5\"]').hash"
    assert browser.run(link).endswith("" if pinned is None else f"&node={pinned}")
    assert "node" not in browser.run("document.querySelector('#list [data-index=\"4\"]').hash")
    assert browser.problems == []


@in_browser
def test_the_raw_json_is_one_click_away(opened, written):
    opened.run("document.querySelector('[data-focus=raw]').click()")
    opened.settle()
    shown = json.loads(text_of(opened, "#raw pre"))
    assert shown["answers"] == written[1]["records"][0]["answers"]
    assert shown["question"] == written[2]["records"][0]["question"]


@in_browser
def test_every_control_is_reached_by_tab_with_visible_focus_and_has_a_name(opened):
    reached = []
    for _ in range(60):
        opened.press("Tab")
        reached.append(opened.run(
            "(e => [e.id || e.dataset.focus || e.dataset.index || e.dataset.node || e.tagName,"
            " getComputedStyle(e).outlineStyle !== 'none'"
            " || getComputedStyle(e.querySelector('.shape') || e).strokeWidth === '3px',"
            " Boolean(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length)]"
            ")(document.activeElement)"
        ))  # fmt: skip
    # Past its last control the page itself has the focus.
    assert [each for each in reached if not all(each[1:]) and each[0] != "BODY"] == []
    names = {name for name, *_ in reached}
    controls = {"search", "only-wrong", "only-changing", "shortcut", "sort", "previous", "next"}
    assert controls | {"raw", "k2", "0", "SUMMARY"} <= names
    drawings = opened.run(
        "[...document.querySelectorAll('svg')].filter(e => !e.getAttribute('aria-label')).length"
    )
    assert drawings == 0


@in_browser
def test_nasty_texts_are_shown_as_they_are(browser, written, tmp_path):
    path = tmp_path / "nasty.html"
    path.write_text(report.page(with_nasty_texts(written)), encoding="utf-8")
    browser.problems.clear()
    browser.open(path.as_uri())
    assert text_of(browser, "h1") == NASTY
    assert NASTY in text_of(browser, ".question")
    assert NASTY in text_of(browser, ".facts") and NASTY in text_of(browser, ".answers")
    assert browser.run("document.querySelectorAll('img').length") == 0
    assert browser.problems == []
