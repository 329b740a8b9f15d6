"""The steps that CUDA plans get, computed here by MLX: slots, positions and runs; and the launches of a plan."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from attention import StreamingKV
from attention.kernels.cuda.runtime.launch import NOTHING, NUMBER, PASSED, POINTER, SCRATCH
from attention.kernels.cuda.streaming import launch
from attention.streaming import attend
from tests.support.cuda_planted import signature
from tests.support.streaming_calls import ROPES, close, expected, made, rope_of
from tests.support.streaming_oracle import Sequence


class Computed:
    """What a plan does, by MLX's operations; counts its calls."""

    def __init__(self, kind, rope):
        self.kind, self.rope, self.calls, self.repeats = kind, rope, 0, 0

    def __call__(self, arrays, numbers):
        self.calls += 1
        q, k, v, keys, values = arrays[:5]
        slot, *rest = numbers
        positions, runs = rest[:3], list(zip(rest[3::2], rest[4::2], strict=True))
        versions = [self.rope.turned(q, p) for p in positions] if self.rope else [q] * 3
        keys[:, :, slot : slot + 1] = self.rope.turned(k, positions[0]) if self.rope else k
        values[:, :, slot : slot + 1] = v
        group = q.shape[1] // k.shape[1]
        scores = [
            (version.astype(mx.float32) @ mx.repeat(keys[:, :, a:b], group, 1).swapaxes(2, 3).astype(mx.float32))
            for version, (a, b) in zip(versions, runs, strict=True)
        ]
        weights = mx.softmax(mx.concatenate(scores, -1) * self.kind.call.scale, axis=-1)
        seen = mx.concatenate([mx.repeat(values[:, :, a:b], group, 1) for a, b in runs], 2)
        return (weights @ seen.astype(mx.float32)).astype(q.dtype)

    def repeated(self, like, fixed, latest, ring, seen, given):
        """What launcher_steps.hpp does."""
        first, window, size = ring
        kept = [(x.shape, x.dtype) for x in like]

        def step(q, k, v, *others):
            nonlocal seen
            if [(x.shape, x.dtype) for x in (q, k, v)] != kept or others != given:
                return None
            slot = first + (seen - first) % size
            at, seen = (slot if given[2] else 0), seen + 1
            positions = (slot - at, slot + size - at, first + window - 1 - at)
            self.repeats += 1
            arrays = [q, k, v, *fixed, latest]
            return self(arrays, [slot, *positions, first, slot + 1, slot + 1, first + size, 0, first])

        return step


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("rope", [None, ROPES["halves"], ROPES["adjacent"]], ids=["none", "halves", "adjacent"])
@pytest.mark.parametrize("rotated", [False, True])
def test_slots_positions_and_runs(monkeypatch, rope, rotated):
    """Steps over a full ring, between chunks, rewinds and forks, are attention over the kept tokens."""
    plans = []

    def plan(kind):
        plans.append(Computed(kind, rope_of(rope)))
        return plans[-1]

    monkeypatch.setattr(attend, "current_backend", lambda: "cuda")
    monkeypatch.setattr(launch, "plan", plan)
    state, oracle = StreamingKV(3, 9, rope=rope_of(rope)), Sequence(3, 9, rope=rope)
    for seed, length in enumerate([20, *[1] * 25, 4, *[1] * 12]):
        q, k, v = (np.array(mx.array(x).astype(mx.float16).astype(mx.float32)) for x in made(length, seed=seed))
        arrays = [mx.array(x).astype(mx.float16) for x in (q, k, v)]
        if rotated and rope is not None:
            arrays[:2] = [rope_of(rope).consecutive(x, state.offset) for x in arrays[:2]]
        got = state.attend(*arrays, rotated=rotated)
        assert close(got[0], expected(oracle, q[0], k[0], v[0]), 2e-2)
        if seed == 18:
            state.rewind(2)
            oracle.rewind(2)
    assert 25 <= sum(plan.calls for plan in plans) <= 37
    assert sum(plan.repeats for plan in plans) >= 20
    assert len(plans) == 1


