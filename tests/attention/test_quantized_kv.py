"""Quantized keys and values as arguments: what `quantized` makes, its exact values, and what is refused."""

import copy
import doctest
import pickle
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import attention as package
from attention import QuantizedArray, UnsupportedError, UsageError, attention, quantized
from attention.implementations import load_implementation
from attention.measure.device import probe
from attention.quantized_kv import arrays_of
from tests.support import quantized_values
from tests.support.quantized_values import FORMATS

Q = mx.random.normal((2, 4, 5, 64), key=mx.random.key(0))
K, V = (mx.random.normal((2, 2, 40, 64), key=mx.random.key(n)) for n in (1, 2))


def packed(form="int8", x=K, dtype=mx.float32) -> QuantizedArray:
    return quantized(x.astype(dtype), form)


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_values_are_exact(form, dtype):
    x = packed(form, mx.random.normal((2, 2, 5, 128), key=mx.random.key(3)), dtype)
    expected = quantized_values.exact(x)
    assert (x.shape, x.ndim, x.dtype) == ((2, 2, 5, 128), 4, dtype)
    np.testing.assert_array_equal(x.exact(), expected)
    rounded = x.dequantized()
    assert rounded.dtype == dtype
    error = np.abs(np.array(rounded.astype(mx.float32)) - expected)
    assert (error <= np.abs(expected) * mx.finfo(dtype).eps * 0.51 + 1e-7 * np.abs(expected).max()).all()


def test_what_mx_quantize_returns_is_taken():
    for form in ("int4:32", "mxfp8", "nvfp4"):
        made = packed(form)
        again = quantized(made.arrays, form)
        assert all(one is other for one, other in zip(again.arrays, made.arrays, strict=True))
    assert quantized(packed("int4:32").arrays, bits=4, group_size=32).format.text == "int4:32"
    assert quantized(packed("mxfp4").arrays, mode="mxfp4").dtype == mx.bfloat16
    assert quantized(made) is made
    assert quantized(K).format.text == "int4"


@pytest.mark.parametrize("form", ["int4:32", "mxfp8"])
def test_copies_and_pickles_are_equal(form):
    x = packed(form, dtype=mx.bfloat16)
    for again in (copy.copy(x), copy.deepcopy(x), pickle.loads(pickle.dumps(x))):
        assert (again.format, again.dtype, again.shape) == (x.format, x.dtype, x.shape)
        assert all(map(mx.array_equal, again.arrays, x.arrays))


def test_it_is_indexed_along_all_axes_but_the_last():
    x = packed("int4:32")
    whole = quantized_values.exact(x)
    for index in (0, (0, 1), np.s_[:, :, 3:9], np.s_[:, None], np.s_[1:, :, -1:], ...):
        np.testing.assert_array_equal(x[index].exact(), whole[index])
    assert arrays_of(x[...])[0] is not x.numbers
    for index in (np.s_[:, :, :, 0], np.s_[..., 0], (0, 0, 0, 0)):
        with pytest.raises(IndexError, match="indexed along the axes before its last"):
            x[index]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: quantized(K[..., :48]), "x: got width 48; int4 takes multiples of its group size, 64"),
        (lambda: quantized(K, "int9"), "format: got 'int9'; it takes int8"),
        (lambda: quantized(K, "int4", bits=4), "format: got it together with bits, group_size or mode"),
        (lambda: quantized(K[0]), "x: got mlx.core.float32 of shape (2, 40, 64); it takes"),
        (lambda: quantized(K[:, :, :0]), "x: got mlx.core.float32 of shape (2, 2, 0, 64); it takes"),
        (lambda: quantized(K.astype(mx.int32)), "x: got mlx.core.int32"),
        (lambda: quantized("int4"), "x: got str; int4 takes an array, or the arrays (numbers, scales, biases)"),
        (lambda: quantized(packed().arrays[:2], "int8"), "x: got 2 parts; int8 takes an array, or the arrays (numbers"),
        (lambda: quantized(packed().arrays, "mxfp8"), "x: got 3 parts; mxfp8 takes an array, or the arrays (numbers, "),
        (
            lambda: quantized(packed("int8:32").arrays, "int8"),
            "scales: got shape (2, 2, 40, 2); int8 takes (2, 2, 40, 1) for numbers of shape (2, 2, 40, 16)",
        ),
        (lambda: quantized(packed("int6").arrays, "int4"), "scales: got shape (2, 2, 40, 1); int4 takes"),
        (lambda: quantized(packed("mxfp8").arrays, "nvfp4"), "scales: got shape (2, 2, 40, 2); nvfp4 takes"),
        (
            lambda: quantized([packed().numbers, packed().scales.astype(mx.uint8), packed().biases], "int8"),
            "scales: got mlx.core.uint8; int8 takes float32, float16, bfloat16",
        ),
        (
            lambda: quantized([packed().scales, packed().scales, packed().biases], "int8"),
            "numbers: got mlx.core.float32 in 4 dimensions; it takes uint32 in 4",
        ),
        (
            lambda: quantized([packed().numbers, packed().scales, packed().biases[:, :1]], "int8"),
            "biases: got mlx.core.float32 of shape (2, 1, 40, 1); it takes those of the scales",
        ),
    ],
)
def test_what_cannot_be_quantized_is_named(call, words):
    with pytest.raises(UsageError) as error:
        call()
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def broken(**parts):
    x = packed()
    given = {name: parts.get(name, getattr(x, name)) for name in ("numbers", "scales", "biases")}
    return QuantizedArray(**given, format=x.format, dtype=x.dtype)


