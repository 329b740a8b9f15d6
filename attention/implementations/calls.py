"""Calls of implementations: signatures of their arrays, bound calls for timing, and the hooks around every call."""

import gc
import math
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Final, cast

import mlx.core as mx
from msgspec import structs

from attention.core.errors import UnsupportedError, UsageError
from attention.core.forking import check_not_forked
from attention.core.kv_format import parse_kv_format
from attention.core.mask_text import MaskSpec, parse_mask
from attention.core.route import Needs
from attention.core.workload import DTYPES, DType, Workload
from attention.implementations.protocol import Implementation, ProvidesRunner, ReturnsLogsumexp, missing_feature
from attention.masks import Mask, Pattern, as_4d, dtype_name, of_workload
from attention.measure.device import Backend
from attention.measure.rounds import Runner
from attention.quantized_kv import KeyOrValue, arrays_of, kv_format_of, quantized


def call_signature(
    q: mx.array, k: KeyOrValue, v: KeyOrValue, mask: Mask, softcap: float | None
) -> tuple[Workload, Needs]:
    """Return the workload of a call, as a forward pass, and the features that it does not describe.

    A mask with a pattern gives "pattern:D", a structured mask with the pattern's share of visible pairs.

    Raises:
        UnsupportedError: the query's dtype is not supported.
    """
    for name in DTYPES:
        if q.dtype == getattr(mx, name):
            q_shape, k_shape = tuple(q.shape), tuple(k.shape)
            bounds, kv_format = _bounds(mask, k_shape[2]), kv_format_of(k, v)
            workload = _workload(q_shape, k_shape, v.shape[3], name, kv_format, bounds, mask.pattern)
            return workload, needs_of(softcap is not None, mask, (q.shape[0], q.shape[1]))
    raise UnsupportedError(f"q: got {q.dtype}; it takes {', '.join(DTYPES)}")


def needs_of(softcap: bool, mask: Mask, planes: tuple[int, int]) -> Needs:
    """Return the features that a workload does not describe: a softcap, and what a mask has beyond its bounds.

    Args:
        softcap: whether there is one.
        mask: the mask.
        planes: batch and heads of the call.
    """
    if mask.bounds_only:
        return Needs(softcap=softcap)
    batches, heads = (1, 1) if mask.pattern is None else mask.pattern.planes(*planes)
    dtype = None
    if mask.array is not None:
        own, dtype = as_4d(mask.array).shape, dtype_name(mask.array.dtype)
        batches, heads = max(batches, own[0]), max(heads, own[1])
    return Needs(
        softcap=softcap,
        array_mask=mask.array is not None,
        mask_batches=batches,
        mask_heads=heads,
        mask_dtype=dtype,
        pattern=mask.pattern is not None,
        alibi=mask.alibi is not None,
    )


def needs_with_mask(workload: Workload, needs: Needs) -> Needs:
    """Return the needs with those of a workload's own mask, if it is a pattern."""
    if not workload.structured or needs.pattern:
        return needs
    if workload.mask_spec.pattern is not None:  # a program's own mask
        return structs.replace(needs, pattern=True)
    own = needs_of(False, of_workload(workload), (workload.batch, workload.heads))
    return structs.replace(needs, pattern=own.pattern, mask_batches=own.mask_batches, mask_heads=own.mask_heads)


_CPU: Final = mx.Device(mx.cpu)


def current_backend() -> Backend:
    """Return the backend of MLX's current default device; part of every call, so it must be cheap."""
    if mx.default_device() == _CPU:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def _bounds(mask: Mask, kv_seq: int) -> str:
    """Return the bounds of a mask as a string; a window of more than all keys is a causal mask."""
    if mask.window is not None and mask.window < kv_seq:
        return f"window:{mask.window}"
    return "causal" if mask.positional else "none"


@lru_cache(maxsize=1024)
def _workload(
    q: tuple[int, ...],
    k: tuple[int, ...],
    value_dim: int,
    dtype: DType,
    kv_format: str,
    bounds: str,
    pattern: Pattern | None,
) -> Workload:
    mask = bounds
    if pattern is not None:
        shape = q[0], q[1], q[2], k[2]
        mask = f"pattern:{pattern.pairs(shape) / math.prod(shape)}"
    fields: dict[str, Any] = {
        "batch": q[0],
        "heads": q[1],
        "seq": q[2],
        "head_dim": q[3],
        "kv_heads": k[1],
        "kv_seq": k[2],
        "value_dim": value_dim,
        "dtype": dtype,
        "kv_format": kv_format,
        "mask": mask,
    }
    try:
        return Workload(**fields)
    except UsageError:
        return _UnlimitedWorkload(**fields)


class _UnlimitedWorkload(Workload, frozen=True, kw_only=True):
    """A workload without the benchmark's limits, which do not apply to `attention()`."""

    def __post_init__(self) -> None:
        """Skip validation: all fields come from validated arrays."""

    @property
    def mask_spec(self) -> MaskSpec:
        """The parts of the mask; a window may be of any size."""
        if self.mask.startswith("window:"):
            return MaskSpec(window=int(self.mask.removeprefix("window:")))
        return parse_mask(self.mask)


def try_evaluate(*arrays: KeyOrValue | None) -> bool:
    """Evaluate the inputs of a call; return False if they are being traced and have no values."""
    try:
        mx.eval(arrays_of(*arrays))
    except (RuntimeError, ValueError):
        return False
    return True


