"""Tests of the fuzz tests: what a case is, what the check finds, and a few cases of each kind."""

import asyncio
import itertools
import json
import os
import subprocess
import sys
from contextlib import suppress

import mlx.core as mx
import numpy as np
import pytest

from attention import implementations as built_in
from tests.fuzz import __main__ as program
from tests.fuzz import cases, edges, patterns, quantized, reference
from tests.fuzz.__main__ import main
from tests.fuzz.judge import FAILURES, PEERS, Judge, implementations
from tests.fuzz.problem import exact, relaid
from tests.support.marks import slow

FAMILIES = {"broad": cases, "edges": edges, "patterns": patterns, "quantized": quantized}


@pytest.fixture(autouse=True)
def on_the_cpu():
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


def failures(family: str, mode: str, number: int, seed: int = 1) -> list[str]:
    problem = FAMILIES[family].problem(seed, number, mode)
    judge = Judge(problem)
    found = []
    for name, implementation in implementations(problem, mode, with_torch=False).items():
        outcome = judge.outcome(name, implementation)
        if outcome.verdict in FAILURES and name not in PEERS:
            found.append(f"{name}: {outcome.verdict}: {outcome.detail}")
    return found


@pytest.mark.sampled(0.5)
@pytest.mark.parametrize("number", [0, 1, slow(2), slow(3)])
@pytest.mark.parametrize("mode", ["forward", "gradient"])
def test_random_calls_are_right(mode, number):
    assert failures("broad", mode, number) == []


def theme(number: int) -> str:
    return edges.THEMES[number % len(edges.THEMES)].__name__


@pytest.mark.sampled(0.3)
@pytest.mark.parametrize("number", [0, 1, 2, 25, 4, 5, 39, 7, 8, 9, 10], ids=theme)
def test_calls_at_the_limits_are_right(number):
    assert failures("edges", "forward", number) == []


@pytest.mark.sampled(0.25)
@pytest.mark.parametrize("number", [11, 36, 26, 18], ids=theme)
def test_gradients_at_the_limits_are_right(number):
    assert failures("edges", "gradient", number) == []


@pytest.mark.sampled(0.5)
@pytest.mark.parametrize("number", [0, *map(slow, range(1, 5))])
@pytest.mark.parametrize("mode", ["forward", "gradient"])
def test_calls_with_masks_as_values_are_right(mode, number):
    assert failures("patterns", mode, number) == []


CANCELLING = [
    slow(("broad", 942, 501)),
    slow(("broad", 96, 1412)),
    ("broad", 1215, 501),
    ("broad", 1910, 501),
    ("edges", 124, 501),
    ("patterns", 36, 1),
]


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("case", CANCELLING, ids=str)
def test_gradients_that_cancel_are_right(case):
    family, number, seed = case
    assert failures(family, "gradient", number, seed) == []


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("mode", "count"), [("forward", 400), ("gradient", 150), ("demo", 60)])
def test_many_cases_are_right(family, mode, count):
    assert main(["--family", family, "--seed", "2", "--mode", mode, "--count", str(count), "--processes", "2"]) == 0


def test_a_case_is_the_same_in_every_version():
    """A reported seed must reproduce the same call later."""
    drawn = cases.draw(cases.generator(1, 3))
    assert (drawn.batch, drawn.kv_heads, drawn.heads, drawn.queries, drawn.keys) == (3, 1, 2, 210, 17)
    assert (drawn.dim, drawn.value_dim, drawn.dtype, drawn.scale, drawn.mask) == (126, 114, "float32", -0.3, "causal")
    assert (drawn.content, drawn.layouts) == ("const", (10, 8, 9))


@pytest.mark.parametrize("layout", range(9))
def test_a_layout_changes_no_value(layout):
    array = mx.random.normal((2, 3, 5, 4), key=mx.random.key(0))
    assert mx.array_equal(relaid(array, layout), array)


class Broken:
    """The baseline, with one fault."""

    name, title, summary = "broken", "Broken", "wrong on purpose"

    def __init__(self, spoil):
        self._spoil = spoil

    def route(self, *arguments):
        return built_in.load_implementation("baseline").route(*arguments)

    def __call__(self, q, k, v, **keywords):
        return self._spoil(built_in.load_implementation("baseline")(q, k, v, **keywords), v)


