"""Advisor process: reads questions (workloads) as JSON lines, and writes the route of each implementation.

It is separate from the app, so that importing MLX does not delay the screen, and a crash does not end the app.
Run as `python -m fatui.tui.advisor`: one JSON line in per question, one out per answer, the device first;
as `python -m fatui.tui.advisor diagnose`: one JSON line per finding of the doctor.
"""

import asyncio
import contextlib
import sys
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from attention.core.route import Route
from attention.core.workload import Workload
from attention.measure.device import Device
from fatui.untrusted_text import MAX_SHOWN, escape_all

if TYPE_CHECKING:
    from attention.implementations.protocol import Implementation
    from fatui.remote import Remote


class AdviceRequest(msgspec.Struct, kw_only=True):
    """A request for the routes of some implementations on a workload."""

    number: int
    workload: Workload
    """The case whose paths are shown."""
    names: tuple[str, ...]
    others: tuple[Workload, ...] = ()
    """Further cases of the plan, for the memory that they need."""
    elsewhere: bool = False
    """Whether ranks run on other hosts, with as many devices as needed."""


class AdviceReply(msgspec.Struct, kw_only=True):
    """The routes; with neither routes nor problems, only the device."""

    number: int = 0
    device: Device | None = None
    problem: str = ""
    """Why nothing can run here."""
    routes: dict[str, Route] = {}
    problems: dict[str, str] = {}
    """Error message of each implementation that has no route."""
    needs: dict[str, tuple[int, ...]] = {}
    """Bytes that each case would need, inputs included; only cases that the implementation supports and predicts."""
    unsupported: dict[str, dict[str, int]] = {}
    """Why an implementation does not support cases, and how many of them."""
    largest: dict[str, int] = {}
    """The largest number of bytes above the inputs that each implementation is predicted to need in any case."""


def answer(question: AdviceRequest, device: Device) -> AdviceReply:
    """Route each implementation; an exception becomes its entry in `problems`."""
    from attention import implementations
    from attention.engine.ranks import ranks_route, route_here

    def route_of(implementation: "Implementation", workload: Workload) -> Route:
        route = ranks_route if question.elsewhere and workload.ranks > 1 else route_here
        return route(implementation, workload, device)

    made = AdviceReply(number=question.number)
    for name in question.names:
        try:
            implementation = implementations.load_implementation(name)
            made.routes[name] = route_of(implementation, question.workload)
            cases = [(case, route_of(implementation, case)) for case in question.others]
        except Exception as error:
            made.problems[name] = str(error) or type(error).__name__
            continue
        routes = [(question.workload, made.routes[name]), *cases]
        known = [
            (case.held_bytes, route.predicted_bytes)
            for case, route in routes
            if route.supported and route.predicted_bytes is not None
        ]
        reasons = Counter(route.reason for _, route in routes if not route.supported)
        if reasons:
            made.unsupported[name] = dict(reasons)
        if known:
            made.largest[name] = max(predicted for _, predicted in known)
            made.needs[name] = tuple(inputs + predicted for inputs, predicted in known)
    return made


def main() -> None:
    """Answer questions until stdin ends."""
    try:
        from attention.measure.device import probe

        device = probe()
    except Exception as error:
        _say(AdviceReply(problem=str(error) or type(error).__name__))
        return
    _say(AdviceReply(device=device))
    decoder = msgspec.json.Decoder(AdviceRequest)
    for line in sys.stdin.buffer:
        _say(answer(decoder.decode(line), device))


def diagnose() -> None:
    """Print the doctor's findings, one JSON line each."""
    from fatui.diagnosis import diagnose as look

    for finding in look():
        _say(finding)


def _say(made: msgspec.Struct) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(made) + b"\n")
    sys.stdout.buffer.flush()


LINE_LIMIT: Final = 2**22
MAX_CRASHES: Final = 20
RETRY_S: Final = 5.0
"""Seconds between attempts to reach another machine."""


