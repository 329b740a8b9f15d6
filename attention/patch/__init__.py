"""Replace MLX's attention in mlx-lm's models by an implementation while a context is open.

In a program use `attention.patch_mlx_lm`; `python -m attention.patch SCRIPT` runs an unmodified program patched.
"""
