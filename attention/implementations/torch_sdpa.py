"""torch's scaled_dot_product_attention, on MLX's device if torch supports it."""

import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol, TypeVar, cast

import mlx.core as mx
import numpy as np

from attention import masks
from attention.core.errors import UnsupportedError
from attention.core.route import NO_NEEDS, Needs, Route, unsupported
from attention.core.workload import Workload
from attention.implementations.calls import current_backend, needs_with_mask
from attention.implementations.transforms import with_mask_gradient
from attention.masks import Mask, Shape, of_workload
from attention.measure.device import Device

NO_SOFTCAP: Final = "torch's SDPA has no softcap"
NO_ALIBI: Final = "torch's SDPA has no ALiBi"
NO_QUANTIZED: Final = "torch's SDPA takes no quantized keys and values"
MISSING: Final = "torch is not installed: pip install torch"
TORCH_DEVICES: Final = {"cpu": "cpu", "metal": "mps", "cuda": "cuda"}

Tensor = Any  # torch is optional, and not imported before something runs


class TorchSdpa:
    """torch.nn.functional.scaled_dot_product_attention, which chooses its own kernel."""

    name = "torch"
    takes_patterns = True

    def route(self, workload: Workload, device: Device, needs: Needs = NO_NEEDS) -> Route:
        """Return the route; torch's CPU kernel is fused if query and value have equal head dims."""
        if importlib.util.find_spec("torch") is None:
            return unsupported(MISSING)
        if workload.quantized:
            return unsupported(NO_QUANTIZED)
        if needs.softcap or needs.alibi:
            return unsupported(NO_SOFTCAP if needs.softcap else NO_ALIBI)
        needs = needs_with_mask(workload, needs)
        version = importlib.metadata.version("torch")
        place = "CPU" if device.backend == "cpu" or version.endswith("+cpu") else TORCH_DEVICES[device.backend].upper()
        # torch's CPU flash kernel supports every dtype and mask, but only equal head dims of query and value.
        fused = workload.value_dim == workload.head_dim
        on_cpu = place == "CPU"
        return Route(
            path="torch SDPA, dense mask" if needs.pattern else f"torch SDPA, {place}",
            fused=fused if on_cpu else None,
            reason=f"torch {version}; {_cpu_reason(fused) if on_cpu else 'torch chooses its own kernel'}",
            predicted_bytes=_predicted(workload, fused, needs) if on_cpu else None,
        )

    def __call__(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Mask, softcap: float | None = None
    ) -> mx.array:
        """Compute attention by torch, converting to and from it; shapes as in `Implementation.__call__`.

        Raises:
            UnsupportedError: torch is not installed, a softcap is given, or `mx.compile` or `mx.vmap` traces the call.
        """
        if softcap is not None:
            raise UnsupportedError(f"torch: {NO_SOFTCAP}")
        if mask.alibi is not None:
            raise UnsupportedError(f"torch: {NO_ALIBI}")
        place = torch_place()

        def attend(q: mx.array, k: mx.array, v: mx.array, mask: Mask) -> mx.array:
            bound = _computed(lambda: Bound(masks.scores_shape(q, k), mask, place, q.dtype))
            return differentiable(bound, scale, place)(q, k, v)

        return with_mask_gradient(attend, q, k, v, scale=scale, mask=mask)

    def runner(self, workload: Workload, inputs: Sequence[mx.array], scale: float) -> "TorchRunner":
        """Convert the inputs and bind the call."""
        return TorchRunner(workload, inputs, scale)


class TorchCall(Protocol):
    """An attention of torch's, with everything but q, k and v bound."""

    def attend(self, primals: Sequence[Tensor], scale: float) -> Tensor:
        """Compute attention of q, k and v."""
        ...


class Bound:
    """The arguments of torch's SDPA other than q, k and v, converted once."""

    def __init__(self, shape: Shape, mask: Mask, place: str, dtype: mx.Dtype) -> None:
        """Convert the mask to none, torch's causal flag, or an array."""
        # torch's is_causal is upper-left aligned, which is equal only for square scores.
        seq, kv_seq = shape[2:]
        self.is_causal = mask.causal and mask.window is None and mask.bounds_only and seq == kv_seq
        whole = None if self.is_causal else mask.dense(shape)
        self.mask: Tensor = None
        self.seeing: Tensor = None
        if whole is None:
            return
        if not mask.bounds_only or mask.empty_rows(seq, kv_seq):
            whole, seeing = masks.opened(whole)
            self.seeing = to_torch(masks.as_4d(seeing), place)
        self.mask = to_torch(whole if whole.dtype == mx.bool_ else masks.cast_additive(whole, dtype), place)

    def attend(self, primals: Sequence[Tensor], scale: float) -> Tensor:
        """Call torch's SDPA; fully masked rows give 0."""
        torch = import_torch()
        q, k, v = primals
        if scale < 0:  # torch's CPU flash kernel returns NaN for it under a causal mask
            q, scale = -q, -scale
        grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=self.mask, is_causal=self.is_causal, scale=scale, **grouped
        )
        return out if self.seeing is None else torch.where(self.seeing, out, torch.zeros_like(out))


