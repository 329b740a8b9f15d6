"""The attention engine: implementations, kernels, and an honest way of measuring them."""
