"""The CPU kernel with other sizes of work items: equal results, offered if it makes a difference."""

import mlx.core as mx
import numpy as np
import pytest

from attention.core.route import NO_NEEDS, fitted
from attention.core.workload import Workload
from attention.implementations.autotune.trial import candidates, fitting_candidates
from attention.implementations.calls import make_inputs
from attention.implementations.fused import Poc, kernel_variants
from attention.kernels import cpu
from attention.kernels.cpu import path
from attention.masks import Mask
from attention.measure.device import probe
from tests.support.marks import slow

pytestmark = pytest.mark.usefixtures("kernel")
SHAPES = [
    {"seq": 300, "heads": 4},
    {"seq": 200, "kv_seq": 900, "heads": 8, "kv_heads": 2, "batch": 2},
    {"seq": 20, "kv_seq": 700, "heads": 8, "kv_heads": 1},
]


ROUNDING = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mask", ["none", "causal", "window:90"])
@pytest.mark.parametrize("dtype", ["float32", slow("float16"), "bfloat16"])
def test_few_tall_items_give_what_many_small_ones_give(dtype: str, mask: str, shape: dict[str, int]) -> None:
    workload = Workload(**shape, head_dim=64, dtype=dtype, mask=mask, pass_="training")  # type: ignore[arg-type]
    q, k, v, cotangent = make_inputs(workload, 0)
    keywords = {"scale": 0.1, "causal": workload.causal, "window": workload.window}

    def results(items: int) -> list[mx.array]:
        outputs, gradients = mx.vjp(
            lambda *arrays: [cpu.flash_attention(*arrays, **keywords, items=items)], [q, k, v], [cotangent]
        )
        return [*outputs, *gradients]

    for few, many in zip(results(1), results(1000), strict=True):
        numbers = [np.array(x.astype(mx.float32)) for x in (few, many)]
        np.testing.assert_allclose(*numbers, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


@pytest.mark.compiles
def test_two_forms_of_one_call_are_two_operations_when_compiled() -> None:
    q, k, v = make_inputs(Workload(seq=300, heads=2, head_dim=32, dtype="float32"), 0)
    both = mx.compile(lambda q, k, v: [cpu.flash_attention(q, k, v, scale=0.2, items=n) for n in (0, 1)])
    one, other = both(q, k, v)
    expected = cpu.flash_attention(q, k, v, scale=0.2)
    assert mx.allclose(one, expected, atol=1e-5)
    assert mx.allclose(other, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "offered"),
    [
        ({"seq": 512, "heads": 8}, True),  # 64 items of 64 rows, or 16 of 256
        ({"seq": 2048, "heads": 8}, False),  # has 64 items of 256 rows anyhow
        ({"seq": 128, "heads": 8}, False),  # too few rows for a tall item
        ({"seq": 512, "heads": 8, "dtype": "bfloat16"}, False),  # gains nothing
        ({"seq": 1, "kv_seq": 4096, "heads": 8, "kv_heads": 2}, False),
    ],
    ids=str,
)
def test_tall_items_are_offered_where_they_differ(shape: dict[str, int], offered: bool) -> None:
    workload = Workload(**shape, head_dim=64)  # type: ignore[arg-type]
    assert ("tall" in path.variants(workload)) == offered
    assert ("poc tall" in fitting_candidates(candidates(), workload, probe(), NO_NEEDS)) == offered


def test_poc_takes_a_form_by_name_and_says_so() -> None:
    assert tuple(kernel_variants()) == ("tall",)
    workload = Workload(seq=300, heads=4, head_dim=64, dtype="float32", mask="causal")
    tall, plain = Poc("tall"), Poc()
    assert tall.route(workload, probe()).path == fitted(f"CPU kernel {cpu.variant()}, tall")
    q, k, v = make_inputs(workload, 0)
    found, expected = (one(q, k, v, scale=0.125, mask=Mask(causal=True)) for one in (tall, plain))
    assert mx.allclose(found, expected, atol=1e-5)


def test_poc_does_not_take_a_form_that_would_change_nothing() -> None:
    route = Poc("tall").route(Workload(seq=64, heads=4), probe())
    assert not route.supported
    assert route.reason == "'tall' changes nothing here"
