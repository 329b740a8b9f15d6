"""Tilings and specialisations of the general backward kernel (backward.cu). Compiling does not need MLX."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from attention.kernels.cuda.portable.forward import TEXTS, Portable, share_of, tile_bytes, width_of
from attention.kernels.cuda.runtime.program import Program

PADDED: Final = 64
"""Query tile size of the intermediate arrays; their rows are padded to a multiple of it."""


@dataclass(frozen=True)
class BackwardTiles:
    """Tiling of a block of the backward kernel."""

    bands: int
    """Consecutive bands of keys per block."""
    column_warps: int
    """Warps per band; each owns an equal part of the columns of dK and dV."""
    band_tiles: int
    """Tiles of 16 keys per band."""
    block_q: int
    """Queries per tile."""
    part_q: int
    """Queries per step of a warp if `column_warps` is 1."""
    query_warps: int
    """Warps that split the queries of a tile for dQ; the remaining factor splits its columns."""
    stages: int
    """Query tiles in shared memory."""
    blocks: int
    """Resident blocks per multiprocessor."""

    @property
    def warps(self) -> int:
        """Warps per block."""
        return self.bands * self.column_warps

    @property
    def block_k(self) -> int:
        """Keys per block."""
        return 16 * self.band_tiles * self.bands

    def shared_memory(self, head_dim: int, value_dim: int) -> int:
        """Return the bytes of K and V, the stages (with 3 floats per query), dS, and P if two warps share a band."""
        keys = tile_bytes(self.block_k, head_dim) + tile_bytes(self.block_k, value_dim)
        stage = tile_bytes(self.block_q, head_dim) + tile_bytes(self.block_q, value_dim) + 12 * self.block_q
        return keys + self.stages * stage + tile_bytes(self.block_k, self.block_q) * (1 + (self.column_warps > 1))

    def fits(self, head_dim: int, value_dim: int, limit: int) -> bool:
        """Return whether `blocks` blocks fit on a multiprocessor."""
        return self.shared_memory(head_dim, value_dim) <= share_of(limit, self.blocks)


def widths_of(head_dim: int, value_dim: int) -> tuple[int, int]:
    """Return the kernel widths for these dims; 80 becomes 96 if two warps split the columns (80 / 2 is not whole)."""
    keys, values = width_of(head_dim), width_of(value_dim)
    return (max(96, keys), max(96, values)) if 80 in (keys, values) and max(keys, values) > 80 else (keys, values)


def _query_warps(head_dim: int, warps: int, block_q: int) -> int:
    """Return the smallest split of the queries for which the columns of dQ divide into whole mma tiles."""
    fits = (n for n in (2, 4) if head_dim * n % (16 * warps) == 0 and block_q % (16 * n) == 0)
    return next(fits)


def _tilings(head_dim: int, value_dim: int) -> Iterator[BackwardTiles]:
    """Yield the tilings for the kernel widths, fastest first."""
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
    """Return the tiling for these kernel widths; `limit` is the maximum shared memory per block, in bytes.

    Raises:
        ValueError: no tiling fits; this does not happen on Ampere and later GPUs.
    """
    for tiles in _tilings(head_dim, value_dim):
        if tiles.fits(head_dim, value_dim, limit):
            return tiles
    raise ValueError(f"no tiles of {head_dim} and {value_dim} columns fit into {limit} bytes of shared memory")


@dataclass(frozen=True)
class PortableBackward(Portable):
    """A specialisation of backward.cu, rows.cu and finish.cu."""

    narrow_steps: bool
    """Whether strides are 32-bit."""
    tiles: BackwardTiles
    architecture: str
    vector_sums: bool
    """Whether the GPU has vectorised atomic adds of four floats (Hopper and later)."""

    @functools.cached_property
    def program(self) -> Program:
        """The program of backward.cu."""
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
        texts = (*TEXTS, "portable/products.cuh", "portable/backward.cu")
        shared = tiles.shared_memory(self.head_dim, self.value_dim)
        return self._made("backward", constants, texts, 32 * tiles.warps, shared)

    def rows_program(self, logsumexp_cotangent: bool) -> Program:
        """Return the program of rows.cu."""
        constants = {**self._common, "LOGSUMEXP_COTANGENT": logsumexp_cotangent}
        return self._made("rows", constants, ("runtime/common.cuh", "portable/steps.cuh", "portable/rows.cu"), 128, 0)

    @property
    def finish_program(self) -> Program:
        """The program of finish.cu."""
        return self._made("finish", self._common, ("runtime/common.cuh", "portable/finish.cu"), 256, 0)

    @property
    def _common(self) -> dict[str, int]:
        bfloat16, vectors = self.element == "bf16", self.vector_sums
        return {"NARROW_STEPS": self.narrow_steps, "VECTOR_SUMS": vectors, "BFLOAT16": bfloat16}

    def _made(
        self, what: str, constants: dict[str, int], texts: tuple[str, ...], threads: int, shared_memory: int
    ) -> Program:
        numbers = tuple((name, int(value)) for name, value in constants.items())
        return Program(f"flash_general_{what}", self.architecture, numbers, texts, threads, shared_memory)
