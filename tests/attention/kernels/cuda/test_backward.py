"""The backward kernels: compilation (needs NVRTC), scheduling, and results (on a GPU)."""

from dataclasses import replace
from itertools import product

import pytest

mx = pytest.importorskip("mlx.core")

from attention.kernels import cuda
from attention.kernels.common.selfcheck import exact, relative_error
from attention.kernels.cuda.runtime import selfcheck
from attention.kernels.cuda.runtime.call import CallShape
from attention.kernels.cuda.runtime.gpu import gpu as properties
from attention.kernels.cuda.runtime.launch import OUTPUTS
from attention.kernels.cuda.runtime.program import SHARED_MEMORY_LIMIT
from attention.kernels.cuda.sm90 import gradient
from attention.kernels.cuda.sm90.backward import BLOCK_Q, finish_program, rows_program, specialise
from attention.kernels.cuda.sm90.launch import forward_plan
from attention.kernels.cuda.sm90.schedule import L2_BYTES
from tests.support import kernel_oracle
from tests.support.cuda_case import CALLS
from tests.support.cuda_compiled import REGISTERS, needs_nvrtc, report

MASKS = [(False, False), (True, False), (True, True)]
KERNELS = [
    specialise(dim, causal, "bf16", window=window, softcap=softcap)
    for dim, (causal, window), softcap in product((64, 128, 192, 256), MASKS, (False, True))
]
KERNELS += [
    specialise(dim, False, "bf16", softcap=softcap, lists=True)
    for dim, softcap in product((64, 128, 192, 256), (False, True))
]
PASSES = [program(kernel) for kernel in KERNELS[::6] for program in (lambda k: rows_program(k, True), finish_program)]


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_tiles_fit_shared_memory(kernel):
    assert kernel.program.shared_memory <= SHARED_MEMORY_LIMIT


@needs_nvrtc
@pytest.mark.parametrize("program", [*(kernel.program for kernel in KERNELS), *PASSES], ids=lambda p: p.name)
def test_few_registers_are_spilled_and_products_overlap(program):
    found = report(program)
    words = 7 if dict(program.constants).get("LISTS") else 4  # compilers differ by a word or two
    assert found.spilled <= 4 * words, found.log
    assert "serialized" not in found.log
    assert found.registers * program.threads <= REGISTERS


@pytest.mark.sampled(0.3)
@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if not kernel.lists], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(300, 300), (77, 900), (65, 31), (1000, 1000), (1, 1)])
def test_the_schedule_counts_the_tiles_that_see_a_key(kernel, queries, keys):
    window = 100 if kernel.window else 0
    options = kernel_oracle.Options(scale=1, causal=kernel.causal, window=window or None)
    seen = kernel_oracle.visible(options, (queries, keys))
    blocks = [seen[:, first : first + kernel.block_k] for first in range(0, keys, kernel.block_k)]
    needed = [sum(block[first : first + BLOCK_Q].any() for first in range(0, queries, BLOCK_Q)) for block in blocks]
    costs = kernel.tile_costs(queries, keys, window)
    assert all(cost >= least for cost, least in zip(costs, needed, strict=True))
    assert sum(costs) <= sum(needed) + len(costs)


