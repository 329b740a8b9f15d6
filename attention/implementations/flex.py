"""torch's FlexAttention, compiled by torch.compile for each kind of call, on the CPU or CUDA."""

import importlib
import importlib.metadata
import importlib.util
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from types import FunctionType
from typing import Any, Final

import mlx.core as mx
import numpy as np
from msgspec import Struct

from attention.core.errors import KernelUnavailable, UnsupportedError, error_line
from attention.core.mask_text import ALL_VISIBLE, MaskSpec
from attention.core.route import NO_NEEDS, Needs, Route, unsupported
from attention.core.workload import ITEM_BYTES, Workload
from attention.implementations.calls import call_signature
from attention.implementations.torch_sdpa import (
    MISSING,
    Tensor,
    TorchRunner,
    differentiable,
    import_torch,
    torch_place,
)
from attention.masks import Mask, Pattern, pattern_of
from attention.measure.device import Device

BLOCK: Final = 128
"""Rows and keys of a tile of FlexAttention's block mask."""
MIN_VERSION: Final = (2, 5)
MAX_COMPILED: Final = 32
COMPILERS: Final = ("g++", "clang++", "c++")
RECOMPILE_LIMIT: Final = 1_000_000
"""torch's own limit of 8 would make the ninth kind of call fail, or run unfused."""
NO_CPU_GRADIENT: Final = "FlexAttention has no backward pass on the CPU"


class FlexCall(Struct, frozen=True):
    """What a compiled call depends on."""

    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    mask: object
    """A mask's parts, or a pattern."""
    scale: float
    training: bool
    place: str


class Flex:
    """torch.nn.attention.flex_attention under torch.compile; nothing runs if it cannot be compiled."""

    name = "flex"
    takes_patterns = True

    def __init__(self) -> None:
        self._compiled: OrderedDict[FlexCall, Compiled] = OrderedDict()

    def route(self, workload: Workload, device: Device, needs: Needs = NO_NEEDS) -> Route:
        """Return the route, or an unsupported one with the reason; compiles nothing."""
        obstacle = _obstacle(workload, device, needs)
        if obstacle:
            return unsupported(obstacle)
        place = "CPU" if device.backend == "cpu" else "CUDA"
        version = importlib.metadata.version("torch")
        return Route(
            path=f"FlexAttention, {place}",
            fused=True,
            reason=f"torch {version}, compiled by torch.compile for each shape and mask",
            predicted_bytes=workload.output_bytes + _list_bytes(workload),
        )

    def needs_building(self, workload: Workload, device: Device) -> bool:
        """Return whether the workload's kind of call has not been compiled in this process."""
        return _call_of(workload, torch_place()) not in self._compiled

    def build_for(self, workload: Workload, on_message: Callable[[str], None]) -> None:
        """Compile the workload's kind of call; if that fails, calls raise the reason."""
        on_message(f"flex: torch.compile makes a kernel for {workload.label}")
        self._of(_call_of(workload, torch_place()))

    def runner(self, workload: Workload, inputs: Sequence[mx.array], scale: float) -> TorchRunner:
        """Convert the inputs and bind the compiled call.

        Raises:
            KernelUnavailable: it could not be compiled.
        """
        call = _call_of(workload, torch_place(), scale)
        return TorchRunner(workload, inputs, scale, self._of(call).checked())

    def __call__(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Mask, softcap: float | None = None
    ) -> mx.array:
        """Compute attention by torch, converting to and from it; shapes as in `Implementation.__call__`.

        Raises:
            UnsupportedError: torch is not installed, the call has a softcap, a bias or an array mask, or `mx.compile`
                or `mx.vmap` traces it.
            KernelUnavailable: it could not be compiled.
        """
        import_torch()
        workload, needs = call_signature(q, k, v, mask, softcap)
        if obstacle := _refused(needs) or ("FlexAttention has no bias here" if mask.alibi is not None else None):
            raise UnsupportedError(f"flex: {obstacle}")
        place = torch_place()
        shapes = tuple(tuple(x.shape) for x in (q, k, v))
        of_mask = workload.mask_spec if mask.pattern is None else mask.pattern

        def attend(training: bool) -> Compiled:
            return self._of(FlexCall(shapes, workload.dtype, of_mask, scale, training, place)).checked()

        return differentiable(attend(False), scale, place, lambda: attend(True))(q, k, v)

    def _of(self, call: FlexCall) -> "Compiled":
        if call not in self._compiled:
            while len(self._compiled) >= MAX_COMPILED:
                self._compiled.popitem(last=False)
            self._compiled[call] = Compiled(call)
        self._compiled.move_to_end(call)
        return self._compiled[call]


