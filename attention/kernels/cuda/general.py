"""The general forward kernel: its tiles, and what a specialisation is made for. No MLX needed to compile."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from attention.kernels.cuda.call import MASK_KINDS, MaskKind
from attention.kernels.cuda.forward import Element
from attention.kernels.cuda.program import Program

WIDTHS: Final = (32, 64, 80, 96, 128, 192, 256)
"""Head dims that kernels are made for; inputs may be narrower, the rest reads as zero."""
FEW_ROWS: Final = 64
"""Rows (queries times heads that share a key head) up to which a block takes all heads that share its keys."""
MOST_SPLITS: Final = 64
TEXTS: Final = ("common.cuh", "mma.cuh", "general_steps.cuh", "general_tiles.cuh", "general_mask.cuh")
_OVERHEAD, _JOIN = 3.0, 4.0
"""Start and end of a block, and the second pass, in tiles of keys; assumptions."""


def width_of(dim: int) -> int:
    """The kernels' width for a head dim."""
    return next(width for width in WIDTHS if width >= dim)


def tile_bytes(rows: int, width: int) -> int:
    """Shared memory of a tile: each row is followed by 16 bytes, so that rows begin in different banks."""
    return rows * (2 * width + 16)


def share_of(limit: int, blocks: int) -> int:
    """Shared memory that each of so many blocks on a multiprocessor can have, where one alone can have `limit` bytes.

    The driver keeps 1 KiB of each block for itself.
    """
    return (limit + 1024) // blocks - 1024


@dataclass(frozen=True)
class ForwardTiles:
    """How a block divides its work."""

    warps: int
    row_tiles: int
    """Times 16: the rows of a warp."""
    block_n: int
    """Keys in a tile."""
    stages: int
    """Tiles of keys and values in shared memory."""
    blocks: int
    """Of them at once on a multiprocessor."""
    queries_in_registers: bool = False

    @property
    def block_m(self) -> int:
        """Rows of a block."""
        return 16 * self.row_tiles * self.warps

    def shared_memory(self, head_dim: int, value_dim: int, split: bool) -> int:
        """Bytes: the queries, whose place the output takes at the end, and the stages."""
        queries = tile_bytes(self.block_m, head_dim if split else max(head_dim, value_dim))
        return queries + self.stages * (tile_bytes(self.block_n, head_dim) + tile_bytes(self.block_n, value_dim))

    def fits(self, head_dim: int, value_dim: int, limit: int) -> bool:
        """Whether so many blocks have room on a multiprocessor, split or not."""
        return self.shared_memory(head_dim, value_dim, split=False) <= share_of(limit, self.blocks)


def _many(widest: int, mask: bool) -> Iterator[ForwardTiles]:
    """Tilings for a kernel's wider head dim, the fastest first. The elements of a mask want registers."""
    if widest > 128:
        if widest <= 192 and not mask:
            yield ForwardTiles(4, 1, 64, 1, 2)
        for warps, block_n in ((8, 32), (4, 32)) if mask else ((8, 64), (8, 32), (4, 32)):
            yield ForwardTiles(warps, 1, block_n, 1, 1)
        return
    keep = widest == 64 and not mask
    for block_n in (32,) if mask else (64, 32):
        for stages in (2, 1):
            yield ForwardTiles(4, 2, block_n, stages, 2, keep)
    yield ForwardTiles(4, 1, 32, 1, 2)


