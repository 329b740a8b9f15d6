"""Differential fuzzing: every implementation against a float64 reference on random calls of `attention()`.

    python -m tests.fuzz --seed 1 --count 500 --mode forward
    python -m tests.fuzz --family edges --seed 1 --case 17 --mode gradient --impl poc

Case `n` of a seed is the same on every machine. `cases` draws the broad family, `edges` the one aimed at limits of
the algorithms, `patterns` masks as values, `quantized` packed keys and values; `reference` computes in float64, `judge`
checks results, `__main__` runs and counts.
"""