class TorchRunner:
    """Runner of an attention of torch's on converted inputs."""

    def __init__(
        self, workload: Workload, inputs: Sequence[mx.array], scale: float, bound: TorchCall | None = None
    ) -> None:
        """Convert the inputs: q, k, v, and in training the output's gradient; `bound` is torch's SDPA by default."""
        self._place = torch_place()
        self._inputs = [to_torch(x, self._place) for x in inputs]
        self._scale = scale
        self._training = workload.pass_ == "training"
        shape = (workload.batch, workload.heads, workload.seq, workload.kv_seq)
        own = bound or Bound(shape, of_workload(workload), self._place, inputs[0].dtype)
        self._bound: TorchCall = own
        for x in self._inputs[:3]:
            x.requires_grad_(self._training)

    def queue(self) -> list[Tensor]:
        """Start one call; return the output, and in training dQ, dK and dV. On the CPU torch is synchronous."""
        primals = self._inputs[:3]
        out = self._bound.attend(primals, self._scale)
        if not self._training:
            return [out]
        return [out.detach(), *import_torch().autograd.grad(out, primals, self._inputs[3])]

    def wait(self, outputs: Sequence[object]) -> None:
        """Wait for the device."""
        if self._place == "cuda":
            import_torch().cuda.synchronize()
        elif self._place == "mps":
            import_torch().mps.synchronize()

    def results(self) -> list[mx.array]:
        """Run one call and convert its results."""
        outputs = self.queue()
        self.wait(outputs)
        return [to_mlx(x) for x in outputs]

    def peak_bytes(self) -> int | None:
        """Run one call and return CUDA's peak memory above the inputs; None on other devices."""
        if self._place != "cuda":
            return None
        torch = import_torch()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.wait(self.queue())
        return int(torch.cuda.max_memory_allocated()) - int(before)


T = TypeVar("T")


def differentiable(
    bound: TorchCall, scale: float, place: str, for_gradient: Callable[[], TorchCall] | None = None
) -> Callable[..., mx.array]:
    """Return an attention of torch's as a function of q, k and v, evaluated eagerly, with torch's gradient.

    Args:
        bound: the attention.
        scale: factor of the scores.
        place: torch's device.
        for_gradient: makes the attention whose gradient is taken; `bound` by default.
    """

    @mx.custom_function
    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        with import_torch().no_grad():
            return _computed(lambda: to_mlx(bound.attend([to_torch(x, place) for x in (q, k, v)], scale)))

    @mx.custom_function
    def gradients_of(cotangent: mx.array, *inputs: mx.array) -> list[mx.array]:
        def gradients() -> list[mx.array]:
            own = for_gradient() if for_gradient else bound
            primals = [to_torch(x, place).requires_grad_() for x in inputs]
            with import_torch().enable_grad():
                out = own.attend(primals, scale)
            return [to_mlx(x) for x in import_torch().autograd.grad(out, primals, to_torch(cotangent, place))]

        return _computed(gradients)

    @attend.vjp
    def pull_back(inputs: tuple[mx.array, ...], cotangent: mx.array, _: mx.array) -> list[mx.array]:
        return cast("list[mx.array]", gradients_of(cotangent, *inputs))

    def refuse(*_: object) -> list[mx.array]:
        raise UnsupportedError("torch: only first derivatives in reverse mode; implementation 'baseline' has all")

    gradients_of.vjp(refuse)
    attend.jvp(refuse)
    return cast("Callable[..., mx.array]", attend)


def _computed(convert: Callable[[], T]) -> T:
    """Run a conversion that needs evaluated MLX arrays; raises UnsupportedError under `mx.compile` and `mx.vmap`."""
    try:
        return convert()
    except ValueError as error:
        if "[eval]" not in str(error):
            raise
        raise UnsupportedError(
            "torch: it computes at once and cannot be traced by mx.compile or mx.vmap; implementation 'baseline' can"
        ) from error


def to_torch(array: mx.array, place: str) -> Tensor:
    """Copy an MLX array to torch; bfloat16, which numpy lacks, by its bits."""
    torch = import_torch()
    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.view(mx.int16))).view(torch.bfloat16).to(place)
    return torch.from_numpy(np.array(array)).to(place)


def to_mlx(tensor: Tensor) -> mx.array:
    """Copy a torch tensor to MLX."""
    torch = import_torch()
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return mx.array(tensor.view(torch.int16).numpy()).view(mx.bfloat16)
    return mx.array(tensor.numpy())


def import_torch() -> Any:
    """Return torch; raises UnsupportedError if it is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise UnsupportedError(f"torch: {MISSING}")
    return importlib.import_module("torch")


def torch_place() -> str:
    """Return torch's device for MLX's current one; the CPU if torch lacks it."""
    torch, wanted = import_torch(), TORCH_DEVICES[current_backend()]
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return wanted if has[wanted] else "cpu"


def _cpu_reason(fused: bool) -> str:
    return "its CPU flash kernel takes this" if fused else "its CPU flash kernel needs value_dim equal to head_dim"


def _predicted(workload: Workload, fused: bool, needs: Needs) -> int:
    """Return the bytes of outputs, of an explicit mask if needed, and, unfused, of float32 scores and probabilities."""
    explicit = workload.window is not None or (workload.causal and workload.seq != workload.kv_seq)
    scores = 0 if fused else 4 * workload.scores * (4 if workload.pass_ == "training" else 2)
    masks_made = needs.mask_batches * needs.mask_heads if needs.pattern else int(explicit)
    return workload.output_bytes + scores + 4 * workload.seq * workload.kv_seq * masks_made
