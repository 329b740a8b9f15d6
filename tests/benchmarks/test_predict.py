"""Predictions of attention over more GPUs than there are."""

from attention.core.workload import Workload
from benchmarks.distributed.predict import predict

WORKLOAD = Workload(seq=4096, heads=32, kv_heads=8, head_dim=128, dtype="bfloat16", mask="causal")


def test_more_ranks_take_less_time_at_a_lower_share():
    two, four = (predict(WORKLOAD, ranks, 1e-3) for ranks in (2, 4))
    assert four["ranks_s"] < two["ranks_s"] < 1e-3
    assert four["share_of_ideal"] < two["share_of_ideal"] < 1


def test_a_rank_computes_its_part_and_waits_for_copies():
    row = predict(WORKLOAD, 2, 1e-3)
    assert row["compute_s"] >= 0.5e-3
    # rank 0 has the last quarter of the rows, and needs the two quarters before, 2048 rows of 4 KiB
    assert row["received_bytes"] == 2048 * 8 * 2 * 128 * 2
    assert row["ranks_s"] > row["compute_s"] + row["received_bytes"] / 345e9