def additive_mask_case():
    for number in range(4, 400, len(edges.THEMES)):
        problem = edges.problem(1, number, "gradient")
        if problem.has_mask_gradient and problem.transform == "plain" and problem.mask.shape[-1] > 1:
            return problem
    raise AssertionError("no such case")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda output, v: output * 1.01, "output: "),
        (lambda output, v: output * float("nan"), "output: nan"),
        (lambda output, v: mx.stop_gradient(output), "dQ: "),
        (lambda output, v: output - mx.stop_gradient(output) * 0 + (v - mx.stop_gradient(v)).sum(), "dV: "),
    ],
)
def test_the_judge_names_what_is_wrong(spoil, words):
    outcome = Judge(additive_mask_case()).outcome("broken", Broken(spoil))
    assert outcome.verdict == "inaccurate"
    assert outcome.detail.startswith(words)


def test_a_result_of_another_shape_is_named():
    outcome = Judge(cases.problem(1, 3, "forward")).outcome("broken", Broken(lambda output, v: output[:, :, :-1]))
    assert (outcome.verdict, outcome.detail) == ("inaccurate", "output: shape (3, 2, 209, 114), not (3, 2, 210, 114)")


def test_a_mask_whose_gradient_is_left_out_is_found():
    problem = additive_mask_case()

    class Stopped(Broken):
        def __call__(self, q, k, v, *, mask, **keywords):
            from msgspec import structs

            stopped = structs.replace(mask, array=mx.stop_gradient(mask.array))
            return built_in.load_implementation("baseline")(q, k, v, mask=stopped, **keywords)

    outcome = Judge(problem).outcome("stopped", Stopped(None))
    assert (outcome.verdict, outcome.detail.partition(":")[0]) == ("inaccurate", "dMask")
    assert Judge(problem).outcome("baseline", "baseline").verdict == "ok"


def test_what_an_implementation_raises_is_an_outcome():
    def spoil(output, v):
        raise ZeroDivisionError("division by zero")

    outcome = Judge(cases.problem(1, 0, "forward")).outcome("broken", Broken(spoil))
    assert (outcome.verdict, outcome.detail) == ("exception", "ZeroDivisionError: division by zero")


def test_the_gradient_of_a_reference_is_its_difference_quotient():
    problem = additive_mask_case()
    judge = Judge(problem)
    step = 1e-3
    moved = edges.replace(problem, mask=problem.mask + step)
    change = ((Judge(moved).expected[0] - judge.expected[0]) * exact(problem.cotangent)).sum() / step
    assert abs(change - judge.expected[4].sum()) < 1e-2


def test_tf32_rounds_to_nearest_and_ties_to_even():
    bit = 2.0**-10
    given = np.array([1 + bit / 2, 1 + bit * 3 / 4, 1 + bit * 3 / 2, -1 - bit / 4])
    assert reference.in_tf32(given).tolist() == [1, 1 + bit, 1 + 2 * bit, -1]


