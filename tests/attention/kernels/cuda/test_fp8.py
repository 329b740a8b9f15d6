"""The CUDA kernels in 8 bits: compiled without a GPU, and against their recipe in float64 on a Hopper GPU."""

from dataclasses import replace

import numpy as np
import pytest

from attention.kernels import cuda
from attention.kernels.cuda.runtime.program import SHARED_MEMORY_LIMIT
from attention.kernels.cuda.sm90.forward import fewer_consumers
from attention.kernels.cuda.sm90.fp8 import Quantize, specialise
from tests.support import fp8_model
from tests.support.cuda_compiled import REGISTERS, needs_nvrtc, report

on_hopper = pytest.mark.skipif(cuda.variant() != "hopper", reason="only Hopper GPUs have these kernels")
FORWARD = [
    specialise(width, causal, "bf16", window)
    for width in (64, 128)
    for causal, window in ((False, False), (True, False), (True, True))
]
PROGRAMS = [Quantize(width, "bf16").program for width in (64, 128)] + [
    kernel.program for largest in FORWARD for kernel in (largest, *fewer_consumers(largest))
]
SIZES = [  # batch, heads, kv_heads, queries, keys
    (1, 2, 2, 128, 128),
    (2, 4, 2, 300, 523),
    (1, 3, 1, 523, 300),
    (1, 2, 1, 1000, 1000),
    (1, 1, 1, 129, 1),
    (1, 2, 2, 256, 2049),
]


@needs_nvrtc
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_programs_in_8_bits_spill_nothing_and_overlap(program):
    found = report(program)
    assert found.stack == found.spilled == 0, found.log
    assert "serialized" not in found.log
    assert found.registers * program.threads <= REGISTERS
    assert program.shared_memory <= SHARED_MEMORY_LIMIT


def arrays(size, dim, kind="normal"):
    """Return q, k and v in float64, representable in bfloat16; `kind` names what is unusual about them."""
    batch, heads, kv_heads, queries, keys = size
    random = np.random.default_rng(5)
    q, k, v = (
        random.standard_normal(shape)
        for shape in ((batch, heads, queries, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim))
    )
    if kind == "constant outliers":
        k[..., [3, 17, 40]] += np.array([30, -45, 60])
    if kind == "outlier channels":
        k[..., [3, 17, 40]] *= 20
    if kind == "large scores":
        q *= 4
    if kind == "growing values":
        v *= np.exp(np.arange(keys) / 100)[:, None]
    if kind == "a sink":  # the scores of all other keys are negative
        q, k = np.abs(q), k * 0.05
        k[..., 0, :] = 10
    if kind == "rising scores":  # from the last keys to the first, which come last: bases are raised in most tiles
        k *= np.linspace(6, 0.1, keys)[:, None]
    if kind == "an empty block":
        v[..., 128:256, :] = k[..., 128:256, :] = 0
    return [(x.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float64) for x in (q, k, v)]


def on_device(made):
    import mlx.core as mx

    return [mx.array(x.astype(np.float32)).astype(mx.bfloat16) for x in made]


def numbers(array):
    import mlx.core as mx

    return np.array(array.astype(mx.float32)).astype(np.float64)


def attend(made, mask):
    from attention import attention

    keywords = {"window": mask} if isinstance(mask, int) else {"mask": mask}
    return attention(*made, **keywords, implementation="poc-fp8")


