"""Measuring: the clock, the rounds, accuracy against float64, and the device."""
