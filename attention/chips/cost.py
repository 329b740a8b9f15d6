"""What a call costs on a chip, before calibration: seconds at peak rates, by what they are spent on.

A fused kernel computes tiles of queries and keys. A core computes whole tiles, masked pairs of a visited tile included,
one tile after the other: `Costs` counts the steps of the core that ends last, by the estimate that the Hopper kernels
are scheduled with (`kernels/cuda/sm90/schedule.py: makespan`). An unfused path multiplies whole matrices and passes
over the scores in memory. Arrays that fit in the last cache are read from there, since calls are repeated with the
same inputs while they are timed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from msgspec import Struct, structs

from attention.chips.table import Chip
from attention.core.workload import ITEM_BYTES, Workload
from attention.kernels.cuda.portable.forward import FEW_ROWS, tiles_for, width_of
from attention.kernels.cuda.sm90.decode import MAX_ROWS, divide_keys
from attention.kernels.cuda.sm90.forward import Forward, fewer_consumers, specialise
from attention.kernels.cuda.sm90.schedule import makespan, tile_ranges

Path = Literal["Hopper", "split K", "general", "fused", "unfused", "CPU kernel", "torch CPU", "packed"]
"""Kind of a path: what its costs are counted by, and calibrated apart."""
TERMS: Final = ("launch", "start", "matrix", "vector", "memory", "cache", "blocks", "scores", "mask")
"""What each term is.

launch: a constant of the host; start: one of the chip; matrix: products at tile granularity; vector: exponentials;
memory: arrays read and written; cache: those that stay there, and keys and values that each tile of queries reads
again; blocks: what a CPU does once for each block of queries and keys, such as calls of a library's product; scores:
passes of an unfused path over its score matrix; mask: further passes if it is masked, or in fused training products of
masked pairs, which some kernels do not skip.
"""
NO_SPLIT: Final = 1e9
"""Cost of joining the parts of a tile, for kernels that do not split tiles."""
ROUND_KEYS: Final = 64
WARM: Final = 0.7
"""Share of a cache that arrays may take and still be found there."""
CORE_CACHE_BYTES: Final = {"Zen 3": 2**19}
OTHER_CORE_CACHE_BYTES: Final = 2**21
"""Last cache that a core of a CPU has for itself, by architecture; of others that of the Xeon whose rows are kept. What
is beyond counts as memory."""
CORE_BYTES_PER_S: Final = 2.4e10
"""What a core of a CPU moves in memory in a second at most: two of the Xeon whose rows are kept read 47 GB/s."""
SHARED_BYTES: Final = {"cuda": 101_376, "metal": 65_536, "cpu": 0}
"""Shared memory of a core where no source states it: the least of the GPUs that the kernels were made for."""
PASS_BYTES: Final = {"cuda": 10.5, "metal": 10.5, "cpu": 64.0}
"""Bytes that a core reads and writes in a cycle in an elementwise operation of MLX.

On CUDA from the copies that runs on an H200 begin with: 2.4 to 3.4 TB/s, where its memory moves 4.8.
"""
TILE: Final = 128
"""Queries and keys of a tile where those of a kernel are unknown."""


class Costs(Struct, frozen=True):
    """Seconds at the chip's peak rates; a term that cannot be computed without a missing figure is None."""

    launch: float = 1.0
    """Times a calibrated number of seconds, as start."""
    start: float = 1.0
    matrix: float | None = 0.0
    vector: float | None = 0.0
    memory: float | None = 0.0
    cache: float | None = 0.0
    blocks: float = 0.0
    """Times a calibrated number of seconds."""
    scores: float | None = 0.0
    mask: float | None = 0.0

    @property
    def missing(self) -> list[str]:
        """Names of the terms that cannot be computed."""
        return [name for name in TERMS if getattr(self, name) is None]


@dataclass(frozen=True)
class _Tiles:
    """How a fused kernel divides a call: tile size, cost of joining parts, and time of a step relative to others."""

    rows: int
    keys: int
    joining: float = NO_SPLIT
    step: float = 1.0


