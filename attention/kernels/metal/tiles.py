"""Tile sizes of the Metal kernels, derived from bytes and registers; nothing here was timed.

A threadgroup has at most 32 KB of memory (Apple's Metal Feature Set Tables), and a row of a tile is padded by 16 bytes,
as in MLX's kernels, to avoid bank conflicts when lanes read a column. Within that, tiles are as large as possible,
starting from MLX's sizes: 32 queries by 32 keys, 16 keys for head dims of 128 or more.
"""

from dataclasses import dataclass
from functools import cache
from typing import Final, Literal

from attention.core.workload import ITEM_BYTES

Kind = Literal["forward", "decode", "backward_query", "backward_key"]
KINDS: Final[tuple[Kind, ...]] = ("forward", "decode", "backward_query", "backward_key")
HEAD_DIMS: Final = (32, 64, 80, 96, 128, 192, 256)
SIZES: Final = ITEM_BYTES
"""Bytes per element, by dtype."""
THREADGROUP_BYTES: Final = 32768
PAD_BYTES: Final = 16
FLOAT_BYTES: Final = 4
SIMD: Final = 32
EDGE: Final = 8
"""Rows and columns of a simdgroup matrix, two elements per lane."""
OTHER_REGISTERS: Final = 32
"""Registers for addresses, bounds and other values of a thread: a guess, as `registers` is an estimate."""
BLOCKS: Final = ((32, 32), (32, 16), (16, 16), (16, 8), (8, 16), (8, 8))
"""Queries and keys per tile, in order of preference."""
DECODE_SIMDGROUPS: Final = 4
DECODE_ROWS: Final = (8, 16, 32)
LIST_QUERIES: Final = 64
LIST_KEYS: Final = 64
"""Queries and keys of a listed tile: multiples of every tile. Blocks of it without a visible pair are skipped."""


