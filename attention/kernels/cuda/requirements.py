"""Availability of the kernels on this machine and their workspace, determined without compiling or running anything."""

import functools
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

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

if TYPE_CHECKING:
    from attention.kernels.cuda.choice import KernelPath
    from attention.kernels.cuda.packed_choice import PackedPath

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
    try:
        path_here(workload, needs)
    except KernelUnavailable as unavailable:
        return str(unavailable)
    return None


def path_here(workload: Workload, needs: Needs = NO_NEEDS) -> tuple["KernelPath | PackedPath", list[str]]:
    """Return the path of a workload according to the checks so far, and why faster paths are not trusted.

    Raises:
        KernelUnavailable: the kernels do not support the workload on this machine; the message is a one-line reason.
    """
    reason = refusal_of_workload(workload)
    if reason:
        raise KernelUnavailable(reason)
    if workload.kv_format != DENSE:
        return _packed_path(workload, needs)
    describe()
    from attention.kernels.cuda.choice import path_of

    return path_of(*shape_and_call(workload, needs))


def _packed_path(workload: Workload, needs: Needs) -> tuple["PackedPath", list[str]]:
    """Return what `path_here` returns, of a workload with quantized keys and values."""
    from attention.kernels.cuda.quantized.formats import NO_GRADIENT, PackedKV

    if workload.pass_ == "training":
        raise KernelUnavailable(NO_GRADIENT)
    try:
        describe()
        from attention.kernels.cuda import packed_choice
        from attention.kernels.cuda.runtime import launcher

        obstacle = launcher.known_obstacle()
        if obstacle is None:
            packed = PackedKV.of_text(workload.kv_format, workload.dtype)
            return packed_choice.path_of(*shape_and_call(workload, needs), packed)
    except KernelUnavailable as unavailable:
        reason = f"the CUDA kernels for quantized keys and values are not used: {unavailable}"
        raise KernelUnavailable(reason) from unavailable
    raise KernelUnavailable(f"the CUDA kernels for quantized keys and values need the launcher: {obstacle}")


def workspace_bytes(workload: Workload, path: "KernelPath | PackedPath", needs: Needs = NO_NEEDS) -> int:
    """Return the bytes of a forward call above inputs and output: intermediate arrays, and zero-padded copies.

    Args:
        workload: one that the kernels support on this machine.
        path: the path that it takes.
        needs: features that it does not describe.
    """
    shape, call = shape_and_call(workload, needs)
    if path == "decode":
        from attention.kernels.cuda.sm90.launch import in_whole_steps

        shape = in_whole_steps(shape, call)
    copies = 0
    if (shape.head_dim, shape.value_dim) != (workload.head_dim, workload.value_dim):
        copies = structs.replace(workload, head_dim=shape.head_dim, value_dim=shape.value_dim).input_bytes
    return _written_bytes(shape, call, workload.kv_format, path) + copies - workload.result_bytes


@functools.lru_cache(maxsize=256)
def _written_bytes(shape: CallShape, call: CallParams, kv_format: str, path: "KernelPath | PackedPath") -> int:
    """Return the bytes of all arrays that a forward call makes."""
    from attention.kernels.cuda import choice, packed_choice

    if kv_format == DENSE:
        made = choice.stages(shape, call, cast("KernelPath", path))
    else:
        from attention.kernels.cuda.quantized.formats import PackedKV

        dtype = next(dtype for dtype, element in ELEMENTS.items() if element == shape.element)
        packed = PackedKV.of_text(kv_format, dtype)
        made = packed_choice.stages(shape, call, packed, cast("PackedPath", path))
    arrays = {name: math.prod(size) * dtype.size for stage in made for name, (size, dtype) in stage.outputs.items()}
    return sum(arrays.values())
