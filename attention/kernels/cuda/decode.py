"""The kernel for few queries: what a specialisation is made for, and how the keys are split."""

import functools
from dataclasses import dataclass, replace
from typing import Final

from attention.kernels.cuda.forward import Element
from attention.kernels.cuda.program import Program

ROWS, STEP = 16, 16
"""Query rows of a block, and keys of a warp's step."""
MOST_ROWS = 64
"""Rows (queries times heads that share a key head) up to which this kernel is taken."""
MOST_SPLITS: Final = 128
BLOCKS_AT_ONCE = 2
"""Blocks that fit on a multiprocessor: one starts or ends while the other loads."""
LONG: Final = 4096
"""Keys of a split from which on a block has a multiprocessor for itself: the rate of long loads decides then."""
_OVERHEAD = 3.0
"""Start and end of a block, in rounds of its warps; an assumption, to be measured."""
_JOIN = 2.0
"""Joining the parts, likewise."""


@dataclass(frozen=True)
class Decode:
    """A specialisation of decode.cu."""

    head_dim: int
    """64, 128, 192 or 256: inputs may be narrower, the rest reads as zero."""
    causal: bool
    element: Element
    window: bool
    softcap: bool
    architecture: str
    shared_memory_limit: int = 232_448
    blocks_at_once: int = BLOCKS_AT_ONCE
    most_warps: int = 4

    @property
    def warps(self) -> int:
        """Warps of a block: as many as have two buffers each in a block's share of shared memory, up to a limit."""
        warps = self.most_warps
        while warps > 1 and self._ring(warps, 2) > self._share:
            warps //= 2
        return warps

    @property
    def stages(self) -> int:
        """Buffers of a warp, as shared memory allows."""
        return max(stages for stages in range(2, 9) if stages == 2 or self._ring(self.warps, stages) <= self._share)

    @property
    def _share(self) -> int:
        return (self.shared_memory_limit + 1024) // self.blocks_at_once - 1024  # the driver keeps 1 KiB of each block

    @property
    def shared_memory(self) -> int:
        """Bytes: queries and the warps' rings, or what the warps leave at the end."""
        return max(self._ring(self.warps, self.stages), self.warps * ROWS * (self.head_dim + 2) * 4)

    @property
    def round_keys(self) -> int:
        """Keys that all warps of a block take in a round; a split is a multiple of it."""
        return STEP * self.warps

    def _ring(self, warps: int, stages: int) -> int:
        return ROWS * self.head_dim * 2 + warps * stages * STEP * self.head_dim * 4

    @functools.cached_property
    def program(self) -> Program:
        """The kernel's text."""
        constants = {
            "HEAD_DIM": self.head_dim,
            "WARPS": self.warps,
            "STAGES": self.stages,
            "BLOCKS_AT_ONCE": self.blocks_at_once,
            "CAUSAL": self.causal,
            "WINDOW": self.window,
            "SOFTCAP": self.softcap,
            "BFLOAT16": self.element == "bf16",
        }
        return Program(
            name="flash_decode",
            architecture=self.architecture,
            constants=tuple((name, int(value)) for name, value in constants.items()),
            texts=("common.cuh", "mma.cuh", "decode_tiles.cuh", "decode_join.cuh", "decode.cu"),
            threads=32 * self.warps,
            shared_memory=self.shared_memory,
        )

    @property
    def alone(self) -> "Decode":
        """The same with a multiprocessor for each block, which has twice the warps then."""
        return replace(self, blocks_at_once=1, most_warps=2 * self.most_warps)

    @property
    def part_floats(self) -> int:
        """What a split leaves of a tile of rows: output, maximum and sum of each."""
        return ROWS * (self.head_dim + 2)

    def splits(self, tiles: int, keys: int, multiprocessors: int) -> tuple[int, int]:
        """How many splits, and the keys of each, for so many tiles of rows: the least rounds of one multiprocessor.

        One block on each has enough bytes on their way; the second place is for the next call's, or another stream's.

        Args:
            tiles: blocks that there are without splitting.
            keys: of a plane.
            multiprocessors: of the GPU.
        """
        most = max(1, -(-keys // self.round_keys))

        def rounds(splits: int) -> float:
            waves = -(-tiles * splits // multiprocessors)
            return waves * (-(-most // splits) + _OVERHEAD) + (_JOIN if splits > 1 else 0.0)

        best = min(range(1, min(most, MOST_SPLITS) + 1), key=rounds)
        size = -(-most // best) * self.round_keys
        return max(1, -(-keys // size)), size
