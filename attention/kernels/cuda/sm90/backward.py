"""Specialisations of the Hopper backward kernels (backward.cu). Compiling them does not need MLX."""

import functools
from dataclasses import dataclass
from typing import Final

from attention.kernels.cuda.runtime.program import Element, Program
from attention.kernels.cuda.sm90.forward import wgmma

WIDTHS: Final = (64, 128, 192, 256)
"""Head dims of the kernels; inputs use the next larger one."""
MAX_HEAD_DIM: Final = WIDTHS[-1]
BLOCK_Q: Final = 64
"""Queries per tile."""
STAGES: Final = 2
"""Query tiles in the shared-memory ring."""
ROW_NUMBERS: Final = 3 * BLOCK_Q + 4
"""Floats that backward_rows.cu writes per query tile."""
SIGHT_BITS: Final = 26
"""Bits of a listed query tile's index of bits, before those that say which halves of the keys see it."""


@dataclass(frozen=True)
class Backward:
    """A specialisation of backward.cu."""

    head_dim: int
    """64, 128, 192 or 256; inputs may be narrower."""
    causal: bool
    element: Element
    window: bool
    softcap: bool
    lists: bool = False
    """Whether the query tiles of a key tile are entries of a transposed block list, not a range."""
    alibi: bool = False

    @property
    def wide(self) -> bool:
        """Whether the wide layout is used: consumers split the columns of a tile, not its keys."""
        return self.head_dim > 128

    @property
    def block_k(self) -> int:
        """Keys per tile."""
        return 64 if self.wide else 128

    @property
    def buffers(self) -> int:
        """Shared-memory buffers: three of dS, or two each of P and dS if P goes through shared memory."""
        return 4 if self.wide else 3

    @property
    def skips(self) -> bool:
        """Whether a consumer passes by query tiles that its half of the keys does not see."""
        return not self.wide and (self.causal or self.window or self.lists) and not (self.softcap or self.alibi)

    @property
    def clears(self) -> bool:
        """Whether the kernel clears most of the sums of dQ itself, ahead of its key tiles."""
        return self.window and not self.wide

    @property
    def shared_memory(self) -> int:
        """Bytes: barriers, K and V, the ring of Q and dO, tiles of P or dS, the row statistics, and bits of lists."""
        rows = 2 * self.block_k + 2 * BLOCK_Q * STAGES
        numbers = 4 * ROW_NUMBERS * STAGES
        if self.lists:  # the first row statistics are beside the barriers
            numbers += BLOCK_Q * self.block_k // 8 * STAGES - 4 * ROW_NUMBERS
        zeros = self.block_k * BLOCK_Q if self.skips or self.clears else 0
        return 1024 + 2 * self.head_dim * rows + 2 * self.buffers * self.block_k * BLOCK_Q + zeros + numbers

    @functools.cached_property
    def program(self) -> Program:
        """The source of the kernel."""
        constants = {
            "HEAD_DIM": self.head_dim,
            "BLOCK_K": self.block_k,
            "SPAN": BLOCK_Q // 2 if self.wide else BLOCK_Q,
            "STAGES": STAGES,
            "BUFFERS": self.buffers,
            "CAUSAL": self.causal,
            "WINDOW": self.window,
            "SOFTCAP": self.softcap,
            "LISTS": self.lists,
            "ALIBI": self.alibi,
            "SKIPS": self.skips,
            "CLEARS": self.clears,
            "BFLOAT16": self.element == "bf16",
        }
        narrow = ("sm90/backward_narrow.cuh", f"sm90/backward_{'halves' if self.skips else 'whole'}.cuh")
        return Program(
            name="flash_backward",
            architecture="sm_90a",
            constants=tuple((name, int(value)) for name, value in constants.items()),
            texts=(
                "runtime/common.cuh",
                "sm90/hopper.cuh",
                *self._products(),
                "sm90/warpgroup.cuh",
                "sm90/backward_tiles.cuh",
                "sm90/backward_sums.cuh",
                *(("sm90/backward_wide.cuh",) if self.wide else narrow),
                "sm90/backward.cu",
            ),
            threads=384,
            shared_memory=self.shared_memory,
        )

    def _products(self) -> tuple[str, ...]:
        """The wgmma wrappers for S^T and dP^T, dK and dV, and dQ; the last two by column halves in the wide layout."""
        products: list[tuple[str, int, dict[str, bool]]] = []
        held, outputs = {"a_in_registers": True}, {"a_in_registers": False, "transpose_b": True}
        queries = {**outputs, "transpose_a": True}
        if self.wide:
            products.append(("scores", BLOCK_Q // 2, {"a_in_registers": False}))
            for end, width in (("", 128 if self.head_dim == 256 else 64), ("_middle", 32)):
                products += [(f"output{end}", width, outputs), (f"queries{end}", width, queries)]
        else:
            products += [("scores", BLOCK_Q, {"a_in_registers": False}), ("scores_held", BLOCK_Q, held)]
            products += [("output", self.head_dim, {**outputs, **held}), ("queries", self.head_dim // 2, queries)]
        return tuple(
            wgmma(f"wgmma_{name}", width, self.element, **{"transpose_b": False, **how})
            for name, width, how in products
        )

    def tile_costs(self, queries: int, keys: int, window: int) -> tuple[int, ...]:
        """Return, per key tile, the number of query tiles that attend to it, counted as in the kernel."""
        shift, costs = keys - queries, []
        for key in range(0, keys, self.block_k):
            first = max(0, key - shift) // BLOCK_Q if self.causal else 0
            end = max(0, min(queries, key + self.block_k - 1 - shift + window)) if self.window else queries
            costs.append(max(0, -(-end // BLOCK_Q) - first))
        return tuple(costs)


def specialise(
    head_dim: int,
    causal: bool,
    element: Element,
    window: bool = False,
    softcap: bool = False,
    lists: bool = False,
    alibi: bool = False,
) -> Backward:
    """Return the specialisation for a call with these properties."""
    width = next(width for width in WIDTHS if head_dim <= width)
    return Backward(width, causal, element, window, softcap, lists, alibi)


def query_tiles(queries: int) -> int:
    """Return the query tiles per plane (one batch entry and head)."""
    return -(-queries // BLOCK_Q)


def rows_program(kernel: Backward, logsumexp_cotangent: bool) -> Program:
    """Return the program of backward_rows.cu."""
    constants = {"HEAD_DIM": kernel.head_dim, "LOGSUMEXP_COTANGENT": logsumexp_cotangent}
    return _pass_program(kernel, "rows", constants)


def finish_program(kernel: Backward) -> Program:
    """Return the program of backward_finish.cu."""
    return _pass_program(kernel, "finish", {"HEAD_DIM": kernel.head_dim})


def _pass_program(kernel: Backward, name: str, constants: dict[str, int]) -> Program:
    whole = {**constants, "BFLOAT16": kernel.element == "bf16"}
    return Program(
        name=f"flash_backward_{name}",
        architecture="sm_90a",
        constants=tuple((constant, int(value)) for constant, value in whole.items()),
        texts=("runtime/common.cuh", f"sm90/backward_{name}.cu"),
        threads=256,
        shared_memory=0,
    )
