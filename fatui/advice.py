"""A non-blocking client of the advisor process; of several pending questions only the latest is sent."""

import asyncio
import contextlib
import sys
from collections.abc import Callable
from typing import Final

import msgspec

from attention.device import Device
from attention.workload import Workload
from fatui.advisor import Answer, Question

LINE_LIMIT: Final = 2**22


class Advice:
    """The latest routes for the workload on the sliders.

    Attributes:
        device: where it would run; None until the advisor has reported it.
        problem: why nothing can run here, or an empty string.
        answer: the latest routes.
        current: whether they belong to the latest question.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self.device: Device | None = None
        self.problem = ""
        self.answer = Answer()
        self._changed = changed
        self._asked: Question | None = None
        self._wanted: Question | None = None
        self._number = 0
        self._process: asyncio.subprocess.Process | None = None

    @property
    def current(self) -> bool:
        """Whether the answer belongs to the latest question."""
        return self.answer.number == self._number

    def ask(self, workload: Workload, names: tuple[str, ...], others: tuple[Workload, ...] = ()) -> None:
        """Request the routes of a workload, and the memory that the other cases need.

        An older question that was not sent yet is dropped.
        """
        self._number += 1
        self._wanted = Question(number=self._number, workload=workload, names=names, others=others)
        self._send()

    def _send(self) -> None:
        process = self._process
        if process is None or process.stdin is None or self._wanted is None or self._asked or self.device is None:
            return
        self._asked, self._wanted = self._wanted, None
        with contextlib.suppress(ConnectionError, RuntimeError):
            process.stdin.write(msgspec.json.encode(self._asked) + b"\n")

    async def run(self) -> None:
        """Keep an advisor running until cancelled; when a question crashes it, restart it without that question."""
        for _ in range(20):
            await self._run_once()
            if self.problem:
                return
            if self._asked is not None:
                problem = "finding its route crashed the advisor process"
                self._take(Answer(number=self._asked.number, problems=dict.fromkeys(self._asked.names, problem)))
            self.device = None

    async def _run_once(self) -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fatui.advisor"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
            limit=LINE_LIMIT,
        )
        self._process = process
        assert process.stdout is not None
        try:
            async for line in process.stdout:
                self._take(msgspec.json.decode(line, type=Answer))
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            self._process = None
            await process.wait()

    def _take(self, answer: Answer) -> None:
        if answer.device is not None:
            self.device = answer.device
        elif answer.problem:
            self.problem = answer.problem
        else:
            self._asked, self.answer = None, answer
        self._changed()
        self._send()