class Compiled:
    """FlexAttention compiled for one kind of call.

    Attributes:
        failure: why it could not be compiled, or None.
        seconds: the time of compiling.
    """

    def __init__(self, call: FlexCall) -> None:
        self.failure: str | None = None
        self._attend: Callable[..., Tensor]
        self._training = call.training
        started = time.perf_counter()
        try:
            self._compile(call)
        except Exception as error:
            self.failure = f"FlexAttention could not be compiled: {_cause(error)}"
        self.seconds = time.perf_counter() - started

    def checked(self) -> "Compiled":
        """Return it; raises KernelUnavailable if it could not be compiled."""
        if self.failure:
            raise KernelUnavailable(self.failure)
        return self

    def attend(self, primals: Sequence[Tensor], scale: float) -> Tensor:
        """Call it on q, k and v."""
        torch = import_torch()
        with torch.set_grad_enabled(self._training):  # in one grad mode, since torch recompiles a call in another
            try:
                return self._attend(*primals)
            except torch._dynamo.exc.FailOnRecompileLimitHit:  # another layout; lifting the limit takes 100 us
                with _unlimited_compilations():
                    return self._attend(*primals)

    def _compile(self, call: FlexCall) -> None:
        torch, flex = import_torch(), _flex_module()
        if call.training and call.place == "cpu":
            raise UnsupportedError(NO_CPU_GRADIENT)
        compiled = torch.compile(flex.flex_attention, fullgraph=True, dynamic=False)
        options: dict[str, Any] = {"scale": call.scale, "enable_gqa": call.shapes[0][1] != call.shapes[1][1]}
        if call.mask != ALL_VISIBLE:
            options["block_mask"] = block_mask(call)
        self._attend = partial(compiled, **options)
        primals = [torch.zeros(shape, dtype=getattr(torch, call.dtype), device=call.place) for shape in call.shapes]
        for x in primals:
            x.requires_grad_(call.training)
        with _unlimited_compilations():
            if not _compiles():
                raise RuntimeError("torch.compile is switched off, and without it FlexAttention is not fused")
            out = self.attend(primals, call.scale)
            if call.training:
                torch.autograd.grad(out, primals, torch.zeros_like(out))


def _unlimited_compilations() -> AbstractContextManager[None]:
    """Return a context in which torch compiles any number of kinds of call; it would refuse the ninth."""
    config = importlib.import_module("torch._dynamo.config")
    limits = {"recompile_limit": RECOMPILE_LIMIT, "accumulated_recompile_limit": RECOMPILE_LIMIT}
    patch: AbstractContextManager[None] = config.patch(**limits)
    return patch


def _compiles() -> bool:
    """Return whether torch.compile compiles: the graph of a new function reaches a backend of our own."""
    torch, reached = import_torch(), []

    def backend(graph: Any, inputs: object) -> Any:
        reached.append(inputs)
        return graph.forward

    # another code object each time: torch caches by it, and compiles one a limited number of times
    function = FunctionType((lambda x: x + 1).__code__.replace(), globals())
    torch.compile(function, backend=backend)(torch.zeros(1))
    return bool(reached)


def block_mask(call: FlexCall) -> Any:
    """Return FlexAttention's BlockMask of a call, made from the block list of its pattern: nothing is Lq x Lk."""
    torch, flex = import_torch(), _flex_module()
    (batch, heads, seq, _), (_, _, kv_seq, _) = call.shapes[:2]
    spec = call.mask if isinstance(call.mask, MaskSpec) else None
    pattern = pattern_of(spec, seq, kv_seq, heads) if spec is not None else call.mask
    assert isinstance(pattern, Pattern)
    found = pattern.block_list((batch, heads, seq, kv_seq), BLOCK, BLOCK)
    partial = found.entries[:, 1] >= 0
    planes = found.batches, found.heads
    row = np.repeat(np.arange(len(found.offsets) - 1), np.diff(found.offsets))
    lists = []
    for chosen in (partial, ~partial):
        counts, indices = _padded(row[chosen], found.entries[chosen, 0], len(found.offsets) - 1, found.key_tiles)
        lists += [
            torch.from_numpy(counts.reshape(*planes, found.row_tiles)).to(call.place),
            torch.from_numpy(indices.reshape(*planes, found.row_tiles, found.key_tiles)).to(call.place),
        ]
    shift = kv_seq - seq
    mod = _of_spec(spec, shift, seq, kv_seq, heads, call.place) if spec is not None else _of_bits(found, call.place)
    return flex.BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=mod, seq_lengths=(seq, kv_seq))


def _padded(row: Any, key: Any, rows: int, width: int) -> tuple[Any, Any]:
    """Return the number of keys of each row (rows,), and the keys (rows, width), filled up with zeros."""
    counts = np.bincount(row, minlength=rows)
    starts = np.cumsum(counts) - counts
    indices = np.zeros((rows, width), np.int32)
    indices[row, np.arange(len(row)) - starts[row]] = key
    return counts.astype(np.int32), indices


