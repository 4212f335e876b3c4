"""Speed and memory, each figure with the environment it was measured in. Nothing imports from here.

Run as modules from the root of the repository: `python -m benchmarks.train_step --help`. Contenders
of one table take turns in one process (benchmarks.memory: one process each), so that noise falls on
all alike. Whether anything is right is the tests' business. Figures stand in docs/performance.md.
"""
