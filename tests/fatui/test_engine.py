"""The engine on the real worker: a misbehaving implementation costs only its own row, and no process is left over."""

import asyncio
import os
import signal
import time
from pathlib import Path

import mlx.core as mx
import psutil
import pytest
from msgspec import Struct, structs

from attention.core import events as on
from attention.core.plan import Assignment, FineTuningPlan, GenerationPlan, Plan
from attention.core.results import Case, Peaks, Row
from attention.core.workload import FineTuning, Generation, Workload, generations
from attention.engine import bench
from attention.engine.record import Record, record_of
from fatui import engine_process as engine_module
from fatui.engine_process import Engine, Silence
from tests.support.marks import slow
from tests.support.patience import patient

PLANTED = Path(__file__).parents[1] / "support" / "planted.py"
PEAKS = Peaks(matmul_flops_per_s=1e10, copy_bytes_per_s=1e10)
GENERATIONS = generations(22, model="tinyllama-1.1b", prompts=[512], batches=[1])
TUNING = FineTuning(model="tinyllama-1.1b", tuned_layers=22, layers=22)
SMALL = Workload(seq=32, heads=2, head_dim=16, dtype="float32")


def plan(*planted: str, cases: tuple[Workload, ...] = (SMALL,), seconds: float = 0.05, **fields: object) -> Plan:
    names = ("baseline", *(f"{PLANTED}:{name}" for name in planted))
    return Plan(cases=cases, implementations=names, seconds=seconds, **fields)  # type: ignore[arg-type]


def run(plan: Plan) -> Engine:
    engine = Engine(plan, peaks=PEAKS)
    asyncio.run(asyncio.wait_for(engine.run(), patient(60)))
    return engine


def row(case: Case, name: str) -> Row:
    return next(row for row in case.rows if row.implementation.endswith(name))


SLOW = "longer than the"
"""Of the message that the fewest rounds take longer than the time of a case."""


def log_of(record: Record) -> list[str]:
    """Return the messages of a run, but for the one that a slow machine adds."""
    return [each.text for each in record.log if SLOW not in each.text]


MASKED = (
    *(structs.replace(SMALL, mask=mask) for mask in ("causal", "window:8", "prefix:8+window:4")),
    structs.replace(SMALL, head_dim=32, value_dim=32, kv_format="int4:32", mask="window:8"),
)


@pytest.fixture(scope="module")
def masked_run() -> Engine:
    return run(plan("KnowsNoPatterns", cases=MASKED[2:]))


@pytest.mark.slow
def test_a_masked_case_is_measured_beside_its_dense_shape() -> None:
    record = run(plan("KnowsNoPatterns", cases=MASKED[:2])).record
    first, second = (row(record.case(index), "baseline") for index in (0, 1))
    assert first.over_dense is None
    assert first.dense_s is None
    assert second.dense_s is not None
    assert second.over_dense is not None
    assert 0.1 < second.over_dense.value < 10


@pytest.mark.thorough
def test_quantized_and_unquantized_are_measured_together(masked_run: Engine) -> None:
    found = row(masked_run.record.case(1), "baseline")
    assert found.status == "ok"
    assert found.over_dense is not None
    assert found.over_unquantized is not None
    assert 0.1 < found.over_unquantized.value < 10
    assert found.kv_error is not None
    assert found.max_error is not None
    assert 0.01 < found.kv_error < 0.3, "that of the format"
    assert found.max_error < 0.01, "against float64 over what the format keeps"


@pytest.mark.thorough
def test_without_patterns_a_mask_is_unsupported(masked_run: Engine) -> None:
    found = row(masked_run.record.case(0), "KnowsNoPatterns")
    assert (found.status, found.reason) == ("unsupported", "it takes no patterns of attention.masks")


DYING = {
    "KilledAtOnce": "killed by signal 11 (SIGSEGV)",
    "KilledInRounds": "killed by signal 9 (SIGKILL), as the system does when memory runs out",
    "Leaves": "the engine ended with code 7: planted last words",
}


