# Two commands on a machine with python3, make and git: `make quickstart` and `make test`.
# Each installs what it needs into .venv once.

PYTHON := .venv/bin/python

.PHONY: quickstart test torture clean

quickstart: .venv/installed
	$(PYTHON) -m scripts.quickstart

# Two workers with one thread each: the models are too tiny for threads to help.
test: .venv/installed
	$(PYTHON) -m ruff check .
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadgroup

# Kills, full disks, damaged files, hanging ranks: prints a table of what a run survives
# (docs/faults.md).
torture: .venv/installed
	OMP_NUM_THREADS=1 $(PYTHON) tests/torture.py

.venv/installed: requirements.txt requirements-dev.txt
	python3 -c 'import sys; assert (3, 11) <= sys.version_info < (3, 14), "needs Python 3.11 to 3.13"'
	python3 -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# Removes what `make` installed; runs, data and results stay.
clean:
	rm -rf .venv
