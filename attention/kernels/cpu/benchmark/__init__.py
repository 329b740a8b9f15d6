"""The CPU kernel against torch's and MLX's attention and against the machine, and what was asked of it.

`python -m attention.kernels.cpu.benchmark` measures everything in one run and says of each figure whether it holds.
"""