@pytest.fixture
def recorded(monkeypatch):
    """A launcher that records the steps of plans, for an H200."""
    steps = []

    def make_plan(found, *_):
        steps.extend(found)
        return SimpleNamespace(with_numbers=None)

    module = SimpleNamespace(make_plan=make_plan)
    found = SimpleNamespace(architecture="sm_90a", multiprocessors=132, shared_memory_limit=232_448)
    monkeypatch.setattr("attention.kernels.cuda.runtime.launch.launcher", SimpleNamespace(module=lambda: module))
    monkeypatch.setattr("attention.kernels.cuda.runtime.launch.machine_code", lambda program: program)
    for name in ("streaming.launch", "sm90.launch", "quantized.launch"):
        monkeypatch.setattr(f"attention.kernels.cuda.{name}.gpu", lambda: found)
    monkeypatch.setattr(launch.launcher, "unavailable_reason", lambda: None)
    monkeypatch.setattr(launch.launcher, "module", lambda: SimpleNamespace(is_queued=None, is_traced=None))
    monkeypatch.setattr(launch.selfcheck, "check", lambda *_: None)
    monkeypatch.setattr(launch.attend, "first_trusted", lambda *_: "decode")
    monkeypatch.setattr(launch.attend, "distrust_of_packed", lambda *_: None)
    monkeypatch.setattr("attention.kernels.cuda.runtime.program.version", lambda: (13, 0))
    monkeypatch.setattr("attention.kernels.cuda.runtime.program.targets", lambda: (90,))
    launch.plan.cache_clear()
    yield steps
    launch.plan.cache_clear()


STEPS = [(None, 0, 2), (None, 64, 3), ("int4+mxfp4", 0, 2), ("int8+int4", 0, 2), ("int8+int4", 64, 3)]


@pytest.mark.parametrize(("kv_format", "dims", "launches"), STEPS)
def test_a_plan_writes_its_slots_before_it_reads_them(recorded, kv_format, dims, launches):
    """The first launch updates all slots, the next one reads them, and each gets the numbers of its step."""
    from attention.core.kv_format import parse_kv_format

    q = mx.zeros((2, 8, 1, 128), mx.bfloat16)
    form = None if kv_format is None else parse_kv_format(kv_format)
    kind = launch.kind_of(q, 516, 2, 0.1, None, dims, False, form)
    launch.plan(kind)
    assert len(recorded) == launches
    new, slots = map(len, kind.parts)
    first, second = recorded[:2]
    before = 1 + new + slots + (1 if dims else 0)
    assert before in first[5]  # it overwrites what the launches of the step before read
    written = first[6][:slots]
    assert set(written) == set(range(1 + new, 1 + new + slots))
    assert set(written) <= set(second[5])
    assert [argument[1] for argument in first[7] if argument[0] == PASSED] == ([0, 1, 2, 3] if dims else [0])
    assert [argument[1] for argument in second[7] if argument[0] == PASSED] == ([4, 5, 6, 7, 8, 9] if dims else [])
    assert first[2] == 2 * 2 + (2 * 8 if dims else 0)
    like = {PASSED: NUMBER, NOTHING: POINTER, SCRATCH: POINTER}
    for _, program, *_, arguments in recorded[: 1 if form and not dims else None]:  # the next one has tests of its own
        assert [like.get(argument[0], argument[0]) for argument in arguments] == signature(program), program.name


@pytest.mark.parametrize("queued,traced", [(True, False), (False, False), (True, True)])
def test_a_queue_of_steps_starts_before_it_ends(monkeypatch, queued, traced):
    """Each eighth step of a queue starts the GPU; a step after an evaluated one or in a transformation does not."""
    started = []
    module = SimpleNamespace(is_queued=lambda before: queued, is_traced=lambda arrays: traced)
    monkeypatch.setattr(launch.launcher, "module", lambda: module)
    monkeypatch.setattr(launch.mx, "async_eval", started.append)
    outputs = [mx.array(i) for i in range(20)]
    remaining = iter(outputs)
    step = launch.StepPlan(SimpleNamespace(with_numbers=lambda *_: [next(remaining)]))
    for _ in outputs:
        step([outputs[0]], [0])
    assert [int(x) for x in started] == ([7, 15] if queued and not traced else [])
