"""Benchmarks: `python -m benchmarks.report`, see README.md."""
