"""Reading data files: valid records (docs/specification.md, section 1), or an error that names what
is wrong with them.
"""

import gzip
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataset import LATENT, MARKERS, read_records
from utils import UserError, sha256_file

GOOD = {"question": "What ?", "answer": "4", "steps": ["1 + 1 = 2", "2 + 2 = 4"]}


def write(folder, value):
    path = folder / "records.json"
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    return str(path)


def refusal(path):
    with pytest.raises(UserError) as caught:
        read_records(path)
    return str(caught.value)


def test_records_keep_their_three_fields_and_order(tmp_path):
    other = {"steps": [], "answer": "größer →", "question": "\u2028?", "root": 3, "edges": [[1]]}
    assert read_records(write(tmp_path, [GOOD, other])) == [
        GOOD,
        {"question": "\u2028?", "answer": "größer →", "steps": []},
    ]


def test_records_carry_the_sum_of_the_bytes_they_were_read_from(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbf" + json.dumps([GOOD] * 2).encode())
    assert read_records(path, 1).sha256 == sha256_file(path)


def test_utf8_with_and_without_byte_order_mark(tmp_path):
    raw = '[{"question": "größer?", "answer": "→", "steps": []}]'.encode()
    assert read_records(write(tmp_path, raw)) == read_records(
        write(tmp_path, b"\xef\xbb\xbf" + raw)
    )


def test_blank_steps_are_dropped_and_their_number_logged(tmp_path, caplog):
    caplog.set_level("INFO")
    steps = [["", "a", " \n"], [""], ["b"]]
    path = write(tmp_path, [{**GOOD, "steps": texts} for texts in steps])
    assert [record["steps"] for record in read_records(path)] == [["a"], [], ["b"]]
    assert caplog.messages == [f"{path}: dropped 3 blank steps"]


def test_without_blank_steps_nothing_is_logged(tmp_path, caplog):
    caplog.set_level("INFO")
    read_records(write(tmp_path, [GOOD]))
    assert caplog.messages == []


LINE = json.dumps(GOOD)
OTHER = {"question": "a\u2028b?", "answer": "5", "steps": []}
LINES = f"{LINE}\n{json.dumps(OTHER, ensure_ascii=False)}\n"


@pytest.mark.parametrize("name", ["records.json", "records.jsonl"])
@pytest.mark.parametrize(
    "text",
    [
        LINES,
        LINES.rstrip("\n"),
        LINES.replace("\n", "\r\n"),
        LINES.replace("\n", "\n\n"),
        "\ufeff" + LINES,
        LINES.replace("\n", "\n\ufeff", 1),  # two files with marks, one after the other
        f"[{LINES.strip().replace(chr(10), ',')}]",
    ],
)
def test_one_object_a_line_reads_as_a_list_does(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text.encode())
    assert read_records(str(path)) == [GOOD, OTHER]


@pytest.mark.parametrize("name", ["records.json", "records.jsonl"])
def test_a_single_line_is_json_lines_too(tmp_path, name):
    path = tmp_path / name
    path.write_text(LINE)
    assert read_records(str(path)) == [GOOD]


def test_lines_that_are_not_json_are_named_and_counted(tmp_path):
    path = write(tmp_path, f"{LINE}\n{{oops\n\n{LINE},\n{LINE[:30]}\n".encode())
    assert refusal(path).splitlines() == [
        f"{path}: line 2, column 2: Expecting property name enclosed in double quotes",
        f"{path}: line 4, column {len(LINE) + 1}: there is a comma after the object; remove it",
        f"{path}: line 5, column 24: it ends too early, like a truncated copy; copy it or make it"
        " again",
        f"{path}: 3 faults in all; expected one JSON object a line",
    ]


@pytest.mark.parametrize("limit, kept", [(1, 1), (2, 2), (5, 3), (None, 3)])
def test_limit_keeps_the_first_records(tmp_path, limit, kept):
    raw = [{**GOOD, "answer": str(i)} for i in range(3)]
    assert read_records(write(tmp_path, raw), limit) == raw[:kept]


def test_missing_file(tmp_path):
    path = str(tmp_path / "none.json")
    assert refusal(path) == (
        f"{path}: cannot be read (No such file or directory);"
        " README's Data section says how to make it"
    )


def test_directory_instead_of_a_file(tmp_path):
    assert f"{tmp_path}: cannot be read (Is a directory)" in refusal(str(tmp_path))


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_not_utf8_names_the_byte_in_the_file(tmp_path, start):
    raw = start + "[é]".encode("latin-1")
    path = write(tmp_path, raw)
    assert refusal(path) == f"{path}: is not UTF-8 at byte {raw.index(0xE9)}; save it as UTF-8"


@pytest.mark.parametrize(
    "raw, reason",
    [
        (b'[{"question": "a",\n "answer" "b"}]', "line 2, column 11: Expecting ':' delimiter"),
        (b"[1] [2]", "line 1, column 5: Extra data"),
        (b'[{"question": "a', "line 1, column 15: it ends too early, like a truncated copy"),
        (b'[{"question": "a"},\n', "line 2, column 1: it ends too early"),
        (b"[1,\n2,\n]", "line 2: there is a comma before a closing bracket; remove it"),
        (b'[{"question": "a",\n}\n]', "line 1: there is a comma before a closing bracket"),
        (b"[[1],\n[2]\n, ]", "line 3: there is a comma before a closing bracket"),
        (b"1 + 2||<<1+2=3>> #### 3\n", "it is GSM8K's text format; convert it with"),
        (b"[" + b"1" * 5000 + b"]", "Exceeds the limit"),
        (b"[" * 100_000, "maximum recursion depth exceeded"),
        (b'{"a":' * 100_000, "maximum recursion depth exceeded"),
    ],
)
def test_broken_json(tmp_path, raw, reason):
    path = write(tmp_path, raw)
    message = refusal(path)
    assert message.startswith(f"{path}: is not JSON (")
    assert reason in message


@pytest.mark.parametrize(
    "raw, kind",
    [
        (b"", "is empty; README's Data section says how to make it"),
        (b" \n", "is empty; "),
        (b"\xef\xbb\xbf", "is empty; "),
        ('[{"question": "a"}]'.encode("utf-16"), "is UTF-16; save it as UTF-8"),
        (gzip.compress(b"[]", mtime=0), "is a gzip archive; unpack it"),
        (b"<!DOCTYPE html>", "is HTML or XML, as failed downloads leave it; download it again"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS; fetch"),
        (b'{"example1": {"test_example": {}}}', "is ProntoQA as its generator writes it; convert"),
    ],
)
def test_other_files_are_called_what_they_are(tmp_path, raw, kind):
    path = write(tmp_path, raw)
    assert refusal(path).startswith(f"{path}: {kind}")


@pytest.mark.parametrize(
    "value, got",
    [
        ([], "an empty list"),
        ({}, "an object"),
        ({"data": [GOOD]}, "an object"),
        ("text", "text"),
        (3, "a number"),
        (None, "null"),
    ],
)
def test_top_level_must_be_a_list_of_records(tmp_path, value, got):
    path = write(tmp_path, value)
    assert refusal(path) == f"{path}: holds {got}; expected a list of at least one record"


OBJECT = "an object with question, answer and steps"
FIELDS = "question, answer and steps"


def without(field):
    return {name: value for name, value in GOOD.items() if name != field}


BAD_RECORDS = [
    ("text", f"the record is text; expected {OBJECT}"),
    ([GOOD], f"the record is a list; expected {OBJECT}"),
    (None, f"the record is null; expected {OBJECT}"),
    (2.5, f"the record is a number; expected {OBJECT}"),
    (without("question"), f"question is missing; expected {FIELDS}"),
    (without("answer"), f"answer is missing; expected {FIELDS}"),
    (without("steps"), f"steps is missing; expected {FIELDS}"),
    ({**GOOD, "question": 3}, "question is a number; expected text"),
    ({**GOOD, "question": None}, "question is null; expected text"),
    ({**GOOD, "question": " \n"}, "question is blank; expected text"),
    ({**GOOD, "answer": 4}, "answer is a number; expected text"),
    ({**GOOD, "answer": True}, "answer is a boolean; expected text"),
    ({**GOOD, "answer": {"a": "b"}}, "answer is an object; expected text"),
    ({**GOOD, "answer": ""}, "answer is blank; expected text"),
    ({**GOOD, "steps": "1 + 1"}, "steps is text; expected a list of texts"),
    ({**GOOD, "steps": None}, "steps is null; expected a list of texts"),
    ({**GOOD, "steps": {"0": "a"}}, "steps is an object; expected a list of texts"),
    ({**GOOD, "steps": ["a", 5]}, "steps[1] is a number; expected text"),
    ({**GOOD, "steps": [["a"]]}, "steps[0] is a list; expected text"),
    ({**GOOD, "steps": ["a", None]}, "steps[1] is null; expected text"),
]
HALF_PAIR = "a\ud800"
for marker in MARKERS:
    fault = f" holds the marker {marker}; expected text without it"
    BAD_RECORDS.append(({**GOOD, "question": f"a{marker}b"}, f"question{fault}"))
    BAD_RECORDS.append(({**GOOD, "answer": marker}, f"answer{fault}"))
    BAD_RECORDS.append(({**GOOD, "steps": ["a", f"b {marker}"]}, f"steps[1]{fault}"))
fault = " holds half a surrogate pair; expected valid Unicode text"
BAD_RECORDS.append(({**GOOD, "question": HALF_PAIR}, f"question{fault}"))
BAD_RECORDS.append(({**GOOD, "answer": HALF_PAIR}, f"answer{fault}"))
BAD_RECORDS.append(({**GOOD, "steps": ["a", "b", HALF_PAIR]}, f"steps[2]{fault}"))


@pytest.mark.parametrize("record, message", BAD_RECORDS)
def test_bad_record_is_named_with_its_field_and_what_was_expected(tmp_path, record, message):
    path = write(tmp_path, [GOOD, record, GOOD])
    assert refusal(path) == f"{path}: record 1: {message}"


def test_all_faults_of_a_record_are_named(tmp_path):
    path = write(tmp_path, [GOOD, {"question": 3}])
    assert refusal(path).splitlines() == [
        f"{path}: record 1: answer is missing; expected {FIELDS}",
        f"{path}: record 1: steps is missing; expected {FIELDS}",
        f"{path}: record 1: question is a number; expected text",
        f"{path}: 3 faults in all",
    ]


def test_the_first_ten_faults_are_shown_and_all_are_counted(tmp_path):
    path = write(tmp_path, [GOOD, *["text"] * 25])
    lines = refusal(path).splitlines()
    assert lines[:10] == [
        f"{path}: record {i}: the record is text; expected {OBJECT}" for i in range(1, 11)
    ]
    assert lines[10:] == [f"{path}: 25 faults in all"]


@pytest.mark.parametrize("extra", [LATENT, HALF_PAIR, None, [[[]]]])
def test_extra_fields_may_hold_anything(tmp_path, extra):
    assert read_records(write(tmp_path, [{**GOOD, "extra": extra, HALF_PAIR: 1}])) == [GOOD]


def check_total(path):
    """Reading ends in valid records or in one UserError about this file, never otherwise."""
    try:
        records = read_records(path)
    except UserError as error:
        assert str(error).startswith(f"{path}: ")
        str(error).encode()
        return
    assert records
    for record in records:
        assert set(record) == {"question", "answer", "steps"}
        assert record["question"].strip() and record["answer"].strip()
        assert all(step.strip() for step in record["steps"])
        text = "\n".join([record["question"], record["answer"], *record["steps"]])
        text.encode()
        assert not any(marker in text for marker in MARKERS)


texts = st.text(st.characters(exclude_categories=()), max_size=8) | st.sampled_from(MARKERS)
plain = st.none() | st.booleans() | st.integers() | st.floats() | texts
json_values = st.recursive(
    plain, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=8
)
near_records = st.fixed_dictionaries(
    {},
    optional={
        "question": texts | st.just("Q?") | json_values,
        "answer": texts | st.just("4") | json_values,
        "steps": st.lists(texts, max_size=3) | st.just([]) | json_values,
        "extra": json_values,
    },
)
fuzz = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@fuzz
@given(json_values | st.lists(near_records | json_values, max_size=3))
def test_any_json_gives_valid_records_or_a_user_error(tmp_path, value):
    check_total(write(tmp_path, value))


@fuzz
@given(st.data())
def test_any_bytes_give_valid_records_or_a_user_error(tmp_path, data):
    good = data.draw(st.sampled_from([json.dumps([GOOD]), LINES])).encode()
    begin, end = sorted(data.draw(st.tuples(*[st.integers(0, len(good))] * 2)))
    middle = data.draw(st.binary(max_size=12))
    check_total(
        write(tmp_path, data.draw(st.sampled_from([good[:begin] + middle + good[end:], middle])))
    )
