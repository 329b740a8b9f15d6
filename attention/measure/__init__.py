"""Measurement: clock, rounds and accuracy."""
