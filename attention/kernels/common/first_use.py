"""Self-checks on first use: before a kernel is used, it runs once on small inputs and is compared with float64.

The result is stored in the kernel's record in the cache folder, per machine, so a new GPU, driver or source is checked
again. A check that did not finish, because its process was stopped or crashed, is repeated once; if that does not
finish either, it counts as failed. A check interrupted from the keyboard or for lack of memory does not count.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from attention.core.errors import KernelUnavailable
from attention.kernels.common import cache

PASSED: Final = "passed"
BEGUN: Final = "its check on first use did not come to an end"
BEGUN_AGAIN: Final = "its check on first use did not come to an end, twice"
NO_MEMORY: Final = re.compile(r"out ?of ?memory|insufficient memory|unable to allocate", re.IGNORECASE)
"""Out-of-memory messages of MLX, CUDA and Metal, which are not a verdict on the kernel."""
LONGEST: Final = 8000
"""Maximum number of stored characters of an error."""
Check = Callable[[], str | None]
"""Runs a kernel and returns what is wrong with its results, or None."""


class FirstUse:
    """The self-check results of one backend's kernels, by the key of the kernel's record."""

    def __init__(self, mark: Callable[[], str]) -> None:
        """Create it with a function returning the machine that results are valid for: GPU, system and MLX version."""
        self._mark = mark
        self._verdicts: dict[tuple[str, str], str] = {}

    def verdict(self, key: str) -> str | None:
        """Return PASSED, BEGUN, BEGUN_AGAIN or what is wrong with a kernel; None if it was never checked here."""
        place = (key, self._mark())
        if place not in self._verdicts:
            kept = cache.read_record(key).get("checked", {}).get(place[1])
            if kept in (None, BEGUN, BEGUN_AGAIN):
                return kept  # it may still be running, here or in another process
            self._verdicts[place] = kept
        return self._verdicts[place]

    def distrust(self, key: str) -> str | None:
        """Return why a kernel must not be used here, in one line, or None if unknown."""
        verdict = self.verdict(key)
        if verdict == BEGUN_AGAIN and cache.is_locked(_lock_name(key)):
            return None  # another process is checking it
        return None if verdict in (PASSED, BEGUN, None) else headline(str(verdict))

    def judged(self, key: str, name: str, check: Check, prepare: Callable[[], object] = lambda: None) -> str | None:
        """Run the self-check unless it was run here before; return why the kernel must not be used, or None.

        Args:
            key: of the kernel's record.
            name: the kernel's name for reports.
            check: a RuntimeError or ValueError counts as failed; if it ends the process, the next process finds it
                begun and tries once more.
            prepare: runs before the check and may rewrite the record, as compiling does.
        """
        verdict = self.verdict(key)
        if verdict in (None, BEGUN, BEGUN_AGAIN):
            verdict = self._judge(key, name, check, prepare)
        return None if verdict == PASSED else headline(verdict)

    def ensure(self, key: str, name: str, check: Check, prepare: Callable[[], object] = lambda: None) -> None:
        """Run the self-check unless it was run here before; arguments as in `judged`.

        Raises:
            KernelUnavailable: the check failed, now or before.
        """
        reason = self.judged(key, name, check, prepare)
        if reason:
            raise KernelUnavailable(f"{name}: {reason}")

    def forget(self) -> None:
        """Clear the in-process cache; the records stay."""
        self._verdicts.clear()

    def _judge(self, key: str, name: str, check: Check, prepare: Callable[[], object]) -> str:
        with cache.lock(_lock_name(key)):
            kept = self.verdict(key)  # another process may have finished it, or crashed
            if kept not in (None, BEGUN):
                return kept
            try:
                prepare()
                self._keep(key, name, BEGUN_AGAIN if kept else BEGUN)
                verdict = check() or PASSED
            except KeyboardInterrupt:
                self._keep(key, name, kept)
                raise
            except (RuntimeError, ValueError) as error:  # a source that does not compile, a launch that fails
                verdict = str(error)[:LONGEST] or type(error).__name__
            self._keep(key, name, kept if NO_MEMORY.search(verdict) else verdict)
            self._verdicts[key, self._mark()] = verdict
            return verdict

    def _keep(self, key: str, name: str, verdict: str | None) -> None:
        """Write a kernel's result for this machine; None removes it."""
        record = cache.read_record(key)
        checked = {mark: text for mark, text in record.get("checked", {}).items() if mark != self._mark()}
        if verdict is not None:
            checked[self._mark()] = verdict
        if checked != record.get("checked", {}):
            with suppress(OSError):  # no space: the result is kept in this process only
                cache.write_record(key, {**record, "name": name, "checked": checked})


def headline(verdict: str) -> str:
    """Return the most informative line of an error: the compiler's, if there is one."""
    lines = [line.strip() for line in verdict.splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[0] if lines else "an error without a text")


def _lock_name(key: str) -> str:
    """Return the lock's name, different from the key: compiling within a check takes the key's own lock."""
    return f"{key}-check"
