"""Chips, and what a call would take on them: sourced figures, a cost model, and its calibration on measured rows.

A prediction is never a measurement: it has its own type, an interval, and the word *predicted* wherever it is shown.
"""