@pytest.mark.slow
def test_a_process_that_dies_costs_one_case(tmp_path, capsys):
    plugin = tmp_path / "plugin.py"
    plugin.write_text(
        "import os, signal\n"
        "from attention.implementations import load_implementation\n"
        "class Deadly:\n"
        "    name, title, summary = 'deadly', 'Deadly', 'dies at single queries'\n"
        "    def route(self, *a): return load_implementation('baseline').route(*a)\n"
        "    def __call__(self, q, k, v, **more):\n"
        "        if q.shape[2] == 1: os.kill(os.getpid(), signal.SIGSEGV)\n"
        "        return load_implementation('baseline')(q, k, v, **more)\n"
    )
    out = tmp_path / "failures.jsonl"
    assert main(["--seed", "20", "--count", "12", "--impl", f"{plugin}:Deadly", "--out", str(out)]) == 1
    found = [json.loads(line) for line in out.read_text().splitlines()]
    single = [i for i in range(12) if cases.draw(cases.generator(20, i)).queries == 1]
    assert single
    assert [failure["case"] for failure in found if failure["verdict"] == "crashed"] == single
    assert "12 cases" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("step_s", "waits", "word"),
    [
        (1e-4, True, b"word\n"),  # it computes slowly, beside others
        (0.0, True, None),  # it waits for ever
        (1.0, True, None),  # it computes for ever
        (0.01, False, None),  # the time of the whole run is up
    ],
)
async def test_a_process_is_hung_if_it_takes_no_processor_or_too_much(step_s, waits, word, monkeypatch):
    speak = [sys.executable, "-S", "-c", "input(); print('word')"]
    process = await asyncio.create_subprocess_exec(
        *speak, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    asked = itertools.count()

    def processor_s(pid):
        number = next(asked)
        if number == 3:
            process.stdin.write(b"\n")
        return number * step_s

    monkeypatch.setattr(program, "_processor_s", processor_s)
    monkeypatch.setattr(program, "LEAST_SHARE", 1e-9)
    try:
        assert await program._line(process, 0.2, waits=waits) == word
    finally:
        with suppress(ProcessLookupError):  # it has ended by itself
            process.kill()
        await process.communicate()


def test_processor_time_has_that_of_children():
    before, of_children = program._processor_s(os.getpid()), os.times().children_user
    subprocess.run([sys.executable, "-S", "-c", "import time\nwhile time.process_time() < 0.3: pass"], check=True)
    assert os.times().children_user > of_children
    assert program._processor_s(os.getpid()) - before > 0.1


@pytest.mark.slow
def test_a_run_ends_soon_after_its_time(tmp_path, capsys, monkeypatch):
    plugin = tmp_path / "plugin.py"
    plugin.write_text(
        "import time\n"
        "from attention.implementations import load_implementation\n"
        "class Slow:\n"
        "    name, title, summary = 'slow', 'Slow', 'does not end'\n"
        "    def route(self, *a): return load_implementation('baseline').route(*a)\n"
        "    def __call__(self, *a, **more): time.sleep(600)\n"
    )
    monkeypatch.setattr(program, "MAX_OVERTIME_S", 1.0)
    assert main(["--count", "1", "--seconds", "3", "--impl", f"{plugin}:Slow"]) == 0
    assert "still running when the time was up" in capsys.readouterr().err


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize(
    "case", [slow(("broad", 5, 611)), ("broad", 93, 603), slow(("broad", 98, 603)), ("broad", 273, 501)], ids=str
)
def test_recomputed_weights_are_no_fault(case):
    """Float32 gradients of weights near 0 and 1, and of a small softcap; plain attention has next to no error there."""
    family, number, seed = case
    assert failures(family, "gradient", number, seed) == []


@pytest.mark.parametrize("number", [56, 219])
def test_tf32_counts_where_plain_attention_overflows(number, monkeypatch):
    """Scores beyond what float16 has; in TF32, as on CUDA, a row has another largest one."""
    monkeypatch.setattr(reference, "multiplies_in_tf32", lambda problem: True)
    judge = Judge(cases.problem(1401, number, "forward"))
    assert np.isnan(judge.plain[0]).any()
    assert np.abs(judge.in_tf32[0] - judge.expected[0]).max() > 2
    assert judge._judged("baseline", judge.in_tf32).verdict == "ok"
    assert judge._judged("baseline", [4 * judge.in_tf32[0]]).verdict == "inaccurate"


def test_a_small_fault_in_a_float32_gradient_is_still_found():
    problem = cases.problem(603, 93, "gradient")
    spoil = lambda output, v: output + 1e-4 * (v - mx.stop_gradient(v)).sum()  # noqa: E731
    assert Judge(problem).outcome("broken", Broken(spoil)).verdict == "inaccurate"


@pytest.mark.parametrize("overflowing", ["in_float32", "in_tf32"])
def test_an_overflow_of_either_wide_reference_counts_as_one(overflowing):
    """Where float32 or TF32 gives NaN, plain attention does, and 5 % of the largest number are accepted."""
    judge = Judge(cases.problem(1, 3, "forward"))
    expected = judge.expected[0]
    before = judge._allowed("poc", 0, expected, judge.plain[0])
    judge.in_float32, judge.in_tf32 = judge.expected, [expected + 0.001]
    setattr(judge, overflowing, [np.full_like(expected, np.nan)])
    assert judge._allowed("poc", 0, expected, judge.plain[0]) > before + 0.1
    assert judge._allowed("mlx", 0, expected, judge.plain[0]) == np.inf
