"""Files of analyses: JSON that can be read back, tables, pictures with the same bytes."""

import csv
import json

import matplotlib.pyplot as plt
import pytest

from analysis import output


def test_results_are_read_back_as_they_were_written(tmp_path):
    content = {"format": 1, "name": "é", "records": [{"a": [1, None]}, {"a": []}], "none": []}
    path = tmp_path / "result.json"
    output.write_json(path, content)
    assert json.loads(path.read_text(encoding="utf-8")) == content
    assert path.read_text(encoding="utf-8").count("\n") == 9


def test_a_result_that_is_not_json_leaves_the_old_one(tmp_path):
    path = tmp_path / "result.json"
    output.write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        output.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_tables_keep_commas_and_empty_cells(tmp_path):
    output.write_csv(tmp_path / "table.csv", [("a", "b"), ("1,2", None)])
    with open(tmp_path / "table.csv", newline="") as file:
        assert list(csv.reader(file)) == [["a", "b"], ["1,2", ""]]


def test_figures_come_as_png_and_svg_with_the_same_bytes_each_time(tmp_path):
    figure, axes = plt.subplots()
    axes.plot([1, 2], label="é")
    axes.legend()
    paths = output.save_figure(figure, tmp_path / "curve")
    assert [path.name for path in paths] == ["curve.png", "curve.svg"]
    before = [path.read_bytes() for path in paths]
    output.save_figure(figure, tmp_path / "curve")
    assert [path.read_bytes() for path in paths] == before
    assert before[0].startswith(b"\x89PNG") and b"<svg" in before[1]
    plt.close(figure)


def test_the_sum_of_a_checkpoint_changes_with_its_weights_alone(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"1")
    (tmp_path / "README.md").write_bytes(b"1")
    before = output.checkpoint_sha256(tmp_path)
    (tmp_path / "README.md").write_bytes(b"2")
    assert output.checkpoint_sha256(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert output.checkpoint_sha256(tmp_path) != before
