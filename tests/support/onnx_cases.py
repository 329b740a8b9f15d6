"""The ONNX Attention operator's own cases, opset 23, and an adapter to attention functions.

The operator differs in form, which the adapter converts: 3-D inputs with the heads side by side, a past that is put
before keys and values, masks shorter than the keys, and a causal mask whose first row is at the first new key
(upper-left). Its optional matrix output is not supported.
"""

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

MATRIX = "qk_matmul_output"
TOLERANCE = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}
"""Tolerances of results in each type: ONNX's own 1e-7 is below the resolution of half types where terms cancel."""


@dataclass(frozen=True)
class Case:
    name: str
    given: dict[str, np.ndarray]
    options: dict[str, Any]
    expected: dict[str, np.ndarray]
    """The outputs by name; the first one is Y."""
    rtol: float


@cache
def cases() -> list[Case]:
    import onnx
    from onnx.backend.test.case import node as nodes

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module(f"{nodes.__name__}.attention")  # other operators' cases take ten seconds to make
    found = [case for case in nodes._NodeTestCases if case.name.startswith("test_attention_")]
    made = []
    for case in found:
        if case.name.endswith("expanded") or case.model.opset_import[0].version != 23:
            continue
        node, (inputs, outputs) = case.model.graph.node[0], case.data_sets[0]
        given = dict(zip([name for name in node.input if name], inputs, strict=True))
        expected = dict(zip([name for name in node.output if name], outputs, strict=True))
        options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        made.append(Case(case.name.removeprefix("test_attention_"), given, options, expected, case.rtol))
    return made


def to_mlx(x: np.ndarray) -> mx.array:
    return mx.array(x.view(np.int16)).view(mx.bfloat16) if x.dtype.name == "bfloat16" else mx.array(x)


def heads_apart(x: mx.array, heads: int | None) -> mx.array:
    return x if heads is None else x.reshape(x.shape[0], x.shape[1], heads, -1).swapaxes(1, 2)


def mask_of(mask: mx.array | None, causal: bool, queries: int, keys: int, past: int) -> mx.array | None:
    if mask is not None and mask.shape[-1] < keys:
        hidden = mx.array(False) if mask.dtype == mx.bool_ else mx.array(-mx.inf, mask.dtype)
        mask = mx.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, keys - mask.shape[-1])], constant_values=hidden)
    if not causal:
        return mask
    seen = mx.array(np.tri(queries, keys, past, dtype=np.bool_))
    if mask is None:
        return seen
    return seen & mask if mask.dtype == mx.bool_ else mx.where(seen, mask, mx.array(-mx.inf, mask.dtype))


def run(
    case: Case, attend: Callable[..., mx.array], dtype: mx.Dtype | None = None, causal_word: str | None = None
) -> dict[str, mx.array]:
    """Run a case and return its outputs by name.

    Args:
        case: the case.
        attend: called with q, k, v, and by name scale, mask and softcap, each None if the case has none.
        dtype: dtype of the inputs (except masks), if not their own.
        causal_word: the argument with which `attend` is causal, with its last row at the last key.
    """
    given, options = {name: to_mlx(x) for name, x in case.given.items()}, case.options
    if dtype is not None:
        given = {name: x if name == "attn_mask" else x.astype(dtype) for name, x in given.items()}
    q = heads_apart(given["Q"], options.get("q_num_heads"))
    k, v = (heads_apart(given[name], options.get("kv_num_heads")) for name in ("K", "V"))
    past = given["past_key"].shape[2] if "past_key" in given else 0
    if past:
        k = mx.concatenate([given["past_key"], k], axis=2)
        v = mx.concatenate([given["past_value"], v], axis=2)
    array, causal, (queries, keys) = given.get("attn_mask"), bool(options.get("is_causal")), (q.shape[2], k.shape[2])
    in_a_word = causal_word is not None and causal and array is None and queries + past == keys
    mask = causal_word if in_a_word else mask_of(array, causal, queries, keys, past)
    out = attend(q, k, v, scale=options.get("scale"), mask=mask, softcap=options.get("softcap") or None)
    if given["Q"].ndim == 3:
        out = out.swapaxes(1, 2).reshape(out.shape[0], out.shape[2], -1)
    return {"Y": out, "present_key": k, "present_value": v}


def with_scale(attend: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Wrap a function that requires the scale, with the operator's default for cases without one."""

    def scaled(q: mx.array, k: mx.array, v: mx.array, *, scale: float | None, **more: Any) -> mx.array:
        return attend(q, k, v, scale=scale or q.shape[3] ** -0.5, **more)

    return scaled