class Advice:
    """The latest routes for the workload on the sliders.

    Attributes:
        device: where it would run; None until the advisor has reported it.
        problem: why nothing can run here, or an empty string.
        answer: the latest routes.
        current: whether they belong to the latest question.
    """

    def __init__(self, changed: Callable[[], None], remote: "Remote | None" = None) -> None:
        """Prepare it; with `remote` the advisor runs on that machine."""
        self.device: Device | None = None
        self.problem = ""
        self.answer = AdviceReply()
        self._changed = changed
        self._pending: AdviceRequest | None = None
        self._next: AdviceRequest | None = None
        self._number = 0
        self._remote = remote
        self._write: Callable[[bytes], None] | None = None

    @property
    def current(self) -> bool:
        """Whether the answer belongs to the latest question."""
        return self.answer.number == self._number

    def ask(
        self,
        workload: Workload,
        names: tuple[str, ...],
        others: tuple[Workload, ...] = (),
        *,
        elsewhere: bool = False,
    ) -> None:
        """Request the routes of a workload, and the memory that the other cases need.

        An older question that was not sent yet is dropped. `elsewhere`: ranks run on other hosts.
        """
        self._number += 1
        self._next = AdviceRequest(
            number=self._number, workload=workload, names=names, others=others, elsewhere=elsewhere
        )
        self._send()

    def _send(self) -> None:
        if self._write is None or self._next is None or self._pending or self.device is None:
            return
        self._pending, self._next = self._next, None
        self._write(msgspec.json.encode(self._pending))

    async def run(self) -> None:
        """Keep an advisor running until cancelled; when a question crashes it, restart it without that question.

        Another machine that cannot be reached is tried again and again: its connection may be back.
        """
        crashes = 0
        while crashes < MAX_CRASHES:
            if self._remote is None:
                await self._run_once()
            elif not await self._run_remotely(self._remote):
                await asyncio.sleep(RETRY_S)
                continue
            if self.problem:
                return
            crashes += 1
            if self._pending is not None:
                problem = "finding its route crashed the advisor process"
                self._take(
                    AdviceReply(number=self._pending.number, problems=dict.fromkeys(self._pending.names, problem))
                )
            self.device = None

    async def _run_once(self) -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fatui.tui.advisor"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
            limit=LINE_LIMIT,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        stdin = process.stdin

        def write(line: bytes) -> None:
            with contextlib.suppress(ConnectionError, RuntimeError):
                stdin.write(line + b"\n")

        self._write = write
        try:
            async for line in process.stdout:
                self._take(msgspec.json.decode(line, type=AdviceReply))
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            self._write = None
            await process.wait()

    async def _run_remotely(self, remote: "Remote") -> bool:
        """Run an advisor on another machine to its end; return whether it crashed, and not the connection."""
        from fatui.remote import RemoteError, RemoteWorker

        try:
            worker = await RemoteWorker.start_service(remote, "advise")
        except RemoteError as error:
            self._lose(str(error))
            return False
        self._write = worker.send
        try:
            await worker.converse(self._take_line)
        except RemoteError as error:
            self._lose(str(error))
            return False
        finally:
            self._write = None
            await worker.end()
        if worker.is_cut or self.device is None:
            self._lose(worker.failure())
            return False
        return True

    def _take_line(self, line: bytes) -> None:
        with contextlib.suppress(msgspec.DecodeError):
            self._take(escape_all(msgspec.json.decode(line, type=AdviceReply), MAX_SHOWN))

    def _lose(self, problem: str) -> None:
        """Take another machine for unreachable until its advisor answers again."""
        self.device, self.problem = None, problem
        self._next, self._pending = self._next or self._pending, None
        self._changed()

    def _take(self, answer: AdviceReply) -> None:
        if answer.device is not None:
            self.device, self.problem = answer.device, ""
        elif answer.problem:
            self.problem = answer.problem
        else:
            self._pending, self.answer = None, answer
        self._changed()
        self._send()


if __name__ == "__main__":
    diagnose() if sys.argv[1:] == ["diagnose"] else main()
