"""Forward attention in 8 bits as a code path of the engine: route and call. Its results are approximate."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from attention.core.bounded_dict import BoundedDict
from attention.core.errors import KernelUnavailable
from attention.core.route import Needs, Route, unsupported
from attention.core.workload import Workload
from attention.kernels.cuda.runtime.call import DIM_STEP, ELEMENTS, CallParams, CallShape

if TYPE_CHECKING:
    import mlx.core as mx

    from attention.kernels.cuda.attend import Attend
    from attention.masks import Mask

PATH: Final = "CUDA kernel, fp8"
ARITHMETIC: Final = "fp8"
MAX_HEAD_DIM: Final = 128
MIN_QUERIES: Final = 128
"""Fewest queries: quantization reads all keys and values, which pays off only with many."""


def refusal(workload: Workload, needs: Needs) -> str | None:
    """Return why the kernels do not support a call, in one line, or None; the machine is not considered."""
    features = {
        "gradients": workload.pass_ == "training",
        "softcap": needs.softcap,
        "array masks": needs.array_mask,
        "patterns of attention.masks": needs.pattern or workload.structured,
        "ALiBi": needs.alibi,
        "logsumexp": needs.logsumexp,
        "attention sinks": needs.sinks,
    }
    if workload.quantized:
        return "fp8 arithmetic quantizes keys and values itself; quantized ones go through poc"
    missing = [name for name, needed in features.items() if needed]
    if missing:
        return f"fp8 arithmetic has no {' and no '.join(missing)}; poc has"
    if workload.dtype not in ELEMENTS:
        return f"fp8 arithmetic takes bfloat16 and float16, not {workload.dtype}"
    if workload.value_dim != workload.head_dim:
        return f"fp8 arithmetic takes values as wide as keys, not {workload.value_dim} beside {workload.head_dim}"
    if workload.head_dim > MAX_HEAD_DIM or workload.head_dim % DIM_STEP:
        return f"fp8 arithmetic takes head dims up to {MAX_HEAD_DIM} in steps of {DIM_STEP}, not {workload.head_dim}"
    if workload.seq < MIN_QUERIES:
        return f"fp8 arithmetic is for prefill, {MIN_QUERIES} queries or more, not {workload.seq}"
    return None


def route(workload: Workload, needs: Needs) -> Route:
    """Return the route of a workload, or an unsupported route with the reason; runs nothing."""
    reason = refusal(workload, needs) or _machine_refusal()
    if reason:
        return unsupported(reason)
    from attention.kernels.cuda.requirements import shape_and_call
    from attention.kernels.cuda.runtime import selfcheck
    from attention.kernels.cuda.sm90 import fp8_launch

    shape, call = shape_and_call(workload, needs)
    for program in fp8_launch.programs(shape, call):
        distrusted = selfcheck.distrust_reason(program)
        if distrusted:
            return unsupported(f"{program.name}: {distrusted}")
    return Route(
        path=PATH,
        fused=True,
        reason="Q, K, V and the weights are rounded to 8 bits (e4m3, scales by block, K without its mean)",
        predicted_bytes=fp8_launch.written_bytes(shape, call),
        approximate=ARITHMETIC,
    )


def _machine_refusal() -> str | None:
    """Return why the kernels cannot run on this machine, in one line, or None."""
    from attention.kernels.cuda import requirements
    from attention.kernels.cuda.runtime import launcher
    from attention.kernels.cuda.runtime.gpu import gpu

    try:
        requirements.describe()
    except KernelUnavailable as unavailable:
        return str(unavailable)
    found = gpu()
    if found.architecture != "sm_90a":
        return f"fp8 arithmetic needs a Hopper GPU (compute capability 9.0), and this is {found.name}"
    return launcher.known_obstacle()


def attend(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Mask) -> mx.array:
    """Compute attention in 8 bits. Shapes: see `Implementation.__call__`; the call is one that `route` supports.

    Raises:
        KernelUnavailable: a kernel cannot be compiled, fails its self-check, or does not take the scale.
    """
    if not scale > 0:
        raise KernelUnavailable(f"the CUDA kernels take positive scales, not {scale}")
    key = (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, scale, mask.causal, mask.window)
    known = _known.get(key)
    if known is None:
        known = _known[key] = _resolved(q, k, v, scale, mask)
    return known(q, k, v)[0]


_known: BoundedDict[object, Attend] = BoundedDict(256)


def _resolved(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Mask) -> Attend:
    """Return the plan of a call, after the self-checks of its kernels."""
    from attention.kernels.cuda import attend as dispatch
    from attention.kernels.cuda.runtime.call import check_arrays, normalize

    dtype, _ = check_arrays(q, k, v, None)
    call = normalize(scale, mask.causal, mask.window, None, k.shape[2])
    shape = CallShape(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], ELEMENTS[dtype])
    check(shape, call)
    return dispatch.fp8_plan(shape, call)


def check(shape: CallShape, call: CallParams) -> None:
    """Self-check the kernels of a call, unless that was done before on this GPU.

    Raises:
        KernelUnavailable: they cannot be compiled, or failed.
    """
    from attention.kernels.cuda.runtime import selfcheck
    from attention.kernels.cuda.sm90 import fp8_launch

    for program in fp8_launch.programs(shape, call):
        reason = selfcheck.check(program, functools.partial(_compare, shape, call))
        if reason is not None:
            raise KernelUnavailable(f"{program.name}: {reason}")


MAX_CHECK_ERROR: Final = 0.1
"""Relative error of the self-check: the rounding to e4m3 gives 0.05."""


def _compare(shape: CallShape, call: CallParams) -> str | None:
    """Run the kernels of a call on small inputs whose blocks differ in size; return an error in the result, or None."""
    import mlx.core as mx
    import numpy as np

    from attention.kernels.common.selfcheck import exact, relative_error
    from attention.kernels.cuda.runtime import selfcheck
    from attention.kernels.cuda.sm90 import fp8_launch

    small = replace(shape, batch=1, heads=2 * shape.group, kv_heads=2, queries=300, keys=523)
    tried = selfcheck.small_call(small, call)
    q, k, v = selfcheck.inputs(small)[:3]
    sizes = mx.array(np.exp2(np.arange(small.keys) // 128 - 1.0).astype(np.float32))[:, None].astype(v.dtype)
    v, k = v * sizes, k + mx.arange(small.head_dim).astype(k.dtype) / 16
    found = fp8_launch.plan(small, tried, fp8_launch.forward_kernel(shape, call))(q, k, v)[0]
    error = relative_error(found, selfcheck.reference(exact(q), exact(k), exact(v), tried)[0])
    return None if error <= MAX_CHECK_ERROR else f"its output disagrees with the reference by {error:.2g}"
