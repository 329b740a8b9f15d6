"""Benchmark of the CPU kernel against torch's and MLX's attention, the machine's peak, and its performance targets.

`python -m benchmarks.cpu` measures everything in one run and prints whether each target holds.
"""