@pytest.mark.parametrize("size", [(1, 16, 16, 32768), (8, 16, 4, 2048), (1, 2, 2, 300)])
def test_a_window_clears_its_sums_ahead(size):
    """The first launch clears what work items that start at once add to, and all of it for other masks."""
    batch, heads, kv_heads, length = size
    shape = CallShape(batch, heads, kv_heads, length, length, 128, "bf16")
    planes = batch * kv_heads
    cleared = gradient.cleared_planes(shape, specialise(128, True, "bf16", window=True))
    started = min(planes, max(1, L2_BYTES // gradient.plane_bytes(shape)))
    assert min(planes, 2 * started) <= cleared <= planes
    assert cleared < planes or length < 32768
    assert gradient.cleared_planes(shape, specialise(128, True, "bf16")) == planes
    assert gradient.cleared_planes(shape, specialise(256, True, "bf16", window=True)) == planes


# ---- on a GPU ----------------------------------------------------------------------------------------------------

gpu = pytest.mark.gpu
usable = pytest.mark.skipif(not cuda.availability()[0], reason=cuda.availability()[1])
SIZES = [  # batch, heads, kv_heads, queries, keys
    (1, 2, 2, 128, 128),
    (2, 4, 2, 300, 300),
    (1, 3, 1, 500, 377),
    (1, 2, 1, 77, 900),
    (1, 2, 2, 65, 31),
    (1, 14, 2, 200, 190),
    (1, 1, 1, 1, 1),
]


def attend(call):
    return lambda q, k, v: cuda.flash_attention(
        q, k, v, scale=call.scale, causal=call.causal, window=call.window, softcap=call.softcap
    )


def gradients(call, made):
    q, k, v, cotangent = made
    _, found = mx.vjp(attend(call), [q, k, v], [cotangent])
    kernel_oracle.poison()
    mx.eval(found)
    return found


@gpu
@usable
@pytest.mark.parametrize("element", ["bf16", "f16"])
@pytest.mark.parametrize("dim", [40, 64, 96, 128, 160, 256])
@pytest.mark.parametrize("name", CALLS)
def test_gradients_meet_flash_attention_3s_error_bound(name, dim, element):
    call = CALLS[name]
    options = kernel_oracle.Options(call.scale, call.causal, call.window, call.softcap)
    for seed, size in enumerate(SIZES):
        shape = CallShape(*size, dim, element)
        assert gradient.refusal(shape, call) is None
        made = selfcheck.inputs(shape, seed + 100 * dim)
        arrays = [kernel_oracle.numbers(x) for x in made]
        exact, plain = (
            kernel_oracle.gradients(*arrays, options),
            kernel_oracle.plain_gradients(*arrays, options, made[0].dtype),
        )
        for what, found, right, rounded in zip(("dQ", "dK", "dV"), gradients(call, made), exact, plain, strict=True):
            kernel_oracle.assert_near(found, right, rounded, made[0].dtype, 3, f"{size} {what}")


@gpu
@usable
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_keys_and_values_get_the_same_bits_from_the_same_input(dim):
    call, made = CALLS["causal"], selfcheck.inputs(CallShape(2, 4, 2, 700, 700, dim, "bf16"))
    first = gradients(call, made)
    for _ in range(5):
        again = gradients(call, made)
        assert all(mx.array_equal(a, b).item() for a, b in zip(first[1:], again[1:], strict=True))
        assert relative_error(again[0], exact(first[0])) < 1e-3  # dQ is added up in no fixed order


@gpu
@usable
@pytest.mark.parametrize("dim", [64, 128])
def test_sums_cleared_beside_the_products(monkeypatch, dim):
    """Two blocks clear the sums of all planes but the first two; no other test has calls of this shape."""
    few = replace(properties(), multiprocessors=2)
    monkeypatch.setattr(gradient, "gpu", lambda: few)
    monkeypatch.setattr(gradient, "L2_BYTES", 0)
    shape, call = CallShape(3, 4, 2, 410, 390, dim, "bf16"), CALLS["window"]
    assert gradient.cleared_planes(shape, gradient.kernel_of(shape, call)) == 2
    made = selfcheck.inputs(shape)
    outputs = forward_plan(shape, call)(made[:3])[: len(OUTPUTS)]
    mx.eval(outputs)
    for _ in range(5):
        found = gradient.by_kernel(made[:3], made[3:], outputs, shape, call)
        kernel_oracle.poison()
        mx.eval(found)
        assert selfcheck.gradient_disagreement(call, found, made) is None


@gpu
@usable
@pytest.mark.parametrize("dim", [64, 256])
def test_strided_arrays_are_read_as_they_lie(dim):
    call, made = CALLS["causal"], selfcheck.inputs(CallShape(2, 4, 2, 150, 170, dim, "bf16"))
    strided = [mx.contiguous(x.swapaxes(1, 2)).swapaxes(1, 2) for x in made]
    dense, found = gradients(call, made), gradients(call, strided)
    assert all(mx.array_equal(a, b).item() for a, b in zip(dense[1:], found[1:], strict=True))
    assert relative_error(found[0], exact(dense[0])) < 1e-3


@gpu
@usable
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_rows_that_see_nothing_get_no_gradient(dim):
    made = selfcheck.inputs(CallShape(1, 2, 2, 200, 90, dim, "f16"))
    d_q = gradients(CALLS["causal"], made)[0]
    assert mx.all(d_q[:, :, :110] == 0).item()
    assert mx.any(d_q[:, :, 110:] != 0).item()
