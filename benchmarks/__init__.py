"""Benchmarks: each is `python -m benchmarks.NAME`, checks its results first and writes CSV with machine, versions and commit."""
