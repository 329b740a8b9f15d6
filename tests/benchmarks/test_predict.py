"""Predictions of attention over more GPUs than there are."""

import pytest

from attention.core.workload import Workload
from benchmarks.distributed.link import fitted
from benchmarks.distributed.predict import H200, PeerLink, predict

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
    assert row["ranks_s"] > row["compute_s"] + row["received_bytes"] / H200.pull_bytes_per_s


def test_the_link_is_what_its_times_say():
    few, many = 1 << 20, 1 << 26

    def seconds(count: int) -> dict[str, float]:
        within = 5e-6 + count / 1.5e12
        return {"bytes": count, "within_s": within, "peer_copies_s": 20e-6 + count / 1.5e12 + count / 300e9}

    found = fitted([seconds(few), seconds(many)], 2)
    assert found["send_bytes_per_s"] == pytest.approx(1.5e12)
    assert found["pull_bytes_per_s"] == pytest.approx(300e9)
    assert found["latency_s"] == pytest.approx(20e-6, rel=0.3)


def test_a_slower_link_lowers_the_share():
    slow = predict(WORKLOAD, 4, 1e-3, PeerLink(pull_bytes_per_s=50e9))
    assert slow["share_of_ideal"] < predict(WORKLOAD, 4, 1e-3)["share_of_ideal"]
