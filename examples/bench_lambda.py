"""A lambda in this process, as in a notebook; the rows as they are measured, and as JSON."""

import mlx.core as mx

from attention import bench

plain = {"mine": lambda q, k, v, scale: mx.softmax(q @ k.swapaxes(-1, -2) * scale, axis=-1) @ v, "baseline": "baseline"}
result = bench({"seq": 64, "dtype": "float32"}, plain, seconds=0.3, in_process=True)
for workload, row in result:
    print(workload.label, row.implementation, row.call_s.median if row.call_s else row.reason)
result.save("mine.json")  # then: fatui history add mine.json, fatui compare mine.json other.json
