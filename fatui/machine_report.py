"""A report about this machine to attach to a bug report: the doctor's findings, and all kernel checks."""

from collections.abc import Callable, Iterator
from typing import Final

from attention.errors import KernelUnavailable
from attention.files import home
from fatui import __version__
from fatui.diagnosis import Finding, diagnose

PERSONAL: Final = ("config", "data", "cache", "presets", "history")
"""Topics whose text is a path."""


def make(tell: Callable[[str], None], measure: bool) -> str:
    """Return the report as Markdown.

    Args:
        tell: called with one line before each slow step.
        measure: whether to measure peaks, and on a Mac to check kernels that were never used.
    """
    found = [finding for finding in diagnose(measure=measure) if finding.topic not in PERSONAL]
    lines = [f"# fatui {__version__}: report of a machine", "", *_of_findings(found), "", "## Metal kernels", ""]
    return without_home("\n".join([*lines, *_of_metal(tell, measure), ""]))


def without_home(text: str) -> str:
    """Replace the home folder, which usually contains the user's name, with "~"."""
    folder = str(home())
    return text.replace(folder, "~") if len(folder) > 1 else text


def _of_findings(found: list[Finding]) -> Iterator[str]:
    for finding in found:
        yield f"- {finding.topic}: {finding.text}" + (f" ({finding.advice})" if finding.advice else "")


def _of_metal(tell: Callable[[str], None], measure: bool) -> Iterator[str]:
    from attention.kernels.metal import verdicts

    try:
        for name in verdicts.check_all() if measure else ():
            tell(f"checking {name}")
    except KernelUnavailable as unavailable:
        yield f"Not checked: {unavailable}."
    known = verdicts.known()
    yield f"{sum(verdict.passed for verdict in known)} of {len(known)} checks passed. {verdicts.UNKNOWN}"
    for verdict in known:
        yield f"- {verdict.name} ({verdict.machine}): {'passed' if verdict.passed else 'FAILED'}"
        if not verdict.passed:
            yield from ("", "```", *verdict.text.splitlines(), "```", "")
