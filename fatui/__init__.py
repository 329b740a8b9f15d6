"""fatui: a terminal lab for attention kernels on MLX."""

__version__ = "0.1.0"
