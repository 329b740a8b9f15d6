"""Block lists against the kernel's own dense call and against torch, in interleaved rounds.

Predicted share of the dense time, for float32 at D = 64: the share of computed pairs (those of the listed tiles, less
the keys that no query of a part of the panel sees) and of the call around them. A panel of 64 queries by 128 keys is
2 x 64 x 128 x 64 multiply-adds: 65 thousand cycles of an AVX2 core. Per panel, loading Q and writing O take about 5
thousand; per partial tile, turning and applying the bits takes up to 5 thousand. K and V of a tile are 64 KiB, read
once for the panels that list it: half a byte a cycle from the L3, so that lists do not make the call wait for memory.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import mlx.core as mx
import numpy as np

from attention import masks
from attention.kernels import cpu
from attention.kernels.cpu import build
from attention.masks import Pattern
from attention.measure.rounds import Arm, TimedCall, take_sample
from benchmarks.cpu.measure import TYPES, let_threads_sleep, threads
from benchmarks.rounds import Call, MlxCalls, TorchCalls, sample

BATCH, HEADS, HEAD_DIM = 1, 8, 64
PEERS: Final = ("flex", "sdpa")


@dataclass(frozen=True)
class Pairing:
    """A mask, and what it must reach against the dense call."""

    name: str
    length: int
    pattern: Pattern
    by_bounds: dict[str, Any] = field(default_factory=dict)
    """Keywords of the same mask without lists; measured beside them."""
    most_time: float | None = None
    """Maximum share of the dense time."""
    least_rate: float | None = None
    """Minimum share of the dense rate, in visible pairs a second."""
    peers: tuple[str, ...] = ()


def _random_blocks(length: int, density: float) -> Pattern:
    count = length // 128
    random = np.random.default_rng(0)
    chosen = np.zeros((1, HEADS, count, count), bool)
    for row in chosen.reshape(-1, count):
        row[random.choice(count, max(1, round(density * count)), replace=False)] = True
    return masks.blocks(chosen)


def pairings() -> list[Pairing]:
    """Return the masks that are measured."""
    causal = {"causal": True}
    return [
        Pairing("blocks:1", 4096, _random_blocks(4096, 1.0), most_time=1.05),
        Pairing("blocks:0.5", 4096, _random_blocks(4096, 0.5)),
        Pairing("blocks:0.25", 4096, _random_blocks(4096, 0.25)),
        Pairing("blocks:0.1", 4096, _random_blocks(4096, 0.1), most_time=0.13, peers=PEERS),
        Pairing("window:256", 8192, masks.window(256), {"window": 256}, least_rate=0.8),
        Pairing("causal", 4096, masks.causal(), causal),
        Pairing("documents:512", 4096, masks.documents((512,) * 8) & masks.causal()),
        Pairing("prefix:64+window:512", 4096, masks.prefix(64) | masks.window(512)),
    ]


@dataclass
class SparseRow:
    """Medians: seconds of each call; shares of the dense call's time and rate; torch's time over that through lists."""

    name: str
    length: int
    dtype: str
    backward: bool
    density: float
    computed: float
    """Share of all pairs that the lists' tiles have."""
    seconds: dict[str, float]
    time_share: float
    rate_share: float
    bounds_share: float | None
    """Time through lists over the time with the same mask as bounds."""
    peers: dict[str, float]
    target: str = ""
    holds: bool | None = None


def _inputs(length: int, dtype: str) -> list[mx.array]:
    random = np.random.default_rng(0)
    arrays = [random.standard_normal((BATCH, HEADS, length, HEAD_DIM), dtype=np.float32) for _ in range(4)]
    made = [mx.array(x).astype(TYPES[dtype]) for x in arrays]
    mx.eval(made)
    return made


def _call(inputs: list[mx.array], backward: bool, **keywords: Any) -> TimedCall:
    q, k, v, cotangent = inputs

    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return cpu.flash_attention(q, k, v, scale=HEAD_DIM**-0.5, **keywords)

    return MlxCalls((lambda: mx.vjp(attend, [q, k, v], [cotangent])[1]) if backward else (lambda: attend(q, k, v)))


