"""The general backward kernel: its tiles, and what a specialisation is made for. No MLX needed to compile."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from attention.kernels.cuda.general import TEXTS, General, share_of, tile_bytes, width_of
from attention.kernels.cuda.program import Program

PADDED: Final = 64
"""Queries come in tiles of so many in what the kernels hand to each other."""


@dataclass(frozen=True)
class BackwardTiles:
    """How a block divides its work."""

    bands: int
    """Of keys, one behind the other."""
    column_warps: int
    """Warps that share a band: each has as large a part of the columns of dK and dV."""
    band_tiles: int
    """Times 16: the keys of a band."""
    block_q: int
    """Queries in a tile."""
    part_q: int
    """Of which a warp that has its band alone looks at so many at once."""
    query_warps: int
    """Warps that share a tile's queries when dQ is made; the others share its columns."""
    stages: int
    """Tiles of queries in shared memory."""
    blocks: int
    """Of them at once on a multiprocessor."""

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return self.bands * self.column_warps

    @property
    def block_k(self) -> int:
        """Keys of a block."""
        return 16 * self.band_tiles * self.bands

    def shared_memory(self, head_dim: int, value_dim: int) -> int:
        """Bytes: keys and values, the stages with three numbers a query, dS, and P where two warps share a band."""
        keys = tile_bytes(self.block_k, head_dim) + tile_bytes(self.block_k, value_dim)
        stage = tile_bytes(self.block_q, head_dim) + tile_bytes(self.block_q, value_dim) + 12 * self.block_q
        return keys + self.stages * stage + tile_bytes(self.block_k, self.block_q) * (1 + (self.column_warps > 1))

    def fits(self, head_dim: int, value_dim: int, limit: int) -> bool:
        """Whether so many blocks have room on a multiprocessor."""
        return self.shared_memory(head_dim, value_dim) <= share_of(limit, self.blocks)


def widths_of(head_dim: int, value_dim: int) -> tuple[int, int]:
    """The kernel's widths for these dims: where two warps share columns, a half of 80 would be no whole matrices."""
    keys, values = width_of(head_dim), width_of(value_dim)
    return (max(96, keys), max(96, values)) if 80 in (keys, values) and max(keys, values) > 80 else (keys, values)


def _query_warps(head_dim: int, warps: int, block_q: int) -> int:
    """The fewest warps that share a tile's queries, so that the others share the columns of dQ in whole matrices."""
    fits = (n for n in (2, 4) if head_dim * n % (16 * warps) == 0 and block_q % (16 * n) == 0)
    return next(fits)


def _tilings(head_dim: int, value_dim: int) -> Iterator[BackwardTiles]:
    """Tilings for a kernel's widths, the fastest first."""
    widest = max(head_dim, value_dim)
    if widest <= 64:
        for stages, blocks in ((2, 2), (1, 2), (2, 1), (1, 1)):
            yield BackwardTiles(4, 1, 2, 64, 32, _query_warps(head_dim, 4, 64), stages, blocks)
    elif widest <= 128:
        if widest > 80:
            yield BackwardTiles(4, 2, 2, 64, 32, _query_warps(head_dim, 8, 64), 2, 1)
        part = 32 if widest > 96 else 64
        for blocks in (2, 1):
            yield BackwardTiles(4, 1, 1, 64, part, _query_warps(head_dim, 4, 64), 1, blocks)
    else:
        for stages in (2, 1):
            yield BackwardTiles(4, 2, 1, 64, 32, _query_warps(head_dim, 8, 64), stages, 1)
        yield BackwardTiles(2, 2, 1, 32, 16, _query_warps(head_dim, 4, 32), 1, 1)


@functools.cache
def backward_tiles_for(head_dim: int, value_dim: int, limit: int) -> BackwardTiles:
    """The tiling for a kernel of these widths, and bytes of shared memory that a block may have.

    Raises:
        ValueError: none fits, as on no GPU from Ampere on.
    """
    for tiles in _tilings(head_dim, value_dim):
        if tiles.fits(head_dim, value_dim, limit):
            return tiles
    raise ValueError(f"no tiles of {head_dim} and {value_dim} columns fit into {limit} bytes of shared memory")


@dataclass(frozen=True)
class GeneralBackward(General):
    """A specialisation of general_backward.cu, general_rows.cu and general_finish.cu."""

    narrow_steps: bool
    """Whether strides come as 32-bit numbers."""
    tiles: BackwardTiles
    architecture: str
    vector_sums: bool
    """Whether the GPU adds four floats to memory at once, as from Hopper on."""

    @functools.cached_property
    def program(self) -> Program:
        """The text of the kernel that does the most."""
        tiles = self.tiles
        constants = {
            "HEAD_DIM": self.head_dim,
            "VALUE_DIM": self.value_dim,
            "BANDS": tiles.bands,
            "COLUMN_WARPS": tiles.column_warps,
            "BAND_TILES": tiles.band_tiles,
            "BLOCK_Q": tiles.block_q,
            "PART_Q": tiles.part_q,
            "QUERY_WARPS": tiles.query_warps,
            "STAGES": tiles.stages,
            "WARPS": tiles.warps,
            "BLOCKS_AT_ONCE": tiles.blocks,
            "PACK": 0,
            **self.mask_constants,
            **self._common,
        }
        texts = (*TEXTS, "general_products.cuh", "general_backward.cu")
        shared = tiles.shared_memory(self.head_dim, self.value_dim)
        return self._made("backward", constants, texts, 32 * tiles.warps, shared)

    def rows_program(self, logsumexp_cotangent: bool) -> Program:
        """The text of general_rows.cu."""
        constants = {**self._common, "LOGSUMEXP_COTANGENT": logsumexp_cotangent}
        return self._made("rows", constants, ("common.cuh", "general_steps.cuh", "general_rows.cu"), 128, 0)

    @property
    def finish_program(self) -> Program:
        """The text of general_finish.cu."""
        return self._made("finish", self._common, ("common.cuh", "general_finish.cu"), 256, 0)

    @property
    def _common(self) -> dict[str, int]:
        bfloat16, vectors = self.element == "bf16", self.vector_sums
        return {"NARROW_STEPS": self.narrow_steps, "VECTOR_SUMS": vectors, "BFLOAT16": bfloat16}

    def _made(
        self, what: str, constants: dict[str, int], texts: tuple[str, ...], threads: int, shared_memory: int
    ) -> Program:
        numbers = tuple((name, int(value)) for name, value in constants.items())
        return Program(f"flash_general_{what}", self.architecture, numbers, texts, threads, shared_memory)
