"""Entry point of the worker process: reads an assignment from stdin, writes events to stdout, ends with its parent.

Of a group of ranks each is such a process (`--rank`). It reports its versions first, and reads its assignment then.
"""

import argparse
import os
import platform
import select
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import msgspec

from attention.core import events as on
from attention.core.errors import KernelUnavailable, NoBackendError, UsageError, error_line
from attention.core.plan import Assignment, Blas, FineTuningPlan, GenerationPlan, Plan, RankSetting, StreamPlan
from attention.engine.case_runner import CaseRunner, DeviceStateUnknown, Mark
from attention.engine.progress import Emit
from attention.measure.device import computes_on_cpu, usable_cores
from attention.measure.rounds import keep_freed_memory

if TYPE_CHECKING:
    import mlx.core as mx

    from attention.engine.ranks import Conditions, MakesCalls, Member, RankStatus
    from attention.measure.device import Device

HEARTBEAT_S: Final = 1.0
PR_SET_PDEATHSIG: Final = 1
"""The option of Linux's prctl for the signal that a process gets when its parent ends."""


def main() -> int:
    """Run one assignment; return 0 if it is complete, 1 if this process must not continue."""
    parser = argparse.ArgumentParser(prog="python -m attention.engine.worker", description=__doc__)
    parser.add_argument("--mark", type=int, help="file descriptor of the number of the running implementation")
    parser.add_argument("--rank", help="settings of a rank, as JSON")
    arguments = parser.parse_args()
    mark_file: int | None = arguments.mark
    stream = _private_stdout()
    writing = threading.Lock()

    def emit(event: on.AnyEvent) -> None:
        with writing:
            stream.write(on.encode(event))
            stream.flush()

    def mark(number: int) -> None:
        if mark_file is not None:
            os.pwrite(mark_file, bytes([number]), 0)

    rank = None if arguments.rank is None else msgspec.json.decode(arguments.rank, type=RankSetting)
    if rank is None or rank.orphan_s is None:  # on another host the parent is a shell, whose end means nothing
        _get_killed_with_parent()
    _prefer_oom_kill()
    keep_freed_memory()
    if rank is not None:
        return _run_rank(rank, emit, mark)
    assignment = msgspec.json.decode(sys.stdin.buffer.readline(), type=Assignment)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _load_blas(assignment.plan.blas, emit)
    return _run(assignment, emit, mark)