@pytest.fixture(scope="module")
def dying_run() -> Engine:
    """One run whose worker is killed or exits three times; a broken GPU ends it in each of two cases, below."""
    return run(plan(*DYING))


@pytest.mark.parametrize(("planted", "reason"), DYING.items())
def test_a_worker_that_dies_costs_one_row_and_the_others_go_on(dying_run: Engine, planted: str, reason: str) -> None:
    assert dying_run.record.done
    case = dying_run.record.case(0)
    assert row(case, planted).status == "failed"
    assert row(case, planted).reason == reason
    assert row(case, "baseline").status == "ok"
    assert row(case, "baseline").stopped_by in ("precision", "time")
    assert any(planted in line for line in log_of(dying_run.record) if "is restarted without it" in line)


FAILING = {
    "Raises": "RuntimeError: planted failure",
    "RaisesInRounds": "RuntimeError: planted late",
    "Exits": "SystemExit: 0",
    "RaisesNoText": "ValueError: ? bad",
    "HasNoRoute": "TypeError: route() returned NoneType; it must return an attention.core.route.Route",
    "ReturnsNothing": "TypeError: it returned NoneType; an MLX array is expected",
    "ChangesItsInputs": "ValueError: it wrote into its inputs; q, k and v must be left as they are",
}


@pytest.fixture(scope="module")
def one_run() -> Engine:
    """One run of one worker with all that costs at most its own row."""
    others = ("Wrong", "NotANumber", "KeepsItsResult", "WrongLater", "Prints", "KeepsScratch", "Planted")
    return run(plan(*FAILING, *others, seconds=0.5))


@pytest.mark.parametrize(("planted", "reason"), FAILING.items())
def test_an_exception_costs_one_row_without_a_new_worker(one_run: Engine, planted: str, reason: str) -> None:
    case = one_run.record.case(0)
    assert (row(case, planted).status, row(case, planted).reason) == ("failed", reason)
    assert row(case, "baseline").status == "ok"
    assert not log_of(one_run.record)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        slow("raise SystemExit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "the engine ended with code 0"),
    ],
)
def test_a_file_that_exits_on_import_is_named(tmp_path: Path, text: str, reason: str) -> None:
    name = f"{tmp_path / 'leaves.py'}:X"
    (tmp_path / "leaves.py").write_text(text)
    engine = run(Plan(cases=(SMALL,), implementations=("baseline", name)))
    assert engine.record.refused
    assert engine.record.refused.reason == f"implementation: '{name}' cannot be loaded: {reason}"


@pytest.mark.thorough
def test_a_broken_gpu_costs_one_row_and_a_new_process_goes_on() -> None:
    heard: list[on.AnyEvent] = []
    engine = Engine(plan("BreaksTheGpu", cases=(SMALL, SMALL)), heard.append, peaks=PEAKS)
    asyncio.run(asyncio.wait_for(engine.run(), patient(60)))
    assert engine.record.done
    for index in (0, 1):
        case = engine.record.case(index)
        assert row(case, "BreaksTheGpu").status == "failed"
        assert row(case, "baseline").status == "ok"
    assert "illegal memory access" in (row(engine.record.case(0), "BreaksTheGpu").reason or "")
    assert sum(isinstance(event, on.RunStarted) for event in heard) == 3  # a new process after each failure


class Untidy(Struct):
    """One run of one worker with all that leaves something behind: memory, children, text on stderr."""

    engine: Engine
    heard: list[on.AnyEvent]
    seconds: float
    orphan: int


