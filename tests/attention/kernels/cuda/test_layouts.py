"""Memory layouts, and tiles whose keys are split; needs a CUDA device."""

import pytest

from attention.kernels.cuda.sm90 import launch as sm90_launch

mx = pytest.importorskip("mlx.core")

from attention.kernels import cuda
from attention.kernels.cuda.runtime import selfcheck
from attention.kernels.cuda.runtime.call import CallParams, CallShape

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not cuda.availability()[0], reason=cuda.availability()[1])]

MANY, FEW = (2, 4, 2, 200, 300), (2, 8, 2, 1, 3000)
CAUSAL = CallParams(scale=0.125, causal=True, window=None, softcap=None)
FULL = CallParams(scale=0.125, causal=False, window=None, softcap=None)


def transposed(x):
    """Return (batch, rows, heads, columns) in memory, as projections produce it."""
    return mx.contiguous(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)


def sliced(x):
    """Return the start of a larger cache whose rest is NaN."""
    cache = mx.full((*x.shape[:2], x.shape[2] + 56, x.shape[3]), mx.nan, x.dtype)
    cache[:, :, : x.shape[2]] = x
    mx.eval(cache)
    return cache[:, :, : x.shape[2]]


def unaligned(x):
    """Return rows that start at an offset of three elements."""
    wide = mx.concatenate([mx.zeros((*x.shape[:3], 3), x.dtype), x], axis=3)
    mx.eval(wide)
    return wide[..., 3:]


def spread(x):
    """Return an array whose batch entries share the memory of one head, so that it must be copied."""
    return mx.broadcast_to(x[:1], x.shape)


def attend(call, arrays):
    return cuda.flash_attention_with_logsumexp(*arrays[:3], scale=call.scale, causal=call.causal)


@pytest.mark.parametrize("size", [MANY, FEW])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("lay", [transposed, sliced, unaligned])
def test_arrays_are_taken_as_they_lie(lay, dim, size):
    shape = CallShape(*size, dim, "bf16")
    made = selfcheck.inputs(shape)
    found = attend(CAUSAL, [lay(x) for x in made])
    assert selfcheck.disagreement(CAUSAL, *found, made) is None


@pytest.mark.parametrize("size", [MANY, FEW])
def test_an_array_broadcast_over_the_batch_is_taken(size):
    shape = CallShape(*size, 64, "bf16")
    made = selfcheck.inputs(shape)
    same = [mx.contiguous(spread(x)) for x in made]
    found = attend(CAUSAL, [spread(x) for x in made])
    assert selfcheck.disagreement(CAUSAL, *found, same) is None


@pytest.mark.parametrize("size", [MANY, FEW])
@pytest.mark.parametrize("lay", [transposed, sliced])
def test_strided_arrays_are_not_copied(lay, size):
    shape = CallShape(*size, 128, "bf16")
    arrays = [lay(x) for x in selfcheck.inputs(shape)]
    mx.eval(arrays, attend(CAUSAL, arrays))
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(cuda.flash_attention(*arrays[:3], scale=CAUSAL.scale, causal=True))
    above = mx.get_peak_memory() - before
    assert above < arrays[0].nbytes + min(x.nbytes for x in arrays[1:3])


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_a_slice_with_changing_strides_is_followed(dim):
    shape = CallShape(1, 2, 2, 130, 130, dim, "bf16")
    for seed, lay in enumerate([mx.contiguous, sliced, transposed, sliced, mx.contiguous]):
        made = selfcheck.inputs(shape, seed)
        found = attend(FULL, [lay(x) for x in made])
        assert selfcheck.disagreement(FULL, *found, made) is None


@pytest.mark.parametrize("dim", [64, 128, 192, 256])
@pytest.mark.parametrize(
    ("size", "call"), [((1, 3, 1, 500, 2900), FULL), ((1, 2, 1, 1500, 2500), FULL), ((1, 2, 1, 77, 5000), CAUSAL)]
)
def test_split_tiles_add_up_to_the_same_bits(dim, size, call):
    shape = CallShape(*size, dim, "bf16")
    made = sm90_launch.forward(shape, call, sm90_launch.forward_kernel(shape, call))
    assert made.keywords["output_shapes"][2][0] > 0  # there are parts
    made = selfcheck.inputs(shape)
    first = attend(call, made)
    assert selfcheck.disagreement(call, *first, made) is None
    for _ in range(10):
        assert all(mx.array_equal(a, b).item() for a, b in zip(first, attend(call, made), strict=True))


@pytest.mark.parametrize("size", [MANY, FEW])
def test_the_output_is_the_same_with_and_without_the_logsumexp(size):
    shape = CallShape(*size, 128, "f16")
    made = selfcheck.inputs(shape)
    alone = cuda.flash_attention(*made[:3], scale=CAUSAL.scale, causal=True)
    assert mx.array_equal(alone, attend(CAUSAL, made)[0]).item()


def test_many_calls_at_once_keep_their_parts_apart():
    shape = CallShape(1, 8, 2, 1, 9000, 128, "bf16")
    made = [selfcheck.inputs(shape, seed) for seed in range(12)]
    alone = [attend(FULL, arrays)[0] for arrays in made]
    mx.eval(alone)
    together = [attend(FULL, arrays)[0] for _ in range(10) for arrays in made]
    mx.eval(together)
    assert all(mx.array_equal(x, alone[i % len(made)]).item() for i, x in enumerate(together))


@pytest.mark.parametrize("wrong", [{"window": -1}, {"window": 0}, {"softcap": 0.0}, {"scale": -0.125}])
def test_a_known_call_with_a_wrong_keyword_is_still_refused(wrong):
    arrays = selfcheck.inputs(CallShape(*MANY, 64, "bf16"))[:3]
    cuda.flash_attention(*arrays, scale=0.125)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        cuda.flash_attention(*arrays, **{"scale": 0.125, **wrong})


def test_a_known_call_is_distinguished_by_all_keywords():
    shape = CallShape(*MANY, 64, "bf16")
    made = selfcheck.inputs(shape)
    calls = [
        FULL,
        CAUSAL,
        CallParams(0.125, True, 50, None),
        CallParams(0.125, False, None, 20.0),
        CallParams(0.25, False, None, None),
    ]
    for _ in range(2):
        for call in calls:
            keywords = {"causal": call.causal, "window": call.window, "softcap": call.softcap}
            found = cuda.flash_attention_with_logsumexp(*made[:3], scale=call.scale, **keywords)
            known = cuda.flash_attention(*made[:3], scale=call.scale, **keywords)
            assert selfcheck.disagreement(call, *found, made) is None
            assert mx.array_equal(known, found[0]).item()