def _load_blas(blas: Blas, emit: Emit, places: int = 1) -> None:
    """Load the BLAS of a run on a CPU, before MLX is imported; where that fails, report why and keep MLX's own.

    Args:
        blas: the plan's.
        emit: the sink for events.
        places: number of such processes that share the cores.
    """
    if blas == "mlx" or not computes_on_cpu():
        return
    from attention.kernels.cpu.blas import load

    try:
        load(max(1, usable_cores() // places) if places > 1 else None)
    except KernelUnavailable as unavailable:
        emit(on.Message(level="info", text=f"matrix products are MLX's own, not numpy's: {unavailable}"))


def _run(assignment: Assignment, emit: Emit, mark: Mark, member: "Member | None" = None) -> int:
    try:
        runner = _runner(assignment, emit, mark, member)
        if assignment.cost_only:
            runner.measure_cost()
        else:
            runner.run()
    except UsageError as error:
        emit(on.RunRefused(kind="usage", reason=str(error)))
    except NoBackendError as error:
        emit(on.RunRefused(kind="no backend", reason=error.what, why=error.why, remedy=error.remedy))
    except DeviceStateUnknown:
        return 1
    return 0


def _runner(assignment: Assignment, emit: Emit, mark: Mark, member: "Member | None") -> CaseRunner[Any]:
    """Return the runner of a plan, imported lazily: models need mlx-lm, which may not be installed."""
    match assignment.plan:
        case Plan() as plan:
            from attention.engine.bench import Bench

            return Bench(assignment, plan, emit, mark, member)
        case GenerationPlan() as generation:
            from attention.mlx_lm.generation import GenerationBench

            if member is not None:
                from attention.mlx_lm.rank_generation import RankGenerationBench

                return RankGenerationBench(assignment, generation, emit, mark, member)
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


def _run_rank(setting: RankSetting, emit: Emit, mark: Mark) -> int:
    """Run one rank of a group: rank 0 runs the assignment, the others obey it."""
    os.environ["CUDA_VISIBLE_DEVICES"] = own_gpu(
        setting, os.environ.get("CUDA_VISIBLE_DEVICES")
    )  # before MLX is imported
    messages: list[on.AnyEvent] = []
    _load_blas(setting.blas, messages.append, setting.places)
    try:
        from attention.engine import ranks
    except ImportError as error:  # MLX for CUDA cannot be imported without a device
        alone = os.environ["CUDA_VISIBLE_DEVICES"] == "" or "no CUDA-capable device" in str(error)
        reason = "it found no GPU; each rank needs its own" if alone else error_line(error)
        emit(on.RankFailed(rank=setting.rank, reason=reason, fatal=True))
        return 1

    status = ranks.RankStatus()
    try:
        return _join_and_run(setting, emit, mark, status, messages)
    except BaseException as error:  # sys.exit() in a call, too
        emit(ranks.failure(setting.rank, error, status.running))
        return 1


def _join_and_run(
    setting: RankSetting, emit: Emit, mark: Mark, status: "RankStatus", messages: Sequence[on.AnyEvent]
) -> int:
    from attention.engine.ranks import Member, backend_of, join, measure_group, pin_cores
    from attention.kernels.common.cache import code_fingerprint
    from attention.measure.device import probe

    device = probe()
    if device.backend == "cpu":
        pin_cores(setting)
    emit(
        on.RankStarted(
            rank=setting.rank,
            process_id=os.getpid(),
            host=platform.node(),
            device=device.name,
            backend=device.backend,
            code=code_fingerprint(""),
            mlx=device.mlx,
            python=platform.python_version(),
        )
    )
    for message in messages if setting.rank == 0 else ():
        emit(message)
    assignment = msgspec.json.decode(sys.stdin.buffer.readline(), type=Assignment)
    threading.Thread(target=_exit_with_parent, args=(setting.orphan_s,), daemon=True).start()
    threading.Thread(target=_beat, args=(setting, emit, status), daemon=True).start()
    if setting.ranks == 1:  # on another host, which has no file for marks: a crash must have its name before it
        status.joined = True

        def report(number: int) -> None:
            status.busy = number > 0
            status.running = assignment.plan.ordered[number - 1] if number else None
            emit(_alive(setting, status))

        return _run(assignment, emit, report)
    group = join(setting, backend_of(setting, device))
    status.joined = True
    hosts = {address.rpartition(":")[0] for address in setting.addresses}
    conditions = measure_group(group, device, assignment.peaks, alike=len(hosts) < 2)
    makes = _calls_of(assignment, group, device, conditions)
    member = Member(group, assignment.plan.ordered, makes, status, conditions)
    if setting.rank:
        member.obey()
        return 0
    code = _run(assignment, emit, mark, member)
    if code == 0:
        member.end()
    return code


def _calls_of(
    assignment: Assignment, group: "mx.distributed.Group", device: "Device", conditions: "Conditions"
) -> "MakesCalls":
    """Return what makes the calls of a plan on a rank."""
    match assignment.plan:
        case Plan() as plan:
            from attention.engine.ranks import AttentionCalls

            return AttentionCalls(plan, group, device, conditions)
        case GenerationPlan() as generation:
            from attention.mlx_lm.rank_generation import ModelCalls

            return ModelCalls(generation, group)
    raise UsageError("ranks: such a run takes one device")


def own_gpu(setting: RankSetting, visible: str | None) -> str:
    """Return the CUDA_VISIBLE_DEVICES of a rank, given the machine's; devices that it hides stay hidden.

    Each rank of a host gets its own GPU; only over a ring may ranks share one. A rank without one finds no GPU, which
    differs from the others. An empty text hides all GPUs.
    """
    devices = [str(number) for number in range(setting.places)] if visible is None else visible.split(",")
    if setting.backend == "ring":
        return "0" if visible is None else devices[setting.place % len(devices)].strip()
    return devices[setting.place].strip() if setting.place < len(devices) else ""


def _beat(setting: RankSetting, emit: Emit, status: "RankStatus") -> None:
    """Report once a second that this process runs, and whether the rank before it is reachable."""
    from attention.engine.ranks import LinkCheck

    link = LinkCheck(setting.addresses, setting.rank) if setting.addresses else None
    while True:
        emit(_alive(setting, status, link.beat() if link else None))
        time.sleep(HEARTBEAT_S)


def _alive(setting: RankSetting, status: "RankStatus", silent_link_s: float | None = None) -> on.RankAlive:
    import mlx.core as mx

    return on.RankAlive(
        rank=setting.rank,
        commands=status.commands,
        busy=status.busy,
        joined=status.joined,
        running=status.running,
        silent_link_s=silent_link_s,
        active_bytes=mx.get_active_memory() if status.joined else None,
    )


def _private_stdout() -> BinaryIO:
    """Reserve stdout for events: redirect everything else printed in this process to stderr."""
    stream = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return stream


def _exit_with_parent(orphan_s: float | None = None) -> None:
    """End this process when stdin closes, however the parent ended, or is silent for too long."""
    while True:
        if orphan_s is not None and not select.select([0], [], [], orphan_s)[0]:
            break
        if not os.read(0, 4096):  # not through sys.stdin, whose lock this thread would hold when the interpreter ends
            break
    os._exit(1)


def _get_killed_with_parent() -> None:
    """Make Linux kill this process when the thread that started it ends: a stopped process reads no closed pipe."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _prefer_oom_kill() -> None:
    """Make Linux's out-of-memory killer prefer this process over the one that holds the results."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    sys.exit(main())
