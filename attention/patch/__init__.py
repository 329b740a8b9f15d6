"""MLX's attention in mlx-lm's models, replaced by an implementation while a context is open.

`attention.patch_mlx_lm` opens it in a program; `python -m attention.patch SCRIPT` does so around a program as it is.
"""
