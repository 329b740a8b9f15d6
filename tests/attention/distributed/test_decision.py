"""The choice among ways to share a call: decode steps, where dividing does not always pay."""

import pytest

from attention.core.workload import Workload
from attention.distributed.decision import Link, decide

MERGE = Link(bytes_per_s=300e9, latency_s=20e-6, merge_s=10e-6)


def step(keys: int, kv_heads: int = 7) -> Workload:
    """Return a decode step whose heads do not divide by two."""
    return Workload(kv_seq=keys, heads=4 * kv_heads, kv_heads=kv_heads, head_dim=128, dtype="bfloat16", pass_="decode")


@pytest.mark.parametrize(("keys", "method"), [(4096, "alone"), (131072, "split keys")])
def test_few_keys_are_not_divided(keys, method):
    assert decide(step(keys), 2, link=MERGE).method == method


def test_a_slower_merge_takes_more_keys_to_pay():
    keys = 65536
    assert decide(step(keys), 2, link=MERGE).method == "split keys"
    assert decide(step(keys), 2, link=Link(merge_s=300e-6)).method == "alone"


def test_without_a_measured_merge_it_takes_two_collectives():
    assert decide(step(65536), 2, link=Link(latency_s=150e-6)).method == "alone"


def test_a_decision_says_what_one_rank_would_take():
    decision = decide(step(4096), 2, link=MERGE, sharded_by="sequence")
    assert decision.method == "split keys"
    assert "one rank alone would take" in decision.reason


def test_alone_every_rank_computes_all_and_sends_nothing():
    decision = decide(step(4096), 2, link=MERGE)
    assert decision.bytes_sent == (0, 0)
    assert decision.flops[0] == step(4096).flops
    assert decision.layout == "replicated"
