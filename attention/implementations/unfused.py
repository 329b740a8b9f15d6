"""What an unfused attention takes in memory, read off MLX's own peaks."""

import os

from msgspec import structs

from attention.device import Backend
from attention.route import PLAIN, Needs
from attention.workload import ITEM_BYTES, Workload


def unfused_bytes(workload: Workload, needs: Needs = PLAIN) -> int:
    """Peak bytes above the inputs of a call that builds the whole score matrix, outputs included.

    Forward the softmax reuses the scores' memory, so one matrix is alive; sinks are joined to the scores and cut off
    again, which makes two more. A backward pass holds the probabilities, their gradient and the gradient of the scores.
    Position masks are one byte a pair for all heads, and their selection keeps one value a pair in a backward pass.
    Beside them stands the scaled query.
    """
    item = ITEM_BYTES[workload.dtype]
    training = workload.pass_ == "training"
    matrices = (5 if needs.softcap else 3) if training else (3 if needs.sinks else 1)
    return (
        matrices * workload.scores * item
        + _mask_bytes(workload, needs, item if training else 0)
        + _spread_bytes(workload)
        + workload.query_bytes
        + workload.output_bytes
    )


def named_products(path: str, dtype: str, backend: Backend) -> str:
    """Adds TF32 to the name of a path whose float32 matrix products are MLX's on CUDA.

    They keep 10 bits of a float32's 23, which costs about 1e-3 of the output, unless MLX_ENABLE_TF32=0 was in the
    environment when the process began.
    """
    return f"{path}, TF32" if in_tf32(dtype, backend) else path


def in_tf32(dtype: str, backend: Backend) -> bool:
    """Whether MLX multiplies matrices of a type in TF32."""
    return backend == "cuda" and dtype == "float32" and os.environ.get("MLX_ENABLE_TF32", "1") != "0"


def is_widened(dtype: str, backend: Backend) -> bool:
    """Whether an unfused path of these implementations computes in float32 what is given in another type.

    Scores in float16 overflow from 65,520. On the CPU, where MLX multiplies matrices in float32 anyhow, scores in
    bfloat16 would lose more than blocks do.
    """
    return dtype == "float16" or (dtype == "bfloat16" and backend == "cpu")


def whole_bytes(workload: Workload, backend: Backend, needs: Needs = PLAIN) -> int:
    """Peak bytes above the inputs of an unfused call that is widened where `is_widened` says so."""
    widened = is_widened(workload.dtype, backend)
    return widened_bytes(workload, needs) if widened else unfused_bytes(workload, needs)


def widened_bytes(workload: Workload, needs: Needs = PLAIN) -> int:
    """As `unfused_bytes` where inputs in half precision are converted to float32 first, and the results back."""
    wide = structs.replace(workload, dtype="float32")
    return unfused_bytes(wide, needs) + wide.query_bytes + wide.key_value_bytes + workload.output_bytes


def _spread_bytes(workload: Workload) -> int:
    """The gradients of K and V for each query head, before those that share a key head are summed."""
    group = workload.heads // workload.kv_heads
    return workload.key_value_bytes * group if workload.pass_ == "training" and group > 1 else 0


def _mask_bytes(workload: Workload, needs: Needs, kept: int) -> int:
    arrays = 2 if workload.window is not None else int(workload.causal)
    if workload.seq == 1 and workload.window is None:
        arrays = 0  # one query at the end sees every key: nothing is masked
    if needs.array_mask:
        arrays += 2
    return workload.seq * workload.kv_seq * (arrays + kept if arrays else 0)
