"""Measuring: the clock, the rounds, accuracy."""