class MlxRunner:
    """Runner of an MLX implementation on one set of evaluated inputs."""

    def __init__(
        self,
        implementation: Implementation,
        workload: Workload,
        inputs: Sequence[Any],
        scale: float,
        mask: Mask | None = None,
    ) -> None:
        """Bind the call.

        Args:
            implementation: the implementation to call.
            workload: gives the mask, and whether gradients are computed.
            inputs: q, k, v (k and v may be quantized), and in training the output's gradient, evaluated.
            scale: factor of the scores.
            mask: the workload's by default.
        """
        self._implementation = implementation
        self._training = workload.pass_ == "training"
        self._inputs = list(inputs)
        self._scale = scale
        self._mask = of_workload(workload) if mask is None else mask

    def queue(self) -> list[mx.array]:
        """Queue one call; return the output, and in training dQ, dK and dV, unevaluated."""
        if not self._training:
            return [self._attend(*self._inputs[:3])]
        outputs, gradients = mx.vjp(self._attend, self._inputs[:3], self._inputs[3:4])
        return [*outputs, *gradients]

    def wait(self, outputs: Sequence[object]) -> None:
        """Evaluate the outputs of all queued calls."""
        mx.eval(cast("list[mx.array]", list(outputs)))

    def results(self) -> list[mx.array]:
        """Run one call and return its evaluated results."""
        outputs = self.queue()
        self.wait(outputs)
        return outputs

    def peak_bytes(self) -> int | None:
        """Run one call and return its peak memory, as `peak_bytes_of` measures it."""
        return peak_bytes_of(self.results)

    def _attend(self, q: mx.array, k: Any, v: Any) -> mx.array:
        return self._implementation(q, k, v, scale=self._scale, mask=self._mask)


def peak_bytes_of(call: Callable[[], object]) -> int:
    """Run a call with an empty cache and return MLX's peak memory above the memory active before, in bytes."""
    gc.collect()  # arrays in reference cycles, if freed during the call, would be subtracted from its peak
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()  # sets the peak to 0, not to the active memory
    call()
    return max(0, mx.get_peak_memory() - before)


def make_inputs(workload: Workload, seed: int) -> list[Any]:
    """Return normally distributed, evaluated inputs: q, k, v, and in training the output's gradient.

    k and v are each a `QuantizedArray` if the workload has a `kv_format`.
    """
    shapes = [
        (workload.batch, workload.heads, workload.seq, workload.head_dim),
        (workload.batch, workload.kv_heads, workload.kv_seq, workload.head_dim),
        (workload.batch, workload.kv_heads, workload.kv_seq, workload.value_dim),
    ]
    if workload.pass_ == "training":
        shapes.append((workload.batch, workload.heads, workload.seq, workload.value_dim))
    dtype = getattr(mx, workload.dtype)
    keys = mx.random.split(mx.random.key(seed), len(shapes))
    kv = parse_kv_format(workload.kv_format)
    formats = (None, None, None, None) if kv is None else (None, kv.key, kv.value, None)
    inputs: list[KeyOrValue] = []
    for shape, key, form in zip(shapes, keys, formats, strict=False):
        made = mx.random.normal(shape, dtype=dtype, key=key)
        inputs.append(made if form is None else quantized(made, form))
        mx.eval(arrays_of(inputs[-1]))  # one by one, so that the generator's scratch is not needed four times at once
    return inputs


def runner_for(implementation: Implementation, workload: Workload, inputs: Sequence[Any], scale: float) -> Runner:
    """Bind an implementation to its inputs, with its own runner if it has one.

    Raises:
        UnsupportedError: the workload's mask is a pattern, or it has a `kv_format`, which the implementation does not
            take.
    """
    if missing := missing_feature(implementation, workload):
        raise UnsupportedError(f"{implementation.name}: {missing}")
    if isinstance(implementation, ProvidesRunner):
        return implementation.runner(workload, inputs, scale)
    return MlxRunner(implementation, workload, inputs, scale)


class _WithLogsumexp:
    """An implementation whose calls return the logsumexp too, so that call hooks see them as its calls."""

    def __init__(self, implementation: ReturnsLogsumexp) -> None:
        self._implementation = implementation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._implementation, name)

    def __call__(self, *arrays: mx.array, **more: Any) -> Any:
        """Return output and logsumexp."""
        return self._implementation.with_logsumexp(*arrays, **more)


def with_logsumexp(implementation: Any) -> Any:
    """Return an implementation whose calls return a pair, output and logsumexp, as `ReturnsLogsumexp` describes."""
    return _WithLogsumexp(implementation)


CallHook = Callable[..., mx.array]
"""Called with the implementation and the arguments of a call; it must make that call exactly once."""
call_hooks: list[CallHook] = []


class _LatestPath(threading.local):
    """The path of this thread's latest call."""

    path: str | None = None


_latest = _LatestPath()


def record_path(path: str) -> None:
    """Record the path that a call takes; called by implementations that choose among paths, after the choice."""
    _latest.path = path


def take_path() -> str | None:
    """Return the path recorded last in this thread and clear it; None if none was recorded."""
    path, _latest.path = _latest.path, None
    return path


def call_through_hooks(
    implementation: Implementation, q: mx.array, k: Any, v: Any, *, scale: float, mask: Mask, **more: Any
) -> Any:
    """Call an implementation, through the most recent hook if there is one.

    Raises:
        ForkedError: attention was computed before this process was forked.
    """
    check_not_forked()
    if call_hooks:
        return call_hooks[-1](implementation, q, k, v, scale=scale, mask=mask, **more)
    return implementation(q, k, v, scale=scale, mask=mask, **more)
