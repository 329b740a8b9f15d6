"""The backward kernels on Hopper: what a specialisation is made for. No MLX needed to compile."""

import functools
from dataclasses import dataclass
from typing import Final

from attention.kernels.cuda.forward import Element
from attention.kernels.cuda.program import Program
from attention.kernels.cuda.wgmma import wgmma

WIDTHS: Final = (64, 128, 192, 256)
"""Head dims that there are kernels for; others take the next one."""
LARGEST_HEAD_DIM: Final = WIDTHS[-1]
ROWS: Final = 64
"""Query rows whose numbers lie together."""


@dataclass(frozen=True)
class Backward:
    """A specialisation of backward.cu."""

    head_dim: int
    """64, 128, 192 or 256: inputs may be narrower."""
    causal: bool
    element: Element
    window: bool
    softcap: bool = False
    block_q: int = 64
    """Queries in a tile."""
    stages: int = 2
    bulk: bool = False
    late: bool = False
    held: bool = False
    release: int = 0

    @property
    def wide(self) -> bool:
        """Which layout: a consumer has all keys of a tile and half of the columns, or half of the keys."""
        return self.head_dim > 128

    @property
    def block_k(self) -> int:
        """Keys in a tile."""
        return 64 if self.wide else 128

    @property
    def buffers(self) -> int:
        """Tiles of dS, and of P where that goes through shared memory, too: two of each."""
        return 4 if self.wide else 3

    @property
    def shared_memory(self) -> int:
        """Bytes: barriers, K and V, the rings of Q and dO, tiles of P or dS, and the rows' numbers."""
        keys, queries = 2 * self.block_k, 2 * self.block_q * self.stages
        sums = 4 * self.head_dim * self.block_q if self.bulk else 0
        tiles = 2 * self.head_dim * (keys + queries) + self.buffers * 2 * self.block_k * self.block_q
        return 1024 + tiles + self.stages * 8 * self.block_q + sums

    @functools.cached_property
    def program(self) -> Program:
        """The kernel's text."""
        constants = {
            "HEAD_DIM": self.head_dim,
            "BLOCK_K": self.block_k,
            "BLOCK_Q": self.block_q,
            "SPAN": self.block_q // 2 if self.wide else self.block_q,
            "STAGES": self.stages,
            "BUFFERS": self.buffers,
            "CAUSAL": self.causal,
            "WINDOW": self.window,
            "SOFTCAP": self.softcap,
            "BULK": self.bulk,
            "LATE": self.late,
            "HELD": self.held,
            "RELEASE": self.release,
            "BFLOAT16": self.element == "bf16",
        }
        layout = "backward_wide.cuh" if self.wide else "backward_narrow.cuh"
        return Program(
            name="flash_backward",
            architecture="sm_90a",
            constants=tuple((name, int(value)) for name, value in constants.items()),
            texts=(
                "common.cuh",
                "hopper.cuh",
                *self._products(),
                "warpgroup.cuh",
                "backward_tiles.cuh",
                layout,
                "backward.cu",
            ),
            threads=384,
            shared_memory=self.shared_memory,
        )

    def _products(self) -> tuple[str, ...]:
        """The matrix instructions: S^T and dP^T, dK and dV, dQ; of the last two half in the wide layout."""
        if not self.wide:
            width = self.head_dim * self.block_q // 128
            return (
                wgmma("wgmma_scores", self.block_q, self.element, a_in_registers=False, transpose_b=False),
                wgmma("wgmma_scores_held", self.block_q, self.element, a_in_registers=True, transpose_b=False),
                wgmma("wgmma_output", self.head_dim, self.element, a_in_registers=True, transpose_b=True),
                wgmma("wgmma_queries", width, self.element, a_in_registers=False, transpose_a=True, transpose_b=True),
            )
        products = [wgmma("wgmma_scores", self.block_q // 2, self.element, a_in_registers=False, transpose_b=False)]
        products.append(
            wgmma("wgmma_scores_held", self.block_q // 2, self.element, a_in_registers=True, transpose_b=False)
        )
        for end, width in (("", 128 if self.head_dim == 256 else 64), ("_middle", 32)):
            for name, transpose_a in ((f"wgmma_output{end}", False), (f"wgmma_queries{end}", True)):
                transposed = {"transpose_a": transpose_a, "transpose_b": True}
                products.append(wgmma(name, width, self.element, a_in_registers=False, **transposed))
        return tuple(products)

    def query_tiles(self, queries: int) -> int:
        """Tiles of queries in a plane."""
        return -(-queries // self.block_q)

    def tile_costs(self, queries: int, keys: int, window: int) -> tuple[int, ...]:
        """The tiles of queries that see any of each tile of keys, as the kernel counts them."""
        shift, costs = keys - queries, []
        for key in range(0, keys, self.block_k):
            first = max(0, key - shift) // self.block_q if self.causal else 0
            end = max(0, min(queries, key + self.block_k - 1 - shift + window)) if self.window else queries
            costs.append(max(0, -(-end // self.block_q) - first))
        return tuple(costs)


def specialise(head_dim: int, causal: bool, element: Element, window: bool = False, softcap: bool = False) -> Backward:
    """The specialisation for a call of this kind."""
    width = next(width for width in WIDTHS if head_dim <= width)
    roomy = width == 64 and not softcap
    return Backward(width, causal, element, window, softcap, held=roomy, late=roomy, release=1)


def rows_program(kernel: Backward, logsumexp_cotangent: bool) -> Program:
    """The text of backward_rows.cu."""
    constants = {"HEAD_DIM": kernel.head_dim, "LOGSUMEXP_COTANGENT": logsumexp_cotangent}
    return _pass_program(kernel, "rows", constants)


def finish_program(kernel: Backward) -> Program:
    """The text of backward_finish.cu."""
    return _pass_program(kernel, "finish", {"HEAD_DIM": kernel.head_dim, "BLOCK_Q": kernel.block_q})


def _pass_program(kernel: Backward, name: str, constants: dict[str, int]) -> Program:
    whole = {**constants, "BFLOAT16": kernel.element == "bf16"}
    return Program(
        name=f"flash_backward_{name}",
        architecture="sm_90a",
        constants=tuple((constant, int(value)) for constant, value in whole.items()),
        texts=("common.cuh", f"backward_{name}.cu"),
        threads=256,
        shared_memory=0,
    )
