"""The check on first use: a kernel runs once, on small inputs against float64, before anything is made with it.

What that came to is kept in the cache folder, in the kernel's record, for the machine that it was found on; so a new
GPU, driver or text is checked anew. A check that did not come to an end, because its process was stopped or the kernel
brought it down, is made once more; if that does not end either, it counts as failed. One that was interrupted from the
keyboard, or for which there was no memory, was not made.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from attention.errors import KernelUnavailable
from attention.kernels import cache

PASSED: Final = "passed"
BEGUN: Final = "its check on first use did not come to an end"
BEGUN_AGAIN: Final = "its check on first use did not come to an end, twice"
NO_MEMORY: Final = re.compile(r"out ?of ?memory|insufficient memory|unable to allocate", re.IGNORECASE)
"""What MLX, CUDA and Metal say of it: it tells nothing of the kernel."""
LONGEST: Final = 8000
"""Characters of an error that are kept."""
Check = Callable[[], str | None]
"""Runs a kernel and returns what is wrong with its results, or None."""


class FirstUse:
    """The verdicts of one backend's kernels, each under the key of the kernel's record."""

    def __init__(self, mark: Callable[[], str]) -> None:
        """Takes what tells the machine that verdicts hold for: GPU, system, and the MLX that launches."""
        self._mark = mark
        self._verdicts: dict[tuple[str, str], str] = {}

    def verdict(self, key: str) -> str | None:
        """PASSED, BEGUN, BEGUN_AGAIN or what is wrong with a kernel; None if it was never checked here."""
        place = (key, self._mark())
        if place not in self._verdicts:
            kept = cache.read_record(key).get("checked", {}).get(place[1])
            if kept in (None, BEGUN, BEGUN_AGAIN):
                return kept  # it may come to an end yet, here or in another process
            self._verdicts[place] = kept
        return self._verdicts[place]

    def distrust(self, key: str) -> str | None:
        """Why a kernel is not to be used here, in one line, if that is known."""
        verdict = self.verdict(key)
        if verdict == BEGUN_AGAIN and cache.is_locked(_lock_name(key)):
            return None  # another process is at it
        return None if verdict in (PASSED, BEGUN, None) else headline(str(verdict))

    def judged(self, key: str, name: str, check: Check, prepare: Callable[[], object] = lambda: None) -> str | None:
        """Checks a kernel unless that has been done here before; why it is not to be used, in one line, or None.

        Args:
            key: of the kernel's record.
            name: what a report calls it.
            check: a RuntimeError or ValueError of it is a verdict too; should it end the process, the next one finds
                that it was begun, and tries once more.
            prepare: what comes before and may write the record anew, as compiling does.
        """
        verdict = self.verdict(key)
        if verdict in (None, BEGUN, BEGUN_AGAIN):
            verdict = self._judge(key, name, check, prepare)
        return None if verdict == PASSED else headline(verdict)

    def ensure(self, key: str, name: str, check: Check, prepare: Callable[[], object] = lambda: None) -> None:
        """The same.

        Raises:
            KernelUnavailable: the check failed, now or before.
        """
        reason = self.judged(key, name, check, prepare)
        if reason:
            raise KernelUnavailable(f"{name}: {reason}")

    def forget(self) -> None:
        """Forgets what this process knows; the records stay."""
        self._verdicts.clear()

    def _judge(self, key: str, name: str, check: Check, prepare: Callable[[], object]) -> str:
        with cache.lock(_lock_name(key)):
            kept = self.verdict(key)  # another process may have been faster, or have come to grief
            if kept not in (None, BEGUN):
                return kept
            try:
                prepare()
                self._keep(key, name, BEGUN_AGAIN if kept else BEGUN)
                verdict = check() or PASSED
            except KeyboardInterrupt:
                self._keep(key, name, kept)
                raise
            except (RuntimeError, ValueError) as error:  # a text that does not compile, a launch that fails
                verdict = str(error)[:LONGEST] or type(error).__name__
            self._keep(key, name, kept if NO_MEMORY.search(verdict) else verdict)
            self._verdicts[key, self._mark()] = verdict
            return verdict

    def _keep(self, key: str, name: str, verdict: str | None) -> None:
        """Writes what is known of a kernel on this machine; None: nothing."""
        record = cache.read_record(key)
        checked = {mark: text for mark, text in record.get("checked", {}).items() if mark != self._mark()}
        if verdict is not None:
            checked[self._mark()] = verdict
        if checked != record.get("checked", {}):
            with suppress(OSError):  # no room: then the verdict holds for this process alone
                cache.write_record(key, {**record, "name": name, "checked": checked})


def headline(verdict: str) -> str:
    """The line of an error that says most: the compiler's own, where there is one."""
    lines = [line.strip() for line in verdict.splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[0] if lines else "an error without a text")


def _lock_name(key: str) -> str:
    """Not the key itself: compiling, which a check may have to do, takes that lock."""
    return f"{key}-check"
