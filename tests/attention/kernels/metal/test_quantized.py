"""Quantized keys and values in the Metal kernels, run in the verifier and judged against float64 over their values."""

import random
import zlib

import mlx.core as mx
import numpy as np
import pytest

from attention import quantized
from attention.core.kv_format import Format, KVFormat, parse_kv_format
from attention.core.route import Needs
from attention.core.workload import Workload
from attention.kernels import metal
from attention.kernels.metal import path
from attention.kernels.metal.call import CallShape
from attention.kernels.metal.tiles import HEAD_DIMS, SIZES
from tests.support.metal.case import KINDS, LISTED, MAX_LENGTH, RUNS, problems
from tests.support.metal.device import Device, on_a_mac
from tests.support.quantized_values import FORMATS, exact

ALL_KINDS = {**KINDS, **LISTED}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FATUI_CACHE_DIR", str(tmp_path))


def shape_of(queries, keys, head_dim, dtype, kv_format):
    return CallShape(1, 4, 2, queries, keys, head_dim, dtype, parse_kv_format(kv_format))


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize(
    ("kv_format", "kind"),
    [("int4+int8", "all at once"), ("mxfp4+nvfp4", "lists and all"), ("int3:32+mxfp8", "bool mask")],
)
@pytest.mark.parametrize(("queries", "keys", "dtype"), [(37, 51, "float16"), (3, 530, "bfloat16")])
def test_results_are_right_and_clean(kv_format, kind, queries, keys, dtype):
    with on_a_mac(Device(is_reversed=True, is_misaligned=True)) as device:
        assert problems(shape_of(queries, keys, 64, dtype, kv_format), ALL_KINDS[kind], backward=False) == []
    assert device.launches[0].kernel == "forward_quantized"


def test_one_key_is_read_like_many():
    shape = CallShape(1, 1, 1, 1, 1, 32, "float32", parse_kv_format("int2:32"))  # a word or two in each array
    with on_a_mac(Device()) as device:
        assert problems(shape, KINDS["full"], backward=False) == []
    assert "const constant uint" not in device.launches[0].text


@pytest.mark.slow
@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("dtype", SIZES)
def test_every_format_is_right_and_clean(kv_format, dtype):
    draw = random.Random(zlib.crc32(f"{kv_format} {dtype}".encode()))
    group = parse_kv_format(kv_format).key.group_size
    wrong = {}
    for run in RUNS:
        head_dim = draw.choice([dim for dim in HEAD_DIMS if dim % group == 0])
        kind = draw.choice([*ALL_KINDS])
        queries = draw.choice([draw.randint(1, 16), draw.randint(17, MAX_LENGTH)])
        shape = shape_of(queries, draw.randint(1, MAX_LENGTH), head_dim, dtype, kv_format)
        with on_a_mac(Device(run.is_reversed, run.is_misaligned)):
            if found := problems(shape, ALL_KINDS[kind], backward=False):
                wrong[f"{shape}, {kind}, {run}"] = found
    assert wrong == {}


@pytest.mark.thorough
def test_the_layout_of_a_cache_is_read_in_place():
    mx.random.seed(1)
    q, k, v = mx.random.normal((2, 4, 1, 64)), *(mx.random.normal((2, 2, 600, 64)) for _ in range(2))
    keys, values = (quantized(x, form)[:, :, 40:590] for x, form in ((k, "int4"), (v, "nvfp4")))
    with on_a_mac(Device()) as device:
        found = metal.flash_attention(q, keys, values, scale=0.2)
        mx.eval(found)
        assert device.launches[-2].keywords["template"][0] == ("T", mx.float32)
    scores = 0.2 * np.array(q) @ np.repeat(exact(keys), 2, 1).swapaxes(-1, -2)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ np.repeat(exact(values), 2, 1)
    assert np.allclose(np.array(found), expected, atol=2e-6)


def test_a_call_passes_the_check_on_first_use():
    q = mx.random.normal((1, 4, 40, 64)).astype(mx.bfloat16)
    keys, values = (quantized(mx.random.normal((1, 2, 50, 64)), form) for form in ("int3", "mxfp4"))
    with on_a_mac(Device()) as device:
        mx.eval(metal.flash_attention(q, keys, values, scale=0.2))
        assert len(device.launches) == 2  # the check's, and the call's


def test_vmap_joins_the_batch():
    q, k, v = (mx.random.normal((3, 1, 2, 40, 32)) for _ in range(3))
    keys, values = quantized(k.reshape(3, 2, 40, 32), "int8:32"), quantized(v[0], "int8:32")

    def attend(q, numbers, scales, biases):
        k = keys.with_arrays([numbers, scales, biases])
        return metal.flash_attention(q, k, values, scale=0.2)

    with on_a_mac(Device()):
        mapped = mx.vmap(attend)(q, *(part[:, None] for part in keys.arrays))
        each = [attend(q[i], *(part[i : i + 1] for part in keys.arrays)) for i in range(3)]
        assert np.allclose(np.array(mapped), np.array(mx.stack(each)), atol=1e-6)


def test_a_gradient_is_refused_in_one_line():
    q, k = mx.random.normal((1, 2, 40, 32)), quantized(mx.random.normal((1, 2, 40, 32)), "int8:32")
    with on_a_mac(Device()), pytest.raises(ValueError, match="no gradient for quantized keys and values"):
        mx.grad(lambda q: metal.flash_attention(q, k, k, scale=0.2).sum())(q)


def test_one_of_two_quantized_is_refused():
    q, k = mx.random.normal((1, 2, 40, 32)), quantized(mx.random.normal((1, 2, 40, 32)), "int8:32")
    with on_a_mac(Device()), pytest.raises(ValueError, match="one quantized and one not"):
        metal.flash_attention(q, k, q, scale=0.2)


@pytest.mark.parametrize(
    ("workload", "path_name", "words"),
    [
        ({"seq": 512, "head_dim": 64}, "Metal kernel, int4", "packed, tile by tile"),
        ({"seq": 1, "kv_seq": 512, "head_dim": 128}, "Metal, split K, int4", "packed, tile by tile"),
        ({"seq": 64, "head_dim": 512}, "-", "take head dims"),
    ],
    ids=str,
)
def test_the_route_names_the_format(workload, path_name, words):
    with on_a_mac(Device()):
        route = path.route(Workload(**workload, kv_format="int4"), Needs())
    assert route.path == path_name
    assert words in route.reason


def test_dense_kernels_and_formats_are_checked_apart():
    dense = shape_of(40, 40, 64, "float16", "none")
    form = Format("affine", 4, 64)
    from attention.kernels.metal.attend import special_of

    call = KINDS["causal"].call(64, "float16")
    names = {special_of(one, call).name for one in (dense, shape_of(40, 40, 64, "float16", "int4"))}
    assert names == {"forward float16 D=64 causal", "forward float16 D=64 causal int4 K/V"}
    assert shape_of(40, 40, 64, "float16", "int4").kv_format == KVFormat(form, form)
