"""The processes of a run over several ranks: which of them has failed, and why, from their events, ends and silences.

MLX has no time-outs: when one rank dies, stops or loses its link, the others wait forever. Each rank reports once a
second that it runs; what several of them report of one failure is reduced to its cause.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Final

from msgspec import Struct

from attention.core import events as on
from fatui.rank_launch import SSH, RankLaunch, with_mark
from fatui.worker_process import Worker

BEAT_S: Final = 1.0
LOST_BEATS: Final = 7
"""Beats without a report after which a rank counts as lost."""
SILENT_LINK_S: Final = 7.0
START_BEATS: Final = 60
"""Beats that a rank may take to start: Python and MLX are read from a disk, perhaps over a network."""
JOIN_BEATS: Final = 14
"""Beats that the ranks may take to form a group after all of them have started."""
STALL_BEATS: Final = 10
"""Beats after which a command of rank 0 that another rank has not begun counts as lost."""
GRACE_S: Final = 1.0
"""Seconds between the first sign of a failure and the verdict: its cause may be reported after its consequences."""
KILL_S: Final = 3.0
"""Seconds that killing a process on another host may take."""
Clock = Callable[[], float]


class Fault(Struct, frozen=True, kw_only=True):
    """Why a group cannot go on."""

    weight: int
    """Of several faults the lightest is the cause: what a rank says itself is lighter than what others notice."""
    reason: str
    running: str | None = None
    """The implementation whose call was being executed."""
    fatal: bool = False
    """Whether a new group would fail alike."""


class RankState(Struct):
    """What is known of one rank's process."""

    started: on.RankStarted | None = None
    alive: on.RankAlive | None = None
    quiet_beats: int = 0
    """Beats since its last report."""
    pending_beats: int = 0
    """Beats since rank 0 began a command that it has not begun."""
    ended: bool = False


