"""GSM8K: line conversion, and the download script against a local server that misbehaves."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
DOWNLOAD = ROOT / "preprocessing/gsm_icot.bash"
SHARED = ROOT.parent / "shared/data/gsm8k"
BASH = shutil.which("bash")
needs_curl = pytest.mark.skipif(not (BASH and shutil.which("curl")), reason="needs bash and curl")

spec = importlib.util.spec_from_file_location("gsm_icot", ROOT / "preprocessing/gsm_icot.py")
gsm_icot = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gsm_icot)


# Lines


def test_line_becomes_question_steps_answer():
    assert gsm_icot.parse_line("How many?||<<16-3-4=9>> <<9*2=18>> #### 18") == {
        "question": "How many?",
        "steps": ["<<16-3-4=9>>", "<<9*2=18>>"],
        "answer": "18",
    }


def test_line_without_equations_has_no_steps():
    assert gsm_icot.parse_line("How many?|| #### 26")["steps"] == []


def test_adjacent_equations_and_blanks_inside_are_kept_apart():
    assert gsm_icot.parse_line("Q||<<1 + 1=2>><<2*3=6>>  #### 6")["steps"] == [
        "<<1 + 1=2>>",
        "<<2*3=6>>",
    ]


def test_carriage_return_before_the_newline_is_harmless():
    records, problems = gsm_icot.convert(b"Q||<<1+1=2>> #### 2\r\nP|| #### 3\r\n")
    assert problems == [] and [r["answer"] for r in records] == ["2", "3"]


def test_a_byte_order_mark_and_carriage_returns_stay_out_of_the_records():
    raw = b"\xef\xbb\xbfHas he two?||<<1+1=2>> #### 2\r\nHas she?|| #### 3\r\n"
    assert gsm_icot.convert(raw) == (
        [
            {"question": "Has he two?", "steps": ["<<1+1=2>>"], "answer": "2"},
            {"question": "Has she?", "steps": [], "answer": "3"},
        ],
        [],
    )


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r"])
def test_only_the_newline_character_ends_a_line(separator):
    line = f"One{separator}two?||<<1+1=2>> #### 2\n"
    records, problems = gsm_icot.convert(line.encode() * 2)
    assert problems == [] and [r["question"] for r in records] == [f"One{separator}two?"] * 2


@pytest.mark.parametrize("ending", [b"", b"\n"])
def test_last_line_may_lack_its_newline(ending):
    records, problems = gsm_icot.convert(b"Q|| #### 1\nP|| #### 2" + ending)
    assert len(records) == 2 and problems == []


BAD_LINES = [
    (b"", r"0 times '\|\|', wanted once"),
    (b"no bars #### 3", r"0 times '\|\|', wanted once"),
    (b"a||b||<<1+1=2>> #### 2", r"2 times '\|\|', wanted once"),
    (b"Q||<<1+1=2>>", "0 times '####' after .*, wanted once"),
    (b"Q||<<1+1=2>> #### 2 #### 3", "2 times '####' after .*, wanted once"),
    (b" ||<<1+1=2>> #### 2", "the question before .* is empty"),
    (b"Q||<<1+1=2>> #### ", "the answer after '####' is empty"),
    (b"Q||One and one is 2. #### 2", "'One and one is 2.' outside .*add --sentences"),
    (b"Q||<<1+1=2 #### 2", "'<<1.1=2' outside"),
    (b"Q||1+1=2>> #### 2", "'1.1=2>>' outside"),
    (b"Q||<< >> #### 2", "empty or unbalanced"),
    (b"Q||<<1+1 <<1+1=2>> #### 2", "empty or unbalanced"),
    (b"Q\xff||<<1+1=2>> #### 2", "not UTF-8 at byte 1"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_malformed_line_is_reported_with_its_number(line, message):
    records, problems = gsm_icot.convert(b"Q|| #### 1\n" + line + b"\nP|| #### 2\n")
    assert len(records) == 2 and len(problems) == 1
    assert re.match(f"line 2: .*{message}|line 2: {message}", problems[0])


@settings(max_examples=100, deadline=None)
@given(st.binary() | st.text(alphabet="|#<>= a1.\n\r\u2028").map(str.encode), st.booleans())
def test_any_bytes_are_converted_or_reported(raw, sentences):
    records, problems = gsm_icot.convert(raw, sentences)
    text = raw.removeprefix(b"\xef\xbb\xbf")
    num_lines = len(text.removesuffix(b"\n").split(b"\n")) if text else 0
    assert len(records) + len(problems) == num_lines


# Sentence steps


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("He has 3.  She has 4! Has he 7? Yes", ["He has 3.", "She has 4!", "Has he 7?", "Yes"]),
        ("It costs $3.50 or .5 of 7. Fine.", ["It costs $3.50 or .5 of 7.", "Fine."]),
        ("Mr. and Mrs. Hill pay Dr. Fox 5. Done.", ["Mr. and Mrs. Hill pay Dr. Fox 5.", "Done."]),
        (
            "Fruit, e.g. pears, plums, etc. cost 2. So 4.",
            ["Fruit, e.g. pears, plums, etc. cost 2.", "So 4."],
        ),
        (
            "At 7 a.m. (i.e. early) 20 sq. ft. are done. Next.",
            ["At 7 a.m. (i.e. early) 20 sq. ft. are done.", "Next."],
        ),
        ("1. Add 2+2=4. 2. Double it.", ["1. Add 2+2=4.", "2. Double it."]),
        ("It is 1+1=2 He pays 2", ["It is 1+1=2 He pays 2"]),
        ("  ", []),
    ],
)
def test_sentence_ends_at_a_mark_before_a_blank(text, sentences):
    assert gsm_icot.split_sentences(text) == sentences


def test_sentences_keep_every_word():
    text = "Mr. Lee has 2.5 kg. He eats 1! Why? 1. Unknown etc. and so on"
    assert " ".join(gsm_icot.split_sentences(text)) == text


# Files


def run_main(tmp_path: Path, raw: bytes, *options: str) -> tuple[int, Path]:
    source, target = tmp_path / "in.txt", tmp_path / "out.json"
    source.write_bytes(raw)
    arguments = ["x", "--input", str(source), "--output", str(target), *options]
    return gsm_icot.main(arguments), target


def test_malformed_lines_stop_the_conversion_and_nothing_is_written(tmp_path, capsys):
    status, target = run_main(tmp_path, b"Q|| #### 1\nbad\nP|| #### 2\nworse #### 1\n")
    errors = capsys.readouterr().err
    assert status == 2 and not target.exists() and list(tmp_path.iterdir()) == [tmp_path / "in.txt"]
    assert "in.txt: line 2: " in errors and "in.txt: line 4: " in errors
    assert "malformed lines: 2; nothing written" in errors


def test_skip_bad_drops_and_counts_malformed_lines(tmp_path, capsys):
    status, target = run_main(tmp_path, b"Q|| #### 1\nbad\nP|| #### 2\n", "--skip-bad")
    captured = capsys.readouterr()
    assert status == 0 and len(json.loads(target.read_text())) == 2
    assert "line 2: " in captured.err and "malformed lines skipped: 1" in captured.out


def test_many_malformed_lines_are_capped(tmp_path, capsys):
    assert run_main(tmp_path, b"Q|| #### 1\n" + b"bad\n" * 100)[0] == 2
    errors = capsys.readouterr().err
    assert errors.count("wanted once") == 20 and "and 80 more malformed lines" in errors


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is empty; fetch the data: bash preprocessing/gsm_icot.bash"),
        (b"\xef\xbb\xbf", "is empty; fetch the data"),
        (b"bad\n" * 100, r"none of its 100 lines reads question\|\|steps.*; line 1: 0 times"),
        (b'[{"question": "Q",}]', "is JSON, perhaps converted already; wanted lines question"),
        (b"Q||Two. #### 2\n", "none of its 1 lines .* add --sentences"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, not the file"),
        (b"\x1f\x8b\x08", "is a gzip archive; fetch the data"),
        (b"\n <!DOCTYPE html><html>", "is an HTML page; fetch the data"),
        ("Q|| #### 1".encode("utf-16"), "is text in UTF-16; fetch the data"),
    ],
)
def test_a_file_of_another_kind_gets_one_message(tmp_path, capsys, raw, message):
    status, target = run_main(tmp_path, raw, "--skip-bad")
    error = capsys.readouterr().err
    assert status == 2 and not target.exists()
    assert re.search(f"in.txt: {message}", error) and error.count("\n") == 1


def test_missing_file_names_the_download_script(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert gsm_icot.main(["train"]) == 2
    assert "data/gsm_train.txt: cannot be read (No such file" in (error := capsys.readouterr().err)
    assert "bash preprocessing/gsm_icot.bash" in error


def test_earlier_json_survives_a_failed_conversion(tmp_path):
    target = tmp_path / "out.json"
    target.write_text("old")
    assert run_main(tmp_path, b"bad\n")[0] == 2
    assert target.read_text() == "old"


@pytest.mark.skipif(not SHARED.exists(), reason="the real files are not here")
def test_real_files_give_all_their_records(tmp_path):
    equations, problems = gsm_icot.convert((SHARED / "valid.txt").read_bytes())
    assert problems == [] and len(equations) == 500
    assert sum(record["steps"] == [] for record in equations) == 6
    sentences, problems = gsm_icot.convert((SHARED / "train_no_aug.txt").read_bytes(), True)
    assert problems == [] and len(sentences) == 6973
    assert all(record["steps"] for record in sentences)
    assert sum(record["question"].count("\u2028") for record in sentences) == 2


# Download

FILES = {
    f"{name}.txt": "".join(
        f"{name} {i}?||<<{i}+1={i + 1}>> #### {i + 1}\n" for i in range(300)
    ).encode()
    for name in ("train", "valid", "test")
}
HTML = b"<html>Sign in to the network</html>"


class Server(ThreadingHTTPServer):
    """Serves FILES; `fault` makes train.txt misbehave, and `requests` lists (path, range)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault = ""
        self.requests: list[tuple[str, str | None]] = []
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def ranges(self) -> list[str | None]:
        return [asked for path, asked in self.requests if path == "train.txt"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        name, asked = self.path.rpartition("/")[2], self.headers.get("Range")
        self.server.requests.append((name, asked))
        fault = self.server.fault if name == "train.txt" else ""
        if fault in ("404", "503"):
            self.answer(int(fault), HTML, HTML)
        elif fault == "html":
            self.answer(200, HTML, HTML)
        elif fault == "wrong file":
            self.answer_range(FILES["valid.txt"], asked)
        elif fault == "no ranges":
            self.answer(200, FILES[name], FILES[name])
        elif fault in ("cut short", "cut short once", "stall"):
            if fault == "cut short once":
                self.server.fault = ""
            self.answer_range(FILES[name], asked, sent_bytes=1000)
            if fault == "stall":
                self.server.closing.wait(20)
        else:
            self.answer_range(FILES[name], asked)

    def answer_range(self, content: bytes, asked: str | None, sent_bytes: int | None = None):
        start = int(re.search(r"\d+", asked).group()) if asked else 0
        if start >= len(content):
            self.answer(416, b"", b"")
            return
        rest = content[start:]
        where = f"bytes {start}-{len(content) - 1}/{len(content)}" if asked else None
        self.answer(206 if asked else 200, rest, rest[:sent_bytes], where)

    def answer(self, status: int, body: bytes, sent: bytes, where: str | None = None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if where:
            self.send_header("Content-Range", where)
        self.end_headers()
        self.wfile.write(sent)
        self.wfile.flush()
        self.close_connection = True


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()
    thread.join()


def download(folder: Path, server: Server | str, **changes: str) -> subprocess.CompletedProcess:
    """Run the script in `folder` against a mirror, checking the sums of FILES."""
    sums = folder / "sums"
    sums.write_text(
        "".join(f"{hashlib.sha256(body).hexdigest()}  {name}\n" for name, body in FILES.items())
    )
    environment = {
        **os.environ,
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "GSM_ICOT_MIRROR": server if isinstance(server, str) else server.url,
        "GSM_ICOT_SUMS": str(sums),
        "GSM_ICOT_TRIES": "1",
        "GSM_ICOT_STALL_S": "20",
        "PYTHON": sys.executable,
        **changes,
    }
    return subprocess.run(
        [BASH, str(DOWNLOAD)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def refused(result: subprocess.CompletedProcess, message: str) -> None:
    assert result.returncode == 2, result
    assert result.stderr.count("\n") == 1, result.stderr
    assert re.search(message, result.stderr), result.stderr


def complete(folder: Path) -> bool:
    texts = {f"gsm_{name}" for name in FILES}
    names = texts | {text.replace(".txt", ".json") for text in texts}
    data = folder / "data"
    return {path.name for path in data.iterdir()} == names and all(
        (data / f"gsm_{name}").read_bytes() == body for name, body in FILES.items()
    )


@needs_curl
def test_download_gives_verified_text_and_json(tmp_path, server):
    result = download(tmp_path, server)
    assert result.returncode == 0, result.stderr
    assert complete(tmp_path)
    records = json.loads((tmp_path / "data/gsm_train.json").read_text())
    assert len(records) == 300 and records[0]["steps"] == ["<<0+1=1>>"]


@needs_curl
def test_second_run_fetches_nothing(tmp_path, server):
    download(tmp_path, server)
    server.requests.clear()
    assert download(tmp_path, server).returncode == 0
    assert server.requests == [] and complete(tmp_path)


@needs_curl
def test_transfer_cut_short_is_continued_by_the_next_attempt(tmp_path, server):
    server.fault = "cut short once"
    result = download(tmp_path, server, GSM_ICOT_TRIES="2")
    assert result.returncode == 0, result.stderr
    assert server.ranges() == [None, "bytes=1000-"] and complete(tmp_path)


@needs_curl
@pytest.mark.parametrize("fault", ["cut short", "stall"])
def test_aborted_transfer_leaves_no_final_file_and_the_next_run_continues(tmp_path, server, fault):
    server.fault = fault
    wanted = {"cut short": "cut short", "stall": "stalled"}[fault]
    result = download(tmp_path, server, GSM_ICOT_STALL_S="2" if fault == "stall" else "20")
    refused(result, f"train.txt: the transfer .*{wanted}; .*GSM_ICOT_MIRROR")
    assert not (tmp_path / "data/gsm_train.txt").exists()
    assert not list(tmp_path.glob("data/*.json"))
    assert (tmp_path / "data/gsm_train.txt.part").stat().st_size == 1000
    server.fault = ""
    assert download(tmp_path, server).returncode == 0
    assert server.ranges() == [None, "bytes=1000-"] and complete(tmp_path)


@needs_curl
def test_error_status_is_one_message_and_a_refusal_is_not_repeated(tmp_path, server):
    server.fault = "404"
    refused(download(tmp_path, server, GSM_ICOT_TRIES="3"), "the server answered 404")
    assert len(server.ranges()) == 1
    server.fault = "503"
    refused(download(tmp_path, server, GSM_ICOT_TRIES="2"), "the server answered 503")
    assert len(server.ranges()) == 3
    assert not list(tmp_path.glob("data/gsm_train*"))


@needs_curl
@pytest.mark.parametrize("fault", ["html", "wrong file"])
def test_other_content_is_refused_by_its_checksum_and_removed(tmp_path, server, fault):
    server.fault = fault
    refused(download(tmp_path, server), "train.txt: sha256 is [0-9a-f]{64}, wanted [0-9a-f]{64}")
    assert not list(tmp_path.glob("data/gsm_train*"))


@needs_curl
def test_mirror_must_match_the_published_sums(tmp_path, server):
    refused(download(tmp_path, server, GSM_ICOT_SUMS=""), "valid.txt: .*wanted 04f9bddfe8ac4846")


@needs_curl
def test_server_without_ranges_is_fetched_from_the_beginning(tmp_path, server):
    server.fault = "no ranges"
    (tmp_path / "data").mkdir()
    (tmp_path / "data/gsm_train.txt.part").write_bytes(FILES["train.txt"][:500])
    result = download(tmp_path, server, GSM_ICOT_TRIES="2")
    assert result.returncode == 0, result.stderr
    assert complete(tmp_path)


@needs_curl
@pytest.mark.parametrize("stale", [b"junk" * 100, b"junk" * 10_000], ids=["short", "long"])
def test_wrong_beginning_of_an_earlier_run_is_discarded(tmp_path, server, stale):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/gsm_train.txt.part").write_bytes(stale)
    result = download(tmp_path, server, GSM_ICOT_TRIES="2")
    assert result.returncode == 0, result.stderr
    assert complete(tmp_path)


@needs_curl
def test_complete_part_is_accepted_without_a_request(tmp_path, server):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/gsm_train.txt.part").write_bytes(FILES["train.txt"])
    assert download(tmp_path, server).returncode == 0
    assert server.ranges() == [] and complete(tmp_path)


@needs_curl
def test_unreachable_server_is_one_message(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        refused(download(tmp_path, url), "the server cannot be reached .*check the network")
    assert list((tmp_path / "data").iterdir()) == []


@needs_curl
def test_other_file_under_the_final_name_is_left_alone(tmp_path, server):
    (tmp_path / "data").mkdir()
    own = tmp_path / "data/gsm_train.txt"
    own.write_text("mine")
    refused(download(tmp_path, server), "data/gsm_train.txt: exists but is not the expected file")
    assert own.read_text() == "mine"


@needs_curl
def test_faulty_sums_file_is_one_message(tmp_path, server):
    refused(download(tmp_path, server, GSM_ICOT_SUMS="/none"), "/none: cannot be read")
    empty = tmp_path / "empty"
    empty.touch()
    refused(download(tmp_path, server, GSM_ICOT_SUMS=str(empty)), "empty: no sum for valid.txt")


@needs_curl
@pytest.mark.parametrize(
    ("tools", "message"),
    [
        (["dirname"], "curl is missing"),
        (["dirname", "curl"], "python3 is missing"),
        (["dirname", "curl", "python3"], "sha256sum and shasum are missing"),
    ],
)
def test_missing_tool_is_one_message(tmp_path, tools, message):
    tool_folder = tmp_path / "bin"
    tool_folder.mkdir()
    for tool in tools:
        (tool_folder / tool).symlink_to(shutil.which(tool))
    result = download(tmp_path, "http://127.0.0.1:9", PATH=str(tool_folder), PYTHON="python3")
    refused(result, message)
    assert not (tmp_path / "data").exists()


@needs_curl
@pytest.mark.parametrize("name", ["GSM_ICOT_TRIES", "GSM_ICOT_STALL_S"])
def test_setting_that_is_not_a_positive_number_is_refused(tmp_path, name):
    result = download(tmp_path, "http://127.0.0.1:9", **{name: "0"})
    refused(result, "GSM_ICOT_TRIES='.*', GSM_ICOT_STALL_S='.*': wanted whole numbers")
