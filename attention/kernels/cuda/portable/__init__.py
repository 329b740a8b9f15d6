"""The CUDA kernels for any GPU from Ampere on: tiles, launches and gradients."""
