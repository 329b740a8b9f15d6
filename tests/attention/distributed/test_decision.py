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


def test_the_choice_changes_at_the_bandwidth_of_the_arithmetic():
    workload, memory = step(65536), 4e12
    sent = 4 * 7 * (2 * 128 + 4)
    saved_s = workload.key_value_bytes / memory / 2 - 2 * 5e-6
    for factor, method in ((0.9, "alone"), (1.1, "split keys")):
        link = Link(bytes_per_s=factor * sent / saved_s, latency_s=5e-6)
        assert decide(workload, 2, link=link, memory_bytes_per_s=memory).method == method


def test_an_all_to_all_of_heads_pays_where_keys_are_many_bytes():
    """With one query head a K/V head, rows to heads and back are fewer bytes than keys and values on eight ranks."""
    many = Workload(seq=8192, heads=32, head_dim=128, dtype="bfloat16", mask="causal")
    slow = Link(bytes_per_s=1e9)
    assert decide(many, 8, link=slow, sharded_by="sequence", all_to_all=True).method == "heads"
    assert decide(many, 8, link=slow, sharded_by="sequence").method == "context"
    few = Workload(seq=8192, heads=32, kv_heads=8, head_dim=128, dtype="bfloat16", mask="causal")
    assert decide(few, 2, link=slow, sharded_by="sequence", all_to_all=True).method == "context"
