from tests.support.compiled_kernel import compiled_kernel, kernel

__all__ = ["compiled_kernel", "kernel"]