@pytest.fixture(scope="module")
def untidy_run(tmp_path_factory: pytest.TempPathFactory) -> Untidy:
    heard: list[on.AnyEvent] = []
    noted = tmp_path_factory.mktemp("orphan") / "pid"
    planted = plan("WritesIntoMemory", "LeavesAChild", "WritesALongLine", "LeavesAnOrphan", "Planted")
    engine = Engine(planted, heard.append, peaks=PEAKS)
    started = time.perf_counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLANTED_PID", str(noted))
        asyncio.run(asyncio.wait_for(engine.run(), patient(60)))
    return Untidy(engine, heard, time.perf_counter() - started, int(noted.read_text()))


@pytest.mark.thorough
def test_writing_into_shared_memory_costs_the_writers_row_alone(untidy_run: Untidy) -> None:
    case = untidy_run.engine.record.case(0)
    assert row(case, "WritesIntoMemory").status == "failed"
    assert "it wrote into its inputs" in (row(case, "WritesIntoMemory").reason or "")
    assert [row(case, name).status for name in ("baseline", "Planted")] == ["ok", "ok"]


@pytest.mark.thorough
@pytest.mark.parametrize("planted", ["LeavesAChild", "WritesALongLine"])
def test_what_hangs_on_stderr_is_not_waited_for(untidy_run: Untidy, planted: str) -> None:
    case = untidy_run.engine.record.case(0)
    assert [row(case, name).status for name in ("baseline", planted)] == ["ok", "ok"]
    assert untidy_run.seconds < patient(20)


@pytest.mark.gpu
@pytest.mark.skipif(mx.default_device() == mx.Device(mx.cpu), reason="MLX computes on the CPU here")
def test_a_bad_memory_access_on_a_real_gpu_costs_one_row() -> None:
    case = run(plan("BreaksTheGpu")).record.case(0)
    assert row(case, "BreaksTheGpu").status == "failed"
    assert row(case, "baseline").status == "ok"


@pytest.mark.parametrize("planted", ["Wrong", "NotANumber"])
def test_a_wrong_result_is_marked_whatever_its_speed(one_run: Engine, planted: str) -> None:
    case = one_run.record.case(0)
    assert row(case, planted).status == "inaccurate"
    assert row(case, planted).samples


@pytest.mark.parametrize("planted", ["KeepsItsResult", "WrongLater"])
def test_a_result_that_is_wrong_only_later_is_marked_too(one_run: Engine, planted: str) -> None:
    found = row(one_run.record.case(0), planted)
    assert found.status == "inaccurate"
    assert found.reason is not None
    assert found.reason.startswith("not in the first call, but in one after the rounds: output: ")


def test_what_does_not_fit_or_is_not_taken_never_starts() -> None:
    case = run(plan("Hungry", "Refuses", memory_limit_bytes=2**30)).record.case(0)
    assert row(case, "Hungry").status == "refused"
    assert row(case, "Hungry").reason == "needs 1,024 GiB of 1"
    assert row(case, "Refuses").status == "unsupported"
    assert row(case, "Refuses").reason == "it takes nothing"
    assert row(case, "baseline").status == "ok"


def test_scratch_outside_of_mlx_counts_as_memory(one_run: Engine) -> None:
    case = one_run.record.case(0)
    plain, scratch = row(case, ":Planted").peak_bytes, row(case, "KeepsScratch").peak_bytes
    assert plain is not None and scratch is not None
    assert plain < 2**20 <= scratch < 2**21 + plain


@pytest.mark.slow
def test_force_runs_what_is_predicted_not_to_fit() -> None:
    case = run(plan("Hungry", memory_limit_bytes=2**30, force=True)).record.case(0)
    assert row(case, "Hungry").status == "ok"


def test_what_an_implementation_prints_is_no_event(one_run: Engine) -> None:
    assert row(one_run.record.case(0), "Prints").status == "ok"
    assert not log_of(one_run.record)


