"""The script that tries faults stays alive: its quick form runs, and no row of it is bad."""

import os
import subprocess
import sys

import pytest
from runs import ROOT


@pytest.mark.timeout(900)
def test_every_fault_is_survived_once(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "torture.py"), "--quick"],
        capture_output=True, text=True, timeout=890, env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    _, _, *rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) == 19 and not [row for row in rows if "| BAD" in row], done.stdout
    assert not list(tmp_path.glob("torture-*"))
