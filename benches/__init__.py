"""Benchmarks, one file per op. `pytest benches --benchmark-only`, `python -m benches ratios`, `... report FILE`."""