def path_kind(path: str | None, backend: str) -> Path:
    """Return the kind of path that a row names."""
    text = path or ""
    if "quantized" in text:
        return "packed"
    if "CUDA kernel" in text:
        return "Hopper" if "Hopper" in text else "split K" if "split K" in text else "general"
    if "CPU kernel" in text:
        return "CPU kernel"
    if backend == "cpu" and text.startswith("torch"):
        return "torch CPU"
    return "unfused" if "unfused" in text or "manual" in text else "fused"


def predicted_path(implementation: str, workload: Workload, chip: Chip) -> Path | None:
    """Return the kind of path that an implementation would take on a chip; None if it is not predicted.

    The rules are those of the routes, for calls with the bounds of a mask only.
    """
    half = workload.dtype != "float32"
    same = workload.value_dim == workload.head_dim
    if workload.quantized or workload.structured or workload.ranks > 1:
        return None
    match implementation, chip.backend:
        case "baseline", _:
            return "unfused"
        case "poc", "cpu":
            return "CPU kernel"
        case "torch", "cpu":
            return "torch CPU"
        case (("mlx" | "practical"), "cpu"):
            return "unfused"
        case (("poc" | "general"), "cuda") if half and workload.head_dim <= 256:
            specialised = same and implementation == "poc"
            if specialised and workload.seq * workload.heads // workload.kv_heads <= MAX_ROWS:
                return "split K"
            hopper = specialised and chip.architecture == "Hopper" and fits(workload, chip)
            return "Hopper" if hopper else "general"
        case (("poc" | "general"), "metal"):
            return "general"
        case (("mlx" | "practical" | "torch"), ("cuda" | "metal")):
            widest = 256 if implementation == "torch" else 128
            return "fused" if half and same and workload.head_dim <= widest else "unfused"
    return None


def on_host(found: Costs, factor: float) -> Costs:
    """Return costs on a host that takes a multiple of the calibration's time for launches.

    The start of kernels is among what it scales: a path of several kernels starts each when its host gets to it.
    """
    return found if factor == 1 else structs.replace(found, launch=factor * found.launch, start=factor * found.start)


def costs(workload: Workload, chip: Chip, path: Path) -> Costs:
    """Return what a call, with the bounds of a mask only, costs on a chip by a path.

    Raises:
        ValueError: no tile of the kernel fits in the shared memory of a core.
    """
    rate, cycles = chip.rate(workload.dtype), chip.cycles_per_s
    memory, resident = _traffic(workload, chip, path)
    if path == "unfused":
        return _unfused(workload, chip, memory, resident)
    if path == "split K" or workload.pass_ == "decode":
        # A CPU's threads take spans of keys one by one, which ends them at about the same time.
        slowed = 1.0 if chip.backend == "cpu" else _decode_rounds(workload, int(chip.cores or 1))
        return Costs(
            matrix=_over(workload.flops, rate),
            vector=_over(workload.pairs, cycles),
            memory=_times(memory, slowed),
            cache=_over(resident * slowed, cycles),
        )
    pairs, read, blocks = (_visited_on_cpu if path in PARTS else _visited)(workload, chip, path)
    hidden = workload.scores - workload.pairs if workload.pass_ == "training" else 0
    return Costs(
        matrix=_over(pairs * _pair_flops(workload), rate),
        vector=_over(pairs, cycles),
        memory=memory,
        cache=_over(resident + read, cycles),
        blocks=blocks,
        mask=_over(hidden * _pair_flops(workload), rate),
    )


def _pair_flops(workload: Workload) -> float:
    return workload.flops / workload.pairs if workload.pairs else 0.0


def _over(amount: float, rate: float | None) -> float | None:
    return None if rate is None else amount / rate


def _times(seconds: float | None, factor: float) -> float | None:
    return None if seconds is None else seconds * factor


