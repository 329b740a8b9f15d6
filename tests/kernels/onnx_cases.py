"""The ONNX Attention operator's own cases, opset 23, and how a kernel is asked for what they ask."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np


@dataclass(frozen=True)
class Case:
    name: str
    given: dict[str, np.ndarray]
    options: dict
    expected: np.ndarray


@cache
def cases() -> list[Case]:
    import onnx
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other operators' cases overflow on purpose
        found = collect_testcases("Attention")
    made = []
    for case in found:
        if case.name.endswith("expanded") or case.model.opset_import[0].version != 23:
            continue
        node, (inputs, outputs) = case.model.graph.node[0], case.data_sets[0]
        given = dict(zip([name for name in node.input if name], inputs, strict=True))
        options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        made.append(Case(case.name, given, options, outputs[0]))
    return made


def to_mlx(x: np.ndarray) -> mx.array:
    return mx.array(x.view(np.int16)).view(mx.bfloat16) if x.dtype.name == "bfloat16" else mx.array(x)


def heads_apart(x: mx.array, heads: int | None) -> mx.array:
    return x if heads is None else x.reshape(x.shape[0], x.shape[1], heads, -1).swapaxes(1, 2)


def mask_of(mask: mx.array | None, causal: bool, queries: int, keys: int, past: int) -> mx.array | None:
    """ONNX's causal mask begins at the first new key (upper-left); a mask may be shorter than the keys."""
    if mask is not None and mask.shape[-1] < keys:
        hidden = mx.array(False) if mask.dtype == mx.bool_ else mx.array(-mx.inf, mask.dtype)
        mask = mx.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, keys - mask.shape[-1])], constant_values=hidden)
    if not causal:
        return mask
    seen = mx.array(np.tri(queries, keys, past, dtype=np.bool_))
    if mask is None:
        return seen
    return seen & mask if mask.dtype == mx.bool_ else mx.where(seen, mask, mx.array(-mx.inf, mask.dtype))


def run(case: Case, attend: Callable[..., mx.array], dtype: mx.Dtype | None = None) -> mx.array:
    """A case by a kernel's `flash_attention`, its inputs (but no mask) in another type if one is given."""
    given, options = {name: to_mlx(x) for name, x in case.given.items()}, case.options
    if dtype is not None:
        given = {name: x if name == "attn_mask" else x.astype(dtype) for name, x in given.items()}
    q = heads_apart(given["Q"], options.get("q_num_heads"))
    k, v = (heads_apart(given[name], options.get("kv_num_heads")) for name in ("K", "V"))
    past = given["past_key"].shape[2] if "past_key" in given else 0
    if past:
        k = mx.concatenate([given["past_key"], k], axis=2)
        v = mx.concatenate([given["past_value"], v], axis=2)
    mask = mask_of(given.get("attn_mask"), bool(options.get("is_causal")), q.shape[2], k.shape[2], past)
    scale = options.get("scale") or q.shape[3] ** -0.5
    out = attend(q, k, v, scale=scale, mask=mask, softcap=options.get("softcap") or None)
    return out if given["Q"].ndim == 4 else out.swapaxes(1, 2).reshape(out.shape[0], out.shape[2], -1)
