"""Specialisations of the 8-bit Hopper kernels (fp8_quantize.cu, fp8_forward.cu). Compiling does not need MLX."""

import functools
from dataclasses import dataclass
from typing import Final

from attention.kernels.cuda.runtime.program import Element, Program
from attention.kernels.cuda.sm90.forward import Forward, wgmma

QUANTIZED_ROWS: Final = 128
"""Rows per block of the quantization, and keys per scale of K and V."""
WIDTHS: Final = (64, 128)
"""Head dims of the kernels; narrower inputs are zero-filled."""


@dataclass(frozen=True)
class Quantize:
    """A specialisation of fp8_quantize.cu."""

    head_dim: int
    """64 or 128; narrower inputs are zero-filled."""
    element: Element

    @functools.cached_property
    def program(self) -> Program:
        """The source of the kernel."""
        constants = {"HEAD_DIM": self.head_dim, "BFLOAT16": self.element == "bf16"}
        return Program(
            name="flash_quantize_fp8",
            architecture="sm_90a",
            constants=tuple((name, int(value)) for name, value in constants.items()),
            texts=("runtime/common.cuh", "sm90/fp8_scale.cuh", "sm90/fp8_quantize.cu"),
            threads=2 * self.head_dim,
            shared_memory=64 + (2 * QUANTIZED_ROWS + 132) * self.head_dim,
        )


@dataclass(frozen=True)
class Fp8Forward(Forward):
    """A specialisation of fp8_forward.cu; `element` is the output's."""

    @property
    def step_time(self) -> float:
        """Time per key tile, relative to that with three consumers (measured with two)."""
        return {1: 0.57, 2: 0.78, 3: 1.0}[self.consumers]

    @property
    def shared_memory(self) -> int:
        """Bytes: 1 KiB of barriers and scales, the Q buffers, the K and V buffers."""
        queries = 2 * self.head_dim * self.query_stages * self.block_m
        return 1024 + queries + 128 * self.stages * (self.block_n + self.head_dim + 8)

    @functools.cached_property
    def program(self) -> Program:
        """The source of the kernel."""
        constants = {
            "FP8": True,
            "HEAD_DIM": self.head_dim,
            "BLOCK_N": self.block_n,
            "CONSUMERS": self.consumers,
            "STAGES": self.stages,
            "CAUSAL": self.causal,
            "WINDOW": self.window,
            "SOFTCAP": False,
            "ALIBI": False,
            "GATHERED": False,
            "HALVES": False,
            "QUERY_STAGES": self.query_stages,
            "OVERLAP": self.overlap,
            "LISTS": False,
            "BFLOAT16": self.element == "bf16",
        }
        products = (
            wgmma("wgmma_scores", self.block_n, "e4m3", a_in_registers=False, transpose_b=False),
            wgmma("wgmma_output", self.head_dim + 8, "e4m3", a_in_registers=True, transpose_b=False),
        )
        texts = (
            "warpgroup.cuh",
            "tiles.cuh",
            "join.cuh",
            "pipeline.cuh",
            "consumer.cuh",
            "fp8_scale.cuh",
            "fp8_forward.cu",
        )
        return Program(
            name="flash_forward_fp8",
            architecture="sm_90a",
            constants=tuple((name, int(value)) for name, value in constants.items()),
            texts=("runtime/common.cuh", "sm90/hopper.cuh", *products, *(f"sm90/{text}" for text in texts)),
            threads=128 * (self.consumers + 1),
            shared_memory=self.shared_memory,
        )


@functools.cache
def specialise(width: int, causal: bool, element: Element, window: bool) -> Fp8Forward:
    """Return the fastest specialisation for large problems (see docs/experiments/cuda-hopper.md)."""
    return Fp8Forward(width, causal, element, window=window, consumers=3, stages=4, overlap=False)