def _traffic(workload: Workload, chip: Chip, path: Path) -> tuple[float | None, float]:
    """Return the seconds of reading and writing the arrays of a call in memory, and the bytes of those in the cache."""
    moved, cache = workload.bytes_moved, chip.cache_bytes or 0.0
    own = CORE_CACHE_BYTES.get(chip.architecture, OTHER_CORE_CACHE_BYTES)
    if chip.backend == "cpu":
        cache = min(cache, own * (chip.cores or 1.0))
    kept = _kept(moved, cache)
    again, kept_again = 0.0, 0.0
    if path == "torch CPU":  # each query head reads the keys and values that it shares with others
        again = workload.key_value_bytes * (workload.heads / workload.kv_heads - 1)
        kept_again = _kept(workload.key_value_bytes / (workload.batch * workload.kv_heads), own)
    beyond = moved * (1 - kept) + again * (1 - kept_again)
    return _over(beyond, _bytes_per_s(chip)), moved * kept + again * kept_again


def _bytes_per_s(chip: Chip) -> float | None:
    """Return the bandwidth of a chip's memory, of which a few cores of a CPU reach a part."""
    if chip.bytes_per_s is None or chip.backend != "cpu":
        return chip.bytes_per_s
    return min(chip.bytes_per_s, CORE_BYTES_PER_S * (chip.cores or 1.0))


def _kept(size: float, cache: float) -> float:
    """Return the share of arrays of a size that a cache still holds when they are read again."""
    share = WARM * cache / size if size else 1.0
    return 1.0 if share >= 1 else share**2  # a cyclic sweep beyond the cache evicts most of it


def _unfused(workload: Workload, chip: Chip, memory: float | None, resident: float) -> Costs:
    """Return the costs of matrix products with the whole score matrix between them."""
    item = 4 if workload.dtype in ("float32", "float16") else 2
    scores = workload.scores * item
    in_cache = chip.cache_bytes is not None and 2 * scores < WARM * chip.cache_bytes
    passes = _over(scores, chip.bytes_per_s)  # of the whole chip: MLX's elementwise operations take one thread of a CPU
    if passes is not None and chip.cycles_per_s:
        passes = max(passes, scores / (PASS_BYTES[chip.backend] * chip.cycles_per_s))
    return Costs(
        matrix=_over(workload.scores * _pair_flops(workload), chip.rate(workload.dtype)),
        memory=memory,
        cache=_over(resident + (scores if in_cache else 0.0), chip.cycles_per_s),
        scores=0.0 if in_cache else passes,
        vector=_over(workload.scores, chip.cycles_per_s),
        mask=0.0 if workload.mask == "none" else passes,
    )


