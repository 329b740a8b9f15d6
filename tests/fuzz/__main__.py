"""Command line of the fuzz tests: draw cases, run them in separate processes, and count the outcomes.

Exit code 0 if everything but the peers passed, 1 if not, 2 for wrong usage.
"""

import argparse
import asyncio
import faulthandler
import json
import os
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import psutil

FAMILIES: Final = ("broad", "edges", "patterns", "quantized")
MODES: Final = ("forward", "gradient", "demo")
MAX_SILENCE_S: Final = 300.0
"""Seconds of processor time without output after which a process counts as hung, or seconds in which it takes none: on
a loaded machine a case takes many times as long as it computes."""
LEAST_SHARE: Final = 0.001
"""Share of a processor below which a process takes no processor time: threads that sleep and wake still take some."""
MAX_OVERTIME_S: Final = 60.0
"""Seconds that a case may go on after `--seconds`; it is then ended, named and not counted."""
CLEAR_CACHE_EVERY: Final = 50
COMPILED_ON_GPU: Final = 25
"""One of so many cases may run under `mx.compile` on a GPU, where MLX compiles for up to minutes: seconds a kernel."""
UNCOMPILED: Final = {"compile": "plain", "grad_compile": "plain"}
MAX_SHOWN: Final = 30
"""Maximum number of failures printed; the file has all of them."""


def main(words: list[str] | None = None) -> int:
    """Run the command line."""
    options = _parser().parse_args(words)
    if options.case is not None:
        return _reproduce(options)
    if options.worker:
        return _work(options)
    tally = Tally(options)
    started = time.monotonic()
    try:
        asyncio.run(_run_all(options, tally, started))
    except KeyboardInterrupt:
        print("interrupted; what follows is of the cases done", file=sys.stderr)
    tally.show(time.monotonic() - started)
    return 1 if tally.failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="every implementation against float64")
    add = parser.add_argument
    add(
        "--family",
        choices=FAMILIES,
        default="broad",
        help="which cases: random ones, those at the limits, masks as values, or quantized keys and values",
    )
    add("--seed", type=int, default=1)
    add("--count", type=int, default=500, help="cases of the seed, from --first on")
    add("--first", type=int, default=0)
    add("--case", type=int, help="one case, in this process, with all that it is made of")
    add("--mode", choices=MODES, default="forward")
    add("--device", choices=("cpu", "gpu"), default="cpu")
    add(
        "--impl",
        help="only these, by comma: a name of the table that a run prints, or FILE.py:CLASS",
    )
    add("--no-torch", action="store_true", help="leave torch out: its CUDA kernels may end the process")
    add("--processes", type=int, default=1)
    add("--seconds", type=float, default=float("inf"), help="start no case after this time")
    add("--out", type=Path, help="append each failure to this file, a JSON line each")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    add("--stride", type=int, default=1, help=argparse.SUPPRESS)
    return parser


class Tally:
    """Outcome counts by implementation, and the failures."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.counts: dict[str, Counter[str]] = {}
        self.cases: set[int] = set()
        self.failures: list[dict[str, Any]] = []

    @property
    def failed(self) -> bool:
        """Whether anything but a peer failed."""
        from tests.fuzz.judge import PEERS

        return any(failure["implementation"] not in PEERS for failure in self.failures)

    def add(self, result: dict[str, Any]) -> None:
        """Count one implementation's outcome of one case."""
        from tests.fuzz.judge import FAILURES

        self.cases.add(result["case"])
        self.counts.setdefault(result["implementation"], Counter())[result["verdict"]] += 1
        if result["verdict"] not in FAILURES:
            return
        result["command"] = self._command(result)
        self.failures.append(result)
        if self.options.out:
            with self.options.out.open("a") as file:
                file.write(json.dumps(result, default=str) + "\n")

    def _command(self, result: dict[str, Any]) -> str:
        """Return the command that runs one failure again."""
        options = self.options
        words = ["python -m tests.fuzz", f"--family {options.family}", f"--seed {options.seed}"]
        words += [f"--case {result['case']}", f"--mode {options.mode}", f"--impl {result['implementation']}"]
        words += [f"--device {options.device}"] if options.device != "cpu" else []
        return " ".join(words)

    def show(self, took_s: float) -> None:
        """Print the counts and the first failures."""
        from tests.fuzz.judge import PEERS, VERDICTS

        options = self.options
        title = f"{options.family}, {options.mode}, seed {options.seed}, {options.device}"
        print(f"{title}: {len(self.cases)} cases in {took_s:.0f} s")
        print(f"{'':14}" + "".join(f"{verdict:>13}" for verdict in VERDICTS))
        for name, counts in sorted(self.counts.items()):
            peer = "  (peer)" if name in PEERS else ""
            print(f"{name:14}" + "".join(f"{counts[verdict]:13}" for verdict in VERDICTS) + peer)
        own = [failure for failure in self.failures if failure["implementation"] not in PEERS]
        for failure in own[:MAX_SHOWN]:
            print(f"{failure['verdict']}: {failure['detail']}\n  {failure['command']}")
        if len(own) > MAX_SHOWN:
            print(f"... and {len(own) - MAX_SHOWN} more")


async def _run_all(options: argparse.Namespace, tally: Tally, started: float) -> None:
    stride = max(1, options.processes)
    workers = [_worker(options, tally, started, options.first + i, stride) for i in range(stride)]
    await asyncio.gather(*workers)


