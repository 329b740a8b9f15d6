"""The portable kernels, from Ampere on: their tiles fit, and (with NVRTC, no GPU) they compile with few registers."""

from dataclasses import replace
from itertools import product

import pytest

from attention.kernels.cuda import KernelUnavailable
from attention.kernels.cuda.portable import forward as portable_forward
from attention.kernels.cuda.portable.backward import PortableBackward, backward_tiles_for, widths_of
from attention.kernels.cuda.portable.forward import (
    WIDTHS,
    ForwardTiles,
    PortableForward,
    split_keys,
    tiles_for,
    width_of,
)
from attention.kernels.cuda.runtime import program as runtime_program
from tests.support.cuda_compiled import REGISTERS, needs_nvrtc, report

LIMITS = {"sm_80": 166_912, "sm_86": 101_376, "sm_89": 101_376, "sm_90a": 232_448, "sm_100": 232_448, "sm_120": 101_376}
"""Bytes of shared memory available to a block on each architecture."""
SPILLED, SPILLED_BY_OTHERS = 128, 192
"""Bytes per thread that may be spilled: pointers and numbers that a tile needs once, never an accumulator.

Measured with NVRTC 13.0 of MLX's CUDA build and later ones: 13.5 spills up to 180 in five kernels.
"""
MASKS = (None, "bool", "float32")
PAIRS = [*((width, width) for width in WIDTHS), (192, 128), (64, 256), (256, 64), (96, 128)]


def forward(
    architecture,
    dims,
    mask=None,
    rows=4096,
    causal=True,
    window=False,
    softcap=False,
    split=False,
    element="bf16",
    lists=False,
    alibi=False,
):
    tiles = tiles_for(*dims, rows, mask is not None, LIMITS[architecture])
    few = rows <= portable_forward.FEW_ROWS and not lists
    kind = (causal, window, softcap, mask, element, lists, alibi)
    return PortableForward(*dims, *kind, few, split, False, tiles, architecture)


def backward(
    architecture,
    dims,
    mask=None,
    causal=True,
    window=False,
    softcap=False,
    element="bf16",
    lists=False,
    alibi=False,
):
    widths = widths_of(*dims)
    tiles = backward_tiles_for(*widths, LIMITS[architecture])
    vectors = architecture not in ("sm_80", "sm_86", "sm_89")
    kind = (causal, window, softcap, mask, element, lists, alibi)
    return PortableBackward(*widths, *kind, False, tiles, architecture, vectors)


ANY_PAIRS = list(product(WIDTHS, WIDTHS))
ALL = [
    *(forward(*each, rows) for *each, rows in product(LIMITS, ANY_PAIRS, MASKS, (4096, 16, 32, 64))),
    *(backward(*each) for each in product(LIMITS, ANY_PAIRS, MASKS)),
]


@pytest.mark.parametrize("architecture", LIMITS)
def test_the_blocks_of_a_multiprocessor_fit_its_shared_memory(architecture):
    of_a_multiprocessor = LIMITS[architecture] + 1024
    for kernel in (kernel for kernel in ALL if kernel.architecture == architecture):
        assert kernel.program.shared_memory <= LIMITS[architecture], kernel
        assert kernel.tiles.blocks * (kernel.program.shared_memory + 1024) <= of_a_multiprocessor, kernel


def test_tiles_take_the_shared_memory_that_is_counted_by_hand():
    tiles = ForwardTiles(warps=4, row_tiles=2, block_n=64, stages=2, blocks=2)
    row = 128 * 2 + 16  # 128 elements and 16 bytes of padding
    assert tiles.shared_memory(128, 128, split=False) == 128 * row + 2 * (64 + 64) * row == 104_448
    assert tiles.shared_memory(64, 128, split=False) == 128 * row + 2 * 64 * (
        row + 144
    )  # the output needs the wider rows
    assert tiles.shared_memory(64, 128, split=True) == 128 * 144 + 2 * 64 * (row + 144)


def test_threads_copy_a_tile_in_whole_passes():
    """The assertions of tiles.cuh: units of 16 bytes per row of threads, in powers of two."""
    for kernel in ALL:
        tiles = kernel.tiles
        of_queries = tiles.block_m if isinstance(tiles, ForwardTiles) else tiles.block_q
        of_keys = tiles.block_n if isinstance(tiles, ForwardTiles) else tiles.block_k
        for width, rows in product((kernel.head_dim, kernel.value_dim), (of_queries, of_keys)):
            units = width // 8
            high = kernel.program.threads // (units & -units)
            assert rows % high == 0 or high % rows == 0, kernel


def test_the_warps_of_a_backward_block_share_out_whole_matrices():
    for kernel in ALL:
        if isinstance(kernel, PortableForward):
            continue
        tiles = kernel.tiles
        assert tiles.block_q % (16 * tiles.query_warps) == 0, kernel
        assert kernel.head_dim * tiles.query_warps % (16 * tiles.warps) == 0, kernel
        for width in (kernel.head_dim, kernel.value_dim):
            assert width % (16 * tiles.column_warps) == 0, kernel


