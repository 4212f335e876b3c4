"""common.py: any text is read as what it is, and files appear complete or not at all."""

import hashlib
import json
import os
import re

import pytest

from preprocessing import common, describe, prosqa

RECORDS = [
    {"question": "a", "answer": "b", "steps": ["c"]},
    {"question": "d", "answer": "e", "steps": []},
]
LINES = "\n".join(map(json.dumps, RECORDS))
TEXTS = {
    "list": json.dumps(RECORDS),
    "indented list": json.dumps(RECORDS, indent=1),
    "lines": LINES,
    "blank lines": LINES + "\n\n",
    "written by us": common.json_list(RECORDS),
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "mark"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_records_are_the_same_with_any_mark_and_line_ending(tmp_path, text, mark, ending):
    path = tmp_path / "a.json"
    path.write_bytes((mark + text.replace("\n", ending)).encode())
    assert common.read_records(path) == RECORDS


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer"),
        (b"\x1f\x8b\x08\x00", "is a gzip archive"),
        (b"PK\x03\x04\x00", "is a zip archive"),
        (b"PAR1\x00", "is a Parquet file"),
        (json.dumps(RECORDS).encode("utf-16"), "is text in UTF-16"),
        (b"\n<!doctype HTML><p>", "is an HTML page"),
        (b'[{"question": "\xe9"}]', r"is not UTF-8 JSON \(byte 15 is 0xe9\)"),
        (b"[1,\n2,\n]", r"\(line 2 has a comma with nothing after it; delete it\)"),
        (b'[{"question": "a", }]', r"\(line 1 has a comma with nothing after it; delete it\)"),
        (b"[1 2]", r"\(.* at line 1, column 4\)"),
        (b'{"question": "a"}\n{"question": ', r"is not UTF-8 JSON"),
        (b"[" * 100_000, r"is not UTF-8 JSON"),
    ],
)
@pytest.mark.parametrize("script", [describe, prosqa])
def test_a_file_of_another_kind_is_named_with_what_to_do(tmp_path, capsys, script, data, message):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    exclude = ["--out", str(tmp_path / "out"), "--exclude"] if script is prosqa else []
    assert script.main([*exclude, str(path)]) == 2
    error = capsys.readouterr().err
    assert re.search(f"a.json: .*{message}.*; give a (data|ProsQA) file", error)
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_failed_write_leaves_every_old_file_and_nothing_else(tmp_path, monkeypatch):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(common.InputError, match="cannot be written .No space left on device"):
        common.write_all_atomically({old: "x", new: "y"})
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old.json", "old")]


def test_all_files_of_a_call_are_renamed_only_when_all_are_written(tmp_path):
    (tmp_path / "taken").write_text("a file, so no folder")
    with pytest.raises(common.InputError, match="taken"):
        common.write_all_atomically({tmp_path / "a": "x", tmp_path / "taken" / "b": "y"})
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_written_bytes_are_utf8_with_plain_newlines_and_their_sum_is_returned(tmp_path):
    path = tmp_path / "deep" / "a.json"
    digest = common.write_atomically(path, "é\n")
    assert path.read_bytes() == b"\xc3\xa9\n"
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
