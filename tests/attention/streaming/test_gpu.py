"""Streaming states on a CUDA device, against float64 over the same kept tokens."""

import mlx.core as mx
import numpy as np
import pytest

from attention import StreamingKV, quantized
from attention.core.kv_format import parse_kv_format
from attention.streaming import attend
from tests.support.streaming_calls import ROPES, close, expected, made, rope_of
from tests.support.streaming_oracle import Sequence

pytestmark = pytest.mark.gpu
ERROR = {mx.bfloat16: 4e-2, mx.float16: 6e-3}


def rounded(x: np.ndarray, dtype: mx.Dtype) -> tuple[mx.array, np.ndarray]:
    """Return tokens in a dtype, and their values."""
    array = mx.array(x).astype(dtype)
    return array, np.array(array.astype(mx.float32))


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("implementation", ["poc", "practical"])
def test_chunks_of_any_length(dtype, rope, implementation):
    """Steps and chunks through the wrap-around equal float64."""
    state, oracle = StreamingKV(4, 300, rope=rope_of(rope)), Sequence(4, 300, rope=rope)
    for seed, length in enumerate((2, 1, 290, *[1] * 20, 700, *[1] * 20, 5)):
        arrays, values = zip(*(rounded(x, dtype) for x in made(length, seed=seed, width=64)), strict=True)
        got = state.attend(*arrays, implementation=implementation)
        assert close(got[0], expected(oracle, *(x[0] for x in values)), ERROR[dtype])
    assert state.kept().tolist() == oracle.kept()


@pytest.mark.parametrize("kv_format", ["int8", "int4"])
def test_quantized_storage(kv_format):
    """A step reads what `mx.quantize` makes of each token."""
    forms = parse_kv_format(kv_format)
    state, oracle = StreamingKV(4, 40, kv_format), Sequence(4, 40)
    for seed in range(100):
        arrays, values = zip(*(rounded(x, mx.bfloat16) for x in made(1, seed=seed, width=64)), strict=True)
        read = [quantized(x, f).exact() for x, f in zip(arrays[1:], (forms.key, forms.value), strict=True)]
        assert close(state.attend(*arrays)[0], expected(oracle, values[0][0], read[0][0], read[1][0]), 4e-2)


@pytest.mark.parametrize("rope", [ROPES["halves"], ROPES["adjacent"]], ids=["halves", "adjacent"])
@pytest.mark.parametrize("kv_format", ["int8", "int4", "mxfp4", "int6:32+int3"])
@pytest.mark.parametrize("rotated", [False, True])
def test_quantized_storage_with_rope(monkeypatch, kv_format, rope, rotated):
    """Steps of the kernels over a quantized ring with rotary positions equal attention in parts over the same ring."""
    taken = []

    def watched(name):
        method = getattr(attend.Step, name)

        def call(*given):
            made = method(*given)
            taken.append(made is not None)
            return made

        monkeypatch.setattr(attend.Step, name, call)

    watched("on_cuda")
    watched("repeat")
    steps, parts = (StreamingKV(4, 300, kv_format, rope=rope_of(rope)) for _ in range(2))
    for seed, length in enumerate((400, *[1] * 40, 700, *[1] * 40)):
        q, k, v = (rounded(x, mx.bfloat16)[0] for x in made(length, seed=seed, width=64))
        if rotated:
            q, k = (rope_of(rope).consecutive(x, steps.offset) for x in (q, k))
        got = steps.attend(q, k, v, implementation="poc", rotated=rotated)
        wanted = parts.attend(q, k, v, implementation="practical", rotated=rotated)
        assert close(got[0], np.array(wanted.astype(mx.float32))[0], 4e-2)
    assert sum(taken) == 80


@pytest.mark.parametrize("kv_format", ["int8", "int4", "int6:32+int3", "int5:128+int2:32"])
@pytest.mark.parametrize("dtype", ERROR, ids=str)
def test_steps_store_the_bits_of_mx_quantize(kv_format, dtype):
    """A row that is quantized by the kernel of a step is what `mx.quantize` makes of it."""
    steps, parts = (StreamingKV(4, 60, kv_format) for _ in range(2))
    for seed, length in enumerate((64, *[1] * 50)):
        q, k, v = (rounded(x * (1 + 10 * (seed % 3)), dtype)[0] for x in made(length, seed=seed, width=128))
        k = k + (seed % 5 - 2) * 4  # groups of one sign, too
        steps.attend(q, k, v, implementation="poc")
        parts.attend(q, k, v, implementation="practical")
    for one, other in zip(*(state.evaluated()._kept["streaming"].arrays for state in (steps, parts)), strict=True):
        assert mx.array_equal(one, other).item()


@pytest.mark.parametrize("rope", [None, ROPES["halves"]], ids=["none", "halves"])
@pytest.mark.parametrize("kv_format", ["none", "int4", "int8:128", "mxfp4"])
def test_queued_steps_are_those_evaluated_one_by_one(kv_format, rope):
    """MLX runs launches of a queue side by side: a step must not overwrite what the one before still reads."""
    mx.random.seed(3)
    queued, alone = (StreamingKV(4, 4000, kv_format, rope=rope_of(rope)) for _ in range(2))
    before = [mx.random.normal((1, 8, 4010, 128)).astype(mx.bfloat16) for _ in range(2)]
    tokens = [[2 * mx.random.normal((1, h, 1, 128)).astype(mx.bfloat16) for h in (32, 8, 8)] for _ in range(40)]
    outputs = []
    for state in (queued, alone):
        state.append(*before)
        state.evaluated()
    mx.eval(tokens)
    for token in tokens:
        outputs.append(alone.attend(*token))
        mx.eval(outputs[-1])
    found = [queued.attend(*token) for token in tokens]
    mx.eval(found)
    assert [i for i, (a, b) in enumerate(zip(found, outputs, strict=True)) if not mx.array_equal(a, b).item()] == []


def test_memory_does_not_grow():
    """Many steps, evaluated one by one or together, take one ring and their outputs: none is copied."""
    state = StreamingKV(4, 4096, rope=rope_of(ROPES["halves"]))
    arrays = [mx.array(x).astype(mx.bfloat16) for x in made(4100, width=128)[1:]]
    state.append(*arrays)
    q, k, v = (mx.array(x).astype(mx.bfloat16) for x in made(1, width=128))
    for _ in range(200):
        mx.eval(state.attend(q, k, v))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(20):
        mx.eval([state.attend(q, k, v) for _ in range(64)])
    mx.synchronize()  # scratch of the last kernels is freed when they have run, which is after the outputs are there
    assert mx.get_active_memory() <= before + 2**20
    assert mx.get_peak_memory() <= before + 64 * state.nbytes // 2  # with a copy for each step it was 64 rings
