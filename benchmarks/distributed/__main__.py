"""Benchmark of attention over several devices: `python -m benchmarks.distributed [PART ...] [--ranks N]`.

Starts the ranks itself, one GPU each over NCCL where there is one, otherwise processes over ring. `--simulate 2,4,8`
starts none: it times every rank's computation on this device, and computes the communication from `--link`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec

from attention.core.workload import Workload
from benchmarks.distributed.cases import PARTS, cases
from benchmarks.distributed.measure import line, simulate
from benchmarks.distributed.predict import H200, PeerLink, predict, prediction_line
from benchmarks.distributed.start import start_ranks


def main() -> int:
    """Run the parts named as arguments, all without any."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all by default")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--backend", choices=("nccl", "ring"))
    parser.add_argument("--impl", default="poc", help="implementation")
    parser.add_argument("--method", choices=("context", "heads"), help="instead of the planner's")
    parser.add_argument("--simulate", metavar="N,N", help="numbers of ranks to simulate on this device")
    parser.add_argument("--link", type=float, default=50e9, help="bytes per second of a simulated link")
    parser.add_argument("--latency", type=float, default=20e-6, help="seconds of a simulated collective")
    parser.add_argument("--predict", metavar="N,N", help="numbers of GPUs to predict, from one's times in --measured")
    parser.add_argument("--measured", type=Path, help="rows of two GPUs, by --json, of which one GPU's times are taken")
    parser.add_argument("--beyond", type=int, metavar="TOKENS", help="a windowed prefill that one GPU cannot hold")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--timeout", type=float, default=600)
    given = parser.parse_args()
    if given.predict and not given.measured:
        parser.error("--predict takes --measured FILE")
    if unknown := [part for part in given.parts if part not in PARTS]:
        parser.error(f"PART: got {unknown[0]!r}; it takes {', '.join(PARTS)}")
    rows: list[dict[str, Any]] = []
    failed = False
    if given.predict:
        known = msgspec.json.decode(given.measured.read_bytes())
        links = [row for row in known if row["part"] == "link" and "pull_bytes_per_s" in row]
        link = msgspec.convert(links[0], PeerLink) if links else H200
        for measured in known:
            if "workload" not in measured:
                continue
            workload = msgspec.convert(measured["workload"], Workload)
            if workload.causal and workload.pass_ == "forward":
                for ranks in map(int, given.predict.split(",")):
                    rows.append(predict(workload, ranks, measured["one_s"], link))
                    print(prediction_line(rows[-1]), flush=True)
    elif given.simulate:
        for case in cases(given.parts, mx.default_device() == mx.gpu):
            for ranks in map(int, given.simulate.split(",")):
                rows.append(simulate(case, ranks, given.impl, given.link, given.latency))
                print(line(rows[-1]), flush=True)
    else:
        backend = given.backend or ("nccl" if mx.default_device() == mx.gpu and mx.cuda.is_available() else "ring")
        command = [sys.executable, "-m", "benchmarks.distributed.measure", given.impl, backend, given.method or "-"]
        if given.beyond:
            command = [sys.executable, "-m", "benchmarks.distributed.beyond", str(given.beyond), backend]

        def take(text: str) -> None:
            if text.startswith("ROW "):
                rows.append(msgspec.json.decode(text[4:]))
                if given.beyond:
                    print({name: value for name, value in rows[-1].items() if name != "workload"})
            else:
                print(text, flush=True)

        results = start_ranks(given.ranks, [*command, *given.parts], backend, given.timeout, take)
        for result in results:
            if result.returncode:
                failed = True
                print(f"rank {result.rank} ended with {result.returncode}: {result.output[-2000:]}", file=sys.stderr)
    if given.json:
        given.json.write_bytes(msgspec.json.format(msgspec.json.encode(rows)))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
