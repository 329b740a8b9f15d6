"""The backward kernels on Hopper: what a specialisation is made for. No MLX needed to compile."""

import functools
from dataclasses import dataclass
from typing import Final

from attention.kernels.cuda.forward import Element
from attention.kernels.cuda.program import Program
from attention.kernels.cuda.wgmma import wgmma

BLOCK_K, BLOCK_Q = 128, 64
"""Keys and queries in a tile."""
LARGEST_HEAD_DIM: Final = 128
"""Above it dK and dV of a tile no longer fit in registers."""
MAP_BYTES: Final = 4 * 128
"""The tensor maps that each block builds for itself."""


@dataclass(frozen=True)
class Backward:
    """A specialisation of backward.cu."""

    head_dim: int
    """64 or 128: inputs may be narrower."""
    causal: bool
    element: Element
    window: bool
    stages: int = 2

    @property
    def shared_memory(self) -> int:
        """Bytes: barriers, K and V, the rings of Q and dO, dS twice, and the rows' numbers."""
        keys, queries = 2 * BLOCK_K, 2 * BLOCK_Q * self.stages
        return 1024 + 2 * self.head_dim * (keys + queries) + 4 * BLOCK_K * BLOCK_Q + self.stages * 8 * BLOCK_Q

    @functools.cached_property
    def program(self) -> Program:
        """The kernel's text."""
        constants = {
            "HEAD_DIM": self.head_dim,
            "STAGES": self.stages,
            "CAUSAL": self.causal,
            "WINDOW": self.window,
            "BFLOAT16": self.element == "bf16",
        }
        products = (
            wgmma("wgmma_scores", BLOCK_Q, self.element, a_in_registers=False, transpose_b=False),
            wgmma("wgmma_output", self.head_dim, self.element, a_in_registers=True, transpose_b=True),
            wgmma(
                "wgmma_queries",
                self.head_dim // 2,
                self.element,
                a_in_registers=False,
                transpose_a=True,
                transpose_b=True,
            ),
        )
        return Program(
            name="flash_backward",
            architecture="sm_90a",
            constants=tuple((name, int(value)) for name, value in constants.items()),
            texts=("common.cuh", "hopper.cuh", *products, "warpgroup.cuh", "backward_tiles.cuh", "backward.cu"),
            threads=384,
            shared_memory=self.shared_memory,
        )

    def tile_costs(self, queries: int, keys: int, window: int) -> tuple[int, ...]:
        """The tiles of queries that see any of each tile of keys, as the kernel counts them."""
        shift, costs = keys - queries, []
        for key in range(0, keys, BLOCK_K):
            first = max(0, key - shift) // BLOCK_Q if self.causal else 0
            end = max(0, min(queries, key + BLOCK_K - 1 - shift + window)) if self.window else queries
            costs.append(max(0, -(-end // BLOCK_Q) - first))
        return tuple(costs)


def rows_program(element: Element, logsumexp_cotangent: bool, architecture: str) -> Program:
    """The text of backward_rows.cu."""
    return Program(
        name="flash_backward_rows",
        architecture=architecture,
        constants=(("BFLOAT16", int(element == "bf16")), ("LOGSUMEXP_COTANGENT", int(logsumexp_cotangent))),
        texts=("common.cuh", "backward_rows.cu"),
        threads=128,
        shared_memory=0,
    )


def finish_program(element: Element, architecture: str) -> Program:
    """The text of backward_finish.cu."""
    return Program(
        name="flash_backward_finish",
        architecture=architecture,
        constants=(("BFLOAT16", int(element == "bf16")),),
        texts=("common.cuh", "backward_finish.cu"),
        threads=256,
        shared_memory=0,
    )
