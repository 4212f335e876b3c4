"""Probes, ablations and pictures of trained runs. Training never imports from here.

Run as modules from the root of the repository: `python -m scripts.quickstart --help`.
"""