def _torch_calls(
    names: tuple[str, ...], inputs: list[mx.array], pattern: Pattern, backward: bool
) -> dict[str, TimedCall]:
    """Return torch's calls with the same mask: FlexAttention compiled, and SDPA with a dense bool mask."""
    try:
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError:
        return {}
    torch.set_num_threads(threads())
    length, dtype = inputs[0].shape[2], getattr(torch, str(inputs[0].dtype).removeprefix("mlx.core."))
    q, k, v, cotangent = (torch.from_numpy(np.array(x.astype(mx.float32))).to(dtype) for x in inputs)
    dense = torch.from_numpy(
        np.array(mx.broadcast_to(pattern.dense((BATCH, HEADS, length, length)), (BATCH, HEADS, length, length)))
    )

    def run(attend: Callable[..., Any]) -> Call:
        if not backward:
            return lambda: attend(q, k, v)
        given = [x.clone().requires_grad_() for x in (q, k, v)]
        return lambda: torch.autograd.grad(attend(*given), given, cotangent)

    calls: dict[str, TimedCall] = {}
    if "sdpa" in names:
        sdpa: Any = torch.nn.functional.scaled_dot_product_attention
        calls["sdpa"] = TorchCalls(run(lambda *x: sdpa(*x, attn_mask=dense)))
    if "flex" in names:
        blocks = create_block_mask(lambda b, h, q, k: dense[b, h, q, k], BATCH, HEADS, length, length, device="cpu")
        compiled: Any = torch.compile(flex_attention)
        call = run(lambda *x: compiled(*x, block_mask=blocks))
        try:
            call()
        except Exception as error:  # what torch cannot compile on this CPU is left out, by name
            print(f"flex: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
        else:
            calls["flex"] = TorchCalls(call)
    return calls


def measure(pairing: Pairing, dtype: str, backward: bool, rounds: int, with_peers: bool) -> SparseRow:
    """Measure one mask against the dense call of the same shape."""
    shape = BATCH, HEADS, pairing.length, pairing.length
    lists = pairing.pattern.block_list(shape, *cpu.LIST_TILE)
    inputs = _inputs(pairing.length, dtype)
    runs: dict[str, TimedCall] = {"dense": _call(inputs, backward), "lists": _call(inputs, backward, lists=lists)}
    if pairing.by_bounds:
        runs["bounds"] = _call(inputs, backward, **pairing.by_bounds)
    if with_peers:
        runs |= _torch_calls(pairing.peers, inputs, pairing.pattern, backward)
    arms = [Arm(name=name, runner=run, call_s=take_sample(run, 1), lead_in=True) for name, run in runs.items()]
    times = sample(arms, rounds, let_threads_sleep)
    ratio = {name: statistics.median(a / b for a, b in zip(times["lists"], times[name], strict=True)) for name in runs}
    planes, (q, k) = lists.batches * lists.heads, cpu.LIST_TILE
    row = SparseRow(
        pairing.name,
        pairing.length,
        dtype,
        backward,
        lists.density,
        len(lists.entries) * q * k / (planes * pairing.length**2),
        {name: statistics.median(taken) for name, taken in times.items()},
        ratio["dense"],
        lists.density / ratio["dense"],
        ratio.get("bounds"),
        {name: 1 / ratio[name] for name in PEERS if name in ratio},
    )
    if pairing.most_time is not None:
        row.target, row.holds = f"<= {pairing.most_time:g} of dense", row.time_share <= pairing.most_time
    if pairing.least_rate is not None:
        best = max(row.rate_share, row.rate_share * (row.bounds_share or 0))
        row.target, row.holds = f">= {pairing.least_rate:g} of the dense rate", best >= pairing.least_rate
    return row


def _line(row: SparseRow) -> str:
    passes = "fwd+bwd" if row.backward else "forward"
    more = [f"{1 / row.bounds_share:.2f} of the bounds' rate" if row.bounds_share else ""]
    more += [f"{name} {slower:.1f}x" for name, slower in row.peers.items()]
    more += [f"{row.target}: {'yes' if row.holds else 'NO'}" if row.target and not row.backward else ""]
    return (
        f"{row.dtype:9} {passes:8}{row.name:22} L={row.length:<6} pairs {row.density:6.1%}  tiles {row.computed:6.1%}  "
        f"time {row.time_share:6.3f} of dense  rate {row.rate_share:5.2f}  {'  '.join(filter(None, more))}"
    )


def main(arguments: argparse.Namespace) -> None:
    """Measure all masks; each row is printed as it is measured, and all of them as JSON if requested."""
    rows = []
    for dtype in arguments.types:
        for backward in (False, True):
            for pairing in pairings():
                if arguments.masks and pairing.name not in arguments.masks:
                    continue
                rows.append(measure(pairing, dtype, backward, arguments.rounds, not arguments.no_peers))
                print(_line(rows[-1]), file=sys.stderr if arguments.json else sys.stdout, flush=True)
    if arguments.json:
        print(json.dumps({"cpu": build.cpu_name(), "load": os.getloadavg()[0], "rows": [asdict(row) for row in rows]}))
