"""The signature of a call, and the memory of one."""

import gc
from typing import Any

import mlx.core as mx

from attention.core.mask_text import MaskSpec
from attention.core.workload import Workload
from attention.implementations.baseline import Baseline
from attention.implementations.calls import MlxRunner, call_signature, make_inputs
from attention.masks import Mask, of_workload

KEYS = 300


def signature(mask: Mask) -> Workload:
    """Return the workload of a call with 256 queries, 300 keys and a mask."""
    q, k = mx.zeros((1, 4, 256, 16)), mx.zeros((1, 2, KEYS, 16))
    return call_signature(q, k, k, mask, None)[0]


def test_bounds_are_the_workload_s_mask() -> None:
    assert signature(Mask()).mask == "none"
    assert signature(Mask(causal=True)).mask == "causal"
    assert signature(Mask(window=9)).mask == "window:9"
    assert signature(Mask(causal=True, window=KEYS)).mask == "causal"


def test_a_pattern_is_structured_with_its_own_pairs() -> None:
    requested = Workload(mask="prefix:40+documents:70", seq=256, kv_seq=KEYS, heads=4)
    found = signature(of_workload(requested))
    assert found.structured
    assert abs(found.pairs - requested.pairs) <= requested.scores * 1e-6
    assert found.mask_spec == MaskSpec(pattern=found.mask_spec.pattern)


class CollectingBaseline(Baseline):
    """Baseline attention during which Python collects garbage."""

    def __call__(self, *arguments: Any, **options: Any) -> mx.array:
        gc.collect()
        return super().__call__(*arguments, **options)


def test_arrays_in_cycles_are_not_subtracted_from_a_peak() -> None:
    workload = Workload(seq=64, heads=2, head_dim=16)
    runner = MlxRunner(CollectingBaseline(), workload, make_inputs(workload, 0), workload.scale)
    cycle: list[Any] = [mx.zeros(2**20)]
    mx.eval(cycle[0])
    cycle.append(cycle)
    del cycle
    assert (runner.peak_bytes() or 0) >= workload.output_bytes
