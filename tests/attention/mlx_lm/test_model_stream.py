"""A text through a small model, token after token: its losses, and the rows that are made of them."""

import numpy as np
import pytest
from msgspec import structs

from attention.core.plan import Assignment, StreamPlan
from attention.core.results import Peaks, StreamRow
from attention.core.stream import FULL, RECOMPUTED, STREAM_ROWS, STREAMING, WINDOW, Stream, mean_loss
from attention.engine import stream as stream_engine
from attention.engine.record import StreamRecord, record_of
from attention.mlx_lm.stream import ModelStreamBench

CASE = Stream(model="tiny-llama", heads=4, kv_heads=2, head_dim=32, tokens=20, window=30, dtype="float32")


def rows_of(case: Stream, *names: str) -> dict[str, StreamRow]:
    plan = StreamPlan(cases=(case,), implementations=names)
    record = record_of(plan)
    peaks = Peaks(matmul_flops_per_s=1e11, copy_bytes_per_s=1e10)
    ModelStreamBench(Assignment(plan=plan, peaks=peaks), plan, record.apply).run()
    assert isinstance(record, StreamRecord)
    assert record.done
    return {row.implementation: row for row in record.case(0).rows}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_engine, "BOUND_S", 0.001)
    monkeypatch.setattr(stream_engine, "BARE_S", 0.001)


@pytest.mark.thorough
def test_all_rows_agree_while_nothing_falls_out_of_the_window() -> None:
    rows = rows_of(CASE, FULL, WINDOW, STREAMING)
    losses = [[block.loss for block in rows[name].blocks] for name in (FULL, WINDOW, STREAMING)]
    assert len(losses[0]) == 20
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-4)
    assert rows[STREAMING].loss_inside == pytest.approx(np.mean(losses[0]), rel=1e-4)


def test_rows_differ_once_tokens_fall_out() -> None:
    case = structs.replace(CASE, window=8, first=2)
    rows = rows_of(case, *STREAM_ROWS)
    assert [row.status for row in rows.values()] == ["ok"] * 4
    full, window, streaming = (rows[name].loss_beyond for name in (FULL, WINDOW, STREAMING))
    assert full is not None
    assert streaming is not None
    assert len({full, window, streaming}) == 3
    assert sum(block.losses for block in rows[RECOMPUTED].blocks) == 5 * len(rows[RECOMPUTED].blocks)


@pytest.mark.slow
def test_chunks_give_the_losses_of_single_tokens() -> None:
    case = structs.replace(CASE, window=8, first=2)
    alone, together = (rows_of(structs.replace(case, chunk=n), STREAMING)[STREAMING] for n in (1, 8))
    assert len(together.blocks) == 3
    assert mean_loss(together.blocks) == pytest.approx(mean_loss(alone.blocks), rel=1e-4)
