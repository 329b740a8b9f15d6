"""Custom kernels: for each backend the kernel sources and the Python code that builds and launches them."""