class GroupWatch:
    """Judge of a group's failures.

    Attributes:
        faults: all that was noticed.
    """

    def __init__(self, launches: Sequence[RankLaunch], clock: Clock = time.monotonic) -> None:
        self._launches, self._clock = launches, clock
        self._ranks = [RankState() for _ in launches]
        self._starting_beats = self._joining_beats = 0
        self._noticed_s: float | None = None
        self._preparing: str | None = None
        self.faults: list[Fault] = []

    @property
    def started(self) -> bool:
        """Whether all ranks have started."""
        return all(rank.started for rank in self._ranks)

    @property
    def verdict(self) -> Fault | None:
        """The cause of the failure, GRACE_S after its first sign; None if nothing has failed."""
        if self._noticed_s is None or self._clock() - self._noticed_s < GRACE_S:
            return None
        cause = min(self.faults, key=lambda fault: fault.weight)
        running = cause.running or next((fault.running for fault in self.faults if fault.running), None)
        running = running or self._preparing
        running = running or next((rank.alive.running for rank in self._ranks if rank.alive and rank.alive.busy), None)
        return Fault(weight=cause.weight, reason=cause.reason, running=running, fatal=cause.fatal)

    def take(self, rank: int, event: on.AnyEvent) -> None:
        """Record an event of a rank."""
        state = self._ranks[rank]
        state.quiet_beats = 0
        where = self._launches[rank].where
        match event:
            case on.RankStarted():
                state.started = event
                self._compare(rank)
            case on.RankAlive():
                state.alive = event
                if event.silent_link_s is not None and event.silent_link_s > SILENT_LINK_S:
                    self._notice(3, self._link_reason(rank, event.silent_link_s))
            case on.StepStarted():  # of rank 0; its report, once a second, may be of the step before
                self._preparing = None if event.step == "rounds" else event.implementation
            case on.RankFailed():
                reason = f"{where}: {event.reason}"
                self._notice(5 if event.lost_peer else 0, reason, running=event.running, fatal=event.fatal)

    def _compare(self, rank: int) -> None:
        """Notice a rank that differs from an earlier one."""
        own = self._ranks[rank].started
        for other, state in enumerate(self._ranks):
            if own is None or state.started is None or other == rank:
                continue
            pair = sorted((rank, other), reverse=True)
            if own.backend != state.started.backend:
                without = rank if own.backend == "cpu" else other
                self._notice(0, f"{self._launches[without].where} found no GPU; each rank needs its own", fatal=True)
                return
            for what, *values in _differences(own, state.started):
                (later, first), (mine, theirs) = pair, values if rank > other else reversed(values)
                words = f"{self._launches[later].where} has {what} {mine}, {self._launches[first].where} {theirs}"
                self._notice(0, words, fatal=True)
                return

    def process_id(self, rank: int) -> int | None:
        """Return the id of a rank's process on its host; None if it has not started."""
        started = self._ranks[rank].started
        return started.process_id if started else None

    def end(self, rank: int, code: int, reason: str) -> None:
        """Record that a rank's process ended; one that ends well has done all that rank 0 commanded."""
        self._ranks[rank].ended = True
        if code:
            self._notice(1, f"{self._launches[rank].where}: {reason}", fatal=self._ranks[rank].started is None)

    def beat(self) -> None:
        """Notice what has not happened for too long; called once in BEAT_S."""
        if not self.started:
            self._starting_beats += 1
            if self._starting_beats > START_BEATS:
                late = [each.where for each, rank in zip(self._launches, self._ranks, strict=True) if not rank.started]
                self._notice(2, f"{', '.join(late)} did not start within {START_BEATS} s", fatal=True)
            return
        self._check_joined()
        first = self._ranks[0].alive
        for number, rank in enumerate(self._ranks):
            where = self._launches[number].where
            rank.quiet_beats += 1
            if rank.quiet_beats > LOST_BEATS and not rank.ended:
                words = f"{where} has not answered for {LOST_BEATS} s: it is stopped, or its host or link is down"
                self._notice(2, words)
            rank.pending_beats = rank.pending_beats + 1 if _is_behind(rank.alive, first) else 0
            if rank.pending_beats > STALL_BEATS:
                self._notice(4, f"nothing that rank 0 sends has reached {where} for {STALL_BEATS} s: is its link down?")

    def _check_joined(self) -> None:
        if all(rank.alive and rank.alive.joined for rank in self._ranks):
            return
        self._joining_beats += 1
        if self._joining_beats > JOIN_BEATS:
            waiting = [
                launch.where
                for launch, rank in zip(self._launches, self._ranks, strict=True)
                if not (rank.alive and rank.alive.joined)
            ]
            self._notice(4, f"{', '.join(waiting)} could not reach the others within {JOIN_BEATS} s", fatal=True)

    def _link_reason(self, rank: int, silent_s: float) -> str:
        before = self._launches[rank - 1]
        own = self._launches[rank]
        ends = f"{_ip(before)} to {_ip(own)}"
        return f"nothing has come from {before.where} to {own.where} for {silent_s:.0f} s: the link {ends} is down"

    def _notice(self, weight: int, reason: str, *, running: str | None = None, fatal: bool = False) -> None:
        self._noticed_s = self._clock() if self._noticed_s is None else self._noticed_s
        self.faults.append(Fault(weight=weight, reason=reason, running=running, fatal=fatal))


def _is_behind(rank: on.RankAlive | None, first: on.RankAlive | None) -> bool:
    """Whether a rank waits for a command that rank 0 has begun."""
    return bool(rank and first and first.busy and not rank.busy and rank.commands < first.commands)


def _ip(launch: RankLaunch) -> str:
    return launch.setting.addresses[launch.setting.rank].rpartition(":")[0]


def _differences(one: on.RankStarted, other: on.RankStarted) -> list[tuple[str, str, str]]:
    """Return in what two ranks differ that must be alike, in words, with both values."""
    pairs = (
        ("MLX", one.mlx, other.mlx),
        ("another version of fatui, with the digest", one.code, other.code),
    )
    return [(what, mine, theirs) for what, mine, theirs in pairs if mine != theirs]