async def _worker(options: argparse.Namespace, tally: Tally, started: float, first: int, stride: int) -> None:
    """Run every `stride`-th case from `first` on in another process, and in a new one after each that dies."""
    end = options.first + options.count
    while first < end:
        left = options.seconds - (time.monotonic() - started)
        if left <= 0:
            return
        process = await asyncio.create_subprocess_exec(
            *_worker_words(options, first, end, stride, left),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=2**24,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},  # as pytest imports this package
        )
        at_work: dict[str, Any] | None = None
        stderr = asyncio.create_task(_tail(process.stderr))
        hung = False
        try:
            while True:
                left = options.seconds - (time.monotonic() - started)
                silence_s = min(MAX_SILENCE_S, max(left, 0.0) + MAX_OVERTIME_S)
                line = await _line(process, silence_s, waits=silence_s == MAX_SILENCE_S)
                if line is None:
                    hung = True
                    break
                if not line:
                    break
                message = json.loads(line)
                if "verdict" in message:
                    tally.add(message)
                    at_work = None
                else:
                    at_work = message
        finally:
            if hung or sys.exc_info()[0]:
                process.kill()
            code = await process.wait()
        said = await stderr
        if code == 0 and not hung:
            return
        if hung and silence_s < MAX_SILENCE_S:
            print(f"still running when the time was up, not counted: {at_work or 'start-up'}", file=sys.stderr)
            return
        if at_work is None:
            raise RuntimeError(f"a process of the fuzz tests ended with {code}: {said}")
        reason = f"no word for {MAX_SILENCE_S:.0f} s of processor time" if hung else f"exit code {code}: {said}"
        tally.add({**at_work, "verdict": "crashed", "detail": reason})
        first = at_work["case"] + stride


def _worker_words(options: argparse.Namespace, first: int, end: int, stride: int, left_s: float) -> list[str]:
    words = [sys.executable, "-m", __spec__.name.rpartition(".")[0], "--worker", "--family", options.family]
    words += ["--seed", str(options.seed), "--first", str(first), "--count", str(end - first), "--stride", str(stride)]
    words += ["--mode", options.mode, "--device", options.device, "--seconds", str(left_s)]
    words += ["--no-torch"] if options.no_torch else []
    return words + (["--impl", options.impl] if options.impl else [])


async def _line(process: asyncio.subprocess.Process, silence_s: float, waits: bool) -> bytes | None:
    """Return a process's next line, b"" at its end, or None after a silence; if it `waits`, while it computes, too."""
    reading = asyncio.ensure_future(process.stdout.readline())  # type: ignore[union-attr]
    began = before = _processor_s(process.pid)
    try:
        while True:
            done, _ = await asyncio.wait({reading}, timeout=silence_s)
            if done:
                return reading.result()
            now = _processor_s(process.pid)
            if not waits or now - began >= silence_s or now - before < LEAST_SHARE * silence_s:
                return None
            before = now
    finally:
        reading.cancel()


def _processor_s(pid: int) -> float:
    """Return the seconds of processor time of a process and all that it started; 0 if it has ended."""
    total = 0.0
    with suppress(psutil.Error):
        head = psutil.Process(pid)
        for each in (head, *head.children(recursive=True)):
            with suppress(psutil.Error):
                times = each.cpu_times()
                total += times.user + times.system
                total += getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
    return total


async def _tail(stream: asyncio.StreamReader | None) -> str:
    """Return the first lines of a stream that matter, in one line."""
    text = (await stream.read()).decode(errors="replace") if stream else ""
    return " ".join(text.split())[:300]


def _work(options: argparse.Namespace) -> int:
    """Run cases and print a JSON line before and after each implementation's turn."""
    import mlx.core as mx

    faulthandler.enable()
    started = time.monotonic()
    for done, number in enumerate(range(options.first, options.first + options.count, options.stride)):
        if time.monotonic() - started > options.seconds:
            break
        for message in outcomes(options, number):
            print(json.dumps(message, default=str), flush=True)
        if done % CLEAR_CACHE_EVERY == 0:
            mx.clear_cache()
    sys.stdout.flush()
    os._exit(0)  # without the destructors of libraries, which are not what is tested


def outcomes(options: argparse.Namespace, number: int) -> Any:
    """Yield what is about to run, and its outcome, for each implementation."""
    import mlx.core as mx

    from tests.fuzz import cases, edges, patterns, quantized
    from tests.fuzz.judge import Judge, implementations

    mx.set_default_device(mx.gpu if options.device == "gpu" else mx.cpu)
    families = {"broad": cases, "edges": edges, "patterns": patterns, "quantized": quantized}
    problem = families[options.family].problem(options.seed, number, options.mode)
    if problem is None:
        return
    if options.device == "gpu" and options.case is None and number % COMPILED_ON_GPU:
        problem.transform = UNCOMPILED.get(problem.transform, problem.transform)
    judge = Judge(problem)
    for name, implementation in implementations(problem, options.mode, not options.no_torch, options.impl).items():
        running = {"case": number, "implementation": name, "transform": problem.transform, "facts": problem.facts}
        yield running
        outcome = judge.outcome(name, implementation)
        yield {**running, "verdict": outcome.verdict, "detail": outcome.detail}


def _reproduce(options: argparse.Namespace) -> int:
    """Run one case in this process, and print its description and its outcomes."""
    from tests.fuzz.judge import FAILURES

    faulthandler.enable()
    failed = False
    for i, message in enumerate(outcomes(options, options.case)):
        if not i:
            print(json.dumps({"transform": message["transform"], **message["facts"]}, default=str))
        if "verdict" in message:
            failed |= message["verdict"] in FAILURES
            print(f"{message['implementation']:14}{message['verdict']:13}{message['detail']}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
