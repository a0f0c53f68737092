"""Benchmarks: ``pytest benchmarks/`` times, ``python -m benchmarks.run`` records rows and writes README's table."""
