"""Benchmarks of attention over several devices."""
