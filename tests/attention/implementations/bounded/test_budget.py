"""Practical's memory guarantee: for any shape, no call uses more than the budget above inputs and outputs."""

import time
from statistics import median

import mlx.core as mx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from attention.core.workload import DType, Workload
from attention.implementations.bounded.blocks import MIB
from attention.implementations.bounded.implementation import Practical
from attention.implementations.calls import make_inputs, runner_for
from attention.implementations.mlx_sdpa import MlxSdpa
from attention.implementations.protocol import Implementation
from attention.masks import Mask
from attention.measure.device import Backend, probe
from tests.support.marks import slow


def excess(implementation: Implementation, workload: Workload) -> int:
    """Return the peak bytes above inputs and outputs."""
    peak = runner_for(implementation, workload, make_inputs(workload, 0), workload.scale).peak_bytes()
    assert peak is not None
    return peak - workload.output_bytes


workloads = st.builds(
    lambda kv_heads, group, **rest: Workload(kv_heads=kv_heads, heads=kv_heads * group, **rest),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 4]),
    batch=st.integers(1, 2),
    seq=st.integers(1, 500),
    kv_seq=st.integers(1, 700),
    head_dim=st.sampled_from([16, 64, 80, 128, 256, 512]),
    value_dim=st.sampled_from([32, 64, 128, 512]),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    mask=st.sampled_from(["none", "causal", "window:40", "window:300"]),
    pass_=st.sampled_from(["forward", "training"]),
)


@settings(max_examples=10, deadline=None)
@given(workloads, st.integers(2, 6))
def test_no_shape_takes_more_than_its_budget(workload: Workload, mebibytes: int) -> None:
    assume(workload.scores * (workload.head_dim + workload.value_dim) < 5e7)  # keeps it quick
    assert excess(Practical(mebibytes * MIB), workload) <= mebibytes * MIB


@pytest.mark.sampled(0.15)
@pytest.mark.parametrize("mebibytes", [1, slow(5)])
@pytest.mark.parametrize("backend", ["cpu", "cuda"])
@pytest.mark.parametrize("query_type", ["float32", "float16"])
@pytest.mark.parametrize("dtype", [mx.bool_, mx.float32, mx.float16], ids=str)
def test_an_array_mask_for_every_head_stays_within_the_budget(
    dtype: mx.Dtype, query_type: DType, backend: Backend, mebibytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # decided as for a GPU, computed here: without waiting, the memory use is at least as large
    monkeypatch.setattr("attention.implementations.bounded.implementation.current_backend", lambda: backend)
    workload = Workload(seq=450, heads=4, head_dim=16, dtype=query_type)
    q, k, v = make_inputs(workload, 0)
    drawn = mx.random.uniform(shape=(1, 4, 450, 450), key=mx.random.key(2)) > 0.3
    array = drawn if dtype == mx.bool_ else mx.where(drawn, mx.array(0.0, dtype), mx.array(-mx.inf, dtype))
    mx.eval(array)
    del drawn
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(Practical(mebibytes * MIB)(q, k, v, scale=0.25, mask=Mask(array=array)))
    assert mx.get_peak_memory() - before - workload.output_bytes <= mebibytes * MIB


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("mebibytes", [1, slow(5), slow(10)])
@pytest.mark.parametrize("backend", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_sinks_stay_within_the_budget(
    dtype: DType, backend: Backend, mebibytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attention.implementations.bounded.implementation.current_backend", lambda: backend)
    workload = Workload(seq=450, heads=4, head_dim=16, dtype=dtype)
    q, k, v = make_inputs(workload, 0)
    sinks = mx.zeros((4,))
    mx.eval(sinks)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(Practical(mebibytes * MIB)(q, k, v, scale=0.25, mask=Mask(causal=True), sinks=sinks))
    assert mx.get_peak_memory() - before - workload.output_bytes <= mebibytes * MIB


@pytest.mark.slow
def test_training_at_4096_peaks_at_a_third_of_mlxs_at_most() -> None:
    workload = Workload(seq=4096, heads=2, head_dim=16, dtype="float32", pass_="training")
    ours, mlxs = (
        runner_for(one, workload, make_inputs(workload, 0), workload.scale).peak_bytes() or 0
        for one in (Practical(), MlxSdpa())
    )
    assert ours <= mlxs / 3


def times_as_fast(practical: Practical, workload: Workload, rounds: int) -> float:
    """Return the speedup over the unfused path in CPU time, which other processes do not affect."""
    inputs = make_inputs(workload, 0)
    runners = [runner_for(one, workload, inputs, workload.scale) for one in (practical, MlxSdpa())]
    ratios = []
    for turn in range(rounds):
        seconds = []
        for runner in runners:
            started = time.process_time()
            runner.results()
            seconds.append(time.process_time() - started)
        ratios += [seconds[1] / seconds[0]] if turn else []
    return median(ratios)


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["none", "causal"])
@pytest.mark.parametrize("pass_", ["forward", "training"])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_it_is_about_as_fast_as_an_unfused_path_that_fits(head_dim: int, pass_: str, mask: str) -> None:
    workload = Workload(seq=512, heads=4, head_dim=head_dim, dtype="float32", mask=mask, pass_=pass_)  # type: ignore[arg-type]
    assert times_as_fast(Practical(), workload, rounds=7) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("pass_", ["forward", "training"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_blocks_that_skip_nothing_are_not_much_slower_either(head_dim: int, pass_: str) -> None:
    workload = Workload(seq=2048, heads=1, head_dim=head_dim, dtype="float32", pass_=pass_)  # type: ignore[arg-type]
    practical = Practical(32 * MIB)
    assert practical.route(workload, probe()).path.startswith("blocks")
    assert times_as_fast(practical, workload, rounds=5) >= 0.9
