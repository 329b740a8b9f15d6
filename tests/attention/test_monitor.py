"""The monitor counts every call once, times some, and its report is one that fatui keeps."""

import time
from pathlib import Path

import mlx.core as mx
import pytest

import attention
from attention.monitoring import SHARE, Monitor
from attention.report import Row


def arrays(seq: int = 8) -> tuple[mx.array, mx.array, mx.array]:
    q, k, v = mx.random.normal((3, 1, 2, seq, 16), key=mx.random.key(0))
    return q, k, v


def rows(monitor: Monitor) -> dict[str, Row]:
    return {row.implementation: row for case in monitor.report().cases for row in case.rows}


def test_every_way_of_attending_is_counted_once() -> None:
    q, k, v = arrays()
    original = mx.fast.scaled_dot_product_attention
    with attention.monitor() as monitor:
        attention.attention(q, k, v, implementation="practical")  # calls MLX's own inside
        attention.attention(q, k, v, implementation="baseline")
        mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0)
    assert mx.fast.scaled_dot_product_attention is original
    assert {name: row.reason.split(" calls")[0] for name, row in rows(monitor).items() if row.reason} == {
        "practical": "1",
        "baseline": "1",
        "mlx": "1",
    }
    assert rows(monitor)["baseline"].path == "manual, unfused"


def test_calls_of_a_patched_model_are_the_implementations() -> None:
    base = pytest.importorskip("mlx_lm.models.base")
    q, k, v = arrays()
    with attention.patch_mlx_lm("baseline"), attention.monitor() as monitor:
        base.scaled_dot_product_attention(q, k, v, None, 1.0, "causal")
    assert list(rows(monitor)) == ["baseline"]
    assert monitor.report().cases[0].workload.mask == "causal"


def test_timed_calls_have_time_and_memory() -> None:
    q, k, v = arrays(64)
    with attention.monitor(share=1e9) as monitor:
        for _ in range(3):
            mx.eval(attention.attention(q, k, v, implementation="baseline"))
    row = rows(monitor)["baseline"]
    assert len(row.samples) == 3
    assert row.call_s is not None
    assert row.peak_bytes is not None
    assert row.peak_bytes >= 2 * 64 * 64 * 4


def test_calls_that_are_traced_are_counted_and_not_timed() -> None:
    q, k, v = arrays()
    with attention.monitor(share=1e9) as monitor:
        mx.eval(mx.compile(lambda *a: attention.attention(*a, implementation="baseline"))(q, k, v))
    assert monitor.calls == 1
    assert rows(monitor)["baseline"].samples == ()


def test_an_exception_ends_the_watch_and_passes() -> None:
    original = mx.fast.scaled_dot_product_attention
    with pytest.raises(RuntimeError, match="mine"), attention.monitor():
        raise RuntimeError("mine")
    assert mx.fast.scaled_dot_product_attention is original


def test_a_saved_run_is_shown_by_the_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fatui.cli import main

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with attention.monitor(share=1e9) as monitor:
        attention.attention(*arrays(), implementation="baseline")
    monitor.save(tmp_path / "run.json")
    assert main(["history", "add", str(tmp_path / "run.json")]) == 0
    assert main(["history"]) == 0
    assert monitor.report().cases
    assert "monitor" in capsys.readouterr().out
    assert main(["history", "show", "last"]) == 0
    assert "baseline" in capsys.readouterr().out
    (tmp_path / "wrong.json").write_text("[]")
    assert main(["history", "add", str(tmp_path / "wrong.json")]) == 2
    assert main(["history", "add", str(tmp_path / "missing.json")]) == 2


@pytest.mark.slow
def test_watching_costs_at_most_its_share() -> None:
    from statistics import median

    q, k, v = arrays(512)
    ratios = []
    for _ in range(15):
        seconds = []
        for watched in (False, True):
            monitor = attention.monitor()
            if watched:
                monitor.__enter__()
            started = time.perf_counter()
            for _ in range(20):
                mx.eval(mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0))
            seconds.append(time.perf_counter() - started)
            if watched:
                monitor.__exit__(None, None, None)
        ratios.append(seconds[1] / seconds[0])
    assert median(ratios) <= 1 + SHARE
