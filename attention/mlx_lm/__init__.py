"""Models of mlx-lm: patching their attention, generation and fine-tuning with each implementation."""
