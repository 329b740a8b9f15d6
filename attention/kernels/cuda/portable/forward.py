"""Tilings and specialisations of the general forward kernel (forward.cu). Compiling does not need MLX."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from attention.kernels.cuda.runtime.call import MASK_KINDS, MaskKind
from attention.kernels.cuda.runtime.program import Element, Program

WIDTHS: Final = (32, 64, 80, 96, 128, 192, 256)
"""Head dims of the kernels; narrower inputs are zero-filled on load."""
FEW_ROWS: Final = 64
"""Largest number of rows (queries times heads that share a key head) for GQA row packing."""
MAX_SPLITS: Final = 64
TEXTS: Final = (
    "runtime/common.cuh",
    "runtime/mma.cuh",
    "portable/steps.cuh",
    "portable/tiles.cuh",
    "portable/mask.cuh",
)
_OVERHEAD, _JOIN = 3.0, 4.0
"""Cost of a block's prologue and epilogue, and of the join pass, in key tiles; assumptions, not measured."""


def width_of(dim: int) -> int:
    """Return the kernel width for a head dim."""
    return next(width for width in WIDTHS if width >= dim)


def tile_bytes(rows: int, width: int) -> int:
    """Return the bytes of a tile in shared memory; 16 bytes of padding per row avoid bank conflicts."""
    return rows * (2 * width + 16)


def share_of(limit: int, blocks: int) -> int:
    """Return the shared memory per block, in bytes, if `blocks` are resident per multiprocessor.

    `limit` is the maximum of a single block; the driver reserves 1 KiB per block.
    """
    return (limit + 1024) // blocks - 1024


@dataclass(frozen=True)
class ForwardTiles:
    """Tiling of a block of the forward kernel."""

    warps: int
    row_tiles: int
    """Tiles of 16 rows per warp."""
    block_n: int
    """Keys per tile."""
    stages: int
    """K/V tiles in shared memory."""
    blocks: int
    """Resident blocks per multiprocessor."""
    queries_in_registers: bool = False

    @property
    def block_m(self) -> int:
        """Rows per block."""
        return 16 * self.row_tiles * self.warps

    def shared_memory(self, head_dim: int, value_dim: int, split: bool) -> int:
        """Return the bytes of the queries (reused for the output in the epilogue) and of the K/V stages."""
        queries = tile_bytes(self.block_m, head_dim if split else max(head_dim, value_dim))
        return queries + self.stages * (tile_bytes(self.block_n, head_dim) + tile_bytes(self.block_n, value_dim))

    def fits(self, head_dim: int, value_dim: int, limit: int) -> bool:
        """Return whether `blocks` blocks fit on a multiprocessor, with or without split K."""
        return self.shared_memory(head_dim, value_dim, split=False) <= share_of(limit, self.blocks)


def _tilings_for_many_rows(widest: int, mask: bool) -> Iterator[ForwardTiles]:
    """Yield the tilings for the larger of the two widths, fastest first; array masks need additional registers."""
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


def _tilings_for_few_rows(rows: int, widest: int) -> Iterator[ForwardTiles]:
    """Yield the tilings for few rows with split keys: many small blocks, to keep many loads in flight."""
    warps = 1 if rows <= 16 else 2 if rows <= 32 else 4
    for blocks in range(8 // warps, 0, -1):
        for block_n in (64, 32) if widest <= 128 else (32,):
            yield ForwardTiles(warps, 1, block_n, 2, blocks)


@dataclass(frozen=True)
class Portable:
    """Properties shared by the forward and backward specialisations: widths, masking and element type."""

    head_dim: int
    value_dim: int
    causal: bool
    window: bool
    softcap: bool
    mask: MaskKind | None
    element: Element
    lists: bool
    alibi: bool

    @property
    def mask_constants(self) -> dict[str, int]:
        """Compile-time constants of mask.cuh."""
        kind = 0 if self.mask is None else 1 + MASK_KINDS.index(self.mask)
        given = {"CAUSAL": self.causal, "WINDOW": self.window, "SOFTCAP": self.softcap, "LISTS": self.lists}
        return {**given, "ALIBI": self.alibi, "MASK": kind}


@dataclass(frozen=True)
class PortableForward(Portable):
    """A specialisation of forward.cu."""

    packed: bool
    """Whether a block computes the rows of all heads that share its keys (GQA row packing)."""
    split: bool
    """Whether the keys are split over several blocks."""
    narrow_steps: bool
    """Whether strides are 32-bit, the scalar type of MLX's precompiled-kernel operation."""
    tiles: ForwardTiles
    architecture: str

    @functools.cached_property
    def program(self) -> Program:
        """The source of the kernel."""
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
            "QUANTIZED": False,
            "BFLOAT16": self.element == "bf16",
        }
        return Program(
            name="flash_general",
            architecture=self.architecture,
            constants=tuple((name, int(value)) for name, value in constants.items()),
            texts=(*TEXTS, "portable/softmax.cuh", "portable/forward.cu"),
            threads=32 * self.tiles.warps,
            shared_memory=self.tiles.shared_memory(self.head_dim, self.value_dim, self.split),
        )

    @property
    def join_program(self) -> Program:
        """The program of join.cu, which combines the partial results of the splits."""
        constants = (("BFLOAT16", int(self.element == "bf16")),)
        return Program(
            "flash_general_join", self.architecture, constants, ("runtime/common.cuh", "portable/join.cu"), 128, 0
        )

    def blocks_of(self, rows: int) -> int:
        """Return the blocks for `rows` rows of a plane, without splitting."""
        return -(-rows // self.tiles.block_m)


@functools.cache
def tiles_for(head_dim: int, value_dim: int, rows: int, mask: bool, limit: int) -> ForwardTiles:
    """Return the tiling for a call.

    Args:
        head_dim: key width of the kernel, one of WIDTHS.
        value_dim: value width of the kernel, one of WIDTHS.
        rows: rows per plane; up to FEW_ROWS their keys are split.
        mask: whether the call has an array mask.
        limit: maximum shared memory per block, in bytes.

    Raises:
        ValueError: no tiling fits; this does not happen on Ampere and later GPUs.
    """
    widest = max(head_dim, value_dim)
    for tiles in _tilings_for_few_rows(rows, widest) if rows <= FEW_ROWS else _tilings_for_many_rows(widest, mask):
        if tiles.fits(head_dim, value_dim, limit):
            return tiles
    raise ValueError(f"no tiles of {head_dim} and {value_dim} columns fit into {limit} bytes of shared memory")


def split_keys(tiles: int, blocks: int, slots: int) -> int:
    """Return the key tiles per split that minimise the rounds of the busiest slot.

    Args:
        tiles: key tiles per plane.
        blocks: blocks without splitting.
        slots: resident blocks on the whole GPU.
    """

    def rounds(splits: int) -> float:
        waves = -(-blocks * splits // slots)
        return waves * (-(-tiles // splits) + _OVERHEAD) + (_JOIN if splits > 1 else 0.0)

    best = min(range(1, min(tiles, MAX_SPLITS) + 1), key=rounds)
    return -(-tiles // best)