def _of_spec(spec: MaskSpec, shift: int, seq: int, kv_seq: int, heads: int, place: str) -> Callable[..., Tensor]:
    """Return the mask of a mask string as a function of batch, head, query row and key, as its users would write it."""
    parts: list[Callable[..., Tensor]] = []
    if spec.prefix is not None:
        prefix = spec.prefix
        parts.append(lambda b, h, q, k: k < prefix)
    if spec.causal:
        parts.append(lambda b, h, q, k: k <= q + shift)
    if spec.documents is not None:
        length = spec.documents
        parts.append(lambda b, h, q, k: (k <= q + shift) & (k // length == (q + shift) // length))
    if spec.window is not None:
        window = spec.window
        parts.append(lambda b, h, q, k: (k <= q + shift) & (k > q + shift - window))
    if spec.strided is not None:
        count, stride = spec.strided

        def strided(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            distance = q + shift - k
            return (distance >= 0) & (distance < count * stride) & (distance % stride == 0)

        parts.append(strided)
    if spec.blocks is not None:
        table = _block_table(spec, seq, kv_seq, heads, place)
        parts.append(lambda b, h, q, k: table[h, q // BLOCK, k // BLOCK])
    if len(parts) == 1:
        return parts[0]
    return _flex_module().or_masks(*parts)  # type: ignore[no-any-return]


def _block_table(spec: MaskSpec, seq: int, kv_seq: int, heads: int, place: str) -> Tensor:
    from attention.core.mask_text import block_count, draw_blocks

    assert spec.blocks is not None
    table = np.zeros((heads, block_count(seq), block_count(kv_seq)), np.bool_)
    for head in range(heads):
        np.put_along_axis(table[head], np.array(draw_blocks(spec.blocks, seq, kv_seq, head)), values=True, axis=1)
    return import_torch().from_numpy(table).to(place)


def _of_bits(found: Any, place: str) -> Callable[..., Tensor]:
    """Return the mask of a block list: its partial tiles' bits are looked up."""
    torch = import_torch()
    tiles = np.full((found.batches, found.heads, found.row_tiles, found.key_tiles), -1, np.int32)
    row = np.repeat(np.arange(len(found.offsets) - 1), np.diff(found.offsets))
    tiles.reshape(-1, found.key_tiles)[row, found.entries[:, 0]] = found.entries[:, 1]
    which, words = torch.from_numpy(tiles).to(place), torch.from_numpy(np.array(found.bits.view(np.int32))).to(place)
    one_batch, one_head = found.batches == 1, found.heads == 1

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        tile = which[b * 0 if one_batch else b, h * 0 if one_head else h, q // BLOCK, k // BLOCK]
        word = words[tile.clamp(min=0), q % BLOCK, (k % BLOCK) // 32]
        return ((word >> (k % 32)) & 1) == 1

    return visible


def _call_of(workload: Workload, place: str, scale: float | None = None) -> FlexCall:
    w = workload
    shapes = (
        (w.batch, w.heads, w.seq, w.head_dim),
        (w.batch, w.kv_heads, w.kv_seq, w.head_dim),
        (w.batch, w.kv_heads, w.kv_seq, w.value_dim),
    )
    return FlexCall(shapes, w.dtype, w.mask_spec, w.scale if scale is None else scale, w.pass_ == "training", place)


def _obstacle(workload: Workload, device: Device, needs: Needs) -> str | None:
    if importlib.util.find_spec("torch") is None:
        return MISSING
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_VERSION:
        return f"torch {version} has no FlexAttention: it came with {'.'.join(map(str, MIN_VERSION))}"
    if device.backend == "metal":
        return "FlexAttention is compiled for the CPU and CUDA, not for Metal"
    if device.backend == "cuda" and version.endswith("+cpu"):
        return f"torch {version} is without CUDA"
    if device.backend == "cpu" and not any(map(shutil.which, COMPILERS)):
        return f"torch.compile needs a C++ compiler: none of {', '.join(COMPILERS)} is installed"
    if device.backend == "cpu" and workload.pass_ == "training":
        return NO_CPU_GRADIENT
    if workload.quantized:
        return "FlexAttention takes no quantized keys and values"
    return _refused(needs)


def _refused(needs: Needs) -> str | None:
    for wanted, what in ((needs.softcap, "a softcap"), (needs.array_mask, "an array mask"), (needs.sinks, "sinks")):
        if wanted:
            return f"FlexAttention is called with masks of positions only, not with {what}"
    return None


def _list_bytes(workload: Workload) -> int:
    """Return the bytes of a block mask: counts and key tiles of full and of partial tiles."""
    if workload.mask_spec == ALL_VISIBLE:
        return 0
    planes = workload.heads if workload.mask_spec.per_head else 1
    rows, keys = -(-workload.seq // BLOCK), -(-workload.kv_seq // BLOCK)
    return 4 * ITEM_BYTES["float32"] * planes * rows * (keys + 1)


def _cause(error: BaseException) -> str:
    """Return the innermost cause in one line: torch.compile wraps it, and prints its own advice after it."""
    while isinstance(error.__cause__, BaseException):
        error = error.__cause__
    return error_line(error)


@cache
def _flex_module() -> Any:
    return importlib.import_module("torch.nn.attention.flex_attention")
