"""Run of a plan in a worker process, restarted after a crash and always terminated."""

import asyncio
import contextlib
import os
import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import structs

from attention.core import events as on
from attention.core.plan import AnyPlan, Assignment, Plan, StreamPlan, ranks_of
from attention.core.results import Peaks
from attention.core.workload import FineTuning, Generation
from attention.engine.record import record_of
from attention.engine.resume import (
    CUT,
    MAX_FRUITLESS,
    REGROUPED,
    RESTARTED,
    mark_file,
    marked_name,
    next_assignment,
    refusal,
)
from fatui import __version__
from fatui.worker_process import PATIENCE_S, WORKER, Worker, decode_event, kill_marked

if TYPE_CHECKING:
    from fatui.rank_launch import RankLaunch
    from fatui.remote import Remote
    from fatui.telemetry import Reading

SILENCE_S: Final = 30.0
BUILD_SILENCE_S: Final = 300.0
"""Longer than SILENCE_S, since a compiler reports nothing while it works."""
HUNG_S: Final = 600.0
"""Seconds of silence after which a worker counts as hung, unless its case is large enough to explain a slow call."""
SLOW_FLOPS_PER_S: Final = 3e7
"""A lower bound on the rate of any implementation."""
SLOW_MODEL_FLOPS_PER_S: Final = 1e8
"""A lower bound on the rate of a model's matrix products: a tenth of what MLX's slowest ones reach on one core."""
SLOW_WEIGHTS_PER_S: Final = 1e7
"""A lower bound on the rate at which weights are made or read, in bytes per second."""
LATE: Final = 4
"""Multiple of a model case's estimated time that a silence in it may last."""
RECONNECT_S: Final = 60.0
"""Seconds for which a machine is tried again after a cut connection."""
RETRY_S: Final = 2.0
PIPE_HELD_S: Final = 0.5
"""Seconds between looks whether a worker has ended whose pipe a child of it still holds open."""
Listener = Callable[[on.AnyEvent], None]


class Silence:
    """Time since the worker's last event, and whether its current step accounts for it.

    Attributes:
        last_event_s: clock reading at the last event.
        step: the current step, as text.
        building: the implementation being compiled, or an empty string.
        expected_s: the worker's estimate of the current case; None before there is one.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.last_event_s = clock()
        self.step = self.building = ""
        self.expected_s: float | None = None

    def record_event(self, event: on.AnyEvent) -> None:
        """Handle an event; that a rank runs does not say that the run goes on."""
        if isinstance(event, on.RankAlive):
            return
        self.last_event_s = self._clock()
        if isinstance(event, on.CaseStarted):
            self.step = self.building = ""
            self.expected_s = None
        elif isinstance(event, on.CaseTimeEstimated):
            self.expected_s = event.seconds
        elif isinstance(event, on.StepStarted):
            # In the rounds all take their turns.
            self.step = event.step if event.step == "rounds" else f"{event.implementation}: {event.step}"
            self.building = event.implementation if event.step == "build" else ""

    @property
    def seconds(self) -> float:
        """Seconds since the worker's last event."""
        return self._clock() - self.last_event_s

    @property
    def unexplained(self) -> bool:
        """Whether the silence is longer than the current step accounts for."""
        return self.seconds >= (BUILD_SILENCE_S if self.building else SILENCE_S)


