"""Specialisations of the split-K kernel for few queries (decode.cu), and how the keys are split."""

import functools
from dataclasses import dataclass, replace
from typing import Final

from attention.kernels.cuda.runtime.program import Element, Program

ROWS, STEP = 16, 16
"""Query rows per block, and keys per step of a warp."""
MAX_ROWS = 64
"""Largest number of rows (queries times heads that share a key head) for this kernel."""
RESULT_GAP: Final = 8
"""Floats between rows of a warp's partial result in shared memory: rows written at once are in other banks."""
MAX_SPLITS: Final = 128
RESIDENT_BLOCKS = 2
"""Resident blocks per multiprocessor: one loads during the prologue or epilogue of the other."""
LONG_KEYS: Final = 4096
"""Keys per split from which a block has a multiprocessor to itself, because sustained bandwidth dominates."""
_OVERHEAD = 3.0
"""Prologue and epilogue of a block, in rounds of its warps; an assumption, not measured."""
_JOIN = 2.0
"""Combining the splits, in rounds of a block's warps; an assumption, not measured."""


@dataclass(frozen=True)
class Decode:
    """A specialisation of decode.cu."""

    head_dim: int
    """64, 128, 192 or 256; narrower inputs are zero-filled on load."""
    causal: bool
    element: Element
    window: bool
    softcap: bool
    architecture: str
    shared_memory_limit: int = 232_448
    resident_blocks: int = RESIDENT_BLOCKS
    max_warps: int = 4
    alibi: bool = False
    spans: bool = False
    """Whether query i of a head sees the i-th of three runs of keys, whose bounds each launch gets."""

    @functools.cached_property
    def warps(self) -> int:
        """Warps per block: at most `max_warps`, with two buffers each in the block's share of shared memory."""
        warps = self.max_warps
        while warps > 1 and self._ring(warps, 2) > self._share:
            warps //= 2
        return warps

    @functools.cached_property
    def stages(self) -> int:
        """Buffers per warp: as many as shared memory permits, 2 to 8."""
        return max(stages for stages in range(2, 9) if stages == 2 or self._ring(self.warps, stages) <= self._share)

    @property
    def _share(self) -> int:
        return (self.shared_memory_limit + 1024) // self.resident_blocks - 1024  # the driver keeps 1 KiB of each block

    @property
    def shared_memory(self) -> int:
        """Bytes: the queries and the rings of the warps, or the partial results of the warps if larger."""
        return max(self._ring(self.warps, self.stages), self.warps * ROWS * (self.head_dim + RESULT_GAP + 2) * 4)

    @property
    def round_keys(self) -> int:
        """Keys per round of all warps of a block; a split is a multiple of it."""
        return STEP * self.warps

    def _ring(self, warps: int, stages: int) -> int:
        return ROWS * self.head_dim * 2 + warps * stages * STEP * self.head_dim * 4

    @functools.cached_property
    def program(self) -> Program:
        """The source of the kernel."""
        constants = {
            "HEAD_DIM": self.head_dim,
            "ROWS": ROWS,
            "RESULT_GAP": RESULT_GAP,
            "PAIRED_ROWS": False,
            "WARPS": self.warps,
            "STAGES": self.stages,
            "BLOCKS_AT_ONCE": self.resident_blocks,
            "CAUSAL": self.causal,
            "WINDOW": self.window,
            "SOFTCAP": self.softcap,
            "ALIBI": self.alibi,
            "SPANS": self.spans,
            "BFLOAT16": self.element == "bf16",
        }
        return Program(
            name="flash_decode",
            architecture=self.architecture,
            constants=tuple((name, int(value)) for name, value in constants.items()),
            texts=(
                "runtime/common.cuh",
                "runtime/mma.cuh",
                "sm90/decode_tiles.cuh",
                "sm90/decode_join.cuh",
                "sm90/decode.cu",
            ),
            threads=32 * self.warps,
            shared_memory=self.shared_memory,
        )

    @functools.cached_property
    def alone(self) -> "Decode":
        """This specialisation with one block per multiprocessor and twice the warps."""
        return replace(self, resident_blocks=1, max_warps=2 * self.max_warps)

    @property
    def part_floats(self) -> int:
        """Floats of the partial result of a split: output, maximum and sum of each row of a tile."""
        return ROWS * (self.head_dim + 2)

    def splits(self, tiles: int, keys: int, multiprocessors: int) -> tuple[int, int]:
        """Return the number of splits and the keys per split that minimise the rounds of a multiprocessor.

        One block per multiprocessor keeps enough loads in flight; the second slot is for the next call or another
        stream.

        Args:
            tiles: blocks without splitting.
            keys: keys per plane.
            multiprocessors: multiprocessors of the GPU.
        """
        return divide_keys(tiles, keys, self.round_keys, multiprocessors)


def divide_keys(tiles: int, keys: int, round_keys: int, slots: int) -> tuple[int, int]:
    """Return the number of splits and the keys per split that minimise the rounds of a slot.

    Args:
        tiles: blocks without splitting.
        keys: keys per plane.
        round_keys: keys per round of all warps of a block.
        slots: blocks that run at the same time.
    """
    most = max(1, -(-keys // round_keys))

    def rounds(splits: int) -> float:
        waves = -(-tiles * splits // slots)
        return waves * (-(-most // splits) + _OVERHEAD) + (_JOIN if splits > 1 else 0.0)

    best = min(range(1, min(most, MAX_SPLITS) + 1), key=rounds)
    size = -(-most // best) * round_keys
    return max(1, -(-keys // size)), size
