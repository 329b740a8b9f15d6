"""The check of rows' energy: its integral of power, and the line of a level."""

import pytest

from benchmarks import energy as benchmark


class Nvml:
    NVML_CLOCK_SM = 1


def test_the_integral_of_power_spans_the_counters_steps(monkeypatch):
    monkeypatch.setattr(benchmark, "open_nvml", lambda: (Nvml(), 0))
    watch = benchmark.Watch()
    watch.steps = [(1.0, 10.0), (2.0, 200.0), (3.0, 500.0)]
    watch.watts = [(0.1 * i, 100.0 if i < 20 else 300.0) for i in range(50)]
    assert watch.integral() == pytest.approx(100 + 300, rel=0.03)


def test_a_levels_line_compares_rows_with_the_counter():
    figures = {
        "row_j": [0.011, None],
        "long_j": 0.01,
        "integral_j": 0.0098,
        "long_w": 690.0,
        "clock_mhz": 1500.0,
        "step_s": 0.1,
        "largest_step_s": 0.12,
        "call_s": 0.0145,
        "rounds_s": 0.012,
        "rounds_mhz": 1800.0,
        "product_w": 838.0,
    }
    line = benchmark._line("prefill", figures)
    assert "10 mJ a call (690 W, 1500 MHz); rows +10.0%, none; integral of power -2.0%" in line
    assert "back to back a call takes 1.208 of that in rounds (1800 MHz), J over s of the rounds 838 W" in line
