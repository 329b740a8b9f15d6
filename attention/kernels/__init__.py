"""The custom kernels: for each backend, its text in its own language beside the Python that builds and launches it."""
