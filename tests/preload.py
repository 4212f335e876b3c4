"""What the server of runs.py imports before it forks: everything a run does."""

import conftest  # noqa: F401

import run  # noqa: F401
from engine import trainer  # noqa: F401
