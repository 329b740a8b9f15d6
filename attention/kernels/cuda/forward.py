"""The forward kernel on Hopper: what a specialisation is made for, and how it is launched. No MLX needed to compile."""

import functools
from dataclasses import dataclass, replace
from typing import Literal

from attention.kernels.cuda.program import Program
from attention.kernels.cuda.wgmma import wgmma

Element = Literal["bf16", "f16"]
TEXTS = ("tiles.cuh", "join.cuh", "pipeline.cuh", "forward.cu")
WARPGROUP_ROWS = 64
"""Queries of a consumer."""


@dataclass(frozen=True)
class Forward:
    """A specialisation; `overlap` is explained at the top of forward.cu."""

    head_dim: int
    """64, 128, 192 or 256: inputs may be narrower, the copy engine fills up with zeros."""
    causal: bool
    element: Element
    window: bool = False
    softcap: bool = False
    consumers: int = 2
    """Warpgroups that compute, 64 queries each."""
    block_n: int = 128
    """Keys in a tile."""
    stages: int = 2
    """Buffers for K, and for V."""
    query_stages: int = 1
    """Buffers for the queries: with two the next tile's come early."""
    overlap: bool = True

    @property
    def block_m(self) -> int:
        """Queries in a tile."""
        return WARPGROUP_ROWS * self.consumers

    @property
    def shared_memory(self) -> int:
        """Bytes: the barriers' page, the queries, and the K and V buffers."""
        return 1024 + 2 * self.head_dim * (self.query_stages * self.block_m + 2 * self.stages * self.block_n)

    @functools.cached_property
    def program(self) -> Program:
        """The kernel's text."""
        constants = {
            "HEAD_DIM": self.head_dim,
            "BLOCK_N": self.block_n,
            "CONSUMERS": self.consumers,
            "STAGES": self.stages,
            "CAUSAL": self.causal,
            "WINDOW": self.window,
            "SOFTCAP": self.softcap,
            "QUERY_STAGES": self.query_stages,
            "OVERLAP": self.overlap,
            "BFLOAT16": self.element == "bf16",
        }
        products = (
            wgmma("wgmma_scores", self.block_n, self.element, a_in_registers=False, transpose_b=False),
            wgmma("wgmma_output", self.head_dim, self.element, a_in_registers=True, transpose_b=True),
        )
        return Program(
            name="flash_forward",
            architecture="sm_90a",
            constants=tuple((name, int(value)) for name, value in constants.items()),
            texts=("common.cuh", "hopper.cuh", *products, "warpgroup.cuh", *TEXTS),
            threads=128 * (self.consumers + 1),
            shared_memory=self.shared_memory,
        )

    def tile_ranges(self, queries: int, keys: int, window: int) -> tuple[tuple[int, int], ...]:
        """The tiles of keys, from and to, that each tile of queries needs, as the kernel counts them."""
        ranges = []
        for first in range(0, queries, self.block_m):
            end = min(queries, first + self.block_m)
            last_key = min(keys, max(0, end + keys - queries)) if self.causal else keys
            first_key = max(0, first + 1 + keys - queries - window) if self.window else 0
            ranges.append((first_key // self.block_n, -(-last_key // self.block_n)))
        return tuple(ranges)

    @property
    def part_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What a part of a tile leaves for the block that adds the parts up: numbers in float32, and marks in int64."""
        warps = 4 * self.consumers
        return (warps, self.head_dim // 8 + 1, 32, 4), (warps,)

    @property
    def joining(self) -> float:
        """What it takes to add up the parts of tiles, in tiles of keys (measured: 2048 to 16384 keys)."""
        return {64: 2.5, 128: 4.0, 192: 8.0, 256: 12.0}[self.head_dim]

    @property
    def step_time(self) -> float:
        """A tile of keys with so many consumers, against as many as are fastest when there is much to do (measured)."""
        return {1: 0.57, 2: 0.75, 3: 1.0}[self.consumers] if self.head_dim <= 128 else {1: 0.65, 2: 1.0}[self.consumers]


@functools.cache
def specialise(head_dim: int, causal: bool, element: Element, window: bool = False, softcap: bool = False) -> Forward:
    """The fastest specialisation known for a head dimension up to 256 and much to do (measured: see README.md)."""
    made = functools.partial(Forward, causal=causal or window, element=element, window=window, softcap=softcap)
    if head_dim <= 128 and softcap:  # three consumers have no registers left for the cap
        return made(64 if head_dim <= 64 else 128, consumers=2, block_n=128, query_stages=2)
    if head_dim <= 64:
        return made(64, consumers=3, block_n=128, query_stages=2)
    if head_dim <= 128:
        return made(128, consumers=3, block_n=128, overlap=False)
    if head_dim <= 192:
        return made(192, consumers=2, block_n=96)
    if head_dim <= 256:
        return made(256, consumers=2, block_n=64 if softcap else 80)
    raise ValueError(f"head_dim is at most 256; got {head_dim}")


def smaller(kernel: Forward) -> list[Forward]:
    """The same with fewer consumers, for little to do: the tiles are smaller, and there are more of them."""
    return [replace(kernel, consumers=count, overlap=True) for count in range(1, kernel.consumers)]
