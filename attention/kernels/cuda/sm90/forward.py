"""Specialisations of the Hopper forward kernel (forward.cu) and their tile counts. Compiling does not need MLX."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from attention.kernels.cuda.runtime.program import Element, Program
from attention.kernels.cuda.sm90.schedule import tile_ranges


def wgmma(
    name: str, width: int, element: str, *, a_in_registers: bool, transpose_b: bool, transpose_a: bool = False
) -> str:
    """Return the source of `name(d, a, b, accumulate)`: d = a @ b, plus d if `accumulate`.

    `d` is 64 x `width` in float32; `a` (64 x 16) is four registers or a shared-memory descriptor; `b` (16 x `width`) is
    a descriptor; `element` is "bf16", "f16" or "e4m3". With e4m3 the contraction is 32 long and nothing is transposed.
    """
    wide = element == "e4m3"
    shape = f"m64n{width}k{32 if wide else 16}"
    count = width // 2
    a_operands = [f"%{count + i}" for i in range(4 if a_in_registers else 1)]
    b_operand, flag = f"%{count + len(a_operands)}", f"%{count + len(a_operands) + 1}"
    accumulators = ", ".join(f"%{i}" for i in range(count))
    a_text = "{" + ", ".join(a_operands) + "}" if a_in_registers else a_operands[0]
    # scale-d, scale-a, scale-b, then a transpose flag for each operand in shared memory
    transposes = [*([] if a_in_registers else [str(int(transpose_a))]), str(int(transpose_b))]
    modifiers = ["p", "1", "1", *([] if wide else transposes)]
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    a_inputs = ", ".join(f'"r"(a[{i}])' for i in range(4)) if a_in_registers else '"l"(a)'
    a_parameter = "const u32 (&a)[4]" if a_in_registers else "u64 a"
    return f"""
