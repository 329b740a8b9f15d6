from tests.attention.kernels.conftest import compiled_kernel, kernel

__all__ = ["compiled_kernel", "kernel"]