@pytest.mark.parametrize("dim", [8, 32, 40, 64, 72, 80, 88, 96, 104, 128, 136, 192, 200, 256])
def test_every_head_dim_has_a_width(dim):
    assert dim <= width_of(dim) <= 2 * max(dim, 16)


@pytest.mark.parametrize(
    ("tiles", "blocks", "slots"), [(1, 1, 264), (128, 8, 1056), (512, 8, 1056), (16, 600, 264), (3, 2, 9)]
)
def test_splits_cover_all_keys_and_keep_the_gpu_busy(tiles, blocks, slots):
    each = split_keys(tiles, blocks, slots)
    splits = -(-tiles // each)
    assert (splits - 1) * each < tiles <= splits * each
    assert splits <= portable_forward.MAX_SPLITS
    if blocks >= 2 * slots:
        assert splits == 1


SAMPLE = [
    forward("sm_80", (128, 128)),
    forward("sm_86", (128, 128), causal=False),
    forward("sm_90a", (128, 128), softcap=True, window=True),
    forward("sm_90a", (64, 64), causal=False, element="f16"),
    forward("sm_89", (256, 256)),
    forward("sm_90a", (80, 80), mask="bool"),
    forward("sm_90a", (128, 128), mask="float32", rows=16, split=True),
    forward("sm_120", (192, 128), mask="bfloat16"),
    backward("sm_80", (128, 128)),
    backward("sm_86", (256, 256)),
    backward("sm_90a", (64, 64), causal=False, element="f16"),
    backward("sm_90a", (128, 128), mask="float32", softcap=True),
    backward("sm_100", (192, 128), window=True),
    forward("sm_80", (128, 128), causal=False, lists=True),
    forward("sm_80", (64, 64), rows=16, causal=False, split=True, lists=True),
    backward("sm_80", (128, 128), causal=False, lists=True),
    replace(forward("sm_86", (96, 96), mask="float32"), narrow_steps=True),
    replace(backward("sm_80", (64, 64), mask="bool"), narrow_steps=True),
]
REST = [
    *(
        forward(a, dims, mask, rows, split=rows < 4096)
        for a, dims, mask, rows in product(LIMITS, PAIRS, MASKS, (4096, 32))
    ),
    *(forward(a, dims, None, softcap=True, window=True) for a, dims in product(LIMITS, PAIRS)),
    *(backward(a, dims, mask, softcap=mask is not None) for a, dims, mask in product(LIMITS, PAIRS, MASKS)),
    *(
        made(a, dims, mask, causal=False, lists=True)
        for made, a, dims, mask in product((forward, backward), ("sm_80", "sm_86", "sm_90a"), PAIRS, (None, "float32"))
    ),
]


def assert_compiles(kernel):
    found = report(kernel.program)
    assert found.spilled <= (SPILLED if runtime_program.version() <= (13, 0) else SPILLED_BY_OTHERS), found.log
    assert found.registers * kernel.program.threads * kernel.tiles.blocks <= REGISTERS


@needs_nvrtc
@pytest.mark.parametrize("kernel", SAMPLE, ids=str)
def test_kernels_compile_and_keep_to_their_registers(kernel):
    assert_compiles(kernel)


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("kernel", REST, ids=str)
def test_all_kernels_compile_and_keep_to_their_registers(kernel):
    assert_compiles(kernel)


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_the_passes_before_and_after_compile(architecture):
    kernel = backward(architecture, (128, 64))
    both = (kernel, replace(kernel, narrow_steps=True))
    rows = (made.rows_program(of_logsumexp) for made, of_logsumexp in product(both, (True, False)))
    for program in (*rows, kernel.finish_program):
        assert report(program).registers <= 128


@needs_nvrtc
def test_a_gpu_unknown_to_nvrtc_gets_the_nearest_lower_code(monkeypatch):
    monkeypatch.setattr(runtime_program, "targets", lambda: (75, 80, 86, 90, 100))
    expected = {"sm_80": "sm_80", "sm_87": "sm_86", "sm_89": "sm_86", "sm_90a": "sm_90a", "sm_103": "sm_100"}
    assert {name: runtime_program.target_for(name) for name in expected} == expected
    assert runtime_program.target_for("sm_120") == "compute_100"  # machine code of another family does not run on it
    with pytest.raises(KernelUnavailable, match="no GPU as old as sm_70"):
        runtime_program.target_for("sm_70")


@needs_nvrtc
def test_a_virtual_architecture_gives_ptx():
    code, _ = runtime_program.build('extern "C" __global__ void f() {}', ["--gpu-architecture=compute_80"])
    assert b".target sm_80" in code
