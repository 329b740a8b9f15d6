"""The CUDA kernels for Hopper: tiles, schedules, launches and gradients."""