def by_head(made, recipe, mask):
    """Return a recipe's output for every head."""
    q, k, v = made
    group = q.shape[1] // k.shape[1]
    window = mask if isinstance(mask, int) else None
    found = [
        recipe(q[b, h], k[b, h // group], v[b, h // group], q.shape[3] ** -0.5, mask is not None, window)
        for b, h in np.ndindex(*q.shape[:2])
    ]
    return np.reshape(found, q.shape)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("mask", [None, "causal", 100])
def test_outputs_are_those_of_the_recipe(mask, dim):
    for size in SIZES:
        made = arrays(size, dim)
        found = numbers(attend(on_device(made), mask))
        expected = by_head(made, fp8_model.kernel_recipe, mask)
        assert fp8_model.relative_rmse(found, expected) < 0.02, size


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("consumers", [1, 2, 3])
@pytest.mark.parametrize("dim", [64, 128])
def test_variants_with_fewer_consumers_agree_and_split_tiles(dim, consumers):
    from attention.kernels.cuda.runtime.call import CallShape, normalize
    from attention.kernels.cuda.sm90 import fp8_launch

    made = arrays((1, 1, 1, 300, 5000), dim)  # few tiles with many keys, which are split over blocks
    shape, call = CallShape(1, 1, 1, 300, 5000, dim, "bf16"), normalize(dim**-0.5, False, None, None, 5000)
    largest = specialise(dim, False, "bf16", False)
    kernel = next(each for each in (largest, *fewer_consumers(largest)) if each.consumers == consumers)
    found = numbers(fp8_launch.plan(shape, call, kernel)(*on_device(made))[0])
    assert fp8_model.relative_rmse(found, by_head(made, fp8_model.kernel_recipe, None)) < 0.02


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("mask", [None, "causal"])
@pytest.mark.parametrize(
    "kind",
    [
        "normal",
        "constant outliers",
        "outlier channels",
        "large scores",
        "growing values",
        "rising scores",
        "an empty block",
        "a sink",
    ],
)
def test_errors_are_at_most_three_times_the_published_recipes(kind, mask):
    made = arrays((1, 2, 1, 1024, 1024), 128, kind)
    exact, published = by_head(made, fp8_model.exact, mask), by_head(made, fp8_model.sage, mask)
    error = fp8_model.relative_rmse(numbers(attend(on_device(made), mask)), exact)
    assert error <= 3 * fp8_model.relative_rmse(published, exact)


@pytest.mark.gpu
@on_hopper
def test_the_quantized_arrays_are_those_of_the_recipe():
    import mlx.core as mx

    from attention.kernels.cuda.runtime.call import CallParams, CallShape
    from attention.kernels.cuda.runtime.launch import INPUTS, make_plan
    from attention.kernels.cuda.sm90 import fp8_launch

    made = arrays((1, 2, 1, 300, 523), 96, "growing values")
    shape, call = CallShape(1, 2, 1, 300, 523, 96, "bf16"), CallParams(0.1, False, None, None)
    stages = fp8_launch.stages(shape, call, fp8_launch.forward_kernel(shape, call))
    plan = make_plan(INPUTS[1:], fp8_launch.QUANTIZED, stages[:1])
    k8, v8, kv_exponents = (np.array(x) for x in plan(*on_device(made)[1:]))
    blocks = kv_exponents.shape[1]
    place = np.array([16 * (p // 16) + 2 * (p % 16 // 4) + 8 * (p % 4 // 2) + p % 2 for p in range(128 * blocks)])
    values = np.empty((128 * blocks, 128))
    values[place] = fp8_model.decode(v8[0, 0]).T
    keys = 2.0 ** np.repeat(kv_exponents[0], 128, axis=0)[:523]
    found = [
        fp8_model.decode(k8[0, 0]) * keys[:, :1],
        values[:523] * keys[:, 1:],
    ]
    rights = fp8_model.operands(made[0][0, 1], made[1][0, 0], made[2][0, 0], 0.1)[1:]
    for name, own, right in zip("kv", found, rights, strict=True):
        assert np.mean(own[:, :96] != right) < 0.002, name  # float32 against float64, next to the middle of two codes
        assert not own[:, 96:].any(), name
    assert not values[523:].any()
    mx.synchronize()


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("size", [2.0**-20, 2.0**40])
def test_values_of_any_size_keep_their_relative_error(size):
    made = arrays((1, 1, 1, 256, 512), 128)
    made[2] *= size
    assert fp8_model.relative_rmse(numbers(attend(on_device(made), None)), by_head(made, fp8_model.exact, None)) < 0.1


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("keys", [1000, 60000])
def test_errors_do_not_grow_with_the_number_of_keys(keys):
    made = arrays((1, 1, 1, 128, keys), 64)
    made[2] = on_device([1 + 0.1 * made[2]])[0]
    made[2] = numbers(made[2])  # values with a mean, of which a sum in few bits would lose the later ones
    found, exact = numbers(attend(on_device(made), None)), by_head(made, fp8_model.exact, None)
    assert fp8_model.relative_rmse(found, exact) < 0.01


@pytest.mark.gpu
@on_hopper
def test_huge_scores_give_finite_outputs():
    made = arrays((1, 1, 1, 256, 512), 128)
    made[0] *= 2.0**30
    found = numbers(attend(on_device(made), "causal"))
    assert np.isfinite(found).all()
    assert np.abs(found).max() <= np.abs(made[2]).max() * 1.1


@pytest.mark.gpu
@on_hopper
def test_strided_vmapped_and_compiled_calls_agree():
    import mlx.core as mx

    made = on_device(arrays((1, 4, 2, 300, 300), 128))
    plain = attend(made, "causal")
    strided = [mx.contiguous(x.swapaxes(1, 2)).swapaxes(1, 2) for x in made]
    mapped = mx.vmap(lambda *x: attend(x, "causal"))(*(mx.stack([x, x]) for x in made))
    compiled = mx.compile(lambda *x: attend(x, "causal"))(*made)
    for other in (attend(strided, "causal"), mapped[1], compiled):
        assert mx.array_equal(other, plain)


@pytest.mark.gpu
@on_hopper
def test_gradients_are_refused_in_one_line():
    import mlx.core as mx

    made = on_device(arrays((1, 1, 1, 256, 256), 64))
    with pytest.raises(ValueError, match=r"poc-fp8 has no gradient; poc has one"):
        mx.eval(mx.grad(lambda q: attend([q, *made[1:]], None).sum())(made[0]))


@pytest.mark.gpu
@on_hopper
def test_a_budget_below_the_error_is_refused():
    from attention import UnsupportedError
    from attention.implementations.fp8 import PocFp8
    from attention.masks import Mask

    made = on_device(arrays((1, 2, 1, 300, 300), 128))
    call = PocFp8(0.1)
    assert call(*made, scale=128**-0.5, mask=Mask()).shape == made[0].shape
    with pytest.raises(UnsupportedError, match=r"its error on these inputs is 0\.0\d+, above max_error 0\.01"):
        call(*made, scale=128**-0.5, mask=Mask(), max_error=0.01)


@pytest.mark.gpu
@on_hopper
def test_a_failed_check_is_in_the_route(monkeypatch):
    from attention.core.workload import Workload
    from attention.implementations import load_implementation
    from attention.kernels.cuda.runtime import selfcheck
    from attention.measure.device import probe

    workload = Workload(seq=256, heads=1, head_dim=128, dtype="bfloat16")
    monkeypatch.setattr(selfcheck, "distrust_reason", lambda program: "it is wrong")
    route = load_implementation("poc-fp8").route(workload, probe())
    assert not route.supported
    assert "it is wrong" in route.reason


@needs_nvrtc
def test_programs_differ_by_what_they_compute():
    kernel = specialise(128, False, "bf16", False)
    assert (
        len({kernel.program.key, replace(kernel, causal=True).program.key, replace(kernel, stages=2).program.key}) == 3
    )
