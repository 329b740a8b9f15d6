"""Counts of what the Metal kernels read, write and multiply."""
