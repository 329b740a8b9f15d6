"""Specialisations of the split-K kernel for quantized keys and values (quantized/decode.cu)."""

import functools
from dataclasses import dataclass
from typing import Final

from attention.core.kv_format import Format
from attention.kernels.cuda.quantized.formats import SCALE_BYTES, PackedKV
from attention.kernels.cuda.runtime.program import Element, Program
from attention.kernels.cuda.sm90.decode import MAX_SPLITS, divide_keys

TILE: Final = 16
"""Keys per tile of the tensor cores."""
QUERY_ROWS: Final = 8
"""Query rows per tile of the tensor cores."""
MAX_ROWS: Final = 64
"""Largest number of rows (queries times heads that share a key head) for this kernel."""
RESULT_GAP: Final = 4
"""Floats between the rows of a warp's partial result in shared memory: lanes that write at once are in other banks."""
KINDS: Final = {"affine": 0, "mxfp4": 1, "nvfp4": 1, "mxfp8": 2}
"""Numbers of a mode, as in quantized/numbers.cuh."""
SCALES: Final = {"float32": 0, "float16": 1, "bfloat16": 2, "mxfp8": 3, "mxfp4": 3, "nvfp4": 4}
"""Dtypes of the scales, or the mode that sets them, as in quantized/numbers.cuh."""


@dataclass(frozen=True)
class QuantizedDecode:
    """A specialisation of quantized/decode.cu."""

    head_dim: int
    """64, 128 or 256; narrower inputs are zero-filled on load."""
    query_tiles: int
    """Tiles of 8 query rows of a block."""
    causal: bool
    element: Element
    """Of queries and output."""
    window: bool
    softcap: bool
    architecture: str
    packed: PackedKV
    whole: bool = True
    """Whether the inputs are as wide as `head_dim`."""
    warps: int = 8
    resident_blocks: int = 1
    tiles: int = 1
    """Tiles of 16 keys in a buffer: more take registers, and less of the time between them."""
    shared_memory_limit: int = 232_448
    max_stages: int = 8
    spans: bool = False
    """Whether query i of a head sees the i-th of three runs of keys, whose bounds each launch gets."""

    @property
    def rows(self) -> int:
        """Query rows per block."""
        return QUERY_ROWS * self.query_tiles

    @property
    def round_keys(self) -> int:
        """Keys per round of all warps of a block; a split is a multiple of it."""
        return self.step * self.warps

    @property
    def step(self) -> int:
        """Keys of a warp's buffer."""
        return TILE * self.tiles

    @property
    def part_floats(self) -> int:
        """Floats of the partial result of a split: output, maximum and sum of each row of a tile."""
        return self.rows * (self.head_dim + 2)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of a warp's buffer: the numbers, scales and biases of `step` keys and values."""
        return self.step * sum(_row_bytes(*part, self.head_dim) for part in self.packed.parts)

    @property
    def stages(self) -> int:
        """Buffers per warp: as many as shared memory permits, 2 to `max_stages`."""
        share = (self.shared_memory_limit + 1024) // self.resident_blocks - 1024  # the driver keeps 1 KiB of each block
        return max(2, min(self.max_stages, share // (self.warps * self.buffer_bytes)))

    @property
    def shared_memory(self) -> int:
        """Bytes: the buffers of the warps, or their partial results, or the weights of the splits."""
        result = self.rows * (self.head_dim + RESULT_GAP + 2) * 4
        return self.warps * max(self.stages * self.buffer_bytes, result, MAX_SPLITS * 8)

    def splits(self, tiles: int, keys: int, slots: int) -> tuple[int, int]:
        """Return the number of splits and the keys per split that minimise the rounds of a slot.

        Args:
            tiles: blocks without splitting.
            keys: keys per plane.
            slots: blocks at a time.
        """
        return divide_keys(tiles, keys, self.round_keys, slots)

    @functools.cached_property
    def program(self) -> Program:
        """The source of the kernel."""
        constants = {
            "HEAD_DIM": self.head_dim,
            "QUERY_TILES": self.query_tiles,
            "ROWS": self.rows,
            "RESULT_GAP": RESULT_GAP,
            "PAIRED_ROWS": True,
            "WARPS": self.warps,
            "STAGES": self.stages,
            "TILES": self.tiles,
            "WHOLE": self.whole,
            "BLOCKS_AT_ONCE": self.resident_blocks,
            "CAUSAL": self.causal,
            "WINDOW": self.window,
            "SOFTCAP": self.softcap,
            "ALIBI": False,
            "SPANS": self.spans,
            "BFLOAT16": self.element == "bf16",
            **constants_of(self.packed),
        }
        return Program(
            name="flash_decode_quantized",
            architecture=self.architecture,
            constants=tuple((name, int(value)) for name, value in constants.items()),
            texts=(
                "runtime/common.cuh",
                "sm90/decode_tiles.cuh",
                "sm90/decode_join.cuh",
                "quantized/numbers.cuh",
                "quantized/decode.cu",
            ),
            threads=32 * self.warps,
            shared_memory=self.shared_memory,
        )


def constants_of(packed: PackedKV) -> dict[str, int]:
    """Return the constants of numbers.cuh for the formats of keys and values."""
    key, value = packed.parts
    return _numbers_of("KEY", *key) | _numbers_of("VALUE", *value)


def _row_bytes(form: Format, scale: str, head_dim: int) -> int:
    """Return the bytes of a row's numbers, scales and biases in a buffer."""
    scales = -(-head_dim // form.group_size) * SCALE_BYTES[scale] * (1 + form.has_biases)
    return head_dim * form.bits // 8 + scales


def _numbers_of(name: str, form: Format, scale: str) -> dict[str, int]:
    return {
        f"{name}_BITS": form.bits,
        f"{name}_KIND": KINDS[form.mode],
        f"{name}_GROUP": form.group_size,
        f"{name}_SCALE": SCALES[scale if form.has_biases else form.mode],
    }