@dataclass(frozen=True)
class Tile:
    """The tile sizes of one specialisation."""

    kind: Kind
    head_dim: int
    size: int
    """Bytes per element."""
    block_q: int
    block_k: int
    chunk: int
    """Head dims per loaded tile: all of them, or a part if all do not fit."""

    @property
    def pad(self) -> int:
        """Padding of a tile's row, in elements."""
        return PAD_BYTES // self.size

    @property
    def simdgroups(self) -> int:
        """Simdgroups per threadgroup: one per 8 query rows; two per 8 keys in the dK and dV kernel."""
        if self.kind == "decode":
            return max(DECODE_SIMDGROUPS, self.block_q // EDGE)
        return 2 * self.block_k // EDGE if self.kind == "backward_key" else self.block_q // EDGE

    @property
    def threads(self) -> int:
        """Threads per threadgroup."""
        return SIMD * self.simdgroups

    @property
    def threadgroup_bytes(self) -> int:
        """Threadgroup memory of all arrays, in bytes."""
        row, part = (self.head_dim + self.pad) * self.size, (self.chunk + self.pad) * self.size
        if self.kind == "backward_query":
            return 2 * self.block_q * row + 2 * self.block_k * part
        if self.kind == "backward_key":
            shared = FLOAT_BYTES * (self.block_k * self.block_q + 3 * self.block_q)
            return 2 * self.block_k * row + 2 * self.block_q * part + shared
        return (self.block_q + self.block_k) * row

    @property
    def registers(self) -> int:
        """Estimated 32-bit registers per thread: the matrices live at the same time, two elements per lane."""
        walked = self.block_q if self.kind == "backward_key" else self.block_k
        scores = 2 if self.kind == "backward_query" else 1
        parts = 1 if self.size == FLOAT_BYTES else 0  # parts of the scores, which float32 sums separately
        operands = 2
        matrices = self.head_dim // EDGE + (scores + parts) * walked // EDGE + operands
        return 2 * matrices + OTHER_REGISTERS

    @property
    def products_per_tile(self) -> int:
        """Number of 8 x 8 matrix products per pair of a query block and a key block."""
        blocks = (self.block_q // EDGE) * (self.block_k // EDGE) * (self.head_dim // EDGE)
        return blocks * {"forward": 2, "decode": 2, "backward_query": 3, "backward_key": 4}[self.kind]

    @property
    def products_per_block(self) -> int:
        """Number of 8 x 8 matrix products per query block: in the dQ kernel the diagonal of dO O', for delta."""
        return (self.block_q // EDGE) * (self.head_dim // EDGE) if self.kind == "backward_query" else 0

    @property
    def barriers_per_tile(self) -> int:
        """Threadgroup barriers per pair of a query block and a key block."""
        if self.kind in ("forward", "decode"):
            return 4
        loads = (self.head_dim + self.dims_again) // self.chunk
        return 2 * loads + (1 if self.kind == "backward_key" else 0)

    @property
    def barriers_per_block(self) -> int:
        """Threadgroup barriers per query block: in the dQ kernel after loading Q and dO."""
        return 1 if self.kind == "backward_query" else 0

    @property
    def flops_per_tile(self) -> int:
        """FLOPs of the products per pair of blocks."""
        return 2 * EDGE**3 * self.products_per_tile

    @property
    def dims_again(self) -> int:
        """Head dims loaded a second time for the sums: all chunks but the last have been overwritten."""
        return self.head_dim - self.chunk

    @property
    def elements_per_tile(self) -> int:
        """Elements of q, k, v or dO read from global memory per pair of full blocks."""
        if self.kind == "backward_key":
            return 2 * self.block_q * (self.head_dim + self.dims_again)
        return self.block_k * (2 * self.head_dim + self.dims_again)

    @property
    def bytes_per_tile(self) -> int:
        """Bytes of q, k, v or dO read from global memory per pair of full blocks."""
        return self.elements_per_tile * self.size


@cache
def tile_of(kind: Kind, head_dim: int, dtype: str, rows: int = 0) -> Tile:
    """Return the tile sizes of a kernel: the first of `BLOCKS` that fits, if necessary with a part of the head dim.

    Args:
        kind: of the kernel.
        head_dim: one of `HEAD_DIMS`.
        dtype: one of `SIZES`.
        rows: for a call with few queries: query rows per key head.
    """
    size = SIZES[dtype]
    max_keys = 32 if head_dim < 128 else 16
    for block_q, block_k in _blocks(kind, rows):
        if (block_q if kind == "backward_key" else block_k) > max_keys:
            continue
        for chunk in _chunks(kind, head_dim):
            tile = Tile(kind, head_dim, size, block_q, block_k, chunk)
            if tile.threadgroup_bytes <= THREADGROUP_BYTES:
                return tile
    raise AssertionError(f"no tile of {kind} fits head dim {head_dim} in {dtype}")  # tests cover all combinations


def _blocks(kind: Kind, rows: int) -> tuple[tuple[int, int], ...]:
    if kind == "decode":
        wanted = next((n for n in DECODE_ROWS if n >= rows), DECODE_ROWS[-1])
        return tuple((q, k) for q in reversed(DECODE_ROWS) if q <= wanted for k in (32, 16, 8))
    if kind == "backward_key":  # here the key block stays resident
        return tuple((k, q) for q, k in BLOCKS)
    return BLOCKS


def _chunks(kind: Kind, head_dim: int) -> tuple[int, ...]:
    """Return the head dims to try per tile: all, and half and a quarter only for backward kernels that may split."""
    if kind in ("forward", "decode") or head_dim < 192:
        return (head_dim,)
    return (head_dim, head_dim // 2, head_dim // 4)


def table() -> str:
    """Return all tile sizes as a Markdown table; for decode those for up to 8 rows."""
    names = ("kernel", "type", "D", "queries", "keys", "dims at a time", "threads", "threadgroup bytes", "registers")
    lines = [f"| {' | '.join((*names, 'FLOPs a tile', 'bytes a tile', 'barriers a tile'))} |", "|---" * 12 + "|"]
    for kind in KINDS:
        for dtype, label in (("float16", "16 bits"), ("float32", "32 bits")):
            for head_dim in HEAD_DIMS:
                t = tile_of(kind, head_dim, dtype, EDGE)
                sizes = (t.block_q, t.block_k, t.chunk, t.threads, t.threadgroup_bytes, t.registers)
                cells = (kind, label, head_dim, *sizes, t.flops_per_tile, t.bytes_per_tile, t.barriers_per_tile)
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
