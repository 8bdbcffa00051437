"""Benchmarks of one GRPO step; see scripts/bench_step.py."""
