"""The autotuner tries candidates that fit, keeps the fastest accurate one, stores it, and reports it."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import mlx.core as mx
import pytest
from msgspec import structs

from attention.core import events as on
from attention.core.route import NO_NEEDS
from attention.core.workload import DType, Workload
from attention.implementations.autotune.implementation import Demo, _path
from attention.implementations.autotune.store import Store, class_of
from attention.implementations.autotune.trial import AccuracyCheck, Task, candidates, fitting_candidates
from attention.implementations.baseline import Baseline
from attention.implementations.bounded.implementation import Practical
from attention.implementations.calls import make_inputs, runner_for
from attention.implementations.fused import _variant_path
from attention.implementations.protocol import Implementation
from attention.kernels.common import cache
from attention.masks import Mask, of_workload
from attention.measure.device import probe
from tests.support.attention_examples import CPU
from tests.support.tuning_examples import Broken, FakeTime, Timed, Wrong

WORKLOAD = Workload(seq=32, heads=2, head_dim=8, dtype="float32")
Heard = list[on.TuningEvent | on.Message]


@pytest.fixture
def heard() -> Iterator[Heard]:
    events: Heard = []
    with on.listening_to_tuning(events.append):
        yield events


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "tuning.toml")


def make(store: Store, **among: Implementation) -> Demo:
    """Make a tuner; if all its candidates take a planted time, that is all the time that passes."""
    clock = FakeTime()
    timed = [each for each in among.values() if isinstance(each, Timed)]
    if not timed or len(timed) < len(among):
        return Demo(store=store, among=among or None, budget_s=0.1)
    for each in timed:
        each.seconds, each._clock = each.seconds or 1e-5, clock
    return Demo(store=store, among=among, budget_s=0.1, clock=clock)


def call(demo: Demo, workload: Workload = WORKLOAD, mask: Mask | None = None) -> mx.array:
    q, k, v = make_inputs(workload, 0)[:3]
    return demo(q, k, v, scale=0.5, mask=mask or Mask())


def test_the_route_tells_before_and_after_the_trial(store: Store) -> None:
    demo = make(store)
    assert demo.route(WORKLOAD, CPU).path == "not tried yet"
    call(demo)
    device = probe()
    route = demo.route(WORKLOAD, device)
    assert route.path.startswith("tuned: ")
    assert len(route.path) <= 22


def test_the_fastest_is_kept_and_called_from_then_on(store: Store, heard: Heard) -> None:
    slow, fast = Timed("slow", 0.004), Timed("fast", 0.001)
    demo = make(store, slow=slow, fast=fast)
    call(demo)
    before = slow.calls
    for _ in range(10):
        call(demo)
    assert slow.calls == before
    tuned = next(event for event in heard if isinstance(event, on.Tuned))
    assert (tuned.winner, tuned.runner_up) == ("fast", "slow")
    assert isinstance(heard[0], on.TrialStarted)


SHAPE = (1, 2, 32, 8)
TELL_NOTHING = {
    "zeros": lambda: mx.zeros(SHAPE),
    "constants": lambda: mx.full(SHAPE, 0.7),
    "one row": lambda: mx.broadcast_to(mx.random.normal((8,), key=mx.random.key(1)), SHAPE),
    "one-hot": lambda: mx.broadcast_to(mx.eye(8)[mx.arange(32) % 8], SHAPE) + 0,
    "infinities": lambda: mx.full(SHAPE, mx.inf),
    "NaN": lambda: mx.full(SHAPE, mx.nan),
}


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("content", TELL_NOTHING)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_inputs_that_tell_nothing_settle_no_choice(store: Store, heard: Heard, content: str, dtype: mx.Dtype) -> None:
    """A candidate with wrong weights is correct for constant values, and as correct as any for NaN."""

    class Uniform(Timed):
        def __call__(self, q: mx.array, k: mx.array, v: mx.array, **more: object) -> mx.array:
            self.calls += 1
            return mx.broadcast_to(mx.mean(v, axis=2, keepdims=True), q.shape)

    array = TELL_NOTHING[content]().astype(dtype)
    demo = make(store, uniform=Uniform("uniform", 0.0), right=Timed("right", 0.001))
    demo(array, array, array, scale=0.5, mask=Mask())
    tuned = [event.winner for event in heard if isinstance(event, on.Tuned)]
    assert tuned == ["right"]
    (entry,) = store.entries()
    assert entry.max_error is not None and 0 < entry.max_error < 0.1


def test_another_process_needs_no_trial(store: Store, heard: Heard) -> None:
    call(make(store, a=Timed("a", 0.001), b=Timed("b", 0.003)))
    heard.clear()
    again = Timed("a", 0.001)
    call(make(Store(store.path), a=again, b=Timed("b", 0.0)))
    assert again.calls == 1
    assert heard == []


def test_a_candidate_that_was_never_tried_makes_a_new_trial(store: Store) -> None:
    call(make(store, a=Timed("a", 0.003)))
    newcomer = Timed("b", 0.0)
    call(make(Store(store.path), a=Timed("a", 0.003), b=newcomer))
    assert newcomer.calls > 0
    assert store.entries()[0].winner == "b"


def test_an_inaccurate_winner_falls_out_with_a_message(store: Store, heard: Heard) -> None:
    call(make(store, wrong=Wrong("wrong", 0.0), right=Timed("right", 0.002)))
    assert store.entries()[0].winner == "right"
    warnings = [event.text for event in heard if isinstance(event, on.Message)]
    assert len(warnings) == 1
    assert warnings[0].startswith("demo: wrong is out for ")
    assert "inaccurate: output:" in warnings[0]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("shape", [(32,), (32, 1), (32, 32), (1, 2, 1, 32), (1, 1, 32, 32), (1, 2, 32, 32)], ids=str)
def test_accuracy_is_checked_with_array_masks_and_softcaps_too(
    store: Store, shape: tuple[int, ...], softcap: float | None
) -> None:
    class Off(Baseline):
        def __call__(self, *arrays: mx.array, **further: object) -> mx.array:
            return super().__call__(*arrays, **further) * 1.05  # type: ignore[arg-type]

    demo = make(store, right=Baseline(), off=Off())
    q, k, v = make_inputs(WORKLOAD, 0)
    mask = Mask(array=mx.random.normal(shape, key=mx.random.key(1)) > -0.5)
    task = Task(workload=WORKLOAD, inputs=[q, k, v], scale=0.5, mask=mask, softcap=softcap)
    for name, wrong in (("right", False), ("off", True)):
        assert bool(AccuracyCheck(task).error(demo.candidates[name])[1]) == wrong


def test_what_cannot_run_falls_out_with_a_message(store: Store, heard: Heard) -> None:
    call(make(store, broken=Broken(), works=Baseline()))
    assert store.entries()[0].winner == "works"
    assert any(isinstance(each, on.Message) and "broken is out" in each.text for each in heard)


def test_the_runner_tunes_its_pass_before_the_clock_starts(store: Store) -> None:
    device = probe()
    demo = make(store)
    training = structs.replace(WORKLOAD, pass_="training")
    runner = runner_for(demo, training, make_inputs(training, 0), 0.5)
    assert demo.route(training, device).path.startswith("tuned: ")
    assert len(runner.results()) == 4
    assert demo.route(WORKLOAD, device).path == "not tried yet"


@pytest.mark.thorough
def test_calls_may_be_taken_as_training(store: Store) -> None:
    demo = Demo(store=store, pass_="training", budget_s=0.1)
    call(demo)
    assert [entry.workload.pass_ for entry in store.entries()] == ["training"]


def test_what_is_predicted_not_to_fit_is_never_tried() -> None:
    tight = structs.replace(CPU, available_bytes=1)
    assert fitting_candidates(candidates(), WORKLOAD, tight, NO_NEEDS) == ["practical"]


def test_block_sizes_are_candidates_where_they_differ() -> None:
    long = Workload(seq=2048, mask="causal")
    assert {"practical", "practical 8 MiB"} <= set(fitting_candidates(candidates(), long, CPU, NO_NEEDS))
    assert not [
        name for name in fitting_candidates(candidates(), WORKLOAD, CPU, NO_NEEDS) if name.startswith("practical")
    ]


def test_choices_made_with_other_code_are_tried_anew(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    call(make(store, a=Timed("a", 0.001), b=Timed("b", 0.003)))
    monkeypatch.setattr("attention.implementations.autotune.implementation.candidate_fingerprint", lambda: "other")
    monkeypatch.setattr("attention.implementations.autotune.trial.candidate_fingerprint", lambda: "other")
    call(make(Store(store.path), a=Timed("a", 0.003), b=Timed("b", 0.001)))
    assert [(entry.winner, entry.made_with) for entry in store.entries()] == [("b", "other")]


def test_the_code_mark_changes_with_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = tmp_path / "kernels" / "cpu" / "forward.cpp"
    kernel.parent.mkdir(parents=True)
    kernel.write_text("slow")
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "kernels" / "common" / "cache.py"))
    before = cache.code_fingerprint.__wrapped__("implementations", "kernels")
    assert cache.code_fingerprint.__wrapped__("implementations", "kernels") == before
    kernel.write_text("fast")
    assert cache.code_fingerprint.__wrapped__("implementations", "kernels") != before
    assert cache.code_fingerprint.__wrapped__("kernels/cuda") == cache.code_fingerprint.__wrapped__("kernels/metal")


@pytest.mark.parametrize(
    "array", [None, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (mx.float32, mx.bool_))], ids=str
)
@pytest.mark.compiles
def test_tracing_before_any_trial_runs_one_on_own_inputs(store: Store, array: mx.Dtype | None) -> None:
    slow, fast = Timed("slow", 0.004), Timed("fast", 0.001)
    demo = make(store, slow=slow, fast=fast)
    inputs = make_inputs(WORKLOAD, 0)
    if array is not None:
        inputs.append((mx.random.uniform(shape=(32, 32)) > 0.5).astype(array))

    def function(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None) -> mx.array:
        return demo(q, k, v, scale=0.5, mask=Mask(array=mask))

    (out,) = mx.compile(lambda *arrays: [function(*arrays)])(*inputs)
    mask = Mask(array=inputs[3] if array is not None else None)
    assert mx.allclose(out, Baseline()(*inputs[:3], scale=0.5, mask=mask), atol=1e-5)
    (entry,) = store.entries()
    assert entry.winner == "fast"
    assert entry.workload.mask == ("none" if array is None else "array")


@pytest.mark.thorough
@pytest.mark.compiles
def test_tracing_a_training_step_runs_a_trial_of_both_passes(store: Store) -> None:
    demo = make(store).for_training()
    q, k, v = make_inputs(WORKLOAD, 0)

    def loss(q: mx.array, k: mx.array, v: mx.array, attend: Implementation) -> mx.array:
        return attend(q, k, v, scale=0.5, mask=Mask()).square().sum()

    step = mx.compile(mx.value_and_grad(lambda *arrays: loss(*arrays, demo), argnums=(0, 1, 2)))
    found = step(q, k, v)
    expected = mx.value_and_grad(lambda *arrays: loss(*arrays, Baseline()), argnums=(0, 1, 2))(q, k, v)
    assert mx.allclose(found[0], expected[0], rtol=1e-5)
    assert all(mx.allclose(a, b, atol=1e-4) for a, b in zip(found[1], expected[1], strict=True))
    assert [entry.workload.pass_ for entry in store.entries()] == ["training"]


@pytest.mark.thorough
def test_what_was_tried_for_training_shows_in_the_route(store: Store) -> None:
    demo = make(store)
    call(demo.for_training())
    assert demo.route(structs.replace(WORKLOAD, pass_="training"), probe()).path.startswith("tuned: ")
    assert demo.route(WORKLOAD, probe()).path == "not tried yet"


@pytest.mark.compiles
def test_without_memory_for_own_inputs_the_routes_decide(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = make(store, practical=Practical(), other=Timed("other", 0.0))
    tight = structs.replace(probe(), available_bytes=2 * WORKLOAD.input_bytes - 1)
    monkeypatch.setattr("attention.implementations.autotune.implementation.probe", lambda: tight)
    traced = mx.compile(lambda q, k, v: demo(q, k, v, scale=0.5, mask=Mask()))
    mx.eval(traced(*make_inputs(WORKLOAD, 0)))
    assert store.entries() == []


@pytest.mark.compiles
def test_a_function_traced_later_gets_the_tuned_choice(store: Store) -> None:
    call(make(store, slow=Timed("slow", 0.004), fast=Timed("fast", 0.0)))
    slow, fast = Timed("slow", 0.0), Timed("fast", 0.0)
    demo = make(Store(store.path), slow=slow, fast=fast)
    q, k, v = make_inputs(WORKLOAD, 0)
    traced = mx.compile(lambda q, k, v: demo(q, k, v, scale=0.5, mask=Mask()))
    mx.eval(traced(q, k, v))
    assert (fast.calls, slow.calls) == (1, 0)


@pytest.mark.compiles
def test_tracing_many_layers_never_looks(store: Store) -> None:
    fast, slow = Timed("fast", 0.0), Timed("slow", 0.003)
    demo = make(store, fast=fast, slow=slow)
    q, k, v = make_inputs(WORKLOAD, 0)
    call(demo)
    fast.calls = slow.calls = 0

    def layers(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        for _ in range(100):
            q = demo(q, k, v, scale=0.5, mask=Mask())
        return q

    mx.eval(mx.compile(layers)(q, k, v))
    assert (fast.calls, slow.calls) == (100, 0)


def test_gradients_flow_through_calls_that_are_looked_at(store: Store) -> None:
    demo = make(store, a=Timed("a", 0.0), b=Timed("b", 0.003))
    q, k, v = make_inputs(WORKLOAD, 0)
    loss = mx.grad(lambda q: demo(q, k, v, scale=0.5, mask=Mask()).sum())
    expected = mx.grad(lambda q: Baseline()(q, k, v, scale=0.5, mask=Mask()).sum())(q)
    for _ in range(40):
        assert mx.allclose(loss(q), expected, atol=1e-5)


def test_dispatch_makes_few_calls(store: Store) -> None:
    demo = make(store, one=Timed("one", 0.001))
    q, k, v = make_inputs(WORKLOAD, 0)[:3]
    call(demo)
    (standing,) = demo._keys.values()

    def made(function: Callable[..., mx.array]) -> int:
        """Calls of Python's and C's functions in one call; fewest of some, for now and then a call is looked at."""
        counts = []
        for _ in range(5):
            counts.append(0)

            def count(frame: object, event: str, argument: object) -> None:
                counts[-1] += event in ("call", "c_call")

            sys.setprofile(count)
            try:
                function(q, k, v, scale=0.5, mask=Mask())
            finally:
                sys.setprofile(None)
        return min(counts)

    assert made(demo) - made(standing.call) <= 12


@pytest.mark.slow
@pytest.mark.quiet
def test_dispatch_costs_less_than_5_us(store: Store) -> None:
    demo = make(store)
    q, k, v = make_inputs(Workload(seq=64, heads=8, head_dim=32), 0)
    mask = Mask(causal=True)
    demo(q, k, v, scale=0.5, mask=mask)
    (standing,) = demo._keys.values()
    pairs = []
    for number in range(1000):
        took = {}
        for one in (demo, standing.call) if number % 2 else (standing.call, demo):
            started = time.perf_counter()
            out = one(q, k, v, scale=0.5, mask=mask)
            took[one is demo] = time.perf_counter() - started
            del out
        pairs.append(took[True] - took[False])
    # Other load only adds to a time: the quickest of ten stretches is what the dispatch itself costs.
    cost = min(median(pairs[start : start + 100]) for start in range(0, len(pairs), 100))
    assert cost < 5e-6, f"{cost * 1e6:.2f} us"


@pytest.mark.thorough
def test_what_looks_cost_is_bounded_by_the_clock(store: Store) -> None:
    clock = FakeTime()
    demo = Demo(store=store, among={"a": Timed("a", 1e-6, clock)}, clock=clock)
    q, k, v = make_inputs(WORKLOAD, 0)
    looks = 0
    before = demo._sampled_call

    def counted(*arguments: object) -> mx.array:
        nonlocal looks
        (standing,) = demo._keys.values()
        was = standing.last_check_s
        out = before(*arguments)  # type: ignore[arg-type]
        looks += standing.last_check_s != was
        return out

    demo._sampled_call = counted  # type: ignore[method-assign]
    for _ in range(5000):
        demo(q, k, v, scale=0.5, mask=Mask())
    assert 1 <= looks <= 2  # 5000 calls of 1 us are one rest of 5 ms


def test_a_path_of_many_letters_ends_in_an_ellipsis() -> None:
    assert _path("practical 1024 MiB") == "tuned: practical 1024…"
    assert _variant_path("CUDA kernel sm90", "two tiles") == "CUDA kernel sm90, two…"
    assert _path("poc") == "tuned: poc"


PATTERN = Workload(mask="prefix:4+window:10", seq=130, heads=4, kv_heads=2, head_dim=16, dtype="float32")


def test_a_pattern_is_tried_too_and_a_wrong_candidate_is_out(store: Store, heard: Heard) -> None:
    demo = make(store, wrong=Wrong("wrong", 0.0), lists=Timed("lists", 0.005), dense=Timed("dense", 0.02))
    mask = of_workload(PATTERN)
    out = call(demo, PATTERN, mask)
    q, k, v = make_inputs(PATTERN, 0)[:3]
    assert mx.allclose(out, Baseline()(q, k, v, scale=0.5, mask=mask), atol=1e-5)
    assert demo.route(PATTERN, probe()).path == "tuned: lists"
    assert any("wrong is out" in event.text for event in heard if isinstance(event, on.Message))
    assert [entry.winner for entry in store.entries()] == ["lists"]


def test_masks_of_one_density_are_one_class() -> None:
    of_tool, other = PATTERN, structs.replace(PATTERN, mask=f"pattern:{PATTERN.density}")
    assert class_of(of_tool, CPU).mask == class_of(other, CPU).mask == "pattern 1/8"
    assert class_of(structs.replace(PATTERN, mask="blocks:1"), CPU).mask == "pattern 1/1"
    assert class_of(structs.replace(PATTERN, mask="pattern:0"), CPU).mask == "pattern 1/65536"


def test_with_a_pattern_mlx_is_no_candidate_twice() -> None:
    fit = fitting_candidates(candidates(), PATTERN, probe(), NO_NEEDS)
    assert "mlx" in fit and "practical" in fit
    assert "mlx compiled" not in fit


@pytest.mark.parametrize("array", [None, "bool", "additive"])
def test_a_pattern_of_a_program_is_checked_against_float64(array: str | None) -> None:
    workload = structs.replace(PATTERN, mask=f"pattern:{PATTERN.density}")
    given = None
    if array:
        given = (mx.random.uniform(shape=(1, 4, 130, 130)) > 0.3) | mx.eye(130, dtype=mx.bool_)
        given = given if array == "bool" else _hides_a_row(given)
    mask = structs.replace(of_workload(PATTERN), array=given)
    check = AccuracyCheck(Task(workload=workload, inputs=make_inputs(PATTERN, 0), scale=0.25, mask=mask))
    assert check.error(Baseline())[1] == ""
    assert "off" in check.error(Wrong("wrong", 0.0))[1]


def _hides_a_row(shown: mx.array) -> mx.array:
    """Return an additive mask with -1e9 where nothing is shown and in one row, of whose scores float32 keeps none."""
    return mx.where(shown & (mx.arange(shown.shape[2])[:, None] != 40), 0.0, -1e9)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_hidden_row_does_not_excuse_the_others(dtype: DType) -> None:
    workload = structs.replace(PATTERN, mask="none", dtype=dtype)
    mask = Mask(array=_hides_a_row(mx.random.uniform(shape=(1, 1, 130, 130)) > 0.3))
    check = AccuracyCheck(Task(workload=workload, inputs=make_inputs(workload, 0), scale=0.25, mask=mask))
    assert check.error(Baseline())[1] == ""
    assert check.error(Practical(65536))[1] == ""
    assert "off" in check.error(Wrong("wrong", 0.0))[1]
