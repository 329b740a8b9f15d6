"""The CPU kernel's benchmark: fair rounds, and a table with a verdict for each figure."""

from types import SimpleNamespace

import pytest

from benchmarks.cpu import measure
from benchmarks.cpu.claims import BenchReport, claims
from benchmarks.cpu.measure import DECODE, SHAPES, BenchRow, BenchShape, DecodeRow, StartTimes, TinyCall

SMALL = BenchShape(1, 2, 16, 8)


def report(variant: str = "avx512_bf16", **changes: float) -> BenchReport:
    """Figures exactly as good as required, except for the changes."""
    figures = {
        "torch": 2.01,
        "mlx": 30.0,
        "peak": 0.75,
        "decode": 0.8,
        "first": 9.9,
        "whole": 29.0,
        "later": 0.049,
        "tiny": 1.02,
    }
    figures = {**figures, "first": 9.9, "whole": 29.0, "busy": 1.2, "memory": 3.0 * 2**20, **changes}
    made = BenchReport("a processor", variant, 2, 0.0)
    for dtype in ("float32", "bfloat16"):
        for backward in (False, True):
            for shape in SHAPES:
                row = BenchRow(shape.name, dtype, backward, shape.flops(backward), peak_share=figures["peak"])
                row.ratios = {"torch": figures["torch"]} | ({} if backward else {"mlx": figures["mlx"]})
                made.rows.append(row)
    made.busy = [BenchRow(shape.name, "float32", False, 1.0, ratios={"torch": figures["busy"]}) for shape in SHAPES]
    made.decode = [DecodeRow("float32", 1e9, 1e9, figures["decode"], None)]
    made.tiny = TinyCall(10.0, 10.0, figures["tiny"], 0.03)
    made.start = StartTimes(figures["first"], 19.0, figures["whole"], figures["later"])
    made.memory_per_thread = figures["memory"]
    return made


def test_everything_holds_where_all_targets_are_met():
    found = claims(report())
    assert len(found) == 17
    assert {claim.holds for claim in found} == {True}


@pytest.mark.parametrize(
    ("figure", "worse", "failing"),
    [
        ("torch", 1.14, 5),
        ("torch", 1.4, 2),
        ("mlx", 29.0, 2),
        ("peak", 0.74, 4),
        ("decode", 0.79, 1),
        ("tiny", 1.04, 1),
        ("first", 10.0, 1),
        ("whole", 30.0, 1),
        ("later", 0.05, 1),
        ("memory", 4.0 * 2**20, 1),
    ],
)
def test_what_falls_short_is_said_not_to_hold(figure, worse, failing):
    assert sum(claim.holds is False for claim in claims(report(**{figure: worse}))) == failing


def test_bfloat16_is_not_used_on_avx512_without_it():
    undecided = [claim.what for claim in claims(report("avx512")) if claim.holds is None]
    assert undecided == ["bfloat16 forward against torch, geometric mean"]


def test_avx2_has_targets_of_its_own():
    found = claims(report("avx2", peak=0.82, decode=0.85))
    assert len(found) == 20
    assert {claim.holds for claim in found} == {True}
    assert sum(claim.holds is False for claim in claims(report("avx2"))) == 5  # shares of the peak, and decoding
    assert sum(claim.holds is False for claim in claims(report("avx2", peak=1, decode=1, busy=1.19))) == 1
    assert sum(claim.holds is False for claim in claims(report("avx2", peak=1, decode=1, torch=1.65))) == 2


class Waking:
    """Calls whose samples take half a millisecond to begin; 50 us for each call."""

    def take_sample(self, calls: int) -> float:
        return 5e-4 / calls + 5e-5


def test_small_calls_fill_a_sample():
    assert 0.8 < measure.calls_per_sample(Waking(), 0.03) * 5e-5 / 0.03 < 1
    assert measure.calls_per_sample(Waking(), 1e-4) == 1


@pytest.mark.usefixtures("kernel")
def test_a_row_has_a_rate_and_ratios(monkeypatch):
    monkeypatch.setattr(measure, "SETTLE_S", 0)
    monkeypatch.setattr(measure, "torchs", lambda *_: measure.ours(SMALL, "float32", fused=False))
    took, sample, peak = {"ours": 1e-5, "torch": 2e-5, "mlx": 4e-4}, measure.sample, measure.library.load().fma_peak

    def timed(arms, *options):
        made = sample(arms, *options)
        assert min(map(min, made.values())) > 0
        return {name: [took[name]] * len(each) for name, each in made.items()}

    monkeypatch.setattr(measure, "sample", timed)
    monkeypatch.setattr(measure.library, "load", lambda: SimpleNamespace(fma_peak=lambda: peak() and 1e11))
    row = measure.measure(SMALL, "float32", False, rounds=4, seconds=1e-4)
    assert row.seconds == took
    assert row.ratios == pytest.approx({"torch": 2, "mlx": 40})
    assert row.peak_share == pytest.approx(row.flops / 1e-5 / 1e11)


def test_a_decoding_shape_says_its_sizes():
    assert (DECODE.name, DECODE.key_shape) == ("1/32(8)/1x8192/128", (1, 8, 8192, 128))
    assert SHAPES[5].name == "1/8/2048/64 causal"
    assert SHAPES[5].flops(False) == 4 * 8 * 64 * 2048 * 2049 / 2
