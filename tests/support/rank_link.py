"""One rank of two: measures the link, lets the planner choose, and times a decode step each way.

Rank 0 prints a line of JSON after `FOUND`.
"""

import statistics
import sys
import time
from typing import Final

import mlx.core as mx
import msgspec

from attention.core.workload import Workload
from attention.distributed.bound_call import BoundCall
from attention.distributed.decision import Method, decide
from attention.engine.ranks import measure_group
from attention.measure.device import probe

STEP: Final = Workload(batch=2, kv_seq=2048, heads=63, head_dim=64, dtype="float32", pass_="decode")
"""Its heads do not divide by two."""
SAMPLES: Final = 3


def main() -> int:
    group = mx.distributed.init(strict=True, backend="ring")
    conditions = measure_group(group, probe(), None, alike=True)
    seconds = {}
    methods: tuple[Method, ...] = ("split keys", "alone")
    for method in methods:
        call = BoundCall(STEP, group, decide(STEP, group.size(), method=method), "baseline")
        times = []
        for _ in range(SAMPLES):
            call.barrier()
            started = time.perf_counter()
            call.wait(call.queue())
            times.append(max(call.of_ranks(time.perf_counter() - started)))
        seconds[method] = statistics.median(times)
    if group.rank() == 0:
        decision = decide(
            STEP,
            group.size(),
            link=conditions.link,
            flops_per_s=conditions.flops_per_s,
            memory_bytes_per_s=conditions.memory_bytes_per_s,
        )
        found = {"method": decision.method, "seconds": seconds, "conditions": conditions}
        print("FOUND", msgspec.json.encode(found).decode(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
