"""Fabricated runs over streams: blocks of a flat row and of one that climbs."""

from collections.abc import Iterator

from attention.core import events as on
from attention.core.plan import StreamPlan
from attention.core.results import Peaks, Report
from attention.core.route import Route
from attention.core.stream import FULL, STREAM_ROWS, STREAMING, Stream, StreamBlock, bin_of, block_of
from attention.engine.record import record_of
from tests.support.sample_runs import ENVIRONMENT, run_of

TOKEN_S = 100e-6
LENGTHS = (256, 1024, 4096, 16_384)
LOSSES = {"full": 4.0, "recomputed": 1.42, "window": 1.5, "streaming": 1.4}


def stream_plan(model: str | None = None, tokens: int = 100_000) -> StreamPlan:
    """A plan with all rows that the kind of stream has."""
    rows = tuple(STREAM_ROWS) if model else (FULL, STREAMING)
    return StreamPlan(cases=(Stream(model=model, tokens=tokens),), implementations=rows)


def flat_blocks(case: Stream, loss: float | None = None, drift: float = 0.0) -> list[StreamBlock]:
    """Blocks of a row whose time per token ends `drift` higher, relatively, than it began."""
    blocks = []
    for end in range(case.block_tokens, case.tokens + 1, case.block_tokens):
        seconds = TOKEN_S * (1 + drift * end / case.tokens)
        times = [seconds * (1 + 0.001 * (index % 3)) for index in range(9)]
        memory = {"resident_bytes": 80 * 2**20, "device_bytes": 2**21}
        blocks.append(block_of(end, times, **memory, loss=loss, losses=case.block_tokens if loss else 0))
    return blocks


def climbing_blocks(loss: float | None = None) -> list[StreamBlock]:
    """Blocks of full attention: 20 microseconds, and 10 nanoseconds for each key."""
    return [block_of(keys, [20e-6 + 10e-9 * keys] * 5, loss=loss, losses=keys if loss else 0) for keys in LENGTHS]


def stream_events(plan: StreamPlan, drift: float = 0.0) -> Iterator[on.AnyEvent]:
    """The events of a run without failures."""
    case = plan.cases[0]
    yield on.RunStarted(environment=ENVIRONMENT)
    yield on.PeaksMeasured(peaks=Peaks(matmul_flops_per_s=1.3e11, copy_bytes_per_s=2.1e10))
    yield on.CaseStarted(case=0)
    for name in plan.ordered:
        loss = LOSSES[name] if case.model else None
        route = Route(path="CPU kernel avx512", fused=True, reason="as the test says", predicted_bytes=2**20)
        yield on.RouteFound(case=0, implementation=name, route=route)
        blocks = climbing_blocks(loss) if name == FULL else flat_blocks(case, loss, drift)
        yield on.StreamAdvanced(case=0, implementation=name, blocks=blocks)
        if name == STREAMING:
            bare = {bin_of(TOKEN_S): 990, bin_of(9 * TOKEN_S): 10}
            yield on.BareLoopMeasured(case=0, implementation=name, bins=bare)
            yield on.BoundMeasured(case=0, implementation=name, seconds=TOKEN_S / 2)
    yield on.CaseDone(case=0, stopped_by="iterations")
    yield on.RunDone()


def stream_report(model: str | None = None, drift: float = 0.0, identity: str = "0a1b2c3d") -> Report:
    """The report of a whole run."""
    plan = stream_plan(model)
    record = record_of(plan)
    for event in stream_events(plan, drift):
        record.apply(event)
    return record.report(run_of(identity=identity))
