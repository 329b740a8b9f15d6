"""The ONNX Attention operator's own cases, opset 23, through `attention()` with each implementation.

The operator differs from `attention()` in its clothes, which the adapter here takes off: 3-D inputs with the heads side
by side, a past that is put before keys and values, masks shorter than the keys, and a causal mask whose first
row stands at the first new key (upper-left).
A case passes on its numbers alone. What `attention()` cannot express is the operator's optional matrix output.
"""

import warnings
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from attention_examples import INSTALLED

from attention import UnsupportedError, attention

NO_SOFTCAP = ("mlx", "torch")
"""Implementations whose library has no softcap."""


@cache
def cases() -> dict[str, Any]:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other operators' cases overflow on purpose
        found = collect_testcases("Attention")
    return {
        case.name.removeprefix("test_attention_"): case
        for case in found
        if not case.name.endswith("expanded") and case.model.opset_import[0].version == 23
    }


def run(case: Any, implementation: str) -> dict[str, mx.array]:
    """Runs a case and names its outputs."""
    import onnx

    node = case.model.graph.node[0]
    given = {name: to_mlx(x) for name, x in zip([n for n in node.input if n], case.data_sets[0][0], strict=True)}
    options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    q = heads_apart(given["Q"], options.get("q_num_heads"))
    k = heads_apart(given["K"], options.get("kv_num_heads"))
    v = heads_apart(given["V"], options.get("kv_num_heads"))
    past = given["past_key"].shape[2] if "past_key" in given else 0
    if past:
        k = mx.concatenate([given["past_key"], k], axis=2)
        v = mx.concatenate([given["past_value"], v], axis=2)
    out = attention(
        q,
        k,
        v,
        scale=options.get("scale"),
        mask=mask_of(given.get("attn_mask"), bool(options.get("is_causal")), (q.shape[2], k.shape[2], past)),
        softcap=options.get("softcap") or None,
        implementation=implementation,
    )
    if given["Q"].ndim == 3:
        out = out.swapaxes(1, 2).reshape(out.shape[0], out.shape[2], -1)
    return {"Y": out, "present_key": k, "present_value": v}


def mask_of(array: mx.array | None, causal: bool, lengths: tuple[int, int, int]) -> Any:
    seq, kv_seq, past = lengths
    if array is None and causal and seq + past == kv_seq:
        return "causal"
    if array is not None and array.shape[-1] < kv_seq:
        hidden = mx.array(False) if array.dtype == mx.bool_ else mx.array(-mx.inf, array.dtype)
        array = mx.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, kv_seq - array.shape[-1])], constant_values=hidden)
    if not causal:
        return array
    seen = mx.array(np.tri(seq, kv_seq, past, dtype=np.bool_))
    if array is None:
        return seen
    return seen & array if array.dtype == mx.bool_ else mx.where(seen, array, mx.array(-mx.inf, array.dtype))


def heads_apart(x: mx.array, heads: int | None) -> mx.array:
    return x if heads is None else x.reshape(x.shape[0], x.shape[1], heads, -1).swapaxes(1, 2)


def to_mlx(x: Any) -> mx.array:
    if x.dtype.name == "bfloat16":
        return mx.array(x.view(np.int16)).view(mx.bfloat16)
    return mx.array(x)


def test_there_are_69_cases() -> None:
    assert len(cases()) == 69


def test_what_cannot_be_expressed_is_the_score_matrix_as_an_output() -> None:
    asking = [name for name, case in cases().items() if "qk_matmul_output" in case.model.graph.node[0].output]
    assert len(asking) == 15
    assert all("qk_matmul" in name for name in asking)


@pytest.mark.parametrize(
    "implementation", [pytest.param(n, marks=pytest.mark.slow) if n == "demo" else n for n in INSTALLED]
)  # demo has a trial for each kind of case, and takes one of the others
def test_all_cases_agree_in_every_output_that_attention_has(implementation: str) -> None:
    refused = []
    for name, case in cases().items():
        try:
            found = run(case, implementation)
        except UnsupportedError as error:
            assert "softcap" in str(error)
            refused.append(name)
            continue
        node = case.model.graph.node[0]
        for output, expected in zip([n for n in node.output if n], case.data_sets[0][1], strict=True):
            if output == "qk_matmul_output":
                continue
            got = np.array(found[output].astype(mx.float32))
            np.testing.assert_allclose(
                got, np.asarray(expected, dtype=np.float32), rtol=case.rtol, atol=tolerance(expected), err_msg=name
            )
    asking = [
        name for name, case in cases().items() if any(a.name == "softcap" for a in case.model.graph.node[0].attribute)
    ]
    assert refused == (asking if implementation in NO_SOFTCAP else [])


def tolerance(expected: Any) -> float:
    """ONNX's atol of 1e-7 is below what half types resolve where terms cancel; its rtol of 1e-3 is kept."""
    return {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}[expected.dtype.name]