class Engine:
    """One run of a plan.

    Attributes:
        record: the run's record, updated as events arrive.
        stopped: whether stop() was called.
        process_id: the worker's, or None while there is none; ssh's if the worker is on another machine.
        silence: how long the worker has been silent.
        mark: marks all processes of the run.
        reading: the latest of another machine's telemetry; None for a worker on this machine.
    """

    def __init__(
        self,
        plan: AnyPlan,
        listener: Listener = lambda event: None,
        peaks: Peaks | None = None,
        *,
        remote: "Remote | None" = None,
        assignment: Assignment | None = None,
    ) -> None:
        """Prepare a run of a plan.

        Args:
            plan: the plan.
            listener: called with every event.
            peaks: the machine's rates if already measured.
            remote: the machine that runs it; None for this one.
            assignment: the part of the plan that is left to run; None for all of it.
        """
        from fatui.rank_launch import hosts_of  # no part of the start of the app

        self.record = record_of(plan)
        self.record.peaks = peaks or Peaks()
        for case, names in (assignment.skip if assignment else {}).items():
            for name in names:
                self.record.apply(on.RowEnded(case=case, implementation=name, status="failed", reason=""))
        self.stopped = False
        self.process_id: int | None = None
        self.reading: Reading | None = None
        self.mark = uuid.uuid4().hex
        self._assignment = assignment or Assignment(plan=plan, peaks=peaks)
        self._listener = listener
        self._remote = remote
        self._connected = False
        self._mark_file: int | None = None
        self._hosts = None if remote else hosts_of(plan)
        self._signal: Callable[[int], None] | None = None
        self._fatal = False
        self._culprit: str | None = None
        self._stopping = asyncio.Event()
        self._hung: str | None = None
        self.silence = Silence()

    async def run(self) -> None:
        """Run until all cases are complete, nothing can run, or stop() is called; leave no process running."""
        fruitless = 0
        while not (self.stopped or self.record.done or self.record.refused):
            before = self._assignment
            reason = await self._run_worker()
            if self.stopped or self.record.done or self.record.refused:
                return
            if self._grouped and self._fatal:
                self._give_up_group(reason)
                continue
            self._resume_after(reason)
            fruitless = fruitless + 1 if self._assignment == before else 0
            if fruitless == MAX_FRUITLESS and self._grouped:
                self._give_up_group(reason)
            elif fruitless == MAX_FRUITLESS:
                self._dispatch(refusal(self._culprit, reason))

    def stop(self) -> None:
        """End the worker, by force after PATIENCE_S; what was measured stays in the record."""
        self.stopped = True
        self._stopping.set()
        if self._signal is not None:
            self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the worker and its children at once."""
        self.stop()
        if self._signal is not None:
            self._signal(signal.SIGKILL)

    @property
    def running(self) -> str | None:
        """The implementation whose call the worker executes; None if none is known."""
        return marked_name(self._mark_file, self.record.plan.ordered) if self._mark_file is not None else None

    def _dispatch(self, event: on.AnyEvent) -> None:
        if isinstance(event, on.RunStarted) and self._remote is not None:
            event.environment = structs.replace(event.environment, host=self._remote.name)
        elif isinstance(event, on.RunStarted):
            event.environment = structs.replace(event.environment, fatui=__version__, device=self._devices(event))
        self.record.apply(event)
        self._listener(event)

    def _devices(self, event: on.RunStarted) -> str | None:
        """Return the device of a run, or those of its ranks: "2 x NVIDIA H200"."""
        names = [state.started.device for state in self.record.ranks.values() if state.started]
        if len(names) < 2:
            return event.environment.device
        return ", ".join(f"{count} x {name}" for name, count in Counter(names).items())

    async def _run_worker(self) -> str:
        """Run one worker, or the ranks of one group, to the end; return a description of how it ended."""
        self._hung = self._culprit = None
        if self._remote is not None:
            return await self._run_remote(self._remote)
        self._mark_file = mark = mark_file()
        try:
            if self._grouped:
                from fatui.rank_launch import rank_launches

                ranks = ranks_of(self.record.plan.cases[self._assignment.first_case])
                return await self._run_group(mark, rank_launches(ranks, self._hosts, self.record.plan.blas))
            return await self._run_alone(mark)
        finally:
            self._mark_file = None
            os.close(mark)

    def _give_up_group(self, reason: str) -> None:
        """End the rows of all cases for a number of ranks that cannot be started; without others, refuse the run."""
        plan, first = self.record.plan, self._assignment.first_case
        ranks = ranks_of(plan.cases[first])
        hopeless = [case for case in range(first, len(plan.cases)) if ranks_of(plan.cases[case]) == ranks]
        if len(hopeless) == len(plan.cases):
            self._dispatch(on.RunRefused(kind="cannot start", reason=f"ranks: {ranks} cannot be started: {reason}"))
            return
        for case in hopeless:
            for name in plan.ordered:
                if self.record.cases[case].rows[name].ended is None:
                    self._dispatch(on.RowEnded(case=case, implementation=name, status="failed", reason=reason))
            self._dispatch(on.CaseDone(case=case, stopped_by="failed"))
        going_on = next((case for case in range(first, len(plan.cases)) if case not in hopeless), None)
        if going_on is None:
            self._dispatch(on.RunDone())
        else:
            self._assignment = structs.replace(self._assignment, first_case=going_on, skip={})

    @property
    def _grouped(self) -> bool:
        """Whether the current assignment begins with a case for a group, started from here."""
        if self._remote is not None:
            return False
        elsewhere = self._hosts is not None and not self._hosts.hosts[0].local
        return elsewhere or ranks_of(self.record.plan.cases[self._assignment.first_case]) > 1

    async def _run_alone(self, mark: int) -> str:
        self.record.ranks.clear()
        worker = await Worker.start((*WORKER, "--mark", str(mark)), self.mark, (mark,))
        self._signal, self.process_id = worker.signal, worker.process.pid
        try:
            worker.send(msgspec.json.encode(self._assignment))
            await self._follow(worker)
        finally:
            await worker.end()
            kill_marked(self.mark)
            self._signal = self.process_id = None
        self._culprit = marked_name(mark, self.record.plan.ordered)
        return self._hung or worker.reason()

    async def _run_group(self, mark: int, launches: "list[RankLaunch]") -> str:
        """Run a group; a failure of one rank ends all of them, and is reported with its cause."""
        from fatui.rank_group import RankProcesses, StartError

        group = RankProcesses(launches, self.mark)
        self.record.ranks.clear()
        try:
            await group.start(mark)
            self._signal, self.process_id = group.signal, group.first.process.pid
            await self._until(group.follow(msgspec.json.encode(self._assignment), self._take))
        except StartError as error:
            self._fatal = True
            return str(error)
        finally:
            await group.end()
            kill_marked(self.mark)
            self._signal = self.process_id = None
        fault = group.watch.verdict
        self._fatal = fault is not None and fault.fatal
        self._culprit = marked_name(mark, self.record.plan.ordered) or (fault.running if fault else None)
        return self._hung or (fault.reason if fault else group.first.reason())

    async def _run_remote(self, remote: "Remote") -> str:
        """Run the engine on another machine until it has ended; after a cut, try to connect again for a while."""
        from fatui.remote import RemoteError

        began = time.monotonic()
        while True:
            try:
                reached, reason = await self._connect(remote)
            except RemoteError as error:
                self._dispatch(on.RunRefused(kind="cannot start", reason=str(error)))
                return str(error)
            if self.stopped or self.record.done or self.record.refused:
                return reason
            if reached:
                self._dispatch(on.Message(level="warning", text=f"{reason}; connecting again"))
                return reason
            if not self._connected or time.monotonic() - began > RECONNECT_S:
                self._dispatch(on.RunRefused(kind="cannot start", reason=reason))
                return reason
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), RETRY_S)

    async def _connect(self, remote: "Remote") -> tuple[bool, str]:
        """Run the assignment over one connection; return whether there was one, and why it ended."""
        from fatui.remote import RemoteWorker, decode_beat

        self.record.ranks.clear()
        self._culprit = None
        worker = await RemoteWorker.start_service(remote, "engine", self.mark)
        self._signal, self.process_id = worker.signal, worker.process.pid

        def begin() -> None:
            if self._connected:
                self._dispatch(on.Message(level="info", text=f"connected to {remote.name} again"))
            self._connected = True
            worker.send(msgspec.json.encode(self._assignment))

        def take(line: bytes) -> None:
            beat = decode_beat(line)
            if beat is None:
                self._take(decode_event(line))
                return
            self._culprit = beat.running if beat.running in self.record.plan.ordered else None
            self.reading = beat.reading or self.reading

        try:
            await self._until(worker.converse(take, begin))
        finally:
            await worker.end()
            self._signal = self.process_id = self.reading = None
        return worker.greeting is not None, self._hung or worker.failure()

    async def _follow(self, worker: Worker) -> None:
        """Take events until the worker closes its stdout, ends, hangs, or is stopped."""
        reading = asyncio.create_task(worker.read(self._take))
        ended = asyncio.create_task(worker.wait(PIPE_HELD_S))
        try:
            await self._until(_first_of(reading, ended))
            if ended.done():  # the rest of the pipe is still to be read; a child may hold it open
                await asyncio.wait({reading}, timeout=PATIENCE_S)
            if reading.done():
                reading.result()
        finally:
            for task in (reading, ended):
                task.cancel()
            await asyncio.gather(reading, ended, return_exceptions=True)

    async def _until(self, following: Coroutine[None, None, None]) -> None:
        """Await the end of a worker or a group, that it hangs, or is stopped."""
        self.silence = Silence()
        tasks = [asyncio.create_task(each) for each in (following, self._wait_for_stop(), self._wait_for_hang())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _take(self, event: on.AnyEvent) -> None:
        if self.stopped:
            return
        self.silence.record_event(event)
        self._dispatch(event)

    async def _wait_for_stop(self) -> None:
        await self._stopping.wait()

    async def _wait_for_hang(self) -> None:
        """Return once the silence is so long that the worker must have hung."""
        while self.silence.seconds < self._longest_silence_s() or self.silence.building:
            await asyncio.sleep(1)
        self._hung = f"was silent for {self.silence.seconds:.0f} s, and was terminated"

    def _longest_silence_s(self) -> float:
        """Seconds of silence that the current case accounts for: a round of very slow calls, or a model's pass."""
        plan, case = self.record.plan, self.record.current_case
        if case is None:
            return HUNG_S
        if isinstance(plan, Plan):
            calls = 2 * (len(plan.ordered) + 1)
            return max(HUNG_S, calls * plan.cases[case].flops / SLOW_FLOPS_PER_S)
        if self.silence.expected_s is not None:
            return max(HUNG_S, LATE * self.silence.expected_s)
        if isinstance(plan, StreamPlan):
            return HUNG_S
        weights = self.record.cases[case].weights_bytes or 0
        pass_s = _model_flops(plan.cases[case], weights) / SLOW_MODEL_FLOPS_PER_S
        return max(HUNG_S, weights / SLOW_WEIGHTS_PER_S + pass_s)

    def _resume_after(self, reason: str) -> None:
        """Fail the row that was running, and create the assignment of the next worker.

        Where no row is to blame, a message reports a group's failure.
        """
        case = self.record.current_case
        blameless = case is None or self._culprit is None or self.record.cases[case].stopped_by is not None
        if self._grouped and blameless and not self.record.done:
            self._dispatch(on.Message(level="info", text=f"{reason}; the group of ranks is formed again"))
        if case is None:
            return
        consequence = REGROUPED if self._grouped else CUT if self._remote else RESTARTED
        assignment = next_assignment(self._assignment, self.record, self._culprit, reason, self._dispatch, consequence)
        if assignment is None:
            self._dispatch(on.RunDone())
        else:
            self._assignment = assignment


def _model_flops(work: Generation | FineTuning, weights_bytes: int) -> float:
    """Return at least the FLOPs of a model's pass over its prompts, or of a training step, at two bytes a weight."""
    if isinstance(work, FineTuning):
        return 3.0 * work.tokens * weights_bytes
    return float(work.batch * work.prompt * weights_bytes)


async def _first_of(*tasks: asyncio.Task[None]) -> None:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
