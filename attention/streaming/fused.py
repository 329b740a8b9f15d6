"""A step of a stream as one operation: written in place and attended to by the CPU kernel, where `poc` runs there."""

from functools import cache

import mlx.core as mx
from msgspec import Struct

from attention.core.errors import KernelUnavailable
from attention.core.kv_format import KVFormat
from attention.implementations.calls import call_hooks, record_path
from attention.implementations.fused import Poc
from attention.implementations.protocol import Implementation
from attention.kernels import cpu
from attention.measure.device import check_not_forked
from attention.streaming.layout import Layout
from attention.streaming.rope import Rope

_CPU = mx.Device(mx.cpu)


class Constants(Struct, frozen=True, eq=False):
    """What stays the same from step to step."""

    options: cpu.StreamOptions
    radians: mx.array | None
    adjacent: bool


def constants(layout: Layout, formats: KVFormat | None, rope: Rope | None) -> Constants:
    """Return the constants of a state's steps."""
    options = cpu.stream_options(formats, layout.first, layout.window, layout.ring)
    if rope is None:
        return Constants(options, None, False)
    radians = rope.radians()
    mx.eval(radians)
    return Constants(options, radians, rope.traditional)


def is_used(implementation: str | Implementation) -> bool:
    """Return whether a step with an implementation runs in the CPU kernel: with `poc`, unless calls are watched."""
    if call_hooks or mx.default_device() != _CPU:
        return False
    if implementation == "poc" or (isinstance(implementation, Poc) and implementation.variant is None):
        return cpu.is_loaded() or _loads()
    return False


@cache
def _loads() -> bool:
    try:
        cpu.load()
    except KernelUnavailable:
        return False
    return True


def step(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    slots: list[mx.array],
    constants: Constants,
    rows: list[tuple[int, int]],
    scale: float,
    softcap: float | None,
    rotated: bool,
) -> mx.array:
    """Write one token into slots, and attend with its query; arguments as in `attention.kernels.cpu.stream_step`."""
    check_not_forked()
    out = cpu.stream_step(
        q,
        k,
        v,
        slots,
        constants.options,
        rows,
        scale,
        softcap=softcap,
        radians=constants.radians,
        adjacent=constants.adjacent,
        rotated=rotated,
    )
    record_path("CPU kernel, step of a stream")
    return out
