"""`attention.bench`: the rows of the engine, from a program."""

import asyncio
import importlib.util
import json
import os
import resource
import subprocess
import sys
import textwrap
import threading
from html.parser import HTMLParser
from pathlib import Path

import mlx.core as mx
import pytest

import attention
from attention import UsageError, Workload, abench, bench, benchmark
from attention.core import events as on
from attention.core.results import Peaks
from attention.engine import library
from attention.implementations import load_implementation, numbered
from attention.implementations.baseline import Baseline
from fatui.report import export
from fatui.storage import result_files
from tests.support.patience import patient

ROOT = Path(__file__).parents[3]
SMALL = {"seq": 16, "heads": 2, "head_dim": 16, "dtype": "float32"}


def fused(q, k, v, *, scale, mask):
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


def unmasked(q, k, v, scale):
    return mx.softmax(q @ k.swapaxes(-1, -2) * scale, axis=-1) @ v


def ends_the_process(q, k, v):
    os._exit(7)


class Own(Baseline):
    name = "own"


def here(cases, implementations, **options):
    return bench(cases, implementations, seconds=0.05, in_process=True, **options)


@pytest.fixture(scope="module", autouse=True)
def known_peaks():
    """Measure no peaks in this process; the engine's own process does below."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "_process_peaks", lambda: Peaks(matmul_flops_per_s=1e11, copy_bytes_per_s=1e10))
        yield


@pytest.fixture(scope="module")
def result():
    """One run in this process: a sweep with a mask, a function, a lambda, a class, an object and a name."""
    plain = lambda q, k, v, scale: unmasked(q, k, v, scale) * 1  # noqa: E731
    named = {"baseline": "baseline", "fused": fused, "plain": plain}
    return here({**SMALL, "mask": ["none", "causal"]}, {**named, "class": Own, "object": Own()})


@pytest.mark.slow
def test_rows_are_those_of_the_sweep(result):
    assert [case.workload.mask for case in result.cases] == ["none", "causal"]
    assert len(result) == len(list(result)) == 10
    rows = {(workload.mask, row.implementation): row for workload, row in result}
    assert all(row.status == "ok" for key, row in rows.items() if key != ("causal", "plain"))
    assert rows["causal", "plain"].status == "unsupported"
    assert rows["causal", "plain"].reason == "the function has no parameter `mask`"
    assert {case.reference for case in result.cases} == {"baseline"}
    assert rows["none", "fused"].max_error < 1e-3


def test_the_json_is_that_of_the_command_line(result, tmp_path):
    result.save(tmp_path / "run.json")
    report = result_files.read(tmp_path / "run.json")
    assert json.loads(result.to_json())["run"]["id"] == report.run.id
    assert [row.implementation for row in report.cases[0].rows] == [row.implementation for _, row in result][:5]


def test_records_have_the_columns_of_the_csv(result):
    records = result.to_dicts()
    assert len(records) == 10
    assert set(records[0]) <= set(export.COLUMNS)
    assert {"seq", "call_s_median", "speedup_low", "implementation"} <= set(records[0])


def test_pandas_is_optional(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match="pandas is not installed") as caught:
        result.to_pandas()
    assert "\n" not in str(caught.value)


def test_a_data_frame_has_a_line_for_each_row(result):
    pandas = pytest.importorskip("pandas")
    frame = result.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.shape[0] == 10
    assert frame["call_s_median"].notna().sum() == 9


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.texts = [], []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.thorough
def test_notebooks_show_a_table_with_escaped_texts():
    made = here(SMALL, {"baseline": "baseline", "<b>\u00e9&": fused})
    parser = _Tags()
    parser.feed(made._repr_html_())
    assert parser.open == []
    assert "<b>\u00e9&" in parser.texts and "reference" in parser.texts
    assert "<b>\u00e9&" in repr(made)


@pytest.mark.thorough
def test_without_a_baseline_the_first_is_the_reference():
    (case,) = here(SMALL, [fused, unmasked]).cases
    assert case.reference == "fused"


@pytest.mark.sampled(0.3)
@pytest.mark.parametrize(
    "given", [{"old": "baseline", "new": "baseline"}, {"mine": "baseline", "baseline": fused}, {"a": fused, "b": fused}]
)
def test_one_implementation_has_a_row_for_each_name(given):
    (case,) = here(SMALL, given).cases
    assert {row.implementation: row.status for row in case.rows} == dict.fromkeys(given, "ok")
    assert case.reference == next(iter(given))


def test_one_implementation_twice_is_two_instances():
    assert load_implementation(numbered("baseline", 2)) is not load_implementation("baseline")
    assert type(load_implementation(numbered("baseline", 2))) is type(load_implementation("baseline"))


def test_events_arrive_in_the_callers_thread():
    seen = []
    here(SMALL, fused, on_event=lambda event: seen.append((type(event), threading.current_thread())))
    assert on.CaseDone in {kind for kind, _ in seen}
    assert {thread for _, thread in seen} == {threading.current_thread()}


def test_what_raises_loses_its_row_only():
    def broken(q, k, v):
        raise ValueError("boom")

    (case,) = here(SMALL, [fused, broken]).cases
    status = {row.implementation: row for row in case.rows}
    assert status["fused"].status == "ok"
    assert (status["broken"].status, status["broken"].reason) == ("failed", "ValueError: boom")


def test_a_keyboard_interrupt_ends_a_run_in_this_process():
    def interrupted(q, k, v):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        here(SMALL, [fused, interrupted])


@pytest.mark.thorough
def test_names_are_forgotten_after_the_run():
    from attention.implementations import load_implementation

    here(SMALL, {"mine": fused})
    with pytest.raises(UsageError, match="mine"):
        load_implementation("mine")


@pytest.mark.parametrize(
    ("cases", "implementations", "options", "problem"),
    [
        ({"sequence": 4}, None, {}, "not a field of a case"),
        ({"seq": 0}, None, {}, "seq: got 0"),
        ("quick", None, {}, "^cases: got 'quick'; it takes a Workload, a mapping of its fields, or several of these$"),
        ({"seq": []}, None, {}, "a sweep of 0 cases"),
        ({"seq": range(1, 2000)}, None, {}, "a sweep of 1,999 cases"),
        ([], None, {}, "cases: got"),
        (7, None, {}, "cases: got 7"),
        ("quick", None, {}, "mapping of its fields"),
        ({"ranks": 2, "seq": 64}, None, {}, "ranks"),
        ({}, [], {}, "implementations: got none"),
        ({}, ["basline"], {}, "did you mean 'baseline'"),
        ({}, [3], {}, "implementations: got 3"),
        ({}, [fused, fused], {}, "'fused' occurs twice"),
        ({}, [lambda q, k, v: q], {}, "cannot be imported by the engine's process"),
        ({}, [Own()], {}, "give its class"),
        ({}, {"a\x1bb": "baseline"}, {}, "a name is printable"),
        ({}, None, {"seconds": "long"}, "seconds: got 'long'"),
        ({}, None, {"seconds": 0}, "seconds: got 0"),
        ({}, None, {"precision": True}, "precision: got True"),
        ({}, None, {"seed": -1}, "seed: got -1"),
        ({}, None, {"memory_limit_bytes": 1.5}, "memory_limit_bytes: got 1.5"),
        ({}, None, {"force": "no"}, "force: got 'no'; it takes True or False"),
        ({}, None, {"in_process": 1}, "in_process: got 1; it takes True or False"),
        ({}, None, {"force": 10**5000, "in_process": "no"}, "(?s)force: got a number of .*in_process: got 'no'"),
        ({}, [len], {"in_process": True}, "a function of q, k and v"),
    ],
)
def test_a_wrong_request_is_one_line(cases, implementations, options, problem):
    with pytest.raises(UsageError, match=problem) as caught:
        bench(cases, implementations, **options)
    assert all(len(line) < 300 for line in str(caught.value).splitlines())


def test_a_function_is_found_again_by_its_path():
    assert library._location(fused) == f"{__name__}:fused"
    assert library._location(Own) == f"{__name__}:Own"


def test_cases_of_several_kinds_are_taken_once():
    made = library._workloads(
        [Workload(seq=16), {"seq": [16, 32]}, {"pass": "decode", "seq": 64}, {"pass_": "training"}]
    )
    assert [(case.seq, case.pass_) for case in made] == [
        (16, "forward"),
        (32, "forward"),
        (1, "decode"),
        (512, "training"),
    ]


@pytest.mark.thorough
def test_a_decorated_function_stays_as_it_is():
    @benchmark(SMALL, against={"base": "baseline"}, seconds=0.05)
    def kernel(q, k, v, *, scale):
        return unmasked(q, k, v, scale)

    q = mx.ones((1, 1, 2, 2))
    assert kernel(q, q, q, scale=1.0).shape == (1, 1, 2, 2)
    assert [row.implementation for _, row in kernel.bench(in_process=True)] == ["base", "kernel"]


@pytest.mark.thorough
def test_the_process_measures_functions_and_survives_a_crash():
    named = {"baseline": "baseline", "mine": fused, "crash": ends_the_process}
    made = bench(SMALL, named, seconds=0.05)
    rows = {row.implementation: row for _, row in made}
    assert (rows["baseline"].status, rows["mine"].status) == ("ok", "ok")
    assert rows["crash"].status == "failed" and "code 7" in rows["crash"].reason


async def test_a_cancelled_task_ends_the_engine(monkeypatch):
    started = asyncio.Event()
    kills = []
    kill = library._LibraryRun.kill
    monkeypatch.setattr(library._LibraryRun, "kill", lambda self: (kills.append(self._process), kill(self)))
    task = asyncio.ensure_future(abench(SMALL, ["baseline"], seconds=60, on_event=lambda event: started.set()))
    await asyncio.wait_for(started.wait(), patient(60))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, patient(20))
    assert kills and kills[0].poll() is not None


def test_the_engines_process_starts_no_engine(monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", importlib.util.find_spec(library.WORKER))
    with pytest.raises(UsageError, match='put the call below `if __name__ == "__main__":`'):
        bench(SMALL, ["baseline"])


@pytest.mark.slow
def test_a_script_without_a_guard_is_reported(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            from attention import bench
            def mine(q, k, v):
                return q
            bench({"seq": 16}, ["baseline", mine], seconds=0.05)
        """)
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])},
    )
    assert done.returncode == 1
    assert '__name__ == "__main__"' in done.stderr.splitlines()[-1]


def imported_s(program: str, compiled: Path) -> float:
    """Return the least CPU time of a few processes that run a program, with its modules compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(compiled)
    times = []
    for _ in range(10):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


@pytest.mark.slow
def test_the_import_takes_less_than_20_ms_beyond_bare_python(tmp_path):
    assert imported_s("import attention", tmp_path) - imported_s("pass", tmp_path) < 0.02


def test_the_import_imports_nothing_heavy():
    heavy = "{'mlx', 'numpy', 'psutil', 'asyncio', 'subprocess', 'msgspec'}"
    program = f"import sys, attention; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
    assert callable(attention.bench)
