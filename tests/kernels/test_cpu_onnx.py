"""The ONNX Attention operator's own cases, opset 23, straight through the CPU kernel."""

import warnings
from functools import cache

import mlx.core as mx
import numpy as np
import pytest

from attention.kernels import cpu

pytestmark = pytest.mark.usefixtures("kernel")
TOLERANCE = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}


@cache
def cases():
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other operators' cases overflow on purpose
        found = collect_testcases("Attention")
    return [c for c in found if not c.name.endswith("expanded") and c.model.opset_import[0].version == 23]


def to_mlx(x):
    return mx.array(x.view(np.int16)).view(mx.bfloat16) if x.dtype.name == "bfloat16" else mx.array(x)


def heads_apart(x, heads):
    return x if heads is None else x.reshape(x.shape[0], x.shape[1], heads, -1).swapaxes(1, 2)


def mask_of(mask, causal, queries, keys, past):
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


def run(case):
    import onnx

    node = case.model.graph.node[0]
    given = {name: to_mlx(x) for name, x in zip([n for n in node.input if n], case.data_sets[0][0], strict=True)}
    options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    q = heads_apart(given["Q"], options.get("q_num_heads"))
    k, v = (heads_apart(given[name], options.get("kv_num_heads")) for name in ("K", "V"))
    past = given["past_key"].shape[2] if "past_key" in given else 0
    if past:
        k = mx.concatenate([given["past_key"], k], axis=2)
        v = mx.concatenate([given["past_value"], v], axis=2)
    mask = mask_of(given.get("attn_mask"), bool(options.get("is_causal")), q.shape[2], k.shape[2], past)
    scale = options.get("scale") or q.shape[3] ** -0.5
    out = cpu.flash_attention(q, k, v, scale=scale, mask=mask, softcap=options.get("softcap") or None)
    return out if given["Q"].ndim == 4 else out.swapaxes(1, 2).reshape(out.shape[0], out.shape[2], -1)


def test_all_69_cases_agree():
    assert len(cases()) == 69
    for case in cases():
        expected = case.data_sets[0][1][0]
        got = np.array(run(case).astype(mx.float32))
        tolerance = TOLERANCE[expected.dtype.name]
        np.testing.assert_allclose(got, np.asarray(expected, np.float32), rtol=1e-3, atol=tolerance, err_msg=case.name)