class StartError(RuntimeError):
    """A rank's command cannot be started on this machine; the message is one line."""


class RankProcesses:
    """The processes of one group."""

    def __init__(self, launches: Sequence[RankLaunch], run: str) -> None:
        self._launches, self._run = launches, run
        self._workers: list[Worker] = []
        self.watch = GroupWatch(launches)

    @property
    def first(self) -> Worker:
        """Rank 0's process."""
        return self._workers[0]

    async def start(self, mark: int) -> None:
        """Start all ranks; rank 0, if on this machine, marks the running implementation in a file.

        Raises:
            StartError: a command cannot be started, such as ssh where there is none.
        """
        for launch in self._launches:
            marking = launch.setting.rank == 0 and launch.host.local
            command = with_mark(launch, mark).command if marking else launch.command
            try:
                self._workers.append(await Worker.start(command, self._run, (mark,) if marking else ()))
            except OSError as error:
                raise StartError(f"{launch.where}: {command[0]} cannot be started: {error.strerror}") from error

    async def follow(self, assignment: bytes, take: Callable[[on.AnyEvent], None]) -> None:
        """Hand on the ranks' events until rank 0 has ended well, or the group has failed.

        Args:
            assignment: what to run, sent to every rank once all of them have started alike.
            take: takes the events.
        """

        def take_from(rank: int) -> Callable[[on.AnyEvent], None]:
            def take_one(event: on.AnyEvent) -> None:
                self.watch.take(rank, event)
                if rank == 0 or isinstance(event, on.RankStarted | on.RankAlive | on.RankFailed):
                    take(event)

            return take_one

        reading = [asyncio.create_task(each.read(take_from(rank))) for rank, each in enumerate(self._workers)]
        ending = [asyncio.create_task(self._wait(rank)) for rank in range(len(self._workers))]
        beating = asyncio.create_task(self._beat(assignment))
        try:
            while self.watch.verdict is None and not (reading[0].done() and self.first.process.returncode == 0):
                await asyncio.sleep(BEAT_S / 10)
        finally:
            for task in (*reading, *ending, beating):
                task.cancel()
            await asyncio.gather(*reading, *ending, beating, return_exceptions=True)

    async def _wait(self, rank: int) -> None:
        worker = self._workers[rank]
        await worker.wait()
        self.watch.end(rank, worker.process.returncode or 0, worker.reason())

    async def _beat(self, assignment: bytes) -> None:
        """Send the assignment when all have started, then an empty line a second, and count what is missing."""
        sent = False
        while True:
            if self.watch.started and not self.watch.faults:
                for worker in self._workers:
                    worker.send(b"" if sent else assignment)
                sent = True
            self.watch.beat()
            await asyncio.sleep(BEAT_S)

    def signal(self, number: int) -> None:
        """Signal all ranks on this machine, and the connections to the others."""
        for worker in self._workers:
            worker.signal(number)

    async def end(self) -> None:
        """End all processes, also those on other hosts."""
        await asyncio.gather(*(worker.end() for worker in self._workers))
        await asyncio.gather(*(self._kill_remote(launch) for launch in self._launches if not launch.host.local))

    async def _kill_remote(self, launch: RankLaunch) -> None:
        """Kill a rank that may be stopped on its host; if that cannot be reached, the rank ends by itself."""
        started = self.watch.process_id(launch.setting.rank)
        if started is None:
            return
        command = (*SSH, launch.host.name, f"kill -KILL {started} 2>/dev/null")
        with contextlib.suppress(OSError, TimeoutError):
            process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL, start_new_session=True
            )
            try:
                await asyncio.wait_for(process.wait(), KILL_S)
            except TimeoutError:
                process.kill()
                await process.wait()
