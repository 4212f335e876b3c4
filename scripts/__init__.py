"""Commands beside run.py: `python -m scripts.NAME` or `python scripts/NAME.py` from the root."""