@pytest.mark.slow
def test_building_happens_once_after_a_first_look_at_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PREVIEW_S", 0.05)
    monkeypatch.setattr(bench, "measure_peaks", lambda device: PEAKS)
    reported: list[on.AnyEvent] = []
    of_two = plan("Builds", cases=(SMALL, structs.replace(SMALL, seq=16)), seconds=0.3)
    bench.Bench(Assignment(plan=of_two, peaks=PEAKS), of_two, reported.append).run()
    record = record_of(of_two)
    for event in reported:
        record.apply(event)
    lines = log_of(record)
    assert lines[0].startswith("a first look: baseline ")
    assert lines[1] == "planted building"
    assert "compiling and checking took" in lines[2]
    assert len(lines) == 3
    assert [event.case for event in reported if isinstance(event, on.CaseStarted)] == [0, 0, 1]
    for index in (0, 1):
        assert [row.status for row in record.case(index).rows] == ["ok", "ok"]


def test_an_unknown_implementation_is_refused_with_a_hint() -> None:
    engine = run(Plan(cases=(SMALL,), implementations=("basline",)))
    assert engine.record.refused is not None
    assert "did you mean 'baseline'?" in engine.record.refused.reason


def test_every_row_carries_what_the_table_needs(one_run: Engine) -> None:
    case = one_run.record.case(0)
    planted = row(case, ":Planted")
    assert case.reference == "baseline"
    assert case.noise_floor is not None
    assert planted.speedup is not None
    assert planted.call_s is not None
    assert planted.tokens_per_second == pytest.approx(32 / planted.call_s.median)
    assert planted.flops_per_s == pytest.approx(SMALL.flops / planted.call_s.median)
    assert planted.efficiency is not None
    assert planted.latency_s is not None
    assert planted.first_call_s is not None
    assert planted.peak_bytes is not None
    assert planted.max_error is not None
    assert min(len(planted.samples), len(row(case, "baseline").samples)) >= 3  # a slower row may skip rounds


def test_stopping_ends_the_worker_in_a_second_and_keeps_rows() -> None:
    engine = Engine(plan("Planted", seconds=60, precision=0), peaks=PEAKS)
    took = asyncio.run(_stop_when(engine, on.RoundsDone))
    assert took < patient(3)  # a second where nothing else runs, of a run of a minute
    assert row(engine.record.case(0), "baseline").samples
    assert row(engine.record.case(0), "baseline").stopped_by == "interrupted"


@pytest.mark.slow
@pytest.mark.parametrize("planted", ["IgnoresSignals", slow("Stuck"), slow("Pauses")])
def test_stopping_ends_a_worker_that_is_stuck_in_a_call(planted: str) -> None:
    engine = Engine(plan(planted), peaks=PEAKS)
    took = asyncio.run(_stop_when(engine, on.StepStarted))
    assert took < patient(2)
    assert engine.process_id is None


@pytest.mark.thorough
def test_a_worker_killed_in_mid_run_is_reported_and_replaced() -> None:
    engine = Engine(plan("Planted", seconds=0.5, precision=0), peaks=PEAKS)

    async def kill_once() -> None:
        running = asyncio.create_task(engine.run())
        while engine.record.last_rounds is None:
            await asyncio.sleep(0.01)
        assert engine.process_id is not None
        os.kill(engine.process_id, signal.SIGKILL)
        await asyncio.wait_for(running, patient(60))

    asyncio.run(kill_once())
    statuses = sorted(row.status for row in engine.record.case(0).rows)
    assert statuses == ["failed", "ok"]
    assert engine.record.done


def test_a_hung_worker_is_ended_and_costs_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def hurry(event: on.AnyEvent) -> None:
        if isinstance(event, on.StepStarted):
            planted = event.implementation.endswith("IgnoresSignals")
            monkeypatch.setattr(engine_module, "HUNG_S", 1.0 if planted else 600.0)
        elif isinstance(event, on.RowEnded):  # the next worker may take its time to start
            monkeypatch.setattr(engine_module, "HUNG_S", 600.0)

    engine = Engine(plan("IgnoresSignals"), hurry, peaks=PEAKS)
    asyncio.run(asyncio.wait_for(engine.run(), patient(60)))
    case = engine.record.case(0)
    assert row(case, "baseline").status == "ok"
    assert row(case, "IgnoresSignals").status == "failed"
    assert row(case, "IgnoresSignals").reason.startswith("was silent for ")


