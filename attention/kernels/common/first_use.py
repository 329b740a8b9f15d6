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
UNFINISHED: Final = "its check on first use did not come to an end"
UNFINISHED_TWICE: Final = "its check on first use did not come to an end, twice"
OUT_OF_MEMORY: Final = re.compile(r"out ?of ?memory|insufficient memory|unable to allocate", re.IGNORECASE)
"""Out-of-memory messages of MLX, CUDA and Metal, which are not a verdict on the kernel."""
MAX_ERROR_LENGTH: Final = 8000
"""Maximum number of stored characters of an error."""
Check = Callable[[], str | None]
"""Runs a kernel and returns what is wrong with its results, or None."""


class SelfChecks:
    """The self-check results of one backend's kernels, by the key of the kernel's record."""

    def __init__(self, mark: Callable[[], str]) -> None:
        """Create it with a function returning the machine that results are valid for: GPU, system and MLX version."""
        self._mark = mark
        self._verdicts: dict[tuple[str, str], str] = {}

    def verdict(self, key: str) -> str | None:
        """Return PASSED, UNFINISHED, UNFINISHED_TWICE or the error of a kernel; None if it was never checked."""
        place = (key, self._mark())
        if place not in self._verdicts:
            kept = cache.read_record(key).get("checked", {}).get(place[1])
            if kept in (None, UNFINISHED, UNFINISHED_TWICE):
                return kept  # it may still be running, here or in another process
            self._verdicts[place] = kept
        return self._verdicts[place]

    def distrust_reason(self, key: str) -> str | None:
        """Return why a kernel must not be used here, in one line, or None if unknown."""
        verdict = self.verdict(key)
        if verdict == UNFINISHED_TWICE and cache.is_locked(_lock_name(key)):
            return None  # another process is checking it
        return None if verdict in (PASSED, UNFINISHED, None) else headline(str(verdict))

    def check(self, key: str, name: str, check: Check, prepare: Callable[[], object] = lambda: None) -> str | None:
        """Run the self-check unless it was run here before; return why the kernel must not be used, or None.

        Args:
            key: of the kernel's record.
            name: the kernel's name for reports.
            check: a RuntimeError or ValueError counts as failed; if it ends the process, the next process finds it
                begun and tries once more.
            prepare: runs before the check and may rewrite the record, as compiling does.
        """
        verdict = self.verdict(key)
        if verdict in (None, UNFINISHED, UNFINISHED_TWICE):
            verdict = self._run_check(key, name, check, prepare)
        return None if verdict == PASSED else headline(verdict)

    def ensure(self, key: str, name: str, check: Check, prepare: Callable[[], object] = lambda: None) -> None:
        """Run the self-check unless it was run here before; arguments as in `check`.

        Raises:
            KernelUnavailable: the check failed, now or before.
        """
        reason = self.check(key, name, check, prepare)
        if reason:
            raise KernelUnavailable(f"{name}: {reason}")

    def forget(self) -> None:
        """Clear the in-process cache; the records stay."""
        self._verdicts.clear()

    def _run_check(self, key: str, name: str, check: Check, prepare: Callable[[], object]) -> str:
        with cache.lock(_lock_name(key)):
            kept = self.verdict(key)  # another process may have finished it, or crashed
            if kept not in (None, UNFINISHED):
                return kept
            try:
                prepare()
                self._record(key, name, UNFINISHED_TWICE if kept else UNFINISHED)
                verdict = check() or PASSED
            except KeyboardInterrupt:
                self._record(key, name, kept)
                raise
            except (RuntimeError, ValueError) as error:  # a source that does not compile, a launch that fails
                verdict = str(error)[:MAX_ERROR_LENGTH] or type(error).__name__
            self._record(key, name, kept if OUT_OF_MEMORY.search(verdict) else verdict)
            self._verdicts[key, self._mark()] = verdict
            return verdict

    def _record(self, key: str, name: str, verdict: str | None) -> None:
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