@pytest.mark.parametrize(
    ("k", "v", "words"),
    [
        (packed(), V, "v: got an mlx.core.array, and k is quantized; it takes quantized(array) too"),
        (K, packed(), "k: got an mlx.core.array, and v is quantized; it takes quantized(array) too"),
        (packed().arrays, packed(), "k: got tuple; it takes an mlx.core.array, or quantized(array)"),
        (packed(x=K[..., :32], form="int8:32"), packed(), "k: got width 32; it takes q's width, 64"),
        (packed(x=K[:1]), packed(x=V[:1]), "k: got batch 1; it takes q's batch, 2"),
        (
            packed(x=mx.concatenate([K, K], axis=1)[:, :3]),
            packed(x=V[:, :1]),
            "k: got 3 heads; it takes a divisor of q's 4 heads",
        ),
        (packed(), packed(x=V[:, :, :39]), "v: got batch, heads and length (2, 2, 39); it takes k's, (2, 2, 40)"),
        (packed()[:, :, :0], packed()[:, :, :0], "k: got shape (2, 2, 0, 64); it takes (batch, heads, length, width)"),
        (packed()[0], packed(), "k: numbers: got mlx.core.uint32 in 3 dimensions; it takes uint32 in 4"),
        (broken(biases=None), packed(), "k: biases: got None; int8 takes those of mx.quantize"),
        (broken(scales=packed().scales[:, :, :9]), packed(), "k: scales: got shape (2, 2, 9, 1); int8 takes"),
    ],
)
def test_a_call_that_does_not_fit_is_named(k, v, words):
    with pytest.raises(UsageError) as error:
        attention(Q, k, v)
    (problem, *others) = error.value.problems
    assert words in problem
    assert "\n" not in problem
    assert all(other.startswith("v: ") for other in others)


def test_the_query_is_dense():
    with pytest.raises(
        UsageError, match=r"q: got attention\.quantized_kv\.QuantizedArray; it takes an mlx\.core\.array$"
    ):
        attention(packed(x=K), packed(), packed())


@pytest.mark.parametrize("name", ["torch", "flex"])
def test_an_implementation_that_takes_none_says_so(name):
    from attention.core.workload import Workload

    with pytest.raises(UnsupportedError, match=f"^{name}: it takes no quantized keys and values; practical does$"):
        attention(Q, packed(), packed(), implementation=name)
    route = load_implementation(name).route(Workload(seq=64, head_dim=64, kv_format="int4"), probe())
    assert not route.supported


def test_importing_attention_imports_no_mlx():
    code = (
        "import sys, attention; assert 'mlx' not in sys.modules; attention.quantized; assert 'mlx.core' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "quantized" in package.__all__
    with pytest.raises(AttributeError, match="has no attribute 'quantised'"):
        package.quantised  # noqa: B018


def test_the_examples_of_the_page_run():
    page = Path(__file__).parents[2] / "docs" / "quantized.md"
    text = page.read_text(encoding="utf-8").partition("## Caches")[0]
    runner = doctest.DocTestRunner()
    runner.run(doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0))
    assert (runner.failures, runner.tries > 5) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": 8}, "format: got 8; it takes None or a name"),
        ({"bits": "\x1b[31m"}, r"bits: got '\\x1b\[31m'; it takes 8, 6"),
        ({"bits": 4.0}, "bits: got 4.0; it takes 8, 6"),
        ({"group_size": 10**400}, "group_size: got a number of thousands of digits|group_size: got 10+…; it takes 32"),
        ({"mode": ["affine"]}, r"mode: got \['affine'\]; it takes affine"),
        ({"dtype": "float16"}, "dtype: got 'float16'; it takes float32"),
    ],
    ids=["format", "escape codes", "float", "huge", "list", "dtype"],
)
def test_invalid_formats_are_named(arguments, message):
    with pytest.raises(UsageError, match=message):
        quantized(mx.zeros((1, 1, 3, 64)), **arguments)
