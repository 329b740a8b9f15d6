"""Speed of the app, and its overhead on what it measures; in a pty, on the real engine.

Figures are printed: pytest -m slow -n 0 -s tests/fatui/tui/test_speed.py. They need an otherwise idle machine;
`python -m benchmarks.app` prints more of them.
"""

import statistics
import sys

import pytest

from benchmarks.app import FATUI, PAINTED, measure_keys, measure_live, paired_ratios, quantile, summary
from benchmarks.pty_app import PtyApp

pytestmark = [pytest.mark.slow, pytest.mark.quiet]

EMPTY = "from textual.app import App; App().run()"
LAST_CELL = "\x1b[40;1H"
"""Escape sequence that moves to the last line: an empty app draws every line."""
PAIRS = 5


def seconds_to(text, *command):
    """Seconds from the start of a program to a text on its screen."""
    with PtyApp(*command) as app:
        taken = app.read(20, until=text)
        assert taken is not None
        return taken


def test_the_first_paint_is_little_later_than_an_empty_apps():
    seconds_to(PAINTED, *FATUI)  # compiles what Python has not compiled yet
    empty, ours = [], []
    for _ in range(7):
        empty.append(seconds_to(LAST_CELL, sys.executable, "-c", EMPTY))
        ours.append(seconds_to(PAINTED, *FATUI))
    most = 1.3 * statistics.median(empty) + 0.4
    print(f"\nempty {statistics.median(empty):.2f} s, fatui {statistics.median(ours):.2f} s, at most {most:.2f} s")
    assert statistics.median(ours) <= most


def test_a_key_repaints_within_50_ms_beside_a_busy_engine():
    took = [seconds for seconds, _ in measure_keys(150)]
    print("\n" + summary("key to repaint", took))
    assert quantile(took, 0.99) < 0.05


def test_live_takes_at_most_3_percent_of_a_core():
    passed, given = measure_live(15)
    print(f"\n{given.cpu_s / passed:.1%} of a core")
    assert given.cpu_s <= 0.03 * passed


def test_the_app_takes_at_most_3_percent_of_what_it_measures():
    ratios = {name: statistics.median(each) for name, each in paired_ratios(PAIRS, "quick").items()}
    mean = statistics.geometric_mean(ratios.values())
    print(f"\nthe app over the command line, geometric mean {mean:.3f}")
    assert abs(mean - 1) <= 0.03
