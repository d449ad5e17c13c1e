"""Benchmarks: one module per op, one harness, one command (`python -m benchmarks`)."""
