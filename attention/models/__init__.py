"""Whole models: generation and fine-tuning with each implementation in the place of the model's own attention."""
