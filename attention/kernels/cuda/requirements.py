"""Availability of the kernels on this machine and their workspace, determined without compiling or running anything."""

import functools
import math
import sys
from pathlib import Path
from typing import cast

from msgspec import structs

from attention.core.errors import KernelUnavailable
from attention.core.kv_format import DENSE
from attention.core.route import NO_NEEDS, Needs
from attention.core.workload import Workload
from attention.kernels.common import cache
from attention.kernels.cuda.runtime import program
from attention.kernels.cuda.runtime.call import DIM_STEP, ELEMENTS, CallParams, CallShape, MaskKind, refusal_of_workload
from attention.kernels.cuda.runtime.gpu import gpu
from attention.masks import causal, of_workload

MIN_CAPABILITY = (8, 0)


def describe() -> str:
    """Return a short description of GPU and compiler.

    Raises:
        KernelUnavailable: a requirement is missing; the message names the first one.
    """
    return _found(cache.folder())


@functools.cache
def _found(folder: Path) -> str:
    """Return the description for a cache folder; only success is cached, failures are re-evaluated."""
    if not sys.platform.startswith("linux"):
        raise KernelUnavailable(f"the CUDA kernels run on Linux only, not on {sys.platform}")
    found = gpu()
    if found.capability < MIN_CAPABILITY:
        raise KernelUnavailable(f"the CUDA kernels need an Ampere GPU or a later one, and this is {found.name}")
    if not _mlx_computes_on_cuda():
        raise KernelUnavailable("this MLX has no CUDA backend (pip install 'mlx[cuda13]')")
    compiler = program.find()
    cache.ensure_folder()
    return f"{found.name}, {found.architecture}, {compiler}"


def variant() -> str:
    """Return "hopper", "ampere" or "none"."""
    try:
        describe()
    except KernelUnavailable:
        return "none"
    return "hopper" if gpu().architecture == "sm_90a" else "ampere"


def _mlx_computes_on_cuda() -> bool:
    try:
        import mlx.core as mx
    except ImportError:
        return False
    return hasattr(mx, "cuda") and bool(mx.cuda.is_available())


@functools.lru_cache(maxsize=256)
def shape_and_call(workload: Workload, needs: Needs = NO_NEEDS) -> tuple[CallShape, CallParams]:
    """Return the shape and call of a workload: padded head dims; an array mask, of unknown dtype, counts as bool.

    For a program's own pattern, which a workload does not describe, another one stands in.
    """
    dims = [DIM_STEP * -(-dim // DIM_STEP) for dim in (workload.head_dim, workload.value_dim)]
    shape = CallShape(
        workload.batch,
        workload.heads,
        workload.kv_heads,
        workload.seq,
        workload.kv_seq,
        dims[0],
        ELEMENTS[workload.dtype],
        dims[1],
    )
    window = workload.window if workload.window is not None and workload.window < workload.kv_seq else None
    softcap, mask = 1.0 if needs.softcap else None, "bool" if needs.array_mask else None
    pattern = None
    if needs.pattern or workload.structured:
        pattern = causal() if workload.mask_spec.pattern is not None else of_workload(workload).pattern
    kind = cast("MaskKind | None", mask)
    return shape, CallParams(workload.scale, workload.causal, window, softcap, kind, pattern, needs.alibi)


def refusal_here(workload: Workload, needs: Needs = NO_NEEDS) -> str | None:
    """Return None if the kernels support a workload on this machine, else a one-line reason."""
    reason = refusal_of_workload(workload)
    if reason:
        return reason
    if workload.kv_format != DENSE:
        return _packed_refusal(workload, needs)
    try:
        describe()
        from attention.kernels.cuda.choice import path_of

        path_of(*shape_and_call(workload, needs))
    except KernelUnavailable as unavailable:
        return str(unavailable)
    return None


def _packed_refusal(workload: Workload, needs: Needs) -> str | None:
    """Return None if the kernels support a workload with quantized keys and values on this machine, else the reason."""
    from attention.kernels.cuda.quantized.formats import NO_GRADIENT, PackedKV

    if workload.pass_ == "training":
        return NO_GRADIENT
    try:
        describe()
        from attention.kernels.cuda import packed_choice
        from attention.kernels.cuda.runtime import launcher

        obstacle = launcher.known_obstacle()
        if obstacle:
            return f"the CUDA kernels for quantized keys and values need the launcher: {obstacle}"
        shape, call = shape_and_call(workload, needs)
        packed_choice.path_of(shape, call, PackedKV.of_text(workload.kv_format, workload.dtype))
    except KernelUnavailable as unavailable:
        return f"the CUDA kernels for quantized keys and values are not used: {unavailable}"
    return None


def workspace_bytes(workload: Workload, needs: Needs = NO_NEEDS) -> int:
    """Return the bytes of a forward call above inputs and output: intermediate arrays, and zero-padded copies.

    Args:
        workload: one that the kernels support on this machine.
        needs: features that it does not describe.
    """
    from attention.kernels.cuda.choice import path_of, stages

    shape, call = shape_and_call(workload, needs)
    if workload.kv_format != DENSE:
        from attention.kernels.cuda import packed_choice
        from attention.kernels.cuda.quantized.formats import PackedKV

        packed = PackedKV.of_text(workload.kv_format, workload.dtype)
        made = packed_choice.stages(shape, call, packed, packed_choice.path_of(shape, call, packed)[0])
    else:
        made = stages(shape, call, path_of(shape, call)[0])
    arrays = {name: math.prod(size) * dtype.size for stage in made for name, (size, dtype) in stage.outputs.items()}
    written = sum(arrays.values())
    copies = 0
    if (shape.head_dim, shape.value_dim) != (workload.head_dim, workload.value_dim):
        copies = structs.replace(workload, head_dim=shape.head_dim, value_dim=shape.value_dim).input_bytes
    return written + copies - workload.result_bytes
