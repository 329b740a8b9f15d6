"""What this machine has of what the kernels need, asked without compiling or running anything."""

import math
import sys

from attention.errors import KernelUnavailable
from attention.kernels import cache
from attention.kernels.cuda import nvrtc, trust
from attention.kernels.cuda.call import ELEMENTS, Call, Shape, refusal_of
from attention.kernels.cuda.gpu import gpu
from attention.route import PLAIN, Needs
from attention.workload import Workload

OLDEST_CAPABILITY = (8, 0)


def look() -> str:
    """GPU and compiler in a few words.

    Raises:
        KernelUnavailable: naming the first thing that is missing.
    """
    if not sys.platform.startswith("linux"):
        raise KernelUnavailable(f"the CUDA kernels run on Linux only, not on {sys.platform}")
    found = gpu()
    if found.capability < OLDEST_CAPABILITY:
        raise KernelUnavailable(f"the CUDA kernels need an Ampere GPU or a later one, and this is {found.name}")
    if not _mlx_computes_on_cuda():
        raise KernelUnavailable("this MLX has no CUDA backend (pip install 'mlx[cuda13]')")
    compiler = nvrtc.find()
    cache.ready_folder()
    return f"{found.name}, {found.architecture}, {compiler}"


def variant() -> str:
    """ "hopper", "ampere" or "none"."""
    try:
        look()
    except KernelUnavailable:
        return "none"
    return "hopper" if gpu().architecture == "sm_90a" else "ampere"


def _mlx_computes_on_cuda() -> bool:
    try:
        import mlx.core as mx
    except ImportError:
        return False
    return hasattr(mx, "cuda") and bool(mx.cuda.is_available())


def shape_and_call(workload: Workload, needs: Needs) -> tuple[Shape, Call]:
    """A workload in the kernels' terms."""
    shape = Shape(
        workload.batch,
        workload.heads,
        workload.kv_heads,
        workload.seq,
        workload.kv_seq,
        workload.head_dim,
        ELEMENTS[workload.dtype],
    )
    window = workload.window if workload.window is not None and workload.window < workload.kv_seq else None
    return shape, Call(workload.scale, workload.causal, window, 1.0 if needs.softcap else None)


def refusal_here(workload: Workload, needs: Needs = PLAIN) -> str | None:
    """Why the kernels do not take a workload on this machine, or None."""
    reason = refusal_of(workload, needs)
    if reason:
        return reason
    try:
        look()
        from attention.kernels.cuda.attend import program_of

        return trust.distrust(program_of(*shape_and_call(workload, needs)))
    except KernelUnavailable as unavailable:
        return str(unavailable)


def workspace_bytes(workload: Workload, needs: Needs = PLAIN) -> int:
    """Bytes of one forward call above inputs and output.

    Raises:
        KernelUnavailable: the workload is not taken here.
    """
    reason = refusal_here(workload, needs)
    if reason:
        raise KernelUnavailable(reason)
    from attention.kernels.cuda import launch
    from attention.kernels.cuda.attend import path_of

    shape, call = shape_and_call(workload, needs)
    made = (
        launch.forward(shape, call)
        if path_of(shape) == "forward"
        else launch.decode(shape, call, launch.splitting(shape, call))
    )
    keywords = made.keywords
    sizes = zip(keywords["output_shapes"], keywords["output_dtypes"], strict=True)
    total = sum(math.prod(size) * dtype.size for size, dtype in sizes)
    rows = workload.batch * workload.heads * workload.seq
    joined = total if path_of(shape) == "decode" and launch.splitting(shape, call).splits > 1 else 0
    return joined + 4 * rows if joined else total - workload.result_bytes
