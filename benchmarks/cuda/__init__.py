"""The CUDA kernels against MLX's SDPA and cuDNN, profiled and sanitized; needs a GPU."""
