"""The autotuner `demo`: candidates, trials, the file that stores their results, and drift detection on running calls.

It depends on `attention.measure` (a trial checks accuracy); the benchmark run depends on it.
"""
