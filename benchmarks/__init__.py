"""Benchmarks of speed and memory; each report records the environment. Nothing imports from here.

Run as modules from the root of the repository: `python -m benchmarks.train_step --help`. Contenders
in a table take turns in one process (benchmarks.memory: one process each), so that noise affects
all equally. Correctness is left to the tests. Results are in docs/performance.md.
"""