@pytest.mark.slow
def test_a_hung_call_in_a_model_costs_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlx_lm")

    def hurry(event: on.AnyEvent) -> None:
        if isinstance(event, on.StepStarted) and event.implementation == names[1]:
            monkeypatch.setattr(engine_module, "HUNG_S", 3.0)
            monkeypatch.setattr(engine_module, "LATE", 0.1)
        elif isinstance(event, on.RowEnded):
            monkeypatch.undo()

    cases = generations(2, model="tiny-llama", prompts=[16], batches=[1], generate=2, dtype="float32")[:1]
    names = ("baseline", f"{PLANTED}:IgnoresSignals")
    engine = Engine(GenerationPlan(cases=cases, implementations=names, seconds=0.2), hurry)
    asyncio.run(asyncio.wait_for(engine.run(), patient(100)))
    rows = engine.record.case(0).rows
    assert [each.status for each in rows] == ["ok", "failed"]
    assert (rows[1].reason or "").startswith("was silent for ")


@pytest.mark.parametrize("work", [*GENERATIONS, TUNING])
def test_silence_in_a_model_is_bounded_around_the_estimate(work: Generation | FineTuning) -> None:
    kind = GenerationPlan if isinstance(work, Generation) else FineTuningPlan
    engine = Engine(kind(cases=(work,), implementations=("baseline",)))
    engine._dispatch(on.CaseStarted(case=0))
    engine._dispatch(on.WeightsLoaded(case=0, weights_bytes=2 * 10**9))
    before = engine._longest_silence_s()
    assert 600 < before < 48 * 3600
    engine.silence.record_event(on.CaseTimeEstimated(case=0, seconds=1000, implementations=1))
    assert engine._longest_silence_s() == 4000
    engine.silence.record_event(on.CaseStarted(case=0))
    assert engine._longest_silence_s() == before


@pytest.mark.thorough
def test_a_silence_in_the_rounds_names_them(untidy_run: Untidy) -> None:
    heard = untidy_run.heard
    begun = next(index for index, event in enumerate(heard) if isinstance(event, on.RoundsDone))
    silence = Silence()
    for event in heard[:begun]:
        silence.record_event(event)
    assert silence.step == "rounds"


@pytest.mark.thorough
def test_a_child_in_a_session_of_its_own_ends_with_the_run(untidy_run: Untidy) -> None:
    child = untidy_run.orphan
    deadline = time.monotonic() + patient(15)  # the child lasts for minutes
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_silence_is_unexplained_after_30_s_unless_building() -> None:
    now = 0.0
    silence = Silence(lambda: now)
    silence.record_event(on.StepStarted(case=0, implementation="poc", step="build"))
    now = 200.0
    assert (silence.seconds, silence.building, silence.unexplained) == (200, "poc", False)
    silence.record_event(on.StepStarted(case=0, implementation="poc", step="first call"))
    now = 231.0
    assert silence.unexplained
    assert silence.step == "poc: first call"


async def _stop_when(engine: Engine, kind: type[on.Event]) -> float:
    """Run until the first event of a kind, stop, and return the seconds that stopping took."""
    seen = asyncio.Event()
    engine._listener = lambda event: seen.set() if isinstance(event, kind) else None
    running = asyncio.create_task(engine.run())
    await asyncio.wait_for(seen.wait(), patient(30))
    if kind is on.StepStarted:
        await asyncio.sleep(0.3)
    worker = psutil.Process(engine.process_id)
    started = time.perf_counter()
    engine.stop()
    await asyncio.wait_for(running, patient(30))
    took = time.perf_counter() - started
    assert not worker.is_running()
    return took
