"""Nsight Compute counters of one call of each kind, on a GPU: `python -m benchmarks.cuda.profiling`.

Requires `ncu` and permission to read the performance counters. Exit code 3: no ncu or no GPU.
"""

import csv
import os
import shutil
import subprocess
import sys
from typing import Final

from attention.kernels import cuda

SHAPES: Final = {  # batch, query and key heads, queries, keys, head dim
    "prefill 64": (4, 32, 32, 4096, 4096, 64),
    "prefill 128": (4, 16, 16, 4096, 4096, 128),
    "prefill 256": (4, 8, 8, 4096, 4096, 256),
    "small": (4, 8, 8, 256, 256, 64),
    "decode 8192": (1, 32, 8, 1, 8192, 128),
    "decode 131072": (1, 32, 8, 1, 131072, 128),
}
SECTIONS: Final = ("SpeedOfLight", "ComputeWorkloadAnalysis", "WarpStateStats", "MemoryWorkloadAnalysis")
WANTED: Final = (  # as Nsight Compute names them
    "Duration",
    "SM Frequency",
    "DRAM Throughput",
    "L2 Cache Throughput",
    "SM Busy",
    "Issue Slots Busy",
    "Executed Ipc Active",
    "Warp Cycles Per Issued Instruction",
)


def call(name: str) -> None:
    """Run a call three times."""
    import mlx.core as mx

    batch, heads, kv_heads, queries, keys, dim = SHAPES[name]
    shapes = ((batch, heads, queries, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim))
    q, k, v = (mx.random.normal(shape).astype(mx.bfloat16) for shape in shapes)
    for _ in range(3):
        mx.eval(cuda.flash_attention(q, k, v, scale=dim**-0.5))


def profiled(ncu: str, name: str) -> dict[str, str]:
    """Profile the last launch of a call; return the metrics as values with units, by name.

    Caches are flushed before a decode step: in a model, its K/V cache is read from device memory.
    """
    cache = "all" if "decode" in name else "none"
    command = [ncu, "--csv", "--clock-control", "none", "--cache-control", cache, "-k", "regex:flash"]
    sections = [word for section in SECTIONS for word in ("--section", section)]
    own = [sys.executable, "-m", "benchmarks.cuda.profiling", name]
    subprocess.run(own, check=True)  # compiles and checks
    run = subprocess.run(
        [*command, *sections, *own],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "MLX_USE_CUDA_GRAPHS": "0"},
    )
    return last_launch(run.stdout)


def last_launch(text: str) -> dict[str, str]:
    """Return the metrics of the last kernel in Nsight Compute's CSV output; other lines are ignored."""
    rows = list(csv.DictReader(line for line in text.splitlines() if line.startswith('"')))
    if not rows:
        raise RuntimeError("Nsight Compute saw no launch of a kernel whose name has `flash` in it")
    last = max(int(row["ID"]) for row in rows)
    return {row["Metric Name"]: f"{row['Metric Value']} {row['Metric Unit']}" for row in rows if int(row["ID"]) == last}


def main() -> int:
    """Print one line per call."""
    usable, reason = cuda.availability()
    ncu = shutil.which("ncu")
    if not usable or ncu is None:
        print(reason if not usable else "ncu is not on the PATH; the CUDA toolkit has it", file=sys.stderr)
        return 3
    for name in SHAPES:
        found = profiled(ncu, name)
        print(f"{name}: " + ", ".join(f"{metric} {found[metric]}" for metric in WANTED if metric in found), flush=True)
    return 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        call(sys.argv[1])
    else:
        sys.exit(main())