DEVICE void {name}(float (&d)[{count}], {a_parameter}, u64 b, bool accumulate) {{
  asm volatile(
      "{{\\n .reg .pred p;\\n setp.ne.b32 p, {flag}, 0;\\n"
      " wgmma.mma_async.sync.aligned.{shape}.f32.{element}.{element} {{{accumulators}}}, {a_text}, {b_operand},"
      " {", ".join(modifiers)};\\n}}"
      : {outputs}
      : {a_inputs}, "l"(b), "r"(static_cast<int>(accumulate)));
}}
"""


TEXTS = ("sm90/tiles.cuh", "sm90/join.cuh", "sm90/pipeline.cuh", "sm90/consumer.cuh", "sm90/forward.cu")
WARPGROUP_ROWS = 64
"""Queries per consumer warpgroup."""


@dataclass(frozen=True)
class Forward:
    """A specialisation of forward.cu; `overlap` is explained at the top of that file."""

    head_dim: int
    """64, 128, 192 or 256; narrower inputs are zero-filled by TMA."""
    causal: bool
    element: Element
    window: bool = False
    softcap: bool = False
    consumers: int = 2
    """Consumer warpgroups, 64 queries each."""
    block_n: int = 128
    """Keys per tile."""
    stages: int = 2
    """Buffers for K, and as many for V."""
    query_stages: int = 1
    """Buffers for Q; with two, the next tile of queries is prefetched."""
    overlap: bool = True
    lists: bool = False
    """Whether the key tiles of a query tile are entries of a block list, not a range."""
    alibi: bool = False
    gathered: bool = False
    """Whether key tiles are in two arrays, own ones and other devices', and the queries are two runs of rows."""

    @property
    def block_m(self) -> int:
        """Queries per tile."""
        return WARPGROUP_ROWS * self.consumers

    @property
    def shared_memory(self) -> int:
        """Bytes: 1 KiB of barriers, the Q buffers, the K and V buffers, and the bits of listed tiles."""
        bits = self.stages * self.block_m * self.block_n // 8 if self.lists else 0
        return 1024 + 2 * self.head_dim * (self.query_stages * self.block_m + 2 * self.stages * self.block_n) + bits

    @property
    def halves(self) -> bool:
        """Whether a consumer leaves out the half of a key tile that is masked for all its queries."""
        return self.window and self.block_n == 128 and not (self.softcap or self.alibi)

    @functools.cached_property
    def program(self) -> Program:
        """The source of the kernel."""
        constants = {
            "HEAD_DIM": self.head_dim,
            "BLOCK_N": self.block_n,
            "CONSUMERS": self.consumers,
            "STAGES": self.stages,
            "CAUSAL": self.causal,
            "WINDOW": self.window,
            "SOFTCAP": self.softcap,
            "QUERY_STAGES": self.query_stages,
            "OVERLAP": self.overlap,
            "LISTS": self.lists,
            "ALIBI": self.alibi,
            "GATHERED": self.gathered,
            "HALVES": self.halves,
            "BFLOAT16": self.element == "bf16",
        }
        half = wgmma("wgmma_half_scores", self.block_n // 2, self.element, a_in_registers=False, transpose_b=False)
        products = (
            wgmma("wgmma_scores", self.block_n, self.element, a_in_registers=False, transpose_b=False),
            *([half] if self.halves else []),
            wgmma("wgmma_output", self.head_dim, self.element, a_in_registers=True, transpose_b=True),
        )
        return Program(
            name="flash_forward",
            architecture="sm_90a",
            constants=tuple((name, int(value)) for name, value in constants.items()),
            texts=("runtime/common.cuh", "sm90/hopper.cuh", *products, "sm90/warpgroup.cuh", *TEXTS),
            threads=128 * (self.consumers + 1),
            shared_memory=self.shared_memory,
        )

    def tile_ranges(
        self, queries: int, keys: int, window: int, position: Callable[[int], int] | None = None
    ) -> tuple[tuple[int, int], ...]:
        """Return the half-open range of key tiles of each query tile, counted as in the kernel.

        `position` is of a row among the keys; by default the last query is at the last key.
        """
        position = position or (lambda row: row + keys - queries)
        tile = (self.block_m, self.block_n)
        return tile_ranges(queries, keys, tile, self.causal, window if self.window else None, position)

    @property
    def part_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the partial result of a split tile: values (float32) and completion flags (int64)."""
        warps = 4 * self.consumers
        return (warps, self.head_dim // 8 + 1, 32, 4), (warps,)

    @property
    def joining(self) -> float:
        """Cost of combining the parts of a tile, in key tiles (measured with 2048 to 16384 keys)."""
        return {64: 2.5, 128: 4.0, 192: 8.0, 256: 12.0}[self.head_dim]

    @property
    def step_time(self) -> float:
        """Time per key tile, relative to the consumer count that is fastest for large problems (measured)."""
        return {1: 0.57, 2: 0.75, 3: 1.0}[self.consumers] if self.head_dim <= 128 else {1: 0.65, 2: 1.0}[self.consumers]


@functools.cache
def specialise(
    head_dim: int, causal: bool, element: Element, window: bool = False, softcap: bool = False, alibi: bool = False
) -> Forward:
    """Return the fastest specialisation for large problems, D <= 256 (see docs/experiments/cuda-hopper.md)."""
    made = functools.partial(
        Forward, causal=causal or window, element=element, window=window, softcap=softcap, alibi=alibi
    )
    if head_dim <= 128 and softcap:  # with three consumers the softcap would spill registers
        return made(64 if head_dim <= 64 else 128, consumers=2, block_n=128, query_stages=2)
    if head_dim <= 64:
        masked = causal or window or alibi  # without, turns are 5 % faster; consumers of a window can be a tile apart
        return made(64, consumers=3, block_n=128, query_stages=2, stages=3 if window else 2, overlap=masked)
    if head_dim <= 128:
        return made(128, consumers=3, block_n=128, overlap=False)
    if head_dim <= 192:
        return made(192, consumers=2, block_n=96)
    if head_dim <= 256:
        return made(256, consumers=2, block_n=64 if softcap else 80)
    raise ValueError(f"head_dim is at most 256; got {head_dim}")


@functools.cache
def specialise_lists(
    head_dim: int, element: Element, softcap: bool = False, few: bool = False, alibi: bool = False, most: bool = False
) -> Forward:
    """Return the specialisation for block lists.

    With `few`, for small problems: smaller tiles, and more of them. With `most`, for lists of nearly all tiles, up to a
    head dim of 128 and without softcap and ALiBi: the larger tiles of calls without a mask.
    """
    if most:
        return replace(specialise(head_dim, False, element), lists=True)
    width = next(width for width in (64, 128, 192, 256) if head_dim <= width)
    narrow = width <= 128
    return Forward(
        width,
        False,
        element,
        softcap=softcap,
        consumers=1 if few else 2,
        block_n=128 if narrow else 64,
        query_stages=2 if narrow else 1,
        overlap=few or width > 64 or softcap or alibi,
        lists=True,
        alibi=alibi,
    )


ForwardKernel = TypeVar("ForwardKernel", bound=Forward)


def fewer_consumers(kernel: ForwardKernel) -> list[ForwardKernel]:
    """Return the variants with fewer consumers, for small problems: smaller tiles, and more of them."""
    return [replace(kernel, consumers=count, overlap=True) for count in range(1, kernel.consumers)]
