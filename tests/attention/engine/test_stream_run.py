"""A run over a stream: the worker's events, and the rows that are made of them."""

import pytest
from msgspec import structs

from attention.core import events as on
from attention.core.plan import Assignment, StreamPlan
from attention.core.results import Peaks, StreamRow
from attention.core.stream import FULL, STREAMING, Stream
from attention.engine import stream as stream_engine
from attention.engine.record import StreamRecord, record_of
from attention.engine.stream import ATTENDS, AttentionStreamBench, full_lengths
from attention.implementations import load_implementation
from attention.implementations.protocol import build
from tests.support.streams import TOKEN_S, stream_events, stream_plan, stream_report


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure each length of full attention, and the bound, briefly."""
    monkeypatch.setattr(stream_engine, "LENGTH_S", 0.001)
    monkeypatch.setattr(stream_engine, "BOUND_S", 0.001)
    monkeypatch.setattr(stream_engine, "BARE_S", 0.001)


def rows_of(plan: StreamPlan) -> dict[str, StreamRow]:
    record = record_of(plan)
    peaks = Peaks(matmul_flops_per_s=1e11, copy_bytes_per_s=1e10)
    AttentionStreamBench(Assignment(plan=plan, peaks=peaks), plan, record.apply).run()
    assert record.done
    assert isinstance(record, StreamRecord)
    return {row.implementation: row for row in record.case(0).rows}


def small(**fields: object) -> StreamPlan:
    shape: dict[str, object] = {"tokens": 300, "window": 16, "first": 2, "heads": 2, "head_dim": 32, "dtype": "float32"}
    return StreamPlan(cases=(Stream(**{**shape, **fields}),))  # type: ignore[arg-type]


@pytest.mark.usefixtures("quick")
def test_every_token_is_measured_in_both_rows() -> None:
    rows = rows_of(small())
    streaming, full = rows[STREAMING], rows[FULL]
    assert streaming.status == full.status == "ok"
    assert sum(block.count for block in streaming.blocks) == streaming.tokens == 300
    assert streaming.spread is not None
    assert streaming.bound_s is not None
    assert streaming.bare_bins
    assert streaming.path is not None
    assert "stream" in streaming.path
    assert [block.end for block in full.blocks] == full_lengths(300)
    assert not full.extrapolated


@pytest.mark.usefixtures("quick")
def test_a_stream_is_estimated_before_its_rows() -> None:
    seen: list[on.AnyEvent] = []
    plan = small()
    build(load_implementation(ATTENDS), plan.cases[0].workload, print)
    peaks = Peaks(matmul_flops_per_s=1e11, copy_bytes_per_s=1e10)
    AttentionStreamBench(Assignment(plan=plan, peaks=peaks), plan, seen.append).run()
    kinds = [type(event) for event in seen]
    assert kinds.count(on.CaseTimeEstimated) == 1
    assert kinds.index(on.CaseTimeEstimated) < kinds.index(on.StreamAdvanced)


@pytest.mark.thorough
@pytest.mark.usefixtures("quick")
def test_a_stream_whose_time_cannot_be_estimated_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> list[float]:
        raise RuntimeError("no")

    monkeypatch.setattr(AttentionStreamBench, "_rows_s", fails)
    assert {row.status for row in rows_of(small()).values()} == {"ok"}


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_chunks_and_a_quantized_window_stream_too() -> None:
    row = rows_of(small(chunk=7, kv_format="int8:32"))[STREAMING]
    assert row.status == "ok"
    assert sum(block.count for block in row.blocks) == 43
    assert row.tokens == 300


@pytest.mark.thorough
@pytest.mark.usefixtures("quick")
def test_a_stream_ends_when_its_time_is_up() -> None:
    plan = structs.replace(small(tokens=10_000_000), seconds=0.05, implementations=(STREAMING,))
    row = rows_of(plan)[STREAMING]
    assert 0 < row.tokens < 10_000_000
    assert row.stopped_by == "time"


def test_a_row_is_flat_against_its_own_beginning() -> None:
    row = next(row for row in stream_report(drift=0.1).streams[0].rows if row.implementation == STREAMING)
    assert row.spread == pytest.approx(0.08, abs=0.01)
    assert row.bound_share == pytest.approx(0.5, abs=0.05)
    assert row.end_bytes == row.start_bytes
    assert row.slow_tokens == 0


def test_full_attention_is_extrapolated_to_the_end() -> None:
    row = next(row for row in stream_report().streams[0].rows if row.implementation == FULL)
    assert row.extrapolated
    assert row.tokens == 16_384
    assert row.end_s == pytest.approx(20e-6 + 10e-9 * 100_000)


def test_an_interrupted_run_keeps_the_tokens_so_far() -> None:
    plan = stream_plan()
    record = record_of(plan)
    for event in stream_events(plan):
        if isinstance(event, on.StreamAdvanced):
            event.blocks = event.blocks[: len(event.blocks) // 2]
        if not isinstance(event, on.CaseDone | on.RunDone):
            record.apply(event)
    rows = {row.implementation: row for row in record.case(0).rows}
    assert rows[STREAMING].tokens == 50_000
    assert rows[STREAMING].stopped_by == "interrupted"
    assert rows[STREAMING].call_s is not None
    assert rows[STREAMING].call_s.median == pytest.approx(TOKEN_S, rel=0.01)


def test_losses_are_split_where_the_window_is_full() -> None:
    rows = {row.implementation: row for row in stream_report(model="tiny-llama").streams[0].rows}
    assert rows[STREAMING].loss_inside == pytest.approx(1.4)
    assert rows[STREAMING].loss_beyond == pytest.approx(1.4)
    assert rows[FULL].loss_beyond == pytest.approx(4.0)


def test_no_quantile_exceeds_the_slowest_step() -> None:
    """A histogram knows a quantile to the top of its bin, which may lie above every step."""
    row = next(row for row in stream_report().streams[0].rows if row.implementation == STREAMING)
    assert row.p99_s == row.slowest_s == pytest.approx(1.002 * TOKEN_S)
