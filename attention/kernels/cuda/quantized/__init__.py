"""CUDA kernels that read quantized keys and values."""
