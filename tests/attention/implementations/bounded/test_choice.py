"""Practical's choices for a GPU, made without one: slices within the budget if the whole call does not fit."""

import math
from collections.abc import Callable
from typing import Literal

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from attention.core.route import NO_NEEDS, Needs
from attention.core.workload import Pass, Workload
from attention.implementations import calls
from attention.implementations.bounded.blocks import (
    MAX_TINY_TILES,
    MIB,
    Blocks,
    is_affordable,
    tile_bytes,
    visible_tiles,
)
from attention.implementations.bounded.explain import explain, strategy_text
from attention.implementations.bounded.implementation import Practical
from attention.implementations.bounded.memory import RESIDENT_TILES, UNORDERED, fence_on_completion, tile_order
from attention.implementations.bounded.policy import (
    MaskCopies,
    Strategy,
    choose_strategy,
    problem_size,
    size_text,
    skipped_share,
    slice_size,
    slices_bytes,
)
from attention.implementations.calls import call_signature, make_inputs
from attention.implementations.mlx_sdpa import fused_bytes
from attention.masks import Mask
from attention.measure.device import Backend
from tests.support.attention_examples import CPU
from tests.support.marks import slow

GPU = structs.replace(CPU, backend="cuda")
LONG = Workload(seq=16384, heads=8, head_dim=256, dtype="bfloat16")

