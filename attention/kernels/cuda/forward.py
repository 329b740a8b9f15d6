"""Specialisations of the Hopper forward kernel (forward.cu) and their tile counts. Compiling does not need MLX."""

import functools
from dataclasses import dataclass, replace
from typing import Literal

from attention.kernels.cuda.program import Program
from attention.kernels.cuda.wgmma import wgmma

Element = Literal["bf16", "f16"]
TEXTS = ("tiles.cuh", "join.cuh", "pipeline.cuh", "forward.cu")
WARPGROUP_ROWS = 64
"""Queries per consumer warpgroup."""


@dataclass(frozen=True)
class Forward:
    """A specialisation of forward.cu; `overlap` is explained at the top of that file."""

    head_dim: int
    """64, 128, 192 or 256; narrower inputs are zero-filled by TMA."""
    causal: bool
    element: Element
    window: bool = False
    softcap: bool = False
    consumers: int = 2
    """Consumer warpgroups, 64 queries each."""
    block_n: int = 128
    """Keys per tile."""
    stages: int = 2
    """Buffers for K, and as many for V."""
    query_stages: int = 1
    """Buffers for Q; with two, the next tile of queries is prefetched."""
    overlap: bool = True

    @property
    def block_m(self) -> int:
        """Queries per tile."""
        return WARPGROUP_ROWS * self.consumers

    @property
    def shared_memory(self) -> int:
        """Bytes: 1 KiB of barriers, the Q buffers, and the K and V buffers."""
        return 1024 + 2 * self.head_dim * (self.query_stages * self.block_m + 2 * self.stages * self.block_n)

    @functools.cached_property
    def program(self) -> Program:
        """The source of the kernel."""
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
        """Return the half-open range of key tiles of each query tile, counted as in the kernel."""
        ranges = []
        for first in range(0, queries, self.block_m):
            end = min(queries, first + self.block_m)
            last_key = min(keys, max(0, end + keys - queries)) if self.causal else keys
            first_key = max(0, first + 1 + keys - queries - window) if self.window else 0
            ranges.append((first_key // self.block_n, -(-last_key // self.block_n)))
        return tuple(ranges)

    @property
    def part_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the partial result of a split tile: values (float32) and completion flags (int64)."""
        warps = 4 * self.consumers
        return (warps, self.head_dim // 8 + 1, 32, 4), (warps,)

    @property
    def joining(self) -> float:
        """Cost of combining the parts of a tile, in key tiles (measured with 2048 to 16384 keys)."""
        return {64: 2.5, 128: 4.0, 192: 8.0, 256: 12.0}[self.head_dim]

    @property
    def step_time(self) -> float:
        """Time per key tile, relative to the consumer count that is fastest for large problems (measured)."""
        return {1: 0.57, 2: 0.75, 3: 1.0}[self.consumers] if self.head_dim <= 128 else {1: 0.65, 2: 1.0}[self.consumers]


@functools.cache
def specialise(head_dim: int, causal: bool, element: Element, window: bool = False, softcap: bool = False) -> Forward:
    """Return the fastest specialisation for large problems, D <= 256 (see docs/experiments/cuda-hopper.md)."""
    made = functools.partial(Forward, causal=causal or window, element=element, window=window, softcap=softcap)
    if head_dim <= 128 and softcap:  # with three consumers the softcap would spill registers
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
    """Return the variants with fewer consumers, for small problems: smaller tiles, and more of them."""
    return [replace(kernel, consumers=count, overlap=True) for count in range(1, kernel.consumers)]
