"""Monitoring: the attention calls of a user's own program, counted and sampled."""