def _decode_rounds(workload: Workload, cores: int) -> float:
    """Return the rounds of the core that ends last over those of an even division, prologues included."""
    rows = workload.seq * workload.heads // workload.kv_heads
    tiles = workload.batch * workload.kv_heads * -(-rows // 16)
    splits, size = divide_keys(tiles, workload.kv_seq, ROUND_KEYS, cores)
    waves = -(-tiles * splits // cores)
    even = tiles * workload.kv_seq / ROUND_KEYS / cores
    return max(1.0, waves * (size / ROUND_KEYS + 1) / even)


def _visited(workload: Workload, chip: Chip, path: Path) -> tuple[float, float, float]:
    """Return the pairs that all cores could compute until the one that ends last is done, and the bytes of tiles read.

    The bytes are of keys and values, which each tile of queries reads.
    """
    row_bytes = (workload.head_dim + workload.value_dim) * ITEM_BYTES[workload.dtype]
    planes, cores = workload.batch * workload.heads, int(chip.cores or 1)
    shift = workload.kv_seq - workload.seq  # the last query sees the last key
    found = []
    for tiles in _tilings(workload, chip, path):
        size = (tiles.rows, tiles.keys)
        ranges = tile_ranges(
            workload.seq, workload.kv_seq, size, workload.causal, workload.window, lambda row: row + shift
        )
        steps = makespan(cores, planes, ranges, tiles.joining) * tiles.step
        visited = planes * sum(stop - start for start, stop in ranges)
        found.append((steps * tiles.rows * tiles.keys * cores, visited * tiles.keys * row_bytes, 0.0))
    return min(found)


def _visited_on_cpu(workload: Workload, chip: Chip, path: Path) -> tuple[float, float, float]:
    """Return the same for the kernels of a CPU, whose threads take items of rows.

    Within its tiles `poc` skips what a part of 16 rows does not see; torch computes whole blocks of keys.
    """
    rows, keys, part, block = PARTS[path](workload.seq)
    planes, shift = workload.batch * workload.heads, workload.kv_seq - workload.seq

    def seen(last: int) -> int:
        """Return the keys that rows up to one see, those before a window included."""
        return min(workload.kv_seq, last + shift + 1) if workload.causal else workload.kv_seq

    def unseen(first: int) -> int:
        return 0 if workload.window is None else max(0, first + shift + 1 - workload.window)

    pairs, read, blocks, longest = 0, 0, 0, 0
    for first in range(0, workload.seq, rows):
        end = min(workload.seq, first + rows)
        begun, ended = unseen(first) // keys, -(-seen(end - 1) // keys)
        read += min(workload.kv_seq, ended * keys) - begun * keys
        blocks += ended - begun
        own = 0
        for begin in range(first, end, part):
            last = min(end, begin + part) - 1
            span = min(workload.kv_seq, -(-seen(last) // block) * block) - unseen(begin) // block * block
            own += (last + 1 - begin) * max(0, span)
        pairs, longest = pairs + own, max(longest, own)
    tiles, cores = -(-workload.seq // rows), int(chip.cores or 1)
    alike = pairs == tiles * longest
    busiest = longest * -(-planes * tiles // cores) if alike else max(longest, planes * pairs / cores)
    row_bytes = (workload.head_dim + workload.value_dim) * ITEM_BYTES[workload.dtype]
    return float(busiest * cores), float(planes * read * row_bytes), planes * blocks / cores


def _poc_rows(seq: int) -> tuple[int, int, int, int]:
    return 64, 128, 16, 1


def _torch_rows(seq: int) -> tuple[int, int, int, int]:
    rows = 256 if seq >= 768 else 64 if seq >= 192 else 32
    return rows, 512, rows, 512


PARTS: Final[Mapping[Path, Callable[[int], tuple[int, int, int, int]]]] = {
    "CPU kernel": _poc_rows,
    "torch CPU": _torch_rows,
}
"""Rows and keys of a tile of a CPU's kernel, and of what it computes of a tile at a mask's edge, by the queries.

Of torch: `cpu_flash_attention` in ATen/native/cpu/FlashAttentionKernel.cpp.
"""


def _tilings(workload: Workload, chip: Chip, path: Path) -> list[_Tiles]:
    """Return the tilings that a kernel chooses from on a chip."""
    shared = int(chip.shared_bytes or SHARED_BYTES[chip.backend])
    if path == "Hopper" and workload.pass_ == "forward":
        return [
            _Tiles(each.block_m, each.block_n, each.joining, each.step_time * largest / each.block_m)
            for largest, each in _hopper(workload)
            if each.shared_memory <= shared
        ]
    if chip.backend == "metal" and path == "general":
        return [_Tiles(32, 32 if workload.head_dim < 128 else 16)]  # as in kernels/metal/tiles.py
    if path == "general" and workload.pass_ == "forward":
        widths = width_of(workload.head_dim), width_of(workload.value_dim)
        made = tiles_for(*widths, max(workload.seq, FEW_ROWS + 1), False, shared)
        return [_Tiles(made.block_m, made.block_n)]
    return [_Tiles(TILE, TILE), _Tiles(64, TILE, NO_SPLIT, 1.1)]


def _hopper(workload: Workload) -> list[tuple[int, Forward]]:
    """Return the specialisations of the Hopper kernel, each with the query rows of the largest."""
    largest = specialise(workload.head_dim, workload.causal, "bf16", workload.window is not None)
    return [(largest.block_m, kernel) for kernel in (largest, *fewer_consumers(largest))]


def fits(workload: Workload, chip: Chip) -> bool:
    """Return whether a tile of the Hopper kernel fits in the shared memory of a chip's core."""
    return any(kernel.shared_memory <= (chip.shared_bytes or 0) for _, kernel in _hopper(workload))