def _few(rows: int, widest: int) -> Iterator[ForwardTiles]:
    """Tilings for few rows, whose keys are split: small blocks, and many of them, to have many bytes on their way."""
    warps = 1 if rows <= 16 else 2 if rows <= 32 else 4
    for blocks in range(8 // warps, 0, -1):
        for block_n in (64, 32) if widest <= 128 else (32,):
            yield ForwardTiles(warps, 1, block_n, 2, blocks)


@dataclass(frozen=True)
class General:
    """What a specialisation is made for, forward or backward: widths, masking and type."""

    head_dim: int
    value_dim: int
    causal: bool
    window: bool
    softcap: bool
    mask: MaskKind | None
    element: Element

    @property
    def mask_constants(self) -> dict[str, int]:
        """What general_mask.cuh is compiled for."""
        kind = 0 if self.mask is None else 1 + MASK_KINDS.index(self.mask)
        return {"CAUSAL": self.causal, "WINDOW": self.window, "SOFTCAP": self.softcap, "MASK": kind}


@dataclass(frozen=True)
class GeneralForward(General):
    """A specialisation of general_forward.cu."""

    packed: bool
    """Whether a block's rows are those of all heads that share its keys."""
    split: bool
    """Whether the keys are dealt out to several blocks."""
    narrow_steps: bool
    """Whether strides come as 32-bit numbers, as MLX's own operation hands them over."""
    tiles: ForwardTiles
    architecture: str

    @functools.cached_property
    def program(self) -> Program:
        """The kernel's text."""
        constants = {
            "HEAD_DIM": self.head_dim,
            "VALUE_DIM": self.value_dim,
            "WARPS": self.tiles.warps,
            "ROW_TILES": self.tiles.row_tiles,
            "BLOCK_N": self.tiles.block_n,
            "STAGES": self.tiles.stages,
            "BLOCKS_AT_ONCE": self.tiles.blocks,
            "QUERIES_IN_REGISTERS": self.tiles.queries_in_registers,
            "PACK": self.packed,
            "SPLIT": self.split,
            **self.mask_constants,
            "NARROW_STEPS": self.narrow_steps,
            "BFLOAT16": self.element == "bf16",
        }
        return Program(
            name="flash_general",
            architecture=self.architecture,
            constants=tuple((name, int(value)) for name, value in constants.items()),
            texts=(*TEXTS, "general_softmax.cuh", "general_forward.cu"),
            threads=32 * self.tiles.warps,
            shared_memory=self.tiles.shared_memory(self.head_dim, self.value_dim, self.split),
        )

    @property
    def join_program(self) -> Program:
        """The text of general_join.cu, which adds up what the splits found."""
        constants = (("BFLOAT16", int(self.element == "bf16")),)
        return Program("flash_general_join", self.architecture, constants, ("common.cuh", "general_join.cu"), 128, 0)

    def blocks_of(self, rows: int) -> int:
        """Blocks that so many rows of a plane take, without splitting."""
        return -(-rows // self.tiles.block_m)


@functools.cache
def tiles_for(head_dim: int, value_dim: int, rows: int, mask: bool, limit: int) -> ForwardTiles:
    """The tiling for a call.

    Args:
        head_dim: of the kernel, one of WIDTHS.
        value_dim: likewise.
        rows: of a plane; up to FEW_ROWS their keys are split.
        mask: whether an array masks.
        limit: bytes of shared memory that a block may have.

    Raises:
        ValueError: no tiling fits, as on no GPU from Ampere on.
    """
    widest = max(head_dim, value_dim)
    for tiles in _few(rows, widest) if rows <= FEW_ROWS else _many(widest, mask):
        if tiles.fits(head_dim, value_dim, limit):
            return tiles
    raise ValueError(f"no tiles of {head_dim} and {value_dim} columns fit into {limit} bytes of shared memory")


def split_keys(tiles: int, blocks: int, slots: int) -> int:
    """Tiles of keys of each split: the least rounds of the busiest slot.

    Args:
        tiles: of keys, in a plane.
        blocks: there are without splitting.
        slots: blocks that run at once.
    """

    def rounds(splits: int) -> float:
        waves = -(-blocks * splits // slots)
        return waves * (-(-tiles // splits) + _OVERHEAD) + (_JOIN if splits > 1 else 0.0)

    best = min(range(1, min(tiles, MOST_SPLITS) + 1), key=rounds)
    return -(-tiles // best)
