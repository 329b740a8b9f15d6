"""Compiling, checking and launching CUDA kernels, whichever family they belong to."""
