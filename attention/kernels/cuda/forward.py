"""The forward kernel on Hopper: what a specialisation is made for, and how it is launched. No MLX needed to compile."""

import functools
from dataclasses import dataclass
from typing import Literal

from attention.kernels.cuda.program import Program
from attention.kernels.cuda.wgmma import wgmma

Element = Literal["bf16", "f16"]
MAP_BYTES = 3 * 128
"""The tensor maps that each block builds for itself."""


@dataclass(frozen=True)
class Forward:
    """A specialisation; `overlap` and `turns` are explained at the top of forward.cu."""

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
    overlap: bool = True
    turns: bool = False

    @property
    def block_m(self) -> int:
        """Queries in a tile."""
        return 64 * self.consumers

    @property
    def shared_memory(self) -> int:
        """Bytes: the barriers' page, the queries, and the K and V buffers."""
        return 1024 + 2 * self.head_dim * (self.block_m + 2 * self.stages * self.block_n)

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
            "OVERLAP": self.overlap,
            "TURNS": self.turns,
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
            texts=("common.cuh", "hopper.cuh", *products, "warpgroup.cuh", "tiles.cuh", "pipeline.cuh", "forward.cu"),
            threads=128 * (self.consumers + 1),
            shared_memory=self.shared_memory,
        )

    def tile_costs(self, queries: int, keys: int, window: int) -> tuple[int, ...]:
        """The tiles of keys that each tile of queries needs, as the kernel counts them."""
        costs = []
        for first in range(0, queries, self.block_m):
            end = min(queries, first + self.block_m)
            last_key = min(keys, max(0, end + keys - queries)) if self.causal else keys
            first_key = max(0, first + 1 + keys - queries - window) if self.window else 0
            costs.append(max(0, -(-last_key // self.block_n) - first_key // self.block_n))
        return tuple(costs)


@functools.cache
def specialise(head_dim: int, causal: bool, element: Element, window: bool = False, softcap: bool = False) -> Forward:
    """The fastest specialisation known for a head dimension up to 256 (measured: see README.md)."""
    made = functools.partial(Forward, causal=causal or window, element=element, window=window, softcap=softcap)
    if head_dim <= 128 and softcap:  # three consumers have no registers left for the cap
        return made(64 if head_dim <= 64 else 128, consumers=2, block_n=128)
    if head_dim <= 64:
        return made(64, consumers=3, block_n=128)
    if head_dim <= 128:
        return made(128, consumers=3, block_n=128, overlap=False, turns=True)
    if head_dim <= 192:
        return made(192, consumers=2, block_n=96)
    if head_dim <= 256:
        return made(256, consumers=2, block_n=80)
    raise ValueError(f"head_dim is at most 256; got {head_dim}")
