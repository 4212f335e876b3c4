"""The script that tries faults still works: two of its quick cases pass."""

import os
import subprocess
import sys

import pytest
from runs import ROOT


@pytest.mark.parametrize("only", ["newest state", "NaN in a gradient"])
def test_a_case_passes_and_the_table_says_so(tmp_path, only):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "torture.py"), "--quick", "--only", only],
        capture_output=True, text=True, timeout=290, env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    _, _, row = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert only in row and "| passed" in row
    assert not list(tmp_path.glob("torture-*"))
