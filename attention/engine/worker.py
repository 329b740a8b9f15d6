"""Entry point of the worker process: reads an assignment from stdin, writes events to stdout, ends with its parent."""

import argparse
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from attention.core import events as on
from attention.core.errors import NoBackendError, UsageError
from attention.core.plan import Assignment, FineTuningPlan, GenerationPlan, Plan, StreamPlan
from attention.engine.case_runner import CaseRunner, DeviceStateUnknown, Mark
from attention.engine.progress import Emit


def main() -> int:
    """Run one assignment; return 0 if it is complete, 1 if this process must not continue."""
    parser = argparse.ArgumentParser(prog="python -m attention.engine.worker", description=__doc__)
    parser.add_argument("--mark", type=int, help="file descriptor of the number of the running implementation")
    mark_file: int | None = parser.parse_args().mark
    assignment = msgspec.json.decode(sys.stdin.buffer.readline(), type=Assignment)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _prefer_oom_kill()
    stream = _private_stdout()

    def emit(event: on.AnyEvent) -> None:
        stream.write(on.encode(event))
        stream.flush()

    def mark(number: int) -> None:
        if mark_file is not None:
            os.pwrite(mark_file, bytes([number]), 0)

    try:
        _runner(assignment, emit, mark).run()
    except UsageError as error:
        emit(on.RunRefused(kind="usage", reason=str(error)))
    except NoBackendError as error:
        emit(on.RunRefused(kind="no backend", reason=error.what, why=error.why, remedy=error.remedy))
    except DeviceStateUnknown:
        return 1
    return 0


def _runner(assignment: Assignment, emit: Emit, mark: Mark) -> CaseRunner[Any]:
    """Return the runner of a plan, imported lazily: models need mlx-lm, which may not be installed."""
    match assignment.plan:
        case Plan() as plan:
            from attention.engine.bench import Bench

            return Bench(assignment, plan, emit, mark)
        case GenerationPlan() as generation:
            from attention.mlx_lm.generation import GenerationBench

            return GenerationBench(assignment, generation, emit, mark)
        case FineTuningPlan() as fine_tuning:
            from attention.mlx_lm.fine_tuning import FineTuningBench

            return FineTuningBench(assignment, fine_tuning, emit, mark)
        case StreamPlan(cases=(first, *_)) as stream if first.model is not None:
            from attention.mlx_lm.stream import ModelStreamBench

            return ModelStreamBench(assignment, stream, emit, mark)
        case StreamPlan() as stream:
            from attention.engine.stream import AttentionStreamBench

            return AttentionStreamBench(assignment, stream, emit, mark)


def _private_stdout() -> BinaryIO:
    """Reserve stdout for events: redirect everything else printed in this process to stderr."""
    stream = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return stream


def _exit_with_parent() -> None:
    """End this process when stdin closes, however the parent ended."""
    while os.read(0, 4096):  # not through sys.stdin, whose lock this thread would hold when the interpreter ends
        pass
    os._exit(1)


def _prefer_oom_kill() -> None:
    """Make Linux's out-of-memory killer prefer this process over the one that holds the results."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    sys.exit(main())
