"""The planner's choice over a real link of two network namespaces, a veth pair whose rate the kernel limits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from attention.engine.ranks import Conditions
from tests.support.patience import patient
from tests.support.rank_link import STEP
from tests.support.two_hosts import ADDRESSES, VethHosts, unavailable

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "available")]
PORT = 32323


class Found(msgspec.Struct):
    """What a group measured and chose."""

    method: str
    seconds: dict[str, float]
    conditions: Conditions


def run_on(hosts: VethHosts, folder: Path) -> Found:
    path = folder / "ring.json"
    path.write_text(json.dumps([[f"{address}:{PORT}"] for address in ADDRESSES]))
    command = [sys.executable, "-m", "tests.support.rank_link"]
    ranks = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, *command],
            env=os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, name in enumerate(hosts.names)
    ]
    try:
        texts = [process.communicate(timeout=patient(100))[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    assert all(process.returncode == 0 for process in ranks), texts
    line = next(line for line in texts[0].splitlines() if line.startswith("FOUND "))
    return msgspec.json.decode(line[6:], type=Found)


@pytest.mark.parametrize(("bytes_per_s", "method"), [(2e5, "alone"), (None, "split keys")])
def test_a_slow_link_is_not_worth_its_bytes(tmp_path: Path, bytes_per_s: float | None, method: str):
    with VethHosts(tmp_path, bytes_per_s=bytes_per_s) as hosts:
        found = run_on(hosts, tmp_path)
    link = found.conditions.link
    sent = STEP.batch * STEP.heads * (4 * STEP.value_dim + 4)
    if bytes_per_s is not None:
        assert bytes_per_s / 2 < link.bytes_per_s < 1.3 * bytes_per_s
        assert found.seconds["split keys"] > sent / bytes_per_s / 2
    # what dividing the keys saves, against what moving the partial results takes
    memory_bytes_per_s = found.conditions.memory_bytes_per_s
    assert memory_bytes_per_s is not None
    computing_s = max(STEP.flops / found.conditions.flops_per_s, STEP.key_value_bytes / memory_bytes_per_s)
    moving_s = sent / link.bytes_per_s + 2 * link.latency_s
    assert found.method == method == ("alone" if moving_s > computing_s / 2 else "split keys")