workloads = st.builds(
    lambda kv_heads, group, **rest: Workload(kv_heads=kv_heads, heads=kv_heads * group, **rest),
    kv_heads=st.integers(1, 8),
    group=st.sampled_from([1, 4]),
    batch=st.integers(1, 4),
    seq=st.integers(1, 20_000),
    kv_seq=st.integers(1, 20_000),
    head_dim=st.sampled_from([64, 256]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    mask=st.sampled_from(["none", "causal", "window:300"]),
    pass_=st.sampled_from(["forward", "training"]),
)


@settings(max_examples=40, deadline=None)
@given(workloads, st.sampled_from([16, 256, 2048]), st.sampled_from(["cuda", "metal"]))
def test_slices_fit_the_budget_wherever_any_slice_can(workload: Workload, mebibytes: int, backend: Backend) -> None:
    size = slice_size(workload, backend, NO_NEEDS, mebibytes * MIB)
    if size is None:
        smallest = Blocks(batches=1, kv_heads=1, rows=1, keys=workload.kv_seq)
        assert slices_bytes(workload, smallest, backend, NO_NEEDS) > mebibytes * MIB
        return
    count = -(-workload.batch // size.batches) * -(-workload.kv_heads // size.kv_heads) * -(-workload.seq // size.rows)
    taken = slices_bytes(workload, size, backend, NO_NEEDS)
    assert is_affordable(count, max(taken, mebibytes * MIB))
    assert taken <= mebibytes * MIB or count * 4 > MAX_TINY_TILES  # fewer than these are as small as the budget
    assert 1 <= size.rows <= workload.seq
    assert size.rows % 128 == 0 or size.rows < 128 or size.rows == workload.seq


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("pass_", ["forward", "training"])
@pytest.mark.parametrize("budget", [1 << 12, 1 << 16, 1 << 20])
def test_a_tiny_budget_gives_no_more_parts_than_a_graph_takes(
    budget: int, pass_: Literal["forward", "training"]
) -> None:
    workload = Workload(batch=32, seq=1024, heads=32, head_dim=64, mask="causal", pass_=pass_)
    made = choose_strategy(workload, "cuda", NO_NEEDS, budget)
    tile = made.backward_blocks if pass_ == "training" else made.blocks
    assert visible_tiles(problem_size(workload, "cuda"), tile) <= 4096
    for size in (made.slices, made.backward_slices):
        parts = size and -(-32 // size.batches) * -(-32 // size.kv_heads) * -(-1024 // size.rows)
        assert not parts or parts <= 4096


def strategy_of(workload: Workload, mebibytes: int, needs: Needs = NO_NEEDS) -> Strategy:
    return choose_strategy(workload, "cuda", needs, mebibytes * MIB)


def plant(monkeypatch: pytest.MonkeyPatch, why_unfused: Callable[..., str | None]) -> None:
    """Pretend that MLX's SDPA has fused kernels for other shapes."""
    monkeypatch.setattr("attention.implementations.bounded.policy.why_unfused", why_unfused)


def test_what_fits_is_left_to_mlx() -> None:
    assert strategy_text(strategy_of(structs.replace(LONG, seq=512, kv_seq=512), 2048)) == "whole"


def test_slices_that_do_not_fit_together_wait() -> None:
    made = strategy_of(LONG, 2560)
    assert (strategy_text(made), made.waits) == ("slices", True)
    assert made.slices is not None
    assert made.slices.rows * made.slices.kv_heads < LONG.seq * LONG.heads
    assert "the budget is 2,560 MiB" in made.reason


def test_where_no_slice_fits_blocks_are_taken() -> None:
    made = strategy_of(LONG, 64)  # less than the sums of dK and dV of one head
    assert (strategy_text(made), made.backward_slices) == ("slices, blocks behind", None)
    assert made.reason.endswith("the budget is 64 MiB, and no slice of a backward pass fits it")
    training = structs.replace(LONG, pass_="training")
    assert Practical(64 * MIB).route(LONG, GPU).path == "slices 384 x 16384"
    assert Practical(64 * MIB).route(training, GPU).path == "blocks 512 x 1024"
    assert strategy_text(choose_strategy(LONG, "cuda", NO_NEEDS, 10_000)) == "blocks"


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("pass_", ["forward", "training"])
@pytest.mark.parametrize("mebibytes", [256, 2560])
def test_no_other_slices_would_be_fewer(mebibytes: int, pass_: Literal["forward", "training"]) -> None:
    workload = structs.replace(LONG, batch=2, pass_=pass_)

    def count(size: Blocks) -> int:
        parts = ((2, size.batches), (8, size.kv_heads), (16384, size.rows))
        return math.prod(math.ceil(whole / part) for whole, part in parts)

    tried = (
        Blocks(batches=batches, kv_heads=kv_heads, rows=rows, keys=16384)
        for batches, kv_heads in ((2, 8), (1, 8), (1, 4), (1, 2), (1, 1))
        for rows in range(128, 16385, 128)
    )
    fitting = [size for size in tried if slices_bytes(workload, size, "cuda", NO_NEEDS) <= mebibytes * MIB]
    made = slice_size(workload, "cuda", NO_NEEDS, mebibytes * MIB)
    assert made is not None
    assert count(made) == min(map(count, fitting))


def test_where_only_the_gradient_is_too_large_it_is_sliced() -> None:
    made = strategy_of(structs.replace(LONG, seq=8192, kv_seq=8192), 3000)
    assert (strategy_text(made), made.waits) == ("whole, slices behind", True)


@pytest.mark.parametrize(("pass_", "gradients"), [("forward", True), ("training", False)])
def test_scores_of_gradients_are_named_as_such(pass_: Pass, gradients: bool) -> None:
    reason = choose_strategy(Workload(seq=2048, pass_=pass_), "cpu", NO_NEEDS, 256 * MIB).reason
    assert ("with gradients, for which the path has to hold too" in reason) is gradients
    assert "the scores need 624 MiB, the budget is 256 MiB" in reason


def test_what_fits_forward_is_not_sliced_for_its_mask() -> None:
    causal = structs.replace(LONG, seq=8192, kv_seq=8192, mask="causal")
    assert skipped_share(causal, Blocks(batches=1, kv_heads=1, rows=128, keys=1)) > 0.4
    assert strategy_text(strategy_of(causal, 30_000)) == "whole"
    assert strategy_text(strategy_of(causal, 3000)) == "whole, slices behind"


def test_what_mlx_cannot_do_is_done_in_blocks_there_too() -> None:
    assert strategy_text(strategy_of(LONG, 2560, Needs(softcap=True))) == "blocks"


@pytest.mark.parametrize(("seq", "path"), [(8192, "whole + slices 8192"), (16384, "slices 8192 x 16384")])
def test_a_path_tells_whole_numbers_in_the_width_of_its_column(seq: int, path: str) -> None:
    training = structs.replace(LONG, seq=seq, kv_seq=seq, pass_="training")
    assert Practical(3000 * MIB).route(training, GPU).path == path
    assert len(path) <= 22


def test_sinks_are_reported_as_the_blocks_that_take_them() -> None:
    practical = Practical(3000 * MIB)
    assert practical.route(LONG, GPU).path.startswith("slices ")
    reported = practical.route(LONG, GPU, Needs(sinks=True))
    assert reported.path == "blocks 256 x 16384"
    tile = tile_bytes(problem_size(LONG, "cuda"), practical.strategy(LONG, GPU).blocks)
    assert reported.predicted_bytes == LONG.output_bytes + 4 * LONG.heads * LONG.seq + int(
        RESIDENT_TILES["cuda"] * tile
    )


def test_slices_of_the_gradient_alone_are_explained() -> None:
    workload = structs.replace(LONG, seq=8192, kv_seq=8192)
    reported = {fact.what: fact for fact in explain(Practical(3000 * MIB), workload, GPU)}
    behind = slice_size(structs.replace(workload, pass_="training"), "cuda", NO_NEEDS, 3000 * MIB)
    assert behind is not None
    assert reported["way"].value == "whole, slices behind"
    assert reported["behind"].why == "what is cut is the backward pass alone"
    assert (reported["rows"].value, reported["heads"].value) == (f"{behind.rows:,}", f"1 x {behind.kv_heads}")


def test_a_fused_gradient_beyond_the_budget_is_sliced(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, lambda *strategy_of: None)
    many = Workload(batch=4, seq=8192, heads=32, head_dim=128, dtype="bfloat16", mask="causal")
    few_keys = structs.replace(many, kv_seq=4)
    for workload in (many, few_keys):
        made = strategy_of(workload, 512)
        assert strategy_text(made) == "fused, slices behind"
        assert made.reason.startswith("MLX's fused kernels need 520 MiB, with what they make of a mask; the budget")
        assert strategy_text(strategy_of(workload, 521)) == "fused"


@pytest.mark.parametrize("backend", ["cuda", "metal"])
@pytest.mark.parametrize("fused", [True, False])
def test_arrays_beside_a_mask_of_every_head_count(
    fused: bool, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = None if fused else "no"
    plant(monkeypatch, lambda *strategy_of: refusal)
    workload, needs = structs.replace(LONG, seq=2048, kv_seq=2048), Needs(array_mask=True)
    converted = MaskCopies(batches=1, heads=8, pair_bytes=12)
    budget = converted.size(workload) - MIB
    made = choose_strategy(workload, backend, needs, budget, converted)
    assert strategy_text(made) == "slices"
    assert made.slices is not None
    assert slices_bytes(workload, made.slices, backend, needs, converted) <= budget


def test_a_bool_mask_counts_as_mlx_converts_it_on_cuda() -> None:
    window = structs.replace(LONG, head_dim=64, value_dim=64, mask="window:100")
    scores = window.scores * 2
    assert fused_bytes(window, "cuda") - window.output_bytes > 2 * scores
    assert fused_bytes(window, "metal") - window.output_bytes < scores


def test_only_on_cuda_evaluation_waits_for_what_is_done() -> None:
    assert (
        tile_order("cuda").next is tile_order("cuda").alone is fence_on_completion
    )  # there is no CUDA here, and no launcher
    assert tile_order("metal") is tile_order("cpu") is UNORDERED


@pytest.mark.compiles
def test_the_fence_works_in_any_function() -> None:
    def function(x: mx.array) -> mx.array:
        total = x
        for _ in range(3):
            (total,) = mx.depends([total * 2], fence_on_completion([total]))
        return total.sum()

    x = mx.arange(4.0)
    assert function(x).item() == 48
    assert mx.compile(function)(x).item() == 48
    assert mx.grad(function)(x).tolist() == [8, 8, 8, 8]


def fuses_multiples_of_128(workload: Workload, backend: Backend, needs: Needs = NO_NEEDS) -> str | None:
    """The message of MLX's CUDA backend about a training pass."""
    return f"{workload.seq} rows" if workload.pass_ == "training" and workload.seq % 128 else None


@pytest.mark.parametrize("rows", [1, 127, 128, 3000, 3072])
def test_a_backward_slice_has_rows_that_mlx_fuses(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, fuses_multiples_of_128)
    workload = Workload(seq=rows, heads=2, head_dim=64, mask="causal", pass_="training")
    size = slice_size(workload, "cuda", NO_NEEDS, 10_000 * MIB)
    assert size is not None
    assert size.rows == (rows if rows < 128 else rows - rows % 128)


def test_a_gradient_fused_for_few_rows_is_sliced_where_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch, fuses_multiples_of_128)
    workload = Workload(batch=4, seq=2047, heads=16, head_dim=64, mask="causal")
    made = strategy_of(workload, 8000)
    assert (strategy_text(made), made.waits) == ("fused, slices behind", False)
    assert made.reason == "2047 rows; slices of such rows have one"
    assert strategy_text(strategy_of(structs.replace(workload, batch=1, heads=2, kv_heads=2), 8000)) == "fused"
    assert strategy_text(strategy_of(structs.replace(workload, seq=2048, kv_seq=2048), 8000)) == "fused"


def test_a_large_size_is_said_in_a_unit_that_fits_it():
    assert [size_text(size) for size in (2**26, 5 * 2**29, 2**34, 2_747_119 * 2**20)] == [
        "64 MiB",
        "2,560 MiB",
        "16 GiB",
        "2,683 GiB",
    ]


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("dtype", [mx.bool_, slow(mx.float32), mx.float16], ids=str)
@pytest.mark.parametrize("heads", [1, slow(4)])
def test_the_route_of_an_array_mask_is_the_path_that_runs(dtype: mx.Dtype, heads: int) -> None:
    workload = Workload(seq=150, heads=4, head_dim=16, dtype="float16")
    q, k, v = make_inputs(workload, 0)
    mask = Mask(array=mx.zeros((1, heads, 150, 150), dtype))
    strategy_of, needs = call_signature(q, k, v, mask, None)
    for kibibytes in range(125, 4500, 175):
        practical = Practical(kibibytes * 1024)
        calls.take_path()
        mx.eval(practical(q, k, v, scale=0.25, mask=mask))
        assert calls.take_path() == practical.route(strategy_of, CPU, needs).path, kibibytes


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_output_in_tf32_has_no_gradient_in_blocks(monkeypatch, dtype):
    """With scores near a million another key wins in TF32; gradients in blocks are not in it and were in the 1000s."""
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    found = {
        (made.forward.name, made.backward.name)
        for budget in (1 << 16, 1 << 18, 1 << 20, 1 << 22)
        for seq in (64, 256, 1024)
        for batch, heads, dim in ((1, 1, 64), (3, 1, 64), (1, 8, 64), (1, 4, 320))
        for made in [
            Practical(budget).strategy(Workload(batch=batch, heads=heads, seq=seq, head_dim=dim, dtype=dtype), GPU)
        ]
    }
    by_blocks = {forward for forward, backward in found if backward == "BLOCKS"}
    assert by_blocks == {"BLOCKS"}
    assert any(forward != "BLOCKS" for forward, _ in found)
